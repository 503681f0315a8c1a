"""Gauges that are read from a real PostgreSQL: what they say, and that reading them stays cheap."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from prometheus_client import REGISTRY

from services.counters.watermarks import observe_watermarks
from services.pusher import delivery
from services.pusher.intents import Meaning, Policy
from services.pusher.sender import Sender, SenderConfig
from services.streaming import outbox, redriving
from services.streaming.database import Database
from services.wire.records import OutboxRow
from tests.integration.pushing import World, delta, settled, until

HOUR = timedelta(hours=1)
POLICY = Policy()


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """As the product connects."""
    database = Database(postgres_dsn, "test")
    yield database.connection()
    database.connection().close()


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def intents(db: psycopg.Connection[Any], state: str, number: int = 1, **columns: Any) -> None:
    """Rows of the journal in a state that others would have to be brought to step by step."""
    now = datetime.now(UTC)
    known = {
        "item_id": "00000000-0000-0000-0000-000000000001",
        "tenant_id": "acme",
        "meter": "calls",
        "period_start": now,
        "period_end": now,
        "hour_start": now,
        "event_name": "calls",
        "stripe_customer": "cus_1",
        "customer_payload_key": "c",
        "value_payload_key": "v",
        "amount": 1,
        "event_at": now,
        "state": state,
        **columns,
    }
    places = ", ".join("%s" for _ in known)
    db.execute(
        f"INSERT INTO meter_events (identifier, {', '.join(known)}) "  # noqa: S608
        f"SELECT gen_random_uuid(), {places} FROM generate_series(1, %s)",
        (*known.values(), number),
    )


def standing(dsn: str) -> delivery.Standing:
    async def ask() -> delivery.Standing:
        session = await delivery.connect(dsn, "test")
        try:
            return await delivery.standing(session, POLICY)
        finally:
            await session.close()

    return asyncio.run(ask())


def read_tables(plan: Any) -> set[str]:
    """Tables that a plan reads from the first page to the last."""
    found = {plan["Relation Name"]} if plan["Node Type"] == "Seq Scan" else set()
    return found.union(*(read_tables(one) for one in plan.get("Plans", [])))


def explained(db: psycopg.Connection[Any], query: str, values: Any = None) -> Any:
    row = db.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", values).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return (row[0] if isinstance(row[0], list) else json.loads(row[0]))[0]["Plan"]


def test_the_outbox_says_how_many_rows_wait_and_for_how_long(db: psycopg.Connection[Any]) -> None:
    outbox.observe(db, "waiter")
    assert gauge("tidemeter_outbox_rows", producer="waiter") == 0
    assert gauge("tidemeter_outbox_oldest_seconds", producer="waiter") == 0
    with db.transaction():
        outbox.enqueue(db, "waiter", [OutboxRow("t", None, b"old"), OutboxRow("t", None, b"new")])
        outbox.enqueue(db, "other", [OutboxRow("t", None, b"of somebody else")])
    db.execute("UPDATE outbox SET enqueued_at = now() - interval '90 s' WHERE value = %s", (b"old",))
    outbox.observe(db, "waiter")
    assert gauge("tidemeter_outbox_rows", producer="waiter") == 2
    assert 90 <= (gauge("tidemeter_outbox_oldest_seconds", producer="waiter") or 0) < 150


def test_packs_are_as_old_as_rows(db: psycopg.Connection[Any]) -> None:
    with db.transaction():
        outbox.enqueue_packed(db, "packer", "deltas.v1", {}, [(b"k", b"v")])
    db.execute("UPDATE outbox SET enqueued_at = now() - interval '5 min'")
    outbox.enqueue(db, "packer", [OutboxRow("t", None, b"new")])
    outbox.observe(db, "packer")
    assert gauge("tidemeter_outbox_rows", producer="packer") == 2
    assert (gauge("tidemeter_outbox_oldest_seconds", producer="packer") or 0) >= 300


def test_the_age_of_a_long_outbox_is_found_by_its_index(db: psycopg.Connection[Any]) -> None:
    db.execute(
        "INSERT INTO outbox (producer, topic, value) SELECT 'long', 't', '' FROM generate_series(1, 20000)"
    )
    db.execute("ANALYZE outbox")
    plan = explained(db, outbox._WAITING, {"producers": ["long", "long/packs"]})
    assert not read_tables(plan)


def test_intents_say_by_state_how_many_there_are_and_how_old_the_oldest_is(
    db: psycopg.Connection[Any], postgres_dsn: str
) -> None:
    now = datetime.now(UTC)
    intents(db, "pending", created_at=now - 2 * HOUR)
    intents(db, "pending")
    intents(db, "failed", created_at=now - 9 * HOUR, settled_at=now - 5 * HOUR)
    intents(db, "failed", settled_at=now - 50 * HOUR, released_at=now, released_sequence=1)
    intents(db, "reported", created_at=now - 99 * HOUR, settled_at=now - 98 * HOUR)
    found = standing(postgres_dsn)
    assert found.counts == {"pending": 2, "in_flight": 0, "in_doubt": 0, "failed": 1}
    assert found.oldest == {"pending": now - 2 * HOUR, "failed": now - 5 * HOUR}
    assert found.oldest_open == now - 2 * HOUR
    assert found.deadline is None


def test_the_deadline_of_doubts_is_the_last_resend_or_the_invoice_whichever_comes_first(
    db: psycopg.Connection[Any], postgres_dsn: str
) -> None:
    now = datetime.now(UTC)
    intents(db, "in_doubt", first_sent_at=now - 20 * HOUR)
    assert standing(postgres_dsn).deadline == now - 20 * HOUR + POLICY.resend_for
    intents(db, "in_doubt", first_sent_at=now - HOUR, push_before=now + HOUR)
    assert standing(postgres_dsn).deadline == now + HOUR
    intents(db, "pending", push_before=now - HOUR)  # never sent: not in doubt
    assert standing(postgres_dsn).deadline == now + HOUR


def test_the_pusher_sets_ages_and_the_deadline(db: psycopg.Connection[Any], postgres_dsn: str) -> None:
    """``+Inf`` when nothing is in doubt, so that no comparison holds."""
    now = datetime.now(UTC)

    async def count() -> None:
        sender = Sender(postgres_dsn, _Sink(), SenderConfig(), clock=lambda: now)
        session = await delivery.connect(postgres_dsn, "test")
        await sender._count(session)
        await session.close()

    asyncio.run(count())
    assert gauge("tidemeter_in_doubt_deadline_seconds") == math.inf
    assert gauge("tidemeter_intents_oldest_seconds", state="in_doubt") == 0
    intents(db, "in_doubt", created_at=now - 22 * HOUR, first_sent_at=now - 21 * HOUR)
    asyncio.run(count())
    assert gauge("tidemeter_in_doubt_deadline_seconds") == 2 * 3600
    assert gauge("tidemeter_intents_oldest_seconds", state="in_doubt") == 22 * 3600
    assert gauge("tidemeter_intents", state="in_doubt") == 1
    assert gauge("tidemeter_stripe_rate_max") == SenderConfig().rate_per_second


class _Sink:
    batch_max = 1
    takes = None


def test_meter_events_are_counted_by_what_their_answer_meant(world: World) -> None:
    """Every result has its series before anything was sent."""
    name = "tidemeter_meter_events_total"

    async def send() -> None:
        async with world.sending():
            assert [gauge(name, result=meaning) for meaning in Meaning].count(None) == 0
            await until(lambda: settled(world))

    before = gauge(name, result="delivered") or 0
    world.close(*(delta(f"cus_{number}", "1") for number in range(1, 8)))
    asyncio.run(send())
    assert gauge(name, result="delivered") == before + 7


def test_counting_intents_never_reads_the_whole_journal(db: psycopg.Connection[Any]) -> None:
    intents(db, "reported", 20_000)
    for state in ("pending", "in_doubt", "failed"):
        sent = {"first_sent_at": datetime.now(UTC)} if state == "in_doubt" else {}
        intents(db, state, 20, **sent)
    db.execute("ANALYZE meter_events")
    db.execute("SET enable_seqscan = on")  # the planner is free, as in the pusher's session
    assert not read_tables(explained(db, delivery._COUNTS, (POLICY.resend_for,)))


def test_the_watermark_of_a_meter_is_the_newest_of_its_items(db: psycopg.Connection[Any]) -> None:
    moment = datetime(2026, 11, 1, 12, 30, tzinfo=UTC)
    for number, (meter, watermark) in enumerate(
        [("calls", moment), ("calls", moment - HOUR), ("jobs", moment - 3 * HOUR), ("idle", "-infinity")]
    ):
        db.execute(
            "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, calendar) "
            "VALUES (%s, 'gauged', %s, %s, %s, 'UTC')",
            (f"00000000-0000-0000-0000-00000000000{number}", f"customer-{number}", meter, watermark),
        )
    observe_watermarks(db)
    name = "tidemeter_watermark_timestamp_seconds"
    assert gauge(name, tenant="gauged", meter="calls") == moment.timestamp()
    assert gauge(name, tenant="gauged", meter="jobs") == (moment - 3 * HOUR).timestamp()
    assert gauge(name, tenant="gauged", meter="idle") is None
    assert db.execute("SHOW enable_seqscan").fetchone() == ("off",)


def test_parked_records_have_a_series_before_the_first_one(db: psycopg.Connection[Any]) -> None:
    redriving.observe(db, "tidemeter-counters")
    for kind in ("dead_letter", "upcast_failure", "conflict"):
        assert gauge("tidemeter_parked_records", kind=kind, reason="") == 0
