"""Invoices: until when each takes usage of its period, what is lost with it, and the end of dunning.

A row of a cycle's invoice is all that closing and the push need: both look at ``invoice_limits`` before they
let usage go to a period. Two types tell a fact of their own, which is never stale; what they say of the
invoice as it is gives way to what a newer event said.
"""

from __future__ import annotations

from datetime import datetime

from services.webhooks.handlers.cycles import hold
from services.webhooks.handlers.reading import (
    UNKNOWN,
    amount,
    at,
    currency,
    identifier,
    identifier_or_none,
    moment,
    moment_or_none,
    told,
    word,
)
from services.webhooks.handlers.subscriptions import exhausted
from services.webhooks.handling import Connection, Handler, WebhookEvent
from services.wire.records import OutboxRow

_STATES = (
    "invoice.created",
    "invoice.updated",
    "invoice.finalized",
    "invoice.paid",
    "invoice.voided",
)

_KEEP = """
    INSERT INTO stripe_invoices AS i (invoice_id, account, stripe_customer, subscription_id, status, is_cycle,
        period_start, period_end, finalizes_at, finalized_at, seen_at)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (invoice_id) DO UPDATE SET stripe_customer = excluded.stripe_customer,
        subscription_id = excluded.subscription_id, status = excluded.status, is_cycle = excluded.is_cycle,
        period_start = excluded.period_start, period_end = excluded.period_end,
        finalizes_at = excluded.finalizes_at, finalized_at = coalesce(excluded.finalized_at, i.finalized_at),
        seen_at = excluded.seen_at
    WHERE i.seen_at <= excluded.seen_at
    """

#: Of a subscription that no event has told of yet: enough to remember that its dunning is exhausted.
#: It may be metered, so its invoices count as before.
_SUPPOSE = """
    INSERT INTO stripe_subscriptions (subscription_id, account, stripe_customer, status, is_metered,
        created_at, past_due_since, seen_at)
    VALUES (%(id)s, %(account)s, %(customer)s, 'past_due', true, %(at)s, %(at)s, %(at)s)
    ON CONFLICT DO NOTHING
    """


def handlers() -> list[Handler]:
    return [
        Handler(_STATES, _keep),
        Handler(("invoice.deleted",), _delete),
        Handler(("invoice.payment_failed",), _payment_failed, is_state=False),
        Handler(("invoice.marked_uncollectible",), _uncollectible, is_state=False),
    ]


def _keep(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    data = event.data
    customer = identifier_or_none(data, "customer")
    if customer is None:
        return []  # of an account that is billed by another: no usage of ours is on it
    hold(db, customer)
    status = word(data, "status")
    finalized_at = moment_or_none(data, "status_transitions", "finalized_at")
    if finalized_at is None and status != "draft":
        finalized_at = event.created_at
    db.execute(
        _KEEP,
        (
            identifier(data, "id"),
            event.account,
            customer,
            _subscription(event),
            status,
            at(data, "billing_reason") == "subscription_cycle",
            moment(data, "period_start"),
            moment(data, "period_end"),
            moment_or_none(data, "automatically_finalizes_at"),
            finalized_at,
            event.created_at,
        ),
    )
    return []


def _subscription(event: WebhookEvent) -> str | None:
    """Where it stands since API version 2025-03-31, or where it stood before."""
    found = identifier_or_none(event.data, "parent", "subscription_details", "subscription")
    return found or identifier_or_none(event.data, "subscription")


def _delete(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """Only drafts can be deleted."""
    db.execute("DELETE FROM stripe_invoices WHERE invoice_id = %s", (identifier(event.data, "id"),))
    return []


def _uncollectible(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    _keep(db, event, None, now)
    remaining = amount(event.data, "amount_remaining")
    invoice = identifier(event.data, "id")
    attributes = {
        "reason": "uncollectible",
        "invoice_id": invoice,
        "customer_id": identifier_or_none(event.data, "customer"),
        "amount": remaining,
        "amount_remaining": remaining,
        "currency": currency(event.data),
    }
    return [told("revenue_loss", event, now, "invoice", invoice, attributes)]


def _payment_failed(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """Dunning is exhausted when Stripe, which collects by itself, has no next attempt in mind.

    A first payment that fails is none of it: its subscription stays incomplete. Nor is a failure that the
    subscription has left behind since.
    """
    _keep(db, event, None, now)
    data = event.data
    subscription_id, customer = _subscription(event), identifier_or_none(data, "customer")
    if (
        subscription_id is None
        or customer is None
        or moment_or_none(data, "next_payment_attempt") is not None
        or at(data, "collection_method") == "send_invoice"
        or at(data, "billing_reason") == "subscription_create"
    ):
        return []
    known = {"id": subscription_id, "account": event.account, "customer": customer, "at": event.created_at}
    is_new = db.execute(_SUPPOSE, known).rowcount == 1
    row = db.execute(
        "SELECT status, seen_at > %s FROM stripe_subscriptions WHERE subscription_id = %s",
        (event.created_at, subscription_id),
    ).fetchone()
    status, is_newer = row or (UNKNOWN, False)
    if status.startswith("incomplete") or (is_newer and status in ("active", "trialing")):
        return []
    from_status = UNKNOWN if is_new else status
    to_status = "past_due" if status in ("active", "trialing") else status
    return exhausted(db, event, now, subscription_id, from_status, to_status)
