"""Idempotency-Key on v1 POSTs: what is replayed, what is refused, what is never kept."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, DAY, http


def send(
    sim: SimulatorControl, key: str | None, account: str | None = None, **changes: str
) -> httpx.Response:
    form = {"event_name": "calls", "payload[stripe_customer_id]": "cus_1", "payload[value]": "5"} | changes
    headers = dict(AUTHORIZATION)
    headers |= {"Idempotency-Key": key} if key is not None else {}
    headers |= {"Stripe-Account": account} if account is not None else {}
    return http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers)


def test_the_same_key_and_parameters_replay_status_and_body(sim: SimulatorControl) -> None:
    first = send(sim, "key-1", identifier="id-1")
    second = send(sim, "key-1", identifier="id-1")
    assert (second.status_code, second.content) == (200, first.content)
    assert second.headers["Idempotent-Replayed"] == "true"
    assert second.headers["Original-Request"] == first.headers["Request-Id"]
    assert second.headers["Request-Id"] != first.headers["Request-Id"]
    assert second.headers["Idempotency-Key"] == "key-1"
    assert "Idempotent-Replayed" not in first.headers
    assert sim.total() == "5"
    assert sim.stats()["replays"] == 1


def test_the_order_of_parameters_does_not_matter(sim: SimulatorControl) -> None:
    pairs = ["event_name=calls", "payload[value]=5", "payload[stripe_customer_id]=cus_1"]
    headers = {
        "Authorization": "Bearer sk_test_x",
        "Idempotency-Key": "key-1",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    url = f"{sim.url}/v1/billing/meter_events"
    for body in ("&".join(pairs), "&".join(reversed(pairs))):
        response = http.post(url, content=body, headers=headers)
    assert response.headers["Idempotent-Replayed"] == "true"


def test_replay_comes_before_the_duplicate_check_and_a_new_key_meets_it(sim: SimulatorControl) -> None:
    send(sim, "key-1", identifier="id-1")
    assert send(sim, "key-1", identifier="id-1").status_code == 200
    assert send(sim, "key-2", identifier="id-1").status_code == 400


def test_the_same_key_with_other_parameters_is_refused(sim: SimulatorControl) -> None:
    send(sim, "key-1", identifier="id-1")
    refused = send(sim, "key-1", identifier="id-2")
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "type": "idempotency_error",
        "message": "Keys for idempotent requests can only be used with the same parameters they were first "
        "used with. Try using a key other than 'key-1' if you meant to execute a different request.",
    }
    assert sim.total() == "5"


def test_the_sdk_raises_an_idempotency_error_for_other_parameters(sim: SimulatorControl) -> None:
    stripe.enable_telemetry = False
    client = stripe.StripeClient("sk_test_x", base_addresses={"api": sim.url}, max_network_retries=0)
    client.v1.customers.create({"name": "a"}, {"idempotency_key": "key-1"})
    with pytest.raises(stripe.IdempotencyError):
        client.v1.customers.create({"name": "b"}, {"idempotency_key": "key-1"})


def test_a_key_is_forgotten_after_24_hours(sim: SimulatorControl) -> None:
    send(sim, "key-1", identifier="id-1")
    sim.advance(DAY - 10)
    assert send(sim, "key-1", identifier="id-1").headers["Idempotent-Replayed"] == "true"
    sim.advance(20)
    again = send(sim, "key-1", identifier="id-1")
    assert (again.status_code, "Idempotent-Replayed" in again.headers) == (200, False)
    assert sim.total() == "10"


def test_a_key_belongs_to_one_account(sim: SimulatorControl) -> None:
    send(sim, "key-1", identifier="id-1")
    assert "Idempotent-Replayed" not in send(sim, "key-1", account="acct_2", identifier="id-2").headers


def test_a_refusal_after_execution_began_is_replayed(sim: SimulatorControl) -> None:
    refused = send(sim, "key-1", event_name="late")
    sim.seed(meters=["late"])
    replayed = send(sim, "key-1", event_name="late")
    assert (replayed.status_code, replayed.content) == (400, refused.content)
    assert replayed.headers["Idempotent-Replayed"] == "true"


def test_a_stored_500_is_replayed_for_a_day(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 500, "applied": True})
    assert send(sim, "key-1", identifier="id-1").status_code == 500
    again = send(sim, "key-1", identifier="id-1")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (500, "true")
    assert send(sim, "key-2", identifier="id-1").status_code == 400, "it had been applied"
    assert sim.total() == "5"


def test_parameter_validation_is_not_stored(sim: SimulatorControl) -> None:
    assert send(sim, "key-1", timestamp="soon").status_code == 400
    assert send(sim, "key-1").status_code == 200


def test_authentication_failures_are_not_stored(sim: SimulatorControl) -> None:
    url = f"{sim.url}/v1/customers"
    assert http.post(url, headers={"Idempotency-Key": "key-1"}).status_code == 401
    headers = {"Idempotency-Key": "key-1", "Authorization": "Bearer sk_test_x"}
    assert http.post(url, headers=headers).status_code == 200


def test_rate_limiting_is_not_stored(sim: SimulatorControl) -> None:
    sim.play({"fault": "status", "status": 429, "reason": "global-rate"})
    assert send(sim, "key-1").status_code == 429
    assert send(sim, "key-1").status_code == 200


@pytest.mark.parametrize("stored", [True, False])
def test_whether_a_duplicate_refusal_is_stored_is_a_setting(stored: bool) -> None:
    with running_simulator(SimulatorConfig(port=0, store_duplicate_refusals=stored)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        send(sim, None, identifier="id-1")
        send(sim, "key-1", identifier="id-1")
        assert ("Idempotent-Replayed" in send(sim, "key-1", identifier="id-1").headers) is stored


def test_a_key_in_flight_is_a_conflict_and_wins_over_a_mismatch(sim: SimulatorControl) -> None:
    sim.play({"fault": "slow", "seconds": 0.6})
    answers: list[httpx.Response] = []
    slow = threading.Thread(target=lambda: answers.append(send(sim, "key-1", identifier="id-1")))
    slow.start()
    time.sleep(0.2)
    for changes in ({"identifier": "id-1"}, {"identifier": "id-2"}):
        conflict = send(sim, "key-1", **changes)
        assert conflict.status_code == 409
        assert conflict.json()["error"]["code"] == "idempotency_key_in_use"
        assert "another in-progress request using this Idempotent Key" in conflict.text
    slow.join()
    assert answers[0].status_code == 200
    assert "Idempotent-Replayed" in send(sim, "key-1", identifier="id-1").headers
    assert sim.total() == "5"


def test_a_key_longer_than_255_characters_is_refused(sim: SimulatorControl) -> None:
    assert send(sim, "k" * 255).status_code == 200
    assert send(sim, "k" * 256).status_code == 400


def test_reading_ignores_the_key(sim: SimulatorControl) -> None:
    headers = {"Authorization": "Bearer sk_test_x", "Idempotency-Key": "key-1"}
    for url in (f"{sim.url}/v1/customers", f"{sim.url}/v1/billing/meters"):
        assert http.get(url, headers=headers).status_code == 200


def test_the_sdk_reuses_its_key_over_retries_so_an_event_is_applied_once(sim: SimulatorControl) -> None:
    sim.play({"fault": "reset_after_apply"})
    client = stripe.StripeClient("sk_test_x", base_addresses={"api": sim.url}, max_network_retries=1)
    event = client.v1.billing.meter_events.create(
        {"event_name": "calls", "payload": {"stripe_customer_id": "cus_1", "value": "5"}}
    )
    assert event.last_response is not None
    assert event.last_response.headers["Idempotent-Replayed"] == "true"
    assert sim.total() == "5"
