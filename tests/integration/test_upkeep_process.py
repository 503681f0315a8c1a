"""The upkeep process as operators run it: alone, with mails, and killed at any moment."""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from services.streaming import outbox
from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.wire.records import OutboxRow
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.topics import OPS
from tests.fault.campaign import some_seed
from tests.integration.upkeeping import (
    Mailbox,
    an_ops_event,
    card_row,
    fee_row,
    free_port,
    mail_server,
    subscription_row,
    told,
)
from tests.pipeline import Pipeline, Worker, trim_topics, until

UPKEEP = [sys.executable, "-m", "services.cli.main", "upkeep"]
KILLS = 10
Connection = psycopg.Connection[Any]


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    try:
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture
def db(pipeline: Pipeline) -> Iterator[Connection]:
    with psycopg.connect(pipeline.dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def stripe() -> Iterator[SimulatorControl]:
    with running_simulator(SimulatorConfig(port=0, rate_per_second=10_000)) as control:
        control.seed(customers=["cus_1"])
        yield control


def mailed(port: int) -> dict[str, str]:
    return {
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(port),
        "SMTP_TLS": "none",
        "MAIL_FROM": "tidemeter@example.com",
        "MAIL_TO": "ops@example.com",
        "MAIL_EVENTS": "all",
    }


def asking(stripe: SimulatorControl) -> dict[str, str]:
    return {
        "STRIPE_API_KEY": "sk_test_upkeep",
        "STRIPE_API_BASE": stripe.url,
        "STRIPE_TIMEOUT_SECONDS": "2",
    }


def events_on_the_topic(pipeline: Pipeline) -> list[dict[str, Any]]:
    decoder = decoder_for(Settings())
    return [decoder.decode(record.value)[1] for record in pipeline.read(OPS)]


def emit(db: Connection, *rows: OutboxRow) -> None:
    """As any service of the product does; the upkeep's relay sends them."""
    with db.transaction():
        outbox.enqueue(db, "tidemeter-upkeep", rows)


def test_without_a_mail_server_and_a_stripe_key_the_rest_works_and_health_says_what_is_off(
    pipeline: Pipeline, db: Connection
) -> None:
    card_row(db, "pm_1", "2026-01-01")
    worker = pipeline.worker("upkeep", UPKEEP).start().await_healthy()
    until(lambda: len(pipeline.read(OPS)) == 1, "the expired card told of", 30, worker.log)
    assert [event["name"] for event in events_on_the_topic(pipeline)] == ["card_expiring"]
    checks = worker.health()["checks"]
    assert "off: no mail server" in checks["mails"]["reason"]
    assert "off: no Stripe key" in checks["stripe"]["reason"]
    assert worker.log().count("no mail server") == 1
    assert worker.stop() == 0
    assert not pipeline.query("SELECT FROM notifications")


@pytest.mark.parametrize(
    "extra",
    [
        {"SMTP_HOST": "127.0.0.1"},
        {"STRIPE_API_KEY": "sk_live_not_allowed"},
        {**mailed(25), "MAIL_EVENTS": "no_such_event"},
    ],
)
def test_a_setting_that_cannot_be_meant_stops_the_start(pipeline: Pipeline, extra: dict[str, str]) -> None:
    worker = pipeline.worker("upkeep", UPKEEP, **extra).start()
    assert worker.ended() == 2
    assert "TIDEMETER_" in worker.log()


def test_ops_events_that_ask_for_it_become_mails_and_a_relayed_duplicate_makes_no_second_one(
    pipeline: Pipeline, db: Connection
) -> None:
    box = Mailbox()
    rows = [an_ops_event(number) for number in range(3)]
    emit(db, *rows, *rows, an_ops_event(7, "meter_resumed"))
    pipeline.send_raw([(OPS, b"k", b"not an ops event", [], None)])
    with mail_server(box) as port:
        chosen = {**mailed(port), "MAIL_EVENTS": "partition_halted"}
        worker = pipeline.worker("upkeep", UPKEEP, **chosen).start().await_healthy()
        until(lambda: len(box.mails) >= 3, "three mails", 60, worker.log)
        until(lambda: len(pipeline.read("dead_letters.v1")) == 1, "the unreadable record parked", 30)
        assert worker.metrics()['tidemeter_notifications_total{result="sent"}'] == 3
        assert worker.stop() == 0
    assert Counter(pipeline.query("SELECT state, count(*) FROM notifications GROUP BY state")) == Counter(
        [("sent", 3)]
    )
    assert len(set(box.ids())) == len(box.mails) == 3
    [parked] = pipeline.read("dead_letters.v1")
    assert parked.value == b"not an ops event"
    assert "ops@example.com" not in worker.log()


def test_with_the_mail_server_away_everything_else_goes_on_and_the_mail_waits(
    pipeline: Pipeline, db: Connection
) -> None:
    emit(db, an_ops_event(1))
    worker = pipeline.worker("upkeep", UPKEEP, **mailed(free_port())).start()
    until(
        lambda: worker.health()["checks"].get("mails", {}).get("status") == "degraded",
        "health says that mails do not go",
        60,
        worker.log,
    )
    assert pipeline.query("SELECT state, error_class FROM notifications") == [
        ("pending", "ConnectionRefusedError")
    ]
    card_row(db, "pm_1", "2026-01-01")
    assert worker.stop() == 0


def test_told_to_stop_inside_a_mail_it_finishes_it_first(pipeline: Pipeline, db: Connection) -> None:
    emit(db, an_ops_event(1))
    box = Mailbox()
    with mail_server(box) as port:
        worker = pipeline.worker("upkeep", UPKEEP, **mailed(port))

        def stop(_: Any) -> str:
            worker.send(signal.SIGTERM)
            until(lambda: "worker stops" in worker.log(), "it heard", 20)
            return "250 OK"

        box.answers = [stop]
        worker.start()
        assert worker.ended(60) == 0
    assert pipeline.query("SELECT state, attempts FROM notifications") == [("sent", 1)]
    assert len(box.mails) == 1


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_killed_at_random_and_inside_mails_it_tells_of_everything_once(
    pipeline: Pipeline, db: Connection, stripe: SimulatorControl
) -> None:
    chance = random.Random(some_seed())  # noqa: S311
    work = lay_out_work(db, stripe)
    box = Mailbox()
    with mail_server(box) as port:
        worker = pipeline.worker("upkeep", UPKEEP, **mailed(port), **asking(stripe))
        for kill in range(KILLS):
            worker.start()
            if kill % 2:
                emit(db, *(an_ops_event(10 * kill + number) for number in range(3)))  # so that a mail comes
                box.answers = [lambda _: _killed(worker)]
                assert worker.ended(60) == -signal.SIGKILL
                box.answers.clear()
            else:
                until(lambda: worker.health()["status"] != "down", "it answers", 60, worker.log)
                time.sleep(3 * chance.random())
                worker.kill()
            let_leases_end(db)
        worker.start()
        until(
            lambda: not open_rows(db), "all settled", 120, lambda: f"{open_rows(db)}\n{worker.log()[-3000:]}"
        )
        assert worker.stop() == 0
    assert_told_once(pipeline, db, work)
    assert_mailed_once(db, box)


def _killed(worker: Worker) -> str:
    """The mail is taken, and who sent it never hears so."""
    worker.kill()
    return "250 OK"


def lay_out_work(db: Connection, stripe: SimulatorControl) -> dict[str, int]:
    """Rows as webhooks leave them, and how many ops events of each name they must become."""
    now = datetime.now(UTC)
    for number in range(120):
        charge = stripe.charge("cus_1", 1000, fee=59)
        fee_row(db, charge["id"], 1000 + (number < 15), due=now)
        if 15 <= number < 30:
            refund = stripe.refund(charge["id"])
            fee_row(db, refund["id"], 1000, kind="refund", charge=charge["id"], due=now)
    client = stripe_client(stripe)
    plan: Any = {"currency": "usd", "unit_amount": 500, "recurring": {"interval": "month"}}
    price = client.v1.prices.create({**plan, "product_data": {"name": "Plan"}})
    for _ in range(25):
        made = stripe.subscribe("cus_1", price.id, status="past_due")
        subscription_row(db, made["id"], past_due_since=now - timedelta(days=20))
    for number in range(60):
        card_row(db, f"pm_{number}", "2026-01-01")
    emit(db, *(an_ops_event(number) for number in range(10)))
    stripe.play({"fault": "slow", "seconds": 0.3, "times": 300})
    return {
        "charge_fee_mismatch": 15,
        "revenue_loss": 15,
        "dunning_exhaustion": 25,
        "card_expiring": 60,
        "partition_halted": 10 + 3 * (KILLS // 2),
    }


def stripe_client(stripe: SimulatorControl) -> Any:
    from stripe import StripeClient

    return StripeClient("sk_test_upkeep", base_addresses={"api": stripe.url})


def let_leases_end(db: Connection) -> None:
    """What the dead process had claimed is free, as if its time had passed."""
    db.execute(
        "UPDATE notifications SET next_attempt_at = next_attempt_at - interval '1 hour' "
        "WHERE state = 'sending'"
    )
    db.execute("UPDATE stripe_fees SET next_attempt_at = now() WHERE state = 'pending'")


def open_rows(db: Connection) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT * FROM (SELECT 'fees', count(*) FROM stripe_fees WHERE state = 'pending' "
        "UNION ALL SELECT 'dunning', count(*) FROM stripe_subscriptions WHERE exhausted_at IS NULL "
        "UNION ALL SELECT 'cards', count(*) FROM stripe_cards WHERE told_for IS NULL "
        "UNION ALL SELECT 'outbox', count(*) FROM outbox "
        "UNION ALL SELECT 'unread', 140 - count(*) FROM notifications "
        "UNION ALL SELECT 'mails', count(*) FROM notifications WHERE state <> 'sent') AS o (name, number) "
        "WHERE number > 0"
    ).fetchall()


def assert_told_once(pipeline: Pipeline, db: Connection, expected: dict[str, int]) -> None:
    """The relay may send a record twice; what it says was decided once, so it is the same to the byte."""
    assert told(db) == []
    said = defaultdict(set)
    names = {}
    for record, event in zip(pipeline.read(OPS), events_on_the_topic(pipeline), strict=True):
        said[event["ops_event_id"]].add(record.value)
        names[event["ops_event_id"]] = event["name"]
    assert {len(values) for values in said.values()} == {1}
    assert Counter(names.values()) == expected
    recorded = db.execute("SELECT ops_event_id FROM notifications").fetchall()
    assert {ops_event_id for (ops_event_id,) in recorded} == set(names)


def assert_mailed_once(db: Connection, box: Mailbox) -> None:
    """By Message-ID every notification is in exactly one mail, however often that was sent."""
    told_by: dict[str, int] = {}
    subjects = defaultdict(set)
    for mail in box.mails:
        key = str(mail["Message-ID"])
        many = re.search(r"\.(\d+)@", key)
        told_by[key] = int(many[1]) if many else 1
        subjects[key].add(str(mail["Subject"]))
    assert {len(texts) for texts in subjects.values()} == {1}
    [(number,)] = db.execute("SELECT count(*) FROM notifications WHERE state = 'sent'").fetchall()
    assert sum(told_by.values()) == number
    assert len(box.mails) > len(told_by), "no kill fell between a mail and its record"
