"""Exit status 0 when the process of this container is alive: its own ``/health/live`` says so.

A worker serves it on ``TIDEMETER_OBSERVE_PORT``, the API on ``TIDEMETER_HTTP_PORT``, the bridge on
``TIDEMETER_BRIDGE_PORT``; one of them listens. Whether it can do its work ``/health/ready`` says.
"""

import os
import sys
import urllib.error
import urllib.request

PORTS = {"TIDEMETER_OBSERVE_PORT": "0", "TIDEMETER_HTTP_PORT": "8080", "TIDEMETER_BRIDGE_PORT": "8081"}


def lives(port: str) -> bool:
    """Whether a process of ours answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=3) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    named = [os.environ.get(name, default) for name, default in PORTS.items()]
    sys.exit(0 if any(port != "0" and lives(port) for port in named) else 1)
