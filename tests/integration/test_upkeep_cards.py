"""Cards that expire: who is told of, and how often."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from services.upkeep.cards import tell
from tests.integration.upkeeping import NOW, card_row, told

Connection = psycopg.Connection[Any]


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


def methods(db: Connection) -> list[str]:
    return sorted(event["attributes"]["payment_method"] for event in told(db))


def test_cards_that_end_within_the_time_and_those_that_have_ended_are_told_of_once(db: Connection) -> None:
    card_row(db, "pm_ends_in_nine_days", "2026-12-01")
    card_row(db, "pm_ended", "2025-03-01")
    card_row(db, "pm_ends_in_forty_days", "2027-01-01")
    assert [tell(db, NOW, 30) for _ in range(2)] == [2, 0]
    assert methods(db) == ["pm_ended", "pm_ends_in_nine_days"]
    event = next(event for event in told(db) if event["attributes"]["last_month"] == "2026-11")
    assert event["name"] == "card_expiring"
    assert event["attributes"]["stripe_customer"] == "cus_1"


def test_a_card_counts_from_the_day_it_comes_within_the_time(db: Connection) -> None:
    card_row(db, "pm_1", "2027-01-01")
    assert tell(db, NOW, 39) == 0
    assert tell(db, NOW, 40) == 1


def test_a_renewed_card_is_told_of_again_when_its_new_time_comes(db: Connection) -> None:
    card_row(db, "pm_1", "2026-12-01")
    assert tell(db, NOW, 30) == 1
    db.execute("UPDATE stripe_cards SET expires_on = '2029-12-01'")
    assert tell(db, NOW, 30) == 0
    assert tell(db, NOW + timedelta(days=3 * 365), 30) == 1
    assert len({event["ops_event_id"] for event in told(db)}) == 2


def test_nobody_is_told_of_a_card_of_a_deleted_customer(db: Connection) -> None:
    card_row(db, "pm_gone", "2026-12-01", customer="cus_gone")
    card_row(db, "pm_here", "2026-12-01", customer="cus_here")
    db.execute(
        "INSERT INTO stripe_customers (stripe_customer, deleted_at, seen_at) "
        "VALUES ('cus_gone', %(now)s, %(now)s), ('cus_here', NULL, %(now)s)",
        {"now": NOW},
    )
    assert tell(db, NOW, 30) == 1
    assert methods(db) == ["pm_here"]


def test_two_processes_share_what_is_due_and_each_card_is_told_of_once(
    db: Connection, postgres_dsn: str
) -> None:
    for number in range(200):
        card_row(db, f"pm_{number}", "2026-12-01")

    def work() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as own:
            while tell(own, NOW, 30, limit=7):
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(methods(db)) == len(set(methods(db))) == 200
