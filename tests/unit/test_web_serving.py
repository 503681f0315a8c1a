"""A process that serves HTTP, as a supervisor sees it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PROGRAM = """
import sys
from litestar import Litestar
from services.web.app import live, serve
serve(Litestar([live]), "127.0.0.1", int(sys.argv[1]))
print("returned", flush=True)
"""


def test_sigterm_ends_it_well() -> None:
    """Exit status 0: a supervisor that counts failures must not count a stop."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=2).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, "returned\n")
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
