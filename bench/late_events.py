"""Late events, from hand-over to deltas: how long until every bucket is revised and every delta written.

A thousand items have counted for twenty hours and their deltas are settled. Then 10,000 events arrive hours
late, each in an hour that was closed: the real chunk handler takes them in chunks of the worker's own size,
and the real closing runs until nothing is left to close, against a real PostgreSQL. The clock runs from the
first chunk's hand-over to the last delta's commit; Kafka is not in it on either side.

``checked`` compares every bucket, its number of late events and the sum of its deltas with plain sums.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from rich.table import Table

from bench.generator import HOUR_US, TENANT, start_of_day_before
from bench.results import versions
from bench.servers import Servers, fresh_database
from schemas.catalog import current
from services.counters.closing import close_round
from services.counters.config import load_configuration
from services.counters.ledger import GROUP, Counters
from services.counters.prepare import Preparer
from services.streaming.chunks import Chunk, Partition
from services.streaming.database import Database
from services.streaming.offsets import ensure_positions
from services.wire.codec import Decoder, Encoder
from services.wire.settings import load_settings
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import record_key
from upcasters.chain import upcasters

KEY = "late_events"
EVENTS = 10_000
ITEMS_MAX = 1_000
HOURS = 20
METER = "api_requests"
THOUSANDTH = 1_000_000
PARTITION = Partition(USAGE_CURRENT, 0)

#: Billionths and late events by (customer, hour start in microseconds).
Truth = dict[tuple[str, int], list[int]]


@dataclass(frozen=True, slots=True)
class Record:
    """A raw record, as a consumer would give it."""

    offset: int
    timestamp: int
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]]


class Source:
    """Seeded events of one partition, and what they come to."""

    def __init__(self, seed: int, items: int) -> None:
        self._chance = random.Random(seed)
        self._encoder = Encoder(current("usage_event"))
        self._now_us = time.time_ns() // 1000
        self._start_us = start_of_day_before(self._now_us)
        self._offset = 0
        self.items = items
        self.truth: Truth = defaultdict(lambda: [0, 0])

    def event(self, item: int, hour: int, *, late: bool) -> Record:
        """One event of one item in the given hour of the day before."""
        customer = f"cus_{item:06d}"
        quantity = self._chance.randrange(1, 1_000) * THOUSANDTH
        hour_us = self._start_us + hour * HOUR_US
        value = self._encoder.encode(
            {
                "idempotency_key": f"evt-{self._offset:010d}",
                "tenant_id": TENANT,
                "customer_ref": customer,
                "meter": METER,
                "quantity": quantity.to_bytes(16, "big", signed=True),
                "occurred_at": hour_us + self._chance.randrange(HOUR_US),
                "properties": {},
                "source": "bench",
            }
        )
        bucket = self.truth[customer, hour_us]
        bucket[0] += quantity
        bucket[1] += late
        key = record_key(TENANT, customer, METER)
        record = Record(self._offset, self._now_us // 1000, key, value, self._encoder.headers)
        self._offset += 1
        return record

    def on_time(self) -> list[Record]:
        """One event of every item in every hour, in order; the last moves the watermark past the rest."""
        return [self.event(item, hour, late=False) for hour in range(HOURS + 1) for item in range(self.items)]

    def late(self, events: int) -> list[Record]:
        """``events`` events, spread over items and closed hours alike, in no order."""
        places = [(number % self.items, number // self.items % HOURS) for number in range(events)]
        self._chance.shuffle(places)
        return [self.event(item, hour, late=True) for item, hour in places]


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Count, settle, then time the late events."""
    events = EVENTS if events is None else events
    source = Source(seed, min(ITEMS_MAX, events))
    with fresh_database(servers.dsn) as dsn:
        _configure_meter(dsn)
        database, configuration = Database(dsn, "bench"), Database(dsn, "configuration")
        try:
            db = database.connection()
            ensure_positions(db, GROUP, {PARTITION: 0})
            counters = Counters(
                Preparer(Decoder(), upcasters()), lambda: load_configuration(configuration.connection())
            )
            say(f"counting and settling {source.items:,} items")
            _count(counters, db, source.on_time())
            _close(db)
            _settle(db)
            say(f"{events:,} late events")
            late = source.late(events)
            began_s = time.monotonic()
            _count(counters, db, late)
            deltas = _close(db)
            seconds = time.monotonic() - began_s
            checked = _is_exact(db, source.truth)
        finally:
            database.reset()
            configuration.reset()
    return {
        "seconds": round(seconds, 3),
        "items": source.items,
        "events": events,
        "deltas": deltas,
        "checked": checked,
        "versions": versions(),
        "cpu": os.cpu_count(),
    }


def _configure_meter(dsn: str) -> None:
    with psycopg.connect(dsn) as db:
        db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (TENANT,))
        db.execute(
            "INSERT INTO meters (tenant_id, meter, aggregation, scale, event_name) "
            "VALUES (%s, %s, 'sum', 3, %s)",
            (TENANT, METER, METER),
        )


def _count(counters: Counters, db: psycopg.Connection[Any], records: list[Record]) -> None:
    """Hand the records over as the worker does: in chunks of its size, one transaction each."""
    size = load_settings().chunk_records_max
    for at in range(0, len(records), size):
        counters.apply(db, counters.prepare(Chunk(PARTITION, records[at : at + size])))


def _close(db: psycopg.Connection[Any]) -> int:
    """Close until nothing is dirty; returns the number of deltas."""
    closed = 0
    while True:
        items, deltas = close_round(db)
        closed += deltas
        if items == 0:
            return closed


def _settle(db: psycopg.Connection[Any]) -> None:
    """What the pusher leaves when Stripe has taken every delta: the next ones may be closed."""
    db.execute("UPDATE item_periods SET open_deltas = 0")
    db.execute("DELETE FROM outbox")


def _is_exact(db: psycopg.Connection[Any], truth: Truth) -> bool:
    """Is every bucket what it should be, with all of it in its deltas, and nothing left over?"""
    rows = db.execute(
        "SELECT customer_ref, (extract(epoch FROM hour_start) * 1000000)::bigint, sum(total) * 1000000000, "
        "sum(late_events), sum((SELECT coalesce(sum(amount), 0) FROM deltas d "
        "WHERE (d.item_id, d.hour_start, d.period_start) = (b.item_id, b.hour_start, b.period_start))) "
        "* 1000000000 FROM buckets b JOIN items USING (item_id) GROUP BY 1, 2"
    ).fetchall()
    found = {(customer, hour): [total, late] for customer, hour, total, late, _ in rows}
    return found == dict(truth) and all(row[2] == row[4] for row in rows)


def render(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table("late events", "items", "deltas", "seconds", "events/s", "sums", title="Late events")
    table.add_row(
        f"{result['events']:,}",
        f"{result['items']:,}",
        f"{result['deltas']:,}",
        f"{result['seconds']:.2f}",
        f"{result['events'] / result['seconds']:,.0f}",
        "exact" if result["checked"] else "NOT EXACT",
    )
    return table
