"""Cards of customers: until when they are good."""

from __future__ import annotations

from datetime import date, datetime

from services.webhooks.handlers.reading import at, identifier, identifier_or_none
from services.webhooks.handling import Connection, Handler, Refused, WebhookEvent
from services.wire.records import OutboxRow

_TYPES = (
    "payment_method.attached",
    "payment_method.updated",
    "payment_method.automatically_updated",
    "payment_method.detached",
)

#: ``told_for`` stays: it says which expiry was told of, and another one is told of anew.
_KEEP = """
    INSERT INTO stripe_cards (payment_method, account, stripe_customer, expires_on, seen_at)
    VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (payment_method) DO UPDATE SET stripe_customer = excluded.stripe_customer,
        expires_on = excluded.expires_on, seen_at = excluded.seen_at
    """


def handlers() -> list[Handler]:
    return [Handler(_TYPES, _apply)]


def _apply(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """A card that is nobody's any more is forgotten."""
    method, customer = identifier(event.data, "id"), identifier_or_none(event.data, "customer")
    if event.event_type == "payment_method.detached" or customer is None:
        db.execute("DELETE FROM stripe_cards WHERE payment_method = %s", (method,))
    elif at(event.data, "type") == "card":
        expires_on = _expires_on(at(event.data, "card"))
        db.execute(_KEEP, (method, event.account, customer, expires_on, event.created_at))
    return []


def _expires_on(card: object) -> date:
    """The first day of the month after the last that it is good for."""
    year, month = at(card, "exp_year"), at(card, "exp_month")
    if not isinstance(year, int) or not isinstance(month, int):
        raise Refused("shape_card")
    if not (1970 <= year <= 2200 and 1 <= month <= 12):
        raise Refused("shape_card")
    return date(year + month // 12, month % 12 + 1, 1)
