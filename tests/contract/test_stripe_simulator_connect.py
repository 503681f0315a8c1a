"""Rules 36 and 37: what connected accounts do is told to endpoints made for them, and to no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.billing_calls import types_told
from tests.contract.stripe_calls import sdk
from tests.contract.webhook_receiver import Receiver, listening


@pytest.fixture
def platform() -> Iterator[Receiver]:
    with listening() as receiver:
        yield receiver


@pytest.fixture
def connect() -> Iterator[Receiver]:
    with listening() as receiver:
        yield receiver


def endpoint(sim: SimulatorControl, receiver: Receiver, *, connect: bool) -> Any:
    return sdk(sim).v1.webhook_endpoints.create(
        {"url": receiver.url, "enabled_events": ["*"], "connect": connect}
    )


def received(receiver: Receiver) -> list[tuple[str, str | None]]:
    bodies = [json.loads(one.body) for one in receiver.received]
    return [(one["type"], one.get("account")) for one in bodies]


def test_rule_36_each_endpoint_hears_of_its_own_accounts_only(
    sim: SimulatorControl, platform: Receiver, connect: Receiver
) -> None:
    assert endpoint(sim, platform, connect=False).application is None
    assert endpoint(sim, connect, connect=True).application.startswith("ca_")
    sim.payout(amount=100)
    sim.payout(amount=200, account="acct_1", failure_code="account_closed")
    sim.emit("customer.created", {"id": "cus_7", "object": "customer"}, account="acct_2")
    sim.deliver()
    assert received(platform) == [("payout.created", None)]
    assert received(connect) == [
        ("payout.created", "acct_1"),
        ("payout.failed", "acct_1"),
        ("customer.created", "acct_2"),
    ]


def test_rule_36_a_destination_says_whose_events_it_takes(
    sim: SimulatorControl, platform: Receiver, connect: Receiver
) -> None:
    for receiver, origins in ((platform, ["@self", "@accounts"]), (connect, ["@accounts"])):
        wanted: Any = {
            "name": "tests",
            "type": "webhook_endpoint",
            "event_payload": "snapshot",
            "enabled_events": ["*"],
            "events_from": origins,
            "webhook_endpoint": {"url": receiver.url},
        }
        assert sdk(sim).v2.core.event_destinations.create(wanted).events_from == origins
    sim.payout(amount=100)
    sim.payout(amount=200, account="acct_1")
    sim.deliver()
    assert received(platform) == [("payout.created", None), ("payout.created", "acct_1")]
    assert received(connect) == [("payout.created", "acct_1")]
    with pytest.raises(stripe.InvalidRequestError, match="events_from"):
        sdk(sim).v2.core.event_destinations.create(wanted | {"events_from": ["@everyone"]})


def test_rule_36_a_connected_account_is_seen_with_its_header_only(sim: SimulatorControl) -> None:
    client, header = sdk(sim), {"stripe_account": "acct_1"}
    ours, theirs = sim.payout(amount=100)["id"], sim.payout(amount=200, account="acct_1")["id"]
    assert [one.id for one in client.v1.payouts.list().data] == [ours]
    assert [one.id for one in client.v1.payouts.list(options=header).data] == [theirs]
    assert client.v1.payouts.retrieve(theirs, options=header).amount == 200
    (event,) = client.v1.events.list(options=header).data
    assert (event.account, event.data.object["id"]) == ("acct_1", theirs)
    assert client.v1.events.retrieve(event.id, options=header).id == event.id
    assert types_told(sim) == ["payout.created"]
    for hidden in (
        lambda: client.v1.payouts.retrieve(theirs),
        lambda: client.v1.payouts.retrieve(ours, options=header),
        lambda: client.v1.events.retrieve(event.id),
    ):
        with pytest.raises(stripe.InvalidRequestError, match="No such"):
            hidden()


def test_rule_37_a_deauthorization_names_the_account_and_the_one_application(
    sim: SimulatorControl, platform: Receiver, connect: Receiver
) -> None:
    endpoint(sim, platform, connect=False)
    secret = endpoint(sim, connect, connect=True).secret
    made = [sim.deauthorize(account) for account in ("acct_1", "acct_2")]
    sim.deliver()
    assert platform.received == []
    first, second = (one.verified(secret) for one in connect.received)
    assert [one.id for one in (first, second)] == made
    assert (first.type, first.account, second.account) == (
        "account.application.deauthorized",
        "acct_1",
        "acct_2",
    )
    assert isinstance(first.data.object, stripe.Application)
    assert first.data.object.id == second.data.object.id == "ca_simulator"
    assert first.data.object.name


def test_a_resent_event_of_a_connected_account_goes_to_the_same_endpoints(
    sim: SimulatorControl, platform: Receiver, connect: Receiver
) -> None:
    endpoint(sim, platform, connect=False)
    endpoint(sim, connect, connect=True)
    wanted = sim.deauthorize("acct_1")
    sim.resend(wanted)
    sim.deliver()
    assert platform.received == []
    assert [json.loads(one.body)["id"] for one in connect.received] == [wanted, wanted]
