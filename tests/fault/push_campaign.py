"""One run of the push campaign: a seed decides what is billed, what fails, who is killed and how time leaps.

A run has a real PostgreSQL, real senders in processes of their own (`push_runner`), and the Stripe simulator
in a thread with a `Watcher` in front of it. The campaign stands in for the counters, records intents while
all of this goes on, and at the end takes the faults away, lets time pass until nothing waits, and has
`judge` compare what was recorded with the simulator's ledger.

The last part of this module is that oracle. It uses nothing of the product: it reads plain rows and calls.
A seed repeats every choice; when exactly a process is hit is up to the machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx
import psycopg
from aiohttp import web

from services.pusher import failures, journal
from services.stripe_simulator import SimulatorConfig, SimulatorControl, create_app
from services.wire.codec import Decoder
from tests.fault.push_runner import KEY, Orders, Runner, Running, SharedClock

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
#: With the faults off, how much time passes whenever nothing more is settled.
CALM_LEAPS_S = (20 * MINUTE_S, 2 * HOUR_S, 21 * HOUR_S, 5 * HOUR_S, 12 * HOUR_S, 12 * HOUR_S, 6 * HOUR_S)
QUIET_ROUNDS_MAX = 30
STANDSTILL_S, STANDSTILL_MAX_S, STANDSTILL_GLANCES = 0.15, 8.0, 6
POINTS = ("pusher.in_flight_committed", "pusher.answered", "pusher.settled")

# -- What can be billed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeterKind:
    """A meter of a tenant, and the Stripe meter behind it. Two tenants may share one."""

    tenant: str
    slug: str
    event_name: str
    aggregation: str = "sum"
    customer_key: str = "stripe_customer_id"
    value_key: str = "value"
    places: int = 0
    dimensions: tuple[dict[str, str], ...] = ({},)

    @property
    def formula(self) -> str:
        return "last" if self.aggregation == "last" else "sum"


METERS = (
    MeterKind("alpha", "calls", "api_calls"),
    MeterKind("beta", "calls", "api_calls", places=2),
    MeterKind(
        "alpha",
        "tokens",
        "alpha.tokens",
        customer_key="customer",
        value_key="units",
        dimensions=({"region": "eu"}, {"region": "us"}, {"region": "us", "model": "large"}, {}),
    ),
    MeterKind("alpha", "storage", "alpha.storage", places=6),
    MeterKind("beta", "peak", "beta.peak", aggregation="max", places=1),
    MeterKind("beta", "seats", "beta.seats", aggregation="last"),
    MeterKind("gamma", "level", "gamma.level", aggregation="last", places=3),
)

#: Meters whose usage can be taken back.
NETTING = {(one.tenant, one.slug) for one in METERS if one.aggregation == "sum"}


@dataclass(frozen=True)
class Recorded:
    """One intent as it was given to the journal. Times are seconds since 1970."""

    identifier: str
    item: uuid.UUID
    tenant: str
    meter: str
    customer: str
    event_name: str
    hour: int
    period: int
    sequence: int
    amount: Decimal
    at: int
    formula: str = "sum"
    push_before: int | None = None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    #: Why Stripe will never take it, if it will not.
    doom: str | None = None

    @property
    def bucket(self) -> tuple[uuid.UUID, int, int]:
        return self.item, self.hour, self.period

    @property
    def place(self) -> tuple[str, str, int]:
        return self.customer, self.event_name, self.hour


# -- Someone who notes every call ----------------------------------------------------------------------


@dataclass
class Call:
    """One meter event on its way to Stripe, as the network saw it."""

    identifier: str
    customer: str
    event_name: str
    content: tuple[int, str, tuple[tuple[str, str], ...]]  # timestamp, value, the rest of the payload
    at: float  # by the simulated clock
    arrived: float = 0.0  # by the monotonic clock
    #: Other calls of the same customer and meter whose client still waited when this one came.
    beside: int = 0
    #: A whole answer with a 4xx status went out: this call did nothing.
    refused: bool = False


@dataclass(frozen=True)
class Read:
    """One whole answer to a question for an hour's summary."""

    customer: str
    event_name: str
    hour: int
    at: float


class Watcher:
    """Sits in front of the simulator and shares nothing with it but the bytes that pass."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._under_way: dict[int, tuple[web.Request, Call]] = {}
        self.calls: list[Call] = []
        self.reads: list[Read] = []
        self._keys = {one.event_name: (one.customer_key, one.value_key) for one in METERS}

    def middleware(self) -> Any:
        @web.middleware
        async def watch(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.method == "POST" and request.path == "/v1/billing/meter_events":
                return await self._events(request, handler, [event_of_form(await request.read())])
            if request.path == "/v2/billing/meter_event_stream":
                return await self._events(request, handler, events_of_stream(await request.read()))
            if request.path.endswith("/event_summaries"):
                return await self._summary(request, handler)
            return await handler(request)  # type: ignore[no-any-return]

        return watch

    def at_rest(self, seconds: float) -> None:
        """Wait until no request is being worked on; those older than ``seconds`` only wait to be answered."""
        while True:
            now = time.monotonic()
            if all(now - call.arrived > seconds for _, call in list(self._under_way.values())):
                return
            time.sleep(0.005)

    async def _events(self, request: web.Request, handler: Any, events: Sequence[Sent]) -> web.StreamResponse:
        now, arrived = self._now(), time.monotonic()
        calls = []
        for event in events:
            customer_key, value_key = self._keys[event.event_name]
            rest = dict(event.payload)
            customer, value = rest.pop(customer_key, ""), rest.pop(value_key, "")
            content = (event.timestamp, value, tuple(sorted(rest.items())))
            call = Call(event.identifier, customer, event.event_name, content, now, arrived)
            call.beside = sum(
                (customer, event.event_name) == (other.customer, other.event_name) and waits(client)
                for client, other in self._under_way.values()
            )
            self._under_way[id(call)] = request, call
            calls.append(call)
        self.calls += calls
        try:
            response: web.StreamResponse = await handler(request)
        finally:
            for call in calls:
                del self._under_way[id(call)]
        for call in calls:
            call.refused = waits(request) and 400 <= response.status < 500
        return response

    async def _summary(self, request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        if response.status == 200 and waits(request):
            event_name = request.path.split("/")[-2].removeprefix("mtr_")
            query = request.query
            self.reads.append(Read(query["customer"], event_name, int(query["start_time"]), self._now()))
        return response


@dataclass(frozen=True)
class Sent:
    """A meter event as its request has it."""

    identifier: str
    event_name: str
    timestamp: int
    payload: Mapping[str, str]


def event_of_form(body: bytes) -> Sent:
    form = dict(parse_qsl(body.decode(), keep_blank_values=True))
    payload = {name[8:-1]: text for name, text in form.items() if name.startswith("payload[")}
    return Sent(form["identifier"], form["event_name"], int(form["timestamp"]), payload)


def events_of_stream(body: bytes) -> list[Sent]:
    return [
        Sent(
            one["identifier"],
            one["event_name"],
            int(datetime.fromisoformat(one["timestamp"]).timestamp()),
            one["payload"],
        )
        for one in json.loads(body)["events"]
    ]


def waits(request: web.Request) -> bool:
    """Whether the client is still there."""
    return request.transport is not None and not request.transport.is_closing()


@contextlib.contextmanager
def simulator(config: SimulatorConfig, watcher: Watcher) -> Iterator[SimulatorControl]:
    """The simulator in a thread of its own, behind the watcher."""
    loop = asyncio.new_event_loop()
    stop, started, addresses = asyncio.Event(), threading.Event(), []

    async def serve() -> None:
        app = create_app(config)
        app.middlewares.append(watcher.middleware())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            addresses.append("http://{}:{}".format(*runner.addresses[0][:2]))
            started.set()
            await stop.wait()
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(15), "the simulator did not start"
    try:
        yield SimulatorControl(addresses[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


# -- What a seed decides -------------------------------------------------------------------------------

EVENTS_PATH, SUMMARIES_PATH, METERS_PATH = (
    "*/billing/meter_event*",
    "*/event_summaries",
    "*/billing/meters",
)

CALL_FAULTS: tuple[dict[str, Any], ...] = (
    {"fault": "status", "status": 429},
    {"fault": "status", "status": 429, "reason": "endpoint-rate"},
    {"fault": "status", "status": 429, "lock_timeout": True},
    {"fault": "status", "status": 409},
    *({"fault": "status", "status": s, "applied": a} for s in (500, 502, 503, 504) for a in (True, False)),
    {"fault": "status", "status": 503, "applied": True, "remember": False},
    {"fault": "reset_before_apply"},
    {"fault": "reset_after_apply"},
    {"fault": "reset_after_apply", "remember": False},
    {"fault": "cut_body"},
    {"fault": "cut_body", "remember": False},
    {"fault": "stall_body", "seconds": 0.8},
    {"fault": "stall_before_answer", "seconds": 0.8},
    {"fault": "slow", "seconds": 0.1},
    {"fault": "slow", "seconds": 0.7},
)
#: A call that the simulator works on for longer than this only waits to be answered.
WORK_MAX_S = 0.75
READ_FAULTS: tuple[dict[str, Any], ...] = (
    {"fault": "status", "status": 429},
    {"fault": "status", "status": 503},
    {"fault": "reset_after_apply"},
    {"fault": "cut_body"},
    {"fault": "stall_before_answer", "seconds": 0.8},
)


def tape(chance: random.Random) -> list[dict[str, Any]]:
    """Rules for the calls, and for what reads the doubts away."""
    rules = []
    share = chance.choice((0.0, 0.1, 0.2, 0.35, 0.5))
    chosen = chance.sample(CALL_FAULTS, chance.randint(1, len(CALL_FAULTS)))
    for fault in chosen:
        rules.append({**fault, "match": {"path": EVENTS_PATH, "probability": share / len(chosen)}})
    share = chance.choice((0.0, 0.0, 0.1, 0.4))
    for path in (SUMMARIES_PATH, METERS_PATH):
        fault = chance.choice(READ_FAULTS)
        rules.append({**fault, "match": {"path": path, "method": "GET", "probability": share}})
    return rules


def some_config(chance: random.Random, seed: int) -> SimulatorConfig:
    """Everything that Stripe leaves open. Summaries lag by less than an hour, the worst case included."""
    return SimulatorConfig(
        port=0,
        identifier_window_hours=chance.choice((24, 24, 36, None)),
        identifier_scope=chance.choice(("account", "event_name")),
        unknown_customer=chance.choice(("sync", "report")),
        unknown_meter=chance.choice(("sync", "report")),
        concurrency_refusal_status=chance.choice((409, 429)),
        store_duplicate_refusals=chance.random() < 0.5,
        rate_per_second=chance.choice((10_000, 10_000, 400, 150)),
        concurrency_limit_per_customer_meter=chance.random() < 0.8,
        summary_lag_seconds=chance.choice((0, 0, 5, 120, 1200, 2300)),
        seed=seed,
    )


@dataclass(frozen=True)
class Limits:
    """How the senders of a run are set up."""

    sink: str
    rate: float
    concurrency: int
    connections: int
    claims_max: int
    timeout_s: float
    backoff_max_s: float

    @classmethod
    def chosen(cls, chance: random.Random) -> Limits:
        sink = chance.choice(("v1", "v1", "stream"))
        concurrency = chance.choice((2, 4, 8, 16))
        return cls(
            sink=sink,
            rate=chance.choice((80.0, 150.0, 300.0, 600.0)),
            concurrency=concurrency * (4 if sink == "stream" else 1),
            connections=concurrency,
            claims_max=chance.choice((4, 30, 200)),
            timeout_s=chance.choice((0.3, 0.5)),
            backoff_max_s=chance.choice((0.2, 2.0, 30.0, 300.0)),
        )


# -- Standing in for the counters ----------------------------------------------------------------------


class Counters:
    """Closes buckets into intents, as the counters and the pusher's agent do together.

    One delta of a bucket is open at a time. What was given back is closed again now and then.
    """

    def __init__(self, dsn: str, seed: int, now: Callable[[], float]) -> None:
        self._dsn = dsn
        self._seed = seed
        self._chance = random.Random(f"{seed} usage")  # noqa: S311
        self._now = now
        self._customers = [f"cus_{number}" for number in range(self._chance.randint(3, 9))]
        self._unknown = [f"cus_gone_{number}" for number in range(2)]
        self._hours: list[int] = []
        self._deadlines: dict[tuple[uuid.UUID, int, int], int | None] = {}
        self._last_at: dict[tuple[uuid.UUID, int, int], int] = {}
        self.recorded: list[Recorded] = []
        #: Of each bucket, what was counted in it.
        self.counted: Counter[tuple[uuid.UUID, int, int]] = Counter()

    @property
    def customers(self) -> list[str]:
        return list(self._customers)

    def set_up(self, db: psycopg.Connection[Any]) -> None:
        db.execute(
            "TRUNCATE meter_events, paused_meters, item_periods, buckets, items, outbox, meters, tenants, "
            "customers CASCADE"
        )
        for tenant in sorted({one.tenant for one in METERS}):
            db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (tenant,))
        for one in METERS:
            db.execute(
                "INSERT INTO meters (tenant_id, meter, aggregation, event_name) VALUES (%s, %s, %s, %s)",
                (one.tenant, one.slug, one.aggregation, one.event_name),
            )

    def record(self, number: int) -> None:
        """Up to ``number`` new intents, in one transaction; fewer when their buckets are open."""
        self._count({one.bucket: one for one in (self._some_usage() for _ in range(number))})

    def correct(self, number: int) -> None:
        """Take back the newest usage that Stripe has."""
        with psycopg.connect(self._dsn) as db:
            rows = db.execute(
                "SELECT identifier FROM meter_events WHERE state = 'reported' ORDER BY settled_at DESC "
                "LIMIT %s",
                (2 * number,),
            ).fetchall()
        known = {one.identifier: one for one in self.recorded if (one.tenant, one.meter) in NETTING}
        newest = [known[name] for (name,) in rows if name in known and not known[name].doom][:number]
        self._count({one.bucket: self._successor(one, -one.amount, one.push_before) for one in newest})

    def _count(self, wanted: dict[tuple[uuid.UUID, int, int], Recorded]) -> None:
        with psycopg.connect(self._dsn) as db:
            taken = self._close(db, [wanted[bucket] for bucket in sorted(wanted)], counts=True)
            journal.record_intents(db, [delta(one) for one in taken])
        self._note(taken)
        for one in taken:
            self.counted[one.bucket] += 0 if one.formula == "last" else one.amount  # type: ignore[assignment]

    def close_again(self) -> int:
        """What was given back of sums leaves once more, under another identifier and with no deadline."""
        with psycopg.connect(self._dsn) as db:
            rows = db.execute(
                "SELECT item_id, hour_start, period_start, total - closed FROM buckets "
                "WHERE NOT open AND total <> closed ORDER BY 1, 2, 3"
            ).fetchall()
            places = {(item, int(h.timestamp()), int(p.timestamp())): amount for item, h, p, amount in rows}
            latest = {one.bucket: one for one in self.recorded}
            again = [
                self._successor(latest[bucket], amount, None)
                for bucket, amount in places.items()
                if latest[bucket].at > self._now() - 34 * DAY_S and latest[bucket].doom is None
            ]
            taken = self._close(db, again, counts=False)
            journal.record_intents(db, [delta(one) for one in taken])
        self._note(taken)
        return len(taken)

    def _note(self, taken: list[Recorded]) -> None:
        self.recorded += taken
        for one in taken:
            self._last_at[one.bucket] = one.at

    def _some_usage(self) -> Recorded:
        chance = self._chance
        kind = chance.choice(METERS)
        customer = chance.choice(self._customers)
        dimensions = dict(chance.choice(kind.dimensions))
        doom = None
        if chance.random() < 0.02:
            customer, doom = chance.choice(self._unknown), "unknown_customer"
        elif chance.random() < 0.01 and kind.formula == "sum":
            dimensions, doom = {kind.value_key: "1"}, "payload_key"
        item = uuid.uuid5(
            uuid.NAMESPACE_OID, repr((kind.tenant, kind.slug, customer, sorted(dimensions.items())))
        )
        hour = self._some_hour()
        bucket = (item, hour, month_of(hour))
        if bucket not in self._deadlines:
            self._deadlines[bucket] = None if kind.formula == "last" else self._some_deadline()
        amount = self._some_amount(kind, bucket)
        if doom is None and chance.random() < 0.01:
            amount, doom = Decimal("1234567.000000019") + Decimal(len(self.recorded)) * 10, "too_many_digits"
        return Recorded(
            self._identifier(bucket),
            item,
            kind.tenant,
            kind.slug,
            customer,
            kind.event_name,
            hour,
            bucket[2],
            0,
            amount,
            self._some_second(bucket) if kind.formula == "last" else hour,
            kind.formula,
            self._deadlines[bucket],
            dimensions,
            doom,
        )

    def _identifier(self, bucket: tuple[uuid.UUID, int, int]) -> str:
        name = repr((self._seed, bucket, len(self.recorded))).encode()
        return base64.b32encode(blake2b(name, digest_size=20).digest()).decode().lower()

    def _successor(self, one: Recorded, amount: Decimal, push_before: int | None) -> Recorded:
        return replace(one, identifier=self._identifier(one.bucket), amount=amount, push_before=push_before)

    def _some_hour(self) -> int:
        """Mostly one that had usage before; else recent, older, or near the edge of what Stripe takes."""
        chance, now = self._chance, self._now()
        if self._hours and chance.random() < 0.75:
            return chance.choice(self._hours)
        kind = chance.random()
        if kind < 0.55:
            age = chance.uniform(0, 30 * HOUR_S)
        elif kind < 0.75:
            age = chance.uniform(2 * DAY_S, 30 * DAY_S)
        else:
            age = chance.choice((33, 34, 34, 35)) * DAY_S + chance.uniform(-3 * HOUR_S, 23 * HOUR_S)
        hour = int(now - age) // HOUR_S * HOUR_S
        self._hours.append(hour)
        return hour

    def _some_second(self, bucket: tuple[uuid.UUID, int, int]) -> int:
        """The time of a value: never before that of the hour's value so far."""
        hour = bucket[1]
        least = self._last_at.get(bucket, hour + self._chance.randint(0, 900))
        return min(hour + HOUR_S - 1, least + self._chance.choice((0, 0, 1, 60)))

    def _some_deadline(self) -> int | None:
        chance, now = self._chance, int(self._now())
        kind = chance.random()
        if kind < 0.45:
            return None
        if kind < 0.50:
            return now - MINUTE_S
        if kind < 0.60:
            return now + chance.randint(1, 10 * MINUTE_S)
        if kind < 0.80:
            return now + chance.randint(HOUR_S // 2, 26 * HOUR_S)
        return now + chance.randint(2 * DAY_S, 12 * DAY_S)

    def _some_amount(self, kind: MeterKind, bucket: tuple[uuid.UUID, int, int]) -> Decimal:
        chance = self._chance
        number = Decimal(chance.randint(1, 900 * 10**kind.places)).scaleb(-kind.places)
        if kind.aggregation == "last":
            return chance.choice((number, Decimal(0), Decimal(chance.randint(1, 3))))
        if kind.aggregation == "max" or chance.random() < 0.6:
            return number
        signed = chance.choice((number, -number))
        before = [one.amount for one in self.recorded if one.bucket == bucket and one.doom is None]
        return -before[-1] if before else signed

    def _close(self, db: psycopg.Connection[Any], usage: list[Recorded], *, counts: bool) -> list[Recorded]:
        """Those whose bucket was not open. It is now."""
        for one in usage:
            db.execute(
                "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, calendar) "
                "VALUES (%s, %s, %s, %s, to_timestamp(%s), '1 month UTC') ON CONFLICT DO NOTHING",
                (one.item, one.tenant, f"ref-{one.customer}", one.meter, one.at),
            )
            db.execute(
                "INSERT INTO item_periods (item_id, period_start, period_end) "
                "VALUES (%s, to_timestamp(%s), to_timestamp(%s)) ON CONFLICT DO NOTHING",
                (one.item, one.period, month_of(one.period + 32 * DAY_S)),
            )
        taken = []
        for one in usage:
            last = one.formula == "last"
            row = db.execute(
                "INSERT INTO buckets AS b (item_id, hour_start, period_start, total, events, late_events, "
                "closed, pushed, sequence, open, first_arrival, last_arrival, first_event, last_event) "
                "VALUES (%(i)s, to_timestamp(%(h)s), to_timestamp(%(p)s), %(t)s, 1, 0, %(a)s, %(a)s, 1, "
                "true, now(), now(), to_timestamp(%(e)s), to_timestamp(%(e)s)) "
                "ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET open = true, "
                "total = b.total * %(keep)s + excluded.total, sequence = b.sequence + 1, "
                "closed = coalesce(b.closed, 0) * %(keep)s + excluded.closed, "
                "pushed = b.pushed * %(keep)s + excluded.pushed, last_event = excluded.last_event "
                "WHERE NOT b.open RETURNING sequence",
                {
                    "i": one.item,
                    "h": one.hour,
                    "p": one.period,
                    "t": one.amount if counts else 0,
                    "a": one.amount,
                    "e": one.at,
                    "keep": 0 if last else 1,
                },
            ).fetchone()
            if row is not None:
                taken.append(one)
        return taken


def month_of(second: int) -> int:
    moment = datetime.fromtimestamp(second, UTC)
    return int(moment.replace(day=1, hour=0, minute=0, second=0).timestamp())


def delta(one: Recorded) -> dict[str, Any]:
    """The decoded ``usage_delta`` of it."""
    kind = next(kind for kind in METERS if (kind.tenant, kind.slug) == (one.tenant, one.meter))
    micro = 1_000_000
    return {
        "identifier": one.identifier,
        "item_id": one.item.bytes,
        "tenant_id": one.tenant,
        "customer_ref": f"ref-{one.customer}",
        "meter": one.meter,
        "stripe_customer": one.customer,
        "event_name": one.event_name,
        "customer_payload_key": kind.customer_key,
        "value_payload_key": kind.value_key,
        "period_start": one.period * micro,
        "period_end": month_of(one.period + 32 * DAY_S) * micro,
        "hour_start": one.hour * micro,
        "event_at": one.at * micro,
        "sequence": one.sequence,
        "amount": int(one.amount.scaleb(9)).to_bytes(16, "big", signed=True),
        "closed_at": int(time.time() * micro),
        "dimensions": dict(one.dimensions),
        "formula": one.formula,
        "push_before": None if one.push_before is None else one.push_before * micro,
    }


# -- A run ---------------------------------------------------------------------------------------------


class Run:
    """Everything of one seed. ``play`` it, then ``evidence`` is what the oracle judges."""

    def __init__(self, seed: int, dsn: str, runner: Runner, directory: Path, **orders: Any) -> None:
        """``orders`` take the place of what the seed says."""
        self.seed = seed
        # Streams of their own, so that what the machine decides in one does not change the others.
        self._chance = random.Random(f"{seed} acts")  # noqa: S311
        self._dice = random.Random(f"{seed} senders")  # noqa: S311
        self._dsn = dsn
        self._runner = runner
        self._directory = directory
        self._given = orders
        self.config = some_config(self._chance, seed)
        self.limits = Limits.chosen(self._chance)
        self.clock = SharedClock(directory / "clock")
        self.clock.value = 0.0
        self.watcher = Watcher(self.clock.seconds)
        self.counters = Counters(dsn, seed, self.clock.seconds)
        self.senders: list[Running] = []
        self.everyone: list[Running] = []
        self.ends: list[float] = []
        self.figures: Counter[str] = Counter()
        self.problems: list[str] = []
        self._no_leap_before = 0.0
        self._archived: str | None = None
        self._stripe: SimulatorControl | None = None

    @property
    def log(self) -> Path:
        return self._directory / "senders.log"

    def tail_of_log(self) -> str:
        return self.log.read_text(encoding="utf-8")[-2000:] if self.log.exists() else ""

    @property
    def stripe(self) -> SimulatorControl:
        assert self._stripe is not None
        return self._stripe

    def play(self) -> Evidence:
        with (
            psycopg.connect(self._dsn, autocommit=True) as self.db,
            simulator(self.config, self.watcher) as self._stripe,
        ):
            try:
                self.counters.set_up(self.db)
                self._furnish()
                self.counters.record(self._chance.randint(60, 160))
                self._set_tape()
                self._start()
                for _ in range(self._chance.randint(5, 8)):
                    self._act()
                    time.sleep(self._chance.uniform(0.03, 0.3))
                self._calm_down()
                return self._evidence()
            finally:
                for sender in self.senders:
                    sender.kill()

    def _furnish(self) -> None:
        self.stripe.seed(
            customers=self.counters.customers,
            meters=[
                {
                    "id": f"mtr_{one.event_name}",
                    "event_name": one.event_name,
                    "default_aggregation": {"formula": one.formula},
                    "customer_mapping": {"type": "by_id", "event_payload_key": one.customer_key},
                    "value_settings": {"event_payload_key": one.value_key},
                }
                for one in {one.event_name: one for one in METERS}.values()
            ],
        )

    def _set_tape(self) -> None:
        self.stripe.clear_faults()
        self.stripe.play(*tape(self._chance), seed=self._chance.randint(0, 10**6))

    def _start(self, fault_point: str | None = None, **more: float) -> Running:
        limits = self.limits
        orders: dict[str, Any] = {
            "sink": limits.sink,
            "seed": self._dice.randint(0, 10**6),
            "rate": limits.rate,
            "concurrency": limits.concurrency,
            "connections": limits.connections,
            "timeout_s": limits.timeout_s,
            "claims_max": limits.claims_max,
            "backoff_max_s": limits.backoff_max_s,
            "fault_point": fault_point,
            "reached": str(self._directory / "reached"),
            **more,
            **self._given,
        }
        sender = self._runner.start(
            Orders(
                self._dsn,
                self.stripe.url,
                clock=str(self._directory / "clock"),
                state=str(self._directory / f"state_{len(self.everyone)}"),
                log=str(self.log),
                **orders,
            )
        )
        self.senders.append(sender)
        self.everyone.append(sender)
        return sender

    # -- What happens ----------------------------------------------------------------------------------

    def _act(self) -> None:
        acts: tuple[tuple[Callable[[], None], int], ...] = (
            (self._kill, 4),
            (self._kill_at_a_point, 4),
            (self._leap_at_work, 4),
            (self._leap_while_dead, 3),
            (self._pause, 2),
            (self._second, 2),
            (self._end_politely, 1),
            (self._cut_sessions, 1),
            (self._outage, 1),
            (self._lose_corrections, 2),
            (self._archive_a_meter, 1),
            (self._set_tape, 2),
        )
        chance = self._chance
        act = chance.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
        act()
        if not self.senders:
            self._start()
        if chance.random() < 0.6:
            self.counters.record(chance.randint(5, 50))
        if chance.random() < 0.3:
            self.figures["closed_again"] += self.counters.close_again()
        if chance.random() < 0.3:
            self._hear_reports()

    def _any(self) -> Running:
        return self._dice.choice(self.senders)

    def _kill(self) -> None:
        if not self.senders:
            return
        sender = self._any()
        self._ended(sender, sender.kill(), killed=True)

    def _kill_at_a_point(self) -> None:
        """The next sender dies where its environment says, or, where it never gets there, soon after."""
        self._kill()
        point = self._chance.choice(POINTS)
        before = self._reached()
        sender = self._start(f"{point}:{self._chance.choice((1, 1, 2, 3, 5, 9))}")
        sender.wait(0.6)
        self._ended(sender, sender.kill(), killed=True)
        self.figures["kills_at_a_point"] += self._reached() - before

    def _reached(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return len((self._directory / "reached").read_text(encoding="utf-8").splitlines())
        return 0

    def _end_politely(self) -> None:
        sender = self._any()
        self._ended(sender, sender.terminate(), killed=False)
        self.figures["sigterms"] += 1

    def _ended(self, sender: Running, status: int, *, killed: bool) -> None:
        self.senders.remove(sender)
        self.ends.append(self.clock.seconds())
        # One that was told to end before it could listen ends as well.
        if status not in ((-9,) if killed else (0, -15)):
            self.problems.append(f"a sender ended with status {status} by itself")
        self.figures["kills"] += killed

    def _pause(self) -> None:
        sender = self._any()
        sender.stop()
        time.sleep(self._chance.uniform(0.1, 0.5))
        sender.go_on()
        self.figures["stops"] += 1

    def _second(self) -> None:
        if len(self.senders) < 2:
            self._start()
            self.figures["pairs"] += 1

    def _cut_sessions(self) -> None:
        """PostgreSQL drops every session of the senders, and with them their locks."""
        self.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'tidemeter-pusher-%'"
        )
        self.figures["cuts"] += 1
        # A lease is what protects the calls under way now, and a leap would end it before its time.
        self._no_leap_before = time.monotonic() + self.limits.timeout_s + 1.0

    def _outage(self) -> None:
        self.stripe.clear_faults()
        fault = self._chance.choice(CALL_FAULTS)
        self.stripe.play({**fault, "match": {"path": EVENTS_PATH, "probability": 1.0}})
        time.sleep(self._chance.uniform(0.1, 0.4))
        self._set_tape()
        self.figures["outages"] += 1

    def _archive_a_meter(self) -> None:
        """Somebody deactivates a meter at Stripe, and brings it back after a while, or only at the end."""
        if self._archived is not None:
            self._bring_back()
            return
        self._archived = self._chance.choice(sorted({one.event_name for one in METERS}))
        self._meter(self._archived, "deactivate")
        self.figures["archived"] += 1

    def _bring_back(self) -> None:
        if self._archived is not None:
            self._meter(self._archived, "reactivate")
            self._archived = None

    def _meter(self, event_name: str, what: str) -> None:
        self.stripe.clear_faults()
        meter = f"{self.stripe.url}/v1/billing/meters/mtr_{event_name}"
        httpx.post(f"{meter}/{what}", headers={"Authorization": f"Bearer {KEY}"}).raise_for_status()
        self._set_tape()

    def _lose_corrections(self) -> None:
        """Right after usage its correction, which meets an answer that says nothing and is kept for a day."""
        self.counters.correct(20)
        self.stripe.clear_faults()
        rule = {"fault": "status", "status": 500, "applied": self._chance.random() < 0.3}
        self.stripe.play({**rule, "match": {"path": EVENTS_PATH, "probability": 0.5}})
        time.sleep(self._chance.uniform(0.1, 0.3))
        self._set_tape()
        self._leap(self._chance.uniform(1, 30) * MINUTE_S)
        self.figures["lost_corrections"] += 1

    def _leap_at_work(self) -> None:
        """The machine sleeps, and wakes in another hour."""
        self._leap(self._some_leap())

    def _leap_while_dead(self) -> None:
        while self.senders:
            self._kill()
        self._leap(self._some_leap())

    def _some_leap(self) -> float:
        chance = self._chance
        kind = chance.random()
        if kind < 0.4:
            return chance.uniform(1, 30) * MINUTE_S
        if kind < 0.55:
            return chance.uniform(0.5, 6) * HOUR_S
        if kind < 0.8:
            return chance.uniform(22.7, 24.3) * HOUR_S
        return chance.uniform(24, 30) * HOUR_S

    def _leap(self, seconds: float) -> None:
        """Move everybody's clock at once; no call is under way meanwhile, for none takes hours.

        Claims that wait for their call are, and know nothing of the leap but by the clock.
        """
        time.sleep(max(0.0, self._no_leap_before - time.monotonic()))
        deadline = time.monotonic() + 0.4
        while not self._caught_between_calls():
            if time.monotonic() > deadline:
                for sender in list(self.senders):
                    self._ended(sender, sender.kill(), killed=True)
                break
        self.watcher.at_rest(WORK_MAX_S)
        self.clock.value += seconds
        self.stripe.set_clock(self.clock.seconds())
        self.figures["leaps_at_work" if self.senders else "leaps_while_dead"] += 1
        self.figures["leapt_hours"] += round(seconds / HOUR_S)
        for sender in self.senders:
            sender.go_on()

    def _caught_between_calls(self) -> bool:
        """Whether all senders are stopped now, and none inside of a call."""
        for sender in self.senders:
            sender.stop()
        if not any(sender.under_way.value for sender in self.senders):
            return True
        for sender in self.senders:
            sender.go_on()
        time.sleep(0.003)
        return False

    def _hear_reports(self) -> None:
        """What the handler of error reports does, for all that was reported so far."""
        named = {one["identifier"]: one["code"] for one in self.stripe.stats()["error_reports"]}
        with psycopg.connect(self._dsn) as db:
            failed = failures.fail_reported(db, named, source="webhook", now=self.clock())
        self.figures["failed_by_report"] += len(failed)

    # -- The end ---------------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        """Faults off, a fresh sender, and time until nothing waits that time can help."""
        while self.senders:
            self._kill()
        self._bring_back()
        self.stripe.clear_faults()
        self._hear_reports()
        self._leap(MINUTE_S)  # no lease of the dead is left
        patience = 3
        for number in range(QUIET_ROUNDS_MAX):
            if not self.senders:
                self._start(backoff_s=300.0, backoff_max_s=300.0)
            moved = self._await_standstill()
            waiting, told, next_at = self._waiting()
            if not waiting:
                patience -= 1
                if not told or not patience:
                    break
            if not moved:  # it may have paused itself, and that is not on this clock
                self._kill()
            least = CALM_LEAPS_S[min(number, len(CALM_LEAPS_S) - 1)]
            self._leap(max(least, 0 if next_at is None else next_at - self.clock.seconds() + 1))
        else:
            self.problems.append(f"{waiting} intents still wait at the end")
        self._hear_reports()
        for sender in list(self.senders):
            self._ended(sender, sender.terminate(), killed=False)

    def _await_standstill(self) -> bool:
        """Wait until the sender has looked several times, holds nothing and settled nothing.

        Whether it settled something before.
        """
        sender = self.senders[0]
        lease_s = self.limits.timeout_s + 6.0
        seen: list[Any] = []
        since, glances = time.monotonic(), sender.glances.value
        while sender.alive():
            now = self.clock()
            row = self.db.execute(
                "SELECT count(*), count(*) FILTER (WHERE state IN ('pending', 'in_flight', 'in_doubt')), "
                "count(*) FILTER (WHERE state IN ('in_flight', 'in_doubt') "
                "AND next_attempt_at BETWEEN %s AND %s) FROM meter_events",
                (now, now + timedelta(seconds=lease_s)),
            ).fetchone()
            assert row is not None
            *settled, held = row
            if not settled[1]:
                break
            if not seen or seen[-1] != settled:
                seen.append(settled)
                since, glances = time.monotonic(), sender.glances.value
            still_s = time.monotonic() - since
            looked = sender.glances.value >= glances + STANDSTILL_GLANCES
            if still_s > STANDSTILL_MAX_S or (looked and not held and still_s > STANDSTILL_S):
                break
            time.sleep(0.02)
        return len(seen) > 1

    def _waiting(self) -> tuple[int, int, float | None]:
        """How many open intents time may help, how many only an operator can, and the next turn."""
        row = self.db.execute(
            """
            WITH told AS (
                SELECT * FROM meter_events WHERE state = 'in_doubt' AND error_code = 'in_doubt_unresolved'
            ), open AS (
                SELECT m.state, m.next_attempt_at,
                    m.identifier IN (SELECT identifier FROM told) OR (m.state = 'pending' AND EXISTS (
                        SELECT FROM told WHERE told.stripe_customer = m.stripe_customer
                            AND told.event_name = m.event_name AND told.hour_start = m.hour_start)) AS stuck
                FROM meter_events m WHERE state IN ('pending', 'in_flight', 'in_doubt')
            )
            SELECT count(*) FILTER (WHERE NOT stuck), count(*) FILTER (WHERE stuck),
                extract(epoch FROM min(next_attempt_at) FILTER (WHERE NOT stuck AND next_attempt_at > %s))
            FROM open
            """,
            (self.clock(),),
        ).fetchone()
        assert row is not None
        return row[0], row[1], None if row[2] is None else float(row[2])

    def _evidence(self) -> Evidence:
        stats = self.stripe.stats()
        rows = self.db.execute(
            "SELECT identifier, state, amount, replaces, error_code, extract(epoch FROM settled_at), "
            "extract(epoch FROM first_sent_at) FROM meter_events"
        ).fetchall()
        buckets = self.db.execute(
            "SELECT item_id, extract(epoch FROM hour_start), extract(epoch FROM period_start), total, "
            "closed, pushed, open, extract(epoch FROM dirty_from) FROM buckets JOIN items USING (item_id)"
        ).fetchall()
        peaks = self.db.execute(
            "SELECT item_id, extract(epoch FROM period_start), value FROM item_periods"
        ).fetchall()
        events = self.db.execute("SELECT value FROM outbox ORDER BY outbox_id").fetchall()
        decoder = Decoder()
        told = [decoder.decode(bytes(value))[1] for (value,) in events]
        return Evidence(
            recorded=self.counters.recorded,
            rows=[
                Row(*first, *(None if moment is None else float(moment) for moment in moments))
                for *first, moments in ((*row[:5], row[5:]) for row in rows)
            ],
            ledger=[
                Entry(
                    one["identifier"],
                    one["customer"],
                    one["event_name"],
                    Decimal(one["value"]),
                    one["timestamp"],
                    one["dimensions"],
                )
                for one in self.stripe.ledger()["rows"]
            ],
            calls=self.watcher.calls,
            reads=self.watcher.reads,
            buckets=[
                Bucket((item, int(h), int(p)), total, closed, pushed, is_open, dirty)
                for item, h, p, total, closed, pushed, is_open, dirty in buckets
            ],
            counted=self.counters.counted,
            peaks={(item, int(period)): value for item, period, value in peaks},
            told=[
                (one["subject_id"], one["attributes"]["reason"])
                for one in told
                if one["name"] == "meter_reporting_failed"
            ],
            lives=[(one.began, one.ended) for one in self.everyone],
            ends=self.ends,
            rate=self.limits.rate,
            slack=self.limits.concurrency,
            problems=[*self.problems, *self._tracebacks()],
            two_values=stats["identifiers_with_two_values"],
            reported={one["identifier"]: one["code"] for one in stats["error_reports"]},
            faults=stats["faults"],
        )

    def _tracebacks(self) -> list[str]:
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return ["a sender wrote a traceback"] if any(line.startswith("Traceback") for line in lines) else []


# -- The oracle ----------------------------------------------------------------------------------------

RESEND_MAX_S = 24 * HOUR_S
PAST_MAX_S = 35 * DAY_S
#: From a claim to its call, at most; beyond this a first call came too late.
ON_THE_WAY_S = 7.0
#: Codes of what is given back, and of a doubt that an operator was told of.
PERIOD_CLOSED, TOO_OLD, UNRESOLVED = "period_closed", "too_old_for_stripe", "in_doubt_unresolved"


@dataclass(frozen=True)
class Row:
    """One row of the journal at the end."""

    identifier: str
    state: str
    amount: Decimal
    replaces: str | None = None
    code: str | None = None
    settled_at: float | None = None
    doubted_from: float | None = None


@dataclass(frozen=True)
class Entry:
    """One applied event of the simulator's ledger, in the order of application."""

    identifier: str
    customer: str
    event_name: str
    value: Decimal
    timestamp: int
    dimensions: Mapping[str, str]


@dataclass(frozen=True)
class Bucket:
    place: tuple[uuid.UUID, int, int]
    total: Decimal
    closed: Decimal | None
    pushed: Decimal
    is_open: bool
    dirty_from: float | None


@dataclass
class Evidence:
    """What one run left behind."""

    recorded: Sequence[Recorded]
    rows: Sequence[Row]
    ledger: Sequence[Entry]
    calls: Sequence[Call] = ()
    reads: Sequence[Read] = ()
    buckets: Sequence[Bucket] = ()
    counted: Mapping[tuple[uuid.UUID, int, int], Any] = field(default_factory=dict)
    peaks: Mapping[tuple[uuid.UUID, int], Decimal] = field(default_factory=dict)
    told: Sequence[tuple[str, str]] = ()
    #: Of each sender, by the monotonic clock; and when one ended, by the simulated one.
    lives: Sequence[tuple[float, float]] = ()
    ends: Sequence[float] = ()
    rate: float = 1.0
    slack: float = 0.0
    problems: Sequence[str] = ()
    two_values: int = 0
    #: What Stripe accepted and then did not apply: code by identifier.
    reported: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """An intent with the row that took its place, if one did, and what Stripe applied of either."""

    intent: Recorded
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]

    @property
    def last(self) -> Row:
        return self.rows[-1]

    @property
    def fate(self) -> str:
        """reported, failed, given_back, blocked (behind a doubt) or unresolved (an operator knows)."""
        state = self.last.state
        return {"cancelled": "given_back", "pending": "blocked", "in_doubt": "unresolved"}.get(state, state)


@dataclass
class Judgement:
    """``wrong`` is empty when the push was exact. ``difference`` is of all hours of all sums."""

    wrong: list[str]
    fates: Counter[str]
    difference: Decimal


def judge(evidence: Evidence) -> Judgement:
    """Compare what was recorded with what Stripe holds, and how it got there with the rules."""
    wrong = list(evidence.problems)
    chains = _chains(evidence, wrong)
    for chain in chains:
        wrong += _wrong_fate(chain, evidence.reported)
    wrong += _blocked_without_doubt(chains)
    difference, more = _wrong_totals(chains, evidence.ledger)
    wrong += more
    wrong += _wrong_values(chains, evidence.ledger)
    wrong += _wrong_calls(chains, evidence)
    wrong += _too_fast(evidence)
    wrong += _wrong_buckets(chains, evidence)
    wrong += _wrong_news(chains, evidence)
    if evidence.two_values:
        wrong.append(f"{evidence.two_values} identifiers were sent with two values")
    return Judgement(wrong, Counter(chain.fate for chain in chains), difference)


def _chains(evidence: Evidence, wrong: list[str]) -> list[Chain]:
    """Every intent with all that became of it; every row and every entry belongs to exactly one."""
    rows = {one.identifier: one for one in evidence.rows}
    heirs = {one.replaces: one for one in evidence.rows if one.replaces is not None}
    entries: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in evidence.ledger:
        entries[entry.identifier].append(entry)
    chains = []
    for intent in evidence.recorded:
        own = rows.pop(intent.identifier, None)
        if own is None:
            wrong.append(f"{intent.identifier} is not in the journal")
            continue
        line = [own]
        if (heir := heirs.get(own.identifier)) is not None:
            line.append(rows.pop(heir.identifier))
            if own.state != "cancelled":
                wrong.append(f"{own.identifier} was replaced and is {own.state}")
        applied = [entry for one in line for entry in entries.pop(one.identifier, [])]
        chains.append(Chain(intent, tuple(line), tuple(applied)))
        for one in line:
            if one.amount != intent.amount:
                wrong.append(f"{one.identifier} carries {one.amount}, recorded was {intent.amount}")
    wrong += [f"nobody recorded {name}, which is in the journal" for name in rows]
    wrong += [f"nobody recorded {name}, which Stripe applied" for name in entries]
    return chains


def _wrong_fate(chain: Chain, reports: Mapping[str, str]) -> list[str]:
    """What became of one intent, against what may become of it."""
    intent, last, entries = chain.intent, chain.last, chain.entries
    name = f"{intent.identifier} ({intent.formula}, {last.state}, {last.code})"
    wrong = []
    for entry in entries:
        sent = (entry.customer, entry.event_name, entry.value, entry.timestamp, dict(entry.dimensions))
        due = (intent.customer, intent.event_name, intent.amount, intent.at, dict(intent.dimensions))
        if sent != due:
            wrong.append(f"{name} was applied as {sent}, recorded was {due}")
    if len(entries) > 1:
        wrong.append(f"{name} was applied {len(entries)} times")
    if entries and chain.fate != "reported":
        wrong.append(f"{name} was applied and is not reported")
    if chain.fate == "reported":
        if not entries and intent.formula == "sum":
            wrong.append(f"{name} is reported and was not applied")
        if intent.doom:
            wrong.append(f"{name} is reported although {intent.doom}")
        if last.identifier in reports:
            wrong.append(f"{name} is reported although Stripe said {reports[last.identifier]}")
    elif chain.fate == "failed":
        if not intent.doom and last.identifier not in reports:
            wrong.append(f"{name} failed without a reason")
    elif chain.fate == "given_back":
        wrong += [f"{name} {text}" for text in _given_back_wrongly(intent, last)]
    elif chain.fate == "unresolved":
        if last.code != UNRESOLVED:
            wrong.append(f"{name} is in doubt and nobody was told")
        if last.replaces is None and intent.doom != "unknown_customer":
            wrong.append(f"{name} was never settled, and was not replaced either")
    elif chain.fate != "blocked":
        wrong.append(f"{name} ended {last.state}")
    return wrong


def _given_back_wrongly(intent: Recorded, last: Row) -> list[str]:
    if last.settled_at is None:
        return ["was given back at no time"]
    if last.code == PERIOD_CLOSED:
        early = intent.push_before is None or last.settled_at < intent.push_before
        return ["was given back before its deadline"] if early else []
    if last.code == TOO_OLD:
        early = last.settled_at - intent.at < PAST_MAX_S - 2 * MINUTE_S
        return ["was given back although Stripe takes its time"] if early else []
    return ["was given back for no reason"]


def _blocked_without_doubt(chains: Iterable[Chain]) -> list[str]:
    doubts = {chain.intent.place for chain in chains if chain.fate == "unresolved"}
    return [
        f"{chain.intent.identifier} is pending, and nothing of its hour is in doubt"
        for chain in chains
        if chain.fate == "blocked" and chain.intent.place not in doubts
    ]


def _wrong_totals(chains: Iterable[Chain], ledger: Iterable[Entry]) -> tuple[Decimal, list[str]]:
    """Per customer, meter and hour: recorded, less what was given back, failed or is known to be open."""
    due: defaultdict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    held: defaultdict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    values = {chain.intent.event_name for chain in chains if chain.intent.formula == "last"}
    for chain in chains:
        if chain.intent.event_name not in values:
            due[chain.intent.place] += chain.intent.amount
            if chain.fate != "reported":
                due[chain.intent.place] -= chain.intent.amount
    for entry in ledger:
        if entry.event_name not in values:
            held[entry.customer, entry.event_name, entry.timestamp // HOUR_S * HOUR_S] += entry.value
    off = {place: held[place] - due[place] for place in due.keys() | held.keys() if held[place] != due[place]}
    return (
        sum((abs(one) for one in off.values()), Decimal(0)),
        [f"{place} is off by {amount}" for place, amount in off.items()],
    )


def _wrong_values(chains: Iterable[Chain], ledger: Iterable[Entry]) -> list[str]:
    """Each hour of a `last` meter went through the values that were reported, in their order.

    A value that equals the one before may be missing: sending it would have changed nothing.
    """
    due: defaultdict[tuple[str, str, int], list[Decimal]] = defaultdict(list)
    held: defaultdict[tuple[str, str, int], list[Decimal]] = defaultdict(list)
    for chain in chains:
        if chain.intent.formula == "last" and chain.fate == "reported":
            due[chain.intent.place].append(chain.intent.amount)
    names = {name for _, name, _ in due}
    for entry in ledger:
        if entry.event_name in names:
            held[entry.customer, entry.event_name, entry.timestamp // HOUR_S * HOUR_S].append(entry.value)
    return [
        f"{place} went through {held[place]}, recorded was {due[place]}"
        for place in due.keys() | held.keys()
        if _changes(held[place]) != _changes(due[place])
    ]


def _changes(values: Sequence[Decimal]) -> list[Decimal]:
    return [value for n, value in enumerate(values) if n == 0 or value != values[n - 1]]


def _wrong_calls(chains: Sequence[Chain], evidence: Evidence) -> list[str]:
    """One content for each identifier, no resend after a day, no first call too late, a question first."""
    wrong = []
    by_identifier: defaultdict[str, list[Call]] = defaultdict(list)
    for call in evidence.calls:
        by_identifier[call.identifier].append(call)
        if call.beside:
            wrong.append(
                f"{call.identifier} was called beside {call.beside} others of its customer and meter"
            )
    for name, calls in by_identifier.items():
        if len({(call.customer, call.event_name, call.content) for call in calls}) > 1:
            wrong.append(f"{name} was sent with two contents")
        doubted_from = min((call.at for call in calls if not call.refused), default=None)
        if doubted_from is not None and calls[-1].at - doubted_from >= RESEND_MAX_S:
            hours = (calls[-1].at - doubted_from) / HOUR_S
            wrong.append(f"{name} was sent again {hours:.1f} hours after a call that may have had its effect")
    for chain in chains:
        intent = chain.intent
        for row in chain.rows:
            calls = by_identifier.get(row.identifier, [])
            if calls and intent.push_before is not None:
                wrong += _late_for_the_invoice(row, calls[0].at, intent.push_before, evidence.ends)
        if len(chain.rows) > 1:
            wrong += _replaced_without_a_question(chain, by_identifier, evidence.reads)
    return wrong


def _late_for_the_invoice(row: Row, first_at: float, deadline: int, ends: Iterable[float]) -> list[str]:
    """A first call after its deadline. Unless its sender died after it had begun: then it is no first one."""
    began = row.doubted_from
    if first_at <= deadline + ON_THE_WAY_S:
        return []
    if began is not None and began < deadline and any(began <= end + 1 and end <= first_at for end in ends):
        return []
    return [f"{row.identifier} was sent first {first_at - deadline:.0f} s after its deadline"]


def _replaced_without_a_question(
    chain: Chain, calls: Mapping[str, Sequence[Call]], reads: Iterable[Read]
) -> list[str]:
    first, second = (calls.get(row.identifier, ()) for row in chain.rows)
    if not second:
        return []
    earliest = first[-1].at if first else 0.0
    asked = any(
        (read.customer, read.event_name, read.hour) == chain.intent.place
        and earliest + HOUR_S <= read.at + ON_THE_WAY_S
        and read.at <= second[0].at
        for read in reads
    )
    return [] if asked else [f"{chain.intent.identifier} was sent anew, and no summary was read before"]


def _too_fast(evidence: Evidence) -> list[str]:
    """In no second more calls than the senders alive in it may make, and those that were on their way."""
    arrivals = sorted(call.arrived for call in evidence.calls)
    begin = 0
    for end, now in enumerate(arrivals):
        while arrivals[begin] <= now - 1:
            begin += 1
        seen = end - begin + 1
        allowed = sum(
            evidence.rate * (0.05 + 0.95 * min(1.0, min(now, ended) - max(now - 1.2, began))) + 2
            for began, ended in evidence.lives
            if began < now and ended > now - 1.2
        )
        if seen > allowed + evidence.slack:
            return [f"{seen} calls in one second, allowed were {allowed:.0f}"]
    return []


def _wrong_buckets(chains: Iterable[Chain], evidence: Evidence) -> list[str]:
    """What was given back lies in its bucket to be closed again, and only open intents keep one open."""
    wrong = []
    sent: defaultdict[tuple[uuid.UUID, int, int], Decimal] = defaultdict(Decimal)
    back: defaultdict[tuple[uuid.UUID, int, int], list[Recorded]] = defaultdict(list)
    is_open: set[tuple[uuid.UUID, int, int]] = set()
    peaks: defaultdict[tuple[uuid.UUID, int], Decimal] = defaultdict(Decimal)
    by_aggregation = {(one.tenant, one.slug): one.aggregation for one in METERS}
    kinds: dict[tuple[uuid.UUID, int, int], str] = {}
    for chain in chains:
        one = chain.intent
        kinds[one.bucket] = by_aggregation[one.tenant, one.meter]
        sent[one.bucket] += one.amount
        if chain.fate == "given_back":
            back[one.bucket].append(one)
            sent[one.bucket] -= one.amount
            if kinds[one.bucket] == "max":
                peaks[one.item, one.period] -= one.amount
        if chain.fate in ("unresolved", "blocked"):
            is_open.add(one.bucket)
    for bucket in evidence.buckets:
        place = bucket.place
        kind = kinds.get(place)
        if bucket.is_open != (place in is_open):
            wrong.append(f"bucket {place} is {'open' if bucket.is_open else 'not open'}")
        if back[place] and (bucket.dirty_from is None or bucket.dirty_from > place[1]):
            wrong.append(f"bucket {place} got something back and will not be closed again")
        if kind == "last":
            continue
        if bucket.pushed != sent[place]:
            wrong.append(f"bucket {place} says {bucket.pushed} was sent, it was {sent[place]}")
        if kind == "sum" and bucket.closed != sent[place]:
            wrong.append(f"bucket {place} says {bucket.closed} is closed, it is {sent[place]}")
        if bucket.total != evidence.counted[place]:
            wrong.append(f"bucket {place} counts {bucket.total}, counted was {evidence.counted[place]}")
    for peak, value in evidence.peaks.items():
        if value != peaks[peak]:
            wrong.append(f"period {peak} holds {value}, given back was {peaks[peak]}")
    return wrong


def _wrong_news(chains: Iterable[Chain], evidence: Evidence) -> list[str]:
    """One ops event for each failure and for each doubt that an operator has to settle; no other."""
    news = Counter(evidence.told)
    wrong = [f"{name} was told {count} times: {code}" for (name, code), count in news.items() if count > 1]
    failures = {name for name, code in news if code != UNRESOLVED}
    doubts = {name for name, code in news if code == UNRESOLVED}
    for chain in chains:
        name = chain.last.identifier
        if (chain.fate == "failed") != (name in failures):
            wrong.append(f"{name} {chain.last.state}, and this was {'' if name in failures else 'not '}told")
        if chain.fate == "unresolved" and name not in doubts:
            wrong.append(f"{name} is unresolved, and nobody was told")
    return wrong


def figures(run: Run, judgement: Judgement, evidence: Evidence, seconds: float) -> dict[str, Any]:
    """What one run went through and came to."""
    return {
        "seed": run.seed,
        "sink": run.limits.sink,
        "intents": len(evidence.recorded),
        "calls": len(evidence.calls),
        "reads": len(evidence.reads),
        **run.figures,
        "faults": sum(evidence.faults.values()),
        "kinds_of_faults": len(evidence.faults),
        **judgement.fates,
        "replaced": sum(row.replaces is not None for row in evidence.rows),
        "difference": float(judgement.difference),
        "wrong": len(judgement.wrong),
        "seconds": round(seconds, 1),
    }
