"""What the command line shows of billing periods and of what waits, from a real PostgreSQL."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from services.cli import status
from services.cli.main import app

Connection = psycopg.Connection[Any]
HOUR = datetime(2026, 11, 1, 12, tzinfo=UTC)
ANCHORED = "1 month UTC 2026-01-31T13:37:42Z"


@pytest.fixture
def db(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", postgres_dsn)
    monkeypatch.setenv("COLUMNS", "300")
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO tenants (tenant_id) VALUES ('acme'), ('globex')")
        yield connection


def shown(*arguments: str) -> Any:
    return json.loads(CliRunner().invoke(app, ["periods", *arguments, "--json"]).stdout)


def printed(*arguments: str) -> str:
    return CliRunner().invoke(app, ["periods", *arguments]).stdout


def carry(db: Connection, tenant: str, customer: str, meter: str, amount: str, reason: str) -> None:
    item = uuid.uuid4()
    db.execute(
        "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, dimensions, calendar) "
        "VALUES (%s, %s, %s, %s, now(), '{eu,gold}', '1 month UTC')",
        (item, tenant, customer, meter),
    )
    db.execute(
        "INSERT INTO carry_forwards (item_id, period_start, hour_start, to_period, to_hour, amount, reason) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (item, HOUR - timedelta(days=31), HOUR - timedelta(days=2), HOUR, HOUR, amount, reason),
    )


def test_changes_of_periods_are_listed_newest_first(db: Connection) -> None:
    db.execute("UPDATE tenants SET timezone = 'Asia/Tokyo' WHERE tenant_id = 'acme'")
    db.execute("UPDATE calendar_changes SET done_at = now(), items = 3, buckets = 7, straddling = 1")
    db.execute("INSERT INTO customers VALUES ('globex', 'c1', 'cus_1', now(), %s)", (ANCHORED,))
    newest, oldest = shown("changes")
    assert (newest["tenant_id"], newest["customer_ref"], newest["calendar"]) == ("globex", "c1", ANCHORED)
    assert newest["done_at"] is None
    assert (oldest["customer_ref"], oldest["calendar"], oldest["straddling"]) == (
        None,
        "1 month Asia/Tokyo",
        1,
    )
    assert shown("changes", "--open") == [newest]
    assert shown("changes", "--tenant", "acme") == [oldest]
    assert shown("changes", "--customer", "c1") == [newest]
    assert shown("changes", "--limit", "1") == [newest]
    assert ANCHORED in printed("changes")


def test_what_was_carried_is_listed_with_the_item_it_is_of(db: Connection) -> None:
    carry(db, "acme", "c1", "requests", "12.500000000", "period_closed")
    carry(db, "globex", "c2", "bytes", "-3", "too_old_for_stripe")
    newest, oldest = shown("carried")
    assert newest["tenant_id"] == "globex"
    assert {
        name: oldest[name] for name in ("tenant_id", "customer_ref", "meter", "dimensions", "amount")
    } == {
        "tenant_id": "acme",
        "customer_ref": "c1",
        "meter": "requests",
        "dimensions": ["eu", "gold"],
        "amount": "12.5",
    }
    assert datetime.fromisoformat(oldest["to_period"]) == HOUR
    assert shown("carried", "--tenant", "acme") == [oldest]
    assert shown("carried", "--meter", "bytes", "--customer", "c2") == [newest]
    assert shown("carried", "--limit", "1") == [newest]
    table = printed("carried")
    assert "eu, gold" in table and "12.5" in table and "too_old_for_stripe" in table


def test_the_status_counts_what_waits_and_what_was_carried(db: Connection) -> None:
    db.execute("UPDATE tenants SET timezone = 'Asia/Tokyo' WHERE tenant_id = 'acme'")
    carry(db, "acme", "c1", "requests", "1", "period_closed")
    for state in ("pending", "approved", "approved", "applied"):
        db.execute(
            "INSERT INTO adjustments (adjustment_id, item_id, tenant_id, customer_ref, meter, "
            "idempotency_key, quantity, occurred_at, arrived_at, watermark, policy, state, topic, partition, "
            '"offset") VALUES (gen_random_uuid(), gen_random_uuid(), %s, %s, %s, %s, 1, now(), now(), now(), '
            "%s, %s, %s, 0, 0)",
            ("acme", "c", "m", "k", "manual", state, "usage.v3"),
        )
    waiting = status._waiting(db)
    assert (waiting["adjustments"], waiting["approved_adjustments"], waiting["calendar_changes"]) == (1, 2, 1)
    assert status._carried_forward(db) == {"period_closed": 1, "too_old_for_stripe": 0}


def test_amounts_of_last_meters_are_counted_but_not_added_up(db: Connection) -> None:
    for number, formula in enumerate(("sum", "sum", "last")):
        db.execute(
            "INSERT INTO meter_events (identifier, item_id, tenant_id, meter, period_start, hour_start, "
            "event_name, stripe_customer, customer_payload_key, value_payload_key, amount, event_at, "
            "period_end, state, formula) VALUES (%s, gen_random_uuid(), 'acme', 'm', now(), now(), 'e', "
            "'cus_1', 'c', 'v', 10, now(), now(), 'reported', %s)",
            (str(number), formula),
        )
    assert status._deltas(db)["reported"] == {"count": 3, "amount": "20"}
