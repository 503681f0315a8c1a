"""Growth: what an event costs, and how much memory a worker takes, when there is more and more of everything.

A database is filled with 10 thousand items, each with an hour that was counted, closed and settled; one with
100 thousand, one with a million, and one with the fewest items and ten million idempotency keys. In each, a
counters worker (the real process on a real topic, its timer included, with every setting as it is by default
or in the environment) counts the same number of events, in rounds, each time as a new process.

The work is the same in all of them, whatever there is: one partition; as many items as the smallest size has,
spread over all that there are and others in each round; no item twice in a chunk; an hour of its own, and so
a delta, for each event. Nothing gets cheaper by adding up: real streams cost less.

Of each size, medians over the rounds, for each event, from the first one in the worker's hand:

* ``count_microseconds`` until all are counted, the timer closing meanwhile;
* ``microseconds`` until all deltas are written, too;
* ``processor_microseconds``: processor time until then, which other work on the machine hardly stretches;
  of it, ``worker_microseconds`` of the worker and ``postgres_microseconds`` of PostgreSQL for it (null, and
  the sum as well, when that runs elsewhere);
* ``resident_megabytes``, the worker's maximum.

``ratios`` compare them with the smallest size; a size is flat when no ratio of the four is above 1.2.

``checked`` compares every bucket and its delta with what was produced.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import psutil
import psycopg
from confluent_kafka import Producer
from rich.table import Column, Table

from bench.generator import HOUR_US, TENANT
from bench.processes import Progress
from bench.product import AwaitedDeltas, own_topics, worker
from bench.results import versions
from bench.servers import Servers, fresh_database
from schemas.catalog import current
from services.wire.codec import Encoder
from services.wire.errors import Misconfigured
from services.wire.kafka import producer_config
from services.wire.usage import QUANTITY_UNIT, item_id_hash, record_key

KEY = "growth"
EVENTS = 50_000
ITEMS = (10_000, 100_000, 1_000_000)
SEEN = 10_000_000
ROUNDS = 3
METER = "api_requests"
FLAT_WITHIN = 0.2
POLL_SECONDS = 0.02
#: Keys are stored as the worker stores them: sorted inside of blocks of this size.
BLOCK = 5_000
#: Stripe takes no older hours; see services/counters/windows.py.
HOURS_MAX = 30 * 24
#: Judged: these must stay flat. The other two say where processor time goes.
JUDGED = ("count_microseconds", "microseconds", "processor_microseconds", "resident_megabytes")
FIGURES = (*JUDGED, "worker_microseconds", "postgres_microseconds")

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is there before anything is counted."""

    items: int
    seen: int

    def __str__(self) -> str:
        return f"{self.items:,} items" + (f", {self.seen:,} keys" if self.seen else "")


@dataclass(frozen=True, slots=True)
class Stream:
    """Events of one size. A round takes ``active`` of its ``items``, spread over all of them, and goes round
    among these, an hour later each time; the next round takes others, as far as there are."""

    items: int
    active: int
    hours: int  # that a round takes
    start_us: int

    def place(self, round_: int, number: int) -> tuple[int, int, int]:
        """Item, start of the hour, and quantity in whole units."""
        turn, position = divmod(number, self.active)
        item = (round_ * self.active + position) * _stride(self.items) % self.items
        return item, self.start_us + (round_ * self.hours + turn) * HOUR_US, 1 + number % 7


@cache
def _stride(items: int) -> int:
    """Without a divisor in common with ``items``, so that every item has its turn; about 0.618 of them."""
    stride = max(1, int(items * 0.618))
    while math.gcd(stride, items) != 1:
        stride += 1
    return stride


def _customer(item: int) -> str:
    return f"cus_{item:07d}"


@dataclass(slots=True)
class Ground:
    """A filled database, and what was measured on it."""

    size: Size
    dsn: str
    stream: Stream
    bytes_each: dict[str, dict[str, float]]
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    rounds: int | None = None,
    items: Sequence[int] | None = None,
    seen: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Fill a database for each of ``items``, and one with ``seen`` keys, and measure in each.

    Raises:
        Misconfigured: so few items, or so many events, that their hours would be too old to count.
        ContestantFailed: the worker ended, or stood still.
    """
    events = EVENTS if events is None else events
    rounds = ROUNDS if rounds is None else rounds
    seen = SEEN if seen is None else seen
    ordered = sorted(set(items or ITEMS))
    hours = -(-events // ordered[0])
    if hours * rounds > HOURS_MAX:
        raise Misconfigured(f"{events * rounds:,} events over {ordered[0]:,} items take too many hours")
    sizes = [Size(number, 0) for number in ordered] + ([Size(ordered[0], seen)] if seen else [])
    now_us = time.time_ns() // 1000
    start_us = now_us - now_us % HOUR_US - hours * rounds * HOUR_US
    grounds: list[Ground] = []
    checked = True
    for size in sizes:
        say(f"filling a database with {size}")
        with fresh_database(servers.dsn) as dsn:
            _fill(dsn, size, start_us - HOUR_US)
            stream = Stream(size.items, ordered[0], hours, start_us)
            ground = Ground(size, dsn, stream, _bytes_each(dsn))
            grounds.append(ground)
            for round_ in range(rounds):
                _measure(servers, ground, round_, events, seed)
                say(f"round {round_ + 1}, {size}: {_figures(ground, -1)}")
            checked = _is_exact(ground, events, rounds) and checked
    return summary(grounds, events=events, rounds=rounds, checked=checked, embedded=not servers.given)


def _figures(ground: Ground, number: int) -> str:
    return ", ".join(f"{name} {values[number]:.1f}" for name, values in ground.figures.items() if values)


# -- What is there before --------------------------------------------------------------------------------


def _fill(dsn: str, size: Size, hour_us: int) -> None:
    """``size``, each item with one settled hour; then statistics, as in a database that has run for long.

    After a checkpoint, the first change of each page costs many times the next ones. Between two checkpoints
    a busy database changes a page often, so the checkpoint is now: what is filled in changes every page.
    """
    with psycopg.connect(dsn, autocommit=True, options="-c timezone=UTC") as db:
        with suppress(psycopg.errors.InsufficientPrivilege):
            db.execute("CHECKPOINT")
        db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (TENANT,))
        db.execute(
            "INSERT INTO meters (tenant_id, meter, aggregation, scale, event_name) "
            "VALUES (%s, %s, 'sum', 3, %s)",
            (TENANT, METER, METER),
        )
        db.execute("CREATE TEMP TABLE new (item_id uuid, customer_ref text)")
        with db.cursor().copy("COPY new FROM STDIN") as copy:
            for lines in _item_lines(size.items):
                copy.write(lines)
        hour = {"hour": hour_us / 1_000_000, "tenant": TENANT, "meter": METER}
        db.execute(
            "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, calendar) "
            "SELECT item_id, %(tenant)s, customer_ref, %(meter)s, to_timestamp(%(hour)s), "
            "'1 month ' || timezone FROM new, tenants",
            hour,
        )
        db.execute(
            "INSERT INTO buckets (item_id, hour_start, period_start, total, events, late_events, closed, "
            "pushed, sequence, first_arrival, last_arrival, first_event, last_event) "
            "SELECT item_id, h, date_trunc('month', h), 1, 1, 0, 1, 1, 1, h, h, h, h "
            "FROM items, to_timestamp(%(hour)s) AS h",
            hour,
        )
        db.execute(
            "INSERT INTO item_periods (item_id, period_start, period_end) "
            "SELECT item_id, period_start, period_start + interval '1 month' FROM buckets"
        )
        db.execute(
            "INSERT INTO deltas (identifier, item_id, period_start, hour_start, sequence, amount) "
            "SELECT md5(item_id::text), item_id, period_start, hour_start, 1, 1 FROM buckets"
        )
        with db.cursor().copy(
            'COPY seen_current (event_id, digest, source, partition, "offset") FROM STDIN'
        ) as copy:
            for lines in _seen_lines(size.seen):
                copy.write(lines)
        db.execute("VACUUM (ANALYZE) items, buckets, item_periods, deltas, seen_current")


def _item_lines(items: int) -> Iterator[str]:
    for start in range(0, items, BLOCK):
        yield "".join(
            f"{item_id_hash(TENANT, _customer(item), METER).hex()}\t{_customer(item)}\n"
            for item in range(start, min(start + BLOCK, items))
        )


def _seen_lines(seen: int) -> Iterator[str]:
    for start in range(0, seen, BLOCK):
        number = min(BLOCK, seen - start)
        ids = sorted(os.urandom(16).hex() for _ in range(number))
        yield "".join(
            f"{event_id}\t-1234567890123456789\t3\t0\t{start + offset}\n"
            for offset, event_id in enumerate(ids)
        )


def _bytes_each(dsn: str) -> dict[str, dict[str, float]]:
    """Bytes of table and indexes for each row of the tables that grow."""
    found: dict[str, dict[str, float]] = {}
    with psycopg.connect(dsn) as db:
        for name, table in (("item", "items"), ("bucket", "buckets"), ("seen_id", "seen_current")):
            row = db.execute(
                f"SELECT count(*), pg_table_size('{table}'), pg_indexes_size('{table}') FROM {table}"  # noqa: S608
            ).fetchone()
            assert row is not None
            if row[0]:
                found[name] = {"table": round(row[1] / row[0], 1), "index": round(row[2] / row[0], 1)}
    return found


# -- One run ---------------------------------------------------------------------------------------------


def _measure(servers: Servers, ground: Ground, round_: int, events: int, seed: int) -> None:
    """Let a new worker count ``events`` more, and note the figures."""
    with ExitStack() as stack:
        topic = stack.enter_context(own_topics(servers, partitions=1))
        _produce(servers.bootstrap, topic, ground.stream, round_, events, seed)
        db = stack.enter_context(psycopg.connect(ground.dsn, autocommit=True))
        places = (ground.stream.place(round_, number) for number in range(events))
        deltas = AwaitedDeltas(
            db,
            ((item_id_hash(TENANT, _customer(item), METER), hour_us) for item, hour_us, _ in places),
            sequence=1,
        )
        counters = stack.enter_context(worker(servers, topic, 1, ground.dsn))
        began_s = counters.await_first()
        usage = _Usage(db, counters.pid)
        counted_s = 0.0
        progress = Progress(counters, 2 * events, "events and deltas")
        while True:
            asked_s = time.monotonic()
            counted = _counted(db, topic)
            if not counted_s and counted >= events:
                counted_s = asked_s
            found = deltas.found()
            if counted_s and found == events:
                break
            progress.at(counted + found)
            usage.sample()
            time.sleep(POLL_SECONDS)
        figures = ground.figures
        figures["count_microseconds"].append((counted_s - began_s) / events * 1e6)
        figures["microseconds"].append((asked_s - began_s) / events * 1e6)
        figures["resident_megabytes"].append(usage.resident_max / 1e6)
        worker_s, postgres_s = usage.worker_seconds(), usage.postgres_seconds()
        figures["worker_microseconds"].append(worker_s / events * 1e6)
        if postgres_s is not None:
            figures["postgres_microseconds"].append(postgres_s / events * 1e6)
            figures["processor_microseconds"].append((worker_s + postgres_s) / events * 1e6)


def _produce(bootstrap: str, topic: str, stream: Stream, round_: int, events: int, seed: int) -> None:
    encoder = Encoder(current("usage_event"))
    headers: list[tuple[str, str | bytes | None]] = list(encoder.headers)
    producer = Producer(producer_config(bootstrap, **{"linger.ms": 50}))
    for number in range(events):
        item, hour_us, quantity = stream.place(round_, number)
        customer = _customer(item)
        value = encoder.encode(
            {
                "idempotency_key": f"evt-{seed}-{round_}-{number:010d}",
                "tenant_id": TENANT,
                "customer_ref": customer,
                "meter": METER,
                "quantity": (quantity * QUANTITY_UNIT).to_bytes(16, "big", signed=True),
                "occurred_at": hour_us + number % HOUR_US,
                "properties": {"region": "eu-west"} if number % 4 == 0 else {},
                "source": "bench",
            }
        )
        while True:
            try:
                producer.produce(topic, key=record_key(TENANT, customer, METER), value=value, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def _counted(db: Connection, topic: str) -> int:
    row = db.execute("SELECT next_offset FROM partition_offsets WHERE topic = %s", (topic,)).fetchone()
    return row[0] if row else 0


class _Usage:
    """What a worker uses from now on: memory and processor time, and PostgreSQL's processor time for it."""

    def __init__(self, db: Connection, pid: int) -> None:
        self._db = db
        self._worker = psutil.Process(pid)
        self._worker_s = _seconds_of(self._worker)
        self._backends_s = self._backends()
        self.resident_max = 0

    def sample(self) -> None:
        self.resident_max = max(self.resident_max, self._worker.memory_info().rss)

    def worker_seconds(self) -> float:
        return _seconds_of(self._worker) - self._worker_s

    def postgres_seconds(self) -> float | None:
        """Of the worker's connections; None when PostgreSQL's processes cannot be seen from here."""
        now_s = self._backends()
        if now_s is None or self._backends_s is None:
            return None
        return sum(seconds - self._backends_s.get(pid, 0.0) for pid, seconds in now_s.items())

    def _backends(self) -> dict[int, float] | None:
        rows = self._db.execute(
            "SELECT pid, datname FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
        found: dict[int, float] = {}
        for pid, database in rows:
            try:
                process = psutil.Process(pid)
                if database not in " ".join(process.cmdline()):
                    return None  # another machine's, or another container's
                found[pid] = _seconds_of(process)
            except psutil.NoSuchProcess:
                return None
        return found


def _seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _is_exact(ground: Ground, events: int, rounds: int) -> bool:
    """Is every bucket, and its delta, what the events come to, and nothing else there?"""
    expected: dict[tuple[str, int], int] = {}
    for round_ in range(rounds):
        for number in range(events):
            item, hour_us, quantity = ground.stream.place(round_, number)
            expected[_customer(item), hour_us] = quantity
    with psycopg.connect(ground.dsn) as db:
        rows = db.execute(
            "SELECT customer_ref, (extract(epoch FROM hour_start) * 1000000)::bigint, total, sum(amount) "
            "FROM buckets JOIN items USING (item_id) "
            "LEFT JOIN deltas USING (item_id, hour_start, period_start) "
            "WHERE hour_start >= to_timestamp(%s) GROUP BY item_id, 1, 2, 3",
            (ground.stream.start_us / 1_000_000,),
        ).fetchall()
    found = {(customer, hour): (total, pushed) for customer, hour, total, pushed in rows}
    return found == {place: (quantity, quantity) for place, quantity in expected.items()}


# -- The result ------------------------------------------------------------------------------------------


def summary(
    grounds: Sequence[Ground], *, events: int, rounds: int, checked: bool, embedded: bool
) -> dict[str, Any]:
    """Medians, their ratios to the smallest size, and whether they stay flat."""
    sizes: list[dict[str, Any]] = []
    smallest: dict[str, float] = {}
    for ground in grounds:
        medians = {
            name: statistics.median(values) if len(values) == rounds else None
            for name, values in ground.figures.items()
        }
        smallest = smallest or {name: value for name, value in medians.items() if value is not None}
        ratios = {
            name: round(value / smallest[name], 2)
            for name, value in medians.items()
            if value is not None and name in smallest
        }
        sizes.append(
            {
                "items": ground.size.items,
                "seen_before": ground.size.seen,
                **{name: None if value is None else round(value, 1) for name, value in medians.items()},
                "ratios": ratios,
                "flat": all(ratios.get(name, 0) <= 1 + FLAT_WITHIN for name in JUDGED),
                "rounds": {
                    name: [round(value, 1) for value in values] for name, values in ground.figures.items()
                },
            }
        )
    most = max(grounds, key=lambda ground: ground.size.items)
    remembered = max(grounds, key=lambda ground: ground.size.seen)
    return {
        "flat": all(size["flat"] for size in sizes),
        "flat_within": FLAT_WITHIN,
        "sizes": sizes,
        "bytes_each": {
            **most.bytes_each,
            **({"seen_id": s} if (s := remembered.bytes_each.get("seen_id")) else {}),
        },
        "events": events,
        "rounds": rounds,
        "checked": checked,
        "embedded": embedded,
        "versions": versions(),
        "cpu": os.cpu_count(),
    }


LABELS = {
    "count_microseconds": "µs until counted",
    "microseconds": "µs until deltas written",
    "processor_microseconds": "µs of processors",
    "resident_megabytes": "MB resident",
    "worker_microseconds": "  µs of the worker",
    "postgres_microseconds": "  µs of PostgreSQL",
}


def render(result: dict[str, Any]) -> Table:
    """The result for people."""
    sizes = result["sizes"]
    bytes_each = ", ".join(
        f"{name.replace('_', ' ')} {each['table']:.0f} + {each['index']:.0f}"
        for name, each in result["bytes_each"].items()
    )
    table = Table(
        "for each event",
        *(Column(f"{size['items']:,} items", justify="right") for size in sizes),
        title=f"Growth, median of {result['rounds']}, and ratio to the smallest",
        caption=f"Bytes of table and index: {bytes_each}.",
    )
    table.add_row("keys seen before", *(f"{size['seen_before']:,}" for size in sizes))
    for name in FIGURES:
        figures = (
            "–" if size[name] is None else f"{size[name]:,.0f}  ×{size['ratios'][name]:.2f}" for size in sizes
        )
        table.add_row(LABELS[name], *figures)
    table.add_row(
        f"flat within {result['flat_within']:.0%}", *("yes" if size["flat"] else "NO" for size in sizes)
    )
    return table
