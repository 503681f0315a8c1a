"""Replay: how fast a window is recomputed from the log, and how soon what was lost is repaired.

A counters worker (the real process) counts the events, skewed over 500 customers and three meters, with 2 %
duplicates. Then one process takes turns, in each round:

* ``bare_events_per_second``: a confluent-kafka consumer reads the topic from its beginning to its end and
  decodes each record with the product's decoder. It does nothing else;
* ``replay_events_per_second``: a dry run over everything, from the request to the plan: positions, ranges,
  reading, decoding, rules, adding up, comparing with every counter.

``ratio`` is the second through the first, each the median over the rounds. ``resident_megabytes`` is the
process's memory after the first tenth of the first dry run and at the end of it: flat, if they are alike.

Repair: 10,000 late events, ten for each of a thousand items, each in an hour of its own, are in the log, and
the counters went past them as if there were none. ``found_and_corrected_seconds`` runs from the request of
an apply until its commit, in a process that is ready; ``deltas_written_seconds`` until the live worker, its
timer included, has written every delta of it.

``checked``: the dry runs find nothing to change and the sums are those that were produced; the repair changes
exactly the hours that were lost.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from rich.table import Column, Table

from bench.generator import HOUR_US, METERS, TENANT, produce, start_of_day_before
from bench.processes import Contestant, ContestantFailed, Progress
from bench.product import own_topics, worker
from bench.results import versions
from bench.rivals import Job
from bench.servers import Servers, fresh_database
from schemas.catalog import current
from services.counters.decisions import BLOCK_RECORDS
from services.streaming.chunks import Partition
from services.streaming.lag import log_ends
from services.wire.codec import Encoder
from services.wire.kafka import producer_config
from services.wire.times import instant
from services.wire.usage import QUANTITY_UNIT, record_key

KEY = "replay"
EVENTS = 1_000_000
ROUNDS = 3
PARTITIONS = 4
LATE, LATE_ITEMS = 10_000, 1_000

Connection = psycopg.Connection[Any]


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    rounds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Count, then measure.

    Raises:
        ContestantFailed: a process ended, or stood still.
    """
    events, rounds = events or EVENTS, rounds or ROUNDS
    with own_topics(servers, partitions=PARTITIONS) as usage, fresh_database(servers.dsn) as dsn:
        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (TENANT,))
            for meter in METERS:
                db.execute(
                    "INSERT INTO meters (tenant_id, meter, aggregation, event_name, allow_negative) "
                    "VALUES (%s, %s, 'sum', %s, true)",
                    (TENANT, meter, meter),
                )
            say(f"replay: producing and counting {events:,} events")
            load = produce(servers.bootstrap, usage, events=events, seed=seed)
            with worker(servers, usage, PARTITIONS, dsn) as contestant:
                _await_counted(db, contestant, events)
                _await_closed(db, contestant)
            job = Job(servers.bootstrap, usage, PARTITIONS, f"{usage}-counters", "", dsn)
            say("replay: dry runs beside a bare consumer")
            with _replayer(job, "scan", str(rounds)) as process:
                measured = _answer(process)
            exact = measured["changed"] == 0 and _sums_are(measured["totals"], load.sums)
            say(f"replay: repairing {LATE:,} hours beside the live worker")
            since = _lose(db, servers, usage, seed)
            with worker(servers, usage, PARTITIONS, dsn) as contestant:
                repaired = _repair(db, contestant, job, since)
        return {
            **versions(),
            "events": events,
            "rounds": rounds,
            "partitions": PARTITIONS,
            "bare_events_per_second": round(statistics.median(measured["bare"])),
            "replay_events_per_second": round(statistics.median(measured["replay"])),
            "ratio": round(statistics.median(measured["replay"]) / statistics.median(measured["bare"]), 2),
            "resident_megabytes": measured["resident_megabytes"],
            **repaired,
            "checked": exact and repaired["corrected_hours"] == LATE,
        }


def render(result: dict[str, Any]) -> Table:
    """The result as a table."""
    table = Table(Column("figure"), Column("value", justify="right"), box=None)
    for name, value in result.items():
        table.add_row(name, str(value))
    return table


def _await_counted(db: Connection, contestant: Contestant, events: int) -> None:
    progress = Progress(contestant, events, "events")
    while True:
        row = db.execute(
            "SELECT coalesce(sum(next_offset - start_offset), 0) FROM partition_offsets"
        ).fetchone()
        counted = int(row[0]) if row else 0
        if counted >= events:
            return
        progress.at(counted)
        time.sleep(0.2)


def _await_closed(db: Connection, contestant: Contestant) -> None:
    """Until nothing is left to close; the benchmark plays the pusher."""
    progress = Progress(contestant, 1, "rounds of closing")
    while True:
        db.execute(
            "INSERT INTO meter_events (identifier, item_id, tenant_id, meter, period_start, period_end, "
            "hour_start, event_name, stripe_customer, customer_payload_key, value_payload_key, amount, "
            "event_at, state, attempts, first_sent_at, settled_at) "
            "SELECT d.identifier, d.item_id, i.tenant_id, i.meter, d.period_start, d.period_start, "
            "d.hour_start, i.meter, i.customer_ref, '', '', d.amount, d.hour_start, 'reported', 1, now(), "
            "now() "
            "FROM deltas d JOIN items i USING (item_id) WHERE NOT EXISTS "
            "(SELECT FROM meter_events e WHERE e.identifier = d.identifier)"
        )
        db.execute(
            "UPDATE buckets b SET open = false WHERE open AND NOT EXISTS (SELECT FROM deltas d "
            "LEFT JOIN meter_events e USING (identifier) WHERE (d.item_id, d.hour_start) = "
            "(b.item_id, b.hour_start) AND e.identifier IS NULL)"
        )
        row = db.execute(
            "SELECT (SELECT count(*) FROM items WHERE dirty_from IS NOT NULL) "
            "+ (SELECT count(*) FROM buckets WHERE open)"
        ).fetchone()
        if row == (0,):
            return
        progress.at(0)
        time.sleep(0.5)


@contextmanager
def _replayer(job: Job, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.replayer", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(job.line())
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ContestantFailed(f"the replaying process ended with {process.wait(10)}")
    return dict(json.loads(line))


def _sums_are(totals: dict[str, str], sums: dict[tuple[str, str, int], int]) -> bool:
    wanted: dict[str, int] = {}
    for (_, meter, _), amount in sums.items():
        wanted[meter] = wanted.get(meter, 0) + amount
    return {meter: int(Decimal(text) * QUANTITY_UNIT) for meter, text in totals.items()} == wanted


def _lose(db: Connection, servers: Servers, usage: str, seed: int) -> datetime:
    """Produce late events, each in an hour of its own, and let the counters go past them as if there were
    none; the hour they begin at."""
    chance = random.Random(seed)
    encoder = Encoder(current("usage_event"))
    start_us = start_of_day_before(time.time_ns() // 1000) - 48 * HOUR_US
    producer = Producer(producer_config(servers.bootstrap))
    for number in range(LATE):
        customer = f"cus_late_{number % LATE_ITEMS:04d}"
        hour_us = start_us + number // LATE_ITEMS * HOUR_US
        value = encoder.encode(
            {
                "idempotency_key": f"late-{number}",
                "tenant_id": TENANT,
                "customer_ref": customer,
                "meter": METERS[0],
                "quantity": (1_000_000_000).to_bytes(16, "big", signed=True),
                "occurred_at": hour_us + chance.randrange(HOUR_US),
                "properties": {},
                "source": "bench",
            }
        )
        headers: list[tuple[str, str | bytes | None]] = list(encoder.headers)
        producer.produce(usage, key=record_key(TENANT, customer, METERS[0]), value=value, headers=headers)
    producer.flush()
    admin = AdminClient({"bootstrap.servers": servers.bootstrap})
    ends = log_ends(admin, [Partition(usage, number) for number in range(PARTITIONS)])
    for tp, end in ends.items():
        row = db.execute(
            "UPDATE partition_offsets p SET next_offset = %s, decided_to = %s FROM partition_offsets o "
            "WHERE (p.topic, p.partition) = (%s, %s) "
            "AND (o.consumer, o.topic, o.partition) = (p.consumer, p.topic, p.partition) "
            "RETURNING o.next_offset",
            (end, end, *tp),
        ).fetchone()
        assert row is not None
        for block in range(row[0] // BLOCK_RECORDS, (end - 1) // BLOCK_RECORDS + 1):
            db.execute(
                "INSERT INTO log_blocks AS b VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT (topic, partition, block) "
                "DO UPDATE SET first_event = least(b.first_event, excluded.first_event)",
                (*tp, block, instant(start_us), instant(start_us + LATE // LATE_ITEMS * HOUR_US)),
            )
    return instant(start_us)


def _await_assigned(db: Connection, contestant: Contestant) -> None:
    """Until the worker's timer runs: it closes an item that is marked by hand."""
    db.execute(
        "UPDATE items SET dirty_from = now() WHERE item_id = (SELECT min(item_id::text)::uuid FROM items)"
    )
    progress = Progress(contestant, 1, "rounds of closing")
    while db.execute("SELECT count(*) FROM items WHERE dirty_from IS NOT NULL").fetchone() != (0,):
        progress.at(0)
        time.sleep(0.1)


def _repair(db: Connection, contestant: Contestant, job: Job, since: datetime) -> dict[str, Any]:
    """Find, recompute and correct them; then wait for their deltas."""
    _await_assigned(db, contestant)
    until = since + timedelta(hours=LATE // LATE_ITEMS)
    with _replayer(job, "repair", since.isoformat(), until.isoformat()) as process:
        _answer(process)
        assert process.stdin is not None
        began = time.monotonic()
        process.stdin.write("go\n")
        process.stdin.flush()
        done = _answer(process)
        corrected_s = time.monotonic() - began
        progress = Progress(contestant, LATE, "deltas")
        while True:
            row = db.execute(
                "SELECT count(*) FROM deltas JOIN items USING (item_id) WHERE customer_ref LIKE 'cus\\_late%'"
            ).fetchone()
            if row == (LATE,):
                break
            progress.at(row[0] if row else 0)
            time.sleep(0.01)
    return {
        "late_events": LATE,
        "found_and_corrected_seconds": round(corrected_s, 2),
        "deltas_written_seconds": round(time.monotonic() - began, 2),
        "corrected_hours": done["changed"],
    }
