"""Charges, refunds, disputes, and what each does to the balance. Made by the control API only.

As documented (docs.stripe.com/api/charges, /refunds, /disputes, /balance_transactions;
docs.stripe.com/payments/payment-intents/asynchronous-capture): a balance transaction is gross amount, fee and
net; it is pending until `available_on`; a charge may wait for its balance transaction, whose arrival
`charge.updated` tells; a refund is a transaction of its own with a negative amount and does not return the
fee; a dispute withdraws the amount and a fee. Choices: two days until a charge is available, everything else
is at once; a dispute that is won brings back the amount and its fee.
"""

from __future__ import annotations

from typing import Any

from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.meters import Registry, new_id
from services.stripe_simulator.periods import DAY_SECONDS
from services.stripe_simulator.resources import Resources

AVAILABLE_AFTER_SECONDS = 2 * DAY_SECONDS
EVIDENCE_SECONDS = 9 * DAY_SECONDS
DISPUTE_FEE = 1500
WON_OR_LOST = ("won", "lost")
WAITING = "waiting_transaction"  # the kind of a balance transaction that is not there yet


class Balance:
    """Balance transactions: what each movement of money was, and when its net can be paid out."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def book(self, kind: str, source: Json, amount: int, fee: int, now: int, *, category: str = "") -> Json:
        """One transaction about ``source``, available at once."""
        body = self.transaction(kind, source, amount, fee, now, category=category)
        self._resources.keep(body)
        return body

    @staticmethod
    def transaction(kind: str, source: Json, amount: int, fee: int, now: int, *, category: str = "") -> Json:
        """The shape of one that is not kept yet."""
        currency = source["currency"]
        processing = {"application": None, "currency": currency, "description": "Stripe processing fees"}
        return {
            "id": new_id("txn"),
            "object": "balance_transaction",
            "amount": amount,
            "available_on": now,
            "balance_type": "payments",
            "created": now,
            "currency": currency,
            "description": None,
            "exchange_rate": None,
            "fee": fee,
            "fee_details": [{"amount": fee, **processing, "type": "stripe_fee"}] if fee else [],
            "net": amount - fee,
            "reporting_category": category or kind,
            "source": source["id"],
            "status": "available",
            "type": kind,
        }

    def release(self, transaction: Json, when: Occasion) -> None:
        self._resources.keep(transaction | {"status": "available"})

    def pay_out(self, currency: str, payout: str) -> int:
        """Put what is available and not paid out yet into this payout; returns the sum of their nets."""
        total = 0
        for one in self._resources.newest_first("balance_transaction"):
            free = one["status"] == "available" and self._resources.owner(one["id"]) is None
            if free and one["currency"] == currency:
                self._resources.keep(one, belongs_to=payout)
                total += one["net"]
        return total


class Payments:
    def __init__(self, resources: Resources, registry: Registry, balance: Balance) -> None:
        self._resources = resources
        self._registry = registry
        self._balance = balance

    def charge(self, given: Json, when: Occasion) -> Json:
        """`customer`, `amount`, `currency`, `fee`, `at`, `failed`: a code; or `settle_after_seconds`."""
        customer, failure = given.get("customer"), given.get("failed")
        when = Occasion(float(given.get("at", when.at)), when.now)
        created = int(when.at)
        charge = _charge(
            None if customer is None else self._registry.customer(customer).id,
            _positive(given, "amount"),
            str(given.get("currency", "usd")),
            created,
            None if failure is None else str(failure),
        )
        charge["metadata"] = dict(given.get("metadata", {}))
        if failure is not None:
            self._resources.keep(charge)
            self._resources.tell("charge.failed", charge, when)
            return charge
        fee, settle_after = int(given.get("fee", 0)), float(given.get("settle_after_seconds", 0))
        transaction = self._balance.transaction("charge", charge, charge["amount"], fee, created)
        available_on = created + AVAILABLE_AFTER_SECONDS
        transaction |= {"available_on": available_on, "status": "pending"}
        if settle_after > 0:
            self._resources.keep(transaction | {"object": WAITING}, due_at=created + settle_after)
        else:
            self._resources.keep(transaction, due_at=available_on)
            charge["balance_transaction"] = transaction["id"]
        self._resources.keep(charge)
        self._resources.tell("charge.succeeded", charge, when)
        return charge

    def settle(self, waiting: Json, when: Occasion) -> None:
        """The balance transaction that a charge waited for is there."""
        transaction = waiting | {"object": "balance_transaction", "created": int(when.at)}
        self._resources.keep(transaction, due_at=transaction["available_on"])
        charge = self._resources.find("charge", transaction["source"])
        settled = charge | {"balance_transaction": transaction["id"]}
        self._resources.update(settled)
        self._resources.tell("charge.updated", settled, when, charge)

    def refund(self, given: Json, when: Occasion) -> Json:
        """`charge`, `amount` (what is left), `fee_refunded` (nothing), `reason`."""
        charge = self._resources.find("charge", str(given["charge"]))
        left = charge["amount_captured"] - charge["amount_refunded"]
        amount = _positive({"amount": left} | given, "amount")
        if amount > left:
            raise ApiError(f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left}).")
        now = int(when.at)
        refund: Json = {
            "id": new_id("re"),
            "object": "refund",
            "amount": amount,
            "balance_transaction": None,
            "charge": charge["id"],
            "created": now,
            "currency": charge["currency"],
            "customer": charge["customer"],
            "metadata": dict(given.get("metadata", {})),
            "payment_intent": None,
            "reason": given.get("reason"),
            "receipt_number": None,
            "status": "succeeded",
        }
        fee = -int(given.get("fee_refunded", 0))
        refund["balance_transaction"] = self._balance.book("refund", refund, -amount, fee, now)["id"]
        refunded = charge["amount_refunded"] + amount
        changed = charge | {"amount_refunded": refunded, "refunded": refunded == charge["amount"]}
        self._resources.keep(refund)
        self._resources.update(changed)
        self._resources.tell("refund.created", refund, when)
        self._resources.tell("charge.refunded", changed, when, charge)
        return refund

    def dispute(self, given: Json, when: Occasion) -> Json:
        """`charge`, `amount` (all of it), `reason`, `fee`."""
        charge, now = self._resources.find("charge", str(given["charge"])), int(when.at)
        if charge["status"] != "succeeded" or charge["disputed"]:
            raise ApiError(f"Charge {charge['id']} cannot be disputed: it failed, or is disputed already.")
        amount = _positive({"amount": charge["amount"]} | given, "amount")
        dispute = _dispute(charge, amount, str(given.get("reason", "general")), now)
        fee = int(given.get("fee", DISPUTE_FEE))
        dispute["balance_transactions"] = [
            self._balance.book("adjustment", dispute, -amount, fee, now, category="dispute")
        ]
        self._resources.keep(dispute)
        self._resources.update(charge | {"disputed": True})
        self._resources.tell("charge.dispute.created", dispute, when)
        self._resources.tell("charge.dispute.funds_withdrawn", dispute, when)
        return dispute

    def close_dispute(self, dispute_id: str, given: Json, when: Occasion) -> Json:
        """`status`: won or lost."""
        dispute, status, now = self._resources.find("dispute", dispute_id), given["status"], int(when.at)
        if status not in WON_OR_LOST:
            raise ValueError(f"status must be one of {', '.join(WON_OR_LOST)}")
        if dispute["status"] in WON_OR_LOST:
            raise ApiError(f"Dispute {dispute_id} is closed already.")
        closed = dispute | {"status": status}
        if status == "won":
            withdrawn = dispute["balance_transactions"][0]
            returned = self._balance.book(
                "adjustment",
                dispute,
                -withdrawn["amount"],
                -withdrawn["fee"],
                now,
                category="dispute_reversal",
            )
            closed["balance_transactions"] = [withdrawn, returned]
        self._resources.keep(closed)
        if status == "won":
            self._resources.tell("charge.dispute.funds_reinstated", closed, when)
        self._resources.tell("charge.dispute.closed", closed, when, dispute)
        return closed


def _positive(given: Json, name: str) -> int:
    amount = int(given[name])
    if amount <= 0:
        raise ValueError(f"{name} must be positive")
    return amount


def _charge(customer: str | None, amount: int, currency: str, created: int, failure: str | None) -> Json:
    paid = failure is None
    outcome: dict[str, Any] = {
        "network_status": "approved_by_network" if paid else "declined_by_network",
        "reason": failure,
        "risk_level": "normal",
        "seller_message": "Payment complete." if paid else "The bank declined the payment.",
        "type": "authorized" if paid else "issuer_declined",
    }
    return {
        "id": new_id("ch"),
        "object": "charge",
        "amount": amount,
        "amount_captured": amount if paid else 0,
        "amount_refunded": 0,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": None,
        "billing_details": {"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
        "captured": paid,
        "created": created,
        "currency": currency,
        "customer": customer,
        "description": None,
        "disputed": False,
        "failure_balance_transaction": None,
        "failure_code": failure,
        "failure_message": None if paid else "Your card was declined.",
        "livemode": False,
        "metadata": {},
        "outcome": outcome,
        "paid": paid,
        "payment_intent": None,
        "payment_method": None,
        "receipt_email": None,
        "refunded": False,
        "status": "succeeded" if paid else "failed",
    }


def _dispute(charge: Json, amount: int, reason: str, now: int) -> Json:
    return {
        "id": new_id("du"),
        "object": "dispute",
        "amount": amount,
        "balance_transactions": [],
        "charge": charge["id"],
        "created": now,
        "currency": charge["currency"],
        "enhanced_eligibility_types": [],
        "evidence_details": {
            "due_by": now + EVIDENCE_SECONDS,
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
        },
        "is_charge_refundable": False,
        "livemode": False,
        "metadata": {},
        "payment_intent": None,
        "reason": reason,
        "status": "needs_response",
    }
