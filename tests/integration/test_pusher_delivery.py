"""The sender against a real PostgreSQL and the Stripe simulator.

The oracle is the simulator's ledger of applied events, never what the journal or the summaries claim.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import signal
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from aiohttp import web

from schemas.catalog import current, released
from services.pusher import delivery, journal
from services.pusher.agent import GROUP, Intents
from services.pusher.intents import (
    Answer,
    Claim,
    Formula,
    Intent,
    Meaning,
    Shown,
    intent_of,
    settlement_of,
)
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks import Call, Sink
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.webhook import WebhookSink
from services.streaming import offsets
from services.streaming.chunks import Chunk, Partition
from services.streaming.database import TRANSIENT_ERRORS
from services.stripe_simulator import SimulatorConfig
from services.wire.codec import Decoder, Encoder, Record
from services.wire.errors import Broken, Misconfigured
from services.wire.records import ops_event
from tests.integration.pushing import (
    EVENT,
    GAUGE,
    HOUR,
    KEY,
    World,
    amount_of,
    delta,
    gauge,
    killed_at_the_end,
    micros,
    no_call_left,
    open_world,
    send_again,
    settled,
    this_hour,
    until,
)
from tests.records import Raw
from upcasters.chain import upcasters

# -- Delivery ----------------------------------------------------------------------------------------


def test_each_delta_is_billed_once_and_its_bucket_is_free_again(world: World) -> None:
    deltas = [delta(f"cus_{n}", f"{n}.5", hours_ago=h) for n in range(1, 20) for h in range(3)]
    world.close(*deltas)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": len(deltas)}
    assert world.billed() == sum(map(amount_of, deltas)) == world.reported()
    assert world.open_buckets() == 0
    assert world.stripe.stats()["max_in_flight_per_customer_meter"] == 1
    assert world.ops_events() == []


def test_two_customers_on_one_meter_have_separate_totals(world: World) -> None:
    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    world.close(delta("cus_1", "5"), delta("cus_2", "7"))
    asyncio.run(scenario())
    world.close(delta("cus_1", "-2", sequence=2))
    asyncio.run(scenario())
    assert world.stripe.total(customer="cus_1") == "3"
    assert world.stripe.total(customer="cus_2") == "7"


def test_the_values_and_times_of_a_delta_arrive_as_plain_text_and_seconds(world: World) -> None:
    one = delta("cus_1", "1200.000000100", hours_ago=34 * 24)
    world.close(one)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    (row,) = world.stripe.ledger()["rows"]
    assert row["value"] == "1200.0000001"
    assert row["timestamp"] == one["event_at"] // 1_000_000
    assert row["identifier"] == row["idempotency_key"] == one["identifier"]


def test_a_delta_that_is_delivered_again_changes_nothing(world: World) -> None:
    one = delta()
    world.close(one)

    async def scenario() -> None:
        async with world.sending() as sender:
            await until(lambda: settled(world))
            with psycopg.connect(world.dsn) as db:
                assert journal.record_intents(db, [one, one, delta("cus_2")]) == 1
                db.rollback()
                assert journal.record_intents(db, [one, one]) == 0
            sender.wake()
            await asyncio.sleep(0.3)

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.stripe.stats()["applied"] == 1


def test_one_identifier_with_two_contents_is_broken(world: World) -> None:
    world.close(delta(amount="1"))
    for other in ({"amount": "2"}, {"dimensions": {"region": "eu"}}, {"formula": "last"}):
        changed = delta(**other) | {"identifier": delta()["identifier"]}  # type: ignore[arg-type]
        with psycopg.connect(world.dsn) as db, pytest.raises(Broken):
            journal.record_intents(db, [changed])
    with psycopg.connect(world.dsn) as db, pytest.raises(Broken):
        journal.record_intents(db, [delta("cus_9", amount="1"), delta("cus_9", amount="2")])


def test_a_repeated_identifier_is_success(world: World) -> None:
    """Stripe accepted, forgot the key, and the answer was lost: the retry is told that it exists."""
    world.stripe.play({"fault": "reset_after_apply", "remember": False, "match": {"path": "*/meter_events"}})
    world.close(delta(amount="4"))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.billed() == 4
    assert world.stripe.stats()["duplicates_refused"] == 1
    assert world.sql("SELECT error_code, http_status FROM meter_events") == [("already_exists", 400)]


def test_a_refused_intent_fails_once_with_one_ops_event_and_frees_its_bucket(world: World) -> None:
    world.close(delta("cus_nobody"), delta("cus_1"))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"failed": 1, "reported": 1}
    assert world.open_buckets() == 0
    (event,) = world.ops_events()
    assert (event["name"], event["source"], event["subject_id"]) == (
        "meter_reporting_failed",
        "sync",
        delta("cus_nobody")["identifier"],
    )
    assert event["attributes"]["reason"] == "meter_event_customer_not_found"
    assert "cus_nobody" not in json.dumps(event)


def test_the_nearest_end_of_a_period_goes_first(world: World) -> None:
    early, late = delta("cus_1"), delta("cus_2")
    late["period_end"] += micros(datetime(1970, 1, 2, tzinfo=UTC))
    world.close(late, early)

    async def scenario() -> None:
        async with world.sending(rate=1):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert [row["customer"] for row in world.stripe.ledger()["rows"]] == ["cus_1", "cus_2"]


def test_the_nearest_deadline_of_an_invoice_goes_before_the_end_of_a_period(world: World) -> None:
    """Between customers, and between the deltas of one."""
    soon = world.now() + timedelta(minutes=5)
    world.close(
        delta("cus_1", "1"),
        delta("cus_2", "2"),
        delta("cus_2", "3", hours_ago=1, push_before=soon + HOUR),
        delta("cus_3", "4", push_before=soon),
    )

    async def scenario() -> None:
        async with world.sending(rate=1):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    order = [row["value"] for row in world.stripe.ledger()["rows"]]
    assert order[:2] == ["4", "3"]
    assert sorted(order[2:]) == ["1", "2"]


def test_keys_whose_first_intent_must_wait_do_not_keep_others_from_their_turn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has something else that is due, and all of them come before the one that can be sent."""
    monkeypatch.setattr("services.pusher.sender.WINDOW_KEYS_MAX", 5)
    backing_off = [delta(f"cus_{n}", hours_ago=h) for n in range(10) for h in range(1, 3)]
    doubted = [delta(f"cus_{n}") for n in range(10, 20)]
    behind = [delta(f"cus_{n}", dimensions={"region": "eu"}) for n in range(10, 20)]
    world.close(*backing_off, *doubted, *behind, delta("cus_99"))
    world.sql(
        "UPDATE meter_events SET next_attempt_at = now() + interval '5 minutes' WHERE identifier = ANY(%s)",
        ([one["identifier"] for one in backing_off[1::2]],),
    )
    for state in ("in_flight", "in_doubt"):
        world.sql(
            "UPDATE meter_events SET state = %s, first_sent_at = coalesce(first_sent_at, now()), "
            "next_attempt_at = now() + interval '5 minutes' WHERE identifier = ANY(%s)",
            (state, [one["identifier"] for one in doubted]),
        )
    world.sql(
        "UPDATE meter_events SET period_end = period_end + interval '1 day' WHERE stripe_customer = 'cus_99'"
    )

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: world.billed() == 1, 3)

    asyncio.run(scenario())
    assert world.stripe.total(customer="cus_99") == "1"


def test_the_configured_rate_is_kept(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(120)))

    async def scenario() -> None:
        async with world.sending(rate=40):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert 30 <= world.stripe.stats()["max_meter_events_in_one_second"] <= 42


# -- Kills -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["pusher.in_flight_committed", "pusher.answered", "pusher.settled"])
def test_a_sender_killed_at_any_step_bills_once(world: World, tmp_path: Path, point: str) -> None:
    deltas = [delta(f"cus_{n}", str(n + 1), hours_ago=h) for n in range(8) for h in range(2)]
    world.close(*deltas)
    reached = tmp_path / "reached"
    first = world.spawn(fault=f"{point}:1", log=reached, timeout=0.5)
    with killed_at_the_end(first):
        assert first.wait(20) == -signal.SIGKILL
    assert reached.read_text() == f"{point}\n"
    second = world.spawn(timeout=0.5)
    with killed_at_the_end(second):
        asyncio.run(until(lambda: settled(world)))
    assert world.billed() == sum(map(amount_of, deltas))
    assert world.states() == {"reported": len(deltas)}
    assert world.open_buckets() == 0
    assert world.stripe.stats()["applied"] == len(deltas)


def test_two_senders_never_have_two_calls_in_flight_for_one_customer_and_meter(world: World) -> None:
    deltas = [delta(f"cus_{n}", hours_ago=h) for n in range(6) for h in range(15)]
    world.close(*deltas)
    world.stripe.play({"fault": "slow", "seconds": 0.05, "match": {"probability": 0.5}}, seed=3)
    pair = [world.spawn(), world.spawn()]
    with killed_at_the_end(*pair):
        asyncio.run(until(lambda: settled(world)))
    stats = world.stripe.stats()
    assert stats["max_in_flight_per_customer_meter"] == 1
    assert stats["concurrency_refused"] == 0
    assert stats["applied"] == len(deltas)
    assert stats["duplicates_refused"] == stats["replays"] == 0
    assert world.billed() == len(deltas)


def test_a_stopped_sender_keeps_its_customers_and_wakes_without_harm(world: World) -> None:
    deltas = [delta(f"cus_{n}", str(n + 1)) for n in range(40)]
    world.close(*deltas)
    world.stripe.play({"fault": "slow", "seconds": 0.3, "times": 40})
    zombie = world.spawn(timeout=1.0)
    other = None
    with killed_at_the_end(zombie):
        asyncio.run(until(lambda: world.states().get("in_flight", 0) > 0))
        zombie.send_signal(signal.SIGSTOP)
        other = world.spawn(timeout=1.0)
        with killed_at_the_end(other):
            time.sleep(8.5)  # longer than the lease
            assert world.states().get("in_flight", 0) > 0, (
                "somebody took what the stopped process still holds"
            )
            zombie.send_signal(signal.SIGCONT)
            asyncio.run(until(lambda: settled(world)))
    stats = world.stripe.stats()
    assert stats["max_in_flight_per_customer_meter"] == 1
    assert stats["identifiers_with_two_values"] == 0
    assert world.billed() == sum(map(amount_of, deltas))
    assert world.states() == {"reported": 40}
    assert world.open_buckets() == 0


def test_a_lost_lock_session_lets_no_second_call_begin(world: World) -> None:
    """The database drops the locks of a sender in the middle of its calls; another one is eager."""
    deltas = [delta(f"cus_{n}", hours_ago=h) for n in range(4) for h in range(5)]
    world.close(*deltas)
    world.stripe.play({"fault": "slow", "seconds": 0.4, "match": {"probability": 1.0}})
    pair = [world.spawn(timeout=1.0), world.spawn(timeout=1.0)]
    with killed_at_the_end(*pair):
        for _ in range(6):
            time.sleep(0.5)
            world.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'tidemeter-pusher-locks' AND datname = current_database()"
            )
        asyncio.run(until(lambda: settled(world), 60))
    assert world.stripe.stats()["max_in_flight_per_customer_meter"] == 1
    assert world.billed() == len(deltas)
    assert world.states() == {"reported": len(deltas)}


# -- Faults ------------------------------------------------------------------------------------------

FAULTS: list[dict[str, Any]] = [
    {"fault": "status", "status": 429},
    {"fault": "status", "status": 429, "reason": "endpoint-rate"},
    {"fault": "status", "status": 429, "lock_timeout": True},
    {"fault": "status", "status": 409},
    *({"fault": "status", "status": s, "applied": a} for s in (500, 502, 503, 504) for a in (True, False)),
    {"fault": "reset_before_apply"},
    {"fault": "reset_after_apply"},
    {"fault": "reset_after_apply", "remember": False},
    {"fault": "cut_body"},
    {"fault": "stall_body", "seconds": 2},
    {"fault": "stall_before_answer", "seconds": 2},
]


def test_no_fault_on_the_way_changes_what_is_billed(world: World) -> None:
    deltas = [delta(f"cus_{n}", f"{n + 1}.25", hours_ago=h) for n in range(25) for h in range(4)]
    world.close(*deltas)
    rules = [
        {**fault, "match": {"path": "*/meter_events", "probability": 0.025}, "times": 20} for fault in FAULTS
    ]
    world.stripe.play(*rules, seed=11)

    async def scenario() -> None:
        async with world.sending(timeout=0.5):
            await until(lambda: no_call_left(world), 90)
            played = world.stripe.stats()["faults"]
            assert len(played) >= 10, played
            world.stripe.clear_faults()
            await asyncio.sleep(0.6)
            # What a stored 500 left in doubt is settled by the summaries of the next day.
            world.advance(timedelta(hours=25))
            await until(lambda: settled(world), 60)

    asyncio.run(scenario())
    assert world.billed() == sum(map(amount_of, deltas)) == world.reported()
    assert world.stripe.stats()["identifiers_with_two_values"] == 0
    assert world.stripe.stats()["max_in_flight_per_customer_meter"] == 1
    assert set(world.states()) <= {"reported", "cancelled"}
    assert world.open_buckets() == 0
    assert world.ops_events() == []


def test_a_key_that_is_not_accepted_pauses_everything_and_fails_nothing(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(50)))

    class Rotating(StripeSink):
        """A sink whose key an operator repairs."""

        good: Sink = world.sink()
        repaired = False

        async def send(self, calls: Sequence[Call]) -> list[Answer]:
            if self.repaired:
                return list(await self.good.send(calls))
            return await super().send(calls)

    async def scenario() -> None:
        sink = Rotating("not-a-key", api_base=world.stripe.url, timeout_seconds=2, connections_max=4)
        async with world.sending(sink) as sender:
            await until(lambda: sender.check()[0] == "degraded")
            await asyncio.sleep(2)
            assert sender.health().paused_for == "unauthorised"
            assert set(world.states()) <= {"pending", "in_flight"}
            calls = sum(r["count"] for r in world.stripe.stats()["requests"] if r["status"] == 401)
            assert calls <= 16 + 5
            sink.repaired = True
            await until(lambda: settled(world))
            assert sender.check()[0] == "healthy"
        await sink.good.close()

    asyncio.run(scenario())
    assert world.billed() == 50
    assert world.ops_events() == []


def test_a_sink_that_is_away_costs_few_calls_and_puts_nothing_in_doubt(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(100)))
    nowhere = StripeSink(KEY, api_base="http://127.0.0.1:9", timeout_seconds=1, connections_max=16)

    async def scenario() -> None:
        async with world.sending(nowhere) as sender:
            await asyncio.sleep(2)
            assert sender.check()[0] == "degraded"
            assert sender.health().paused_for == "not_sent"
        assert world.states() == {"pending": 100}
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.billed() == 100


def test_postgresql_away_for_a_while_delays_and_loses_nothing(world: World) -> None:
    deltas = [delta(f"cus_{n}", hours_ago=h) for n in range(40) for h in range(3)]
    world.close(*deltas)
    world.stripe.play({"fault": "slow", "seconds": 0.1, "match": {"probability": 1.0}})
    name = psycopg.conninfo.conninfo_to_dict(world.dsn)["dbname"]
    admin = psycopg.connect(psycopg.conninfo.make_conninfo(world.dsn, dbname="template1"), autocommit=True)

    async def scenario() -> None:
        async with world.sending(timeout=1.0) as sender:
            await asyncio.sleep(0.4)
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            try:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
                )
                await asyncio.sleep(2)
                assert sender.check()[0] == "unhealthy"
            finally:
                admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await until(lambda: settled(world), 60)
            assert sender.check()[0] == "healthy"

    with admin:
        asyncio.run(scenario())
    assert world.billed() == len(deltas)
    assert world.open_buckets() == 0
    assert world.stripe.stats()["max_in_flight_per_customer_meter"] == 1


def test_a_cancelled_sender_settles_the_calls_under_way_and_gives_back_the_rest(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(60)))
    world.stripe.play({"fault": "slow", "seconds": 0.4, "match": {"probability": 1.0}})

    async def scenario() -> None:
        sink = world.sink()
        running = asyncio.create_task(Sender(world.dsn, sink, SenderConfig(call_timeout_seconds=2.0)).run())
        await until(lambda: world.states().get("in_flight", 0) > 0)
        await asyncio.sleep(0.2)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await sink.close()

    asyncio.run(scenario())
    assert set(world.states()) == {"pending", "reported"}
    assert world.billed() == world.reported() == 60 - world.states()["pending"]


def test_a_journal_that_does_not_add_up_stops_the_sender(world: World) -> None:
    world.close(delta())
    world.sql("UPDATE buckets SET open = false")

    async def scenario() -> None:
        sender = Sender(world.dsn, world.sink(), SenderConfig(call_timeout_seconds=1.0))
        await asyncio.wait_for(sender.run(), 10)

    with pytest.raises(Broken, match="open"):
        asyncio.run(scenario())
    assert world.states() == {"in_flight": 1}


def test_an_intent_without_a_bucket_stops_the_sender(world: World) -> None:
    world.close(delta())
    world.sql("DELETE FROM buckets")

    async def scenario() -> None:
        sender = Sender(world.dsn, world.sink(), SenderConfig(call_timeout_seconds=1.0))
        await asyncio.wait_for(sender.run(), 10)

    with pytest.raises(Broken, match="missing"):
        asyncio.run(scenario())


def test_a_settlement_written_twice_changes_nothing_the_second_time(world: World) -> None:
    """Not even when the counters have closed the bucket again meanwhile."""
    world.close(delta())
    config = SenderConfig()

    async def scenario() -> None:
        session = await delivery.connect(world.dsn, "test")
        now = world.now()
        (key,) = await delivery.due_keys(session, now, 10)
        (claim,), done = await delivery.claim(
            session, [key], now=now, lease=config.lease, policy=config.policy
        )
        assert done == 0
        accepted = settlement_of(claim, Answer(Meaning.DELIVERED), now=now, chance=0.5, policy=config.policy)
        assert world.open_buckets() == 1
        await delivery.settle(session, [accepted], now)
        assert world.open_buckets() == 0
        world.close(delta(sequence=2))
        await delivery.settle(session, [accepted], now)
        assert world.open_buckets() == 1
        await session.close()

    asyncio.run(scenario())
    assert world.states() == {"pending": 1, "reported": 1}


def test_a_transaction_that_idled_too_long_is_written_again(world: World) -> None:
    async def scenario() -> None:
        session = await delivery.connect(world.dsn, "test")
        await session.execute("SET idle_in_transaction_session_timeout = '50ms'")
        with pytest.raises(TRANSIENT_ERRORS):
            async with session.transaction():
                await session.execute("SELECT 1")
                await asyncio.sleep(0.5)
                await session.execute("SELECT 1")
        await session.close()

    asyncio.run(scenario())


# -- In doubt for a day ------------------------------------------------------------------------------


def in_doubt_by(world: World, fault: dict[str, Any], *deltas: Record) -> None:
    """Every call of these deltas meets ``fault``, and the sender stops with them in doubt."""
    world.stripe.play({**fault, "match": {"path": "*/meter_events", "probability": 1.0}})
    world.close(*deltas)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: world.states().get("in_doubt") == len(deltas))

    asyncio.run(scenario())
    world.stripe.clear_faults()


def posts(world: World) -> int:
    return sum(r["count"] for r in world.stripe.stats()["requests"] if r["route"].endswith("meter_events"))


def test_in_doubt_for_a_day_and_applied_is_not_sent_again(world: World) -> None:
    world.close(delta(amount="3"))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    in_doubt_by(world, {"fault": "status", "status": 500, "applied": True}, delta(amount="5", sequence=2))
    sent = posts(world)
    world.advance(timedelta(hours=24))
    asyncio.run(scenario())
    assert posts(world) == sent
    assert world.states() == {"reported": 2}
    assert world.billed() == 8
    assert world.open_buckets() == 0
    assert world.ops_events() == []


def test_in_doubt_for_a_day_and_not_applied_is_sent_once_under_a_new_identifier(world: World) -> None:
    one = delta(amount="5")
    in_doubt_by(world, {"fault": "reset_before_apply"}, one)
    world.advance(timedelta(hours=24))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    rows = world.sql("SELECT identifier, state, replaces FROM meter_events ORDER BY state")
    assert [(state, replaces) for _, state, replaces in rows] == [
        ("cancelled", None),
        ("reported", one["identifier"]),
    ]
    (row,) = world.stripe.ledger()["rows"]
    assert row["identifier"] == rows[1][0] != one["identifier"]
    assert world.billed() == 5
    assert world.open_buckets() == 0


def test_between_the_last_resend_and_the_first_question_nothing_is_sent(world: World) -> None:
    in_doubt_by(world, {"fault": "reset_before_apply"}, delta())
    world.advance(timedelta(hours=23, minutes=10))
    sent = posts(world)

    async def scenario() -> None:
        async with world.sending():
            await asyncio.sleep(1)

    asyncio.run(scenario())
    assert posts(world) == sent
    assert world.states() == {"in_doubt": 1}


def test_a_total_that_fits_neither_case_stays_in_doubt_with_one_ops_event(world: World) -> None:
    one = delta(amount="5")
    in_doubt_by(world, {"fault": "reset_before_apply"}, one)

    async def foreign_usage() -> None:
        foreign = journal.intent_of(
            {**one, "identifier": "foreign", "amount": (2 * 10**9).to_bytes(16, "big")}
        )
        sink = world.sink()
        await sink.send([SimpleNamespace(intent=foreign, idempotency_key=foreign.identifier)])
        await sink.close()

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: len(world.ops_events()) == 1)
            await asyncio.sleep(1)

    asyncio.run(foreign_usage())
    world.advance(timedelta(hours=24))
    asyncio.run(scenario())
    asyncio.run(scenario())
    assert world.states() == {"in_doubt": 1}
    (event,) = world.ops_events()
    assert event["attributes"]["reason"] == "in_doubt_unresolved"
    assert world.billed() == 2


def test_summaries_that_cannot_be_read_settle_nothing(world: World) -> None:
    in_doubt_by(world, {"fault": "reset_before_apply"}, delta())
    world.advance(timedelta(hours=24))
    world.stripe.play(
        {"fault": "status", "status": 503, "match": {"path": "*event_summaries", "probability": 1.0}}
    )

    async def scenario() -> None:
        async with world.sending():
            await asyncio.sleep(1)
            assert world.states() == {"in_doubt": 1}
            assert world.ops_events() == []
            world.advance(timedelta(hours=13))
            await until(lambda: len(world.ops_events()) == 1)
            world.stripe.clear_faults()
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.billed() == 1


def test_usage_of_the_same_hour_waits_while_one_intent_is_in_doubt_and_other_hours_do_not(
    world: World,
) -> None:
    in_doubt_by(world, {"fault": "reset_before_apply"}, delta(amount="1"))
    world.close(delta(amount="10", dimensions={"region": "eu"}), delta(amount="100", hours_ago=1))
    world.advance(timedelta(hours=23, minutes=30))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: world.billed() == 100)
            await asyncio.sleep(0.5)
            assert world.billed() == 100
            world.advance(timedelta(minutes=30))
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.billed() == 111


def test_an_applied_intent_whose_key_answers_500_for_a_day_is_found_in_minutes(world: World) -> None:
    in_doubt_by(world, {"fault": "status", "status": 500, "applied": True}, delta(amount="9"))
    world.advance(timedelta(minutes=15))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.billed() == 9


# -- Dimensions, and versions of the delta -----------------------------------------------------------


def test_dimensions_arrive_in_the_payload_beside_customer_and_value(world: World) -> None:
    split = [{"region": "eu", "model": "large"}, {"region": "us", "model": "large"}, {}]
    world.close(*(delta("cus_1", str(n + 1), dimensions=one) for n, one in enumerate(split)))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    rows = world.stripe.ledger()["rows"]
    assert {row["value"]: row["dimensions"] for row in rows} == {
        str(n + 1): one for n, one in enumerate(split)
    }
    assert {row["customer"] for row in rows} == {"cus_1"}


@pytest.mark.parametrize("name", ["stripe_customer_id", "value"])
def test_a_dimension_under_the_name_of_customer_or_value_is_refused_without_a_call(
    world: World, name: str
) -> None:
    world.close(delta("cus_1", "5", dimensions={name: "cus_2"}))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.sql("SELECT state, error_code FROM meter_events") == [("failed", "dimension_is_payload_key")]
    assert posts(world) == 0
    assert world.open_buckets() == 0
    assert len(world.ops_events()) == 1


def test_deltas_of_every_released_version_are_read_and_nothing_else(world: World) -> None:
    new = delta("cus_2", "2", dimensions={"region": "eu"}, formula="last", push_before=world.now())
    v1, v2 = (released()["usage_delta", version] for version in (1, 2))
    old = {field["name"]: delta("cus_1", "1")[field["name"]] for field in v1.plain["fields"]}
    other = ops_event("meter_resumed", subject_type="x", subject_id="y", source="z", at_us=0)
    values = [Encoder(v1).encode(old), Encoder(v2).encode(new), other.value]
    raw = [SimpleNamespace(offset=n, value=value) for n, value in enumerate(values)]
    prepared = Intents(Decoder(), upcasters()).prepare(Chunk(Partition("deltas.v1", 0), raw))  # type: ignore[arg-type]
    assert {n: error.reason for n, error in prepared.refused.items()} == {2: "unknown_schema"}
    with psycopg.connect(world.dsn) as db:
        assert journal.record_intents(db, list(prepared.records.values())) == 2
    assert world.sql(
        "SELECT stripe_customer, dimensions, formula, push_before IS NULL FROM meter_events ORDER BY 1"
    ) == [("cus_1", {}, "sum", True), ("cus_2", {"region": "eu"}, "last", False)]


def test_a_chunk_that_was_partly_stored_before_is_relayed_for_before_it_is_settled(world: World) -> None:
    """Whoever stored its first record may have been killed before Kafka had what it parked."""
    tp = Partition("deltas.v1", 0)
    values = [b"garbage", Encoder(current("usage_delta")).encode(delta("cus_1", "1"))]
    raw = [Raw(n, value) for n, value in enumerate(values)]
    intents = Intents(Decoder(), upcasters())
    with psycopg.connect(world.dsn, autocommit=True) as db:
        db.execute("DELETE FROM partition_offsets WHERE consumer = %s", (GROUP,))
        db.execute("DELETE FROM parked_records WHERE service = %s", (GROUP,))
        offsets.ensure_positions(db, GROUP, {tp: 0})
        first = intents.apply(db, intents.prepare(Chunk(tp, raw[:1])))
        assert (first.next_offset, first.outbox_rows, first.redelivered) == (1, 2, False)
        both = intents.apply(db, intents.prepare(Chunk(tp, raw)))
        assert (both.next_offset, both.outbox_rows, both.redelivered) == (2, 0, True)
        db.execute("DELETE FROM parked_records WHERE service = %s", (GROUP,))
        db.execute("DELETE FROM partition_offsets WHERE consumer = %s", (GROUP,))


# -- Meters whose formula is last --------------------------------------------------------------------


def read(world: World, one: Record) -> Shown | None:
    """What the sink shows of a delta's hour."""

    async def scenario() -> Shown | None:
        sink = world.sink()
        try:
            return await sink.shown(intent_of(one))
        finally:
            await sink.close()

    return asyncio.run(scenario())


def test_each_new_value_of_a_last_meter_takes_the_place_of_the_one_before(world: World) -> None:
    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    assert read(world, gauge("7")) == Shown(None)
    for sequence, value in enumerate(("7", "3.5", "0"), 1):
        world.close(gauge(value, sequence=sequence))
        asyncio.run(scenario())
        assert read(world, gauge(value)) == Shown(Decimal(value))
    assert [row["value"] for row in world.stripe.ledger()["rows"]] == ["7", "3.5", "0"]
    assert world.open_buckets() == 0


def test_a_value_in_doubt_for_a_day_that_the_hour_shows_is_not_sent_again(world: World) -> None:
    one = gauge("5")
    in_doubt_by(world, {"fault": "status", "status": 500, "applied": True}, one)
    sent = posts(world)
    world.advance(timedelta(hours=24))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert posts(world) == sent
    assert world.sql("SELECT state, error_code FROM meter_events") == [("reported", "applied_by_summary")]
    assert world.open_buckets() == 0


@pytest.mark.parametrize("before", [None, "7"])
@pytest.mark.parametrize("value", ["5", "0"])
def test_a_value_in_doubt_for_a_day_that_the_hour_does_not_show_is_sent_once_more(
    world: World, before: str | None, value: str
) -> None:
    """An hour without usage is not an hour with the value 0."""

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    if before is not None:
        world.close(gauge(before))
        asyncio.run(scenario())
    one = gauge(value, sequence=2)
    in_doubt_by(world, {"fault": "reset_before_apply"}, one)
    assert world.open_buckets() == 1
    world.advance(timedelta(hours=24))
    asyncio.run(scenario())
    (row,) = world.stripe.ledger(after="0" if before is None else "1")["rows"]
    assert (row["value"], row["identifier"] != one["identifier"]) == (value, True)
    assert read(world, one) == Shown(Decimal(value))
    (formula,) = world.sql("SELECT DISTINCT formula FROM meter_events")
    assert formula == ("last",)
    assert world.open_buckets() == 0


def test_a_meter_of_another_formula_settles_no_doubt(world: World) -> None:
    value, change = delta("cus_1", "5", formula="last"), delta("cus_2", "5", event_name=GAUGE)
    assert read(world, value) is None and read(world, change) is None
    in_doubt_by(world, {"fault": "status", "status": 500, "applied": True}, value, change)
    world.advance(timedelta(hours=37))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: len(world.ops_events()) == 2)

    asyncio.run(scenario())
    assert world.states() == {"in_doubt": 2}
    assert world.open_buckets() == 2


def test_a_young_doubt_about_a_value_the_hour_had_before_waits_for_the_day(world: World) -> None:
    """Summaries lag: the 5 that is shown can be the first one."""

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    for sequence, value in enumerate(("5", "7"), 1):
        world.close(gauge(value, sequence=sequence))
        asyncio.run(scenario())
    in_doubt_by(world, {"fault": "reset_before_apply"}, gauge("5", sequence=3))

    class Lagging(StripeSink):
        """Shows the first value for ever, and cannot send."""

        async def send(self, calls: Sequence[Call]) -> list[Answer]:
            return [Answer(Meaning.UNKNOWN, "silence") for _ in calls]

        async def shown(self, intent: Intent) -> Shown | None:
            looked.append(intent.formula)
            return Shown(Decimal(5))

    looked: list[Formula] = []

    async def looking() -> None:
        sink = Lagging(KEY, api_base=world.stripe.url, timeout_seconds=2, connections_max=4)
        async with world.sending(sink):
            await until(lambda: len(looked) >= 2)
        assert world.states() == {"in_doubt": 1, "reported": 2}

    world.advance(timedelta(minutes=15))
    asyncio.run(looking())
    asyncio.run(scenario())
    assert [row["value"] for row in world.stripe.ledger()["rows"]] == ["5", "7", "5"]


def test_an_archived_meter_of_the_same_name_is_not_read(world: World) -> None:
    for status in ("inactive", "active"):
        world.stripe.seed(
            meters=[
                {
                    "id": f"mtr_{status}",
                    "event_name": "swapped",
                    "status": status,
                    "default_aggregation": {"formula": "sum" if status == "inactive" else "last"},
                }
            ]
        )
    one = delta("cus_1", "4", event_name="swapped", formula="last")
    assert read(world, one) == Shown(None)
    assert read(world, {**one, "formula": "sum"}) is None


# -- Too late for the invoice, or for Stripe ---------------------------------------------------------


def test_usage_that_comes_too_late_for_its_invoice_is_given_back_and_never_sent(world: World) -> None:
    late = delta("cus_1", "5", push_before=world.now())
    world.close(late, delta("cus_2", "7", push_before=world.now() + HOUR), delta("cus_3", "9"))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.sql(
        "SELECT stripe_customer, state, error_code, attempts, settled_at IS NOT NULL "
        "FROM meter_events ORDER BY 1"
    ) == [
        ("cus_1", "cancelled", "period_closed", 1, True),
        ("cus_2", "reported", None, 1, True),
        ("cus_3", "reported", None, 1, True),
    ]
    assert [row["value"] for row in world.stripe.ledger()["rows"]] in (["7", "9"], ["9", "7"])
    assert posts(world) == 2
    assert world.bucket(late) == (0, 0, False, this_hour())
    assert world.bucket(delta("cus_2")) == (7, 7, False, None)
    assert world.ops_events() == []


def test_usage_older_than_stripe_takes_is_given_back_without_a_call(world: World) -> None:
    one, value = delta(hours_ago=36 * 24), gauge("3", hours_ago=36 * 24)
    hour = this_hour() - 36 * 24 * HOUR
    world.close(one, value)
    # The item was dirty from an earlier hour; that stays.
    world.sql(
        "UPDATE items SET dirty_from = %s WHERE item_id = %s",
        (hour - HOUR, uuid.UUID(bytes=value["item_id"])),
    )

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.sql("SELECT DISTINCT state, error_code FROM meter_events") == [
        ("cancelled", "too_old_for_stripe")
    ]
    assert world.stripe.stats()["requests"] == []
    assert world.bucket(one) == (0, 0, False, hour)
    assert world.bucket(value) == (None, 3, False, hour - HOUR)
    assert world.ops_events() == []


def test_usage_that_was_only_throttled_until_its_deadline_is_given_back(world: World) -> None:
    one = delta("cus_1", "5", push_before=world.now() + HOUR)
    world.stripe.play({"fault": "status", "status": 429, "match": {"probability": 1.0}})
    world.close(one)

    async def throttled() -> None:
        async with world.sending():
            await until(lambda: posts(world) >= 2)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(throttled())
    assert world.states() == {"pending": 1}
    world.stripe.clear_faults()
    world.advance(HOUR)
    asyncio.run(scenario())
    assert world.states() == {"cancelled": 1}
    assert world.billed() == 0
    assert world.bucket(one) == (0, 0, False, this_hour())


def test_what_may_have_been_applied_is_not_given_back_for_being_late(world: World) -> None:
    one = delta("cus_1", "5", push_before=world.now() + HOUR)
    in_doubt_by(world, {"fault": "reset_before_apply"}, one)
    world.advance(2 * HOUR)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.billed() == 5


def test_a_replacement_that_comes_too_late_is_given_back_once(world: World) -> None:
    one = delta("cus_1", "5", push_before=world.now() + HOUR)
    in_doubt_by(world, {"fault": "reset_before_apply"}, one)
    world.advance(timedelta(hours=24))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"cancelled": 2}
    assert world.billed() == 0
    assert world.bucket(one) == (0, 0, False, this_hour())


def test_many_late_deltas_of_one_customer_are_given_back_quickly(world: World) -> None:
    world.close(*(delta("cus_1", hours_ago=h, push_before=world.now()) for h in range(60)))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world), 10)

    asyncio.run(scenario())
    assert world.states() == {"cancelled": 60}
    assert world.open_buckets() == 0


def test_the_rise_of_a_max_meter_goes_back_to_its_period(world: World) -> None:
    """The same slug of another tenant is a sum."""
    for tenant, aggregation in (("acme", "max"), ("other", "sum")):
        world.sql("INSERT INTO tenants (tenant_id) VALUES (%s)", (tenant,))
        world.sql(
            "INSERT INTO meters (tenant_id, meter, aggregation, event_name) VALUES (%s, %s, %s, %s)",
            (tenant, EVENT, aggregation, EVENT),
        )
    late = world.now()
    rises = [delta("cus_1", "5", hours_ago=1, push_before=late), delta("cus_1", "2", push_before=late)]
    refused, summed = delta("cus_nobody", "3"), delta("cus_1", "9", tenant="other", push_before=late)
    world.close(*rises, refused, summed)

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    with psycopg.connect(world.dsn) as db:
        assert send_again(db) == 1
    assert world.states() == {"cancelled": 3, "failed": 1}
    assert world.bucket(rises[0]) == (None, 0, False, this_hour() - HOUR)
    assert world.bucket(rises[1]) == (None, 0, False, this_hour() - HOUR)
    assert world.bucket(refused) == (None, 0, False, this_hour())
    assert world.bucket(summed) == (0, 0, False, this_hour())

    def closed(one: Record) -> Decimal:
        item = uuid.UUID(bytes=one["item_id"])
        rows = world.sql("SELECT sum(value) FROM item_periods WHERE item_id = %s", (item,))
        return Decimal(rows[0][0])

    assert [closed(one) for one in (rises[0], refused, summed)] == [-7, -3, 0]


def test_a_rise_without_an_item_period_stops_the_sender(world: World) -> None:
    world.sql("INSERT INTO tenants (tenant_id) VALUES ('acme')")
    world.sql(
        "INSERT INTO meters (tenant_id, meter, aggregation, event_name) VALUES ('acme', %s, 'max', %s)",
        (EVENT, EVENT),
    )
    world.close(delta(push_before=world.now()))
    world.sql("DELETE FROM item_periods")

    async def scenario() -> None:
        sender = Sender(world.dsn, world.sink(), SenderConfig(call_timeout_seconds=1.0))
        await asyncio.wait_for(sender.run(), 10)

    with pytest.raises(Broken, match="item period"):
        asyncio.run(scenario())
    assert world.states() == {"pending": 1}


def test_a_bucket_that_moved_to_another_period_is_settled_where_it_is_now(world: World) -> None:
    applied, lost = delta("cus_1", "5"), delta("cus_2", "7", push_before=world.now() + timedelta(days=9))
    in_doubt_by(world, {"fault": "reset_before_apply"}, applied, lost)
    moved = this_hour() - 5 * HOUR
    deadline = world.now() + timedelta(days=2)
    world.sql("UPDATE buckets SET period_start = %s", (moved,))
    world.sql(
        "UPDATE meter_events SET period_start = %s, period_end = %s, push_before = %s",
        (moved, moved + timedelta(days=7), deadline),
    )
    world.advance(timedelta(hours=24))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.billed() == 12
    assert world.open_buckets() == 0
    assert world.sql("SELECT DISTINCT period_start, period_end, push_before FROM meter_events") == [
        (moved, moved + timedelta(days=7), deadline)
    ]


def test_a_bucket_that_moves_during_a_call_is_settled_where_it_is_then(world: World) -> None:
    world.close(delta())
    world.stripe.play({"fault": "slow", "seconds": 0.8, "match": {"probability": 1.0}})
    moved = this_hour() - 5 * HOUR

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: world.states() == {"in_flight": 1})
            with psycopg.connect(world.dsn) as db:
                db.execute("UPDATE meter_events SET period_start = %s", (moved,))
                db.execute("UPDATE buckets SET period_start = %s", (moved,))
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.open_buckets() == 0


# -- What a long campaign found ----------------------------------------------------------------------


def test_bodies_that_stall_take_no_connection_for_ever(world: World) -> None:
    """Stripe's library leaves them open; five of them once used up a pool of four for good."""
    stalled = {"fault": "stall_body", "seconds": 60, "match": {"path": "*/meter_events"}, "times": 7}
    world.stripe.play(stalled)
    world.close(*(delta(f"cus_{n}") for n in range(40)))
    sink = StripeSink(KEY, api_base=world.stripe.url, timeout_seconds=0.3, connections_max=4)

    async def scenario() -> None:
        async with world.sending(sink, timeout=0.3):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 40}
    assert world.billed() == 40


def test_a_claim_that_slept_through_a_day_is_not_sent_as_it_was_decided(world: World) -> None:
    """Monotonic clocks stand still while a machine is suspended; identifiers and deadlines do not."""
    late: list[float] = []

    class Watching(StripeSink):
        async def send(self, calls: Sequence[Call]) -> list[Answer]:
            assert all(isinstance(call, Claim) for call in calls)
            late.extend((world.now() - call.claimed_at).total_seconds() for call in calls)  # type: ignore[attr-defined]
            return await super().send(calls)

    world.close(*(delta(f"cus_{n}") for n in range(12)))

    async def scenario() -> None:
        sink = Watching(KEY, api_base=world.stripe.url, timeout_seconds=2, connections_max=4)
        async with world.sending(sink, rate=4):
            await until(lambda: world.states().get("reported") == 3)
            world.advance(timedelta(hours=25))
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert len(late) >= 12
    assert max(late) < 6
    assert world.billed() == 12


def test_a_correction_is_not_taken_for_applied_by_a_total_that_shows_nothing_yet(
    postgres_dsn: str,
) -> None:
    """5 is reported, -5 is lost, and the summary shows neither: 0, which is what it would show with both."""
    config = SimulatorConfig(port=0, rate_per_second=100_000, summary_lag_seconds=2000)
    with open_world(postgres_dsn, config) as world:

        async def scenario() -> None:
            async with world.sending():
                await until(lambda: settled(world))

        world.close(delta(amount="5"))
        asyncio.run(scenario())
        world.advance(timedelta(seconds=30))
        in_doubt_by(world, {"fault": "reset_before_apply"}, delta(amount="-5", sequence=2))
        world.sql("UPDATE meter_events SET attempts = 4 WHERE state = 'in_doubt'")  # its turn to look
        world.advance(timedelta(minutes=11))
        asyncio.run(scenario())
        assert world.billed() == world.reported() == 0
        assert world.stripe.stats()["ledger_rows"] == 2


# -- Another sink, and logs --------------------------------------------------------------------------


#: The example of the Standard Webhooks specification.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105


def test_a_webhook_is_signed_as_the_specification_says() -> None:
    sink = WebhookSink("http://127.0.0.1:1", secret=SECRET, timeout_seconds=1, clock=lambda: 1614265330.9)
    headers = sink._signature("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ="])
def test_a_webhook_without_a_good_secret_is_misconfigured(secret: str) -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_SINK_WEBHOOK_SECRET"):
        WebhookSink("http://127.0.0.1:1", secret=secret, timeout_seconds=1)


def test_a_webhook_is_a_sink_too(world: World) -> None:
    received: list[tuple[str | None, dict[str, Any]]] = []
    answers = iter([503, 429, 200, 200])

    async def receive(request: web.Request) -> web.Response:
        signed = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode()
        secret = base64.b64decode(SECRET.removeprefix("whsec_"))
        digest = hmac.digest(secret, signed + await request.read(), "sha256")
        assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        received.append((request.headers.get("Idempotency-Key"), await request.json()))
        return web.Response(status=next(answers))

    async def scenario() -> None:
        app = web.Application()
        app.router.add_post("/usage", receive)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://{}:{}/usage".format(*runner.addresses[0])
        async with world.sending(WebhookSink(url, secret=SECRET, timeout_seconds=2)):
            await until(lambda: settled(world))
        await runner.cleanup()

    world.close(delta("cus_1", "1.5", dimensions={"region": "eu"}), delta("cus_1", "2", hours_ago=1))
    asyncio.run(scenario())
    assert len(received) == 4
    assert world.reported() == Decimal("3.5")
    assert {key for key, _ in received} == {body["identifier"] for _, body in received}
    assert {(body["identifier"], body["value"]) for _, body in received} == {
        (delta("cus_1", dimensions={"region": "eu"})["identifier"], "1.5"),
        (delta("cus_1", hours_ago=1)["identifier"], "2"),
    }
    assert {(body["value"], body["formula"], body["dimensions"].get("region")) for _, body in received} == {
        ("1.5", "sum", "eu"),
        ("2", "sum", None),
    }


def test_no_customer_value_or_key_reaches_a_log_line(world: World) -> None:
    world.stripe.seed(customers=["cus_planted1"])
    world.stripe.play(*({**fault, "match": {"path": "*/meter_events"}} for fault in FAULTS))
    world.close(delta("cus_planted1", "31337.42"), delta("cus_planted2", "31337.42"))
    process = world.spawn(timeout=0.5)
    with contextlib.suppress(AssertionError):
        asyncio.run(until(lambda: settled(world), 8))
    process.kill()
    _, logged = process.communicate()
    for secret in ("cus_planted", "31337", KEY, psycopg.conninfo.conninfo_to_dict(world.dsn)["password"]):
        assert secret not in logged
