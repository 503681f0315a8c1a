"""Rules 23 and 30: an invoice is final an hour after its period, or by hand, and is then paid or not."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.billing_calls import MIDNIGHT, metered_price, previous, told
from tests.contract.stripe_calls import DAY, HOUR, MINUTE, event, sdk
from tests.contract.webhook_receiver import listening


def use(sim: SimulatorControl, value: str, at: int, identifier: str = "") -> None:
    params: Any = event(identifier, value=value) | {"timestamp": MIDNIGHT + at}
    sdk(sim).v1.billing.meter_events.create(params)


def quantity(invoice: Any) -> Decimal:
    return Decimal(invoice.to_dict()["lines"]["data"][0]["quantity_decimal"])


@pytest.fixture
def invoice(sim: SimulatorControl) -> str:
    """An invoice of one day for cus_1 and mtr_calls, at the noon before its period ends."""
    sim.set_clock(MIDNIGHT + DAY // 2)
    return str(sim.schedule_invoice("cus_1", "mtr_calls", MIDNIGHT, MIDNIGHT + DAY)["id"])


def test_usage_counts_until_the_grace_period_ends_and_by_its_own_timestamp(
    sim: SimulatorControl, invoice: str
) -> None:
    use(sim, "1", 0)
    sim.set_clock(MIDNIGHT + DAY + 59 * MINUTE)
    use(sim, "10", DAY - 1)
    use(sim, "100", DAY)
    assert sdk(sim).v1.invoices.retrieve(invoice).status == "draft"
    sim.advance(2 * MINUTE)
    use(sim, "1000", DAY - 1)
    final = sdk(sim).v1.invoices.retrieve(invoice)
    assert (final.status, quantity(final)) == ("open", 11)
    assert sim.total() == "1111", "the late event counts, only not on this invoice"


def test_a_negative_quantity_is_invoiced_as_nothing(sim: SimulatorControl, invoice: str) -> None:
    use(sim, "2", 0)
    use(sim, "-5.5", 0)
    sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 0


def test_a_cancellation_after_the_invoice_changes_nothing_on_it(sim: SimulatorControl, invoice: str) -> None:
    sim.set_clock(MIDNIGHT + DAY - 60)
    use(sim, "3", DAY - 120, "a")
    use(sim, "4", DAY - 120, "b")
    cancel = sdk(sim).v1.billing.meter_event_adjustments.create
    cancel({"type": "cancel", "event_name": "calls", "cancel": {"identifier": "b"}})
    sim.advance(2 * HOUR)
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 3
    cancel({"type": "cancel", "event_name": "calls", "cancel": {"identifier": "a"}})
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 3
    assert sim.total() == "0"


def test_draft_and_final_invoice_are_told_as_snapshots(sim: SimulatorControl, invoice: str) -> None:
    with listening() as receiver:
        sdk(sim).v1.webhook_endpoints.create(
            {"url": receiver.url, "enabled_events": ["invoice.created", "invoice.finalized"]}
        )
        use(sim, "1", 0)
        sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
        sim.deliver()
        told = [json.loads(one.body) for one in receiver.received]
    assert [(one["type"], one["data"]["object"]["status"]) for one in told] == [
        ("invoice.created", "draft"),
        ("invoice.finalized", "open"),
    ]
    assert [one["created"] - MIDNIGHT - DAY for one in told] == [0, HOUR]


def test_an_invoice_is_not_there_before_its_period_ended(sim: SimulatorControl, invoice: str) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="No such invoice"):
        sdk(sim).v1.invoices.retrieve(invoice)
    with pytest.raises(ValueError, match="after period_start"):
        sim.schedule_invoice("cus_1", "mtr_calls", 10, 10)


def subscribed(sim: SimulatorControl) -> tuple[str, str]:
    """A subscription by the day, and the open invoice of its first day: 100 calls, 20 cents."""
    sim.set_clock(MIDNIGHT)
    subscription = sim.subscribe("cus_1", metered_price(sim, interval="day"), billing_cycle_anchor=MIDNIGHT)
    use(sim, "100", 60)
    sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
    (invoice,) = sdk(sim).v1.invoices.list({"subscription": subscription["id"]}).data
    return str(subscription["id"]), invoice.id


def test_a_draft_says_when_it_will_be_final_and_whose_subscription_it_is(sim: SimulatorControl) -> None:
    sim.set_clock(MIDNIGHT)
    subscription = sim.subscribe("cus_1", metered_price(sim, interval="day"), billing_cycle_anchor=MIDNIGHT)
    sim.set_clock(MIDNIGHT + DAY + 1)
    (created,) = told(sim, "invoice.created")
    draft = created.data.object
    assert (draft["status"], draft["customer"]) == ("draft", "cus_1")
    assert (draft["period_start"], draft["period_end"]) == (MIDNIGHT, MIDNIGHT + DAY)
    assert draft["automatically_finalizes_at"] == MIDNIGHT + DAY + HOUR
    assert draft["parent"]["subscription_details"]["subscription"] == subscription["id"]
    sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
    (finalized,) = told(sim, "invoice.finalized")
    final = finalized.data.object
    assert (final["id"], final["status"], final["automatically_finalizes_at"]) == (draft["id"], "open", None)
    assert final["status_transitions"]["finalized_at"] == MIDNIGHT + DAY + HOUR


def test_usage_after_an_early_finalization_is_not_on_the_invoice(sim: SimulatorControl, invoice: str) -> None:
    use(sim, "1", 0)
    sim.set_clock(MIDNIGHT + DAY + MINUTE)
    sim.invoice(invoice, "finalize")
    sim.advance(MINUTE)
    use(sim, "10", DAY - 1)
    sim.advance(2 * HOUR)
    final: Any = sdk(sim).v1.invoices.retrieve(invoice)
    assert (final.status, quantity(final)) == ("open", 1)
    assert 0 <= final.status_transitions.finalized_at - MIDNIGHT - DAY - MINUTE < MINUTE
    assert len(told(sim, "invoice.finalized")) == 1


def test_rule_30_a_failed_payment_makes_the_subscription_past_due_and_a_paid_one_active(
    sim: SimulatorControl,
) -> None:
    subscription, invoice = subscribed(sim)
    failed = sim.invoice(invoice, "fail_payment")
    assert (failed["attempt_count"], failed["attempted"], failed["status"]) == (1, True, "open")
    assert abs(failed["next_payment_attempt"] - sim.now() - 3 * DAY) < MINUTE
    assert sdk(sim).v1.subscriptions.retrieve(subscription).status == "past_due"
    again = sim.invoice(invoice, "fail_payment", next_payment_attempt=None)
    assert (again["attempt_count"], again["next_payment_attempt"]) == (2, None)
    sim.invoice(invoice, "pay")
    paid: Any = sdk(sim).v1.invoices.retrieve(invoice)
    assert (paid.status, paid.total, paid.amount_paid, paid.amount_remaining) == ("paid", 20, 20, 0)
    assert (paid.attempt_count, paid.next_payment_attempt) == (3, None)
    assert paid.status_transitions.paid_at >= MIDNIGHT + DAY + 2 * HOUR
    assert sdk(sim).v1.subscriptions.retrieve(subscription).status == "active"
    story = [one.type for one in told(sim)][-5:]
    assert story == [
        "invoice.payment_failed",
        "customer.subscription.updated",
        "invoice.payment_failed",
        "invoice.paid",
        "customer.subscription.updated",
    ]
    assert [previous(one) for one in told(sim, "customer.subscription.updated")][-2:] == [
        {"status": "active"},
        {"status": "past_due"},
    ]


@pytest.mark.parametrize(
    ("action", "status", "transition", "event_type"),
    [
        ("mark_uncollectible", "uncollectible", "marked_uncollectible_at", "invoice.marked_uncollectible"),
        ("void", "void", "voided_at", "invoice.voided"),
    ],
)
def test_an_open_invoice_is_given_up(
    sim: SimulatorControl, action: str, status: str, transition: str, event_type: str
) -> None:
    _, invoice = subscribed(sim)
    sim.invoice(invoice, action)
    given_up: Any = sdk(sim).v1.invoices.retrieve(invoice)
    assert given_up.status == status
    assert given_up.status_transitions[transition] >= MIDNIGHT + DAY
    assert told(sim)[-1].type == event_type
    assert told(sim)[-1].data.object["status"] == status


def test_a_draft_is_not_paid_and_a_paid_invoice_does_not_change(sim: SimulatorControl, invoice: str) -> None:
    sim.set_clock(MIDNIGHT + DAY + 1)
    for action in ("pay", "fail_payment", "void", "mark_uncollectible"):
        with pytest.raises(ValueError, match="draft"):
            sim.invoice(invoice, action)
    sim.invoice(invoice, "finalize")
    sim.invoice(invoice, "pay")
    for action in ("finalize", "pay", "fail_payment", "void", "mark_uncollectible"):
        with pytest.raises(ValueError, match="is paid"):
            sim.invoice(invoice, action)
    with pytest.raises(ValueError, match="action must be one of"):
        sim.invoice(invoice, "burn")


def test_invoices_are_listed_by_customer_subscription_and_status(sim: SimulatorControl) -> None:
    subscription, first = subscribed(sim)
    sim.schedule_invoice("cus_2", "mtr_calls", MIDNIGHT, MIDNIGHT + 5 * DAY, amount=700)
    sim.set_clock(MIDNIGHT + 5 * DAY + MINUTE)
    invoices = sdk(sim).v1.invoices
    (other,) = invoices.list({"customer": "cus_2"}).data
    assert (other.total, other.parent, other.billing_reason) == (700, None, "manual")
    ours = [one.id for one in invoices.list({"subscription": subscription, "limit": 2}).auto_paging_iter()]
    assert len(ours) == 5
    assert ours[-1] == first
    sim.invoice(first, "pay")
    assert [one.id for one in invoices.list({"status": "paid"}).data] == [first]
    assert {one.id for one in invoices.list({"status": "draft"}).data} == {other.id, ours[0]}
