"""A recurring job: do what is due, sleep, again. What it does is committed before it reports anything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.observe import Status
from services.wire import metrics

log = structlog.get_logger(__name__)

#: How long a step that was begun may go on once the process is told to stop.
FINISH_SECONDS = 8.0

T = TypeVar("T")
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The clock of the running process; tests have others."""
    return datetime.now(UTC)


class Loop:
    """Runs ``step`` every ``seconds``, and at once again while it returns True (there is more)."""

    def __init__(
        self, name: str, seconds: float, step: Callable[[], Awaitable[bool]], database: Database
    ) -> None:
        self.name = name
        self._seconds = seconds
        self._step = step
        self._database = database
        self._waiting_for: str | None = None

    async def run(self) -> None:
        """Until cancelled; the step under way is finished then."""
        while True:
            try:
                more = await finished(self._step())
                self._waiting_for = None
            except TRANSIENT_ERRORS as error:
                more = False
                self._waiting_for = type(error).__name__
                metrics.RETRIES.labels("PostgreSQL").inc()
                log.warning("waiting", world="PostgreSQL", job=self.name, error=error)
                await asyncio.to_thread(self._database.reset)
            if not more:
                await asyncio.sleep(self._seconds if self._waiting_for is None else min(5.0, self._seconds))

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        if self._waiting_for is not None:
            return "unhealthy", f"waits for PostgreSQL ({self._waiting_for})"
        return "healthy", "works"


async def finished(step: Awaitable[T]) -> T:
    """Like ``await step``, but a cancellation lets the step come to its end first."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=FINISH_SECONDS)
        if not task.done():
            task.cancel()
        raise


async def in_thread(database: Database, work: Callable[..., T], *values: Any) -> T:
    """``work(connection, *values)`` in a thread. One call of a ``database`` at a time."""
    return await asyncio.to_thread(lambda: work(database.connection(), *values))
