"""Failed meter events, error reports, paused meters and doubts settled by hand.

Against a real PostgreSQL and the Stripe simulator, whose ledger of applied events is the oracle.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.pusher import journal
from services.pusher.doubts import CannotSettle, settle_by_hand
from services.pusher.failures import fail_reported
from services.wire.codec import Record
from services.wire.errors import Broken
from tests.integration.pushing import (
    EVENT,
    HOUR,
    World,
    delta,
    gauge,
    send_again,
    settled,
    this_hour,
    until,
)


def push(world: World) -> None:
    """Send until nothing is open."""

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    asyncio.run(scenario())


def tidemeter(world: World, *line: str) -> Any:
    """The command's exit status and what it printed."""
    return CliRunner().invoke(app, line, env={"TIDEMETER_POSTGRES_DSN": world.dsn, "COLUMNS": "300"})


def events(world: World) -> list[tuple[str, str, str]]:
    """Name, source and reason of every ops event."""
    return [(e["name"], e["source"], e["attributes"]["reason"]) for e in world.ops_events()]


# -- Sent again --------------------------------------------------------------------------------------


def test_failed_amounts_go_back_to_their_buckets_once_and_stay_failed(world: World) -> None:
    old = delta("cus_nobody", "6", hours_ago=33 * 24)
    world.close(delta("cus_nobody", "3"), delta("cus_1", "5"), old)
    push(world)
    world.close(delta("cus_nobody", "4", sequence=2))
    push(world)
    # A bucket that was closed again meanwhile stays open.
    world.close(delta("cus_nobody", "2", sequence=3))
    with psycopg.connect(world.dsn) as db:
        assert send_again(db, tenant="other-tenant") == 0
        assert send_again(db, meter="storage") == 0
        assert send_again(db, code="no_meter") == 0
        assert send_again(db, tenant="acme", meter=EVENT, code="meter_event_customer_not_found") == 3
        db.commit()
        assert send_again(db) == 0
    assert world.states() == {"failed": 3, "pending": 1, "reported": 1}
    old_hour = this_hour() - 33 * 24 * HOUR
    assert world.bucket(delta("cus_nobody")) == (2, 2, True, old_hour)
    assert world.bucket(old) == (0, 0, False, old_hour)
    assert world.bucket(delta("cus_1")) == (5, 5, False, None)


def test_a_failed_value_is_given_back_to_be_closed_anew(world: World) -> None:
    one = gauge("3", customer="cus_nobody")
    world.close(one)
    push(world)
    with psycopg.connect(world.dsn) as db:
        assert send_again(db, tenant="acme") == 1
    assert world.bucket(one) == (None, 3, False, this_hour())


def test_nothing_is_given_back_that_has_no_place_to_go_to(world: World) -> None:
    world.close(delta("cus_nobody"))
    push(world)
    world.sql("DELETE FROM buckets")
    with pytest.raises(Broken, match="bucket"), psycopg.connect(world.dsn) as db:
        send_again(db, tenant="acme")
    assert world.states() == {"failed": 1}
    assert world.sql("SELECT released_at FROM meter_events") == [(None,)]


def test_a_failed_meter_event_names_the_one_that_took_its_place(world: World) -> None:
    first, other = delta("cus_nobody", "3"), delta("cus_nobody", "7", hours_ago=1)
    world.close(first, other)
    push(world)
    world.sql("UPDATE buckets SET sequence = 1")
    shown = json.loads(tidemeter(world, "meter-events", "show", first["identifier"], "--json").stdout)
    assert (shown["state"], shown["error_code"]) == ("failed", "meter_event_customer_not_found")
    assert "meter-events retry" in shown["next"]

    dry = tidemeter(world, "meter-events", "retry", "--tenant", "acme", "--dry-run", "--json")
    assert json.loads(dry.stdout) == {"failed": 2, "amount": "10", "released": 0, "not_failed": []}
    assert world.sql("SELECT count(*) FROM meter_events WHERE released_at IS NOT NULL") == [(0,)]
    done = tidemeter(world, "meter-events", "retry", first["identifier"], "--json")
    assert json.loads(done.stdout) == {"failed": 1, "amount": "3", "released": 1, "not_failed": []}
    again = tidemeter(world, "meter-events", "retry", first["identifier"])
    assert again.exit_code == 1
    assert first["identifier"] in again.stderr

    # A delta of before, delivered again, does not hold the amount; the next of its hour does.
    world.stripe.seed(customers=["cus_nobody"], meters=[])
    with psycopg.connect(world.dsn) as db:
        journal.record_intents(db, [first])
    second = delta("cus_nobody", "3", sequence=2)
    world.close(second)
    push(world)
    failed, new = (
        json.loads(tidemeter(world, "meter-events", "show", one["identifier"], "--json").stdout)
        for one in (first, second)
    )
    assert (failed["state"], failed["retried_as"]) == ("failed", second["identifier"])
    assert (new["state"], new["retries"]) == ("reported", [first["identifier"]])
    assert world.billed() == 3
    listed = json.loads(tidemeter(world, "meter-events", "list", "--json").stdout)
    assert [one["identifier"] for one in listed] == [other["identifier"]]
    everything = json.loads(tidemeter(world, "meter-events", "list", "--state", "all", "--json").stdout)
    assert len(everything) == 3


# -- Error reports -----------------------------------------------------------------------------------


def test_an_error_report_fails_a_reported_intent_once(world: World) -> None:
    world.close(delta("cus_1"), delta("cus_2"))
    push(world)
    name = delta("cus_1")["identifier"]
    report = {name: "meter_event_invalid_value", "someone-elses": "no_meter"}
    for expected in ([name], []):
        with psycopg.connect(world.dsn) as db:
            assert fail_reported(db, report, source="webhook", now=world.now()) == expected
    assert world.states() == {"failed": 1, "reported": 1}
    assert [(e["source"], e["subject_id"]) for e in world.ops_events()] == [("webhook", name)]
    assert world.open_buckets() == 0
    assert world.sql("SELECT * FROM paused_meters") == []


def test_an_error_report_of_a_missing_meter_pauses_it_until_stripe_has_it(world: World) -> None:
    world.close(delta("cus_1"), delta("cus_2", event_name="storage"))
    push(world)
    world.deactivate(EVENT)
    report = {delta("cus_1")["identifier"]: "no_meter"}
    for _ in range(2):
        with psycopg.connect(world.dsn) as db:
            fail_reported(db, report, source="webhook", now=world.now())
    assert events(world) == [
        ("meter_reporting_failed", "webhook", "no_meter"),
        ("meter_paused", "webhook", "no_meter"),
    ]
    world.close(delta("cus_3", "4"), delta("cus_3", "2", event_name="storage"))

    async def scenario() -> None:
        async with world.sending() as sender:
            await until(lambda: world.states().get("reported") == 2)
            world.advance(timedelta(minutes=1))
            await until(lambda: world.sql("SELECT probes > 0 FROM paused_meters") == [(True,)])
            assert sender.paused_meters.check()[0] == "degraded"
            assert EVENT in sender.paused_meters.check()[1]
            assert world.states() == {"failed": 1, "reported": 2, "pending": 1}
            world.reactivate(EVENT)
            world.advance(timedelta(minutes=10))
            await until(lambda: settled(world))
            assert sender.paused_meters.check()[0] == "healthy"

    asyncio.run(scenario())
    assert world.states() == {"failed": 1, "reported": 3}
    assert events(world)[2:] == [("meter_resumed", "sync", "no_meter")]


# -- Paused meters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["archived", "unknown"])
def test_usage_of_a_meter_that_is_away_waits_and_fails_nothing(world: World, missing: str) -> None:
    event_name = EVENT if missing == "archived" else "not_yet_there"
    if missing == "archived":
        world.deactivate(EVENT)
    mine = [delta(f"cus_{n}", str(n), event_name=event_name) for n in range(1, 21)]
    world.close(*mine, delta("cus_1", "3", event_name="storage"))

    async def scenario() -> None:
        async with world.sending():
            await until(lambda: world.states() == {"pending": 20, "reported": 1})
            await until(lambda: bool(world.sql("SELECT 1 FROM paused_meters")))
            calls = world.requests("POST /v1/billing/meter_events")
            assert calls >= 2
            await asyncio.sleep(1)
            assert world.requests("POST /v1/billing/meter_events") == calls, "a paused meter costs calls"
            if missing == "archived":
                world.reactivate(EVENT)
            else:
                world.stripe.seed(customers=[], meters=[event_name])
            world.advance(timedelta(minutes=5))
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 21}
    assert world.billed() == sum(range(1, 21)) + 3
    code = "archived_meter" if missing == "archived" else "no_meter"
    assert events(world) == [("meter_paused", "sync", code), ("meter_resumed", "sync", code)]
    assert world.open_buckets() == 0


def test_a_doubt_about_a_paused_meter_is_settled_all_the_same(world: World) -> None:
    world.stripe.play({"fault": "reset_after_apply", "match": {"path": "*/meter_events"}, "remember": False})
    world.close(delta("cus_1", "5"))

    async def doubted() -> None:
        async with world.sending():
            await until(lambda: world.states() == {"in_doubt": 1} or settled(world))

    async def later() -> None:
        async with world.sending():
            await until(lambda: settled(world))

    world.stripe.play({"fault": "reset_before_apply", "match": {"path": "*/meter_events"}, "times": 3})
    asyncio.run(doubted())
    world.sql(
        "INSERT INTO paused_meters (event_name, reason, source, paused_at, next_probe_at) "
        "VALUES (%s, 'archived_meter', 'sync', now(), now() + interval '9 days')",
        (EVENT,),
    )
    world.advance(timedelta(hours=25))
    asyncio.run(later())
    assert world.states() == {"reported": 1}
    assert world.billed() == 5


# -- The journal guards itself -----------------------------------------------------------------------


def test_the_database_lets_no_one_change_what_is_sent_or_skip_a_step(world: World) -> None:
    world.close(delta("cus_1", "5"), delta("cus_nobody", "6"), delta("cus_2", "7", hours_ago=1))
    push(world)
    world.close(delta("cus_4", "1"))
    names = {state: name for name, state in world.sql("SELECT identifier, state FROM meter_events")}
    assert set(names) == {"reported", "failed", "pending"}
    wrong: list[tuple[str, str]] = [
        *((state, change) for state in names for change in ("amount = 60", "stripe_customer = 'cus_9'")),
        *((state, "event_name = 'other'") for state in names),
        *((state, "event_at = event_at + interval '1 second'") for state in names),
        *((state, "formula = 'last'") for state in names),
        *((state, "identifier = 'other'") for state in names),
        ("pending", "state = 'reported'"),
        ("pending", "state = 'failed'"),
        ("pending", "state = 'in_doubt'"),
        ("pending", "state = 'in_flight'"),  # without the moment of the first call
        ("reported", "state = 'pending'"),
        ("reported", "state = 'in_flight'"),
        ("reported", "state = 'cancelled'"),
        ("reported", "first_sent_at = now()"),
        ("failed", "state = 'pending'"),
        ("failed", "state = 'reported'"),
        ("failed", "state = 'cancelled'"),
        ("failed", "attempts = 0"),
        ("failed", "retried_as = 'other'"),
        ("reported", "released_at = now(), released_sequence = 1"),
    ]
    for state, change in wrong:
        with pytest.raises(psycopg.errors.CheckViolation):
            world.sql(f"UPDATE meter_events SET {change} WHERE identifier = %s", (names[state],))  # noqa: S608


# -- Doubts settled by hand --------------------------------------------------------------------------


def doubt(world: World, one: Record) -> None:
    """Have the delta in doubt for a day, with a total that proves nothing."""
    world.close(one)
    world.stripe.play({"fault": "reset_before_apply", "match": {"path": "*/meter_events"}, "times": 50})

    async def lost() -> None:
        async with world.sending():
            await until(lambda: world.states() == {"in_doubt": 1})

    asyncio.run(lost())
    world.stripe.clear_faults()


@pytest.mark.parametrize("applied", [True, False])
def test_a_doubt_that_totals_do_not_settle_is_settled_by_a_person(world: World, applied: bool) -> None:
    one = delta("cus_1", "5")
    doubt(world, one)
    name = one["identifier"]
    early = tidemeter(world, "meter-events", "settle", name, "--applied")
    assert early.exit_code == 2
    assert "settled without you until" in early.stderr
    later = datetime.now(UTC) + timedelta(hours=25)
    with psycopg.connect(world.dsn) as db:
        successor = settle_by_hand(db, name, applied=applied, by="ann", now=later)
        with pytest.raises(CannotSettle, match="not in doubt"):
            settle_by_hand(db, name, applied=applied, by="ann", now=later)
        with pytest.raises(CannotSettle, match="no meter event"):
            settle_by_hand(db, "unknown", applied=applied, by="ann", now=later)
    assert world.sql("SELECT settled_by FROM meter_events WHERE identifier = %s", (name,)) == [("ann",)]
    push(world)
    assert world.open_buckets() == 0
    if applied:
        assert world.states() == {"reported": 1}
        assert world.billed() == 0
    else:
        assert world.states() == {"cancelled": 1, "reported": 1}
        assert world.billed() == 5
        [row] = world.sql("SELECT identifier, replaces FROM meter_events WHERE state = 'reported'")
        assert row == (successor, name)


def test_a_claim_that_a_person_settled_meanwhile_is_lost(world: World) -> None:
    """The sender reads a total while the person decides; what it finds changes nothing any more."""
    one = delta("cus_1", "5")
    doubt(world, one)
    sink = world.sink()
    read = sink.shown
    decided: list[str] = []

    async def slow(intent: Any) -> Any:
        if not decided:
            decided.append(intent.identifier)
            with psycopg.connect(world.dsn) as db:
                settle_by_hand(db, intent.identifier, applied=True, by="ann", now=world.now())
        return await read(intent)

    sink.shown = slow  # type: ignore[method-assign]
    world.advance(timedelta(hours=25))

    async def scenario() -> None:
        async with world.sending(sink):
            await until(lambda: bool(decided))
            await asyncio.sleep(0.5)

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.billed() == Decimal(0)
    assert world.open_buckets() == 0
