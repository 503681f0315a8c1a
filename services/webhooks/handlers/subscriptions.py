"""Subscriptions: their status and cycle, the billing periods that follow, and the end of dunning."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.webhooks.handlers.cycles import (
    Cycle,
    LiveCycle,
    feed_calendars,
    hold,
    live_cycles,
    metered_cycles,
    same_periods,
)
from services.webhooks.handlers.reading import UNKNOWN, at, code, identifier, moment, told, word
from services.webhooks.handling import Connection, Handler, WebhookEvent
from services.wire.records import OutboxRow

_TYPES = (
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.trial_will_end",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
)

#: A subscription never comes back from these.
_ENDED = ("canceled", "incomplete_expired")

#: A subscription that is paid again can be exhausted again.
_KEEP = """
    INSERT INTO stripe_subscriptions AS s (subscription_id, account, stripe_customer, status, is_metered,
        unit, count, anchor, created_at, past_due_since, seen_at)
    VALUES (%(id)s, %(account)s, %(customer)s, %(status)s, %(is_metered)s, %(unit)s, %(count)s, %(anchor)s,
        %(created_at)s, CASE WHEN %(status)s = 'past_due' THEN %(seen_at)s::timestamptz END, %(seen_at)s)
    ON CONFLICT (subscription_id) DO UPDATE SET stripe_customer = excluded.stripe_customer,
        status = excluded.status, is_metered = excluded.is_metered, unit = excluded.unit,
        count = excluded.count, anchor = excluded.anchor, created_at = excluded.created_at,
        past_due_since = CASE WHEN excluded.status = 'past_due'
            THEN coalesce(s.past_due_since, excluded.seen_at) END,
        exhausted_at = CASE
            WHEN excluded.status IN ('active', 'trialing') AND s.exhausted_at < excluded.seen_at THEN NULL
            ELSE s.exhausted_at END,
        seen_at = excluded.seen_at
    """


@dataclass(frozen=True, slots=True)
class _Subscription:
    subscription_id: str
    customer: str
    status: str
    is_metered: bool
    cycles: list[Cycle]
    created_at: datetime


def handlers() -> list[Handler]:
    return [Handler(_TYPES, _apply)]


def _apply(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    new = _read(event)
    hold(db, new.customer)
    stored = db.execute(
        "SELECT status, seen_at FROM stripe_subscriptions WHERE subscription_id = %s", (new.subscription_id,)
    ).fetchone()
    if stored and stored[1] == event.created_at and _is_older(event, new.status, stored[0]):
        return []
    from_status = stored[0] if stored else code(at(event.previous, "status")) or UNKNOWN
    before = live_cycles(db, new.customer)
    cycle = new.cycles[0] if new.cycles else None
    db.execute(
        _KEEP,
        {
            "id": new.subscription_id,
            "account": event.account,
            "customer": new.customer,
            "status": new.status,
            "is_metered": new.is_metered,
            "unit": cycle and cycle.unit,
            "count": cycle and cycle.count,
            "anchor": cycle and cycle.anchor,
            "created_at": new.created_at,
            "seen_at": event.created_at,
        },
    )
    rows: list[OutboxRow] = []
    if new.status == "incomplete_expired" != from_status:
        attributes = {"subscription_id": new.subscription_id, "customer_id": new.customer}
        rows.append(told("incomplete_expired", event, now, "subscription", new.subscription_id, attributes))
    reason = at(event.data, "cancellation_details", "reason")
    if new.status == "unpaid" or (new.status == "canceled" and reason == "payment_failed"):
        rows += exhausted(db, event, now, new.subscription_id, from_status, new.status)
    if not event.account:
        changed = stored is None or "items" in event.previous
        rows += _unclear(event, now, new, before, live_cycles(db, new.customer), changed=changed)
        feed_calendars(db, new.customer)
    return rows


def _is_older(event: WebhookEvent, status: str, stored: str) -> bool:
    """Of two events of one second: its creation comes before everything else, and its end after."""
    return event.event_type.endswith(".created") or (stored in _ENDED and status not in _ENDED)


def _read(event: WebhookEvent) -> _Subscription:
    data = event.data
    is_metered, cycles = metered_cycles(data)
    return _Subscription(
        identifier(data, "id"),
        identifier(data, "customer"),
        word(data, "status"),
        is_metered,
        cycles,
        moment(data, "created"),
    )


def exhausted(
    db: Connection, event: WebhookEvent, now: datetime, subscription_id: str, from_status: str, to_status: str
) -> list[OutboxRow]:
    """Tell once that Stripe will try no more to be paid for a subscription, until it is paid again."""
    told_now = db.execute(
        "UPDATE stripe_subscriptions SET exhausted_at = %s "
        "WHERE subscription_id = %s AND exhausted_at IS NULL",
        (event.created_at, subscription_id),
    ).rowcount
    if not told_now:
        return []
    attributes = {
        "subscription_id": subscription_id,
        "from_status": from_status,
        "to_status": to_status,
        "source": "stripe_native",
    }
    subject = f"{subscription_id}/{event.event_id}"
    return [told("dunning_exhaustion", event, now, "subscription", subject, attributes)]


def _unclear(
    event: WebhookEvent,
    now: datetime,
    new: _Subscription,
    before: list[LiveCycle],
    after: list[LiveCycle],
    *,
    changed: bool,
) -> list[OutboxRow]:
    """Tell when cycles of one customer began to differ, within a subscription or between them."""
    others = [one for one in after if not same_periods(one.cycle, after[0].cycle)]
    mixed = len(new.cycles) > 1 and changed
    if not mixed and (not others or after == before):
        return []
    attributes = {
        "customer_id": new.customer,
        "subscription_id": after[0].subscription_id if after else new.subscription_id,
        "differing": len(others) + max(0, len(new.cycles) - 1),
    }
    subject = f"{new.customer}/{event.event_id}"
    return [told("billing_period_unclear", event, now, "stripe_customer", subject, attributes)]
