"""Late events: how long until every bucket is revised and every delta is written.

A thousand items have counted for twenty hours and their deltas are settled: the benchmark plays the pusher.
Then 10,000 events arrive hours late, ten for each item, each in another closed hour. They are produced to a
Kafka topic as fast as a producer can, where a counters worker waits: the real process, its timer included,
with every setting as it is by default or in the environment, on a real PostgreSQL.

``seconds`` runs from the brokers' acknowledgement of the last of these events to the moment when every one of
their deltas is seen committed in PostgreSQL; ``from_first_record_seconds`` from the first one's hand-over to
the producer. Rounds follow each other on fresh hours, at random moments of the timer's interval; both are
medians over the rounds.

``count_seconds`` and ``close_seconds`` are the same work without Kafka and without waiting: the worker's
chunk handler on chunks of the worker's size, then its closing until nothing is left to close, one after the
other in this process. ``count_cpu_seconds`` and ``close_cpu_seconds`` are what they took of the processor,
PostgreSQL not included, and ``worker_cpu_seconds`` what the real worker took in
``from_first_record_seconds``: where other work shares the machine, these still compare.

``checked`` compares every bucket, its number of late events and the sum of its deltas with plain sums.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import psycopg
from confluent_kafka import KafkaError, Producer
from rich.table import Column, Table

from bench.generator import HOUR_US, TENANT
from bench.processes import Contestant, ContestantFailed, Progress
from bench.product import AwaitedDeltas, own_topics, worker
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
from services.wire.kafka import producer_config
from services.wire.settings import load_settings
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import item_id_hash, record_key
from upcasters.chain import upcasters

KEY = "late_events"
EVENTS = 10_000
ITEMS_MAX = 1_000
HOURS = 20
ROUNDS = 5
PARTITIONS = 4
METER = "api_requests"
THOUSANDTH = 1_000_000
POLL_SECONDS = 0.005
#: What the chunks in this process pretend to be of.
PARTITION = Partition(USAGE_CURRENT, 0)

Connection = psycopg.Connection[Any]
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
    place: tuple[bytes, int]  # item id, and start of its hour in microseconds


class Source:
    """Seeded events, and what they come to. Each round has hours of its own."""

    def __init__(self, seed: int, events: int, rounds: int) -> None:
        self._chance = random.Random(seed)
        self._encoder = Encoder(current("usage_event"))
        self._now_us = time.time_ns() // 1000
        self._start_us = self._now_us - self._now_us % HOUR_US - rounds * (HOURS + 1) * HOUR_US
        self._number = 0
        self._events = events
        self.items = min(events, max(ITEMS_MAX, -(-events // HOURS)))
        self.truth: Truth = defaultdict(lambda: [0, 0])

    def _event(self, item: int, hour: int, *, late: bool) -> Record:
        customer = f"cus_{item:06d}"
        quantity = self._chance.randrange(1, 1_000) * THOUSANDTH
        hour_us = self._start_us + hour * HOUR_US
        value = self._encoder.encode(
            {
                "idempotency_key": f"evt-{self._number:010d}",
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
        place = item_id_hash(TENANT, customer, METER), hour_us
        record = Record(self._number, self._now_us // 1000, key, value, self._encoder.headers, place)
        self._number += 1
        return record

    def on_time(self, round_: int) -> list[Record]:
        """One event of every item in every hour, in order; the last moves the watermark past the rest."""
        hours = range(round_ * (HOURS + 1), (round_ + 1) * (HOURS + 1))
        return [self._event(item, hour, late=False) for hour in hours for item in range(self.items)]

    def late(self, round_: int) -> list[Record]:
        """The late events, spread over the items alike, each in another closed hour of it, in no order."""
        hours = [self._chance.sample(range(HOURS), HOURS) for _ in range(self.items)]
        places = [
            (number % self.items, hours[number % self.items][number // self.items])
            for number in range(self._events)
        ]
        self._chance.shuffle(places)
        return [self._event(item, round_ * (HOURS + 1) + hour, late=True) for item, hour in places]


@dataclass(frozen=True, slots=True)
class Round:
    """One round on the real thing, in seconds."""

    seconds: float
    from_first_record_seconds: float
    produce_seconds: float
    worker_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Component:
    """One round in this process, in seconds."""

    count_seconds: float
    close_seconds: float
    count_cpu_seconds: float
    close_cpu_seconds: float


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    rounds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Count, settle, then time the late events, in rounds; on the real thing, then in this process.

    Raises:
        ContestantFailed: the worker ended, or stood still.
    """
    events = EVENTS if events is None else events
    rounds = ROUNDS if rounds is None else rounds
    whole = Source(seed, events, rounds)
    real, is_exact = _on_the_real_thing(servers, whole, rounds, random.Random(seed), say)
    parts, parts_are_exact = _in_this_process(servers, Source(seed, events, rounds), rounds, say)
    seconds = [one.seconds for one in real]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3),
        "seconds_max": round(max(seconds), 3),
        "from_first_record_seconds": round(
            statistics.median(one.from_first_record_seconds for one in real), 3
        ),
        "worker_cpu_seconds": round(statistics.median(one.worker_cpu_seconds for one in real), 3),
        **{
            name: round(statistics.median(getattr(one, name) for one in parts), 3)
            for name in ("count_seconds", "close_seconds", "count_cpu_seconds", "close_cpu_seconds")
        },
        "items": whole.items,
        "events": events,
        "deltas": events,
        "checked": is_exact and parts_are_exact,
        "rounds": rounds,
        "runs": [
            {name: round(value, 3) for name, value in {**asdict(one), **asdict(part)}.items()}
            for one, part in zip(real, parts, strict=True)
        ],
        "embedded": not servers.given,
        "versions": versions(),
        "cpu": os.cpu_count(),
    }


# -- On the real thing -----------------------------------------------------------------------------------


def _on_the_real_thing(
    servers: Servers, source: Source, rounds: int, chance: random.Random, say: Callable[[str], None]
) -> tuple[list[Round], bool]:
    done: list[Round] = []
    with (
        own_topics(servers, partitions=PARTITIONS) as topic,
        _database(servers) as dsn,
        psycopg.connect(dsn, autocommit=True) as db,
        worker(servers, topic, PARTITIONS, dsn) as counters,
    ):
        producer = Producer(producer_config(servers.bootstrap))
        for number in range(rounds):
            say(f"round {number + 1}: counting and settling {HOURS} hours of {source.items:,} items")
            records = source.on_time(number)
            _send(producer, topic, records)
            AwaitedDeltas(db, [record.place for record in records], sequence=1).wait(counters, poll_s=0.1)
            _await_relayed(counters, db)
            _settle(db)
            late = source.late(number)
            deltas = AwaitedDeltas(db, [record.place for record in late], sequence=2)
            time.sleep(chance.uniform(0, load_settings().delta_interval_seconds))
            began_s, spent_s = time.monotonic(), _processor_time(counters)
            acknowledged_s = _send(producer, topic, late)
            ended_s = deltas.wait(counters, poll_s=POLL_SECONDS)
            one = Round(
                ended_s - acknowledged_s,
                ended_s - began_s,
                acknowledged_s - began_s,
                _processor_time(counters) - spent_s,
            )
            done.append(one)
            say(f"round {number + 1}: {len(late):,} late events, {one.seconds:.3f} s")
        return done, _is_exact(db, source.truth)


def _send(producer: Producer, topic: str, records: Sequence[Record]) -> float:
    """Produce ``records`` as fast as can be; when the last acknowledgement came, by ``time.monotonic()``."""
    acknowledged_s = 0.0
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: object) -> None:
        nonlocal acknowledged_s
        acknowledged_s = time.monotonic()
        if error is not None:
            failures.append(error)

    for number, record in enumerate(records):
        while True:
            try:
                producer.produce(
                    topic,
                    key=record.key,
                    value=record.value,
                    headers=list(record.headers),
                    on_delivery=delivered,
                )
                break
            except BufferError:
                producer.poll(0.1)
        if number % 500 == 0:
            producer.poll(0)
    if producer.flush(60) or failures:
        raise ContestantFailed(f"{topic} cannot be written to")
    return acknowledged_s


def _processor_time(counters: Contestant) -> float:
    times = psutil.Process(counters.pid).cpu_times()
    return float(times.user + times.system)


def _await_relayed(counters: Contestant, db: Connection) -> None:
    """Until the worker has sent what it closed to Kafka, and has nothing left to do."""
    progress = Progress(counters, 0, "outbox rows")
    while db.execute("SELECT FROM outbox LIMIT 1").fetchone() is not None:
        progress.at(0)
        time.sleep(0.05)


# -- In this process -------------------------------------------------------------------------------------


def _in_this_process(
    servers: Servers, source: Source, rounds: int, say: Callable[[str], None]
) -> tuple[list[Component], bool]:
    done: list[Component] = []
    with _database(servers) as dsn:
        database, configuration = Database(dsn, "bench"), Database(dsn, "configuration")
        try:
            db = database.connection()
            ensure_positions(db, GROUP, {PARTITION: 0})
            counters = Counters(
                Preparer(Decoder(), upcasters()), lambda: load_configuration(configuration.connection())
            )
            for number in range(rounds):
                _count(counters, db, source.on_time(number))
                _close(db)
                _settle(db)
                late = source.late(number)
                times = [(time.monotonic(), time.process_time())]
                _count(counters, db, late)
                times.append((time.monotonic(), time.process_time()))
                _close(db)
                times.append((time.monotonic(), time.process_time()))
                (began_s, began_cpu_s), (counted_s, counted_cpu_s), (closed_s, closed_cpu_s) = times
                one = Component(
                    counted_s - began_s,
                    closed_s - counted_s,
                    counted_cpu_s - began_cpu_s,
                    closed_cpu_s - counted_cpu_s,
                )
                done.append(one)
                say(
                    f"round {number + 1}, in this process: counted in {one.count_seconds:.3f} s, "
                    f"closed in {one.close_seconds:.3f} s"
                )
            return done, _is_exact(db, source.truth)
        finally:
            database.reset()
            configuration.reset()


@contextmanager
def _database(servers: Servers) -> Iterator[str]:
    with fresh_database(servers.dsn) as dsn:
        _configure_meter(dsn)
        yield dsn


def _configure_meter(dsn: str) -> None:
    with psycopg.connect(dsn) as db:
        db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (TENANT,))
        db.execute(
            "INSERT INTO meters (tenant_id, meter, aggregation, scale, event_name) "
            "VALUES (%s, %s, 'sum', 3, %s)",
            (TENANT, METER, METER),
        )


def _count(counters: Counters, db: Connection, records: list[Record]) -> None:
    """Hand the records over as the worker does: in chunks of its size, one transaction each."""
    size = load_settings().chunk_records_max
    for at in range(0, len(records), size):
        counters.apply(db, counters.prepare(Chunk(PARTITION, records[at : at + size])))


def _close(db: Connection) -> None:
    """Close until nothing is dirty."""
    while close_round(db)[0]:
        pass


def _settle(db: Connection) -> None:
    """What the pusher leaves when Stripe has taken every delta: the next ones may be closed.

    Statistics are brought up to date, as they are in a database that has run for twenty hours.
    """
    db.execute("UPDATE buckets SET open = false WHERE open")
    db.execute("DELETE FROM outbox")
    db.execute("VACUUM (ANALYZE) items, buckets, item_periods, deltas, outbox, seen_current")


def _is_exact(db: Connection, truth: Truth) -> bool:
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
    table = Table(
        "late events",
        "items",
        "seconds",
        "least to most",
        "from the first",
        "count + close alone",
        Column("sums", no_wrap=True),
        title=f"Late events, from the last acknowledgement to the last delta; median of {result['rounds']}",
    )
    table.add_row(
        f"{result['events']:,}",
        f"{result['items']:,}",
        f"{result['seconds']:.2f}",
        f"{result['seconds_min']:.2f} to {result['seconds_max']:.2f}",
        f"{result['from_first_record_seconds']:.2f}",
        f"{result['count_seconds']:.2f} + {result['close_seconds']:.2f}",
        "exact" if result["checked"] else "NOT EXACT",
    )
    return table
