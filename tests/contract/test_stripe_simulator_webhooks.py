"""Rule 22: signed webhooks that are retried, repeated, reordered, and sometimes not what they seem."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import DAY, HOUR, MINUTE, event, sdk, stream, token
from tests.contract.webhook_receiver import Receiver, listening

REPORT = "v1.billing.meter.error_report_triggered"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with listening() as receiver:
        yield receiver


def endpoint(sim: SimulatorControl, receiver: Receiver, *types: str) -> Any:
    events: Any = list(types) or ["*"]
    return sdk(sim).v1.webhook_endpoints.create({"url": receiver.url, "enabled_events": events})


def destination(sim: SimulatorControl, receiver: Receiver, *types: str, payload: str = "thin") -> Any:
    wanted: Any = {
        "name": "tests",
        "type": "webhook_endpoint",
        "event_payload": payload,
        "enabled_events": list(types) or ["*"],
        "webhook_endpoint": {"url": receiver.url},
        "include": ["webhook_endpoint.signing_secret", "webhook_endpoint.url"],
    }
    return sdk(sim).v2.core.event_destinations.create(wanted)


def invoice(sim: SimulatorControl, number: int = 1) -> str:
    return sim.emit("invoice.paid", {"id": f"in_{number}", "object": "invoice"})


def ids(receiver: Receiver) -> list[str]:
    return [json.loads(one.body)["id"] for one in receiver.received]


def test_a_snapshot_event_arrives_signed_as_the_library_expects(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    secret = endpoint(sim, receiver, "invoice.paid").secret
    wanted = invoice(sim)
    sim.emit("customer.created", {"id": "cus_7"})
    sim.deliver()
    (one,) = receiver.received
    told = one.verified(secret)
    assert (told.id, told.type, told.data.object["id"]) == (wanted, "invoice.paid", "in_1")
    assert sim.deliveries()["states"] == {"delivered": 1}


def test_a_body_that_was_changed_is_not_believed(sim: SimulatorControl, receiver: Receiver) -> None:
    secret = endpoint(sim, receiver).secret
    invoice(sim)
    sim.deliver()
    (one,) = receiver.received
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.Webhook.construct_event(one.body.replace(b"in_1", b"in_2"), one.signature, secret)


def test_a_thin_event_is_pushed_without_data_and_fetched_whole(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    made = destination(sim, receiver, REPORT)
    assert made.webhook_endpoint.url == receiver.url
    stream(sim, token(sim), event("a", value="x"))
    sim.advance(12)
    sim.deliver()
    (one,) = receiver.received
    client = sdk(sim)
    told: Any = client.parse_event_notification(one.body, one.signature, made.webhook_endpoint.signing_secret)
    assert isinstance(told, stripe.events.V1BillingMeterErrorReportTriggeredEventNotification)
    assert "data" not in json.loads(one.body)
    assert told.fetch_event().data.reason.error_count == 1
    assert told.fetch_related_object().id == "mtr_calls"


def test_a_destination_gets_its_kind_of_events_and_no_other(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    destination(sim, receiver)
    invoice(sim)
    thin = sim.emit_thin(REPORT)
    sim.deliver()
    assert ids(receiver) == [thin]
    destination(sim, receiver, payload="snapshot")
    snapshot = invoice(sim)
    sim.deliver()
    assert ids(receiver) == [thin, snapshot]


def test_the_secret_is_told_once(sim: SimulatorControl, receiver: Receiver) -> None:
    made, client = endpoint(sim, receiver), sdk(sim)
    assert made.secret.startswith("whsec_")
    assert "secret" not in client.v1.webhook_endpoints.retrieve(made.id).to_dict()
    assert "secret" not in client.v1.webhook_endpoints.list().data[0].to_dict()
    thin = destination(sim, receiver)
    again: Any = client.v2.core.event_destinations.retrieve(thin.id)
    assert (again.webhook_endpoint.signing_secret, again.webhook_endpoint.url) == (None, None)
    assert [one.id for one in client.v2.core.event_destinations.list().data] == [thin.id, made.id]


def test_endpoints_are_changed_switched_off_and_deleted(sim: SimulatorControl, receiver: Receiver) -> None:
    client, made, thin = sdk(sim), endpoint(sim, receiver), destination(sim, receiver)
    changed = client.v1.webhook_endpoints.update(made.id, {"enabled_events": ["customer.created"]})
    assert (changed.enabled_events, changed.status) == (["customer.created"], "enabled")
    assert client.v1.webhook_endpoints.update(made.id, {"disabled": True}).status == "disabled"
    assert client.v2.core.event_destinations.disable(thin.id).status == "disabled"
    sim.emit_thin(REPORT)
    assert client.v2.core.event_destinations.enable(thin.id).status == "enabled"
    ping = client.v2.core.event_destinations.ping(thin.id)
    sim.deliver()
    assert ids(receiver) == [ping.id]
    moved = client.v2.core.event_destinations.update(
        thin.id,
        {
            "name": "renamed",
            "webhook_endpoint": {"url": "http://127.0.0.1:9/x"},
            "include": ["webhook_endpoint.url"],
        },
    )
    where: Any = moved.webhook_endpoint
    assert (moved.name, where.url, moved.enabled_events) == ("renamed", "http://127.0.0.1:9/x", ["*"])
    client.v1.webhook_endpoints.delete(made.id)
    client.v2.core.event_destinations.delete(thin.id)
    assert client.v1.webhook_endpoints.list().data == []


@pytest.mark.parametrize("url", ["nowhere", "ftp://example.com/x"])
def test_an_endpoint_needs_a_url_and_events(sim: SimulatorControl, url: str) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="explicit scheme"):
        sdk(sim).v1.webhook_endpoints.create({"url": url, "enabled_events": ["*"]})
    with pytest.raises(stripe.InvalidRequestError, match="enabled_events"):
        sdk(sim).v1.webhook_endpoints.create({"url": "http://127.0.0.1:1", "enabled_events": []})


def test_while_a_secret_rolls_both_sign_and_then_only_the_new_one(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    made = endpoint(sim, receiver)
    new = sim.roll_secret(made.id)
    sim.advance(DAY - 60)
    invoice(sim)
    sim.deliver()
    assert receiver.received[0].signature.count("v1=") == 2
    for secret in (made.secret, new):
        receiver.received[0].verified(secret)
    sim.advance(120)
    invoice(sim)
    sim.deliver()
    assert receiver.received[-1].signature.count("v1=") == 1
    receiver.received[-1].verified(new)
    with pytest.raises(stripe.SignatureVerificationError):
        receiver.received[-1].verified(made.secret)
    with pytest.raises(ValueError, match="must lie between"):
        sim.roll_secret(made.id, keep_old_seconds=DAY + 1)


def test_a_test_mode_v0_signature_is_there_and_worth_nothing(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    secret = endpoint(sim, receiver).secret
    invoice(sim)
    sim.deliver()
    (one,) = receiver.received
    moment, _, v0 = one.signature.split(",")
    assert v0.startswith("v0=")
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.Webhook.construct_event(one.body, f"{moment},{v0}", secret)


def test_a_sandbox_tries_three_times_over_some_hours(sim: SimulatorControl, receiver: Receiver) -> None:
    endpoint(sim, receiver)
    receiver.answers = [500, 302, 404]
    invoice(sim)
    tries = [sim.deliver()["states"]]
    for _ in range(4):
        sim.advance(3 * HOUR)
        tries.append(sim.deliver()["states"])
    assert tries == [{"pending": 1}, {"pending": 1}, {"failed": 1}, {"failed": 1}, {"failed": 1}]
    assert sim.deliveries()["deliveries"][0]["statuses"] == [500, 302, 404]


def test_each_try_is_signed_anew(sim: SimulatorControl, receiver: Receiver) -> None:
    made = endpoint(sim, receiver)
    receiver.answers = [500]
    invoice(sim)
    sim.deliver()
    new = sim.roll_secret(made.id, keep_old_seconds=0)
    sim.advance(HOUR)
    sim.deliver()
    first, second = receiver.received
    assert first.body == second.body
    first.verified(made.secret)
    second.verified(new)
    assert sim.deliveries()["states"] == {"delivered": 1}


def test_live_mode_tries_with_growing_delays_for_up_to_three_days(receiver: Receiver) -> None:
    with running_simulator(SimulatorConfig(port=0, webhook_retries="live")) as sim:
        endpoint(sim, receiver)
        receiver.answers = [500] * 50
        invoice(sim)
        sim.deliver()
        sim.advance(2 * MINUTE)
        assert sim.deliver()["deliveries"][0]["attempts"] == 2
        for _ in range(71):
            sim.advance(HOUR)
            sim.deliver()
        (one,) = sim.deliveries()["deliveries"]
        assert (one["state"], one["attempts"]) == ("failed", 11)


def test_nobody_listening_counts_as_a_failed_try(sim: SimulatorControl) -> None:
    sdk(sim).v1.webhook_endpoints.create({"url": "http://127.0.0.1:9/none", "enabled_events": ["*"]})
    invoice(sim)
    assert sim.deliver()["deliveries"][0]["statuses"] == [0]


def test_due_webhooks_leave_by_themselves(sim: SimulatorControl, receiver: Receiver) -> None:
    endpoint(sim, receiver)
    wanted = invoice(sim)
    deadline = time.monotonic() + 10
    while not receiver.received and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ids(receiver) == [wanted]


def test_fault_a_duplicate_is_the_same_event_again(sim: SimulatorControl, receiver: Receiver) -> None:
    endpoint(sim, receiver)
    sim.play_webhooks({"fault": "duplicate", "copies": 2, "match": {"type": "invoice.*"}})
    wanted = invoice(sim)
    sim.deliver()
    assert ids(receiver) == [wanted] * 3
    sim.resend(wanted)
    sim.deliver()
    assert ids(receiver) == [wanted] * 4


def test_fault_a_held_event_is_overtaken(sim: SimulatorControl, receiver: Receiver) -> None:
    endpoint(sim, receiver)
    sim.play_webhooks({"fault": "hold", "seconds": 600})
    made = [invoice(sim, number) for number in range(3)]
    sim.deliver()
    assert ids(receiver) == made[1:]
    sim.advance(601)
    sim.deliver()
    assert ids(receiver) == [*made[1:], made[0]]


@pytest.mark.parametrize("fault", ["wrong_secret", "old_timestamp", "truncated_body"])
def test_fault_the_first_try_is_not_to_be_believed_and_the_second_is(
    sim: SimulatorControl, receiver: Receiver, fault: str
) -> None:
    secret = endpoint(sim, receiver).secret
    receiver.answers = [400]
    sim.play_webhooks({"fault": fault})
    wanted = invoice(sim)
    sim.deliver()
    sim.advance(HOUR)
    sim.deliver()
    first, second = receiver.received
    with pytest.raises(stripe.SignatureVerificationError):
        first.verified(secret)
    assert second.verified(secret).id == wanted


def test_fault_an_old_timestamp_is_refused_for_its_age_alone(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    secret = endpoint(sim, receiver).secret
    sim.play_webhooks({"fault": "old_timestamp", "seconds": 301})
    invoice(sim)
    sim.deliver()
    (one,) = receiver.received
    with pytest.raises(stripe.SignatureVerificationError, match="tolerance"):
        one.verified(secret)
    stripe.Webhook.construct_event(one.body, one.signature, secret, tolerance=3600)


def test_fault_an_event_of_another_account_is_rightly_signed(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    secret = endpoint(sim, receiver).secret
    sim.play_webhooks({"fault": "other_account"})
    wanted = invoice(sim)
    sim.deliver()
    foreign, ours = (one.verified(secret) for one in receiver.received)
    assert (foreign.account, ours.id) == ("acct_other", wanted)
    assert "account" not in ours.to_dict()
    assert foreign.id != ours.id
    thin = destination(sim, receiver)
    sim.play_webhooks({"fault": "other_account"})
    sim.emit_thin("v1.billing.meter.no_meter_found")
    sim.deliver()
    client = sdk(sim)
    last = receiver.received[-2]
    told = client.parse_event_notification(last.body, last.signature, thin.webhook_endpoint.signing_secret)
    assert str(told.context) == "acct_other"


def test_fault_a_lost_event_is_never_sent_but_can_be_listed(
    sim: SimulatorControl, receiver: Receiver
) -> None:
    endpoint(sim, receiver)
    sim.play_webhooks({"fault": "lost"})
    wanted = invoice(sim)
    sim.deliver()
    assert receiver.received == []
    assert [one.id for one in sdk(sim).v1.events.list().data] == [wanted]


def test_webhook_chance_is_repeatable_from_its_seed(sim: SimulatorControl, receiver: Receiver) -> None:
    endpoint(sim, receiver)
    seen = []
    for _ in range(2):
        sim.call("DELETE", "webhook_faults")
        sim.play_webhooks({"fault": "lost", "match": {"probability": 0.5}}, seed=5)
        before = len(receiver.received)
        made = [invoice(sim, number) for number in range(10)]
        sim.deliver()
        seen.append([one in ids(receiver)[before:] for one in made])
    assert seen[0] == seen[1]
    assert 0 < sum(seen[0]) < 10
    for wrong in (
        {"fault": "explode"},
        {"fault": "lost", "match": {"path": "x"}},
        {"fault": "hold", "seconds": -1},
    ):
        with pytest.raises(ValueError, match="400"):
            sim.play_webhooks(wrong)


def test_a_restarted_simulator_goes_on_delivering(tmp_path: Any, receiver: Receiver) -> None:
    config = SimulatorConfig(port=0, data_path=tmp_path / "stripe.db")
    receiver.answers = [500]
    with running_simulator(config) as sim:
        endpoint(sim, receiver)
        wanted = invoice(sim)
        sim.deliver()
    with running_simulator(config) as sim:
        sim.advance(HOUR)
        assert sim.deliver()["states"] == {"delivered": 1}
        assert ids(receiver) == [wanted, wanted]
