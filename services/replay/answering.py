"""One question answered in a process of its own, which another process starts and waits for.

Reads: a request in JSON, one line of standard input.
Writes: an answer in JSON, one line of standard output. Nothing else anywhere.
Promises: it ends when its standard input does, for then nobody waits for the answer any more.
Fails: with exit status 70 and no answer, when a defect keeps it from one; the log says which.

The API starts it, so that one caller's large question takes no time from another's events.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec
import structlog

from services.wire.errors import Misconfigured
from services.wire.log import configure_logging
from services.wire.settings import Settings, load_settings

EXIT_BROKEN = 70
#: The API goes first where both want a core.
NICENESS = 5

Request = TypeVar("Request")

log = structlog.get_logger(__name__)

_answered = threading.Event()


def answer_one(
    service: str, asked: type[Request], answer: Callable[[Settings, Request], msgspec.Struct]
) -> int:
    """Read a request, answer it; the exit status."""
    configure_logging(service=service)  # before anything is said: standard output is for the answer
    try:
        request = msgspec.json.decode(_line(), type=asked)
        threading.Thread(target=_end_with_input, daemon=True).start()
        with contextlib.suppress(OSError):
            os.nice(NICENESS)
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service=service)
        found = msgspec.json.encode(answer(settings, request))
    except Misconfigured as error:
        log.error("cannot start", reason=str(error))
        return EXIT_BROKEN
    except Exception as error:
        log.error("failed", exc_info=error)
        return EXIT_BROKEN
    _answered.set()  # who has read the line may be gone before the next one here
    sys.stdout.buffer.write(found + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _line() -> bytes:
    """One line, read past any buffer: a thread that waits for more must hold no lock at the end."""
    found = b""
    while not found.endswith(b"\n"):
        if not (piece := os.read(0, 65_536)):
            break
        found += piece
    return found


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0 if _answered.is_set() else EXIT_BROKEN)
