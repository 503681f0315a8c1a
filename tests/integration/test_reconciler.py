"""Reconciliation against a real PostgreSQL and the simulated Stripe: what is found, and what is not known."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from services.reconciler.agent import Gauges
from services.reconciler.local import list_items, read_subjects
from services.streaming.reconciliation import Asked, dismiss
from services.wire import metrics
from services.wire.settings import load_settings
from tests.integration.reconciling import Scene, declare, hours_ago, map_customer, open_scene


@pytest.fixture
def scene(postgres_dsn: str) -> Iterator[Scene]:
    with open_scene(postgres_dsn) as scene:
        yield scene


def write_at_stripe(
    scene: Scene, amount: str, at: str, customer: str = "cus_1", event: str = "requests"
) -> None:
    """Somebody else's meter event."""
    moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
    scene.world._client().v1.billing.meter_events.create(
        {
            "event_name": event,
            "payload": {"stripe_customer_id": customer, "value": amount},
            "timestamp": int(moment.timestamp()),
        }
    )


def hour_of(at: str) -> str:
    return at[:13]


# What is the same ---------------------------------------------------------------------------------------


def test_what_stripe_shows_of_every_aggregation_is_what_it_should(scene: Scene) -> None:
    declare(scene, "jobs", "count", dimensions=["region"])
    declare(scene, "peak", "max", value_property="gb", scale=3)
    declare(scene, "level", "last")
    declare(scene, "users", "unique", value_property="who")
    declare(scene, "credits", "sum", allow_negative=True, scale=1)
    for number in range(12):
        at = hours_ago(number)
        scene.use(f"a{number}", at, number)
        scene.use(f"b{number}", at, 1, "jobs", region="eu" if number % 2 else "us")
        scene.use(f"c{number}", at, 1, "peak", gb=str(7.5 - number % 5))
        scene.use(f"d{number}", at, number + 2, "level")
        scene.use(f"e{number}", at, 1, "users", who=f"w{number % 4}")
        scene.use(f"f{number}", at, f"{(-1) ** number * number}.25", "credits")
        if number % 3 == 0:
            scene.bill()
    scene.bill()
    assert scene.reconcile() == {"ok": 6}
    shown = {item.metric: (item.local, item.stripe) for item in scene.summary().periods}
    assert shown["requests"] == (66, 66)
    assert shown["jobs"] == (12, 12)
    assert shown["peak"] == (Decimal("7.5"), Decimal("7.5"))
    assert shown["level"] == (2, 2)
    assert shown["users"] == (4, 4)
    assert shown["credits"][0] == shown["credits"][1]
    assert scene.sql("SELECT count(*) FROM reconciliation_suggestions") == [(0,)]


def test_what_the_scale_cannot_send_is_no_difference(scene: Scene) -> None:
    for number in range(3):
        scene.use(f"a{number}", hours_ago(number), "0.4")
    scene.bill()
    item = scene.found()
    assert (item.state, item.counted, item.local, item.stripe) == ("ok", Decimal("1.2"), 1, 1)


def test_sums_that_a_double_cannot_hold_are_the_same_as_the_double(scene: Scene) -> None:
    declare(scene, "nano", scale=9)
    for number in range(7):
        scene.use(f"a{number}", hours_ago(1), "12345.123456789", "nano")
    scene.bill()
    assert scene.found("nano").state == "ok"


def test_a_summary_of_nothing_is_unknown(scene: Scene) -> None:
    scene.reconcile()
    summary = scene.summary()
    assert (summary.state, summary.reason, summary.diff_abs, summary.diff_pct) == (
        "unknown", "not_reconciled", None, None,
    )  # fmt: skip


# What differs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "surplus", "state"),
    [
        (1000, "5", "adjust"),
        (1000, "6", "drift"),
        (199, "1", "adjust"),
        (198, "1", "drift"),
        (10, "-5", "drift"),
    ],
)
def test_a_difference_of_half_a_percent_of_stripes_total_is_small_and_more_is_drift(
    scene: Scene, ours: int, surplus: str, state: str
) -> None:
    at = hours_ago(3)
    scene.use("a", at, ours)
    scene.bill()
    write_at_stripe(scene, surplus, at)
    item = scene.found()
    shows = ours + Decimal(surplus)
    assert (item.local, item.stripe, item.diff_abs) == (ours, shows, abs(Decimal(surplus)))
    assert item.diff_pct == abs(Decimal(surplus)) / shows
    assert item.state == state
    assert scene.causes(item) == [(hour_of(at), "surplus_at_stripe", -Decimal(surplus))] or surplus == "-5"
    assert item.suggestion is not None and item.suggestion.amount == -Decimal(surplus)
    assert item.suggestion.kind == ("adjust" if state == "adjust" else "replay")
    assert (item.replay is None) == (state == "adjust")


def test_when_stripe_shows_nothing_the_whole_is_missing(scene: Scene) -> None:
    scene.use("a", hours_ago(2), 5)
    scene.bill()
    ledger_drop(scene, "cus_1")
    item = scene.found()
    assert (item.state, item.stripe, item.diff_abs, item.diff_pct) == ("drift", 0, 5, 1)
    [finding] = item.findings
    assert finding.cause == "missing_at_stripe"
    assert finding.identifiers == [row[0] for row in scene.sql("SELECT identifier FROM meter_events")]


def ledger_drop(scene: Scene, customer: str) -> None:
    """Stripe forgets everything of a customer: its events are cancelled behind our back."""
    client = scene.world._client()
    for row in scene.world.stripe.ledger(customer=customer)["rows"]:
        client.v1.billing.meter_event_adjustments.create(
            {"event_name": row["event_name"], "type": "cancel", "cancel": {"identifier": row["identifier"]}}
        )
    scene.world.advance(timedelta(minutes=1))


def test_of_several_pushes_of_an_hour_the_one_that_is_missing_is_named(scene: Scene) -> None:
    at = hours_ago(5)
    for number, quantity in enumerate((3, 4, 9)):
        scene.use(f"a{number}", at, quantity)
        scene.bill()
    rows = scene.world.stripe.ledger(customer="cus_1")["rows"]
    lost = next(row["identifier"] for row in rows if row["value"] == "4")
    scene.world._client().v1.billing.meter_event_adjustments.create(
        {"event_name": "requests", "type": "cancel", "cancel": {"identifier": lost}}
    )
    scene.world.advance(timedelta(minutes=1))
    item = scene.found()
    assert scene.causes(item) == [(hour_of(at), "missing_at_stripe", 4)]
    assert item.findings[0].identifiers == [lost]
    assert (item.local, item.stripe) == (16, 12)


def test_a_counter_that_was_changed_by_hand_is_drift_with_a_ready_replay_of_its_hour(scene: Scene) -> None:
    at = hours_ago(30)
    for number in range(4):
        scene.use(f"a{number}", hours_ago(29 + number), 10)
    scene.bill()
    hour = datetime.fromisoformat(at).replace(minute=0, tzinfo=UTC)
    scene.damage("UPDATE buckets SET total = total + 7 WHERE hour_start = %s", hour)
    item = scene.found()
    assert (item.state, item.local, item.stripe) == ("drift", 47, 40)
    assert scene.causes(item) == [(hour_of(at), "counter_differs", 7)]
    assert item.replay is not None
    assert item.replay.request == {
        "tenantId": "acme", "metrics": ["requests"], "customerRef": "cus_1",
        "since": f"{hour:%Y-%m-%dT%H:%M:%SZ}", "until": f"{hour + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}",
        "mode": "dry-run",
    }  # fmt: skip


def test_a_final_period_has_to_be_exact_and_another_one_never_makes_up_for_it(scene: Scene) -> None:
    """Stripe lacks 5 of the period that is over and shows 5 too many in the one that goes on."""
    now = scene.world.now().replace(minute=0, second=0, microsecond=0)
    anchor = now - timedelta(hours=20)
    scene.sql(
        "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) "
        "VALUES ('acme', 'x', 'cus_5', %s)",
        f"1 day UTC {anchor - timedelta(days=9):%Y-%m-%dT%H:%M:%SZ}",
    )
    scene.use("a", hours_ago(25), 1000, customer_ref="x")
    scene.use("b", hours_ago(3), 500, customer_ref="x")
    scene.sql("UPDATE meter_events SET push_before = NULL")
    scene.books.now = (anchor - timedelta(hours=1)).replace(tzinfo=None).isoformat()
    record(scene, scene.books.close())
    scene.bill()
    scene.reconcile()
    found = {item.period_start: item for item in scene.summary().periods}
    old, new = found[anchor - timedelta(days=1)], found[anchor]
    assert [(one.final, one.state, one.local) for one in (old, new)] == [
        (True, "ok", 1000),
        (False, "ok", 500),
    ]
    write_at_stripe(scene, "-1", hours_ago(25), customer="cus_5")
    write_at_stripe(scene, "1", hours_ago(3), customer="cus_5")
    scene.reconcile()
    found = {item.period_start: item for item in scene.summary().periods}
    old, new = found[anchor - timedelta(days=1)], found[anchor]
    assert [(one.state, one.diff_abs) for one in (old, new)] == [("drift", 1), ("adjust", 1)]


def record(scene: Scene, deltas: list[Any]) -> None:
    """The deltas of an earlier closing, sent as if their last safe moment had not passed."""
    assert deltas
    scene.close()
    scene.damage("UPDATE meter_events SET push_before = NULL, period_end = period_end + interval '30 days'")
    scene.send()


def test_failed_pushes_are_the_cause_until_they_are_sent_again(scene: Scene) -> None:
    at = hours_ago(2)
    scene.use("a", at, 11)
    scene.use("b", at, 3, customer_ref="cus_missing")
    scene.bill()
    item = scene.found(customer="cus_missing")
    assert item.state == "unknown" and item.reason == "customer_missing"
    scene.damage("UPDATE meter_events SET state = 'failed' WHERE stripe_customer = 'cus_1'")
    ledger_drop(scene, "cus_1")
    item = scene.found()
    assert scene.causes(item) == [(hour_of(at), "push_failed", 11)]
    assert (item.state, item.local, item.stripe) == ("drift", 11, 0)


# Suggestions --------------------------------------------------------------------------------------------


def test_however_often_it_is_found_there_is_one_suggestion_which_goes_with_its_difference(
    scene: Scene,
) -> None:
    at = hours_ago(3)
    scene.use("a", at, 1000)
    scene.bill()
    write_at_stripe(scene, "2", at)
    for _ in range(3):
        item = scene.found()
    assert scene.sql("SELECT kind, trim_scale(amount), state FROM reconciliation_suggestions") == [
        ("adjust", -2, "open")
    ]
    assert scene.books.ops("reconciliation_drift") == []
    write_at_stripe(scene, "100", at)
    for _ in range(2):
        item = scene.found()
    assert scene.sql("SELECT kind, trim_scale(amount), state FROM reconciliation_suggestions") == [
        ("replay", -102, "open")
    ]
    assert item.suggestion is not None
    [told] = scene.books.ops("reconciliation_drift")
    assert told["attributes"] == {
        "tenant": "acme", "meter": "requests", "difference": "-102", "causes": "surplus_at_stripe",
        "period_start": f"{item.period_start:%Y-%m-%dT%H:%M:%SZ}",
    }  # fmt: skip
    assert told["subject_id"] == f"{item.item}:{item.suggestion.id}"
    write_at_stripe(scene, "-102", at)
    assert scene.found().suggestion is None
    scene.reconcile()
    assert scene.sql("SELECT state, closed_by FROM reconciliation_suggestions") == [
        ("resolved", "reconciler")
    ]
    assert len(scene.books.ops("reconciliation_resolved")) == 1
    assert len(scene.books.ops("reconciliation_drift")) == 1


def test_what_somebody_dismissed_comes_back_only_as_another_amount(scene: Scene) -> None:
    at = hours_ago(3)
    scene.use("a", at, 10)
    scene.bill()
    write_at_stripe(scene, "2", at)
    suggestion = scene.found().suggestion
    assert suggestion is not None
    now = scene.world.now()
    settle = {"by": "cli:ada", "note": "test traffic", "now": now}
    assert dismiss(scene.books.db, suggestion.id, **settle, only_tenant="another") is None
    assert dismiss(scene.books.db, suggestion.id, **settle) is True
    assert dismiss(scene.books.db, suggestion.id, **settle) is False
    assert scene.found().suggestion is None
    item = scene.stored()
    assert (item.state, item.dismissed) == ("drift", True)
    summary = scene.summary()
    assert (summary.state, summary.items.adjust) == ("adjust", 1)  # nobody is paged for it
    write_at_stripe(scene, "1", at)
    again = scene.found().suggestion
    assert again is not None and (again.id != suggestion.id, again.amount) == (True, -3)
    assert scene.sql("SELECT actor, action FROM audit_log") == [("cli:ada", "reconciliation.dismiss")]


def test_what_is_unknown_changes_no_suggestion(scene: Scene) -> None:
    at = hours_ago(3)
    scene.use("a", at, 10)
    scene.bill()
    write_at_stripe(scene, "2", at)
    before = scene.found().suggestion
    item = scene.found(base="http://127.0.0.1:1")
    assert (item.state, item.reason, item.suggestion) == ("unknown", "no_answer", before)
    assert scene.found().suggestion == before
    assert len(scene.books.ops("reconciliation_drift")) == 1


# What is not known --------------------------------------------------------------------------------------


def assert_unknown(scene: Scene, reason: str, **more: Any) -> None:
    item = scene.found(**more)
    assert (item.state, item.reason) == ("unknown", reason)
    assert (item.diff_abs, item.diff_pct) == (None, None)
    summary = scene.summary(tenant_id="acme", meters=("requests",))
    assert (summary.state, summary.diff_abs, summary.diff_pct) == ("unknown", None, None)
    gauges = Gauges(load_settings(postgres_dsn=scene.dsn), clock=scene.world.now)
    gauges._show(scene.books.db)
    shown = {tuple(labels): value for labels, value in metrics.RECON_DIFF_PCT._rows}
    assert all(math.isnan(value) for value in shown.values()) and shown
    assert metrics.RECON_ITEMS.labels("unknown")._value.get() == len(shown)
    assert metrics.RECON_ITEMS.labels("ok")._value.get() == 0


def test_when_nobody_answers_at_stripes_address_it_is_unknown(scene: Scene) -> None:
    scene.use("a", hours_ago(1), 5)
    scene.bill()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert_unknown(scene, "no_answer", base=f"http://127.0.0.1:{closed.getsockname()[1]}")


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500}, {"status": 429}, {"status": 503}, {"reset": True}, {"html": True}, {"cut": True},
    ],
    ids=lambda fault: next(iter(fault)) + str(next(iter(fault.values()))),
)  # fmt: skip
def test_an_answer_that_is_none_is_unknown(scene: Scene, fault: dict[str, Any]) -> None:
    scene.use("a", hours_ago(1), 5)
    scene.bill()
    with broken_stripe(scene, lambda path: "event_summaries" in path, fault) as base:
        assert_unknown(scene, "no_answer", base=base)
    assert scene.found().state == "ok"


def test_half_of_the_pages_is_unknown(scene: Scene) -> None:
    """150 hours are two pages, and the second one fails; the first alone would be a total."""
    for number in range(150):
        scene.use(f"a{number}", hours_ago(number + 1), 1)
    scene.bill()
    write_at_stripe(scene, "3", hours_ago(140))  # so that it is asked for all the hours
    with broken_stripe(scene, lambda path: "starting_after" in path, {"status": 500}) as base:
        items = {item.state for item in (scene.reconcile(base=base), scene.summary().periods)[1]}
        assert items == {"unknown"}
    scene.reconcile()
    assert sum(item.diff_abs or 0 for item in scene.summary().periods) == 3


def test_a_push_in_doubt_is_unknown(scene: Scene) -> None:
    scene.use("a", hours_ago(2), 5)
    scene.bill()
    scene.use("b", hours_ago(1), 3)
    scene.close()
    scene.damage("UPDATE meter_events SET state = 'in_doubt', first_sent_at = now() WHERE state = 'pending'")
    assert_unknown(scene, "in_doubt")


def test_summaries_that_lag_are_unknown_until_patience_is_over(scene: Scene) -> None:
    scene.patient(3600)
    scene.world.stripe.stick_summaries(7200)
    scene.use("a", hours_ago(2), 5)
    scene.bill()
    assert_unknown(scene, "summary_lags")
    scene.world.advance(timedelta(seconds=3700))
    item = scene.found()
    assert (item.state, item.local, item.stripe) == ("drift", 5, 0)
    scene.world.stripe.stick_summaries(0)
    assert scene.found().state == "ok"


def test_lag_explains_what_is_missing_but_never_a_surplus(scene: Scene) -> None:
    scene.patient(3600)
    at = hours_ago(2)
    scene.use("a", at, 5)
    scene.bill()
    write_at_stripe(scene, "1", at)
    item = scene.found()
    assert (item.state, item.diff_abs) == ("drift", 1)


def test_usage_that_waits_for_too_long_is_unknown_and_for_a_short_while_it_is_left_out(scene: Scene) -> None:
    scene.patient(3600)
    scene.use("a", hours_ago(3), 5)
    scene.bill()
    scene.use("b", hours_ago(2), 2)
    item = scene.found()
    assert (item.state, item.counted, item.waiting, item.local, item.stripe) == ("ok", 7, 2, 5, 5)
    scene.close()
    item = scene.found()
    assert (item.state, item.counted, item.waiting, item.local, item.stripe) == ("ok", 7, 2, 5, 5)
    scene.world.advance(timedelta(seconds=3700))
    assert_unknown(scene, "waiting")


def test_a_customer_without_a_stripe_id_is_unknown(scene: Scene) -> None:
    scene.use("a", hours_ago(1), 5, customer_ref="somebody")
    scene.bill()
    item = scene.found(customer="somebody")
    assert (item.state, item.reason, item.stripe, item.counted) == ("unknown", "no_stripe_customer", None, 5)


def test_a_meter_that_adds_up_otherwise_is_unknown(scene: Scene) -> None:
    scene.use("a", hours_ago(1), 5)
    scene.bill()
    for change, reason in (("formula = 'count'", "meter_differs"), ("event_name = 'other'", "meter_missing")):
        scene.sql("SELECT 1")
        scene.world.stripe.seed(
            meters=[
                {
                    "id": "mtr_requests",
                    "event_name": "other" if reason == "meter_missing" else "requests",
                    "default_aggregation": {"formula": "count"},
                }
            ]
        )
        assert scene.found().reason == reason, change


def test_what_was_found_long_ago_is_not_known_any_more(scene: Scene) -> None:
    scene.use("a", hours_ago(1), 5)
    scene.bill()
    scene.reconcile()
    gauges = Gauges(load_settings(postgres_dsn=scene.dsn), clock=scene.world.now)
    gauges._show(scene.books.db)
    assert [value for _, value in metrics.RECON_DIFF_ABS._rows] == [0]
    scene.world.advance(timedelta(hours=2))
    gauges._show(scene.books.db)
    assert all(math.isnan(value) for _, value in metrics.RECON_DIFF_ABS._rows)
    assert metrics.RECON_ITEMS.labels("unknown")._value.get() == 1


def test_a_summary_of_long_ago_is_not_known_either(scene: Scene) -> None:
    scene.use("a", hours_ago(1), 5)
    scene.bill()
    assert scene.found().state == "ok"
    scene.world.advance(timedelta(hours=2))
    summary = scene.summary()
    assert (summary.state, summary.reason, summary.diff_abs) == ("unknown", "stale", None)
    assert scene.stored().diff_pct is None


def test_what_is_counted_between_the_list_and_the_batch_is_no_drift(scene: Scene) -> None:
    """The item was clean when the run listed it."""
    scene.use("a", hours_ago(2), 5)
    scene.bill()
    places = list_items(scene.books.db, Asked(), scene.world.now())
    scene.use("b", hours_ago(1), 7)
    [subject] = read_subjects(scene.books.db, 1, places, now=scene.world.now(), grace=timedelta(hours=1))
    [part] = subject.parts
    assert (part.findings, part.waiting, part.reported) == ([], 7, 5)


def test_a_change_of_calendar_leaves_no_period_behind_that_differs(scene: Scene) -> None:
    declare(scene, "level", "last")
    map_customer(scene, "x", "cus_6")
    for number in range(3):
        scene.use(f"a{number}", hours_ago(26 * number), 5, customer_ref="x")
        scene.use(f"b{number}", hours_ago(26 * number), 7 + number, "level", customer_ref="x")
    scene.bill()
    assert scene.reconcile() == {"ok": 2}
    anchor = scene.world.now().replace(minute=0, second=0, microsecond=0) - timedelta(days=9, hours=5)
    scene.sql(
        "UPDATE customers SET calendar = %s WHERE customer_ref = 'x'",
        f"1 month UTC {anchor:%Y-%m-%dT%H:%M:%SZ}",
    )
    scene.books.now = scene.world.now().replace(tzinfo=None).isoformat()
    assert scene.books.change_periods() == 2
    scene.bill()
    scene.reconcile()
    assert {(item.metric, item.state, item.period_start) for item in scene.summary().periods} == {
        ("requests", "ok", anchor), ("level", "ok", anchor),
    }  # fmt: skip


# Who shares a total -------------------------------------------------------------------------------------


def test_of_two_customers_that_are_billed_as_one_the_hour_belongs_to_who_sent_in_it(scene: Scene) -> None:
    for ref in ("left", "right"):
        map_customer(scene, ref, "cus_9")
    scene.use("a", hours_ago(5), 5, customer_ref="left")
    scene.use("b", hours_ago(3), 7, customer_ref="right")
    scene.bill()
    assert scene.reconcile() == {"ok": 2}
    write_at_stripe(scene, "1", hours_ago(3), customer="cus_9")
    scene.reconcile()
    assert scene.stored(customer="left").state == "ok"
    right = scene.stored(customer="right")
    assert (right.state, right.local, right.stripe) == ("drift", 7, 8)


def test_usage_that_was_sent_as_another_customer_before_is_compared_there(scene: Scene) -> None:
    map_customer(scene, "x", "cus_7")
    scene.use("a", hours_ago(5), 5, customer_ref="x")
    scene.bill()
    scene.sql("UPDATE customers SET stripe_customer = 'cus_8' WHERE customer_ref = 'x'")
    scene.use("b", hours_ago(3), 7, customer_ref="x")
    scene.bill()
    item = scene.found(customer="x")
    assert (item.state, item.local, item.stripe, item.stripe_customer) == ("ok", 12, 12, "cus_8")
    write_at_stripe(scene, "2", hours_ago(5), customer="cus_7")
    assert scene.found(customer="x").state == "drift"


def test_only_what_is_asked_for_is_compared(scene: Scene) -> None:
    declare(scene, "other")
    for number, meter in enumerate(("requests", "other")):
        scene.use(f"a{number}", hours_ago(1), 5, meter)
        scene.use(f"b{number}", hours_ago(1), 5, meter, customer_ref="cus_2")
    scene.bill()
    assert scene.reconcile(asked=Asked("acme", ("other",))) == {"ok": 2}
    assert scene.reconcile(asked=Asked("acme", customer_ref="cus_2")) == {"ok": 2}
    assert scene.reconcile(asked=Asked("nobody")) == {}
    assert scene.reconcile(asked=Asked(period_at=scene.world.now() - timedelta(days=300))) == {}
    assert len(scene.summary().periods) == 3


# A Stripe that is broken --------------------------------------------------------------------------------


class broken_stripe:  # noqa: N801  (used as a function)
    """A proxy in front of the simulator that spoils the answers to some paths."""

    def __init__(self, scene: Scene, spoils: Any, fault: dict[str, Any]) -> None:
        import httpx

        target = scene.world.stripe.url

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                answer = httpx.get(
                    target + self.path, headers={"Authorization": self.headers["Authorization"]}
                )
                body, status, kind = answer.content, answer.status_code, "application/json"
                if spoils(self.path):
                    if "reset" in fault:
                        self.connection.close()
                        return
                    status = fault.get("status", 200)
                    if "html" in fault:
                        body, kind = b"<html>a proxy</html>", "text/html"
                    if "status" in fault:
                        body = b'{"error": {"message": "no", "type": "api_error"}}'
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if "cut" in fault and spoils(self.path) else body)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
