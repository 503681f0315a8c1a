"""One tenant's poison: how long another tenant's events wait for being counted, with and without it.

A tenant sends good events at a steady rate, while its neighbour sends twice as many of its own: none at all,
good ones, or ones that all end as dead letters (an unknown meter). Both share partitions and one counters
worker: the real process on a real Kafka and PostgreSQL, with every setting as it is by default.

``p50`` and ``p99`` are the seconds from the brokers' acknowledgement of one of the first tenant's events to
the moment when the position behind it is seen committed in PostgreSQL, over all of its events of one run,
asked every few milliseconds; medians over the rounds. ``worker_cpu_seconds`` is what the worker took of the
processor: where other work shares the machine, it still compares.

``checked``: every good event was counted and every poisonous one parked, once.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import psycopg
from confluent_kafka import Producer
from rich.table import Table

from bench.processes import Contestant, ContestantFailed, Progress
from bench.product import own_topics, worker
from bench.results import versions
from bench.servers import Servers, fresh_database
from schemas.catalog import current
from services.wire.codec import Encoder
from services.wire.kafka import producer_config
from services.wire.usage import record_key

KEY = "poison"
EVENTS = 10_000
RATE = 1_000.0
#: Events of the neighbour for each of the first tenant's.
TIMES = 2
ROUNDS = 3
PARTITIONS = 4
POLL_SECONDS = 0.005
NEIGHBOURS = ("none", "good", "poison")
METER = "api_requests"

Connection = psycopg.Connection[Any]


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    rounds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Each neighbour in turn, in rounds. ``events``: of the first tenant, in each run.

    Raises:
        ContestantFailed: the worker ended, or stood still.
    """
    events = EVENTS if events is None else events
    rounds = ROUNDS if rounds is None else rounds
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in NEIGHBOURS}
    with (
        own_topics(servers, partitions=PARTITIONS) as topic,
        _database(servers) as dsn,
        psycopg.connect(dsn, autocommit=True) as db,
        worker(servers, topic, PARTITIONS, dsn) as counters,
    ):
        for number in range(-1, rounds):  # the first is not counted: it joins, plans and compiles
            for name in NEIGHBOURS:
                figures = _one(servers, topic, db, counters, name, f"{seed}-{number}", events)
                if number < 0:
                    continue
                found[name].append(figures)
                say(f"round {number + 1}, neighbour {name}: p50 {figures[0]:.3f} s, p99 {figures[1]:.3f} s")
        checked = _is_exact(db, events, rounds + 1)
    medians = {
        name: {
            key: round(statistics.median(one[place] for one in runs), 4)
            for place, key in enumerate(("p50_seconds", "p99_seconds", "worker_cpu_seconds"))
        }
        for name, runs in found.items()
    }
    return {
        "neighbours": medians,
        "p99_ratio": round(medians["poison"]["p99_seconds"] / medians["good"]["p99_seconds"], 2),
        "events": events,
        "rate_per_second": RATE,
        "neighbour_rate_per_second": RATE * TIMES,
        "checked": checked,
        "rounds": rounds,
        "embedded": not servers.given,
        "versions": versions(),
        "cpu": os.cpu_count(),
    }


def render(result: dict[str, Any]) -> Table:
    """The result as a table."""
    table = Table(title="A tenant's wait for being counted, by what its neighbour sends")
    for name in ("neighbour", "p50", "p99", "worker's processor"):
        table.add_column(name)
    for name, one in result["neighbours"].items():
        table.add_row(
            name,
            f"{one['p50_seconds'] * 1000:.0f} ms",
            f"{one['p99_seconds'] * 1000:.0f} ms",
            f"{one['worker_cpu_seconds']:.2f} s",
        )
    return table


class _Waits:
    """Events of the first tenant that are acknowledged and not yet known to be counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, list[tuple[int, float]]] = {}
        self.done: list[float] = []
        self.acknowledged = 0

    def delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            raise ContestantFailed("the topic cannot be written to")
        with self._lock:
            place = (message.offset(), time.monotonic())
            self._waiting.setdefault(message.partition(), []).append(place)
            self.acknowledged += 1

    def passed(self, positions: dict[int, int], seen_s: float) -> None:
        with self._lock:
            for partition, places in self._waiting.items():
                next_offset = positions.get(partition, 0)
                self.done += [seen_s - at for offset, at in places if offset < next_offset]
                places[:] = [place for place in places if place[0] >= next_offset]


def _one(
    servers: Servers, topic: str, db: Connection, counters: Contestant, name: str, run_name: str, events: int
) -> tuple[float, float, float]:
    """p50, p99 and the worker's processor time of one run."""
    waits = _Waits()
    spent_s = _processor_time(counters)
    sender = threading.Thread(target=_send, args=(servers, topic, name, run_name, events, waits))
    sender.start()
    progress = Progress(counters, events, "events")
    while len(waits.done) < events:
        rows = db.execute(
            "SELECT partition, next_offset FROM partition_offsets WHERE topic = %s", (topic,)
        ).fetchall()
        waits.passed(dict(rows), time.monotonic())
        progress.at(len(waits.done))
        time.sleep(POLL_SECONDS)
    sender.join()
    while db.execute("SELECT 1 FROM outbox LIMIT 1").fetchone():
        time.sleep(0.02)
    waits.done.sort()
    return (
        waits.done[events // 2],
        waits.done[min(events - 1, events * 99 // 100)],
        _processor_time(counters) - spent_s,
    )


def _send(servers: Servers, topic: str, name: str, run_name: str, events: int, waits: _Waits) -> None:
    """Both tenants' events at their rates, whether or not anybody keeps up."""
    producer = Producer(producer_config(servers.bootstrap, **{"linger.ms": 0}))
    encoder = Encoder(current("usage_event"))
    headers: list[tuple[str, str | bytes | None]] = list(encoder.headers)
    now_us = time.time_ns() // 1000
    began_s = time.monotonic()

    def send(tenant: str, meter: str, number: int, on_delivery: Any) -> None:
        customer = f"cus_{number % 50}"
        value = encoder.encode(
            {
                "idempotency_key": f"{run_name}-{name}-{number}",
                "tenant_id": tenant,
                "customer_ref": customer,
                "meter": meter,
                "quantity": (10**9).to_bytes(16, "big", signed=True),
                "occurred_at": now_us,
                "properties": {},
                "source": "bench",
            }
        )
        key = record_key("bench", customer, METER)  # the two share their partitions
        producer.produce(topic, key=key, value=value, headers=headers, on_delivery=on_delivery)

    for number in range(events):
        send("victim", METER, number, waits.delivered)
        if name != "none":
            for more in range(TIMES):
                meter = METER if name == "good" else "nobody_declared_this"
                send("neighbour", meter, number * TIMES + more, None)
        producer.poll(0)
        ahead_s = began_s + number / RATE - time.monotonic()
        if ahead_s > 0:
            time.sleep(ahead_s)
    producer.flush(60)


def _processor_time(counters: Contestant) -> float:
    times = psutil.Process(counters.pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def _database(servers: Servers) -> Iterator[str]:
    with fresh_database(servers.dsn) as dsn:
        with psycopg.connect(dsn) as db:
            for tenant in ("victim", "neighbour"):
                db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (tenant,))
                db.execute(
                    "INSERT INTO meters (tenant_id, meter, aggregation, event_name) "
                    "VALUES (%s, %s, 'sum', %s)",
                    (tenant, METER, METER),
                )
        yield dsn


def _is_exact(db: Connection, events: int, runs: int) -> bool:
    rows = db.execute(
        "SELECT tenant_id, sum(counted + late_counted)::bigint, sum(dead_lettered)::bigint, "
        "sum(received)::bigint FROM partition_accounts GROUP BY 1"
    ).fetchall()
    parked = db.execute("SELECT count(*) FROM parked_records").fetchone()
    others = events * runs * TIMES
    return (
        sorted(rows) == [
            ("neighbour", others, others, 2 * others),
            ("victim", 3 * events * runs, 0, 3 * events * runs),
        ]
        and parked == (others,)
    )  # fmt: skip
