"""The push: how many meter events a second reach Stripe, beside what Stripe's own library can do at all.

Intents are stored in the journal with their buckets first. Then the real sender, with the real sink and
Stripe's library, sends them from this process to the Stripe simulator, which runs in a process of its own;
PostgreSQL holds the journal, and every intent is durable before its call and settled after it.

Four numbers for each of the two ways (v1: a call for each event; stream: up to 100 in a call):

``within_limit_per_second``  with the simulator at the documented limit (1,000 a second for v1, 10,000 for
                             the stream) and the sender set just below it; ``refused`` counts the 429 it met
``ceiling_per_second``       no limit on either side
``bare_per_second``          Stripe's library alone: the same calls, no journal, no PostgreSQL, no limit
``ratio``                    ceiling : bare

``checked`` compares the simulator's ledger with the sum of what was stored, to the last digit.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any
from uuid import UUID

import psycopg
from rich.table import Column, Table

from bench.results import versions
from bench.servers import Servers, fresh_database
from services.pusher.intents import Intent, Meaning, intent_of
from services.pusher.journal import record_intents
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.stripe_simulator.control_client import SimulatorControl
from services.wire.codec import Record
from services.wire.times import micros

KEY = "push"
EVENTS = 20_000
CUSTOMERS = 5_000
METER = "api_requests"
API_KEY = "sk_test_bench"
HOUR = timedelta(hours=1)
SECONDS_MAX = 180.0

#: Documented limits, and what the sender is set to: it may not meet them.
LIMITS = {"v1": (1_000, 995.0), "stream": (10_000, 9_900.0)}
NO_LIMIT = 1_000_000

SIMULATOR = """
import asyncio, sys
from services.stripe_simulator import SimulatorConfig
from services.stripe_simulator.running import serve
from services.wire.log import configure_logging

configure_logging("warning")
config = SimulatorConfig(port=0, rate_per_second=float(sys.argv[1]), basic_rate_per_second=1e6,
                         stream_rate_per_second=float(sys.argv[2]))
asyncio.run(serve(config, on_ready=lambda url: print(url, flush=True)))
"""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to Stripe: its sink, and how wide the sender is for it."""

    name: str
    sink: type[StripeSink]
    calls: int

    def sink_to(self, url: str) -> StripeSink:
        return self.sink(API_KEY, api_base=url, timeout_seconds=20.0, connections_max=self.calls)

    def config(self, rate: float) -> SenderConfig:
        return SenderConfig(rate_per_second=rate, concurrency=self.calls)


@dataclass(frozen=True, slots=True)
class Bare:
    """A call without a claim."""

    intent: Intent

    @property
    def idempotency_key(self) -> str:
        return self.intent.identifier


WAYS = (Way("v1", StripeSink, 32), Way("stream", StripeStreamSink, 16))


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Send ``events`` by each way, within Stripe's limits, without limits, and by the library alone."""
    events = EVENTS if events is None else events
    result: dict[str, Any] = {"events": events, "customers": min(events, CUSTOMERS)}
    exact, deltas = True, _deltas(events, seed)
    for way in WAYS:
        limit, rate = LIMITS[way.name]
        numbers: dict[str, Any] = {}
        for name, allowed, wanted in (("within_limit", limit, rate), ("ceiling", NO_LIMIT, float(NO_LIMIT))):
            with _simulator(allowed) as control, fresh_database(servers.dsn) as dsn:
                per_second, refused, is_exact = _push(dsn, control, way, way.config(wanted), deltas)
            numbers[f"{name}_per_second"] = round(per_second)
            if name == "within_limit":
                numbers["refused"] = refused
            exact &= is_exact
            say(f"{way.name} {name}: {per_second:,.0f} a second, {refused} refused")
        with _simulator(NO_LIMIT) as control:
            bare, is_exact = _bare(control, way, deltas)
        exact &= is_exact
        numbers["bare_per_second"] = round(bare)
        numbers["ratio"] = round(numbers["ceiling_per_second"] / bare, 2)
        say(f"{way.name} bare: {bare:,.0f} a second")
        result[way.name] = numbers
    return {**result, "checked": exact, "versions": versions()}


def render(result: dict[str, Any]) -> Table:
    """The result as a table."""
    table = Table(
        "push",
        Column("within the limit/s", justify="right"),
        Column("refused", justify="right"),
        Column("ceiling/s", justify="right"),
        Column("library alone/s", justify="right"),
        Column("ratio", justify="right"),
        box=None,
    )
    for way in WAYS:
        one = result[way.name]
        table.add_row(
            way.name,
            *(
                f"{one[name]:,}"
                for name in ("within_limit_per_second", "refused", "ceiling_per_second", "bare_per_second")
            ),
            f"{one['ratio']:.2f}",
        )
    return table


@contextmanager
def _simulator(limit: int) -> Iterator[SimulatorControl]:
    process = subprocess.Popen(
        [sys.executable, "-c", SIMULATOR, str(limit), str(limit)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        control = SimulatorControl(process.stdout.readline().strip())
        control.seed(customers=[f"cus_{n:05d}" for n in range(CUSTOMERS)], meters=[METER])
        yield control
    finally:
        process.kill()
        process.wait()


def _deltas(events: int, seed: int) -> list[Record]:
    """One delta for each customer and hour."""
    chance = random.Random(seed)
    last = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    month = last.replace(day=1, hour=0) - timedelta(days=31)
    deltas = []
    for number in range(events):
        customer, hour = f"cus_{number % CUSTOMERS:05d}", last - (number // CUSTOMERS) * HOUR
        item = blake2b(customer.encode(), digest_size=16).digest()
        deltas.append(
            {
                "identifier": blake2b(f"{customer} {hour}".encode(), digest_size=20).hexdigest(),
                "item_id": item,
                "tenant_id": "bench",
                "customer_ref": customer,
                "meter": METER,
                "stripe_customer": customer,
                "event_name": METER,
                "customer_payload_key": "stripe_customer_id",
                "value_payload_key": "value",
                "period_start": micros(month),
                "period_end": micros(month + timedelta(days=62)),
                "hour_start": micros(hour),
                "event_at": micros(hour),
                "sequence": 1,
                "amount": (chance.randrange(1, 10**12)).to_bytes(16, "big", signed=True),
                "closed_at": micros(datetime.now(UTC)),
                "dimensions": {},
                "formula": "sum",
                "push_before": None,
            }
        )
    return deltas


def _store(dsn: str, deltas: Sequence[Record]) -> None:
    """What the counters and the agent leave behind: items, open buckets, intents."""
    intents = [intent_of(delta) for delta in deltas]
    with psycopg.connect(dsn) as db:
        with db.cursor().copy(
            "COPY items (item_id, tenant_id, customer_ref, meter, watermark, calendar) FROM STDIN"
        ) as copy:
            for item, one in {one.item_id: one for one in intents}.items():
                copy.write_row(
                    (UUID(item), "bench", one.stripe_customer, METER, one.hour_start, "1 month UTC")
                )
        with db.cursor().copy(
            "COPY buckets (item_id, hour_start, period_start, total, events, late_events, closed, pushed, "
            "sequence, open, first_arrival, last_arrival, first_event, last_event) FROM STDIN"
        ) as copy:
            for one in intents:
                place = (UUID(one.item_id), one.hour_start, one.period_start)
                amount, at = one.amount, one.hour_start
                copy.write_row((*place, amount, 1, 0, amount, amount, 1, True, at, at, at, at))
        for first in range(0, len(deltas), 5000):
            record_intents(db, deltas[first : first + 5000])
        db.commit()
        db.autocommit = True
        db.execute("VACUUM ANALYZE")


def _push(
    dsn: str, control: SimulatorControl, way: Way, config: SenderConfig, deltas: Sequence[Record]
) -> tuple[float, int, bool]:
    """Intents settled per second, from the start of the sender; calls refused; whether all is exact."""
    _store(dsn, deltas)

    async def send() -> float:
        sink = way.sink_to(control.url)
        sender = Sender(dsn, sink, config)
        began_s = time.monotonic()
        await sender.start()
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as db:
            while True:
                cursor = await db.execute(
                    "SELECT FROM meter_events WHERE state IN ('pending', 'in_flight', 'in_doubt') LIMIT 1"
                )
                if await cursor.fetchone() is None or time.monotonic() - began_s > SECONDS_MAX:
                    break
                await asyncio.sleep(0.05)
        seconds = time.monotonic() - began_s
        await sender.stop()
        await sink.close()
        return seconds

    seconds = asyncio.run(send())
    stats = control.stats()
    refused = sum(one["count"] for one in stats["requests"] if one["status"] == 429)
    return len(deltas) / seconds, refused, _is_exact(control, deltas)


def _bare(control: SimulatorControl, way: Way, deltas: Sequence[Record]) -> tuple[float, bool]:
    """Events per second by the same calls of Stripe's library, with nothing around them."""
    intents = [intent_of(delta) for delta in deltas]

    async def send() -> float:
        sink = way.sink_to(control.url)
        size = sink.batch_max
        batches = iter([intents[at : at + size] for at in range(0, len(intents), size)])

        async def call() -> None:
            for batch in batches:
                for answer in await sink.send([Bare(intent) for intent in batch]):
                    if answer.meaning is not Meaning.DELIVERED:
                        raise RuntimeError(f"the simulator answered {answer}")

        began_s = time.monotonic()
        await asyncio.gather(*(call() for _ in range(way.calls)))
        seconds = time.monotonic() - began_s
        await sink.close()
        return seconds

    return len(deltas) / asyncio.run(send()), _is_exact(control, deltas)


def _is_exact(control: SimulatorControl, deltas: Sequence[Record]) -> bool:
    expected = sum((intent_of(delta).amount for delta in deltas), Decimal(0))
    return Decimal(control.total()) == expected and control.stats()["ledger_rows"] == len(deltas)
