"""The doctor beside a real Kafka, a real PostgreSQL and the Stripe simulator: what is broken is found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewPartitions
from typer.testing import CliRunner

from services.cli.main import app
from services.doctor import gather_stripe
from services.doctor.examine import examine
from services.doctor.findings import Report, Severity
from services.stripe_simulator import SimulatorControl, running_simulator
from services.wire.settings import Settings, load_settings
from tests.conftest import renew_topics

KEY = "rk_test_doctor"
SECRET = "main=whsec_" + "a" * 32
EVENT = "acme.calls"


@pytest.fixture(scope="module")
def stripe() -> Iterator[SimulatorControl]:
    with running_simulator() as simulator:
        yield simulator


@pytest.fixture
def settings(
    kafka_bootstrap: str,
    postgres_dsn: str,
    stripe: SimulatorControl,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> Settings:
    """A healthy set-up: topics, tables, a tenant with a meter and a customer, and Stripe's side of both."""
    stripe.call("POST", "reset", {})
    stripe.seed(customers=["cus_acme"], meters=[{"event_name": EVENT, "id": "mtr_calls"}])
    with psycopg.connect(postgres_dsn, autocommit=True) as db:
        db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES ('acme', 'Europe/Budapest')")
        db.execute(
            "INSERT INTO meters (tenant_id, meter, aggregation, event_name) "
            "VALUES ('acme', 'calls', 'sum', %s)",
            (EVENT,),
        )
        db.execute("INSERT INTO customers VALUES ('acme', 'c1', 'cus_acme')")
    for name, value in {
        "DATA_DIR": str(tmp_path),
        "KAFKA_BOOTSTRAP": kafka_bootstrap,
        "POSTGRES_DSN": postgres_dsn,
        "STRIPE_API_BASE": stripe.url,
        "STRIPE_API_KEY": KEY,
        "WEBHOOK_SECRETS": SECRET,
    }.items():
        monkeypatch.setenv(f"TIDEMETER_{name}", value)
    return load_settings()


@pytest.fixture
def db(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(settings.postgres(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def admin(settings: Settings) -> Iterator[AdminClient]:
    """For tests that change topics: they are made anew afterwards."""
    yield AdminClient({"bootstrap.servers": settings.kafka()})
    renew_topics(settings.kafka())


def alter(admin: AdminClient, topic: str, **config: str) -> None:
    """Change a topic, and wait until the broker itself says so."""
    resource = ConfigResource(
        ResourceType.TOPIC,
        topic,
        incremental_configs=[
            ConfigEntry(name.replace("__", "."), value, incremental_operation=AlterConfigOpType.SET)
            for name, value in config.items()
        ],
    )
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()
    wanted = {name.replace("__", "."): value for name, value in config.items()}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        (told,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
        if {name: told.result()[name].value for name in wanted} == wanted:
            return
        time.sleep(0.05)
    raise AssertionError(f"{topic} did not take {wanted}")


def unsafe(report: Report) -> dict[str, str]:
    """Code to subject, of everything that is not only noted."""
    return {one.code: one.subject for one in report.findings if one.severity is not Severity.NOTE}


def call(stripe: SimulatorControl, path: str, **data: Any) -> Any:
    answer = httpx.post(f"{stripe.url}/v1/{path}", data=data, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_healthy_set_up_has_no_finding_but_notes(settings: Settings) -> None:
    report = examine(settings)
    assert unsafe(report) == {}
    assert report.not_checked == ()
    assert {one.code for one in report.findings} <= {"single_broker", "offsets_retention_short"}


def test_every_unsafe_topic_is_found(settings: Settings, admin: AdminClient) -> None:
    alter(admin, "usage.v1", retention__ms=str(86_400_000), retention__bytes="1000000")
    alter(admin, "usage.v2", cleanup__policy="compact", unclean__leader__election__enable="true")
    alter(admin, "usage.v3", max__message__bytes="1000")
    alter(admin, "stripe_webhooks.v1", message__timestamp__type="CreateTime")
    admin.create_partitions([NewPartitions("usage.v1", 6)])["usage.v1"].result()
    admin.delete_topics(["conflicts.v1"])["conflicts.v1"].result()
    assert unsafe(examine(settings)) == {
        "retention_too_short": "usage.v1",
        "retention_by_size": "usage.v1",
        "topic_compacted": "usage.v2",
        "unclean_election": "usage.v2",
        "message_bytes_too_low": "usage.v3",
        "timestamps_not_log_append": "stripe_webhooks.v1",
        "partitions_differ": "usage topics",
        "topic_missing": "conflicts.v1",
    }


def test_a_broker_whose_clock_is_ahead_is_found_by_the_arrivals_that_it_stamped(
    settings: Settings, admin: AdminClient
) -> None:
    alter(admin, "usage.v3", message__timestamp__type="CreateTime")
    ahead = datetime.now(UTC) + timedelta(minutes=30)
    producer, stamped = Producer({"bootstrap.servers": settings.kafka()}), list[int]()
    deadline = time.monotonic() + 20
    while TIMESTAMP_CREATE_TIME not in stamped and time.monotonic() < deadline:  # the log takes a moment
        producer.produce(
            "usage.v3",
            b"x",
            timestamp=int(ahead.timestamp() * 1000),
            on_delivery=lambda _, message: stamped.append(message.timestamp()[0]),
        )
        assert producer.flush(20) == 0
    alter(admin, "usage.v3", message__timestamp__type="LogAppendTime")
    assert unsafe(examine(settings)) == {"clock_skew_large": "Kafka"}


def archived(stripe: SimulatorControl) -> None:
    call(stripe, "billing/meters/mtr_calls/deactivate")


def another(**changes: Any) -> Callable[[SimulatorControl], None]:
    """The meter archived, and another one in its place."""

    def change(stripe: SimulatorControl) -> None:
        archived(stripe)
        stripe.seed(meters=[{"event_name": EVENT, "id": "mtr_other", **changes}])

    return change


def without_permission(path: str) -> Callable[[SimulatorControl], None]:
    return lambda stripe: stripe.play({"fault": "status", "status": 403, "match": {"path": path}, "times": 1})


@pytest.mark.parametrize(
    ("change", "code", "subject"),
    [
        (archived, "meter_archived", "acme/calls"),
        (another(event_name="other"), "meter_archived", "acme/calls"),
        (another(default_aggregation={"formula": "count"}), "meter_formula", "acme/calls"),
        (
            another(customer_mapping={"type": "by_id", "event_payload_key": "who"}),
            "meter_customer_key",
            "acme/calls",
        ),
        (another(value_settings={"event_payload_key": "amount"}), "meter_value_key", "acme/calls"),
        (another(event_time_window="day"), "meter_time_window", "acme/calls"),
        (lambda stripe: stripe.call("POST", "reset", {}), "meter_missing", "acme/calls"),
        (without_permission("/v1/charges/*"), "stripe_permission_missing", "read charges (upkeep)"),
        (without_permission("/v1/billing/meter_events"), "stripe_permission_missing", "write meter events"),
        (
            without_permission("/v2/core/events/*"),
            "stripe_permission_missing",
            "read events of API v2 (dispatcher)",
        ),
        (
            without_permission("*/event_summaries"),
            "stripe_permission_missing",
            "read meter event summaries",
        ),
        (
            lambda stripe: stripe.play(
                {"fault": "status", "status": 500, "match": {"path": "/v1/refunds/*"}, "times": 1}
            ),
            "stripe_unchecked",
            "read refunds (upkeep)",
        ),
    ],
)
def test_what_is_wrong_at_stripe_is_found(
    settings: Settings,
    stripe: SimulatorControl,
    change: Callable[[SimulatorControl], Any],
    code: str,
    subject: str,
) -> None:
    change(stripe)
    assert unsafe(examine(settings)) == {code: subject}


def test_an_address_that_stripe_does_not_know_proves_no_permission(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gather_stripe._BY_ID, "read charges (upkeep)", "/v1/chargess/ch_nobody")
    assert unsafe(examine(settings)) == {"stripe_unchecked": "read charges (upkeep)"}


def test_asking_writes_nothing_at_stripe(settings: Settings, stripe: SimulatorControl) -> None:
    examine(settings)
    assert stripe.ledger()["rows"] == []


def test_the_stream_is_tried_by_a_session(
    settings: Settings, stripe: SimulatorControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_STRIPE_MODE", "stream")
    without_permission("/v2/billing/meter_event_session")(stripe)
    assert unsafe(examine(load_settings())) == {
        "stripe_permission_missing": "open sessions of the meter event stream"
    }


def test_a_key_that_stripe_does_not_know_is_one_finding(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", "nonsense")
    found = unsafe(examine(load_settings()))
    assert found == {"stripe_key_rejected": "TIDEMETER_STRIPE_API_KEY"}


def test_a_live_key_never_reaches_the_simulator(
    settings: Settings, stripe: SimulatorControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", "rk_live_secret")
    monkeypatch.setenv("TIDEMETER_STRIPE_ALLOW_LIVE", "true")
    before = stripe.stats()
    report = examine(load_settings())
    assert unsafe(report) == {"stripe_live_key_elsewhere": "TIDEMETER_STRIPE_API_BASE"}
    assert stripe.stats() == before
    assert "meter_missing" in report.not_checked


def test_what_is_declared_wrongly_is_found(
    settings: Settings, db: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter with more lateness than keys are kept, customers of nobody, zones, periods, a live webhook."""
    db.execute("UPDATE meters SET lateness_seconds = 20 * 86400")
    db.execute(
        "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark, calendar) "
        "VALUES (gen_random_uuid(), 'acme', 'nobody', 'calls', now(), '1 month UTC')"
    )
    db.execute("INSERT INTO stripe_customers VALUES ('cus_gone', '', NULL, now(), now())")
    db.execute("INSERT INTO customers VALUES ('acme', 'gone', 'cus_gone')")
    db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES ('old', 'Asia/Calcutta')")
    db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES ('lost', 'Mars/Olympus')")
    db.execute(
        "INSERT INTO stripe_subscriptions VALUES ('sub_1', '', 'cus_acme', 'active', true, 'month', 1, "
        "'2026-01-15 08:00:00Z', now(), NULL, NULL, now())"
    )
    db.execute(
        "INSERT INTO webhook_events VALUES ('evt_live', 'main', '', 'charge.failed', 'ch_1', false, true, "
        "now(), now(), 1, '', 'stripe_webhooks.v1', 0, 0)"
    )
    monkeypatch.setenv("TIDEMETER_DEDUPE_DAYS", "10")
    assert unsafe(examine(load_settings())) == {
        "lateness_beyond_keys": "acme/calls",
        "customers_unmapped": "customers",
        "customers_deleted": "customers",
        "customers_not_at_stripe": "customers",  # the same deleted one, by Stripe itself
        "zone_alias": "Asia/Calcutta",
        "zone_unknown": "Mars/Olympus",
        "periods_unaligned": "billing periods",
        "stripe_mode_differs": "webhooks",
    }


def test_unsafe_settings_of_postgresql_are_found(settings: Settings, db: psycopg.Connection[Any]) -> None:
    """As our own user finds them: a setting of the database counts, and a migration that is not there."""
    name = db.info.dbname
    db.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    db.execute("DELETE FROM _yoyo_migration WHERE migration_id LIKE '0005%'")
    db.execute("INSERT INTO _yoyo_migration (migration_hash, migration_id) VALUES ('x', '9999.future')")
    assert unsafe(examine(settings)) == {
        "synchronous_commit_off": "PostgreSQL",
        "schema_behind": "PostgreSQL",
        "schema_ahead": "PostgreSQL",
    }


def test_servers_that_are_away_are_findings_and_not_an_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 3, and no check of theirs is called ok."""
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", "postgresql://nobody:x@127.0.0.1:1/none")
    monkeypatch.setattr("services.doctor.gather_kafka.TIMEOUT_SECONDS", 1.0)
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    monkeypatch.setenv("TIDEMETER_STRIPE_API_BASE", "http://127.0.0.1:1")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 3
    document = json.loads(done.stdout)
    assert {one["code"] for one in document["findings"]} == {
        "kafka_unchecked",
        "postgres_unchecked",
        "configuration_unchecked",
        "stripe_unchecked",
    }
    assert {one["severity"] for one in document["findings"]} == {"unchecked"}
    assert {"topic_missing", "fsync_off", "meter_missing", "clock_skew"} <= set(document["not_checked"])
    assert document["healthy"] is False


def test_the_command_shows_each_finding_with_its_fix_and_ends_with_1_on_errors(
    settings: Settings, stripe: SimulatorControl
) -> None:
    archived(stripe)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "error     meter_archived (acme/calls)"
    assert lines[1].strip().startswith("Stripe's meter acme.calls of acme/calls is archived")
    assert lines[2].strip() == "Fix: Reactivate it in Stripe's dashboard."
    assert "1 error" in lines[-2]
    assert lines[-1] == "not checked: customers_not_at_stripe"


def test_secrets_are_in_no_output(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_WEBHOOK_SECRETS", "main=planted-secret")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert "webhook_secrets_invalid" in done.stdout
    for secret in (KEY, "planted-secret", settings.postgres()):
        assert secret not in done.stdout + done.stderr
