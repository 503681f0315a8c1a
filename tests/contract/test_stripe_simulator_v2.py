"""Rules 5, 6, 8 to 11 and 15 as v2 has them: events one by one, their adjustments, 30 days of keys."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, DAY, event, http, sdk

EVENTS = "/v2/billing/meter_events"


def create(sim: SimulatorControl, event: dict[str, Any], key: str | None = None) -> Any:
    options: Any = {} if key is None else {"idempotency_key": key}
    wanted: Any = event
    return sdk(sim).v2.billing.meter_events.create(wanted, options)


def post(sim: SimulatorControl, event: dict[str, Any], key: str) -> httpx.Response:
    return http.post(sim.url + EVENTS, json=event, headers=AUTHORIZATION | {"Idempotency-Key": key})


def refusal(sim: SimulatorControl, event: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(stripe.InvalidRequestError) as caught:
        create(sim, event)
    assert caught.value.http_status == 400
    return caught.value.code, caught.value.user_message or ""


def test_an_event_is_created_with_rfc3339_moments(sim: SimulatorControl) -> None:
    at = datetime.fromtimestamp(int(sim.now()) - 60, UTC)
    made = create(sim, event("a", value="2.5", timestamp=at.isoformat()))
    assert (made.object, made.identifier) == ("v2.billing.meter_event", "a")
    assert datetime.fromisoformat(made.timestamp) == at
    assert abs(datetime.fromisoformat(made.created).timestamp() - sim.now()) < 5
    assert dict(made.payload.to_dict()) == {"stripe_customer_id": "cus_1", "value": "2.5"}
    (row,) = sim.ledger()["rows"]
    assert (row["value"], row["timestamp"]) == ("2.5", at.timestamp())


def test_rule_6_a_repeated_identifier_has_a_code_in_v2_and_is_shared_with_v1(sim: SimulatorControl) -> None:
    create(sim, event("a"))
    expected = "A meter event with a duplicate identifier has already been submitted."
    assert refusal(sim, event("a")) == ("duplicate_meter_event", expected)
    with pytest.raises(stripe.InvalidRequestError, match="already exists with identifier a"):
        sdk(sim).v1.billing.meter_events.create(event("a"))  # type: ignore[arg-type]
    assert sim.total() == "5"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"event_name": "nope"}, "no_meter"),
        ({"event_name": "old"}, "archived_meter"),
        ({"customer": ""}, "payload_no_customer_defined"),
        ({"value": "many"}, "payload_invalid_value"),
        ({"value": "1234567890123456"}, "payload_invalid_value"),
        ({"timestamp": "2020-01-01T00:00:00Z"}, "timestamp_too_far_in_past"),
        ({"timestamp": "2999-01-01T00:00:00Z"}, "timestamp_in_future"),
        ({"timestamp": "yesterday"}, "invalid_fields"),
    ],
)
def test_rules_9_10_and_20_problems_are_told_at_the_call_under_the_codes_of_v2(
    sim: SimulatorControl, changes: dict[str, str], code: str
) -> None:
    sim.seed(meters=[{"id": "mtr_old", "event_name": "old", "status": "inactive"}])
    assert refusal(sim, event("a", **changes))[0] == code
    assert sim.stats()["error_reports"] == []


def test_rule_9_a_missing_value_has_a_code_of_its_own(sim: SimulatorControl) -> None:
    without = event("a") | {"payload": {"stripe_customer_id": "cus_1"}}
    assert refusal(sim, without)[0] == "payload_no_value_defined"


def test_rule_10_a_customer_that_does_not_exist_is_reported_later(sim: SimulatorControl) -> None:
    create(sim, event("a", customer="cus_9"))
    assert [one["code"] for one in sim.stats()["error_reports"]] == ["meter_event_customer_not_found"]


def test_rule_9_v2_may_insist_on_positive_integers_while_v1_takes_decimals() -> None:
    with running_simulator(SimulatorConfig(port=0, strict_positive_integer_v2=True)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        for value in ("0", "-1", "1.5"):
            code, message = refusal(sim, event("a", value=value))
            assert code == "payload_invalid_value"
            assert "must be a positive integer" in message
        create(sim, event("a", value="7"))
        sdk(sim).v1.billing.meter_events.create(event("b", value="-1.5"))  # type: ignore[arg-type]
        assert sim.total() == "5.5"


def test_rule_11_a_second_call_for_a_customer_and_meter_is_a_409_and_not_stored(
    sim: SimulatorControl,
) -> None:
    sim.play({"fault": "slow", "seconds": 1})
    slow = threading.Thread(target=post, args=(sim, event("a"), "key-a"))
    slow.start()
    time.sleep(0.4)
    refused = post(sim, event("b"), "key-b")
    slow.join()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_concurrent_requests")
    assert post(sim, event("b"), "key-b").status_code == 200


def test_rule_5_a_success_is_answered_again_for_30_days_without_effect(sim: SimulatorControl) -> None:
    first = post(sim, event("a"), "key-1")
    sim.advance(30 * DAY - 60)
    again = post(sim, event("a"), "key-1")
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    sim.advance(120)
    assert "Idempotent-Replayed" not in post(sim, event("a"), "key-1").headers
    assert sim.total() == "10", "by then the identifier was free again, too"


def test_rule_5_a_request_that_failed_is_executed_again(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 500, "applied": False})
    assert post(sim, event("a"), "key-1").status_code == 500
    assert post(sim, event("a"), "key-1").status_code == 200
    assert post(sim, event("b", event_name="late"), "key-2").status_code == 400
    sim.seed(meters=["late"])
    assert post(sim, event("b", event_name="late"), "key-2").status_code == 200
    assert sim.total() == "10"


def test_rule_5_the_sdk_retries_a_500_of_v2_and_then_it_is_executed(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 500, "applied": False})
    wanted: Any = event("a")
    assert sdk(sim, retries=1).v2.billing.meter_events.create(wanted).identifier == "a"
    assert sim.total() == "5"


def test_rule_5_a_500_that_hid_a_success_meets_the_duplicate_check_when_repeated(
    sim: SimulatorControl,
) -> None:
    sim.play({"fault": "status", "status": 500, "applied": True})
    assert post(sim, event("a"), "key-1").status_code == 500
    again = post(sim, event("a"), "key-1")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "duplicate_meter_event")
    assert sim.total() == "5"


def test_rule_5_a_key_with_other_parameters_is_an_idempotency_error_and_belongs_to_one_endpoint(
    sim: SimulatorControl,
) -> None:
    create(sim, event("a"), "key-1")
    with pytest.raises(stripe.IdempotencyError):
        create(sim, event("b"), "key-1")
    options: Any = {"idempotency_key": "key-1"}
    assert sdk(sim).v2.billing.meter_event_session.create(options=options).authentication_token
    sdk(sim).v1.customers.create({"name": "Ada"}, options)


def test_rule_12_a_429_of_v2_is_a_rate_limit_error_and_not_stored(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 429, "reason": "resource-specific"})
    refused = post(sim, event("a"), "key-1")
    assert refused.json()["error"]["type"] == "rate_limit"
    assert refused.headers["Stripe-Rate-Limited-Reason"] == "resource-specific"
    assert post(sim, event("a"), "key-1").status_code == 200


def test_rule_15_an_adjustment_of_v2_has_an_id_and_its_own_refusal(sim: SimulatorControl) -> None:
    adjustments = sdk(sim).v2.billing.meter_event_adjustments
    create(sim, event("a"))
    create(sim, event("b"))
    made = adjustments.create({"type": "cancel", "event_name": "calls", "cancel": {"identifier": "a"}})
    assert (made.object, made.status) == ("v2.billing.meter_event_adjustment", "pending")
    assert made.id
    assert sim.total() == "5"
    sim.advance(DAY + 1)
    for identifier in ("a", "b", "nobody"):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            adjustments.create(
                {"type": "cancel", "event_name": "calls", "cancel": {"identifier": identifier}}
            )
        assert caught.value.code == "invalid_cancel_configuration"


@pytest.mark.parametrize("content", [b"event_name=calls", b"[1]", b'{"event_name": 5, "payload": {}}'])
def test_a_body_that_is_no_json_object_of_strings_is_refused(sim: SimulatorControl, content: bytes) -> None:
    response = http.post(sim.url + EVENTS, content=content, headers=AUTHORIZATION)
    assert response.status_code == 400
