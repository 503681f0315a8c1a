"""Named fault points: ``TIDEMETER_FAULT_POINT=name:n`` kills the process the n-th time ``name`` is reached.

In production the variable is unset and a fault point is one comparison. Tests that use it also set
``TIDEMETER_FAULT_LOG`` and assert that the point was reached.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_NAME, _, _COUNT = os.environ.get("TIDEMETER_FAULT_POINT", "").partition(":")
_left = int(_COUNT or 1)


def fault_point(name: str) -> None:
    """Die here, by SIGKILL, when the environment says so."""
    if name == _NAME:
        _hit(name)


def _hit(name: str) -> None:
    global _left
    _left -= 1
    if _left == 0:
        log = os.environ.get("TIDEMETER_FAULT_LOG")
        if log is not None:
            with Path(log).open("a", encoding="utf-8") as stream:
                stream.write(f"{name}\n")
        os.kill(os.getpid(), signal.SIGKILL)
