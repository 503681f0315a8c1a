"""Rule 14: the v2 stream: sessions of 15 minutes, batches of 100, an empty answer, validation afterwards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, DAY, MINUTE, event, http, sdk, stream, token

URL = "/v2/billing/meter_event_stream"


def codes(sim: SimulatorControl) -> dict[str, str]:
    return {one["identifier"]: one["code"] for one in sim.stats()["error_reports"]}


def rfc3339(sim: SimulatorControl, seconds: float) -> str:
    return datetime.fromtimestamp(sim.now() + seconds, UTC).isoformat()


def test_a_session_lives_for_15_minutes_by_the_simulators_clock(sim: SimulatorControl) -> None:
    session = sdk(sim).v2.billing.meter_event_session.create()
    assert session.object == "v2.billing.meter_event_session"
    stream(sim, session.authentication_token, event("a"))
    sim.advance(14 * MINUTE)
    stream(sim, session.authentication_token, event("b"))
    sim.advance(MINUTE)
    with pytest.raises(stripe.TemporarySessionExpiredError) as caught:
        stream(sim, session.authentication_token, event("c"))
    assert caught.value.code == "billing_meter_event_session_expired"
    assert caught.value.http_status == 401
    assert sim.total() == "10"


@pytest.mark.parametrize("key", ["mes_tok_test_never_given", "sk_test_x"])
def test_the_stream_takes_nothing_but_a_session_token(sim: SimulatorControl, key: str) -> None:
    with pytest.raises(stripe.TemporarySessionExpiredError):
        stream(sim, key, event("a"))
    assert http.post(sim.url + URL, json={"events": [event()]}).status_code == 401


def test_a_session_token_is_no_api_key(sim: SimulatorControl) -> None:
    with pytest.raises(stripe.AuthenticationError):
        sdk(sim, token(sim)).v1.customers.list()


def test_a_batch_of_100_counts_at_once_and_101_are_refused_whole(sim: SimulatorControl) -> None:
    key = token(sim)
    stream(sim, key, *(event(f"id-{number}", value="0.1") for number in range(100)))
    assert (sim.total(), sim.stats()["applied"]) == ("10.0", 100)
    with pytest.raises(stripe.InvalidRequestError, match="length <= 100"):
        stream(sim, key, *(event(f"more-{number}") for number in range(101)))
    assert sim.stats()["applied"] == 100


def test_the_answer_is_200_and_empty_whatever_the_events_are_worth(sim: SimulatorControl) -> None:
    sim.seed(meters=[{"id": "mtr_old", "event_name": "old", "status": "inactive"}])
    now = rfc3339(sim, 0)
    events = [
        event("good", timestamp=now),
        event("unknown-meter", event_name="nope"),
        event("archived", event_name="old"),
        event("unknown-customer", customer="cus_9"),
        event("no-customer", customer=""),
        event("no-value") | {"payload": {"stripe_customer_id": "cus_1"}},
        event("bad-value", value="many"),
        event("digits", value="1234567890123456"),
        event("past", timestamp=rfc3339(sim, -36 * DAY)),
        event("future", timestamp=rfc3339(sim, 6 * MINUTE)),
    ]
    headers = {"Authorization": f"Bearer {token(sim)}"}
    response = http.post(sim.url + URL, json={"events": events}, headers=headers)
    assert (response.status_code, response.json()) == (200, {})
    assert sim.total() == "5"
    assert codes(sim) == {
        "unknown-meter": "no_meter",
        "archived": "archived_meter",
        "unknown-customer": "meter_event_customer_not_found",
        "no-customer": "meter_event_no_customer_defined",
        "no-value": "meter_event_value_not_found",
        "bad-value": "meter_event_invalid_value",
        "digits": "meter_event_value_too_many_digits",
        "past": "timestamp_too_far_in_past",
        "future": "timestamp_in_future",
    }


def test_a_repeated_identifier_is_silently_not_counted_again(sim: SimulatorControl) -> None:
    key = token(sim)
    stream(sim, key, event("a"), event("a"), event("b"))
    stream(sim, key, event("a"), event("c"))
    assert sim.total() == "15"
    assert (sim.stats()["duplicates_ignored"], sim.stats()["error_reports"]) == (2, [])


def test_an_identifier_counts_again_after_its_window(sim: SimulatorControl) -> None:
    stream(sim, token(sim), event("a"))
    sim.advance(DAY - 10)
    stream(sim, token(sim), event("a"))
    assert sim.total() == "5"
    sim.advance(20)
    stream(sim, token(sim), event("a"))
    assert sim.total() == "10"


def test_identifiers_scoped_to_the_event_name_are_so_in_the_stream_too() -> None:
    with running_simulator(SimulatorConfig(port=0, identifier_scope="event_name")) as sim:
        sim.seed(customers=["cus_1"], meters=["calls", "bytes"])
        key = token(sim)
        stream(sim, key, event("a"), event("a", event_name="bytes"), event("a"))
        stream(sim, key, event("a"), event("b", event_name="bytes"))
        assert sim.total() == "15"


def test_one_call_per_customer_and_meter_is_no_rule_of_the_stream(sim: SimulatorControl) -> None:
    stream(sim, token(sim), event("a"))
    assert sim.stats()["max_in_flight_per_customer_meter"] == 0


def test_events_without_identifier_or_timestamp_get_both_and_payloads_keep_dimensions(
    sim: SimulatorControl,
) -> None:
    payload = {"stripe_customer_id": "cus_1", "value": "5", "region": "eu"}
    stream(sim, token(sim), {"event_name": "calls", "payload": payload})
    (row,) = sim.ledger()["rows"]
    assert row["identifier"]
    assert abs(row["timestamp"] - sim.now()) < 5
    assert row["dimensions"] == {"region": "eu"}


@pytest.mark.parametrize(
    "body",
    [
        b"events=1",
        b"[]",
        b"{}",
        b'{"events": []}',
        b'{"events": [{"event_name": "calls"}]}',
        b'{"events": [{"event_name": "calls", "payload": {"value": 5}}]}',
        b'{"events": [{"event_name": "calls", "payload": {}, "colour": "red"}]}',
        b'{"events": [{"event_name": "calls", "payload": {}, "timestamp": "1700000000"}]}',
        b'{"events": [{"event_name": "calls", "payload": {}, "timestamp": "2026-11-22T05:00:00"}]}',
        b'{"events": [{"event_name": "calls", "payload": {}, "identifier": "' + b"x" * 101 + b'"}]}',
    ],
)
def test_a_body_that_is_not_of_the_documented_shape_is_refused_whole(
    sim: SimulatorControl, body: bytes
) -> None:
    headers = {"Authorization": f"Bearer {token(sim)}", "Content-Type": "application/json"}
    response = http.post(sim.url + URL, content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert sim.ledger()["rows"] == []


def test_the_same_key_is_answered_again_without_counting(sim: SimulatorControl) -> None:
    headers = {"Authorization": f"Bearer {token(sim)}", "Idempotency-Key": "key-1"}
    answers = [http.post(sim.url + URL, json={"events": [event()]}, headers=headers) for _ in range(2)]
    assert [one.status_code for one in answers] == [200, 200]
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert sim.total() == "5"


def test_events_beyond_the_rate_of_the_stream_are_refused_as_v2_refuses() -> None:
    with running_simulator(SimulatorConfig(port=0, stream_rate_per_second=150)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        key = token(sim)
        batch = [event(f"id-{number}") for number in range(100)]
        stream(sim, key, *batch)
        with pytest.raises(stripe.RateLimitError) as caught:
            stream(sim, key, *batch)
        headers: Any = caught.value.headers
        assert headers["Stripe-Rate-Limited-Reason"] == "global-rate"
        assert sdk(sim).v1.customers.list().data, "other calls have a rate of their own"


def test_faults_reach_the_stream_too(sim: SimulatorControl) -> None:
    key = token(sim)
    sim.play(
        {"match": {"path": URL}, "fault": "status", "status": 503, "applied": True},
        {"match": {"path": URL}, "fault": "reset_after_apply"},
    )
    for identifier, error in (("a", stripe.APIError), ("b", stripe.APIConnectionError)):
        with pytest.raises(error):
            stream(sim, key, event(identifier))
    stream(sim, key, event("a"), event("b"))
    assert sim.total() == "10"


def test_one_identifier_streamed_with_two_values_is_noticed(sim: SimulatorControl) -> None:
    key = token(sim)
    stream(sim, key, event("a", value="50"), event("a", value="50.0"))
    assert sim.stats()["identifiers_with_two_values"] == 0
    stream(sim, key, event("a", value="51"))
    assert sim.stats()["identifiers_with_two_values"] == 1


def test_an_api_key_is_needed_for_a_session(sim: SimulatorControl) -> None:
    url = f"{sim.url}/v2/billing/meter_event_session"
    assert http.post(url).status_code == 401
    assert http.post(url, headers=AUTHORIZATION).status_code == 200
