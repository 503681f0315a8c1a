"""The fault tape on the wire: what the client sees, and whether the event counted."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, event, http, sdk


def send(
    sim: SimulatorControl,
    identifier: str,
    key: str | None = None,
    customer: str = "cus_1",
    timeout: float = 5,
) -> httpx.Response:
    form = {
        "event_name": "calls",
        "identifier": identifier,
        "payload[stripe_customer_id]": customer,
        "payload[value]": "5",
    }
    headers = AUTHORIZATION | ({"Idempotency-Key": key} if key else {})
    return http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers, timeout=timeout)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("applied", [True, False])
def test_a_5xx_may_or_may_not_have_applied_the_event(
    sim: SimulatorControl, status: int, applied: bool
) -> None:
    sim.play({"fault": "status", "status": status, "applied": applied})
    response = send(sim, "id-1", "key-1")
    assert response.status_code == status
    assert response.headers["Content-Type"].startswith("text/html") is (status in (502, 504))
    assert sim.total() == ("5" if applied else "0")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_failure_leaves_the_key_with_what_the_api_did(sim: SimulatorControl, status: int) -> None:
    sim.play(
        {"fault": "status", "status": status, "applied": True},
        {"fault": "status", "status": status, "applied": False},
    )
    send(sim, "id-1", "key-1")
    send(sim, "id-2", "key-2")
    assert send(sim, "id-1", "key-1").headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in send(sim, "id-2", "key-2").headers
    assert sim.total() == "10"


def test_a_restricted_key_may_lack_a_permission(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 403})
    response = send(sim, "id-1", "key-1")
    assert response.status_code == 403
    assert "Having the 'rak_" in response.json()["error"]["message"]
    assert send(sim, "id-1", "key-1").status_code == 200
    assert sim.total() == "5"


def test_a_forgotten_key_meets_the_duplicate_refusal(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 502, "applied": True, "remember": False})
    send(sim, "id-1", "key-1")
    refused = send(sim, "id-1", "key-1")
    assert refused.status_code == 400
    assert "already exists" in refused.text


@pytest.mark.parametrize(("fault", "total"), [("reset_before_apply", "0"), ("reset_after_apply", "5")])
def test_a_reset_connection_answers_nothing(sim: SimulatorControl, fault: str, total: str) -> None:
    sim.play({"fault": fault})
    with pytest.raises(httpx.ReadError, match="reset by peer"):
        send(sim, "id-1", "key-1")
    assert sim.total() == total
    assert send(sim, "id-1", "key-1").status_code == 200
    assert sim.total() == "5"


def test_a_cut_body_is_shorter_than_promised_but_the_event_counts(sim: SimulatorControl) -> None:
    sim.play({"fault": "cut_body"})
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        send(sim, "id-1")
    assert sim.total() == "5"


def test_a_stalled_body_times_out_but_the_event_counts(sim: SimulatorControl) -> None:
    sim.play({"fault": "stall_body", "seconds": 3})
    with pytest.raises(httpx.ReadTimeout):
        send(sim, "id-1", timeout=0.2)
    assert sim.total() == "5"


def test_a_stalled_answer_comes_late_and_the_event_counted_at_once(sim: SimulatorControl) -> None:
    sim.play({"fault": "stall_before_answer", "seconds": 3})
    with pytest.raises(httpx.ReadTimeout):
        send(sim, "id-1", "key-1", timeout=0.2)
    assert sim.total() == "5"
    assert send(sim, "id-1", "key-1").headers["Idempotent-Replayed"] == "true"


def test_a_slow_call_is_answered_in_the_end(sim: SimulatorControl) -> None:
    sim.play({"fault": "slow", "seconds": 0.2})
    began = time.monotonic()
    assert send(sim, "id-1").status_code == 200
    assert time.monotonic() - began >= 0.2


def test_429_comes_with_a_reason_without_one_or_as_a_lock_timeout(sim: SimulatorControl) -> None:
    sim.play(
        {"fault": "status", "status": 429, "reason": "endpoint-rate"},
        {"fault": "status", "status": 429},
        {"fault": "status", "status": 429, "lock_timeout": True},
    )
    with_reason, without, locked = (send(sim, "id-1") for _ in range(3))
    assert {one.status_code for one in (with_reason, without, locked)} == {429}
    assert with_reason.headers["Stripe-Rate-Limited-Reason"] == "endpoint-rate"
    assert "Stripe-Rate-Limited-Reason" not in without.headers
    assert (locked.json()["error"]["code"], locked.headers["Stripe-Should-Retry"]) == ("lock_timeout", "true")
    assert all("Retry-After" not in one.headers for one in (with_reason, without, locked))
    assert sim.total() == "0"


def test_a_409_refuses_without_storing(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 409})
    assert send(sim, "id-1", "key-1").status_code == 409
    assert send(sim, "id-1", "key-1").status_code == 200


def test_the_tape_plays_in_order_and_then_runs_out(sim: SimulatorControl) -> None:
    sim.play({"fault": "ok"}, {"fault": "status", "status": 503, "times": 2}, {"fault": "ok"})
    statuses = [send(sim, f"id-{number}").status_code for number in range(5)]
    assert statuses == [200, 503, 503, 200, 200]


def test_a_fault_names_its_requests_by_path_method_and_number(sim: SimulatorControl) -> None:
    sim.play(
        {"match": {"path": "/v1/billing/meter_events", "nth": 3}, "fault": "status", "status": 503},
        {"match": {"path": "/v1/customers*", "method": "GET"}, "fault": "status", "status": 504},
    )
    statuses = [send(sim, f"id-{number}").status_code for number in range(4)]
    assert statuses == [200, 200, 503, 200]
    headers = AUTHORIZATION
    assert http.get(f"{sim.url}/v1/customers/cus_1", headers=headers).status_code == 504


def test_chance_is_repeatable_from_its_seed(sim: SimulatorControl) -> None:
    played = []
    for _ in range(2):
        sim.clear_faults()
        sim.play({"match": {"probability": 0.5}, "fault": "status", "status": 503}, seed=7)
        played.append([send(sim, f"id-{number}").status_code == 503 for number in range(12)])
    assert played[0] == played[1]
    assert 0 < sum(played[0]) < 12


@pytest.mark.parametrize(
    "fault",
    [
        {"fault": "explode"},
        {"fault": "status"},
        {"fault": "ok", "colour": 1},
        {"fault": "slow", "seconds": 1e9},
        {"fault": "ok", "match": {"host": "x"}},
        {"fault": "ok", "match": {"probability": "often"}},
    ],
)
def test_a_fault_that_is_not_understood_is_refused(sim: SimulatorControl, fault: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="400"):
        sim.play(fault)


def test_a_second_call_for_the_same_customer_and_meter_is_refused(sim: SimulatorControl) -> None:
    sim.play({"fault": "slow", "seconds": 0.6})
    answers: list[httpx.Response] = []
    slow = threading.Thread(target=lambda: answers.append(send(sim, "id-1")))
    slow.start()
    time.sleep(0.2)
    second, other = send(sim, "id-2", "key-2"), send(sim, "id-3", customer="cus_2")
    slow.join()
    assert second.status_code == 429
    assert second.headers["Stripe-Rate-Limited-Reason"] == "endpoint-concurrency"
    assert [one.status_code for one in (*answers, other)] == [200, 200]
    assert sim.stats()["max_in_flight_per_customer_meter"] == 2
    assert send(sim, "id-2", "key-2").status_code == 200, "the refusal was not stored"


def test_without_the_limit_concurrent_calls_are_only_observed() -> None:
    with running_simulator(SimulatorConfig(port=0, concurrency_limit_per_customer_meter=False)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        sim.play({"fault": "slow", "seconds": 0.4, "times": 2})
        threads = [threading.Thread(target=send, args=(sim, f"id-{number}")) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sim.total() == "10"
        assert sim.stats()["max_in_flight_per_customer_meter"] == 2


def test_calls_beyond_the_rate_are_refused_for_the_account() -> None:
    with running_simulator(SimulatorConfig(port=0, rate_per_second=5)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        with httpx.Client(base_url=sim.url, headers=AUTHORIZATION) as client:
            answers = [client.get("/v1/customers") for _ in range(12)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 7
        assert {one.headers["Stripe-Rate-Limited-Reason"] for one in refused} == {"global-rate"}
        assert sim.stats()["max_requests_in_one_second"] == 12


def test_a_stall_does_not_hold_up_the_shutdown() -> None:
    with running_simulator() as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        sim.play({"fault": "stall_before_answer", "seconds": 60})
        with pytest.raises(httpx.ReadTimeout):
            send(sim, "id-1", timeout=0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "reason",
    ["global-rate", "global-concurrency", "endpoint-rate", "endpoint-concurrency", "resource-specific"],
)
def test_rule_12_every_documented_reason_of_a_429_can_be_played_and_is_not_stored(
    sim: SimulatorControl, reason: str
) -> None:
    sim.play({"fault": "status", "status": 429, "reason": reason})
    refused = send(sim, "id-1", "key-1")
    assert (refused.status_code, refused.headers["Stripe-Rate-Limited-Reason"]) == (429, reason)
    assert "Stripe-Should-Retry" not in refused.headers
    assert send(sim, "id-1", "key-1").status_code == 200


def test_rule_12_the_sdk_retries_a_lock_timeout_and_no_other_429(sim: SimulatorControl) -> None:
    client = sdk(sim, retries=1)
    sim.play({"fault": "status", "status": 429, "lock_timeout": True})
    client.v1.customers.create({"name": "Ada"})
    sim.play({"fault": "status", "status": 429, "reason": "global-concurrency"})
    with pytest.raises(stripe.RateLimitError):
        client.v1.customers.create({"name": "Ada"})


def test_rule_12_in_live_mode_meter_events_have_a_limit_of_their_own() -> None:
    config = SimulatorConfig(port=0, rate_per_second=8, basic_rate_per_second=3)
    with running_simulator(config) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        client = httpx.Client(base_url=sim.url, headers=AUTHORIZATION)
        basic = [client.get("/v1/customers") for _ in range(5)]
        form = {"event_name": "calls", "payload[stripe_customer_id]": "cus_1", "payload[value]": "1"}
        events = [client.post("/v1/billing/meter_events", data=form) for _ in range(10)]
        assert [one.status_code for one in basic] == [200] * 3 + [429] * 2
        assert [one.status_code for one in events] == [200] * 8 + [429] * 2
        reasons = [one.headers["Stripe-Rate-Limited-Reason"] for one in (basic[-1], events[-1])]
        assert reasons == ["global-rate", "endpoint-rate"]


def test_rule_11_v1_may_answer_a_second_call_with_409() -> None:
    with running_simulator(SimulatorConfig(port=0, concurrency_refusal_status=409)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        sim.play({"fault": "slow", "seconds": 1})
        slow = threading.Thread(target=send, args=(sim, "id-1"))
        slow.start()
        time.sleep(0.4)
        refused = send(sim, "id-2", "key-2")
        slow.join()
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_concurrent_requests")
        assert send(sim, "id-2", "key-2").status_code == 200


def test_rule_13_a_page_in_html_hides_a_success(sim: SimulatorControl) -> None:
    sim.play({"fault": "html_answer"})
    with pytest.raises(stripe.APIError, match="Invalid response body"):
        sdk(sim).v1.billing.meter_events.create(event("id-1"))  # type: ignore[arg-type]
    assert sim.total() == "5"


@pytest.mark.parametrize("fault", ["reset_before_apply", "reset_after_apply", "cut_body", "stall_body"])
def test_rule_13_the_sdk_sees_a_lost_answer_as_a_broken_connection(sim: SimulatorControl, fault: str) -> None:
    sim.play({"fault": fault, "seconds": 0.3})
    with pytest.raises(stripe.APIConnectionError):
        sdk(sim).v1.billing.meter_events.create(event("id-1"))  # type: ignore[arg-type]
    assert sim.total() == ("0" if fault == "reset_before_apply" else "5")
