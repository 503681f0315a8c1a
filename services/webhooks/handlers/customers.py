"""Customers of Stripe: their time zone, whose usage they are billed for, and that they are gone.

Whose they are is in the metadata that ``tidemeter apply --create-in-stripe`` writes. What an operator mapped
is never overwritten, nor is a reference that is itself a Stripe customer's id mapped to another, and what a
connected account says of its customers maps nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

import structlog

from services.webhooks.handlers.cycles import feed_calendars, hold
from services.webhooks.handlers.reading import at, identifier, told
from services.webhooks.handling import Connection, Handler, WebhookEvent
from services.wire.errors import Invalid, Misconfigured
from services.wire.periods import calendar_text
from services.wire.records import OutboxRow
from services.wire.usage import CUSTOMER_CHARS_MAX, check_text

log = structlog.get_logger(__name__)

TENANT, REF, TIMEZONE = "tidemeter_tenant", "tidemeter_ref", "tidemeter_timezone"
_ZONE = re.compile(r"[A-Za-z0-9_+/-]{1,64}")
#: Without a mapping such a customer is billed as itself.
_STRIPE_CUSTOMER = re.compile(r"cus_[A-Za-z0-9_]+")
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def handlers() -> list[Handler]:
    return [
        Handler(("customer.created", "customer.updated"), _keep),
        Handler(("customer.deleted",), _delete),
    ]


def _keep(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    customer = identifier(event.data, "id")
    hold(db, customer)
    if event.event_type == "customer.created" and _is_known(db, event, customer):
        return []
    named, timezone = _timezone(event, customer)
    db.execute(
        "INSERT INTO stripe_customers AS c (stripe_customer, account, timezone, seen_at) "
        "VALUES (%s, %s, %s, %s) ON CONFLICT (stripe_customer) DO UPDATE SET seen_at = excluded.seen_at, "
        "timezone = CASE WHEN %s THEN excluded.timezone ELSE c.timezone END",
        (customer, event.account, timezone, event.created_at, named),
    )
    if not event.account:
        _map(db, event, customer)
        feed_calendars(db, customer)
    return []


def _is_known(db: Connection, event: WebhookEvent, customer: str) -> bool:
    """Whether another event of this second told of it: Stripe tells no more, but its creation came first."""
    row = db.execute(
        "SELECT FROM stripe_customers WHERE stripe_customer = %s AND seen_at = %s",
        (customer, event.created_at),
    ).fetchone()
    return row is not None


def _timezone(event: WebhookEvent, customer: str) -> tuple[bool, str | None]:
    """Whether the event says anything that can be used about the time zone, and which it is."""
    metadata = at(event.data, "metadata")
    name = at(metadata, TIMEZONE)
    if name is None or name == "":
        return isinstance(metadata, Mapping), None
    if isinstance(name, str) and _ZONE.fullmatch(name):
        try:
            calendar_text(name)
        except Misconfigured:
            pass
        else:
            return True, name
    log.warning("a customer's time zone is not known and ignored", stripe_customer=customer)
    return False, None


def _map(db: Connection, event: WebhookEvent, customer: str) -> None:
    tenant, ref = at(event.data, "metadata", TENANT), at(event.data, "metadata", REF)
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant) or not isinstance(ref, str):
        return
    try:
        check_text(ref, REF, CUSTOMER_CHARS_MAX)
    except Invalid:
        return
    if ref != customer and _STRIPE_CUSTOMER.fullmatch(ref):
        log.warning("a customer's metadata names another customer of Stripe", stripe_customer=customer)
        return
    mapped = db.execute(
        "INSERT INTO customers (tenant_id, customer_ref, stripe_customer) "
        "SELECT tenant_id, %s, %s FROM tenants WHERE tenant_id = %s ON CONFLICT DO NOTHING",
        (ref, customer, tenant),
    ).rowcount
    if mapped:
        log.info("a customer was mapped by its metadata", stripe_customer=customer, tenant_id=tenant)
        return
    row = db.execute(
        "SELECT stripe_customer FROM customers WHERE (tenant_id, customer_ref) = (%s, %s)", (tenant, ref)
    ).fetchone()
    if row is not None and row[0] != customer:
        log.warning(
            "a customer's metadata names somebody who is mapped to another; that stays",
            stripe_customer=customer,
            mapped_to=row[0],
            tenant_id=tenant,
        )


def _delete(db: Connection, event: WebhookEvent, _: None, now: datetime) -> list[OutboxRow]:
    customer = identifier(event.data, "id")
    hold(db, customer)
    db.execute(
        "INSERT INTO stripe_customers AS c (stripe_customer, account, deleted_at, seen_at) "
        "VALUES (%(id)s, %(account)s, %(at)s, %(at)s) ON CONFLICT (stripe_customer) DO UPDATE "
        "SET deleted_at = coalesce(c.deleted_at, excluded.deleted_at), seen_at = excluded.seen_at",
        {"id": customer, "account": event.account, "at": event.created_at},
    )
    db.execute("DELETE FROM stripe_cards WHERE stripe_customer = %s", (customer,))
    row = db.execute("SELECT count(*) FROM customers WHERE stripe_customer = %s", (customer,)).fetchone()
    mapped = row[0] if row and not event.account else 0
    attributes = {"customer_id": customer, "mapped": mapped}
    return [told("stripe_customer_deleted", event, now, "stripe_customer", customer, attributes)]
