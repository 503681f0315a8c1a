"""Retention: what is deleted, what never is, and that a dry run says the truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.upkeep.pruning import BILLING_DAYS, LOCK_ID, AlreadyRunning, Pruned, count, prune, rules
from services.wire.settings import Settings, load_settings
from tests.integration.upkeeping import NOW, card_row, fee_row, notice, notify, subscription_row

OLD, FRESH = NOW - timedelta(days=91), NOW - timedelta(days=89)
ANCIENT, RECENT = NOW - timedelta(days=BILLING_DAYS + 1), NOW - timedelta(days=BILLING_DAYS - 1)
TABLES = (
    "parked_records",
    "redrives",
    "notifications",
    "stripe_fees",
    "stripe_subscriptions",
    "stripe_invoices",
    "stripe_cards",
)
Connection = psycopg.Connection[Any]


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


def park(db: Connection, offset: int, state: str, settled_at: datetime | None) -> None:
    db.execute(
        'INSERT INTO parked_records (service, kind, topic, partition, "offset", arrived_at, reason, stage, '
        "state, outcome, settled_at) VALUES "
        "('c', 'dead_letter', 'usage.v3', 0, %s, %s, 'r', 's', %s, %s, %s)",
        (offset, ANCIENT, state, "counted" if state == "redriven" else None, settled_at),
    )


def redrive(db: Connection, state: str, finished_at: datetime | None) -> None:
    db.execute(
        "INSERT INTO redrives (service, choice, dry_run, requested_by, requested_at, state, last_id, "
        "selected, finished_at) VALUES ('tidemeter-counters', '{}', false, 'test', %s, %s, 0, 0, %s)",
        (ANCIENT, state, finished_at),
    )


def mail(db: Connection, number: int, state: str, settled_at: datetime | None) -> None:
    notify(db, notice(number))
    db.execute(
        "UPDATE notifications SET state = %s, settled_at = %s WHERE ops_event_id = %s",
        (state, settled_at, f"{number:032x}"),
    )


def fill(db: Connection, now: datetime = NOW) -> None:
    """Of every table one row to delete and the ones beside it that stay."""
    for offset, (state, at) in enumerate(
        [("redriven", OLD), ("discarded", OLD), ("discarded", FRESH), ("parked", None)]
    ):
        park(db, offset, state, at)
    for state, at in [("done", OLD), ("cancelled", OLD), ("done", FRESH), ("paused", None)]:
        redrive(db, state, at)
    for number, (state, at) in enumerate(
        [("sent", OLD), ("dead", OLD), ("sent", FRESH), ("pending", None), ("sending", None)]
    ):
        mail(db, number, state, at)
    for number, (state, at) in enumerate(
        [("matched", ANCIENT), ("matched", RECENT), ("differs", ANCIENT), ("pending", None)]
    ):
        fee_row(db, f"ch_{number}", 1, due=ANCIENT)
        db.execute(
            "UPDATE stripe_fees SET state = %s, settled_at = %s WHERE object_id = %s",
            (state, at, f"ch_{number}"),
        )
    for number, (status, at) in enumerate(
        [("canceled", ANCIENT), ("canceled", RECENT), ("past_due", ANCIENT), ("active", ANCIENT)]
    ):
        subscription_row(db, f"sub_{number}", past_due_since=None, status=status)
        db.execute(
            "UPDATE stripe_subscriptions SET seen_at = %s WHERE subscription_id = %s", (at, f"sub_{number}")
        )
    for number, (status, at) in enumerate(
        [("paid", ANCIENT), ("void", RECENT), ("open", ANCIENT), ("draft", ANCIENT)]
    ):
        db.execute(
            "INSERT INTO stripe_invoices (invoice_id, stripe_customer, status, period_start, period_end, "
            "seen_at, is_cycle) VALUES (%s, 'cus_1', %s, %s, %s, %s, true)",
            (f"in_{number}", status, ANCIENT, ANCIENT, at),
        )
    for number, (end, at) in enumerate([(ANCIENT, ANCIENT), (RECENT, ANCIENT), (ANCIENT, RECENT)]):
        card_row(db, f"pm_{number}", str(end.date()))
        db.execute("UPDATE stripe_cards SET seen_at = %s WHERE payment_method = %s", (at, f"pm_{number}"))


def left(db: Connection) -> dict[str, int]:
    return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}  # type: ignore[index]


def numbers(pruned: list[Pruned]) -> dict[str, int]:
    return {one.table: one.rows for one in pruned}


EXPECTED = {
    "parked_records": 2,
    "redrives": 2,
    "notifications": 2,
    "stripe_fees": 1,
    "stripe_subscriptions": 1,
    "stripe_invoices": 1,
    "stripe_cards": 1,
}


@pytest.mark.parametrize("batch", [1, 2, 5000])
def test_a_run_deletes_what_its_dry_run_counted_and_nothing_open(db: Connection, batch: int) -> None:
    fill(db)
    before = left(db)
    wanted = rules(load_settings())
    counted = count(db, wanted, NOW)
    assert left(db) == before, "a dry run deletes nothing"
    assert db.execute("SELECT FROM audit_log").fetchall() == []
    assert prune(db, wanted, NOW, actor="test", batch=batch) == counted
    assert numbers(counted) == EXPECTED
    assert left(db) == {table: number - EXPECTED[table] for table, number in before.items()}
    for query in (
        "SELECT FROM parked_records WHERE state = 'parked'",
        "SELECT FROM redrives WHERE state = 'paused'",
        "SELECT FROM notifications WHERE state = 'pending'",
        "SELECT FROM stripe_fees WHERE state = 'differs'",
        "SELECT FROM stripe_subscriptions WHERE status = 'past_due'",
        "SELECT FROM stripe_invoices WHERE status = 'open'",
    ):
        assert len(db.execute(query).fetchall()) == 1, query
    assert set(numbers(prune(db, wanted, NOW, actor="test")).values()) == {0}


def test_what_was_deleted_is_in_the_audit_log_row_for_row(db: Connection) -> None:
    fill(db)
    prune(db, rules(load_settings()), NOW, actor="cli:someone", batch=1)
    prune(db, rules(load_settings()), NOW, actor="cli:someone")
    audited = db.execute(
        "SELECT subject, sum((details->>'rows')::int) FROM audit_log "
        "WHERE actor = 'cli:someone' AND action = 'prune' GROUP BY subject"
    ).fetchall()
    assert dict(audited) == EXPECTED
    assert db.execute("SELECT FROM audit_log WHERE (details->>'rows')::int = 0").fetchall() == []


def test_a_time_of_minus_one_keeps_for_ever(db: Connection) -> None:
    fill(db)
    kept = rules(load_settings(parked_settled_days=-1))
    for pruned in (count(db, kept, NOW), prune(db, kept, NOW, actor="test")):
        found = numbers(pruned)
        assert (found["parked_records"], found["redrives"], found["notifications"]) == (0, 0, 0)
        assert found["stripe_fees"] == 1


def test_one_of_several_processes_prunes(db: Connection, postgres_dsn: str) -> None:
    fill(db)
    with psycopg.connect(postgres_dsn, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (LOCK_ID,))
        with pytest.raises(AlreadyRunning):
            prune(db, rules(load_settings()), NOW, actor="test")
        # Closing alone does not wait until the server has let go of the lock.
        other.execute("SELECT pg_advisory_unlock(%s)", (LOCK_ID,))
    assert numbers(prune(db, rules(load_settings()), NOW, actor="test")) == EXPECTED


def test_the_command_shows_first_and_deletes_then(
    db: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", settings.postgres())
    park(db, 1, "discarded", datetime.now(UTC) - timedelta(days=91))
    park(db, 2, "discarded", datetime.now(UTC) - timedelta(days=1))
    shown = [
        json.loads(CliRunner().invoke(app, ["prune", "--json", *more]).stdout) for more in (["--dry-run"], [])
    ]
    assert [one["dry_run"] for one in shown] == [True, False]
    assert [one["tables"] for one in shown][0] == shown[1]["tables"]
    assert shown[1]["tables"][0] == {"table": "parked_records", "days": 90, "rows": 1}
    assert left(db)["parked_records"] == 1
    [(actor,)] = db.execute("SELECT actor FROM audit_log").fetchall()
    assert actor.startswith("cli:")
    printed = CliRunner().invoke(app, ["prune", "--dry-run"])
    assert printed.exit_code == 0
    assert "parked_records" in printed.stdout
