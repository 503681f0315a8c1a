"""Invoices: a draft when a period ends, final an hour later or by hand, then paid, written off or void.

As documented (docs.stripe.com/billing/subscriptions/usage-based: configure-grace-period, meters/configure;
docs.stripe.com/invoicing/overview): usage of the period that arrives before the invoice is final is on it,
later usage is not; a finalized invoice never changes; a negative quantity is invoiced as 0. The invoice of a
subscription has a line for each metered price, and costs quantity times unit amount, rounded half up; there
are no tiers, taxes, discounts or prorations. An invoice that the control API schedules has one line of one
meter. Nothing is collected by itself: tests say what becomes of an open invoice. Choices: a failed payment
makes an active subscription past_due and a paid one active again; the next try is three days later.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.ledger import Ledger, text
from services.stripe_simulator.meters import Registry, new_id
from services.stripe_simulator.resources import Resources
from services.stripe_simulator.summaries import aggregate, last_received

SCHEDULED = "scheduled_invoice"  # its kind until the period ends: no call finds it
RETRY_SECONDS = 3 * 24 * 3600
#: action: from which statuses
ACTIONS = {
    "finalize": ("draft",),
    "pay": ("open", "uncollectible"),
    "fail_payment": ("open",),
    "mark_uncollectible": ("open",),
    "void": ("open", "uncollectible"),
}
RECOVERS = ("incomplete", "past_due", "unpaid")


class Invoices:
    def __init__(
        self, config: SimulatorConfig, resources: Resources, registry: Registry, ledger: Ledger
    ) -> None:
        self._config = config
        self._resources = resources
        self._registry = registry
        self._ledger = ledger

    # How an invoice comes to be

    def schedule(self, given: Json) -> Json:
        """An invoice of one meter, to be created when its period ends."""
        start, end = int(given["period_start"]), int(given["period_end"])
        if start >= end:
            raise ValueError("period_end must be after period_start")
        customer, meter = self._registry.customer(given["customer"]), self._registry.meter(given["meter"])
        subscription = given.get("subscription")
        if subscription is not None:
            self._resources.find("subscription", subscription)
        amount, currency = int(given.get("amount", 0)), str(given.get("currency", "usd"))
        invoice = self._invoice(customer.id, subscription, currency, start, end)
        invoice |= _amounts(amount) | {"object": SCHEDULED, "metadata": {"meter": meter.id}}
        self._resources.keep(invoice, due_at=end)
        return invoice | {"object": "invoice", "status": "scheduled"}

    def draft(self, subscription: Json, items: list[Json], end: int, when: Occasion) -> Json:
        """The invoice of what these items of a subscription used until ``end``."""
        start = min(item["current_period_start"] for item in items)
        invoice = self._invoice(
            subscription["customer"], subscription["id"], subscription["currency"], start, end
        )
        invoice["lines"]["data"] = [
            _line(invoice, item["current_period_start"], end)
            | {
                "parent": {
                    "invoice_item_details": None,
                    "subscription_item_details": {
                        "invoice_item": None,
                        "proration": False,
                        "subscription": subscription["id"],
                        "subscription_item": item["id"],
                    },
                    "type": "subscription_item_details",
                },
                "pricing": {
                    "price_details": {"price": item["price"]["id"], "product": item["price"]["product"]},
                    "type": "price_details",
                    "unit_amount_decimal": item["price"]["unit_amount_decimal"],
                },
                "subscription": subscription["id"],
            }
            for item in items
        ]
        self._created(invoice, when)
        return invoice

    def begin(self, invoice: Json, when: Occasion) -> None:
        """The period of a scheduled invoice has ended."""
        self._created(invoice | {"object": "invoice"}, when)

    def _created(self, invoice: Json, when: Occasion) -> None:
        self._resources.keep(invoice, due_at=invoice["automatically_finalizes_at"])
        self._resources.tell("invoice.created", invoice, when)

    def _invoice(self, customer: str, subscription: str | None, currency: str, start: int, end: int) -> Json:
        invoice_id = new_id("in_test")
        details: Json = {"metadata": {}, "subscription": subscription}
        return {
            "id": invoice_id,
            "object": "invoice",
            **_amounts(0),
            "attempt_count": 0,
            "attempted": False,
            "auto_advance": True,
            "automatically_finalizes_at": int(end + self._config.invoice_grace_seconds),
            "billing_reason": "manual" if subscription is None else "subscription_cycle",
            "collection_method": "charge_automatically",
            "created": end,
            "currency": currency,
            "customer": customer,
            "lines": {
                "object": "list",
                "data": [],
                "has_more": False,
                "url": f"/v1/invoices/{invoice_id}/lines",
            },
            "livemode": False,
            "metadata": {},
            "next_payment_attempt": None,
            "parent": None
            if subscription is None
            else {"quote_details": None, "subscription_details": details, "type": "subscription_details"},
            "period_end": end,
            "period_start": start,
            "status": "draft",
            "status_transitions": {
                "finalized_at": None,
                "marked_uncollectible_at": None,
                "paid_at": None,
                "voided_at": None,
            },
        }

    # What becomes of it

    def act(self, invoice_id: str, action: str, given: Json, when: Occasion) -> Json:
        """One of ACTIONS, by hand."""
        invoice = self._resources.find("invoice", invoice_id)
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}")
        if invoice["status"] not in ACTIONS[action]:
            raise ApiError(f"Invoice {invoice_id} is {invoice['status']}: {action} is not possible.")
        if action == "finalize":
            self.finalize(invoice, when)
        elif action == "pay":
            self._pay(invoice, when)
        elif action == "fail_payment":
            self._fail_payment(invoice, given, when)
        elif action == "void":
            self._end(invoice, "void", "voided_at", "invoice.voided", when)
        else:
            event = "invoice.marked_uncollectible"
            self._end(invoice, "uncollectible", "marked_uncollectible_at", event, when)
        return self._resources.find("invoice", invoice_id)

    def finalize(self, invoice: Json, when: Occasion) -> None:
        """What was received until now is on it, and nothing is added any more."""
        if invoice["metadata"].get("meter"):
            line = _line(invoice, invoice["period_start"], invoice["period_end"])
            line["amount"] = line["subtotal"] = invoice["total"]
            quantity = self._quantity(invoice, invoice["metadata"]["meter"], line, when.at)
            invoice["lines"]["data"] = [line | {"quantity_decimal": text(quantity)}]
        else:
            lines = [self._priced(invoice, line, when.at) for line in invoice["lines"]["data"]]
            invoice["lines"]["data"] = lines
            invoice |= _amounts(sum(line["amount"] for line in lines))
        self._move(invoice, "open", "finalized_at", when, automatically_finalizes_at=None)
        self._resources.tell("invoice.finalized", invoice, when)

    def _pay(self, invoice: Json, when: Occasion) -> None:
        self._move(
            invoice,
            "paid",
            "paid_at",
            when,
            amount_paid=invoice["total"],
            amount_remaining=0,
            attempt_count=invoice["attempt_count"] + 1,
            attempted=True,
            next_payment_attempt=None,
        )
        self._resources.tell("invoice.paid", invoice, when)
        self._subscription_follows(invoice, RECOVERS, "active", when)

    def _fail_payment(self, invoice: Json, given: Json, when: Occasion) -> None:
        following = given.get("next_payment_attempt", int(when.at) + RETRY_SECONDS)
        count = invoice["attempt_count"] + 1
        invoice |= {"attempt_count": count, "attempted": True, "next_payment_attempt": following}
        self._resources.keep(invoice)
        self._resources.tell("invoice.payment_failed", invoice, when)
        self._subscription_follows(invoice, ("active", "trialing"), "past_due", when)

    def _end(self, invoice: Json, status: str, transition: str, event: str, when: Occasion) -> None:
        self._move(invoice, status, transition, when, next_payment_attempt=None)
        self._resources.tell(event, invoice, when)

    def _move(self, invoice: Json, status: str, transition: str, when: Occasion, **changes: Any) -> None:
        moved = invoice["status_transitions"] | {transition: int(when.at)}
        invoice |= {"status": status, "status_transitions": moved, **changes}
        self._resources.keep(invoice)

    def _subscription_follows(
        self, invoice: Json, statuses: tuple[str, ...], status: str, when: Occasion
    ) -> None:
        """The subscription's status, if it is one of these, becomes what the payment says."""
        if invoice["parent"] is None:
            return
        subscription = self._resources.find(
            "subscription", invoice["parent"]["subscription_details"]["subscription"]
        )
        if subscription["status"] in statuses:
            changed = subscription | {"status": status}
            self._resources.update(changed)
            self._resources.tell("customer.subscription.updated", changed, when, subscription)

    # What is on it

    def _priced(self, invoice: Json, line: Json, until: float) -> Json:
        price = self._resources.find("price", line["pricing"]["price_details"]["price"])
        quantity = self._quantity(invoice, price["recurring"]["meter"], line, until)
        exact = quantity * Decimal(price["unit_amount_decimal"])
        amount = int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))
        return line | {"amount": amount, "subtotal": amount, "quantity_decimal": text(quantity)}

    def _quantity(self, invoice: Json, meter_id: str, line: Json, until: float) -> Decimal:
        """What was received in time, of the line's period by event timestamp, never below zero."""
        meter, period = self._registry.meter(meter_id), line["period"]
        usage = list(
            self._ledger.received(meter.id, invoice["customer"], period["start"], period["end"], until)
        )
        return max(Decimal(0), aggregate(last_received(usage, meter), meter.formula)) if usage else Decimal(0)


def _amounts(total: int) -> Json:
    return {
        "amount_due": total,
        "amount_paid": 0,
        "amount_remaining": total,
        "subtotal": total,
        "total": total,
    }


def _line(invoice: Json, start: int, end: int) -> Json:
    return {
        "id": new_id("il_test"),
        "object": "line_item",
        "amount": 0,
        "currency": invoice["currency"],
        "invoice": invoice["id"],
        "livemode": False,
        "metadata": {},
        "period": {"end": end, "start": start},
        "quantity_decimal": "0",
        "subtotal": 0,
    }
