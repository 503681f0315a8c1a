"""Dispatch of webhooks with a real PostgreSQL: once in effect, in order, stale, failing, dead, taken over."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, running_simulator
from services.webhooks import store
from services.webhooks.deciding import Policy
from services.webhooks.handling import Refused, Unfinished, WebhookEvent
from services.wire.errors import OffsetGap
from services.wire.records import OutboxRow, ops_event
from tests.conftest import Servers
from tests.integration.dispatching import (
    QUICK,
    T0,
    TOPIC,
    Desk,
    Gate,
    envelope,
    note,
    planted,
    snapshot,
    thin,
)
from tests.pipeline import until


@pytest.fixture
def desk(postgres_dsn: str) -> Iterator[Desk]:
    yield Desk(postgres_dsn)


def raising(error: BaseException, times: int = 10**6) -> Any:
    """A ``fetch`` that fails so many times."""
    left = [times]

    def fetch(event: WebhookEvent, _: stripe.StripeClient) -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "fetched"

    return fetch


# -- Intake ----------------------------------------------------------------------------------------------


def test_an_event_is_stored_with_what_it_says_and_one_run(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1", "customer.updated", "cus_1", at=7, account="acct_1"))
    [row] = desk.query(
        "SELECT endpoint, account, event_type, object_id, is_thin, livemode, created_at, received_at, "
        'deliveries, topic, partition, "offset" FROM webhook_events'
    )
    assert row[:6] == ("main", "acct_1", "customer.updated", "cus_1", False, False)
    assert row[6] == datetime.fromtimestamp(T0 + 7, UTC)
    assert row[7] == datetime.fromtimestamp(T0 + 1, UTC)
    assert row[8:] == (1, TOPIC, 0, 0)
    runs = desk.query("SELECT handler, subject, state, attempts FROM webhook_runs")
    assert runs == [("tidemeter", '["acct_1","cus_1"]', "received", 0)]


def test_a_thin_event_has_its_time_in_words_and_its_account_in_the_context(desk: Desk) -> None:
    desk.deliver(thin("evt_t", "v1.thing", "obj_9", "2026-09-21T14:13:20.250Z", context="acct_7"))
    [row] = desk.query("SELECT account, is_thin, created_at, object_id FROM webhook_events")
    assert row == ("acct_7", True, datetime(2026, 9, 21, 14, 13, 20, 250_000, UTC), "obj_9")


def test_the_subject_of_a_fact_is_the_event_and_that_of_a_state_its_object(desk: Desk) -> None:
    handlers = (planted("a.state"), planted("a.fact", is_state=False))
    desk.deliver(
        snapshot("evt_1", "a.state"),
        snapshot("evt_2", "a.fact"),
        snapshot("evt_3", "nobody.knows"),
        handlers=handlers,
    )
    assert dict(desk.query("SELECT event_id, subject FROM webhook_runs")) == {
        "evt_1": '["","obj_1"]',
        "evt_2": '["","evt_2"]',
        "evt_3": '["","obj_1"]',
    }


def test_a_delivery_again_is_counted_and_has_no_second_effect(desk: Desk) -> None:
    event = snapshot("evt_1")
    desk.deliver(event, event)
    with desk.dispatching():
        desk.until_settled()
        desk.deliver(event)
        desk.deliver(event, snapshot("evt_2", at=1))
        desk.until_settled()
    assert desk.query("SELECT event_id, deliveries FROM webhook_events ORDER BY 1") == [
        ("evt_1", 4),
        ("evt_2", 1),
    ]
    assert desk.effects() == ["evt_1", "evt_2"], desk.query("SELECT * FROM webhook_runs")


def test_a_chunk_that_comes_again_is_skipped(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1"), first_offset=0)
    assert desk.deliver(snapshot("evt_1"), first_offset=0).redelivered
    assert desk.query("SELECT deliveries FROM webhook_events") == [(1,)]
    desk.deliver(snapshot("evt_1"), snapshot("evt_2"), first_offset=0)
    assert desk.query("SELECT event_id, deliveries FROM webhook_events ORDER BY 1") == [
        ("evt_1", 1),
        ("evt_2", 1),
    ]
    with pytest.raises(OffsetGap):
        desk.deliver(snapshot("evt_9"), first_offset=5)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "undecodable"),
        (b"garbage", "undecodable"),
        (b"\xc3\x01" + bytes(8), "unknown_schema"),
        (envelope(b"{"), "invalid_webhook"),
        (envelope(b"[" * 100_000), "invalid_webhook"),
        (envelope(b"{}"), "invalid_webhook"),
        (envelope(snapshot("evt_1"), event_id="evt_2"), "invalid_webhook"),
        (envelope(snapshot("evt_1"), event_type="other"), "invalid_webhook"),
        (envelope(snapshot("evt_1"), object_id="a\x00b"), "invalid_webhook"),
        (envelope(snapshot("e" * 300)), "invalid_webhook"),
        (envelope({**snapshot("evt_1"), "created": "soon"}), "invalid_webhook"),
        (envelope({**snapshot("evt_1"), "created": "2026-01-01T00:00:00"}), "invalid_webhook"),
        (envelope({**snapshot("evt_1"), "created": 10**30}), "invalid_webhook"),
        (envelope({**snapshot("evt_1"), "data": {"object": []}}, object_id="x"), "invalid_webhook"),
        (envelope({**snapshot("evt_1"), "object": "charge"}), "invalid_webhook"),
        (envelope(snapshot("evt_1")) + b"more", "undecodable"),
    ],
)
def test_what_is_no_event_is_parked_as_it_came_and_told_of_once(
    desk: Desk, value: bytes, reason: str
) -> None:
    desk.deliver(value, snapshot("evt_good"))
    assert desk.states() == {"evt_good": "received"}
    [parked] = desk.outbox("dead_letters.v1")
    assert parked["value"] == value
    assert parked["tidemeter-error-reason"] == reason
    assert parked["__connect.errors.offset"] == "0"
    [told] = desk.outbox()
    assert (told["name"], told["attributes"]) == ("webhook_dead_lettered", {"reason": reason})


def test_a_partition_halts_in_front_of_a_flood_of_what_is_no_event(desk: Desk) -> None:
    applied = desk.deliver(*[b"garbage"] * 150)
    assert (applied.next_offset, applied.halted) == (99, "too_many_parked")


def test_a_large_body_is_taken(desk: Desk) -> None:
    body = snapshot("evt_1")
    body["data"]["object"]["text"] = "x" * 250_000
    desk.deliver(body)
    assert desk.states() == {"evt_1": "received"}


# -- Order -----------------------------------------------------------------------------------------------


def test_events_of_one_object_are_handled_oldest_first(desk: Desk) -> None:
    desk.deliver(*(snapshot(f"evt_{n}", at=n) for n in (5, 3, 1, 4, 2)))
    with desk.dispatching():
        desk.until_settled()
    assert desk.effects() == [f"evt_{n}" for n in (1, 2, 3, 4, 5)]


def test_an_older_event_after_a_newer_one_changes_nothing(desk: Desk) -> None:
    told: list[str] = []
    handler = planted(fetch=lambda event, _: told.append(event.event_id))
    with desk.dispatching(handler):
        desk.deliver(snapshot("evt_new", at=10))
        desk.until_settled()
        desk.deliver(
            snapshot("evt_old", at=9),
            snapshot("evt_same", at=10),
            snapshot("evt_other", "thing.changed", "obj_2"),
        )
        desk.until_settled()
    assert desk.states() == {
        "evt_new": "succeeded",
        "evt_old": "stale",
        "evt_same": "succeeded",
        "evt_other": "succeeded",
    }
    assert sorted(desk.effects()) == ["evt_new", "evt_other", "evt_same"]
    assert "evt_old" not in told, "Stripe is not asked for what is stale"
    newest = desk.query("SELECT newest_at FROM webhook_subjects WHERE subject LIKE '%%obj_1%%'")
    assert newest == [(datetime.fromtimestamp(T0 + 10, UTC),)]


def test_a_fact_is_never_stale(desk: Desk) -> None:
    handler = planted(is_state=False)
    with desk.dispatching(handler):
        for name, at in (("evt_new", 10), ("evt_old", 1)):
            desk.deliver(snapshot(name, at=at), handlers=(handler,))
            desk.until_settled()
    assert desk.effects() == ["evt_new", "evt_old"]
    assert desk.query("SELECT count(*) FROM webhook_subjects") == [(0,)]


def test_what_nobody_handles_is_done_and_makes_nothing_stale(desk: Desk) -> None:
    with desk.dispatching():
        desk.deliver(snapshot("evt_unknown", "thing.looked_at", at=10))
        desk.until_settled()
        desk.deliver(snapshot("evt_old", at=1))
        desk.until_settled()
        desk.deliver(snapshot("evt_older_unknown", "thing.looked_at", at=0))
        desk.until_settled()
    assert desk.states() == {
        "evt_unknown": "succeeded",
        "evt_old": "succeeded",
        "evt_older_unknown": "stale",
    }
    assert desk.effects() == ["evt_old"]


def test_accounts_that_share_an_id_do_not_wait_for_each_other(desk: Desk) -> None:
    one = snapshot("evt_1", object_id="ca_1", at=5, account="acct_1")
    two = snapshot("evt_2", object_id="ca_1", at=1, account="acct_2")
    with desk.dispatching():
        desk.deliver(one)
        desk.until_settled()
        desk.deliver(two)
        desk.until_settled()
    assert set(desk.states().values()) == {"succeeded"}


def test_a_later_event_waits_while_an_earlier_one_backs_off_and_goes_once_that_is_dead(desk: Desk) -> None:
    slow = Policy(attempts_max=2, retry_seconds=3600, retry_max_seconds=3600, timeout_seconds=20)
    bad = planted("bad.thing", fetch=raising(ValueError("secret")))
    handlers = (bad, planted())
    desk.deliver(
        snapshot("evt_1", "bad.thing", at=1),
        snapshot("evt_2", at=2),
        snapshot("evt_else", object_id="obj_2"),
        handlers=handlers,
    )
    with desk.dispatching(*handlers, policy=slow):
        desk.until_state("evt_1", "failed")
        desk.until_state("evt_else", "succeeded")
        assert desk.run("evt_2") == ("received", 0, None, None)
        desk.clock.leap(hours=2)
        desk.until_state("evt_1", "dead")
        desk.until_state("evt_2", "succeeded")
    assert desk.effects() == ["evt_else", "evt_2"]


def test_two_dispatchers_keep_the_order_and_do_nothing_twice(desk: Desk) -> None:
    events = [snapshot(f"evt_{n:03d}", object_id=f"obj_{n % 7}", at=n) for n in range(140)]
    desk.deliver(*reversed(events))
    flaky = planted(fetch=raising(ConnectionError(), times=20))
    patient = Policy(retry_seconds=0.05, retry_max_seconds=0.05)
    with desk.dispatching(flaky, policy=patient), desk.dispatching(flaky, policy=patient):
        desk.until_settled(60)
    done = desk.effects()
    assert sorted(done) == [event["id"] for event in events]
    for number in range(7):
        mine = [name for name in done if int(name[4:]) % 7 == number]
        assert mine == sorted(mine)


# -- Failure ---------------------------------------------------------------------------------------------


def test_a_handler_that_fails_goes_dead_after_its_attempts_with_one_event_and_one_parked_record(
    desk: Desk,
) -> None:
    many = Policy(attempts_max=25, retry_seconds=1, retry_max_seconds=3600, timeout_seconds=20)
    handler = planted(fetch=raising(ValueError("secret")))
    body = snapshot("evt_1")
    desk.deliver(body)
    before = datetime.now(UTC)
    while desk.run("evt_1")[0] != "dead":
        attempts = desk.run("evt_1")[1]
        with desk.dispatching(handler, policy=many):  # every attempt in a process of its own
            until(lambda: desk.run("evt_1")[1] > attempts, "another attempt")  # noqa: B023
            until(lambda: desk.run("evt_1")[0] != "processing", "its end")
        [(due,)] = desk.query("SELECT next_attempt_at FROM webhook_runs")
        wait = (due - desk.clock()).total_seconds()
        if desk.run("evt_1")[0] == "failed":
            expected = min(3600, 2**attempts)
            assert expected - 10 < wait <= expected
            desk.clock.leap(seconds=wait + 0.1)
    assert desk.run("evt_1") == ("dead", 25, "ValueError", None)
    assert (desk.clock() - before).total_seconds() > 12 * 3600
    [told] = desk.outbox()
    assert told["name"] == "webhook_dlq.dead_lettered"
    assert told["attributes"] == {
        "event_id": "evt_1",
        "type": "thing.changed",
        "handler": "tidemeter",
        "attempts": "25",
        "error_class": "ValueError",
        "reason": "attempts_exhausted",
    }
    [parked] = desk.outbox("dead_letters.v1")
    assert b'"evt_1"' in parked["value"]
    assert (parked["__connect.errors.topic"], parked["__connect.errors.offset"]) == (TOPIC, "0")
    assert parked["tidemeter-error-event-id"] == "evt_1"
    assert "secret" not in str(desk.query("SELECT value, headers FROM outbox")) + str(
        desk.query("SELECT error_class, error_code FROM webhook_runs")
    )


def test_what_is_refused_is_dead_at_once(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(fetch=raising(Refused("no_such_customer")))):
        desk.until_settled()
    assert desk.run("evt_1") == ("dead", 1, "Refused", "no_such_customer")
    [parked] = desk.outbox("dead_letters.v1")
    assert parked["tidemeter-error-reason"] == "no_such_customer"


def test_an_effect_that_fails_half_way_leaves_nothing(desk: Desk) -> None:
    def half(db: Any, event: WebhookEvent, found: Any, now: datetime) -> Sequence[OutboxRow]:
        note(db, event, found, now)
        db.execute("SELECT 1 / 0")
        return ()

    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(apply=half)):
        desk.until_settled()
    assert desk.run("evt_1") == ("dead", 3, "DivisionByZero", "22012")
    assert desk.effects() == []
    assert desk.query("SELECT count(*) FROM webhook_subjects") == [(0,)]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_built_in_handler_that_wants_to_end_the_process_ends_its_attempt(
    desk: Desk, error: BaseException
) -> None:
    desk.deliver(snapshot("evt_1"), snapshot("evt_2", "other.thing", "obj_2"))
    with desk.dispatching(planted(fetch=raising(error)), planted("other.thing")):
        desk.until_settled()
    assert desk.run("evt_1")[0] == "dead"
    assert desk.run("evt_2")[0] == "succeeded"


def test_what_a_handler_returns_leaves_through_the_outbox_with_its_effect(desk: Desk) -> None:
    def tell(db: Any, event: WebhookEvent, found: Any, now: datetime) -> Sequence[OutboxRow]:
        assert event.data == {"id": "obj_1", "note": "evt_1"}
        assert event.previous == {"note": "before"}
        return [
            ops_event("charge_failed", subject_type="x", subject_id=event.event_id, source="test", at_us=1)
        ]

    body = snapshot("evt_1")
    body["data"]["previous_attributes"] = {"note": "before"}
    desk.deliver(body)
    with desk.dispatching(planted(apply=tell)):
        desk.until_settled()
    assert [one["name"] for one in desk.outbox()] == ["charge_failed"]


def test_a_handler_asks_stripe_for_the_account_of_the_event(desk: Desk) -> None:
    seen: list[Any] = []

    def look(event: WebhookEvent, client: stripe.StripeClient) -> str:
        options = client._requestor._options
        seen.append((event.event_id, options.stripe_account, options.stripe_context))
        try:
            client.v1.billing.meters.retrieve("mtr_none")
        except stripe.InvalidRequestError as error:
            assert error.code == "resource_missing"
            return "asked"
        return "found"

    handler = planted("thing.changed", "v1.thing", fetch=look)
    desk.deliver(
        snapshot("evt_own", object_id="a"),
        snapshot("evt_theirs", object_id="b", account="acct_1"),
        thin("evt_thin", "v1.thing", "c", "2026-09-21T14:13:20Z", context="acct_2"),
        handlers=(handler,),
    )
    with (
        running_simulator(SimulatorConfig(port=0)) as simulator,
        desk.dispatching(handler, stripe_base=simulator.url),
    ):
        desk.until_settled()
    assert desk.query("SELECT DISTINCT note FROM effects") == [("asked",)]
    assert sorted(seen) == [
        ("evt_own", None, None),
        ("evt_theirs", "acct_1", None),
        ("evt_thin", None, "acct_2"),
    ]


def test_stripe_being_away_is_a_failed_attempt_with_its_code(desk: Desk) -> None:
    def look(event: WebhookEvent, client: stripe.StripeClient) -> Any:
        return client.v1.billing.meters.retrieve("mtr_none")

    slow = Policy(attempts_max=25, retry_seconds=3600, retry_max_seconds=3600, timeout_seconds=20)
    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(fetch=look), policy=slow):
        desk.until_state("evt_1", "failed")
    assert desk.run("evt_1")[:3] == ("failed", 1, "APIConnectionError")


def test_sessions_that_postgresql_ends_cost_no_attempt(desk: Desk) -> None:
    gate = Gate()

    def wait(event: WebhookEvent, _: stripe.StripeClient) -> None:
        gate.pass_through()

    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(fetch=wait)):
        assert gate.reached.wait(30)
        desk.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        gate.opened.set()
        desk.until_settled()
    assert desk.run("evt_1") == ("succeeded", 1, None, None)
    assert desk.effects() == ["evt_1"]


def test_postgresql_being_away_for_longer_than_the_lease_costs_no_attempt(
    desk: Desk, servers: Servers
) -> None:
    gate, name = Gate(), urlsplit(desk.dsn).path[1:]
    desk.deliver(snapshot("evt_1"))
    with (
        psycopg.connect(servers.postgres, autocommit=True) as admin,
        desk.dispatching(planted(fetch=lambda *_: gate.pass_through()), concurrency=1) as dispatcher,
    ):
        assert gate.reached.wait(30)
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        desk.clock.leap(hours=1)
        gate.opened.set()
        until(lambda: dispatcher.check()[0] == "unhealthy", "the outage seen")
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        desk.until_settled()
    assert desk.run("evt_1") == ("succeeded", 1, None, None)
    assert desk.effects() == ["evt_1"]


def test_what_postgresql_never_takes_is_given_up_with_its_lease(desk: Desk) -> None:
    def cancelled(db: Any, event: WebhookEvent, found: Any, now: datetime) -> Sequence[OutboxRow]:
        desk.clock.leap(minutes=1)
        db.execute("SET LOCAL statement_timeout = 1")
        db.execute("SELECT pg_sleep(1)")
        return ()

    desk.deliver(snapshot("evt_1"), snapshot("evt_2", "other.thing", at=1))
    with desk.dispatching(planted(apply=cancelled), planted("other.thing"), concurrency=1):
        desk.until_settled()
    assert desk.run("evt_1") == ("dead", 3, "LeaseEnded", "not_finished")
    assert desk.effects() == ["evt_2"]


# -- Leases ----------------------------------------------------------------------------------------------


def test_a_run_whose_claimer_is_gone_is_taken_over_and_the_zombie_changes_nothing(desk: Desk) -> None:
    gate = Gate()
    zombie = planted(fetch=lambda *_: gate.pass_through() or "zombie")
    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(zombie, concurrency=1):
        assert gate.reached.wait(30)
        desk.clock.leap(minutes=5)
        with desk.dispatching(planted(fetch=lambda *_: "heir")):
            desk.until_settled()
        gate.opened.set()
    assert desk.query("SELECT event_id, note FROM effects") == [("evt_1", "heir")]
    assert desk.run("evt_1") == ("succeeded", 2, None, None)


def test_a_zombie_that_wakes_while_its_heir_is_at_work_changes_nothing(desk: Desk) -> None:
    gate, heirs = Gate(), Gate()
    zombie = planted(fetch=lambda *_: gate.pass_through() or "zombie")
    heir = planted(fetch=lambda *_: heirs.pass_through() or "heir")
    desk.deliver(snapshot("evt_1"))
    with contextlib.ExitStack() as stack:
        with desk.dispatching(zombie, concurrency=1):
            assert gate.reached.wait(30)
            desk.clock.leap(minutes=5)
            stack.enter_context(desk.dispatching(heir, concurrency=1))
            assert heirs.reached.wait(30)
            gate.opened.set()
        assert desk.effects() == []
        assert desk.run("evt_1")[:2] == ("processing", 2)
        heirs.opened.set()
        desk.until_settled()
    assert desk.query("SELECT event_id, note FROM effects") == [("evt_1", "heir")]


def test_a_zombie_that_fails_changes_nothing_either(desk: Desk) -> None:
    gate = Gate()

    def fail(*_: Any) -> None:
        gate.pass_through()
        raise ValueError

    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(fetch=fail), concurrency=1):
        assert gate.reached.wait(30)
        desk.clock.leap(minutes=5)
        with desk.dispatching(planted(fetch=lambda *_: "heir")):
            desk.until_settled()
        gate.opened.set()
    assert desk.run("evt_1") == ("succeeded", 2, None, None)
    assert desk.outbox() == []


def test_a_run_that_kills_its_process_every_time_is_dead_after_its_attempts(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1"), snapshot("evt_2", at=1))
    with psycopg.connect(desk.dsn, autocommit=True) as db:
        for number in range(QUICK.attempts_max):
            claimed = store.claim(db, "tidemeter", now=desk.clock(), policy=QUICK)
            assert claimed is not None
            assert (claimed.attempts, claimed.is_spent) == (number + 1, False)
            assert store.claim(db, "tidemeter", now=desk.clock(), policy=QUICK) is None
            desk.clock.leap(minutes=5)
    with desk.dispatching():
        desk.until_settled()
    assert desk.run("evt_1") == ("dead", 3, "LeaseEnded", "not_finished")
    assert desk.effects() == ["evt_2"]
    assert len(desk.outbox()) == 1


def test_an_earlier_event_that_comes_while_a_later_one_is_at_work_waits_and_is_stale(desk: Desk) -> None:
    gate = Gate()
    began: list[str] = []

    def wait(event: WebhookEvent, _: stripe.StripeClient) -> None:
        began.append(event.event_id)
        gate.pass_through()

    desk.deliver(snapshot("evt_late", at=9))
    with desk.dispatching(planted(fetch=wait)) as dispatcher:
        assert gate.reached.wait(30)
        desk.deliver(snapshot("evt_early", at=1), snapshot("evt_else", object_id="obj_2", at=1))
        dispatcher.wake()
        until(lambda: "evt_else" in began, "the other object's event at work")
        assert desk.run("evt_early")[0] == "received"
        gate.opened.set()
        desk.until_settled()
    assert desk.states()["evt_early"] == "stale"
    assert "evt_early" not in began


def test_stopping_finishes_what_is_under_way(desk: Desk) -> None:
    gate = Gate()
    desk.deliver(snapshot("evt_1"))
    with desk.dispatching(planted(fetch=lambda *_: gate.pass_through())):
        assert gate.reached.wait(30)
        threading.Timer(0.2, gate.opened.set).start()
    assert desk.run("evt_1")[0] == "succeeded"


def test_health_says_what_an_operator_should_look_at(desk: Desk) -> None:
    with desk.dispatching(planted(fetch=raising(Refused("no")))) as dispatcher:
        dispatcher.count()
        assert dispatcher.check()[0] == "healthy"
        desk.deliver(snapshot("evt_1"))
        desk.until_settled()
        dispatcher.count()
        assert dispatcher.check() == ("degraded", "1 dead")


def test_runs_of_a_handler_that_is_no_longer_set_up_are_told_of(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1"))
    desk.query(
        "INSERT INTO webhook_runs (event_id, handler, subject, created_at, next_attempt_at) "
        "VALUES ('evt_1', 'gone', 's', now(), now())"
    )
    with desk.dispatching() as dispatcher:
        desk.until_state("evt_1", "succeeded")
        dispatcher.count()
        assert dispatcher.check() == ("degraded", "1 wait for the handler gone, which is not set up")
        assert desk.run("evt_1", "gone")[0] == "received"


def test_postgresql_being_away_is_unhealthy(postgres_dsn: str) -> None:
    desk = Desk(postgres_dsn)
    desk.dsn = "postgresql://127.0.0.1:1/none"
    with desk.dispatching() as dispatcher:
        dispatcher.count()
        assert dispatcher.check()[0] == "unhealthy"
        until(lambda: dispatcher.check() == ("unhealthy", "waiting for PostgreSQL (OperationalError)"), "it")


# -- What stays done, and what is not ours ---------------------------------------------------------------


def test_an_unfinished_attempt_keeps_its_effect_and_is_tried_again(desk: Desk) -> None:
    def once(
        db: psycopg.Connection[Any], event: WebhookEvent, found: Any, now: datetime
    ) -> Sequence[OutboxRow]:
        seen = db.execute("SELECT count(*) FROM effects").fetchone()
        note(db, event, found, now)
        if seen == (0,):
            raise Unfinished("not_yet")
        return ()

    handler = planted(apply=once)
    desk.deliver(snapshot("evt_1"), handlers=[handler])
    with desk.dispatching(handler):
        desk.until_settled()
    assert desk.effects() == ["evt_1", "evt_1"]
    assert desk.run("evt_1") == ("succeeded", 2, None, None)


def test_an_attempt_that_never_finishes_is_dead_with_its_code(desk: Desk) -> None:
    def never(*_: Any) -> Sequence[OutboxRow]:
        raise Unfinished("not_yet")

    handler = planted(apply=never)
    desk.deliver(snapshot("evt_1"), handlers=[handler])
    with desk.dispatching(handler):
        desk.until_settled()
    assert desk.run("evt_1") == ("dead", QUICK.attempts_max, "Unfinished", "not_yet")
    assert [one["name"] for one in desk.outbox()] == ["webhook_dlq.dead_lettered"]


def test_an_event_of_the_other_mode_than_the_keys_changes_nothing(desk: Desk) -> None:
    """A Connect endpoint for live events gets those of test mode too."""
    desk.deliver(snapshot("evt_1", livemode=True), snapshot("evt_2", object_id="obj_2"))
    with desk.dispatching():
        desk.until_settled()
    assert desk.states() == {"evt_1": "succeeded", "evt_2": "succeeded"}
    assert desk.effects() == ["evt_2"]


def test_a_zombie_of_before_a_replay_is_not_taken_for_its_heir(desk: Desk) -> None:
    desk.deliver(snapshot("evt_1"))
    later = datetime.now(UTC) + QUICK.lease * 2
    with psycopg.connect(desk.dsn, autocommit=True) as db:
        zombie = store.claim(db, "tidemeter", now=datetime.now(UTC), policy=QUICK)
        heir = store.claim(db, "tidemeter", now=later, policy=QUICK)
        assert zombie is not None and heir is not None
        db.execute("UPDATE webhook_runs SET state = 'failed'")
        db.execute("UPDATE webhook_runs SET state = 'received', attempts = 0, replays = replays + 1")
        replayed = store.claim(db, "tidemeter", now=later + QUICK.lease * 2, policy=QUICK)
        assert replayed is not None and replayed.attempts == zombie.attempts
        assert [store.is_mine(db, run) for run in (zombie, heir, replayed)] == [False, False, True]
