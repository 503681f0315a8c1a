"""Charges, refunds and disputes: what failed, what was lost, and what a fee will be looked up for."""

from __future__ import annotations

from datetime import datetime

from services.webhooks.handlers.reading import (
    UNKNOWN,
    Object,
    amount,
    at,
    code,
    currency,
    identifier,
    identifier_or_none,
    moment,
    told,
    word,
)
from services.webhooks.handling import Connection, Handler, Refused, WebhookEvent
from services.wire.records import OutboxRow

#: A balance transaction that was not known before is looked at anew; what is settled stays settled.
_KEEP = """
    INSERT INTO stripe_fees AS f (object_id, kind, account, charge_id, amount, currency, happened_at,
        balance_transaction, next_attempt_at)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (object_id) DO UPDATE SET amount = excluded.amount, currency = excluded.currency,
        balance_transaction = coalesce(excluded.balance_transaction, f.balance_transaction),
        next_attempt_at = CASE WHEN excluded.balance_transaction IS DISTINCT FROM f.balance_transaction
            THEN excluded.next_attempt_at ELSE f.next_attempt_at END
    WHERE f.state = 'pending'
    """


def handlers() -> list[Handler]:
    refunds = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
    return [
        Handler(("charge.succeeded", "charge.captured", "charge.updated"), _charge),
        Handler(refunds, _refund),
        Handler(("charge.failed",), _failed, is_state=False),
        Handler(("charge.refunded",), _refunded, is_state=False),
        Handler(("charge.dispute.created",), _disputed, is_state=False),
        Handler(("charge.dispute.closed",), _dispute_closed, is_state=False),
    ]


def _charge(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """What was only authorised, or failed, moves no money and has no fee."""
    data = event.data
    charge = identifier(data, "id")
    if word(data, "status") == "succeeded" and at(data, "captured") is True:
        _keep(db, event, now, "charge", charge, charge, amount(data, "amount_captured"))
    return []


def _refund(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """A refund that came to nothing is not looked up, nor is one of no charge (of a bank transfer)."""
    data = event.data
    refund, charge = identifier(data, "id"), identifier_or_none(data, "charge")
    if code(at(data, "status")) in ("failed", "canceled"):
        db.execute("DELETE FROM stripe_fees WHERE object_id = %s AND state = 'pending'", (refund,))
    elif charge is not None:
        _keep(db, event, now, "refund", refund, charge, amount(data, "amount"))
    return []


def _keep(
    db: Connection, event: WebhookEvent, now: datetime, kind: str, object_id: str, charge: str, minor: int
) -> None:
    db.execute(
        _KEEP,
        (
            object_id,
            kind,
            event.account,
            charge,
            minor,
            currency(event.data),
            moment(event.data, "created"),
            identifier_or_none(event.data, "balance_transaction"),
            now,
        ),
    )


def _failed(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    charge = identifier(event.data, "id")
    attributes = {
        "charge_id": charge,
        "customer_id": identifier_or_none(event.data, "customer"),
        "failure_code": code(at(event.data, "failure_code")) or UNKNOWN,
        **_money(event.data, amount(event.data, "amount")),
    }
    return [told("charge_failed", event, now, "charge", charge, attributes)]


def _refunded(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """The loss is what this event added to what was refunded before. What was only authorised, and is let go
    of, Stripe calls refunded too: there was no money to lose."""
    if at(event.data, "captured") is False:
        return []
    charge = identifier(event.data, "id")
    added = amount(event.data, "amount_refunded")
    try:
        added -= amount(event.previous, "amount_refunded")
    except Refused:
        raise Refused("shape_previous_amount_refunded") from None
    if added <= 0:
        return []
    attributes = {
        "reason": "refund",
        "charge_id": charge,
        "customer_id": identifier_or_none(event.data, "customer"),
        **_money(event.data, added),
    }
    return [told("revenue_loss", event, now, "charge", f"{charge}/{event.event_id}", attributes)]


def _disputed(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    dispute = identifier(event.data, "id")
    return [told("charge_disputed", event, now, "dispute", dispute, _dispute(event, dispute))]


def _dispute_closed(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    if word(event.data, "status") != "lost":
        return []
    dispute = identifier(event.data, "id")
    attributes = {**_dispute(event, dispute), "reason": "dispute_lost"}
    return [told("revenue_loss", event, now, "dispute", dispute, attributes)]


def _dispute(event: WebhookEvent, dispute: str) -> dict[str, object]:
    return {
        "dispute_id": dispute,
        "charge_id": identifier(event.data, "charge"),
        "reason": code(at(event.data, "reason")) or UNKNOWN,
        "status": code(at(event.data, "status")) or UNKNOWN,
        **_money(event.data, amount(event.data, "amount")),
    }


def _money(data: Object, minor: int) -> dict[str, object]:
    return {"amount": minor, "currency": currency(data)}
