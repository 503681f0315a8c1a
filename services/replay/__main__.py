"""One dry run in a process of its own, for the API: ``python -m services.replay``; see ``answering``.

Reads: a ``ReplayRequest``. Writes: a ``DryRunAnswer``. So one tenant's large window takes no time from
another's events.
"""

from __future__ import annotations

import sys

import psycopg
import structlog

from services.replay.answering import answer_one
from services.replay.carrying import replayer_of
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.replay_plan import DryRunAnswer, Refusal
from services.streaming.replays import RefusedReplay, ReplayRequest
from services.wire.settings import Settings

log = structlog.get_logger(__name__)


def answer(settings: Settings, request: ReplayRequest) -> DryRunAnswer:
    """The plan, or why there is none."""
    try:
        return DryRunAnswer(plan=replayer_of(settings).dry_run(request))
    except RefusedReplay as error:
        return DryRunAnswer(refusal=Refusal(error.code, str(error), error.path))
    except TRANSIENT_ERRORS as error:
        log.warning("dry run gave up", error=error)
        return DryRunAnswer(away="PostgreSQL" if isinstance(error, psycopg.Error) else "Kafka")


if __name__ == "__main__":
    sys.exit(answer_one("dry-run", ReplayRequest, answer))
