"""Rules 27 and 32 to 35: charges, refunds, disputes, payouts, and the balance transactions behind them."""

from __future__ import annotations

from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.billing_calls import previous, told, types_told
from tests.contract.stripe_calls import DAY, HOUR, MINUTE, sdk


def transactions(sim: SimulatorControl, **filters: Any) -> list[Any]:
    wanted: Any = {"limit": 2} | filters
    return list(sdk(sim).v1.balance_transactions.list(wanted).auto_paging_iter())


def test_rule_32_a_charge_and_its_balance_transaction(sim: SimulatorControl) -> None:
    charge: Any = sdk(sim).v1.charges.retrieve(
        sim.charge("cus_1", 2000, fee=88)["id"], {"expand": ["balance_transaction"]}
    )
    assert (charge.status, charge.paid, charge.captured, charge.customer) == (
        "succeeded",
        True,
        True,
        "cus_1",
    )
    booked = charge.balance_transaction
    assert isinstance(booked, stripe.BalanceTransaction)
    assert (booked.amount, booked.fee, booked.net, booked.type) == (2000, 88, 1912, "charge")
    assert (booked.source, booked.status, booked.available_on) == (
        charge.id,
        "pending",
        charge.created + 2 * DAY,
    )
    (fee,) = booked.fee_details
    assert (fee.amount, fee.currency, fee.type) == (88, "usd", "stripe_fee")
    sim.advance(2 * DAY)
    assert sdk(sim).v1.balance_transactions.retrieve(booked.id).status == "available"
    assert types_told(sim) == ["charge.succeeded"]


def test_rule_32_a_balance_transaction_may_come_later_and_is_told(sim: SimulatorControl) -> None:
    made = sim.charge("cus_1", 2000, fee=88, settle_after_seconds=HOUR)["id"]
    charges = sdk(sim).v1.charges
    assert charges.retrieve(made).balance_transaction is None
    assert transactions(sim) == []
    sim.advance(59 * MINUTE)
    assert charges.retrieve(made).balance_transaction is None
    sim.advance(2 * MINUTE)
    (booked,) = transactions(sim)
    assert charges.retrieve(made).balance_transaction == booked.id
    assert booked.created == charges.retrieve(made).created + HOUR
    succeeded, updated = told(sim)
    assert (succeeded.type, succeeded.data.object["balance_transaction"]) == ("charge.succeeded", None)
    assert (updated.type, previous(updated)) == ("charge.updated", {"balance_transaction": None})
    assert updated.created == booked.created


def test_a_charge_that_failed_moves_no_money(sim: SimulatorControl) -> None:
    made = sim.charge("cus_1", 500, failed="card_declined")["id"]
    charge: Any = sdk(sim).v1.charges.retrieve(made)
    assert (charge.status, charge.paid, charge.failure_code) == ("failed", False, "card_declined")
    assert (charge.balance_transaction, charge.amount_captured) == (None, 0)
    assert transactions(sim) == []
    assert types_told(sim) == ["charge.failed"]
    for wrong in (lambda: sim.refund(made), lambda: sim.dispute(made)):
        with pytest.raises(ValueError, match="400"):
            wrong()


def test_charges_are_listed_by_customer_and_creation_over_pages(sim: SimulatorControl) -> None:
    now = int(sim.now())
    ids = [sim.charge("cus_1", 100 + day, at=now - day * DAY)["id"] for day in range(5)]
    other = sim.charge("cus_2", 7)["id"]
    charges = sdk(sim).v1.charges
    listed = [one.id for one in charges.list({"customer": "cus_1", "limit": 2}).auto_paging_iter()]
    assert listed == ids, "by creation, whenever they were made here"
    assert [one.id for one in charges.list({"customer": "cus_2"}).data] == [other]
    recent = charges.list({"customer": "cus_1", "created": {"gte": now - 2 * DAY}})
    assert [one.id for one in recent.data] == ids[:3]
    assert [one.id for one in charges.list({"customer": "cus_1", "starting_after": ids[3]}).data] == ids[4:]
    with pytest.raises(stripe.InvalidRequestError, match="No such charge"):
        charges.retrieve("ch_9")


def test_rule_33_a_refund_is_a_transaction_of_its_own_and_the_fee_stays(sim: SimulatorControl) -> None:
    charge = sim.charge("cus_1", 2000, fee=88)["id"]
    refund: Any = sdk(sim).v1.refunds.retrieve(sim.refund(charge, amount=500)["id"])
    assert (refund.charge, refund.amount, refund.status) == (charge, 500, "succeeded")
    (booked,) = transactions(sim, source=refund.id)
    assert (booked.id, booked.type) == (refund.balance_transaction, "refund")
    assert (booked.amount, booked.fee, booked.net, booked.fee_details) == (-500, 0, -500, [])
    rest = sim.refund(charge, fee_refunded=88)
    (returned,) = transactions(sim, source=rest["id"])
    assert (returned.amount, returned.fee, returned.net) == (-1500, -88, -1412)
    after = sdk(sim).v1.charges.retrieve(charge)
    assert (after.amount_refunded, after.refunded) == (2000, True)
    assert {one.type for one in transactions(sim, type="refund")} == {"refund"}
    assert [one.id for one in sdk(sim).v1.refunds.list({"charge": charge}).data] == [rest["id"], refund.id]
    assert types_told(sim)[1:] == ["refund.created", "charge.refunded"] * 2
    first, second = told(sim, "charge.refunded")
    assert previous(first) == {"amount_refunded": 0}
    assert previous(second) == {"amount_refunded": 500, "refunded": False}
    with pytest.raises(ValueError, match="400"):
        sim.refund(charge, amount=1)


def test_a_refund_before_the_charge_settled_is_not_undone_by_it(sim: SimulatorControl) -> None:
    charge = sim.charge("cus_1", 2000, settle_after_seconds=HOUR)["id"]
    sim.refund(charge, amount=500)
    sim.advance(2 * HOUR)
    after = sdk(sim).v1.charges.retrieve(charge)
    assert after.amount_refunded == 500
    assert after.balance_transaction is not None


@pytest.mark.parametrize(("status", "nets"), [("lost", [-3500]), ("won", [-3500, 3500])])
def test_rule_34_a_dispute_withdraws_and_gives_back_only_when_won(
    sim: SimulatorControl, status: str, nets: list[int]
) -> None:
    charge = sim.charge("cus_1", 2000)["id"]
    dispute = sim.dispute(charge, reason="fraudulent")["id"]
    opened: Any = sdk(sim).v1.disputes.retrieve(dispute)
    assert (opened.status, opened.reason, opened.amount) == ("needs_response", "fraudulent", 2000)
    assert sdk(sim).v1.charges.retrieve(charge).disputed is True
    with pytest.raises(ValueError, match="disputed already"):
        sim.dispute(charge)
    sim.close_dispute(dispute, status)
    closed: Any = sdk(sim).v1.disputes.retrieve(dispute)
    assert closed.status == status
    assert [one.net for one in closed.balance_transactions] == nets
    assert [one.net for one in transactions(sim, source=dispute)] == nets[::-1]
    returned = ["charge.dispute.funds_reinstated"] if status == "won" else []
    assert types_told(sim)[1:] == [
        "charge.dispute.created",
        "charge.dispute.funds_withdrawn",
        *returned,
        "charge.dispute.closed",
    ]
    assert previous(told(sim, "charge.dispute.closed")[0])["status"] == "needs_response"
    with pytest.raises(ValueError, match="closed already"):
        sim.close_dispute(dispute, "won")


def test_rule_35_a_payout_holds_what_it_paid_out(sim: SimulatorControl) -> None:
    charge = sim.charge("cus_1", 2000, fee=88)
    sim.charge("cus_1", 900, "eur", fee=30)
    sim.advance(2 * DAY)
    refund = sim.refund(charge["id"], amount=500)
    late = sim.charge("cus_2", 100)
    payout: Any = sdk(sim).v1.payouts.retrieve(sim.payout()["id"])
    assert (payout.amount, payout.status, payout.reconciliation_status) == (1412, "pending", "completed")
    paid_out = transactions(sim, payout=payout.id)
    assert {one.source for one in paid_out} == {charge["id"], refund["id"], payout.id}
    assert sum(one.net for one in paid_out) == 0
    assert late["balance_transaction"] not in {one.id for one in paid_out}
    sim.advance(2 * DAY)
    assert sdk(sim).v1.payouts.retrieve(payout.id).status == "paid"
    assert types_told(sim)[-2:] == ["payout.created", "payout.paid"]
    assert sim.payout()["amount"] == 100


def test_a_payout_that_failed_brings_the_money_back(sim: SimulatorControl) -> None:
    made = sim.payout(amount=700, failure_code="account_closed")
    failed: Any = sdk(sim).v1.payouts.retrieve(made["id"])
    assert (failed.status, failed.failure_code) == ("failed", "account_closed")
    assert sum(one.net for one in transactions(sim, payout=failed.id)) == 0
    assert sum(one.net for one in transactions(sim)) == 0
    created, told_failed = told(sim)
    assert (created.type, created.data.object["status"]) == ("payout.created", "pending")
    assert (told_failed.type, told_failed.data.object["failure_code"]) == ("payout.failed", "account_closed")
    sim.advance(3 * DAY)
    assert sdk(sim).v1.payouts.retrieve(failed.id).status == "failed"


def test_money_that_makes_no_sense_is_refused(sim: SimulatorControl) -> None:
    for wrong in (
        lambda: sim.charge("cus_9", 100),
        lambda: sim.charge("cus_1", 0),
        lambda: sim.refund("ch_9"),
        lambda: sim.close_dispute("du_9", "won"),
        lambda: sim.payout(account="acct_1"),
    ):
        with pytest.raises(ValueError, match="400"):
            wrong()
    assert types_told(sim) == []
