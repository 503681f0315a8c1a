"""Run what is due: one lane for each handler, with threads of its own, so that none waits for another.

::

    claim (durable) ─► first: ask Stripe, or call the user's function ─► one transaction: fence, order,
                                                                         effect, outbox, settled

A lane's threads take turns to look for work: one looks, the others work or wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from services.streaming import outbox
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.streaming.observe import Status
from services.webhooks import store
from services.webhooks.deciding import Failure, Policy, failure_of, is_stale, next_after
from services.webhooks.handling import Connection, Handler, Unfinished, WebhookEvent
from services.webhooks.own import BUILT_IN, Calls, UserHandler
from services.webhooks.reading import event_of
from services.webhooks.store import Claimed
from services.webhooks.stripe_access import StripeAccess
from services.wire import metrics
from services.wire.errors import Transient, require
from services.wire.ops import DISPATCHER
from services.wire.records import OutboxRow, Source, ops_event, parked_record
from services.wire.settings import Settings
from services.wire.times import micros
from services.wire.topics import DEAD_LETTERS
from services.wire.waits import full_jitter

POLL_SECONDS = 0.25
COUNTS_EVERY_SECONDS = 5.0
STOP_SECONDS_MAX = 8.0
RETRY_CAP_SECONDS = 2.0
#: Threads of one user's handler that may hang before it gets no more events.
ABANDONED_MAX = 8

SPENT = Failure("LeaseEnded", "not_finished", is_final=True)

log = structlog.get_logger(__name__)


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


class Work(Protocol):
    """What a lane does with an event."""

    def first(self, event: WebhookEvent) -> Any:
        """Outside of any transaction; may be repeated. Whatever it raises, the attempt failed."""

    def then(self, db: Connection, event: WebhookEvent, found: Any, now: datetime) -> Sequence[OutboxRow]:
        """The effect, inside the transaction that settles the run."""

    def heeds_order(self, event_type: str) -> bool:
        """Whether an event of the type is stale when a newer one of its object was handled."""

    def sets_order(self, event_type: str) -> bool:
        """Whether an event of the type, once handled, makes older ones of its object stale."""

    def obstacle(self) -> str | None:
        """Why nothing more may be begun, if so."""


class BuiltIn:
    """The handlers of the product. Types that it has none for are done at once.

    So are snapshots of another mode than the key's: a Connect endpoint gets both, and what is tested is not
    billed. A thin event tells nothing before it is fetched, which the key of another mode cannot.
    """

    def __init__(self, handlers: Mapping[str, Handler], stripe_access: StripeAccess) -> None:
        self._handlers = handlers
        self._stripe = stripe_access

    def _handler(self, event: WebhookEvent) -> Handler | None:
        if not event.is_thin and self._stripe.livemode is (not event.livemode):
            return None
        return self._handlers.get(event.event_type)

    def first(self, event: WebhookEvent) -> Any:
        handler = self._handler(event)
        return None if handler is None else handler.fetch(event, self._stripe.client(event))

    def then(self, db: Connection, event: WebhookEvent, found: Any, now: datetime) -> Sequence[OutboxRow]:
        handler = self._handler(event)
        return () if handler is None else handler.apply(db, event, found, now)

    def heeds_order(self, event_type: str) -> bool:
        handler = self._handlers.get(event_type)
        return handler is None or handler.is_state

    def sets_order(self, event_type: str) -> bool:
        """What nobody reads tells nothing, so it makes nothing stale."""
        handler = self._handlers.get(event_type)
        return handler is not None and handler.is_state

    def obstacle(self) -> str | None:
        return None


class Own:
    """One handler of a user's."""

    def __init__(self, handler: UserHandler, policy: Policy, abandoned_max: int = ABANDONED_MAX) -> None:
        self._handler = handler
        self._calls = Calls(
            handler.function, timeout_seconds=policy.timeout_seconds, abandoned_max=abandoned_max
        )

    def first(self, event: WebhookEvent) -> Any:
        self._calls.call(event)

    def then(self, _: Connection, __: WebhookEvent, ___: Any, ____: datetime) -> Sequence[OutboxRow]:
        return ()

    def heeds_order(self, _: str) -> bool:
        return self._handler.is_state

    def sets_order(self, _: str) -> bool:
        return self._handler.is_state

    def obstacle(self) -> str | None:
        if self._calls.has_room:
            return None
        return f"{self._calls.abandoned} calls of {self._handler.name} hang"


def by_type(handlers: Iterable[Handler]) -> dict[str, Handler]:
    """Which handler has which type.

    Raises:
        Broken: two have the same.
    """
    found: dict[str, Handler] = {}
    for handler in handlers:
        for name in handler.types:
            require(name not in found, f"two handlers for {name}")
            found[name] = handler
    return found


@dataclass(frozen=True, slots=True)
class Tools:
    """What lanes share. ``chance`` gives numbers in [0, 1)."""

    dsn: str
    policy: Policy
    clock: Callable[[], datetime]
    chance: Callable[[], float]
    on_outbox: Callable[[], None]
    broken: Callable[[str, BaseException], None]
    stopping: threading.Event


class Lane:
    """The threads of one handler."""

    def __init__(self, name: str, work: Work, tools: Tools, threads: int) -> None:
        self.name = name
        self.work = work
        self.waiting_for: str | None = None
        self._tools = tools
        self._turn = threading.Lock()
        self._wake = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name=f"webhooks-{name}-{number}")
            for number in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Something may be due."""
        self._wake.set()

    def join(self, until_s: float) -> None:
        """Wait for the attempts under way. What is not done by ``until_s`` is found again by its lease."""
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        database = Database(self._tools.dsn, "webhooks")
        try:
            while not self._tools.stopping.is_set():
                with self._turn:
                    run = self._next(database)
                if run is not None:
                    fault_point("webhooks.claimed")
                    self._attempt(database, run)
                    self._wake.set()  # its successor may be due now
        except BaseException as error:
            self._tools.broken("webhook dispatch failed", error)
        finally:
            database.reset()

    # -- Claiming ------------------------------------------------------------------------------------

    def _next(self, database: Database) -> Claimed | None:
        """The next run that is due; waits for one. None when the process stops."""
        failures = 0
        while not self._tools.stopping.is_set():
            self._wake.clear()
            wait = POLL_SECONDS
            if self.work.obstacle() is None:
                try:
                    run = store.claim(
                        database.connection(),
                        self.name,
                        now=self._tools.clock(),
                        policy=self._tools.policy,
                    )
                    failures, self.waiting_for = 0, None
                    if run is not None:
                        return run
                except TRANSIENT_ERRORS as error:
                    failures += 1
                    wait = self._away(database, error, failures)
            self._wake.wait(wait)
        return None

    def _away(self, database: Database, error: Exception, failures: int) -> float:
        """Note that PostgreSQL is away; seconds until the next try."""
        self.waiting_for = f"PostgreSQL ({type(error).__name__})"
        metrics.RETRIES.labels("PostgreSQL").inc()
        log.warning("waiting", world="PostgreSQL", error=error, attempt=failures, handler=self.name)
        database.reset()
        return full_jitter(failures, self._tools.chance(), base_seconds=0.1, cap_seconds=RETRY_CAP_SECONDS)

    # -- One attempt ---------------------------------------------------------------------------------

    def _attempt(self, database: Database, run: Claimed) -> None:
        if run.is_spent:
            self._fail(database, run, SPENT)
            return
        try:
            event = event_of(run.facts)
            stale = self._durably(database, run, lambda db: self._is_stale(db, run))
            if stale is None:
                return
            found = None if stale else self.work.first(event)
            fault_point("webhooks.fetched")
            result = self._durably(database, run, lambda db: self._settle(db, run, event, found, stale))
            if result is not None:
                fault_point("webhooks.after_commit")
                metrics.WEBHOOK_ATTEMPTS.labels(result).inc()
        except BaseException as error:  # what a handler raises ends this attempt, and nothing else
            self._fail(database, run, failure_of(error))

    def _is_stale(self, db: Connection, run: Claimed) -> bool:
        """Before anybody is asked or called."""
        newest_at = store.newest_of(db, run) if self.work.heeds_order(run.facts.event_type) else None
        return is_stale(run.facts.created_at, newest_at)

    def _settle(self, db: Connection, run: Claimed, event: WebhookEvent, found: Any, stale: bool) -> str:
        """The effect, and that it is done or has to go on; or nothing, when another took the run over."""
        rows: Sequence[OutboxRow] = ()
        with db.transaction():
            if not store.is_mine(db, run):
                return "superseded"
            now = self._tools.clock()
            sets_order = self.work.sets_order(run.facts.event_type)
            if not stale and sets_order:
                stale = is_stale(run.facts.created_at, store.lock_newest(db, run))
            if not stale:
                try:
                    rows = self.work.then(db, event, found, now)
                except Unfinished as error:
                    return self._store_failure(db, run, failure_of(error))
                outbox.enqueue(db, DISPATCHER, rows)
                if sets_order:
                    store.remember_newest(db, run)
            store.settle(db, run, "stale" if stale else "succeeded", now)
            fault_point("webhooks.before_commit")
        if rows:
            self._tools.on_outbox()
        return "stale" if stale else "succeeded"

    def _fail(self, database: Database, run: Claimed, failure: Failure) -> None:
        log.warning(
            "webhook attempt failed",
            handler=run.handler,
            event_id=run.facts.event_id,
            type=run.facts.event_type,
            attempts=run.attempts,
            error_class=failure.error_class,
            error_code=failure.error_code,
        )
        result = self._durably(database, run, lambda db: self._store_failure(db, run, failure))
        if result is not None:
            metrics.WEBHOOK_ATTEMPTS.labels(result).inc()

    def _store_failure(self, db: Connection, run: Claimed, failure: Failure) -> str:
        with db.transaction():
            if not store.is_mine(db, run):
                return "superseded"
            now = self._tools.clock()
            then = next_after(
                failure, run.attempts, now=now, chance=self._tools.chance(), policy=self._tools.policy
            )
            store.fail(db, run, failure, then)
            if then.state == "dead":
                outbox.enqueue(db, DISPATCHER, dead_lettered(run, failure, now))
        if then.state == "dead":
            self._tools.on_outbox()
        return then.state

    def _durably(self, database: Database, run: Claimed, work: Callable[[Connection], Any]) -> Any:
        """Do ``work``, however long PostgreSQL is away. None: it is there, the lease has ended, and it still
        does not take it; or the process stops. Then whoever claims the run next begins anew.

        Every transaction of ``work`` looks first whether the run is still this process's, so one that was
        committed without an answer is not done again.
        """
        failures, is_last = 0, False
        while True:
            try:
                result = work(database.connection())
                self.waiting_for = None
                return result
            except TRANSIENT_ERRORS as error:
                if isinstance(error, Transient):
                    raise  # a handler's: something else is away
                failures += 1
                wait = self._away(database, error, failures)
                if is_last or self._tools.stopping.is_set():
                    return None
                time.sleep(wait)
                is_last = self._tools.clock() >= run.lease_ends and _answers(database)


def _answers(database: Database) -> bool:
    try:
        database.connection().execute("SELECT 1")
    except TRANSIENT_ERRORS:
        database.reset()
        return False
    return True


def dead_lettered(run: Claimed, failure: Failure, now: datetime) -> list[OutboxRow]:
    """What a run leaves when it dies: the event's body, parked, and one ops event."""
    facts = run.facts
    source = Source(run.topic, run.partition, run.offset, micros(facts.received_at) // 1000)
    reason = failure.error_code or "refused" if failure.is_final else "attempts_exhausted"
    names = {"event_id": facts.event_id, "handler": run.handler, "type": facts.event_type}
    return [
        parked_record(
            DEAD_LETTERS,
            source,
            facts.body,
            reason=reason,
            stage="handle",
            error_class=failure.error_class,
            service=DISPATCHER,
            original_headers={},
            **names,
        ),
        ops_event(
            "webhook_dlq.dead_lettered",
            subject_type="webhook_run",
            # Once it was replayed it can die again.
            subject_id=f"{facts.event_id}/{run.handler}/{run.replays}",
            source="dispatcher",
            at_us=micros(now),
            attributes={
                **names,
                "attempts": str(run.attempts),
                "error_class": failure.error_class,
                "reason": reason,
            },
        ),
    ]


class Dispatcher:
    """Every lane of one process, and what an operator may ask of them."""

    def __init__(
        self,
        dsn: str,
        built_in: BuiltIn,
        own: Sequence[UserHandler] = (),
        *,
        policy: Policy | None = None,
        concurrency: int = 4,
        clock: Callable[[], datetime] = utc_now,
        chance: Callable[[], float] = random.random,
        on_outbox: Callable[[], None] = lambda: None,
        broken: Callable[[str, BaseException], None],
    ) -> None:
        policy = policy or Policy()
        self._stopping = threading.Event()
        tools = Tools(dsn, policy, clock, chance, on_outbox, broken, self._stopping)
        self._lanes = [
            Lane(BUILT_IN, built_in, tools, concurrency),
            *(Lane(one.name, Own(one, policy), tools, concurrency) for one in own),
        ]
        self._database = Database(dsn, "webhook-counts")
        self._counts: dict[str, int] = {}
        self._orphans: list[tuple[str, int]] = []
        self._counted = True

    @classmethod
    def from_settings(
        cls, settings: Settings, built_in: BuiltIn, own: Sequence[UserHandler], **more: Any
    ) -> Dispatcher:
        """As the operator set it up."""
        return cls(
            settings.postgres(),
            built_in,
            own,
            policy=Policy.from_settings(settings),
            concurrency=settings.webhook_concurrency,
            **more,
        )

    def wake(self) -> None:
        """There may be something to do; from any thread."""
        for lane in self._lanes:
            lane.wake()

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def stop(self) -> None:
        """Begin nothing more, and wait a while for what is under way."""
        self._stopping.set()
        self.wake()
        until_s = time.monotonic() + STOP_SECONDS_MAX
        for lane in self._lanes:
            lane.join(until_s)

    async def run(self) -> None:
        """Work until cancelled; then finish the attempts under way."""
        self.start()
        try:
            while True:
                await asyncio.to_thread(self.count)
                await asyncio.sleep(COUNTS_EVERY_SECONDS)
        finally:
            await asyncio.to_thread(self.stop)

    def count(self) -> None:
        """Read how runs stand, for the gauges and for :meth:`check`."""
        try:
            db = self._database.connection()
            self._counts = store.counts(db)
            self._orphans = store.orphans(db, [lane.name for lane in self._lanes])
            self._counted = True
        except TRANSIENT_ERRORS:
            self._counted = False
            with contextlib.suppress(Exception):
                self._database.reset()
            return
        for state in ("received", "processing", "failed", "dead"):
            metrics.WEBHOOK_RUNS.labels(state).set(self._counts.get(state, 0))

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``: a status and its reason."""
        for lane in self._lanes:
            if lane.waiting_for is not None:
                return "unhealthy", f"waiting for {lane.waiting_for}"
        if not self._counted:
            return "unhealthy", "waiting for PostgreSQL"
        for lane in self._lanes:
            if (obstacle := lane.work.obstacle()) is not None:
                return "degraded", obstacle
        if dead := self._counts.get("dead", 0):
            return "degraded", f"{dead} dead"
        if self._orphans:
            name, number = self._orphans[0]
            return "degraded", f"{number} wait for the handler {name}, which is not set up"
        return (
            "healthy",
            f"{self._counts.get('received', 0)} received, {self._counts.get('failed', 0)} failed",
        )
