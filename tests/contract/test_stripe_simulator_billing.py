"""Rules 27 to 29, 31 and 38: customers, prices, subscriptions and cards, and the events of their changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.stripe_simulator.resources import difference
from tests.contract.billing_calls import MIDNIGHT, metered_price, previous, told, types_told
from tests.contract.stripe_calls import DAY, HOUR, event, sdk
from tests.contract.webhook_receiver import listening


def subscribe(sim: SimulatorControl, price: str, **more: Any) -> Any:
    wanted: Any = {"customer": "cus_1", "items": [{"price": price}]} | more
    return sdk(sim).v1.subscriptions.create(wanted)


def period(subscription: Any) -> tuple[int, int]:
    (item,) = subscription["items"].data
    return item.current_period_start, item.current_period_end


# Previous attributes


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 2}, {"a": 1}),
        ({"m": {"x": "1", "y": "2"}}, {"m": {"x": "1", "y": "3"}}, {"m": {"y": "2"}}),
        ({"m": {}}, {"m": {"new": "1"}}, {"m": {"new": None}}),
        ({"m": {"old": "1"}}, {"m": {}}, {"m": {"old": "1"}}),
        ({"l": [1, 2]}, {"l": [1, 3]}, {"l": [1, 2]}),
        ({"a": {"x": 1}}, {"a": None}, {"a": {"x": 1}}),
    ],
)
def test_rule_27_previous_attributes_hold_only_what_changed(before: Any, after: Any, changed: Any) -> None:
    assert difference(before, after) == changed


# Customers


def test_customers_tell_of_their_creation_change_and_deletion(sim: SimulatorControl) -> None:
    customers = sdk(sim).v1.customers
    address: Any = {"line1": "1 High Street", "city": "Leeds", "country": "GB", "postal_code": "LS1"}
    made = customers.create({"name": "Ada", "address": address, "metadata": {"tenant": "t1", "plan": "a"}})
    customers.update(made.id, {"email": "a@example.com", "metadata": {"plan": "b", "tenant": ""}})
    customers.update(made.id, {"email": "a@example.com"})
    customers.delete(made.id)
    created, updated, deleted = told(sim)
    assert [one.type for one in (created, updated, deleted)] == [
        "customer.created",
        "customer.updated",
        "customer.deleted",
    ]
    assert created.data.object["address"]["city"] == "Leeds"
    assert created.data.object["address"]["line2"] is None
    assert previous(updated) == {"email": None, "metadata": {"plan": "a", "tenant": "t1"}}
    assert updated.data.object["metadata"].to_dict() == {"plan": "b"}
    assert deleted.data.object["id"] == made.id
    assert created.request.id.startswith("req_")


def test_an_event_names_the_key_of_the_request_that_made_it(sim: SimulatorControl) -> None:
    sdk(sim).v1.customers.create({"name": "Ada"}, {"idempotency_key": "key-1"})
    sdk(sim).v1.customers.create({"name": "Ada"}, {"idempotency_key": "key-1"})
    (created,) = told(sim)
    assert created.request.idempotency_key == "key-1"


def test_an_address_is_replaced_whole_and_removed(sim: SimulatorControl) -> None:
    customers = sdk(sim).v1.customers
    customers.update("cus_1", {"address": {"city": "Leeds", "line1": "1 High Street"}})
    changed: Any = customers.update("cus_1", {"address": {"city": "York"}}).address
    assert (changed.city, changed.line1) == ("York", None)
    assert customers.update("cus_1", {"address": ""}).address is None
    with pytest.raises(stripe.InvalidRequestError, match=r"address\[planet\]"):
        customers.update("cus_1", {"address": {"planet": "Mars"}})  # type: ignore[typeddict-unknown-key]


def test_rule_31_a_deleted_customer_is_shown_as_such_and_takes_no_usage(sim: SimulatorControl) -> None:
    client = sdk(sim)
    subscription = subscribe(sim, metered_price(sim))
    answer = client.v1.customers.delete("cus_1")
    assert (answer.id, answer.deleted) == ("cus_1", True)
    assert client.v1.customers.retrieve("cus_1").deleted is True
    assert [one.id for one in client.v1.customers.list().data] == ["cus_2"]
    assert client.v1.subscriptions.retrieve(subscription.id).status == "canceled"
    assert types_told(sim)[-2:] == ["customer.subscription.deleted", "customer.deleted"]
    for refused in (
        lambda: client.v1.billing.meter_events.create(event("a")),  # type: ignore[arg-type]
        lambda: client.v1.customers.update("cus_1", {"name": "x"}),
        lambda: client.v1.customers.delete("cus_1"),
    ):
        with pytest.raises(stripe.InvalidRequestError, match="No such customer"):
            refused()
    sim.seed(customers=["cus_1"])
    assert getattr(client.v1.customers.retrieve("cus_1"), "deleted", None) is None


def test_a_deleted_customer_stays_deleted_when_the_simulator_starts_again(tmp_path: Path) -> None:
    config = SimulatorConfig(port=0, data_path=tmp_path / "stripe.db")
    with running_simulator(config) as sim:
        sim.seed(customers=["cus_1", "cus_2"])
        sdk(sim).v1.customers.delete("cus_1")
        sim.attach_card("cus_2", id="pm_1")
    with running_simulator(config) as sim:
        assert sdk(sim).v1.customers.retrieve("cus_1").deleted is True
        assert sdk(sim).v1.payment_methods.retrieve("pm_1").customer == "cus_2"


# Prices


def test_a_metered_price_names_its_meter_and_can_be_listed_by_product(sim: SimulatorControl) -> None:
    prices, price = sdk(sim).v1.prices, metered_price(sim, interval_count=3)
    made: Any = prices.retrieve(price)
    assert (made.recurring.meter, made.recurring.usage_type) == ("mtr_calls", "metered")
    assert (made.recurring.interval, made.recurring.interval_count) == ("month", 3)
    assert (made.type, made.unit_amount, str(made.unit_amount_decimal)) == ("recurring", None, "0.2")
    once = prices.create({"currency": "usd", "unit_amount": 500, "product_data": {"name": "Setup"}})
    assert (once.type, once.recurring, once.unit_amount) == ("one_time", None, 500)
    assert [one.id for one in prices.list({"type": "one_time"}).data] == [once.id]
    prices.update(price, {"active": False, "metadata": {"tier": "old"}})
    assert [one.id for one in prices.list({"active": False}).data] == [price]
    assert previous(told(sim)[-1]) == {"active": True, "metadata": {"tier": None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurring": {"interval": "month", "usage_type": "metered"}}, "names a meter"),
        ({"recurring": {"interval": "month", "meter": "mtr_calls"}}, "names a meter"),
        ({"recurring": {"interval": "month", "usage_type": "metered", "meter": "mtr_x"}}, "No such billing"),
        ({"recurring": {"interval": "fortnight"}}, "must be one of"),
        ({"recurring": {"interval": "day", "interval_count": 0}}, "interval_count"),
        ({"unit_amount": None}, "unit_amount"),
        ({"unit_amount": -1}, "Invalid decimal"),
        ({"product": None}, "product"),
        ({"colour": "red"}, "unknown parameter"),
    ],
)
def test_a_price_that_makes_no_sense_is_refused(sim: SimulatorControl, changes: Any, message: str) -> None:
    wanted: Any = {"currency": "usd", "unit_amount": 1, "product": "prod_1"} | changes
    wanted = {name: value for name, value in wanted.items() if value is not None}
    with pytest.raises(stripe.InvalidRequestError, match=message):
        sdk(sim).v1.prices.create(wanted)


# Subscriptions


def test_a_subscription_has_its_period_on_the_item(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    price = metered_price(sim)
    made = subscribe(sim, price, metadata={"tenant": "t1"})
    (item,) = made["items"].data
    assert (made.status, made.customer, made.billing_cycle_anchor) == ("active", "cus_1", MIDNIGHT)
    assert (item.price.id, item.price.recurring.meter) == (price, "mtr_calls")
    assert period(made) == (MIDNIGHT, MIDNIGHT + 31 * DAY)
    assert "current_period_end" not in made.to_dict()
    (created,) = told(sim, "customer.subscription.created")
    assert created.data.object["id"] == made.id
    assert previous(created) is None


def test_rule_28_an_anchor_ahead_makes_a_short_first_period(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    price = metered_price(sim)
    made = subscribe(sim, price, billing_cycle_anchor=MIDNIGHT + 12 * HOUR)
    assert period(made) == (made.created, MIDNIGHT + 12 * HOUR)
    for wrong in (MIDNIGHT - HOUR, MIDNIGHT + 40 * DAY):
        with pytest.raises(stripe.InvalidRequestError, match="billing_cycle_anchor"):
            subscribe(sim, price, billing_cycle_anchor=wrong)


def test_rule_28_a_short_month_ends_the_period_on_its_last_day(sim: SimulatorControl) -> None:
    the_31st = MIDNIGHT + 15 * DAY + 90
    sim.set_clock(the_31st)
    made = sim.subscribe("cus_1", metered_price(sim), billing_cycle_anchor=the_31st)
    seen = [period(sdk(sim).v1.subscriptions.retrieve(made["id"]))]
    for _ in range(2):
        sim.set_clock(seen[-1][1] + 1)
        seen.append(period(sdk(sim).v1.subscriptions.retrieve(made["id"])))
    february, march = the_31st + 28 * DAY, the_31st + (28 + 31) * DAY
    assert seen == [(the_31st, february), (february, march), (march, march + 30 * DAY)]


def test_rule_28_an_anchor_in_the_past_is_for_the_control_api(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT + 40 * DAY)
    made = sim.subscribe(
        "cus_1", metered_price(sim, interval="week"), billing_cycle_anchor=MIDNIGHT, id="sub_1"
    )
    assert made["id"] == "sub_1"
    assert period(sdk(sim).v1.subscriptions.retrieve("sub_1")) == (MIDNIGHT + 35 * DAY, MIDNIGHT + 42 * DAY)


def test_rule_28_the_end_of_a_period_drafts_an_invoice_and_moves_the_period(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    subscription = subscribe(sim, metered_price(sim, interval="day"))
    sdk(sim).v1.billing.meter_events.create(event("a", value="12.5"))  # type: ignore[arg-type]
    sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
    after: Any = sdk(sim).v1.subscriptions.retrieve(subscription.id, {"expand": ["latest_invoice"]})
    invoice = after.latest_invoice
    assert (invoice.status, invoice.total, invoice.billing_reason) == ("open", 3, "subscription_cycle")
    assert invoice.parent.subscription_details.subscription == subscription.id
    (line,) = invoice.lines.data
    assert (str(line.quantity_decimal), line.amount) == ("12.5", 3)
    assert line.pricing.price_details.price == subscription["items"].data[0].price.id
    assert types_told(sim)[-3:] == ["invoice.created", "customer.subscription.updated", "invoice.finalized"]
    (updated,) = told(sim, "customer.subscription.updated")
    assert updated.created == period(subscription)[1]
    assert set(previous(updated)) == {"items", "latest_invoice"}
    assert previous(updated)["items"]["data"][0]["current_period_end"] == period(subscription)[1]
    assert period(after)[0] == period(subscription)[1]


def test_rule_28_a_leap_of_the_clock_tells_the_same_as_a_walk(sim: SimulatorControl) -> None:
    stories = []
    for steps in (1, 30):
        sim.reset()
        sim.seed(customers=["cus_1"], meters=["calls", "bytes"])
        sim.set_clock(MIDNIGHT)
        prices = metered_price(sim, interval="day"), metered_price(sim, "mtr_bytes", interval="week")
        sim.subscribe("cus_1", *prices, billing_cycle_anchor=MIDNIGHT)
        for step in range(steps):
            sim.set_clock(MIDNIGHT + (step + 1) * 15 * DAY // steps)
        stories.append([(one.type, one.created - MIDNIGHT) for one in told(sim)][3:])
    assert stories[0] == stories[1]
    assert len([1 for kind, _ in stories[0] if kind == "invoice.created"]) == 15


def test_subscriptions_are_changed_and_say_what_they_were(sim: SimulatorControl) -> None:
    client, subscription = sdk(sim), subscribe(sim, metered_price(sim), metadata={"tenant": "t1"})
    other = metered_price(sim, "mtr_bytes")
    (item,) = subscription["items"].data
    client.v1.subscriptions.update(subscription.id, {"metadata": {"tenant": "t2"}})
    changed = client.v1.subscriptions.update(subscription.id, {"items": [{"id": item.id, "price": other}]})
    assert [one.price.id for one in changed["items"].data] == [other]
    grown = client.v1.subscriptions.update(subscription.id, {"items": [{"price": metered_price(sim)}]})
    assert len(grown["items"].data) == 2
    updated = told(sim, "customer.subscription.updated")
    assert previous(updated[0]) == {"metadata": {"tenant": "t1"}}
    assert previous(updated[1])["items"]["data"][0]["price"]["id"] == item.price.id
    assert [one.id for one in client.v1.subscriptions.list({"price": other}).data] == [subscription.id]
    with pytest.raises(stripe.InvalidRequestError, match="at least one item"):
        client.v1.subscriptions.update(
            subscription.id, {"items": [{"id": one.id, "deleted": True} for one in grown["items"].data]}
        )


def test_a_subscription_is_canceled_at_the_end_of_its_period_or_goes_on(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    subscriptions, price = sdk(sim).v1.subscriptions, metered_price(sim, interval="day")
    stays, goes = (subscribe(sim, price).id for _ in range(2))
    for one in (stays, goes):
        assert subscriptions.update(one, {"cancel_at_period_end": True}).status == "active"
    subscriptions.update(stays, {"cancel_at_period_end": False})
    sim.advance(DAY)
    assert subscriptions.retrieve(stays).status == "active"
    ended: Any = subscriptions.retrieve(goes)
    assert (ended.status, ended.cancellation_details.reason) == ("canceled", "cancellation_requested")
    assert ended.ended_at == period(ended)[1]
    assert ended.canceled_at < ended.ended_at
    assert ended.latest_invoice is not None


def test_rule_29_a_canceled_subscription_is_found_but_not_listed(sim: SimulatorControl) -> None:
    subscriptions, price = sdk(sim).v1.subscriptions, metered_price(sim)
    first, second = (subscribe(sim, price).id for _ in range(2))
    answer: Any = subscriptions.cancel(first, {"cancellation_details": {"comment": "too dear"}})
    assert (answer.status, answer.cancellation_details.comment) == ("canceled", "too dear")
    assert [one.id for one in subscriptions.list({"customer": "cus_1"}).data] == [second]
    assert [one.id for one in subscriptions.list({"status": "canceled"}).data] == [first]
    assert [one.id for one in subscriptions.list({"status": "all"}).data] == [second, first]
    assert subscriptions.list({"customer": "cus_2"}).data == []
    with pytest.raises(stripe.InvalidRequestError, match="No such subscription"):
        subscriptions.cancel(first)
    (deleted,) = told(sim, "customer.subscription.deleted")
    assert deleted.data.object["cancellation_details"]["reason"] == "cancellation_requested"


def test_a_cancellation_may_invoice_what_was_used_until_then(sim: SimulatorControl) -> None:
    subscription = subscribe(sim, metered_price(sim))
    sdk(sim).v1.billing.meter_events.create(event("a", value="100"))  # type: ignore[arg-type]
    sim.advance(60)
    canceled: Any = sdk(sim).v1.subscriptions.cancel(subscription.id, {"invoice_now": True})
    sim.advance(2 * HOUR)
    assert sdk(sim).v1.invoices.retrieve(canceled.latest_invoice).total == 20


def test_rule_29_an_incomplete_subscription_expires_after_23_hours(sim: SimulatorControl) -> None:
    price = metered_price(sim)
    expires, paid = (subscribe(sim, price, payment_behavior="default_incomplete").id for _ in range(2))
    sim.set_subscription(paid, status="active")
    sim.advance(23 * HOUR + 1)
    subscriptions = sdk(sim).v1.subscriptions
    assert subscriptions.retrieve(expires).status == "incomplete_expired"
    assert subscriptions.retrieve(paid).status == "active"
    assert [one.id for one in subscriptions.list({"status": "ended"}).data] == [expires]


def test_a_trial_ends_without_an_invoice(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    made = subscribe(sim, metered_price(sim), trial_period_days=7)
    assert (made.status, period(made)[1]) == ("trialing", made.created + 7 * DAY)
    sim.advance(7 * DAY + 1)
    after: Any = sdk(sim).v1.subscriptions.retrieve(made.id)
    assert (after.status, after.latest_invoice, period(after)[0]) == ("active", None, made.trial_end)


@pytest.mark.parametrize("status", ["past_due", "unpaid", "paused", "trialing", "incomplete"])
def test_a_status_that_payments_decide_is_set_by_a_test(sim: SimulatorControl, status: str) -> None:
    made = sim.subscribe("cus_1", metered_price(sim))
    sim.set_subscription(made["id"], status=status)
    assert sdk(sim).v1.subscriptions.retrieve(made["id"]).status == status
    (updated,) = told(sim, "customer.subscription.updated")
    assert previous(updated) == {"status": "active"}
    sim.set_subscription(made["id"], status="canceled", reason="payment_failed")
    (deleted,) = told(sim, "customer.subscription.deleted")
    assert deleted.data.object["cancellation_details"]["reason"] == "payment_failed"
    with pytest.raises(ValueError, match="status must be one of"):
        sim.set_subscription(made["id"], status="dormant")


def test_a_paused_subscription_makes_no_invoices(sim: SimulatorControl) -> None:
    made = sim.subscribe("cus_1", metered_price(sim, interval="day"))
    sim.set_subscription(made["id"], status="paused")
    sim.advance(3 * DAY)
    assert sdk(sim).v1.invoices.list().data == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"customer": "cus_9"}, "No such customer"),
        ({"items": [{"price": "price_9"}]}, "No such price"),
        ({"items": []}, "items"),
        ({"trial_end": 1}, "in the future"),
        ({"colour": "red"}, "unknown parameter"),
    ],
)
def test_a_subscription_that_makes_no_sense_is_refused(
    sim: SimulatorControl, changes: Any, message: str
) -> None:
    with pytest.raises(stripe.InvalidRequestError, match=message):
        subscribe(sim, metered_price(sim), **changes)


def test_a_price_for_once_is_no_price_of_a_subscription(sim: SimulatorControl) -> None:
    once = sdk(sim).v1.prices.create({"currency": "usd", "unit_amount": 5, "product": "prod_1"})
    with pytest.raises(stripe.InvalidRequestError, match="one_time"):
        subscribe(sim, once.id)


def test_lists_are_paged_to_the_end_newest_first_and_cut_by_creation(sim: SimulatorControl) -> None:
    price, made = metered_price(sim), []
    for _ in range(7):
        made.append(subscribe(sim, price).id)
        sim.advance(10)
    subscriptions = sdk(sim).v1.subscriptions
    assert [one.id for one in subscriptions.list({"limit": 3}).auto_paging_iter()] == made[::-1]
    third = subscriptions.retrieve(made[2]).created
    assert [one.id for one in subscriptions.list({"created": {"lte": third}}).data] == made[2::-1]
    assert [one.id for one in subscriptions.list({"created": {"gt": third, "lt": third + 25}}).data] == [
        made[4],
        made[3],
    ]
    assert [one.id for one in subscriptions.list({"created": third}).data] == [made[2]]


def test_events_are_listed_since_a_moment_as_a_catch_up_does(sim: SimulatorControl) -> None:
    sdk(sim).v1.customers.create({"name": "early"})
    sim.advance(HOUR)
    since = int(sim.now())
    late = sdk(sim).v1.customers.create({"name": "late"})
    listed = sdk(sim).v1.events.list({"created": {"gte": since}, "types": ["customer.created"]}).data
    assert [one.data.object["id"] for one in listed] == [late.id]


# Cards


def test_rule_38_cards_are_attached_renewed_changed_and_detached(sim: SimulatorControl) -> None:
    client = sdk(sim)
    card = sim.attach_card("cus_1", brand="mastercard", last4="4444", exp_month=3, exp_year=2027)["id"]
    other = sim.attach_card("cus_2")["id"]
    held: Any = client.v1.payment_methods.retrieve(card)
    assert (held.type, held.customer, held.card.brand, held.card.last4) == (
        "card",
        "cus_1",
        "mastercard",
        "4444",
    )
    sim.update_card(card, exp_month=3, exp_year=2031, automatic=True)
    sim.update_card(card, exp_month=4)
    assert [one.id for one in client.v1.customers.payment_methods.list("cus_1").data] == [card]
    listed = client.v1.payment_methods.list({"customer": "cus_1", "type": "card"})
    assert [(one.id, one.card.exp_year) for one in listed.data if one.card] == [(card, 2031)]
    sim.detach_card(card)
    assert client.v1.customers.payment_methods.list("cus_1").data == []
    assert client.v1.payment_methods.retrieve(card).customer is None
    mine = [one for one in told(sim) if one.data.object["id"] == card]
    assert [(one.type, previous(one)) for one in mine] == [
        ("payment_method.attached", None),
        ("payment_method.automatically_updated", {"card": {"exp_year": 2027}}),
        ("payment_method.updated", {"card": {"exp_month": 3}}),
        ("payment_method.detached", {"customer": "cus_1"}),
    ]
    sim.attach_card("cus_2", id=card)
    assert {one.id for one in client.v1.customers.payment_methods.list("cus_2").data} == {card, other}


def test_a_card_of_someone_is_not_attached_again_nor_detached_twice(sim: SimulatorControl) -> None:
    card = sim.attach_card("cus_1")["id"]
    with pytest.raises(ValueError, match="attached to a customer already"):
        sim.attach_card("cus_2", id=card)
    sim.detach_card(card)
    with pytest.raises(ValueError, match="not attached"):
        sim.detach_card(card)
    with pytest.raises(ValueError, match="exp_month"):
        sim.attach_card("cus_1", exp_month=13)
    with pytest.raises(stripe.InvalidRequestError, match="No such customer"):
        sdk(sim).v1.customers.payment_methods.list("cus_9")


def test_a_change_arrives_signed_as_the_library_expects(sim: SimulatorControl) -> None:
    with listening() as receiver:
        made = sdk(sim).v1.webhook_endpoints.create(
            {"url": receiver.url, "enabled_events": ["customer.updated"]}
        )
        sdk(sim).v1.customers.update("cus_1", {"name": "Ada"})
        sim.deliver()
        (one,) = receiver.received
    arrived = one.verified(str(made.secret))
    assert isinstance(arrived.data.object, stripe.Customer)
    assert previous(arrived) == {"name": None}


# Shapes


def undeclared(body: Any, model: type) -> list[str]:
    """Fields that Stripe's library does not know of this object."""
    return sorted(set(body.to_dict()) - set(model.__annotations__))


def test_no_object_has_a_field_that_stripe_does_not_declare(sim: SimulatorControl) -> None:
    client = sdk(sim).v1
    subscription = subscribe(sim, metered_price(sim, interval="day"))
    sim.advance(2 * DAY)
    charge = sim.charge("cus_1", 100, fee=3)["id"]
    sim.refund(charge, amount=1)
    dispute: Any = client.disputes.retrieve(sim.dispute(charge)["id"])
    card: Any = client.payment_methods.retrieve(sim.attach_card("cus_1")["id"])
    invoice: Any = client.invoices.list().data[0]
    charges, refunds = client.charges.list().data, client.refunds.list().data
    shown: list[tuple[Any, type]] = [
        (subscription, stripe.Subscription),
        (subscription["items"].data[0], stripe.SubscriptionItem),
        (subscription["items"].data[0].price, stripe.Price),
        (subscription["items"].data[0].price.recurring, stripe.Price.Recurring),
        (subscription.cancellation_details, stripe.Subscription.CancellationDetails),
        (client.customers.retrieve("cus_1"), stripe.Customer),
        (charges[0], stripe.Charge),
        (charges[0].outcome, stripe.Charge.Outcome),
        (refunds[0], stripe.Refund),
        (dispute, stripe.Dispute),
        (dispute.evidence_details, stripe.Dispute.EvidenceDetails),
        (dispute.balance_transactions[0], stripe.BalanceTransaction),
        (dispute.balance_transactions[0].fee_details[0], stripe.BalanceTransaction.FeeDetail),
        (client.payouts.retrieve(sim.payout(amount=5)["id"]), stripe.Payout),
        (card, stripe.PaymentMethod),
        (card.card, stripe.PaymentMethod.Card),
        (invoice, stripe.Invoice),
        (invoice.lines.data[0], stripe.InvoiceLineItem),
        (invoice.status_transitions, stripe.Invoice.StatusTransitions),
        (invoice.parent.subscription_details, stripe.Invoice.Parent.SubscriptionDetails),
        (told(sim)[-1], stripe.Event),
    ]
    for body, model in shown:
        assert isinstance(body, model)
        assert undeclared(body, model) == [], model.__name__
