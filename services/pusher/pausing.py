"""Meters that the sink does not take usage for: paused, asked about, resumed.

A meter that does not exist at Stripe or is archived refuses everything that is sent to it. Its intents then
stay ``pending`` instead of failing one by one, and nothing new of it is claimed. Whether it is back is asked
by reading, never tried with usage: on the asynchronous stream a try proves nothing. What is in doubt goes on
being settled meanwhile; what comes too late meanwhile is carried forward once the meter is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg
import structlog

from services.pusher.ops import OUTBOX_INSERT, meter_event, outbox_values
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.observe import Status
from services.wire import metrics
from services.wire.records import OutboxRow

log = structlog.get_logger(__name__)

AsyncConnection = psycopg.AsyncConnection[Any]

ASK_EVERY = timedelta(seconds=15)
ASK_EVERY_MAX = timedelta(minutes=5)
LOOK_SECONDS = 2.0

#: Nothing new of a paused meter leaves. ``m`` is a row of ``meter_events``.
NOT_PAUSED = "NOT EXISTS (SELECT FROM paused_meters WHERE paused_meters.event_name = m.event_name)"

#: Parameters: :func:`pause_values`. Returns the meters that were not paused before.
PAUSE = """
    INSERT INTO paused_meters (event_name, reason, source, paused_at, next_probe_at)
    SELECT event_name, reason, %s, %s, %s FROM unnest(%s::text[], %s::text[]) AS a (event_name, reason)
    ON CONFLICT (event_name) DO NOTHING
    RETURNING event_name, reason
    """

_PAUSED = "SELECT event_name, next_probe_at <= %s FROM paused_meters ORDER BY next_probe_at, event_name"
_ASK_LATER = """
    UPDATE paused_meters SET probes = probes + 1,
        next_probe_at = %s + least(%s, %s * power(2, least(probes, 20)))
    WHERE event_name = %s
    """
_RESUME = "DELETE FROM paused_meters WHERE event_name = %s RETURNING reason"


def pause_values(reasons: dict[str, str], *, source: str, now: datetime) -> tuple[Any, ...]:
    """Parameters of :data:`PAUSE`; ``reasons`` by event name, as codes."""
    names = sorted(reasons)  # rows are locked in this order
    return source, now, now + ASK_EVERY, names, [reasons[name] for name in names]


def paused_events(paused: Iterable[tuple[str, str]], *, source: str, now: datetime) -> list[OutboxRow]:
    """``meter_paused`` for each row that :data:`PAUSE` returned."""
    return [
        meter_event("meter_paused", event_name, reason, source=source, now=now)
        for event_name, reason in paused
    ]


class PausedMeters:
    """Asks the sink about each paused meter, again and again, and lets it go on when it is back.

    ``takes`` says whether the sink takes usage for an event name: False when it does not or cannot tell.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[AsyncConnection]],
        takes: Callable[[str], Awaitable[bool]],
        *,
        clock: Callable[[], datetime],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._takes = takes
        self._clock = clock
        self._on_change = on_change
        self._names: Sequence[str] = ()

    async def run(self) -> None:
        """Ask until cancelled."""
        session: AsyncConnection | None = None
        try:
            while True:
                try:
                    if session is None or session.closed:
                        session = await self._connect()
                    await self.ask(session)
                except TRANSIENT_ERRORS as error:
                    log.warning("waiting", world="PostgreSQL", error=error)
                    if session is not None:
                        await session.close()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            if session is not None:
                await session.close()

    async def ask(self, session: AsyncConnection) -> list[str]:
        """Ask about the meters whose turn it is; returns which are back."""
        back: list[str] = []
        paused = await (await session.execute(_PAUSED, (self._clock(),))).fetchall()
        for event_name, is_due in paused:
            if not is_due:
                continue
            if await self._takes(event_name):
                back += await self._resume(session, event_name)
            else:
                await session.execute(_ASK_LATER, (self._clock(), ASK_EVERY_MAX, ASK_EVERY, event_name))
        self._names = sorted({event_name for event_name, _ in paused} - set(back))
        metrics.METERS_PAUSED.set(len(self._names))
        if back:
            self._on_change()
        return back

    async def _resume(self, session: AsyncConnection, event_name: str) -> list[str]:
        async with session.transaction():
            row = await (await session.execute(_RESUME, (event_name,))).fetchone()
            if row is None:
                return []  # another pusher was first
            event = meter_event("meter_resumed", event_name, row[0], source="sync", now=self._clock())
            await session.execute(OUTBOX_INSERT, outbox_values([event]))
        log.info("meter resumed", event_name=event_name)
        return [event_name]

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        if self._names:
            return "degraded", f"paused, for Stripe does not take their usage: {', '.join(self._names)}"
        return "healthy", "none paused"
