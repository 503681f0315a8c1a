"""Payouts, and accounts that leave: what a platform hears about itself and about its connected accounts.

As documented (docs.stripe.com/api/payouts, docs.stripe.com/connect/webhooks): an event of a connected account
names it in `account` and goes only to endpoints made for connected accounts; its objects are seen with its
`Stripe-Account` header. A payout of the platform holds the balance transactions that it paid out; connected
accounts have no simulated balance. `account.application.deauthorized` is about the platform's application,
which is one and the same for all accounts, so only `account` says who left. Choices: a payout takes all that
is available in its currency, and fails at once or is paid after two days.
"""

from __future__ import annotations

from services.stripe_simulator.destinations import APPLICATION
from services.stripe_simulator.errors import Json
from services.stripe_simulator.event_log import EventLog, Occasion
from services.stripe_simulator.meters import new_id
from services.stripe_simulator.payments import Balance
from services.stripe_simulator.periods import DAY_SECONDS
from services.stripe_simulator.resources import Resources

ARRIVES_AFTER_SECONDS = 2 * DAY_SECONDS


class Payouts:
    def __init__(self, resources: Resources, log: EventLog, balance: Balance) -> None:
        self._resources = resources
        self._log = log
        self._balance = balance

    def create(self, given: Json, when: Occasion) -> Json:
        """`amount` (of the platform: all that is available), `currency`, `account`, `failure_code`."""
        account, failure = str(given.get("account", "")), given.get("failure_code")
        payout = _payout(str(given.get("currency", "usd")), int(when.at))
        available = 0 if account else self._balance.pay_out(payout["currency"], payout["id"])
        payout["amount"] = int(given["amount"]) if account or "amount" in given else available
        if not account:
            payout["balance_transaction"] = self._booked(payout, -payout["amount"], "payout", when)
        self._resources.keep(payout, payout["arrival_date"], account or None)
        self._log.snapshot("payout.created", payout, when, account=account)
        if failure is None:
            return payout
        message = "The bank could not process this payout."
        failed = payout | {"failure_code": str(failure), "failure_message": message, "status": "failed"}
        if not account:
            booked = self._booked(failed, payout["amount"], "payout_failure", when)
            failed["failure_balance_transaction"] = booked
        self._resources.keep(failed)
        self._log.snapshot("payout.failed", failed, when, account=account)
        return failed

    def arrive(self, payout: Json, when: Occasion) -> None:
        paid = payout | {"status": "paid"}
        self._resources.keep(paid)
        account = self._resources.owner(payout["id"]) or ""
        self._log.snapshot("payout.paid", paid, when, account=account)

    def deauthorize(self, account: str, when: Occasion) -> Json:
        """A connected account takes back the application's access."""
        application = {"id": APPLICATION, "object": "application", "name": "Simulator"}
        event = self._log.snapshot("account.application.deauthorized", application, when, account=account)
        return {"event": event}

    def _booked(self, payout: Json, amount: int, kind: str, when: Occasion) -> str:
        """What the payout itself did to the balance: the first of the transactions that are listed for it."""
        transaction = self._balance.book(kind, payout, amount, 0, int(when.at))
        self._resources.keep(transaction, belongs_to=payout["id"])
        return str(transaction["id"])


def _payout(currency: str, now: int) -> Json:
    return {
        "id": new_id("po"),
        "object": "payout",
        "amount": 0,
        "application_fee": None,
        "arrival_date": now + ARRIVES_AFTER_SECONDS,
        "automatic": True,
        "balance_transaction": None,
        "created": now,
        "currency": currency,
        "description": "STRIPE PAYOUT",
        "destination": None,
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "livemode": False,
        "metadata": {},
        "method": "standard",
        "original_payout": None,
        "reconciliation_status": "completed",
        "reversed_by": None,
        "source_type": "card",
        "statement_descriptor": None,
        "status": "pending",
        "type": "bank_account",
    }
