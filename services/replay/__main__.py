"""One dry run in a process of its own: ``python -m services.replay``.

Reads: a ``ReplayRequest`` in JSON, one line of standard input.
Writes: a ``DryRunAnswer`` in JSON, one line of standard output. Nothing else anywhere.
Promises: it ends when its standard input does, for then nobody waits for the answer any more.
Fails: with exit status 70 and no answer, when a defect keeps it from one; the log says which.

The API starts it, so that one tenant's large window takes no time from another's events.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

import msgspec
import psycopg
import structlog

from services.replay.carrying import replayer_of
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.replay_plan import DryRunAnswer, Refusal
from services.streaming.replays import RefusedReplay, ReplayRequest
from services.wire.errors import Misconfigured
from services.wire.log import configure_logging
from services.wire.settings import Settings, load_settings

EXIT_BROKEN = 70
#: The API goes first where both want a core.
NICENESS = 5

log = structlog.get_logger(__name__)


def main() -> int:
    """Read, answer; the exit status."""
    request = msgspec.json.decode(_line(), type=ReplayRequest)
    threading.Thread(target=_end_with_input, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    configure_logging(service="dry-run")  # before anything is said: standard output is for the answer
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        answer = _answer(settings, request)
    except Misconfigured as error:
        log.error("dry run cannot start", reason=str(error))
        return EXIT_BROKEN
    except Exception as error:
        log.error("dry run failed", exc_info=error)
        return EXIT_BROKEN
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _answer(settings: Settings, request: ReplayRequest) -> DryRunAnswer:
    try:
        return DryRunAnswer(plan=replayer_of(settings).dry_run(request))
    except RefusedReplay as error:
        return DryRunAnswer(refusal=Refusal(error.code, str(error), error.path))
    except TRANSIENT_ERRORS as error:
        log.warning("dry run gave up", error=error)
        return DryRunAnswer(away="PostgreSQL" if isinstance(error, psycopg.Error) else "Kafka")


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
    os._exit(EXIT_BROKEN)


if __name__ == "__main__":
    sys.exit(main())
