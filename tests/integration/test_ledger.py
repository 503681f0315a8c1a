"""The chunk transaction against a real PostgreSQL, without Kafka: each test hands chunks over itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from services.counters.closing import close_round
from services.counters.config import load_configuration
from services.counters.conservation import conservation, outcomes_by_meter
from services.counters.generations import rotate_generations
from services.counters.ledger import GROUP, Counters
from services.counters.prepare import Preparer
from services.streaming import offsets
from services.streaming.chunks import Partition
from services.streaming.outbox import unpack
from services.wire.codec import Decoder
from services.wire.errors import OffsetGap, Transient
from tests.records import ARRIVAL_US, DAY_US, HOUR_US, UNIT, chunk_of, encoded, v3
from upcasters.chain import upcasters

Database = psycopg.Connection[Any]


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Database]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO tenants (tenant_id) VALUES ('acme')")
        add_meter(connection, "requests")
        starts = {Partition(f"usage.v{version}", number): 0 for version in (1, 2, 3) for number in range(4)}
        offsets.ensure_positions(connection, GROUP, starts)
        yield connection


def add_meter(db: Database, meter: str, **columns: Any) -> None:
    names = {"tenant_id": "acme", "meter": meter, "aggregation": "sum", "event_name": meter, **columns}
    marks = ", ".join("%s" for _ in names)
    db.execute(f"INSERT INTO meters ({', '.join(names)}) VALUES ({marks})", tuple(names.values()))


def counters(db: Database) -> Counters:
    return Counters(Preparer(Decoder(), upcasters()), lambda: load_configuration(db))


def feed(db: Database, handler: Counters, *records: dict[str, Any], at: int = 0, partition: int = 0) -> None:
    chunk = chunk_of([encoded(record) for record in records], first_offset=at)
    moved = type(chunk)(Partition("usage.v3", partition), chunk.records)
    handler.apply(db, handler.prepare(moved))


def total(db: Database) -> Decimal:
    row = db.execute("SELECT coalesce(sum(total), 0) FROM buckets").fetchone()
    assert row is not None
    return Decimal(row[0])


def outcomes(db: Database) -> dict[str, int]:
    kept = conservation(db)
    assert kept.gap == 0
    return {name: number for name, number in kept.outcomes.items() if number}


def test_a_chunk_that_is_delivered_again_whole_or_in_part_changes_nothing(db: Database) -> None:
    handler = counters(db)
    records = [v3(idempotency_key=f"evt-{number}") for number in range(6)]
    feed(db, handler, *records[:4])
    feed(db, handler, *records[:4])
    feed(db, handler, *records[2:], at=2)
    assert total(db) == 30
    assert outcomes(db) == {"counted": 6}


def test_a_transaction_that_failed_late_and_is_repeated_counts_once(db: Database) -> None:
    """Given a rollback after everything was decided, the same prepared chunk goes through the second time."""
    handler = counters(db)
    prepared = handler.prepare(chunk_of([encoded(v3()), encoded(v3(idempotency_key="x", meter="unknown"))]))
    with pytest.raises(ZeroDivisionError), db.transaction():
        handler.apply(db, prepared)
        raise ZeroDivisionError
    assert total(db) == 0
    handler.apply(db, prepared)
    assert total(db) == 5
    assert outcomes(db) == {"counted": 1, "dead_lettered": 1}


def test_usage_too_old_for_stripe_by_the_time_it_leaves_is_an_adjustment(db: Database) -> None:
    handler = counters(db)
    old = v3()["occurred_at"] - 35 * DAY_US + 300_000_000
    feed(db, handler, v3(occurred_at=old), v3(idempotency_key="fits", occurred_at=old + DAY_US))
    assert outcomes(db) == {"adjusted": 1, "counted": 1}


def test_a_change_of_generation_does_not_queue_behind_a_long_reader(db: Database, postgres_dsn: str) -> None:
    age(db)
    with psycopg.connect(postgres_dsn) as reader:
        reader.execute("SELECT count(*) FROM seen_previous")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            rotate_generations(db, 35)
    assert rotate_generations(db, 35)


def test_a_chunk_above_the_stored_position_is_refused(db: Database) -> None:
    handler = counters(db)
    with pytest.raises(OffsetGap):
        feed(db, handler, v3(), at=7)
    assert total(db) == 0


def test_a_key_is_known_on_every_partition_and_topic(db: Database) -> None:
    handler = counters(db)
    feed(db, handler, v3(), partition=0)
    feed(db, handler, v3(), partition=3)
    feed(db, handler, v3(quantity=9 * UNIT), partition=1)
    assert total(db) == 5
    assert outcomes(db) == {"counted": 1, "duplicate": 1, "conflict": 1}


def test_a_key_stays_known_through_one_change_of_generation_and_expires_with_the_second(db: Database) -> None:
    handler = counters(db)
    feed(db, handler, v3())
    age(db)
    assert rotate_generations(db, 35)
    assert not rotate_generations(db, 35), "a new generation is not due again"
    feed(db, handler, v3(), at=1)
    assert outcomes(db) == {"counted": 1, "duplicate": 1}
    age(db)
    assert rotate_generations(db, 35)
    feed(db, handler, v3(), at=2)
    assert outcomes(db) == {"counted": 2, "duplicate": 1}


def age(db: Database) -> None:
    db.execute("UPDATE seen_generation SET started_at = now() - interval '36 days'")


def test_two_workers_with_one_key_at_the_same_moment_count_it_once(db: Database, postgres_dsn: str) -> None:
    """Given a worker that holds the key in an open transaction, the other waits, is refused, and retries."""
    mine, theirs = counters(db), counters(db)
    inserted, finish = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def other() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as second, second.transaction():
            feed(second, theirs, v3(), partition=1)  # a savepoint: not committed yet
            inserted.set()
            finish.wait(20)

    def first_attempt() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as third:
            try:
                feed(third, mine, v3(), partition=0)
            except Transient as error:
                failures.append(error)

    rival = threading.Thread(target=other)
    rival.start()
    assert inserted.wait(20)
    attempt = threading.Thread(target=first_attempt)
    attempt.start()
    attempt.join(0.5)
    assert attempt.is_alive(), "it waits for the other worker's transaction"
    finish.set()
    rival.join(20)
    attempt.join(20)
    assert len(failures) == 1
    feed(db, mine, v3(), partition=0)
    assert total(db) == 5
    assert outcomes(db) == {"counted": 1, "duplicate": 1}


def test_a_meter_that_is_declared_after_the_worker_started_is_known_in_the_next_chunk(db: Database) -> None:
    handler = counters(db)
    feed(db, handler, v3(idempotency_key="before", meter="tokens"))
    add_meter(db, "tokens")
    stale = handler.prepare(chunk_of([encoded(v3(idempotency_key="after", meter="tokens"))], first_offset=1))
    handler.apply(db, stale)
    assert outcomes(db) == {"dead_lettered": 1, "counted": 1}
    assert total(db) == 5


def test_an_idle_item_keeps_its_watermark_whatever_others_do(db: Database) -> None:
    handler = counters(db)
    late = v3()["occurred_at"] - DAY_US
    feed(
        db,
        handler,
        v3(idempotency_key="a", customer_ref="busy"),
        v3(idempotency_key="b", customer_ref="idle"),
    )
    feed(db, handler, v3(idempotency_key="c", customer_ref="busy", occurred_at=late), at=2)
    marks = dict(db.execute("SELECT customer_ref, watermark FROM items").fetchall())
    assert marks["busy"] == marks["idle"]
    assert outcomes(db) == {"counted": 2, "late_counted": 1}


def test_what_carries_forward_lands_in_the_open_period_and_is_listed(db: Database) -> None:
    add_meter(db, "carried", late_policy="carry_forward")
    handler = counters(db)
    old = v3()["occurred_at"] - 9 * DAY_US
    feed(
        db,
        handler,
        v3(idempotency_key="a", meter="carried"),
        v3(idempotency_key="b", meter="carried", occurred_at=old, quantity=2 * UNIT),
    )
    assert outcomes(db) == {"counted": 1, "adjusted": 1}
    assert total(db) == 7
    assert db.execute("SELECT state, quantity FROM adjustments").fetchall() == [("applied", Decimal(2))]
    for _ in range(2):
        age(db)
        assert rotate_generations(db, 35)
    feed(db, handler, v3(idempotency_key="b", meter="carried", occurred_at=old, quantity=2 * UNIT), at=2)
    assert total(db) == 7, "sent again after its key expired, it is not carried a second time"


def test_accounts_are_kept_for_each_tenant_and_meter(db: Database) -> None:
    handler = counters(db)
    feed(db, handler, v3(), v3(), v3(idempotency_key="x", meter="nobody_knows"))
    rows = {row["meter"]: row for row in outcomes_by_meter(db)}
    assert (rows["requests"]["received"], rows["requests"]["duplicate"]) == (2, 1)
    assert rows["nobody_knows"]["dead_lettered"] == 1


def test_closing_is_repeatable_and_an_hour_waits_for_its_open_delta(db: Database) -> None:
    """Given a delta under way, more usage of that hour waits; once it is settled, the rest follows."""
    handler = counters(db)
    feed(db, handler, v3(customer_ref="cus_1"))
    assert close(db) == (1, 1)
    assert close(db) == (0, 0)
    feed(db, handler, v3(idempotency_key="evt-2", customer_ref="cus_1"), at=1)
    assert close(db) == (0, 0)
    db.execute("UPDATE buckets SET open = false")
    assert close(db) == (1, 1)
    rows = db.execute("SELECT sequence, amount, identifier FROM deltas ORDER BY sequence").fetchall()
    assert [(row[0], row[1]) for row in rows] == [(1, 5), (2, 5)]
    assert rows[0][2] != rows[1][2]
    packs = db.execute("SELECT value FROM outbox WHERE topic = 'deltas.v1'").fetchall()
    assert sum(len(list(unpack(pack))) for (pack,) in packs) == 2


def test_other_hours_of_an_item_are_closed_while_the_delta_of_one_is_under_way(db: Database) -> None:
    handler = counters(db)
    hour_before = ARRIVAL_US - HOUR_US
    feed(db, handler, v3(customer_ref="cus_1"))
    assert close(db) == (1, 1)
    feed(
        db,
        handler,
        v3(idempotency_key="same hour", customer_ref="cus_1", quantity=UNIT),
        v3(idempotency_key="hour before", customer_ref="cus_1", occurred_at=hour_before, quantity=2 * UNIT),
        at=1,
    )
    assert close(db) == (1, 1)
    assert close(db) == (0, 0)
    rows = db.execute("SELECT amount, sequence FROM deltas ORDER BY closed_at, amount").fetchall()
    assert sorted(rows) == [(2, 1), (5, 1)]
    db.execute(
        "UPDATE buckets SET open = false WHERE hour_start = to_timestamp(%s)", (hour_before // 1_000_000,)
    )
    assert close(db) == (0, 0), "the hour before has nothing new, and the other one is still open"
    db.execute("UPDATE buckets SET open = false")
    assert close(db) == (1, 1)
    assert db.execute("SELECT sum(amount), count(*) FROM deltas").fetchone() == (8, 3)


def close(db: Database) -> tuple[int, int]:
    """A round an hour after the records arrived."""
    return close_round(db, now_us=ARRIVAL_US + HOUR_US)


def test_usage_of_a_customer_without_a_stripe_id_waits_until_it_has_one(db: Database) -> None:
    handler = counters(db)
    feed(db, handler, v3())
    assert close(db) == (0, 0)
    db.execute("INSERT INTO customers VALUES ('acme', 'cust-1', 'cus_9')")
    assert close(db) == (1, 1)
