"""The counters process: the chunk agent, and the timer that closes deltas."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Collection
from itertools import islice

import psycopg
import structlog

from schemas.catalog import check_catalog, current
from services.counters.adjusting import apply_approved
from services.counters.calendars import carry_out_changes
from services.counters.closing import close_round
from services.counters.config import load_configuration
from services.counters.conservation import conservation
from services.counters.deltas import DeltaWriter, Invoices
from services.counters.generations import rotate_generations
from services.counters.ledger import GROUP, Counters
from services.counters.prepare import Preparer
from services.counters.redriving import UsageRetry
from services.counters.watermarks import watch_watermarks
from services.streaming import outbox
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.streaming.observe import Health, Status
from services.streaming.redriving import Redrives, redrive_forever
from services.streaming.worker import Worker
from services.wire import metrics
from services.wire.codec import Encoder
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.topics import USAGE_VERSIONS
from upcasters.chain import check_chain, revision, upcasters

log = structlog.get_logger(__name__)

_ROTATION_CHECK_SECONDS = 60.0
_CLOSING_SECONDS_MAX = 60.0
#: Few enough that a chunk which needs one of them does not wait for long.
REVISED_PER_ROUND = 500


class DeltaTimer:
    """Closes deltas on its own connection, every interval; ``relay`` is set when there are new ones."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.database = Database(settings.postgres(), "deltas")
        self.relay = asyncio.Event()
        self._writer = DeltaWriter(Encoder(current("usage_delta")))
        self._invoices = Invoices(
            int(settings.invoice_grace_seconds * 1_000_000), int(settings.close_margin_seconds * 1_000_000)
        )
        self._next_rotation = 0.0
        self._last_good = time.monotonic()
        self._revised: dict[bytes, None] = {}
        self._noting = threading.Lock()
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def note_revised(self, items: Collection[bytes]) -> None:
        """Close these items without waiting for the interval; from any thread.

        Only a hint: whatever becomes of it, the next tick closes what is dirty.
        """
        with self._noting:
            self._revised.update(dict.fromkeys(items))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    def _next_revised(self) -> list[bytes]:
        with self._noting:
            items = list(islice(self._revised, REVISED_PER_ROUND))
            for item_id in items:
                del self._revised[item_id]
        return items

    def close_revised(self) -> int:
        """Close the items that were noted and are not locked; returns the number of deltas."""
        db = self.database.connection()
        closed = 0
        while items := self._next_revised():
            fault_point("close.revised")
            closed += close_round(db, self._writer, items=items, invoices=self._invoices)[1]
        metrics.DELTAS_CLOSED.inc(closed)
        return closed

    def tick(self) -> int:
        """Close everything that is dirty now; returns the number of deltas."""
        db = self.database.connection()
        if time.monotonic() >= self._next_rotation:
            self._next_rotation = time.monotonic() + _ROTATION_CHECK_SECONDS
            try:
                if rotate_generations(db, self._settings.dedupe_days):
                    log.info("idempotency keys start a new generation")
            except psycopg.errors.LockNotAvailable as error:
                log.warning("the change of generation waits for a long reader", error=error)
        while apply_approved(db):
            pass
        carry_out_changes(db)
        closed = 0
        while True:
            closed += self.close_revised()
            items, deltas = close_round(db, self._writer, invoices=self._invoices)
            metrics.DELTAS_CLOSED.inc(deltas)
            closed += deltas
            if items == 0:
                break
        metrics.CONSERVATION_GAP.set(conservation(db).gap)
        self._last_good = time.monotonic()
        return closed

    def health(self) -> tuple[Status, str]:
        """Degraded when no round has ended well for a while."""
        age = time.monotonic() - self._last_good
        if age > _CLOSING_SECONDS_MAX + self._settings.delta_interval_seconds:
            return "degraded", f"no round of closing ended well for {age:.0f} s"
        return "healthy", "deltas are closed"

    async def loop(self) -> None:
        """Tick for ever, and close revised items in between; a world that is away is waited for."""
        self._loop = asyncio.get_running_loop()
        due = time.monotonic()
        while True:
            self._woken.clear()
            is_due = time.monotonic() >= due
            try:
                if await asyncio.to_thread(self.tick if is_due else self.close_revised):
                    self.relay.set()
            except TRANSIENT_ERRORS as error:
                log.warning("deltas wait", error=error)
                await asyncio.to_thread(self.database.reset)
            if is_due:
                due = time.monotonic() + self._settings.delta_interval_seconds
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), max(0.0, due - time.monotonic()))


async def run(settings: Settings) -> None:
    """Run one counters worker until it is told to stop."""
    check_catalog()
    chain = upcasters()
    check_chain(chain)
    configuration = Database(settings.postgres(), "configuration")
    timer = DeltaTimer(settings)
    preparer = Preparer(decoder_for(settings), chain)
    counters = Counters(
        preparer,
        lambda: load_configuration(configuration.connection()),
        dedupe_days=settings.dedupe_days,
        revised=timer.note_revised,
    )
    health = Health({"closing": timer.health})
    worker = Worker(settings, group=GROUP, topics=list(USAGE_VERSIONS), handler=counters, health=health)
    retry = UsageRetry(preparer, dedupe_days=settings.dedupe_days)
    redrives = Redrives(GROUP, retry, tried_with=revision())
    await worker.run(
        timer.loop,
        lambda: outbox.relay_forever(settings, GROUP, timer.relay),
        lambda: redrive_forever(settings, redrives),
        lambda: watch_watermarks(settings),
    )
