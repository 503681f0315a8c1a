"""The rest of the surface: keys, headers, customers, lists, the control API, health and metrics."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.stripe_calls import AUTHORIZATION, http, sdk


def use(sim: SimulatorControl, customer: str, value: str, timestamp: int) -> None:
    payload = {"stripe_customer_id": customer, "value": value}
    sdk(sim).v1.billing.meter_events.create(
        {"event_name": "calls", "timestamp": timestamp, "payload": payload}
    )


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer sk_test_abc", 200),
        ("Bearer rk_test_abc", 200),
        ("Bearer sk_live_abc", 401),
        ("Bearer nonsense", 401),
        ("Basic c2tfdGVzdDo=", 401),
        ("", 401),
    ],
)
def test_only_test_mode_keys_are_let_in(sim: SimulatorControl, authorization: str, status: int) -> None:
    response = http.get(f"{sim.url}/v1/customers", headers={"Authorization": authorization})
    assert response.status_code == status
    assert "abc" not in response.text, "a refused key is not repeated"


def test_an_unknown_url_is_answered_as_stripe_does(sim: SimulatorControl) -> None:
    response = http.get(f"{sim.url}/v1/unicorns")
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith("Unrecognized request URL (GET: /v1/unicorns).")
    assert http.delete(f"{sim.url}/v1/prices/price_1").status_code == 404
    assert http.post(f"{sim.url}/v2/billing/unicorns").status_code == 404


def test_every_answer_has_a_request_id_and_the_version_of_the_caller(sim: SimulatorControl) -> None:
    headers = {"Authorization": "Bearer sk_test_x", "Stripe-Version": "2025-03-31.basil"}
    for path in ("/v1/customers", "/v1/customers/cus_9", "/v1/unicorns"):
        response = http.get(sim.url + path, headers=headers)
        assert response.headers["Request-Id"].startswith("req_")
        assert response.headers["Stripe-Version"] == "2025-03-31.basil"


def test_errors_leave_out_what_they_do_not_have(sim: SimulatorControl) -> None:
    response = http.get(f"{sim.url}/v1/customers/cus_9", headers=AUTHORIZATION)
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "code": "resource_missing",
            "doc_url": "https://stripe.com/docs/error-codes/resource-missing",
            "message": "No such customer: 'cus_9'",
            "param": "id",
            "type": "invalid_request_error",
        }
    }


def test_json_bodies_are_refused_on_v1(sim: SimulatorControl) -> None:
    headers = AUTHORIZATION
    assert http.post(f"{sim.url}/v1/customers", json={"name": "a"}, headers=headers).status_code == 400


@pytest.mark.parametrize(
    "body", [b"a[b]=1&a=2&a[c]=3", b"a[=1", b"name=%ff", b"a[b][c][d][e][f][g]=1", b"&" * 600]
)
def test_a_malformed_form_is_refused(sim: SimulatorControl, body: bytes) -> None:
    headers = {"Authorization": "Bearer sk_test_x", "Content-Type": "application/x-www-form-urlencoded"}
    assert http.post(f"{sim.url}/v1/customers", content=body, headers=headers).status_code == 400


def test_customers_are_created_read_changed_and_listed_newest_first(sim: SimulatorControl) -> None:
    customers = sdk(sim).v1.customers
    made = customers.create({"name": "Ada", "email": "ada@example.com", "metadata": {"tenant": "t1"}})
    assert customers.retrieve(made.id).to_dict()["metadata"] == {"tenant": "t1"}
    changed = customers.update(made.id, {"name": "", "metadata": {"plan": "p"}})
    assert (changed.name, changed.email) == (None, "ada@example.com")
    assert changed.to_dict()["metadata"] == {"tenant": "t1", "plan": "p"}
    assert [one.id for one in customers.list().data] == [made.id, "cus_2", "cus_1"]
    assert [one.id for one in customers.list({"email": "ada@example.com"}).data] == [made.id]
    assert [one.id for one in customers.list({"limit": 1}).auto_paging_iter()] == [made.id, "cus_2", "cus_1"]


def test_meters_are_created_read_renamed_and_listed_by_status(sim: SimulatorControl) -> None:
    meters = sdk(sim).v1.billing.meters
    made = meters.create(
        {"display_name": "Tokens", "event_name": "tokens", "default_aggregation": {"formula": "last"}}
    )
    assert (made.status, made.default_aggregation.formula, made.event_time_window) == ("active", "last", None)
    assert meters.update(made.id, {"display_name": "Token count"}).display_name == "Token count"
    with pytest.raises(stripe.InvalidRequestError, match="unknown parameter"):
        meters.update(made.id, cast("Any", {"event_name": "other"}))
    meters.deactivate(made.id)
    assert [one.id for one in meters.list({"status": "inactive"}).data] == [made.id]
    assert len(meters.list({"status": "active"}).data) == 2
    with pytest.raises(stripe.InvalidRequestError, match="must be one of sum, count, last"):
        meters.create({"display_name": "x", "event_name": "x", "default_aggregation": {"formula": "max"}})


def test_the_ledger_and_totals_are_exact_and_can_be_filtered(sim: SimulatorControl) -> None:
    hour = int(sim.now()) // 3600 * 3600 - 7200
    for customer, value, at in (("cus_1", "0.1", 0), ("cus_1", "0.2", 3600), ("cus_2", "7", 10)):
        use(sim, customer, value, hour + at)
    assert [row["sequence"] for row in sim.ledger()["rows"]] == [1, 2, 3]
    assert sim.ledger(customer="cus_1")["total"] == "0.3"
    assert sim.ledger(limit="1", after="1")["has_more"] is True
    assert sim.total(event_name="bytes") == "0"
    assert sim.totals() == {
        "totals": [
            {"event_name": "calls", "customer": "cus_1", "value": "0.3", "events": 2},
            {"event_name": "calls", "customer": "cus_2", "value": "7", "events": 1},
        ],
        "grand_total": "7.3",
    }
    by_hour = [(one["hour"] - hour, one["value"]) for one in sim.totals(by_hour=True)["totals"]]
    assert by_hour == [(0, "0.1"), (3600, "0.2"), (0, "7")]


def test_statistics_count_answers_by_route_and_status(sim: SimulatorControl) -> None:
    use(sim, "cus_1", "1", int(sim.now()))
    http.get(f"{sim.url}/v1/customers/cus_9", headers=AUTHORIZATION)
    stats = sim.stats()
    assert stats["requests"] == [
        {"route": "GET /v1/customers/{id}", "status": 404, "count": 1},
        {"route": "POST /v1/billing/meter_events", "status": 200, "count": 1},
    ]
    assert (stats["applied"], stats["ledger_rows"]) == (1, 1)
    assert stats["max_meter_events_in_one_second"] == 1
    assert stats["max_in_flight_per_customer_meter"] == 1


def test_the_clock_is_moved_and_set(sim: SimulatorControl) -> None:
    sim.set_clock(2_000_000_000)
    sim.advance(500)
    clock = sim.call("GET", "clock")
    assert 0 <= clock["now"] - 2_000_000_500 < 5
    assert clock["iso"].startswith("2033-05-18T03:41:4")


def test_seeding_twice_replaces_and_refuses_what_the_api_would_refuse(sim: SimulatorControl) -> None:
    sim.seed(customers=[{"id": "cus_1", "name": "new"}], meters=["calls"])
    assert sdk(sim).v1.customers.retrieve("cus_1").name == "new"
    with pytest.raises(ValueError, match="unknown parameter"):
        sim.seed(customers=[{"id": "cus_3", "colour": "red"}])
    with pytest.raises(ValueError, match="already an active meter"):
        sim.seed(meters=[{"id": "mtr_other", "event_name": "calls"}])


def test_reset_forgets_everything(sim: SimulatorControl) -> None:
    use(sim, "cus_1", "1", int(sim.now()))
    sim.advance(1000)
    sim.play({"fault": "ok"})
    sim.reset()
    assert sim.ledger()["rows"] == []
    assert sim.stats()["applied"] == 0
    assert sim.call("GET", "faults") == {"faults": []}
    assert sim.call("GET", "clock")["offset_seconds"] == 0
    assert sdk(sim).v1.customers.list().data == []


def test_health_and_metrics_answer_without_naming_customers(sim: SimulatorControl) -> None:
    use(sim, "cus_1", "1", int(sim.now()))
    assert http.get(f"{sim.url}/health/live").json() == {"status": "healthy"}
    assert http.get(f"{sim.url}/health/ready").json()["checks"]["store"]["status"] == "healthy"
    metrics = http.get(f"{sim.url}/metrics").text
    route = 'route="POST /v1/billing/meter_events",status_code="200"'
    assert f"tidemeter_simulator_requests_total{{{route}}}" in metrics
    samples = [line for line in metrics.splitlines() if not line.startswith("#")]
    assert all(line.startswith("tidemeter_simulator_") for line in samples)
    assert "cus_1" not in metrics


def test_nothing_sent_reaches_the_log(sim: SimulatorControl, capsys: pytest.CaptureFixture[str]) -> None:
    sim.play({"fault": "status", "status": 503})
    headers = {"Authorization": "Bearer sk_test_canary", "Idempotency-Key": "canary-key"}
    form = {"event_name": "calls", "payload[stripe_customer_id]": "cus_1", "payload[value]": "424242"}
    http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers)
    logged = capsys.readouterr().out
    for secret in ("canary", "424242", "cus_1"):
        assert secret not in logged, json.dumps(logged)
