"""``tidemeter apply`` against a real PostgreSQL, and Stripe as the simulator plays it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from services.cli.apply import Document, apply_document, create_in_stripe, parse_document
from services.cli.main import app
from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.wire.errors import Misconfigured
from services.wire.settings import Settings

Connection = psycopg.Connection[Any]
ANCHORED = "1 month Europe/Budapest 2026-01-31T13:37:42Z"


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def running() -> Iterator[SimulatorControl]:
    with running_simulator(SimulatorConfig(port=0)) as simulator:
        yield simulator


@pytest.fixture
def stripe(running: SimulatorControl) -> SimulatorControl:
    running.reset()
    return running


def tenant(*, meters: str = "", customers: str = "", timezone: str = "Europe/Budapest") -> Document:
    return parse_document(
        f"tenants: [{{id: acme, timezone: {timezone}, meters: [{meters}], customers: [{customers}]}}]"
    )


def meter(slug: str = "m", event_name: str = "e", **fields: str) -> str:
    rest = "".join(f", {name}: {value}" for name, value in fields.items())
    return f"{{slug: {slug}, stripe: {{event_name: {event_name}}}{rest}}}"


def settings(stripe: SimulatorControl) -> Settings:
    return Settings.model_construct(stripe_api_key=SecretStr("sk_test_x"), stripe_api_base=stripe.url)


def in_stripe(stripe: SimulatorControl, path: str) -> list[dict[str, Any]]:
    headers = {"Authorization": "Bearer sk_test_x"}
    answer = httpx.get(f"{stripe.url}/v1/{path}", headers=headers, params={"limit": 100})
    return list(answer.json()["data"])


def customers_of(db: Connection) -> dict[str, tuple[str, str | None]]:
    rows = db.execute("SELECT customer_ref, stripe_customer, calendar FROM customers").fetchall()
    return {row[0]: (row[1], row[2]) for row in rows}


def changes_of(db: Connection) -> list[tuple[str | None, str]]:
    return db.execute("SELECT customer_ref, calendar FROM calendar_changes ORDER BY change_id").fetchall()


def test_a_meter_is_stored_with_its_value_and_its_dimensions_in_their_order(db: Connection) -> None:
    spec = meter(aggregation="max", value="properties.giga bytes", dimensions="[region, tier]", scale="3")
    apply_document(db, tenant(meters=spec))
    row = db.execute("SELECT aggregation, value_property, dimensions, scale FROM meters").fetchone()
    assert row == ("max", "giga bytes", ["region", "tier"], 3)


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ({}, {"aggregation": "max"}, "acme/m aggregates by sum"),
        ({}, {"value": "properties.x"}, "acme/m takes its value from quantity"),
        ({"value": "properties.x"}, {}, "acme/m takes its value from properties.x"),
        ({}, {"dimensions": "[x]"}, "acme/m has no dimensions"),
        ({"dimensions": "[x, y]"}, {"dimensions": "[y, x]"}, "acme/m has the dimensions x, y"),
        (
            {"aggregation": "last"},
            {"aggregation": "sum", "late_policy": "carry_forward", "dimensions": "[x]"},
            "acme/m aggregates by last",
        ),
    ],
)
def test_a_meter_cannot_change_what_it_counts(
    db: Connection, first: dict[str, str], then: dict[str, str], named: str
) -> None:
    apply_document(db, tenant(meters=meter(**first)))
    with pytest.raises(Misconfigured) as refused:
        apply_document(db, tenant(meters=meter(**then), timezone="UTC"))
    assert named in str(refused.value)
    assert "declare a new meter" in str(refused.value)
    assert db.execute("SELECT timezone FROM tenants").fetchone() == ("Europe/Budapest",), (
        "nothing was written"
    )


def test_what_may_change_of_a_meter_is_changed_and_repeating_is_harmless(db: Connection) -> None:
    apply_document(db, tenant(meters=meter(aggregation="unique", value="properties.user")))
    again = tenant(meters=meter(aggregation="unique", value="properties.user", lateness="7d", unit="user"))
    for _ in range(2):
        apply_document(db, again)
    row = db.execute("SELECT lateness_seconds, unit, value_property FROM meters").fetchone()
    assert row == (7 * 86400, "user", "user")
    assert changes_of(db) == []


def test_one_meter_declared_in_two_ways_is_refused(db: Connection) -> None:
    with pytest.raises(Misconfigured, match="acme/m is declared twice"):
        apply_document(db, tenant(meters=f"{meter()}, {meter(aggregation='max')}"))


@pytest.mark.parametrize("other", ["sum", "last"])
def test_a_last_meter_shares_its_event_name_with_no_other_meter_of_its_customers(
    db: Connection, other: str
) -> None:
    apply_document(db, tenant(meters=meter("seats", "shared", aggregation="last")))
    with pytest.raises(Misconfigured, match="share the event_name shared: give them different") as refused:
        apply_document(db, tenant(meters=meter("m", "shared", aggregation=other)))
    assert all(name in str(refused.value) for name in ("acme/seats", "acme/m"))
    assert db.execute("SELECT count(*) FROM meters").fetchone() == (1,)


def test_last_meters_of_two_tenants_may_share_an_event_name(db: Connection) -> None:
    seats = meter("seats", "shared", aggregation="last")
    both = ", ".join(f"{{id: {name}, meters: [{seats}]}}" for name in ("acme", "globex"))
    apply_document(db, parse_document(f"tenants: [{both}]"))
    assert db.execute("SELECT count(*) FROM meters").fetchone() == (2,)


def test_stripes_meters_get_the_formula_that_their_deltas_need(stripe: SimulatorControl) -> None:
    kinds = {"sum": "", "count": "", "max": "", "last": "", "unique": ", value: properties.x"}
    meters = ", ".join(
        f"{{slug: {kind}, aggregation: {kind}, stripe: {{event_name: e-{kind}}}{rest}}}"
        for kind, rest in kinds.items()
    )
    for _ in range(2):  # the second time all are there
        create_in_stripe(tenant(meters=meters), settings(stripe), {})
    found = {
        one["event_name"]: one["default_aggregation"]["formula"]
        for one in in_stripe(stripe, "billing/meters")
    }
    assert found == {"e-sum": "sum", "e-count": "sum", "e-max": "sum", "e-last": "last", "e-unique": "sum"}


@pytest.mark.parametrize(
    ("formula", "aggregation", "needed"),
    [("sum", "last", "last"), ("last", "sum", "sum"), ("count", "count", "sum"), ("last", "max", "sum")],
)
def test_a_stripe_meter_with_another_formula_is_refused_before_anything_is_made(
    stripe: SimulatorControl, formula: str, aggregation: str, needed: str
) -> None:
    stripe.seed(meters=[{"event_name": "taken", "default_aggregation": {"formula": formula}}])
    meters = f"{meter('new', 'new')}, {meter('m', 'taken', aggregation=aggregation)}"
    with pytest.raises(Misconfigured) as refused:
        create_in_stripe(tenant(meters=meters, customers="{ref: c}"), settings(stripe), {})
    assert f"taken has the formula {formula}, but acme/m ({aggregation}) needs {needed}" in str(refused.value)
    assert [one["event_name"] for one in in_stripe(stripe, "billing/meters")] == ["taken"]
    assert in_stripe(stripe, "customers") == []


SUBSCRIPTION = "subscription: {anchor: 2026-01-31T13:37:42Z}"


def test_a_customer_with_a_subscription_is_made_in_stripe_and_stored_with_its_calendar(
    db: Connection, stripe: SimulatorControl
) -> None:
    file = tenant(customers=f"{{ref: c, {SUBSCRIPTION}}}, {{ref: d, timezone: UTC}}, {{ref: e}}")
    apply_document(db, create_in_stripe(file, settings(stripe), {}))
    stored = customers_of(db)
    assert {ref: calendar for ref, (_, calendar) in stored.items()} == {
        "c": ANCHORED,
        "d": "1 month UTC",
        "e": None,
    }
    made = {one["id"]: one["metadata"]["tidemeter_ref"] for one in in_stripe(stripe, "customers")}
    assert made == {stripe_customer: ref for ref, (stripe_customer, _) in stored.items()}
    assert changes_of(db) == [("c", ANCHORED), ("d", "1 month UTC")]


def test_the_example_can_be_applied_again_and_again(
    db: Connection, stripe: SimulatorControl, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", postgres_dsn)
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", "sk_test_x")
    monkeypatch.setenv("TIDEMETER_STRIPE_API_BASE", stripe.url)
    example = Path(__file__).parents[2] / "deploy/example.yaml"
    for _ in range(2):
        result = CliRunner().invoke(app, ["apply", "-f", str(example), "--create-in-stripe"])
        assert (result.exit_code, result.stdout) == (0, "1 tenants, 5 meters, 3 customers applied\n")
    assert len(in_stripe(stripe, "customers")) == len(customers_of(db)) == 3
    assert len(in_stripe(stripe, "billing/meters")) == 5
    assert [customer for customer, _ in changes_of(db)] == ["customer-2", "customer-3"]


def test_a_stored_stripe_id_serves_with_and_without_stripe_being_asked(
    db: Connection, stripe: SimulatorControl
) -> None:
    apply_document(db, tenant(customers="{ref: c, stripe: cus_c}"))
    file = tenant(customers=f"{{ref: c, {SUBSCRIPTION}}}")
    apply_document(db, file)
    assert customers_of(db) == {"c": ("cus_c", ANCHORED)}
    again = create_in_stripe(file, settings(stripe), {("acme", "c"): "cus_c"})
    apply_document(db, again)
    assert customers_of(db) == {"c": ("cus_c", ANCHORED)}
    assert in_stripe(stripe, "customers") == []
    assert changes_of(db) == [("c", ANCHORED)], "repeating is no change"


def test_a_reference_that_is_a_stripe_id_needs_no_other(db: Connection) -> None:
    apply_document(db, tenant(customers=f"{{ref: cus_9, {SUBSCRIPTION}}}, {{ref: cus_8}}"))
    assert customers_of(db) == {"cus_9": ("cus_9", ANCHORED)}


def test_periods_without_a_stripe_id_are_refused_with_what_to_do(db: Connection) -> None:
    with pytest.raises(
        Misconfigured, match="acme/c has billing periods but no Stripe id: .*--create-in-stripe"
    ):
        apply_document(db, tenant(customers=f"{{ref: c, {SUBSCRIPTION}}}"))
    apply_document(db, tenant(customers="{ref: c}, {ref: d, subscription: null}"))
    assert customers_of(db) == {}


def test_a_file_that_does_not_name_periods_leaves_the_stored_ones_and_null_takes_them_away(
    db: Connection,
) -> None:
    apply_document(db, tenant(customers="{ref: c, stripe: cus_1}"))
    db.execute("UPDATE customers SET calendar = %s", (ANCHORED,))  # as a webhook would
    apply_document(db, tenant(customers="{ref: c, stripe: cus_2}"))
    assert customers_of(db) == {"c": ("cus_2", ANCHORED)}
    apply_document(db, tenant(customers="{ref: c, stripe: cus_2, timezone: UTC}"))
    assert customers_of(db) == {"c": ("cus_2", "1 month UTC 2026-01-31T13:37:42Z")}
    apply_document(db, tenant(customers="{ref: c, subscription: null}"))
    assert customers_of(db) == {"c": ("cus_2", None)}
    assert [calendar for _, calendar in changes_of(db)] == [
        ANCHORED,
        "1 month UTC 2026-01-31T13:37:42Z",
        "1 month Europe/Budapest",
    ]


def test_another_time_zone_of_the_tenant_moves_the_subscriptions_that_the_file_names_with_it(
    db: Connection,
) -> None:
    customers = f"{{ref: c, stripe: cus_1, {SUBSCRIPTION}}}, {{ref: d, stripe: cus_2}}"
    apply_document(db, tenant(customers=customers))
    apply_document(db, tenant(customers=customers, timezone="Asia/Tokyo"))
    assert customers_of(db)["c"] == ("cus_1", "1 month Asia/Tokyo 2026-01-31T13:37:42Z")
    assert customers_of(db)["d"] == ("cus_2", None)
    assert changes_of(db)[1:] == [
        (None, "1 month Asia/Tokyo"),
        ("c", "1 month Asia/Tokyo 2026-01-31T13:37:42Z"),
    ]


def test_of_two_files_at_once_with_two_meanings_of_a_meter_one_is_refused(
    db: Connection, postgres_dsn: str
) -> None:
    outcomes: list[str] = []

    def applied(aggregation: str) -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as own:
            try:
                apply_document(own, tenant(meters=meter(aggregation=aggregation)))
                outcomes.append("applied")
            except Misconfigured:
                outcomes.append("refused")

    for _ in range(5):
        db.execute("DELETE FROM meters")
        outcomes.clear()
        threads = [threading.Thread(target=applied, args=(kind,)) for kind in ("sum", "max")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["applied", "refused"]
