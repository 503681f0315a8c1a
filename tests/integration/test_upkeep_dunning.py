"""Subscriptions past due for too long, against a real stripe-python and the simulated Stripe."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from stripe import StripeClient

from services.streaming.database import Database
from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.upkeep.dunning import PAGE_MAX, Dunning, Fresh, page, store
from services.wire.stripe_reader import StripeReader
from tests.integration.upkeeping import NOW, subscription_row, told

LONG_AGO = NOW - timedelta(days=15)
Connection = psycopg.Connection[Any]


@pytest.fixture
def stripe() -> Iterator[SimulatorControl]:
    with running_simulator(SimulatorConfig(port=0, rate_per_second=10_000)) as control:
        control.seed(customers=["cus_1"], meters=["api_calls"])
        yield control


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def subscribed(stripe: SimulatorControl) -> str:
    """A subscription that is past due at Stripe."""
    client = StripeClient("sk_test_dunning", base_addresses={"api": stripe.url})
    plan = {"currency": "usd", "unit_amount": 500, "recurring": {"interval": "month"}}
    price = client.v1.prices.create({**plan, "product_data": {"name": "Plan"}})
    return str(stripe.subscribe("cus_1", price.id, status="past_due")["id"])


def sweep(dsn: str, base: str, *, rounds: int = 1) -> tuple[str, str]:
    """Rounds of the job; what its check says then."""

    async def go() -> tuple[str, str]:
        reader = StripeReader("sk_test_dunning", api_base=base, timeout_seconds=2)
        database = Database(dsn, "test")
        job = Dunning(database, reader, days=14, clock=lambda: NOW)
        for _ in range(rounds):
            await job.step()
        await reader.close()
        database.reset()
        return job.check()

    return asyncio.run(go())


def stored(db: Connection) -> tuple[Any, ...] | None:
    return db.execute(
        "SELECT status, past_due_since, exhausted_at, seen_at FROM stripe_subscriptions"
    ).fetchone()


def test_a_subscription_that_is_still_past_due_after_two_weeks_is_told_once(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    assert sweep(postgres_dsn, stripe.url, rounds=3)[0] == "healthy"
    assert stored(db) == ("past_due", LONG_AGO, NOW, NOW)
    [event] = told(db)
    assert (event["name"], event["source"]) == ("dunning_exhaustion", "sweeper")
    assert event["attributes"]["subscription_id"] == subscribed
    assert (event["attributes"]["from_status"], event["attributes"]["to_status"]) == ("past_due", "past_due")


def test_one_that_is_past_due_for_less_is_left_alone(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    since = NOW - timedelta(days=13)
    subscription_row(db, subscribed, past_due_since=since)
    sweep(postgres_dsn, stripe.url)
    assert stored(db) == ("past_due", since, None, NOW - timedelta(days=20))


@pytest.mark.parametrize("status", ["unpaid", "canceled"])
def test_one_that_stripe_gave_up_while_webhooks_were_late_is_told_with_its_new_status(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str, status: str
) -> None:
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    stripe.set_subscription(subscribed, status=status, reason="payment_failed")
    sweep(postgres_dsn, stripe.url)
    [event] = told(db)
    assert event["attributes"]["to_status"] == status
    row = stored(db)
    assert row is not None
    assert row[0] == status


def test_one_that_was_paid_while_webhooks_were_late_is_stored_so_and_nothing_is_told(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    stripe.set_subscription(subscribed, status="active")
    sweep(postgres_dsn, stripe.url)
    assert stored(db) == ("active", None, None, NOW)
    assert told(db) == []


def test_one_that_its_customer_ended_did_not_run_out_of_tries(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    stripe.set_subscription(subscribed, status="canceled", reason="cancellation_requested")
    sweep(postgres_dsn, stripe.url)
    assert stored(db) == ("canceled", None, None, NOW)
    assert told(db) == []


def test_while_stripe_is_away_it_is_left_for_later_and_health_says_so(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    stripe.play({"fault": "status", "status": 503, "times": 2})
    assert sweep(postgres_dsn, stripe.url, rounds=2)[0] == "degraded"
    assert told(db) == []
    assert sweep(postgres_dsn, stripe.url)[0] == "healthy"
    assert len(told(db)) == 1


def test_one_that_stripe_gives_no_answer_about_holds_up_no_other(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    subscription_row(db, "sub_that_fails", past_due_since=LONG_AGO - timedelta(days=1))
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    stripe.play({"fault": "status", "status": 500, "times": 9, "match": {"path": "*/sub_that_fails"}})
    assert sweep(postgres_dsn, stripe.url, rounds=2)[0] == "degraded"
    assert [event["attributes"]["subscription_id"] for event in told(db)] == [subscribed]


def test_a_stripe_that_is_away_is_asked_no_more_than_a_few_times_a_round(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl
) -> None:
    for number in range(20):
        subscription_row(db, f"sub_{number}", past_due_since=LONG_AGO)
    stripe.play({"fault": "status", "status": 503, "times": 3})
    assert "503" in sweep(postgres_dsn, stripe.url)[1]
    assert "20 subscriptions" in sweep(postgres_dsn, stripe.url)[1], "the three faults were all used up"


def test_one_that_stripe_does_not_have_holds_up_no_other(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, subscribed: str
) -> None:
    for number in range(PAGE_MAX + 5):
        subscription_row(db, f"sub_of_nobody_{number}", past_due_since=LONG_AGO - timedelta(days=1))
    subscription_row(db, subscribed, past_due_since=LONG_AGO)
    status, reason = sweep(postgres_dsn, stripe.url)
    assert (status, str(PAGE_MAX + 5) in reason) == ("degraded", True)
    assert [event["attributes"]["subscription_id"] for event in told(db)] == [subscribed]


def test_a_webhook_that_came_while_stripe_was_asked_wins(db: Connection) -> None:
    subscription_row(db, "sub_1", past_due_since=LONG_AGO)
    [overdue] = page(db, NOW)
    db.execute("UPDATE stripe_subscriptions SET seen_at = %s", (NOW,))
    assert not store(db, overdue, Fresh("past_due", wanted=False, asked_at=NOW), NOW)
    assert told(db) == []


def test_of_two_processes_that_asked_only_one_tells(db: Connection) -> None:
    subscription_row(db, "sub_1", past_due_since=LONG_AGO)
    [overdue] = page(db, NOW)
    fresh = Fresh("past_due", wanted=False, asked_at=NOW)
    assert [store(db, overdue, fresh, NOW) for _ in range(2)] == [True, False]
    assert len(told(db)) == 1


def test_one_that_was_paid_and_became_past_due_again_is_another_exhaustion(db: Connection) -> None:
    subscription_row(db, "sub_1", past_due_since=LONG_AGO)
    fresh = Fresh("past_due", wanted=False, asked_at=NOW)
    [overdue] = page(db, NOW)
    store(db, overdue, fresh, NOW)
    again: datetime = NOW + timedelta(days=40)
    db.execute("UPDATE stripe_subscriptions SET past_due_since = %s, exhausted_at = NULL", (again,))
    [overdue] = page(db, again + timedelta(days=14))
    assert store(db, overdue, fresh, again + timedelta(days=14))
    assert len({event["ops_event_id"] for event in told(db)}) == 2
