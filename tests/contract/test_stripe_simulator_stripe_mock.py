"""A lint of v1 parameters: what the simulator accepts or refuses by shape, stripe-mock does too.

stripe-mock checks requests against Stripe's published OpenAPI description and keeps no state, so only shapes
can be compared. Set STRIPE_MOCK to the binary or have `stripe-mock` on the path; otherwise these are skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.stripe_calls import DAY, sdk

BINARY = os.environ.get("STRIPE_MOCK") or shutil.which("stripe-mock")
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="stripe-mock is not here: go install github.com/stripe/stripe-mock@latest"
)

Call = Callable[[stripe.StripeClient], Any]
PAYLOAD: Any = {"stripe_customer_id": "cus_1", "value": "5"}
RANGE: Any = {"customer": "cus_1", "start_time": 1_800_057_600, "end_time": 1_800_061_200}


def event(**changes: Any) -> Call:
    params: Any = {"event_name": "calls", "payload": PAYLOAD} | changes
    return lambda client: client.v1.billing.meter_events.create(params)


def meter(**changes: Any) -> Call:
    wanted = {"display_name": "New", "event_name": "new", "default_aggregation": {"formula": "sum"}}
    params: Any = wanted | changes
    return lambda client: client.v1.billing.meters.create(params)


def summaries(**changes: Any) -> Call:
    params: Any = RANGE | changes
    return lambda client: client.v1.billing.meters.event_summaries.list("mtr_calls", params)


def cancel(**changes: Any) -> Call:
    params: Any = {"type": "cancel", "event_name": "calls", "cancel": {"identifier": "id-1"}} | changes
    return lambda client: client.v1.billing.meter_event_adjustments.create(params)


def endpoint(**changes: Any) -> Call:
    params: Any = {"url": "http://127.0.0.1:9/x", "enabled_events": ["invoice.paid"]} | changes
    return lambda client: client.v1.webhook_endpoints.create(params)


def price(**changes: Any) -> Call:
    every = {"interval": "month", "usage_type": "metered", "meter": "mtr_calls"}
    params: Any = {"currency": "usd", "product": "prod_1", "unit_amount": 5, "recurring": every} | changes
    params = {name: value for name, value in params.items() if value is not None}
    return lambda client: client.v1.prices.create(params)


def subscription(**changes: Any) -> Call:
    def call(client: stripe.StripeClient) -> Any:
        params: Any = {"customer": "cus_1", "items": [{"price": price()(client).id}]} | changes
        return client.v1.subscriptions.create(params)

    return call


def subscription_changed(**changes: Any) -> Call:
    params: Any = changes
    return lambda client: client.v1.subscriptions.update(subscription()(client).id, params)


#: Objects with the fields that a consumer of usage billing reads, and not all of Stripe's.
PARTIAL = ("customer", "subscription", "webhook_endpoint")
ACCEPTED: dict[str, Call] = {
    "event": event(),
    "event, everything": event(identifier="id-9", timestamp=int(time.time())),
    "meter": meter(),
    "meter, everything": meter(
        default_aggregation={"formula": "last"},
        customer_mapping={"type": "by_id", "event_payload_key": "who"},
        value_settings={"event_payload_key": "how_many"},
        event_time_window="hour",
    ),
    "meter renamed": lambda client: client.v1.billing.meters.update("mtr_calls", {"display_name": "x"}),
    "meter read": lambda client: client.v1.billing.meters.retrieve("mtr_calls"),
    "meters listed": lambda client: client.v1.billing.meters.list({"status": "active", "limit": 3}),
    "meter deactivated": lambda client: client.v1.billing.meters.deactivate("mtr_calls"),
    "meter reactivated": lambda client: client.v1.billing.meters.reactivate("mtr_calls"),
    "summaries": summaries(),
    "summaries by hour": summaries(value_grouping_window="hour", limit=100),
    "cancel": cancel(),
    "customer": lambda client: client.v1.customers.create({"name": "Ada", "metadata": {"tenant": "t"}}),
    "customer changed": lambda client: client.v1.customers.update("cus_1", {"email": "a@example.com"}),
    "customers listed": lambda client: client.v1.customers.list({"email": "a@example.com"}),
    "customer with an address": lambda client: client.v1.customers.create(
        {"address": {"line1": "1 High Street", "city": "Leeds", "country": "GB"}}
    ),
    "customers since": lambda client: client.v1.customers.list({"created": {"gte": 5, "lt": 2**31}}),
    "price": price(metadata={"tier": "a"}, nickname="calls", active=True),
    "price by the decimal": price(unit_amount=None, unit_amount_decimal="0.05"),
    "price for once": price(recurring=None, product=None, product_data={"name": "Setup"}),
    "price changed": lambda client: client.v1.prices.update(price()(client).id, {"active": False}),
    "prices listed": lambda client: client.v1.prices.list({"active": True, "type": "recurring"}),
    "subscription": subscription(metadata={"tenant": "t"}, billing_cycle_anchor=int(time.time()) + DAY),
    "subscription on trial": subscription(trial_period_days=7, payment_behavior="default_incomplete"),
    "subscription changed": subscription_changed(
        metadata={"tenant": "u"}, cancel_at_period_end=True, billing_cycle_anchor="now"
    ),
    "subscription canceled": lambda client: client.v1.subscriptions.cancel(
        subscription()(client).id, {"invoice_now": True, "cancellation_details": {"feedback": "unused"}}
    ),
    "subscriptions listed": lambda client: client.v1.subscriptions.list(
        {"customer": "cus_1", "status": "all", "price": "price_1", "created": {"gte": 5}, "limit": 3}
    ),
    "invoices listed": lambda client: client.v1.invoices.list(
        {"customer": "cus_1", "subscription": "sub_1", "status": "open", "created": {"gt": 5}}
    ),
    "charges listed": lambda client: client.v1.charges.list({"customer": "cus_1", "created": {"gte": 5}}),
    "refunds listed": lambda client: client.v1.refunds.list({"charge": "ch_1", "created": 5}),
    "disputes listed": lambda client: client.v1.disputes.list({"charge": "ch_1"}),
    "balance transactions listed": lambda client: client.v1.balance_transactions.list(
        {"source": "ch_1", "type": "charge", "payout": "po_1", "currency": "usd", "created": {"lte": 5}}
    ),
    "payouts listed": lambda client: client.v1.payouts.list({"status": "paid", "created": {"gte": 5}}),
    "cards listed": lambda client: client.v1.payment_methods.list({"customer": "cus_1", "type": "card"}),
    "cards of a customer": lambda client: client.v1.customers.payment_methods.list("cus_1", {"type": "card"}),
    "endpoint for connected accounts": endpoint(connect=True),
    "events since": lambda client: client.v1.events.list({"created": {"gte": 5}, "types": ["a", "b"]}),
    "webhook endpoint": endpoint(description="tests", metadata={"a": "b"}),
    "webhook endpoints listed": lambda client: client.v1.webhook_endpoints.list({"limit": 5}),
    "events listed": lambda client: client.v1.events.list({"type": "invoice.paid"}),
}
REFUSED: dict[str, Call] = {
    "event without name": lambda client: client.v1.billing.meter_events.create({"payload": PAYLOAD}),  # type: ignore[typeddict-item]
    "event without payload": lambda client: client.v1.billing.meter_events.create({"event_name": "calls"}),  # type: ignore[typeddict-item]
    "event with a field too many": event(colour="red"),
    "event at a word": event(timestamp="soon"),
    "meter of an unknown formula": meter(default_aggregation={"formula": "max"}),
    "meter without formula": meter(default_aggregation={}),
    "meter of a wrong window": meter(event_time_window="week"),
    "meter with a field too many": meter(colour="red"),
    "summaries of nobody": lambda client: client.v1.billing.meters.event_summaries.list(
        "mtr_calls",
        {"start_time": 1_800_057_600, "end_time": 1_800_061_200},  # type: ignore[typeddict-item]
    ),
    "summaries by week": summaries(value_grouping_window="week"),
    "cancel of another type": cancel(type="refund"),
    "price without currency": lambda client: client.v1.prices.create({"unit_amount": 5, "product": "p"}),  # type: ignore[typeddict-item]
    "price by the fortnight": price(recurring={"interval": "fortnight"}),
    "price with a field too many": price(colour="red"),
    "subscription with a field too many": subscription(colour="red"),
    "subscription of a wrong behaviour": subscription(payment_behavior="hope"),
    "subscription anchored at a word": subscription(billing_cycle_anchor="soon"),
    "charges of a colour": lambda client: client.v1.charges.list({"colour": "red"}),  # type: ignore[typeddict-unknown-key]
    "charges since a word": lambda client: client.v1.charges.list({"created": {"gte": "soon"}}),  # type: ignore[typeddict-item]
    "webhook endpoint without events": lambda client: client.v1.webhook_endpoints.create(
        {"url": "http://127.0.0.1:9/x"}  # type: ignore[typeddict-item]
    ),
}


@pytest.fixture(scope="module")
def mock() -> Iterator[stripe.StripeClient]:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    addresses = ["-http-addr", f"127.0.0.1:{ports[0]}", "-https-addr", f"127.0.0.1:{ports[1]}"]
    started = subprocess.Popen([str(BINARY), *addresses], stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{ports[0]}"
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "stripe-mock did not start"
                time.sleep(0.1)
        yield stripe.StripeClient("sk_test_x", base_addresses={"api": url}, max_network_retries=0)
    finally:
        started.kill()
        started.wait(10)


@pytest.mark.parametrize("name", ACCEPTED)
def test_both_accept_the_shape(sim: SimulatorControl, mock: stripe.StripeClient, name: str) -> None:
    event(identifier="id-1")(sdk(sim))
    ours, theirs = ACCEPTED[name](sdk(sim)), ACCEPTED[name](mock)
    assert ours.object == theirs.object
    if ours.object != "list":
        missing = set(theirs.to_dict()) - set(ours.to_dict())
        assert not missing or ours.object in PARTIAL, missing


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_the_shape(sim: SimulatorControl, mock: stripe.StripeClient, name: str) -> None:
    for client in (sdk(sim), mock):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            REFUSED[name](client)
        assert caught.value.http_status == 400
