"""Connected accounts that leave, and payouts that fail, theirs or ours."""

from __future__ import annotations

from datetime import datetime

from services.webhooks.handlers.reading import UNKNOWN, amount, at, code, currency, identifier, told
from services.webhooks.handling import Connection, Handler, Refused, WebhookEvent
from services.wire.records import OutboxRow


def handlers() -> list[Handler]:
    return [
        Handler(("account.application.deauthorized",), _deauthorised, is_state=False),
        Handler(("payout.failed",), _payout_failed, is_state=False),
    ]


def _deauthorised(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    """An account may come back and leave again."""
    if not event.account:
        raise Refused("shape_account")
    name, subject = "connect_account_deauthorized", f"{event.account}/{event.event_id}"
    return [told(name, event, now, "account", subject, {"account_id": event.account})]


def _payout_failed(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    payout = identifier(event.data, "id")
    attributes = {
        "payout_id": payout,
        "amount": _amount(event),
        "currency": currency(event.data),
        "failure_code": code(at(event.data, "failure_code")) or UNKNOWN,
    }
    name = "connect_payout_failed" if event.account else "payout_failed"
    return [told(name, event, now, "payout", payout, attributes)]


def _amount(event: WebhookEvent) -> int:
    """A payout of a negative balance is a debit, and its amount negative."""
    found = at(event.data, "amount")
    if isinstance(found, int) and found < 0:
        return -amount({"amount": -found}, "amount")
    return amount(event.data, "amount")
