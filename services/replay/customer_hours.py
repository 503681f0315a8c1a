"""One hour of one customer and meter, as Stripe and the tables know it: whose it is, and what was sent.

A Stripe customer-hour is (Stripe customer, event name, hour). Several items share one: those of several
dimensions, references or meters. All of one tenant are part of the answer, never another tenant's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row

from services.streaming.explanation import (
    Adjusted,
    Amount,
    AtStripe,
    Carried,
    Delta,
    Intent,
    Item,
    Question,
)
from services.wire.decimals import plain
from services.wire.errors import Misconfigured, TidemeterError
from services.wire.periods import HOUR_US, hour_start
from services.wire.times import instant, micros, moment

Connection = psycopg.Connection[Any]

ZERO = Decimal(0)


class RefusedQuestion(TidemeterError):
    """There is no such hour. ``code`` is stable; ``path`` names the field at fault."""

    def __init__(self, code: str, message: str, path: str) -> None:
        super().__init__(message)
        self.code = code
        self.path = path


@dataclass(frozen=True, slots=True)
class MeterRow:
    """What a meter declares, as far as an answer needs it."""

    meter: str
    aggregation: str
    scale: int
    dimensions: tuple[str, ...]
    value_property: str | None


@dataclass(frozen=True, slots=True)
class CustomerHour:
    """Whose hour it is. ``customer_refs`` are all that are billed as ``stripe_customer``."""

    tenant_id: str
    customer_refs: tuple[str, ...]
    stripe_customer: str | None
    event_name: str
    meters: Mapping[str, MeterRow]
    since_us: int

    @property
    def until_us(self) -> int:
        """Its end, exclusive."""
        return self.since_us + HOUR_US

    @property
    def hour(self) -> datetime:
        """Its start."""
        return instant(self.since_us)

    def values(self) -> dict[str, Any]:
        """Parameters of the statements of this module."""
        return {
            "tenant": self.tenant_id,
            "refs": list(self.customer_refs),
            "meters": list(self.meters),
            "customer": self.stripe_customer,
            "event": self.event_name,
            "hour": self.hour,
            "until": instant(self.until_us),
        }


@dataclass(slots=True)
class Items:
    """The items of an hour by their place in the answer: all of them, and ``shown``, which are listed."""

    ids: list[UUID] = field(default_factory=list)
    places: dict[UUID, int] = field(default_factory=dict)
    shown: list[Item] = field(default_factory=list)


# -- Whose hour it is --------------------------------------------------------------------------------------


def resolve(db: Connection, question: Question, now: datetime) -> CustomerHour:
    """The hour that is meant.

    Raises:
        RefusedQuestion: ``time_invalid``; ``tenant_unknown``, ``meter_unknown``, ``customer_unknown``;
            ``tenant_ambiguous``, when several tenants have such a customer and meter and none was named.
    """
    since_us = _hour(question.hour, now)
    tenant = question.tenant_id
    known = db.execute("SELECT FROM tenants WHERE tenant_id = %s", (tenant,)).fetchone()
    if tenant is not None and known is None:
        raise RefusedQuestion("tenant_unknown", "there is no such tenant", "tenantId")
    rows = db.execute(_METERS, {"tenant": tenant, "meter": question.meter}).fetchall()
    if not rows:
        raise RefusedQuestion(
            "meter_unknown", "no meter has this slug, and none is sent under this event name", "meter"
        )
    found = []
    for tenant_id, group in groupby(rows, key=lambda row: row[0]):
        event_name = next(group)[1]  # of its slug, if it has one: see the order
        meters = _meters(db, tenant_id, event_name)
        customer = _customer(db, tenant_id, question.customer, event_name)
        if customer is not None:
            found.append(CustomerHour(tenant_id, *customer, event_name, meters, since_us))
    if not found:
        raise RefusedQuestion(
            "customer_unknown", "no such customer is declared, and none of this name was counted", "customer"
        )
    if len(found) > 1:
        raise RefusedQuestion(
            "tenant_ambiguous", "several tenants have such a customer and meter: say which", "tenantId"
        )
    return found[0]


_METERS: LiteralString = """
SELECT tenant_id, event_name FROM meters
WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) AND (meter = %(meter)s OR event_name = %(meter)s)
ORDER BY tenant_id, meter = %(meter)s DESC
"""


def _hour(text: str, now: datetime) -> int:
    try:
        since_us = hour_start(micros(moment(text, now)))
        instant(since_us + HOUR_US)
    except Misconfigured as error:
        raise RefusedQuestion("time_invalid", str(error), "hour") from None
    except OverflowError:
        raise RefusedQuestion("time_invalid", "there is no such hour", "hour") from None
    return since_us


def _meters(db: Connection, tenant_id: str, event_name: str) -> dict[str, MeterRow]:
    rows = db.execute(
        "SELECT meter, aggregation, scale, dimensions, value_property FROM meters "
        "WHERE tenant_id = %s AND event_name = %s ORDER BY meter",
        (tenant_id, event_name),
    ).fetchall()
    return {row[0]: MeterRow(row[0], row[1], row[2], tuple(row[3]), row[4]) for row in rows}


def _customer(
    db: Connection, tenant_id: str, name: str, event_name: str
) -> tuple[tuple[str, ...], str | None] | None:
    """Its references and its Stripe id, by either; None: there is no such customer.

    A name is taken for Stripe's id first: a reference may look like one, and then is its own Stripe id unless
    it is mapped to another.
    """
    values = {"tenant": tenant_id, "name": name, "event": event_name}
    refs = tuple(row[0] for row in db.execute(_BILLED_AS, values).fetchall())
    sent = db.execute(_WAS_SENT, values).fetchone()
    if refs or (sent is not None and sent[0]):
        return refs, name
    row = db.execute(_BY_REFERENCE, values).fetchone()
    if row is None:
        return None
    if row[0] is None:
        return (name,), None
    rows = db.execute(_BILLED_AS, {**values, "name": row[0]}).fetchall()
    return tuple(sorted({name, *(one[0] for one in rows)})), row[0]


_BILLED_AS: LiteralString = """
SELECT customer_ref FROM customers WHERE tenant_id = %(tenant)s AND stripe_customer = %(name)s
UNION
SELECT %(name)s WHERE %(name)s ~ '^cus_[A-Za-z0-9_]+$'
  AND EXISTS (SELECT FROM items WHERE tenant_id = %(tenant)s AND customer_ref = %(name)s)
  AND NOT EXISTS (SELECT FROM customers WHERE (tenant_id, customer_ref) = (%(tenant)s, %(name)s))
ORDER BY 1
"""
#: Of a customer whose mapping has changed since.
_WAS_SENT: LiteralString = """
SELECT EXISTS (SELECT FROM meter_events
               WHERE stripe_customer = %(name)s AND event_name = %(event)s AND state = 'reported'
                 AND tenant_id = %(tenant)s)
"""
_BY_REFERENCE: LiteralString = """
SELECT stripe_customer FROM customers WHERE (tenant_id, customer_ref) = (%(tenant)s, %(name)s)
UNION ALL
SELECT NULL WHERE NOT EXISTS (
    SELECT FROM customers WHERE (tenant_id, customer_ref) = (%(tenant)s, %(name)s))
  AND (EXISTS (SELECT FROM items WHERE tenant_id = %(tenant)s AND customer_ref = %(name)s))
LIMIT 1
"""


# -- What is metered ---------------------------------------------------------------------------------------

#: Those with a bucket of the hour, those that the log says should have one, and those of which something was
#: sent for it.
_ITEM_IDS: LiteralString = """
SELECT i.item_id FROM items i
WHERE i.tenant_id = %(tenant)s AND i.meter = ANY(%(meters)s) AND i.customer_ref = ANY(%(refs)s)
  AND EXISTS (SELECT FROM buckets b WHERE b.item_id = i.item_id AND b.hour_start = %(hour)s)
UNION
SELECT item_id FROM replay_buckets WHERE hour_start = %(hour)s
UNION
SELECT m.item_id FROM meter_events m
WHERE m.stripe_customer = %(customer)s AND m.event_name = %(event)s AND m.hour_start = %(hour)s
  AND m.state = 'reported' AND m.tenant_id = %(tenant)s
UNION
SELECT m.item_id FROM meter_events m
WHERE m.stripe_customer = %(customer)s AND m.event_name = %(event)s AND m.hour_start = %(hour)s
  AND m.state IN ('pending', 'in_flight', 'in_doubt') AND m.tenant_id = %(tenant)s
"""
_ITEMS: LiteralString = """
SELECT i.*, m.aggregation, m.scale, m.dimensions AS names
FROM (SELECT u.item_id, coalesce(i.tenant_id, r.tenant_id) AS tenant_id,
             coalesce(i.customer_ref, r.customer_ref) AS customer_ref, coalesce(i.meter, r.meter) AS meter,
             coalesce(i.dimensions, r.dimensions) AS dimensions, coalesce(i.calendar, r.calendar) AS calendar,
             CASE WHEN isfinite(i.watermark) THEN i.watermark END AS watermark,
             i.dirty_from <= %(hour)s AS waits
      FROM unnest(%(items)s::uuid[]) AS u (item_id)
      LEFT JOIN items i USING (item_id) LEFT JOIN replay_items r USING (item_id)) i
JOIN meters m USING (tenant_id, meter)
ORDER BY i.meter, i.customer_ref, i.dimensions
"""


def find_items(db: Connection, asked: CustomerHour, limit: int) -> Items:
    """The items of the hour, once its events are added up."""
    items = Items()
    wanted = [row[0] for row in db.execute(_ITEM_IDS, asked.values()).fetchall()]
    for row in _rows(db, _ITEMS, {"items": wanted, "hour": asked.hour}):
        items.places[row.item_id] = len(items.ids)
        items.ids.append(row.item_id)
        if len(items.shown) < limit:
            items.shown.append(
                Item(
                    customer_ref=row.customer_ref,
                    meter=row.meter,
                    aggregation=row.aggregation,
                    scale=row.scale,
                    dimensions=dict(zip(row.names, row.dimensions, strict=False)),
                    calendar=row.calendar,
                    watermark=utc_or_none(row.watermark),
                    waits_for_closing=bool(row.waits),
                )
            )
    return items


# -- What was sent -----------------------------------------------------------------------------------------

_INTENTS: LiteralString = """
SELECT m.*, (SELECT s.identifier FROM meter_events s WHERE s.item_id = m.item_id
             AND s.hour_start = m.hour_start AND s.replaces = m.identifier) AS replaced_by
FROM meter_events m WHERE m.item_id = ANY(%(items)s) AND m.hour_start = %(hour)s
ORDER BY m.created_at, m.identifier LIMIT %(limit)s
"""
_DELTAS: LiteralString = """
SELECT d.*, m.identifier IS NOT NULL AS recorded FROM deltas d LEFT JOIN meter_events m USING (identifier)
WHERE d.item_id = ANY(%(items)s) AND d.hour_start = %(hour)s
ORDER BY d.closed_at, d.identifier LIMIT %(limit)s
"""
_CARRIED: LiteralString = """
SELECT c.*, CASE WHEN c.hour_start = %(hour)s THEN 'out' ELSE 'in' END AS direction FROM carry_forwards c
WHERE c.item_id = ANY(%(items)s) AND (c.hour_start = %(hour)s OR c.to_hour = %(hour)s)
ORDER BY c.carry_id LIMIT %(limit)s
"""
_NUMBERS: LiteralString = """
SELECT (SELECT count(*) FROM meter_events WHERE item_id = ANY(%(items)s) AND hour_start = %(hour)s),
       (SELECT count(*) FROM deltas WHERE item_id = ANY(%(items)s) AND hour_start = %(hour)s),
       (SELECT count(*) FROM carry_forwards WHERE item_id = ANY(%(items)s)
        AND (hour_start = %(hour)s OR to_hour = %(hour)s))
"""


@dataclass(frozen=True, slots=True)
class Sent:
    """What was split off, sent and carried; lists of at most the limit, and how many there are."""

    intents: list[Intent]
    deltas: list[Delta]
    carried: list[Carried]
    numbers: tuple[int, int, int]


def find_sent(db: Connection, asked: CustomerHour, items: Items, limit: int) -> Sent:
    """The meter events, deltas and carry-forwards of the items."""
    values = {"items": items.ids, "hour": asked.hour, "limit": limit}
    intents = [
        Intent(
            item=items.places[row.item_id],
            amount=number(row.amount),
            event_at=utc(row.event_at),
            first_sent_at=utc_or_none(row.first_sent_at),
            settled_at=utc_or_none(row.settled_at),
            **{name: getattr(row, name) for name in _INTENT_FIELDS},
        )
        for row in _rows(db, _INTENTS, values)
    ]
    deltas = [
        Delta(
            identifier=row.identifier,
            item=items.places[row.item_id],
            period_start=utc(row.period_start),
            sequence=row.sequence,
            amount=number(row.amount),
            closed_at=utc(row.closed_at),
            recorded=row.recorded,
        )
        for row in _rows(db, _DELTAS, values)
    ]
    carried = [
        Carried(
            direction=row.direction,
            item=items.places[row.item_id],
            hour=utc(row.hour_start),
            period_start=utc(row.period_start),
            to_hour=utc(row.to_hour),
            to_period=utc(row.to_period),
            amount=number(row.amount),
            reason=row.reason,
            carried_at=utc(row.carried_at),
        )
        for row in _rows(db, _CARRIED, values)
    ]
    numbers = db.execute(_NUMBERS, values).fetchone()
    return Sent(intents, deltas, carried, numbers or (0, 0, 0))


_INTENT_FIELDS = (
    *("identifier", "stripe_customer", "event_name", "state", "attempts", "http_status", "error_code"),
    *("request_id", "replaces", "replaced_by", "retried_as"),
)

_BY_STATE: LiteralString = """
SELECT state, count(*), sum(amount) FROM meter_events
WHERE item_id = ANY(%(items)s) AND hour_start = %(hour)s AND stripe_customer = %(customer)s
  AND event_name = %(event)s GROUP BY state ORDER BY state
"""
#: A meter of the formula `last` holds one value: the latest. Of one second, the one that was sent last.
_LATEST: LiteralString = """
SELECT m.amount FROM meter_events m LEFT JOIN deltas d ON d.identifier = coalesce(m.replaces, m.identifier)
WHERE m.item_id = ANY(%(items)s) AND m.hour_start = %(hour)s AND m.stripe_customer = %(customer)s
  AND m.event_name = %(event)s AND m.state = 'reported' AND m.formula = 'last'
ORDER BY m.event_at DESC, d.sequence DESC NULLS LAST LIMIT 1
"""
_OTHERS: LiteralString = """
SELECT count(*), coalesce(sum(amount), 0) FROM meter_events
WHERE stripe_customer = %(customer)s AND event_name = %(event)s AND hour_start = %(hour)s
  AND tenant_id <> %(tenant)s AND state = 'reported'
"""


def find_at_stripe(db: Connection, asked: CustomerHour, items: Items, *, with_others: bool) -> AtStripe:
    """What Stripe should hold, by the states of what was sent to it."""
    values = {**asked.values(), "items": items.ids}
    rows = db.execute(_BY_STATE, values).fetchall()
    by_state = {state: Amount(count, number(amount)) for state, count, amount in rows}
    uncertain = sum((by_state[s].amount for s in ("in_flight", "in_doubt") if s in by_state), ZERO)
    expected = by_state["reported"].amount if "reported" in by_state else ZERO
    if any(meter.aggregation == "last" for meter in asked.meters.values()):
        latest = db.execute(_LATEST, values).fetchone()
        expected = number(latest[0]) if latest else ZERO
    others = None
    if with_others:
        row = db.execute(_OTHERS, values).fetchone()
        others = Amount(row[0], number(row[1])) if row is not None and row[0] else None
    return AtStripe(
        expected=expected,
        uncertain=uncertain,
        by_state=by_state,
        others=others,
        sentence=_at_stripe(asked, expected, by_state, others),
    )


def _at_stripe(
    asked: CustomerHour, expected: Decimal, by_state: Mapping[str, Amount], others: Amount | None
) -> str:
    if asked.stripe_customer is None:
        return "The customer has no Stripe id, so nothing of it is closed or sent."
    rest = [
        f"{plain(by_state[state].amount)} {words}" for state, words in _STATES.items() if state in by_state
    ]
    more = f" Besides, {', '.join(rest)}." if rest else ""
    if others is not None:
        more += f" Other tenants reported {plain(others.amount)} to the same customer, meter and hour."
    return f"Stripe should hold {plain(expected)} for this hour.{more}"


_STATES = {
    "pending": "waits to be sent",
    "in_flight": "is being sent",
    "in_doubt": "is in doubt",
    "failed": "was refused",
    "cancelled": "was cancelled",
}


# -- What counts here and happened elsewhere ---------------------------------------------------------------

_ADJUSTED: LiteralString = """
FROM adjustments WHERE tenant_id = %(tenant)s AND meter = ANY(%(meters)s) AND customer_ref = ANY(%(refs)s)
  AND state = 'applied' AND counted_at >= %(hour)s AND counted_at < %(until)s
  AND NOT (occurred_at >= %(hour)s AND occurred_at < %(until)s)
"""


def find_adjusted(db: Connection, asked: CustomerHour, limit: int) -> tuple[list[Adjusted], int]:
    """Adjustments that count in the hour although they happened in another; at most ``limit``, and how many
    there are."""
    values = {**asked.values(), "limit": limit}
    total = db.execute("SELECT count(*) " + _ADJUSTED, values).fetchone()
    found = [
        Adjusted(
            id=row.adjustment_id.hex,
            quantity=number(row.quantity),
            occurred_at=utc(row.occurred_at),
            counted_at=utc(row.counted_at),
            **{
                name: getattr(row, name)
                for name in ("customer_ref", "meter", "idempotency_key", "topic", "partition", "offset")
            },
        )
        for row in _rows(
            db, "SELECT * " + _ADJUSTED + " ORDER BY counted_at, adjustment_id LIMIT %(limit)s", values
        )
    ]
    return found, 0 if total is None else total[0]


# -- What is shared ----------------------------------------------------------------------------------------


def _rows(db: Connection, statement: LiteralString, values: Mapping[str, Any]) -> Sequence[Any]:
    return db.cursor(row_factory=namedtuple_row).execute(statement, values).fetchall()


def stream(db: Connection, statement: LiteralString, values: Mapping[str, Any]) -> Iterator[Any]:
    """Rows of a question with however many, a few thousand at a time. In a transaction."""
    with db.cursor(name="explaining", row_factory=namedtuple_row) as cursor:
        cursor.itersize = 2000
        yield from cursor.execute(statement, values)


def number(value: Decimal) -> Decimal:
    """Without an exponent, and without trailing zeros."""
    return Decimal(plain(value))


def utc(at: datetime) -> datetime:
    """In UTC, whatever the session's zone is."""
    return at.astimezone(UTC)


def utc_or_none(at: datetime | None) -> datetime | None:
    """The same where there may be none."""
    return None if at is None else at.astimezone(UTC)
