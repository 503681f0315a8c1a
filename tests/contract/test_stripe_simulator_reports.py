"""Rules 10 and 21: what fails after its 200, told per meter and window in thin events with samples."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.stripe_simulator.codes import CODES
from tests.contract.stripe_calls import AUTHORIZATION, DAY, event, http, sdk, stream, token

REPORT = "v1.billing.meter.error_report_triggered"
NO_METER = "v1.billing.meter.no_meter_found"


def settle(sim: SimulatorControl) -> None:
    """Let the window close and its event be made."""
    sim.advance(12)


def listed(sim: SimulatorControl, *types: str) -> list[Any]:
    wanted: Any = {"types": list(types)} if types else {}
    return sdk(sim).v2.core.events.list(wanted).data


def align(sim: SimulatorControl) -> int:
    """Put the clock at the beginning of a window; what a test sends fits into it."""
    start = (int(sim.now()) // 10 + 1) * 10
    sim.set_clock(start + 0.001)
    return start


def send(sim: SimulatorControl, **changes: str) -> httpx.Response:
    form = {"event_name": "calls", "customer": "cus_1", "value": "5"} | changes
    form["payload[stripe_customer_id]"] = form.pop("customer")
    value = form.pop("value")
    form |= {} if value == "absent" else {"payload[value]": value}
    return http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=AUTHORIZATION)


PROBLEMS: dict[str, dict[str, str]] = {
    "no_meter": {"event_name": "nope"},
    "archived_meter": {"event_name": "old"},
    "meter_event_no_customer_defined": {"customer": ""},
    "meter_event_customer_not_found": {"customer": "cus_9"},
    "meter_event_value_not_found": {"value": "absent"},
    "meter_event_invalid_value": {"value": "many"},
    "meter_event_value_too_many_digits": {"value": "1234567890123456"},
    "timestamp_too_far_in_past": {"timestamp": "1000000000"},
    "timestamp_in_future": {"timestamp": "4000000000"},
}
OLD_METER = {"id": "mtr_old", "event_name": "old", "status": "inactive"}


@pytest.mark.parametrize("code", sorted(CODES))
def test_rule_10_each_class_fails_at_the_call_by_default(sim: SimulatorControl, code: str) -> None:
    sim.seed(meters=[OLD_METER])
    assert send(sim, **PROBLEMS[code]).status_code == 400
    assert sim.stats()["error_reports"] == []


@pytest.mark.parametrize("code", sorted(CODES))
def test_rule_10_each_class_alone_can_be_answered_200_and_reported(code: str) -> None:
    with running_simulator(SimulatorConfig(port=0, reported_later=frozenset({code}))) as sim:
        sim.seed(customers=["cus_1"], meters=["calls", OLD_METER])
        statuses = {one: send(sim, **PROBLEMS[one]).status_code for one in CODES}
        assert statuses.pop(code) == 200
        assert set(statuses.values()) == {400}
        settle(sim)
        (told,) = listed(sim)
        (error_type,) = told.data.reason.error_types
        assert (error_type.code, error_type.error_count) == (code, 1)


def test_rule_21_errors_are_told_once_per_meter_and_window(sim: SimulatorControl) -> None:
    key, start = token(sim), align(sim)
    stream(sim, key, event("a", customer="cus_9"), event("b", value="x"), event("c", value="y"))
    stream(sim, key, event("d", event_name="bytes", value="z"))
    assert listed(sim) == [], "the window is still open"
    sim.set_clock(start + 10)
    assert listed(sim) == [], "its event comes 2 seconds after its end"
    stream(sim, key, event("e", value="later"))
    sim.set_clock(start + 12.1)
    told = {one.related_object.id: one for one in listed(sim, REPORT)}
    assert set(told) == {"mtr_calls", "mtr_bytes"}
    data = told["mtr_calls"].data
    assert data.developer_message_summary == "There are 3 invalid events"
    assert data.reason.error_count == 3
    assert {one.code: one.error_count for one in data.reason.error_types} == {
        "meter_event_customer_not_found": 1,
        "meter_event_invalid_value": 2,
    }
    assert stamp(data.validation_start) == start
    assert stamp(data.validation_end) == start + 10
    assert stamp(told["mtr_calls"].created) == start + 12
    sim.advance(10)
    assert len(listed(sim, REPORT)) == 3, "the next window has its own"
    assert len(listed(sim, REPORT)) == 3


def stamp(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def test_rule_21_the_errors_named_are_only_a_sample_of_those_counted() -> None:
    with running_simulator(SimulatorConfig(port=0, report_samples_max=3)) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        key = token(sim)
        align(sim)
        stream(sim, key, *(event(f"id-{number}", value="bad") for number in range(40)))
        settle(sim)
        (told,) = listed(sim)
        (error_type,) = told.data.reason.error_types
        assert (told.data.reason.error_count, error_type.error_count) == (40, 40)
        named = [one.request.identifier for one in error_type.sample_errors]
        assert named == ["id-0", "id-1", "id-2"]
        assert "must be a decimal number" in error_type.sample_errors[0].error_message


def test_rule_21_the_older_form_names_a_request_by_id_and_key() -> None:
    config = SimulatorConfig(
        port=0, report_names_request_by="id_and_key", reported_later=frozenset({"meter_event_invalid_value"})
    )
    with running_simulator(config) as sim:
        sim.seed(customers=["cus_1"], meters=["calls"])
        sdk(sim).v1.billing.meter_events.create(event("a", value="x"), {"idempotency_key": "key-1"})  # type: ignore[arg-type]
        settle(sim)
        (told,) = listed(sim)
        request = told.data.reason.error_types[0].sample_errors[0].request
        assert request.to_dict() == {"id": "", "idempotency_key": "key-1"}


def test_rule_21_unknown_meters_are_told_without_a_related_object(sim: SimulatorControl) -> None:
    stream(sim, token(sim), event("a", event_name="nope"), event("b", event_name="nada"))
    settle(sim)
    (told,) = listed(sim)
    assert told.type == NO_METER
    assert "related_object" not in told.to_dict()
    assert told.data.reason.error_types[0].code == "no_meter"
    assert told.data.reason.error_count == 2


def test_rule_21_an_event_is_fetched_whole_and_its_meter_too(sim: SimulatorControl) -> None:
    stream(sim, token(sim), event("a", value="x"))
    settle(sim)
    (one,) = listed(sim)
    fetched: Any = sdk(sim).v2.core.events.retrieve(one.id)
    assert fetched.object == "v2.core.event"
    assert fetched.data.reason.error_types[0].sample_errors[0].request.identifier == "a"
    assert fetched.fetch_related_object().id == "mtr_calls"


def test_events_are_listed_newest_first_filtered_and_in_pages(sim: SimulatorControl) -> None:
    made = [sim.emit_thin(REPORT if number % 2 else NO_METER) for number in range(7)]
    page = sdk(sim).v2.core.events.list({"limit": 3})
    assert [one.id for one in page.data] == made[:3:-1]
    assert [one.id for one in page.auto_paging_iter()] == made[::-1]
    assert [one.id for one in listed(sim, REPORT)] == made[::-1][1::2]


def test_events_can_be_retrieved_for_30_days(sim: SimulatorControl) -> None:
    thin, snapshot = sim.emit_thin(NO_METER), sim.emit("invoice.paid", {"id": "in_1"})
    sim.advance(30 * DAY - 60)
    assert sdk(sim).v2.core.events.retrieve(thin).id == thin
    assert sdk(sim).v1.events.retrieve(snapshot).data.object["id"] == "in_1"
    assert [one.id for one in sdk(sim).v1.events.list({"type": "invoice.paid"}).data] == [snapshot]
    sim.advance(61)
    for lost in (
        lambda: sdk(sim).v2.core.events.retrieve(thin),
        lambda: sdk(sim).v1.events.retrieve(snapshot),
    ):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            lost()
        assert caught.value.http_status == 404
