"""Send what is due: claim in batches, call concurrently, settle in batches.

::

    claim loop ──claims──► callers (rate, concurrency) ──results──► settle loop
        ▲                                                              │
        └────────────────────── keys to release ◄──────────────────────┘

A key (Stripe customer, event name) is locked from its claim until its result is durable. Results are kept
and written again for as long as PostgreSQL is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import structlog
from aiolimiter import AsyncLimiter

from services.pusher import delivery
from services.pusher.brake import Brake
from services.pusher.delivery import AsyncConnection, Key
from services.pusher.intents import (
    Action,
    Answer,
    Claim,
    Meaning,
    Policy,
    Shown,
    State,
    Verdict,
    given_back,
    settlement_of,
)
from services.pusher.pausing import PausedMeters
from services.pusher.sinks import Sink
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.faults import fault_point
from services.streaming.observe import Status
from services.wire import metrics
from services.wire.settings import Settings
from services.wire.waits import full_jitter

log = structlog.get_logger(__name__)

#: Keys read ahead from the journal, in order of urgency, and for how long that order is trusted: longer when
#: the backlog is so deep that reading it takes a good part of that time.
WINDOW_KEYS_MAX = 5000
WINDOW_SECONDS = 1.0
WINDOW_READING_SHARE = 0.2
#: A claim that waits longer than this for its call is given back: its lock may be gone.
FRESH_SECONDS = 5.0
#: What a call may take beyond the sink's own time limit.
GRACE_SECONDS = 0.5
#: Share of one second's intents that may leave at once. The rest of the second is spread evenly.
BURST_SHARE = 0.05
SETTLE_RETRY_CAP_SECONDS = 5.0
#: Claims held at once, however wide the sink is: each is a lock in PostgreSQL.
LOCKS_MAX = 4000
COUNTS_EVERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class SenderConfig:
    """How fast and how long. Rates and concurrency are per process."""

    rate_per_second: float = 200.0
    concurrency: int = 16
    call_timeout_seconds: float = 20.0
    claims_max: int = 1000
    gather_seconds: float = 0.05
    poll_seconds: float = 0.25
    policy: Policy = field(default_factory=Policy)

    @classmethod
    def from_settings(cls, settings: Settings) -> SenderConfig:
        """The operator's limits, and defaults for the rest."""
        return cls(
            rate_per_second=settings.stripe_rate_per_second,
            concurrency=settings.stripe_concurrency,
            call_timeout_seconds=settings.stripe_timeout_seconds,
            policy=Policy(invoice_margin=timedelta(seconds=settings.close_margin_seconds)),
        )

    @property
    def lease(self) -> timedelta:
        """After this no call of a claim can be under way any more."""
        return timedelta(seconds=FRESH_SECONDS + self.call_timeout_seconds + 2 * GRACE_SECONDS)

    def room(self, batch_max: int) -> int:
        """Claims held at once: about one second of calls, so that none waits long in flight."""
        in_calls = 2 * self.concurrency * batch_max
        return max(1, min(LOCKS_MAX, max(self.claims_max, in_calls), math.ceil(self.rate_per_second)))


@dataclass(frozen=True, slots=True)
class SenderHealth:
    """Numbers for operators; ``oldest_seconds`` is the age of the oldest open intent."""

    status: Status
    reason: str
    sink_reachable: bool | None
    paused_for: str | None
    oldest_seconds: float | None
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Held:
    """A claim and the session that holds its key."""

    claim: Claim
    session_number: int
    taken_at: float  # monotonic seconds


#: The answer to a call, what the sink shows (None: unreadable), or the reason why nothing was done.
_Outcome = Answer | Shown | None | str


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def burst_of(rate_per_second: float) -> float:
    """Intents that may leave at once."""
    return max(1.0, rate_per_second * BURST_SHARE)


def limiter_for(rate_per_second: float, batch_max: int) -> AsyncLimiter:
    """A bucket that lets at most ``rate_per_second`` intents out in any second, bursts included.

    A batch leaves when its last intent is let out: what it held back until then is another burst.
    """
    burst = burst_of(rate_per_second)
    steady = rate_per_second - burst * (2 if batch_max > 1 else 1)
    return AsyncLimiter(burst, burst / max(steady, rate_per_second * (1 - BURST_SHARE) / 2))


class Sender:
    """Runs in one event loop beside the agent; :meth:`wake` it after each chunk.

    ``clock`` gives aware times and decides what is due and how old a doubt is; ``chance`` gives numbers in
    [0, 1); ``on_outbox`` is called after ops events were committed to the outbox.
    """

    def __init__(
        self,
        dsn: str,
        sink: Sink,
        config: SenderConfig | None = None,
        *,
        clock: Callable[[], datetime] = utc_now,
        chance: Callable[[], float] = random.random,
        on_outbox: Callable[[], None] = lambda: None,
    ) -> None:
        self._dsn = dsn
        self._sink = sink
        self.config = config or SenderConfig()
        self._clock = clock
        self._chance = chance
        self._on_outbox = on_outbox
        self._batch_max = min(sink.batch_max, int(burst_of(self.config.rate_per_second)))
        self._limiter = limiter_for(self.config.rate_per_second, self._batch_max)
        self._gate = asyncio.Lock()
        self._room_max = self.config.room(sink.batch_max)
        self._brake = Brake()
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._claims: asyncio.Queue[_Held | None] = asyncio.Queue()
        self._results: asyncio.Queue[tuple[_Held, _Outcome] | None] = asyncio.Queue()
        self._session: AsyncConnection | None = None
        self._session_number = 0
        self._busy: set[Key] = set()
        self._to_release: list[Key] = []
        self._window: deque[Key] = deque()
        self._window_until = -math.inf
        self._sink_reachable: bool | None = None
        self._waiting_for: str | None = None
        self._standing = delivery.Standing()
        metrics.STRIPE_RATE_MAX.set(self.config.rate_per_second)
        for meaning in Meaning:  # from 0 on, so that the first one is an increase
            metrics.STRIPE_CALLS.labels(meaning)
            metrics.METER_EVENTS.labels(meaning)
        self._counted_at = -math.inf
        self.paused_meters = PausedMeters(
            lambda: delivery.connect(dsn, "paused"),
            sink.takes,
            clock=clock,
            on_change=self._meters_are_back,
        )

    # -- Life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run in a task of its own."""
        self._task = asyncio.create_task(self.run(), name="pusher-sender")

    async def stop(self) -> None:
        """Finish the calls under way, settle them, and return.

        Raises:
            Broken: what stopped the sender before, if something did.
        """
        self._stopping.set()
        self._wake.set()
        if self._task is not None:
            await self._task

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def _meters_are_back(self) -> None:
        self._wake.set()
        self._on_outbox()

    async def run(self) -> None:
        """Send until :meth:`stop`, or until cancelled; both finish the calls under way.

        Raises:
            Broken: an invariant that guards money does not hold; the process must end.
        """
        callers = [asyncio.create_task(self._call_loop()) for _ in range(self.config.concurrency)]
        claimer = asyncio.create_task(self._claim_loop())
        settler = asyncio.create_task(self._settle_loop())
        asker = asyncio.create_task(self.paused_meters.run())
        everything = [claimer, settler, asker, *callers]
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            self._wake.set()
            broken = [
                task for task in everything if task.done() and not task.cancelled() and task.exception()
            ]
            if not broken:
                broken = await self._wind_down(claimer, settler, callers)
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
            await self._drop_session()
        for task in broken:
            task.result()

    async def _wind_down(
        self, claimer: asyncio.Task[None], settler: asyncio.Task[None], callers: list[asyncio.Task[None]]
    ) -> list[asyncio.Task[None]]:
        """Claims stop first, then calls, then settlements; returns the tasks that failed meanwhile.

        What a database that stays away prevents is found in doubt at the next start.
        """
        await asyncio.wait([claimer], timeout=FRESH_SECONDS)
        for _ in callers:
            self._claims.put_nowait(None)
        await asyncio.wait(callers, timeout=self.config.call_timeout_seconds + 1.0)
        self._results.put_nowait(None)
        await asyncio.wait([settler], timeout=FRESH_SECONDS)
        parts = [claimer, settler, *callers]
        return [part for part in parts if part.done() and not part.cancelled() and part.exception()]

    # -- Claiming ------------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                claimed = await self._claim_round()
                failures, self._waiting_for = 0, None
            except TRANSIENT_ERRORS as error:
                failures += 1
                log.warning("waiting", world="PostgreSQL", error=error, attempt=failures)
                self._waiting_for = f"PostgreSQL ({type(error).__name__})"
                metrics.RETRIES.labels("PostgreSQL").inc()
                await self._drop_session()
                await asyncio.sleep(full_jitter(failures, self._chance(), base_seconds=0.1, cap_seconds=5.0))
                continue
            if not claimed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self.config.poll_seconds)

    async def _claim_round(self) -> int:
        """Release what is settled, claim what is due, hand it to the callers; returns how much was due."""
        session = await self._connected()
        released, self._to_release = self._to_release, []
        await delivery.unlock(session, released)
        await self._count(session)
        keys = await self._next_keys(session)
        if not keys:
            return 0
        locked = await delivery.try_lock(session, keys)
        claims, done = await delivery.claim(
            session, locked, now=self._clock(), lease=self.config.lease, policy=self.config.policy
        )
        fault_point("pusher.in_flight_committed")
        taken = {claim.intent.key for claim in claims}
        self._busy |= taken
        for claim in claims:
            self._claims.put_nowait(_Held(claim, self._session_number, time.monotonic()))
        await delivery.unlock(session, [key for key in locked if key not in taken])
        return len(claims) + done

    async def _next_keys(self, session: AsyncConnection) -> list[Key]:
        """The most urgent keys there is room for."""
        room = self._room()
        if room <= 0:
            return []
        started = time.monotonic()
        if not self._window or started > self._window_until:
            self._window = deque(await delivery.due_keys(session, self._clock(), WINDOW_KEYS_MAX))
            now = time.monotonic()
            self._window_until = now + max(WINDOW_SECONDS, (now - started) / WINDOW_READING_SHARE)
        keys: list[Key] = []
        while self._window and len(keys) < room:
            key = self._window.popleft()
            if key not in self._busy:
                keys.append(key)
        return keys

    def _room(self) -> int:
        """How many claims to add. Small gaps are not filled: a round costs four round trips."""
        if self._brake.seconds_left(time.monotonic()) > 0:
            return 0
        limit = 1 if self._brake.probing else self._room_max
        room = limit - len(self._busy)
        return room if room >= limit / 4 or self._claims.empty() else 0

    async def _connected(self) -> AsyncConnection:
        if self._session is None or self._session.closed:
            await self._drop_session()
            self._session = await delivery.connect(self._dsn, "locks")
            self._session_number += 1
        return self._session

    async def _drop_session(self) -> None:
        """Every lock goes with the session: claims not yet called are given back, the others run out."""
        session, self._session = self._session, None
        self._session_number += 1
        self._to_release.clear()
        self._window.clear()
        if session is not None:
            await session.close()

    # -- Calling -------------------------------------------------------------------------------------

    async def _call_loop(self) -> None:
        while (first := await self._claims.get()) is not None:
            batch = self._with_more(first)
            async with self._gate:  # batch by batch, or all of them would wait until the last is full
                for held in batch:
                    if self._obstacle(held) is None:
                        await self._limiter.acquire()
            questions = [held for held in batch if held.claim.action is not Action.SEND]
            calls = [held for held in batch if held.claim.action is Action.SEND]
            await asyncio.gather(self._call(calls), *map(self._ask, questions))

    def _with_more(self, first: _Held) -> list[_Held]:
        """What waits already and fits into one call."""
        batch = [first]
        while len(batch) < self._batch_max and not self._claims.empty():
            more = self._claims.get_nowait()
            if more is None:
                self._claims.put_nowait(None)
                break
            batch.append(more)
        return batch

    def _ready(self, batch: Sequence[_Held]) -> list[_Held]:
        """Of ``batch``, what nothing stands in the way of; the rest is given back.

        The last thing before a call: even a turn of the event loop later the machine may have slept.
        """
        ready = []
        for held in batch:
            obstacle = self._obstacle(held)
            if obstacle is None:
                ready.append(held)
            else:
                self._results.put_nowait((held, obstacle))
        return ready

    def _obstacle(self, held: _Held) -> str | None:
        """Why this claim must not be acted on any more, as a code.

        By both clocks: the monotonic one stands still while a machine is suspended, and the other one is set.
        """
        if self._stopping.is_set():
            return "stopping"
        waited = abs((self._clock() - held.claim.claimed_at).total_seconds())
        waited = max(waited, time.monotonic() - held.taken_at)
        if held.session_number != self._session_number or waited > FRESH_SECONDS:
            return "stale_claim"
        return "paused" if self._brake.seconds_left(time.monotonic()) > 0 else None

    async def _ask(self, held: _Held) -> None:
        for ready in self._ready([held]):
            self._results.put_nowait((ready, await self._sink.shown(ready.claim.intent)))

    async def _call(self, calls: Sequence[_Held]) -> None:
        batch = self._ready(calls)
        if not batch:
            return
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.config.call_timeout_seconds + GRACE_SECONDS):
                answers = await self._sink.send([held.claim for held in batch])
        except Exception as error:
            log.warning("sink raised", error=error)
            answers = [Answer(Meaning.UNKNOWN, type(error).__name__)] * len(batch)
        fault_point("pusher.answered")
        metrics.STRIPE_SECONDS.observe(time.perf_counter() - started)
        for meaning, number in Counter(answer.meaning for answer in answers).items():
            metrics.METER_EVENTS.labels(meaning).inc(number)
        for answer in set(answers):
            metrics.STRIPE_CALLS.labels(answer.meaning).inc()
            self._brake.note(answer.meaning, now=time.monotonic(), chance=self._chance())
            if answer.meaning not in (Meaning.REFUSED, Meaning.METER_AWAY):
                self._sink_reachable = answer.http_status is not None
        for held, answer in zip(batch, answers, strict=True):
            self._results.put_nowait((held, answer))

    # -- Settling ------------------------------------------------------------------------------------

    async def _settle_loop(self) -> None:
        session: AsyncConnection | None = None
        try:
            while (first := await self._results.get()) is not None:
                await asyncio.sleep(self.config.gather_seconds)
                batch = [first]
                while len(batch) < self._room_max and not self._results.empty():
                    more = self._results.get_nowait()
                    if more is None:
                        self._results.put_nowait(None)
                        break
                    batch.append(more)
                session = await self._settle_until_durable(session, batch)
                fault_point("pusher.settled")
                self._release([held for held, _ in batch])
        finally:
            if session is not None:
                await session.close()

    async def _settle_until_durable(
        self, session: AsyncConnection | None, batch: list[tuple[_Held, _Outcome]]
    ) -> AsyncConnection:
        """Write the results, however long PostgreSQL is away; writing them twice changes nothing."""
        failures = 0
        while True:
            try:
                if session is None or session.closed:
                    session = await delivery.connect(self._dsn, "settle")
                if await self._settle(session, batch):
                    self._on_outbox()
                return session
            except TRANSIENT_ERRORS as error:
                failures += 1
                log.warning("waiting", world="PostgreSQL", error=error, attempt=failures)
                metrics.RETRIES.labels("PostgreSQL").inc()
                if session is not None:
                    await session.close()
                await asyncio.sleep(
                    full_jitter(
                        failures, self._chance(), base_seconds=0.1, cap_seconds=SETTLE_RETRY_CAP_SECONDS
                    )
                )

    async def _settle(self, session: AsyncConnection, batch: list[tuple[_Held, _Outcome]]) -> int:
        """Everything answered in one transaction, and one for each question; returns ops events written."""
        now, policy = self._clock(), self.config.policy
        settlements, events = [], 0
        for held, outcome in batch:
            if isinstance(outcome, str):
                settlements.append(given_back(held.claim, outcome, now=now))
            elif isinstance(outcome, Answer):
                settlements.append(
                    settlement_of(held.claim, outcome, now=now, chance=self._chance(), policy=policy)
                )
        if settlements:
            events += await delivery.settle(session, settlements, now)
        for held, outcome in batch:
            if outcome is None or isinstance(outcome, Shown):
                resolved = await delivery.resolve(
                    session, held.claim, outcome, now=now, chance=self._chance(), policy=policy
                )
                events += resolved.events
                if resolved.verdict is not Verdict.APPLIED:
                    log.warning(
                        "intent in doubt", identifier=held.claim.intent.identifier, verdict=resolved.verdict
                    )
        return events

    def _release(self, settled: list[_Held]) -> None:
        for held in settled:
            self._busy.discard(held.claim.intent.key)
            if held.session_number == self._session_number:
                self._to_release.append(held.claim.intent.key)
        self._wake.set()

    # -- Health --------------------------------------------------------------------------------------

    async def _count(self, session: AsyncConnection) -> None:
        if time.monotonic() - self._counted_at < COUNTS_EVERY_SECONDS:
            return
        self._counted_at = time.monotonic()
        self._standing = found = await delivery.standing(session, self.config.policy)
        now = self._clock()
        for state, count in found.counts.items():
            metrics.INTENTS.labels(state).set(count)
            since = found.oldest.get(state, now)
            metrics.INTENTS_OLDEST.labels(state).set(max(0.0, (now - since).total_seconds()))
        left = math.inf if found.deadline is None else (found.deadline - now).total_seconds()
        metrics.IN_DOUBT_DEADLINE.set(left)

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``: a status and its reason."""
        now = time.monotonic()
        if self._waiting_for is not None:
            return "unhealthy", f"waiting for {self._waiting_for}"
        if self._brake.probing:
            left = self._brake.seconds_left(now)
            return "degraded", f"sending is paused: {self._brake.reason}; next try in {left:.0f} s"
        if self._sink_reachable is False:
            return "degraded", "the last call got no answer"
        stuck = {state: self._standing.counts.get(state, 0) for state in (State.IN_DOUBT, State.FAILED)}
        if any(stuck.values()):
            return "degraded", ", ".join(f"{count} {state}" for state, count in stuck.items() if count)
        return "healthy", f"{self._standing.counts.get(State.PENDING, 0)} pending"

    def health(self) -> SenderHealth:
        """Everything an operator may ask."""
        status, reason = self.check()
        since = self._standing.oldest_open
        oldest = None if since is None else (self._clock() - since).total_seconds()
        paused_for = self._brake.reason if self._brake.probing else None
        return SenderHealth(
            status, reason, self._sink_reachable, paused_for, oldest, dict(self._standing.counts)
        )
