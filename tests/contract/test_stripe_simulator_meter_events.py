"""What the simulated v1 meter events accept and refuse, in the order in which Stripe looks."""

from __future__ import annotations

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import AUTHORIZATION, DAY, http, sdk


def send(sim: SimulatorControl, **changes: str) -> httpx.Response:
    """One meter event over raw HTTP; `customer` and `value` go into the payload."""
    form = {"event_name": "calls", "customer": "cus_1", "value": "5"} | changes
    form["payload[stripe_customer_id]"] = form.pop("customer")
    form["payload[value]"] = form.pop("value")
    headers = AUTHORIZATION
    return http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers)


def error(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 400
    return dict(response.json()["error"])


def test_the_official_sdk_creates_a_meter_event_and_the_ledger_holds_it(sim: SimulatorControl) -> None:
    now = int(sim.now())
    event = sdk(sim).v1.billing.meter_events.create(
        {
            "event_name": "calls",
            "identifier": "id-1",
            "timestamp": now,
            "payload": {"stripe_customer_id": "cus_1", "value": "5.25"},
        },
        {"idempotency_key": "key-1"},
    )
    assert (event.object, event.identifier, event.timestamp) == ("billing.meter_event", "id-1", now)
    assert event.payload["value"] == "5.25"
    (row,) = sim.ledger()["rows"]
    assert (row["identifier"], row["value"], row["idempotency_key"]) == ("id-1", "5.25", "key-1")
    assert event.last_response is not None
    assert row["request_id"] == event.last_response.request_id


def test_an_event_without_identifier_and_timestamp_gets_both(sim: SimulatorControl) -> None:
    answer = send(sim).json()
    assert answer["identifier"]
    assert abs(answer["timestamp"] - sim.now()) < 5


def test_a_repeated_identifier_is_refused_without_a_code_and_not_to_be_retried(sim: SimulatorControl) -> None:
    assert send(sim, identifier="id-1").status_code == 200
    response = send(sim, identifier="id-1")
    assert error(response) == {
        "message": "An event already exists with identifier id-1.",
        "type": "invalid_request_error",
    }
    assert response.headers["Stripe-Should-Retry"] == "false"
    assert sim.total() == "5"
    assert sim.stats()["duplicates_refused"] == 1


def test_the_sdk_reports_a_repeated_identifier_as_an_invalid_request(sim: SimulatorControl) -> None:
    send(sim, identifier="id-1")
    with pytest.raises(stripe.InvalidRequestError, match="already exists with identifier id-1") as caught:
        sdk(sim).v1.billing.meter_events.create(
            {
                "event_name": "calls",
                "identifier": "id-1",
                "payload": {"stripe_customer_id": "cus_1", "value": "5"},
            }
        )
    assert caught.value.code is None


def test_an_identifier_is_accepted_and_counted_again_after_its_window(sim: SimulatorControl) -> None:
    send(sim, identifier="id-1")
    sim.advance(DAY - 10)
    assert send(sim, identifier="id-1").status_code == 400
    sim.advance(20)
    assert send(sim, identifier="id-1").status_code == 200
    assert sim.total() == "10"


def test_without_a_window_an_identifier_stays_taken_for_ever() -> None:
    with running_simulator(SimulatorConfig(port=0, identifier_window_hours=None)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        send(sim, identifier="id-1")
        sim.advance(400 * DAY)
        assert send(sim, identifier="id-1").status_code == 400


def test_identifiers_are_unique_in_the_account_unless_scoped_to_the_event_name(sim: SimulatorControl) -> None:
    send(sim, identifier="id-1")
    assert send(sim, identifier="id-1", event_name="bytes").status_code == 400
    with running_simulator(SimulatorConfig(port=0, identifier_scope="event_name")) as scoped:
        scoped.seed(customers=["cus_1"], meters=["calls", "bytes"])
        send(scoped, identifier="id-1")
        assert send(scoped, identifier="id-1", event_name="bytes").status_code == 200
        assert send(scoped, identifier="id-1", event_name="calls").status_code == 400


def test_timestamps_reach_35_days_back_and_5_minutes_ahead(sim: SimulatorControl) -> None:
    now = int(sim.now())
    assert send(sim, timestamp=str(now - 35 * DAY + 60)).status_code == 200
    assert send(sim, timestamp=str(now + 290)).status_code == 200
    past = error(send(sim, timestamp=str(now - 35 * DAY - 60)))
    assert past["message"].startswith(
        "The event timestamp cannot be more than 35 days in past. "
        "Expected a timestamp greater than or equal to "
    )
    future = error(send(sim, timestamp=str(now + 400)))
    assert future["param"] == "timestamp"


@pytest.mark.parametrize("value", ["5", "-5", "0", "0.1", "-0.000001", "123456789012345", "1.23456789012345"])
def test_a_decimal_value_is_kept_exactly(sim: SimulatorControl, value: str) -> None:
    assert send(sim, value=value).status_code == 200
    assert sim.ledger()["rows"][0]["value"] == value


@pytest.mark.parametrize(
    "value", ["NaN", "inf", "-Infinity", "abc", "", "1e3", "1,5", " 1", "0x1", "٣", "--1"]
)
def test_what_is_not_a_plain_decimal_is_refused(sim: SimulatorControl, value: str) -> None:
    assert error(send(sim, value=value))["param"] == "payload[value]"
    assert sim.ledger()["rows"] == []


def test_more_than_15_digits_are_refused(sim: SimulatorControl) -> None:
    message = "The value in the event payload can have at most 15 digits. Received 1234567890.123456."
    assert error(send(sim, value="1234567890.123456"))["message"] == message
    assert send(sim, value="000000.00000123456789012345").status_code == 200


def test_strict_values_are_positive_integers() -> None:
    with running_simulator(SimulatorConfig(port=0, strict_positive_integer=True)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        assert [send(sim, value=value).status_code for value in ("7", "0", "-1", "1.5")] == [
            200,
            400,
            400,
            400,
        ]


def test_a_missing_value_is_refused_but_a_counting_meter_needs_none(sim: SimulatorControl) -> None:
    sim.seed(meters=[{"event_name": "hits", "default_aggregation": {"formula": "count"}}])
    headers = AUTHORIZATION
    for event_name, status in (("calls", 400), ("hits", 200)):
        form = {"event_name": event_name, "payload[stripe_customer_id]": "cus_1"}
        answer = http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers)
        assert answer.status_code == status


def test_unknown_customers_and_meters_are_refused_at_the_call(sim: SimulatorControl) -> None:
    assert error(send(sim, customer="cus_9"))["message"] == "No such customer: 'cus_9'"
    assert "no customer" in error(send(sim, customer=""))["message"]
    assert error(send(sim, event_name="nope"))["message"] == "No active meter found for event name 'nope'."
    assert sim.total() == "0"


def test_unknown_customers_and_meters_can_fail_after_the_call_instead() -> None:
    config = SimulatorConfig(port=0, unknown_customer="report", unknown_meter="report")
    with running_simulator(config) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        assert send(sim, customer="cus_9", identifier="a").status_code == 200
        assert send(sim, event_name="nope", identifier="b").status_code == 200
        assert send(sim, customer="", identifier="c").status_code == 200
        reports = [(one["identifier"], one["code"]) for one in sim.stats()["error_reports"]]
        assert reports == [
            ("a", "meter_event_customer_not_found"),
            ("b", "no_meter"),
            ("c", "meter_event_no_customer_defined"),
        ]
        assert sim.total() == "0"
        assert send(sim, identifier="a").status_code == 400, "the identifier of a failed event stays taken"


def test_a_deactivated_meter_accepts_no_events_until_it_is_reactivated(sim: SimulatorControl) -> None:
    meters = sdk(sim).v1.billing.meters
    assert meters.deactivate("mtr_calls").status == "inactive"
    assert "not active" in error(send(sim))["message"]
    assert meters.reactivate("mtr_calls").status == "active"
    assert send(sim).status_code == 200


def test_an_event_name_belongs_to_one_active_meter(sim: SimulatorControl) -> None:
    meters = sdk(sim).v1.billing.meters
    with pytest.raises(stripe.InvalidRequestError, match="already an active meter"):
        meters.create({"display_name": "x", "event_name": "calls", "default_aggregation": {"formula": "sum"}})
    meters.deactivate("mtr_calls")
    meters.create({"display_name": "x", "event_name": "calls", "default_aggregation": {"formula": "sum"}})
    with pytest.raises(stripe.InvalidRequestError, match="already an active meter"):
        meters.reactivate("mtr_calls")


def test_a_meter_names_its_own_payload_keys(sim: SimulatorControl) -> None:
    meter = sdk(sim).v1.billing.meters.create(
        {
            "display_name": "Tokens",
            "event_name": "tokens",
            "default_aggregation": {"formula": "sum"},
            "customer_mapping": {"type": "by_id", "event_payload_key": "who"},
            "value_settings": {"event_payload_key": "how_many"},
        }
    )
    assert meter.value_settings.event_payload_key == "how_many"
    form = {"event_name": "tokens", "payload[who]": "cus_2", "payload[how_many]": "9"}
    headers = {"Authorization": "Bearer rk_test_x"}
    assert http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=headers).status_code == 200
    assert sim.total(customer="cus_2", event_name="tokens") == "9"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"event_name": ""}, "parameter_invalid_empty", "event_name"),
        ({"colour": "red"}, "parameter_unknown", "colour"),
        ({"timestamp": "soon"}, "parameter_invalid_integer", "timestamp"),
        ({"identifier": "x" * 101}, None, "identifier"),
        ({"value": "1" * 101}, None, "payload[value]"),
        ({"payload": "5"}, None, "payload"),
    ],
)
def test_parameters_are_validated(
    sim: SimulatorControl, changes: dict[str, str], code: str | None, param: str
) -> None:
    refusal = error(send(sim, **changes))
    assert (refusal.get("code"), refusal["param"]) == (code, param)


def test_an_event_is_cancelled_by_identifier_within_24_hours_of_receipt(sim: SimulatorControl) -> None:
    client = sdk(sim)
    for identifier in ("id-1", "id-2"):
        send(sim, identifier=identifier)
    cancelled = client.v1.billing.meter_event_adjustments.create(
        {"type": "cancel", "event_name": "calls", "cancel": {"identifier": "id-1"}}
    )
    assert cancelled.status == "pending"
    assert sim.total() == "5"
    assert [row["cancelled_at"] is None for row in sim.ledger()["rows"]] == [False, True]
    assert sim.stats()["cancellations"] == {"pending": 0, "complete": 1}
    sim.advance(DAY + 1)
    for identifier, message in (
        ("id-2", "within 24 hours"),
        ("id-9", "No meter event found"),
        ("id-1", "already"),
    ):
        with pytest.raises(stripe.InvalidRequestError, match=message):
            client.v1.billing.meter_event_adjustments.create(
                {"type": "cancel", "event_name": "calls", "cancel": {"identifier": identifier}}
            )


def test_one_identifier_sent_for_two_values_is_noticed_even_when_refused(sim: SimulatorControl) -> None:
    send(sim, identifier="id-1", value="5")
    send(sim, identifier="id-1", value="5.0")
    assert sim.stats()["identifiers_with_two_values"] == 0
    send(sim, identifier="id-1", value="6")
    assert sim.stats()["identifiers_with_two_values"] == 1
