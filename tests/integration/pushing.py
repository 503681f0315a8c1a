"""A journal, a simulator and a sender, for tests of the push."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any

import psycopg
import stripe

from services.pusher import journal
from services.pusher.failures import Choice, release_failed
from services.pusher.intents import (
    Policy,
)
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks import Sink
from services.pusher.sinks.stripe import StripeSink
from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.wire.codec import Decoder, Record

ROOT = Path(__file__).parents[2]
KEY = "sk_test_pusher"
HOUR = timedelta(hours=1)
EVENT = "api_calls"
GAUGE = "seats"

SENDER_PROGRAM = """
import asyncio, os, sys
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.wire.log import configure_logging

async def main():
    configure_logging("debug", "json")
    timeout = float(os.environ["CALL_TIMEOUT"])
    kind = {"StripeSink": StripeSink, "StripeStreamSink": StripeStreamSink}[os.environ["SINK"]]
    sink = kind(os.environ["STRIPE_KEY"], api_base=os.environ["STRIPE_BASE"], timeout_seconds=timeout,
                      connections_max=16)
    config = SenderConfig(rate_per_second=2000, concurrency=16, call_timeout_seconds=timeout)
    sender = Sender(os.environ["DSN"], sink, config)
    print("running", flush=True)
    await sender.run()

asyncio.run(main())
"""


def identifier_of(*parts: object) -> str:
    return "d" + blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def micros(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def delta(
    customer: str = "cus_1",
    amount: str = "1",
    *,
    hours_ago: int = 0,
    sequence: int = 1,
    event_name: str = EVENT,
    tenant: str = "acme",
    dimensions: dict[str, str] | None = None,
    formula: str = "sum",
    push_before: datetime | None = None,
) -> Record:
    """A decoded ``usage_delta``, as the agent hands it over."""
    hour = this_hour() - hours_ago * HOUR
    month = hour.replace(day=1, hour=0)
    item = uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant} {customer} {event_name} {dimensions or ''}")
    return {
        "identifier": identifier_of(item, hour, sequence),
        "item_id": item.bytes,
        "tenant_id": tenant,
        "customer_ref": f"ref-{customer}",
        "meter": event_name,
        "stripe_customer": customer,
        "event_name": event_name,
        "customer_payload_key": "stripe_customer_id",
        "value_payload_key": "value",
        "period_start": micros(month),
        "period_end": micros((month + timedelta(days=32)).replace(day=1)),
        "hour_start": micros(hour),
        "event_at": micros(hour),
        "sequence": sequence,
        "amount": int(Decimal(amount).scaleb(9)).to_bytes(16, "big", signed=True),
        "closed_at": micros(datetime.now(UTC)),
        "dimensions": dimensions or {},
        "formula": formula,
        "push_before": None if push_before is None else micros(push_before),
    }


def gauge(amount: str, *, sequence: int = 1, customer: str = "cus_1", hours_ago: int = 0) -> Record:
    """A value for the meter whose formula is ``last``."""
    return delta(customer, amount, sequence=sequence, event_name=GAUGE, formula="last", hours_ago=hours_ago)


def amount_of(record: Record) -> Decimal:
    return Decimal(int.from_bytes(record["amount"], "big", signed=True)).scaleb(-9)


class World:
    """One journal, one simulator, and a clock for the sender that moves with the simulator's."""

    def __init__(self, dsn: str, control: SimulatorControl) -> None:
        self.dsn = dsn
        self.stripe = control
        self.offset = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def advance(self, by: timedelta) -> None:
        self.offset += by
        self.stripe.advance(by.total_seconds())

    def sql(self, query: Any, values: Any = None) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as db:
            cursor = db.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def close(self, *deltas: Record) -> None:
        """What the counters do when they close deltas, and the agent when it receives them.

        A `last` bucket's total is its value; any other's grows by the delta.
        """
        with psycopg.connect(self.dsn) as db:
            for one in deltas:
                item, hour, month, end = (
                    uuid.UUID(bytes=one["item_id"]),
                    *(
                        datetime.fromtimestamp(one[f] / 1e6, UTC)
                        for f in ("hour_start", "period_start", "period_end")
                    ),
                )
                db.execute(
                    "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, calendar) "
                    "VALUES (%s, %s, %s, %s, %s, '1 month UTC') ON CONFLICT DO NOTHING",
                    (item, one["tenant_id"], one["customer_ref"], one["meter"], hour),
                )
                db.execute(
                    "INSERT INTO item_periods (item_id, period_start, period_end) "
                    "VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                    (item, month, end),
                )
                last = one["formula"] == "last"
                closed = db.execute(
                    "INSERT INTO buckets AS b (item_id, hour_start, period_start, total, events, "
                    "late_events, closed, pushed, sequence, open, first_arrival, last_arrival, "
                    "first_event, last_event) "
                    "VALUES (%(i)s, %(h)s, %(p)s, %(a)s, 1, 0, %(a)s, %(a)s, 1, true, now(), now(), "
                    "%(h)s, %(h)s) "
                    "ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET open = true, "
                    "total = b.total * %(keep)s + excluded.total, "
                    "closed = b.closed * %(keep)s + excluded.closed, "
                    "pushed = b.pushed * %(keep)s + excluded.pushed WHERE NOT b.open",
                    {"i": item, "h": hour, "p": month, "a": amount_of(one), "keep": 0 if last else 1},
                )
                assert closed.rowcount == 1, "the counters do not close a bucket that is open"
            journal.record_intents(db, deltas)

    def states(self) -> dict[str, int]:
        return dict(self.sql("SELECT state, count(*) FROM meter_events GROUP BY state"))

    def open_buckets(self) -> int:
        return int(self.sql("SELECT count(*) FROM buckets WHERE open")[0][0])

    def bucket(self, one: Record) -> tuple[Any, ...]:
        """closed, pushed, open, dirty_from of the delta's item."""
        (row,) = self.sql(
            "SELECT closed, pushed, open, dirty_from FROM buckets JOIN items USING (item_id) "
            "WHERE item_id = %s AND hour_start = %s",
            (uuid.UUID(bytes=one["item_id"]), datetime.fromtimestamp(one["hour_start"] / 1e6, UTC)),
        )
        return row

    def reported(self) -> Decimal:
        return Decimal(
            self.sql("SELECT coalesce(sum(amount), 0) FROM meter_events WHERE state = 'reported'")[0][0]
        )

    def ops_events(self) -> list[Record]:
        rows = self.sql("SELECT value FROM outbox WHERE producer = 'tidemeter-pusher' ORDER BY outbox_id")
        return [Decoder().decode(bytes(value))[1] for (value,) in rows]

    def billed(self) -> Decimal:
        return Decimal(self.stripe.total())

    def requests(self, route: str, *statuses: int) -> int:
        """Answers of the simulator so far: `POST /v1/billing/meter_events`, with any status or with these."""
        return sum(
            one["count"]
            for one in self.stripe.stats()["requests"]
            if one["route"] == route and (not statuses or one["status"] in statuses)
        )

    def deactivate(self, event_name: str) -> None:
        """Archive a meter, as in Stripe's dashboard."""
        self._client().v1.billing.meters.deactivate(f"mtr_{event_name}")

    def reactivate(self, event_name: str) -> None:
        self._client().v1.billing.meters.reactivate(f"mtr_{event_name}")

    def _client(self) -> stripe.StripeClient:
        return stripe.StripeClient(KEY, base_addresses={"api": self.stripe.url})

    def sink(self, key: str = KEY, timeout: float = 2.0) -> StripeSink:
        return StripeSink(key, api_base=self.stripe.url, timeout_seconds=timeout, connections_max=16)

    @contextlib.asynccontextmanager
    async def sending(
        self,
        sink: Sink | None = None,
        *,
        policy: Policy | None = None,
        rate: float = 5000,
        timeout: float = 2.0,
        concurrency: int = 16,
    ) -> AsyncIterator[Sender]:
        wanted = sink or self.sink(timeout=timeout)
        config = SenderConfig(
            rate_per_second=rate,
            concurrency=concurrency,
            call_timeout_seconds=timeout,
            policy=policy or Policy(backoff_base_seconds=0.05, backoff_cap_seconds=0.2),
        )
        dice = random.Random(7)  # noqa: S311  repeatable, not secret
        sender = Sender(self.dsn, wanted, config, clock=self.now, chance=dice.random)
        await sender.start()
        try:
            yield sender
        finally:
            await sender.stop()
            await wanted.close()

    def spawn(
        self,
        *,
        fault: str | None = None,
        log: Path | None = None,
        timeout: float = 2.0,
        sink: str = "StripeSink",
    ) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DSN": self.dsn,
            "STRIPE_BASE": self.stripe.url,
            "STRIPE_KEY": KEY,
            "CALL_TIMEOUT": str(timeout),
            "SINK": sink,
        }
        if fault is not None:
            env |= {"TIDEMETER_FAULT_POINT": fault, "TIDEMETER_FAULT_LOG": str(log)}
        return subprocess.Popen(
            [sys.executable, "-c", SENDER_PROGRAM],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextlib.contextmanager
def open_world(postgres_dsn: str, config: SimulatorConfig | None = None) -> Iterator[World]:
    """An empty journal and a simulator with 300 customers and three meters."""
    with psycopg.connect(postgres_dsn, autocommit=True) as db:
        db.execute("TRUNCATE meter_events, paused_meters, item_periods, buckets, items, outbox")
    with running_simulator(config or SimulatorConfig(port=0, rate_per_second=100_000)) as control:
        last = {"id": "mtr_seats", "event_name": GAUGE, "default_aggregation": {"formula": "last"}}
        control.seed(customers=[f"cus_{n}" for n in range(300)], meters=[EVENT, "storage", last])
        yield World(postgres_dsn, control)


def send_again(db: psycopg.Connection[Any], **choice: Any) -> int:
    """What `tidemeter meter-events retry` does, in a transaction of the caller's."""
    return len(release_failed(db, Choice(**choice), now=datetime.now(UTC)))


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


def settled(world: World) -> bool:
    return not set(world.states()) & {"pending", "in_flight", "in_doubt"}


def no_call_left(world: World) -> bool:
    return not set(world.states()) & {"pending", "in_flight"}


@contextlib.contextmanager
def killed_at_the_end(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()
