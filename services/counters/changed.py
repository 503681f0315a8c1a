"""What a round of closing finds changed: items, their hours and periods, with what closing kept of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, LiteralString

import psycopg

from services.wire.periods import Calendar
from services.wire.pgarrays import int8_array, timestamp_array, timestamp_of, uuid_array

ITEMS_PER_ROUND = 2000

Connection = psycopg.Connection[Any]


@dataclass(slots=True)
class ChangedItem:
    """A dirty item whose meter and Stripe customer are known."""

    item_id: bytes
    tenant_id: str
    customer_ref: str
    meter: str
    aggregation: str
    scale: int
    allow_negative: bool
    event_name: str
    customer_payload_key: str
    value_payload_key: str
    stripe_customer: str
    dimensions: dict[str, str]
    calendar: Calendar

    @property
    def nets(self) -> bool:
        """Whether hours that fell are taken out of hours that rose, because no push may be negative."""
        return self.aggregation in ("max", "unique") or not (
            self.allow_negative or self.aggregation == "last"
        )


@dataclass(slots=True)
class ChangedHour:
    """A bucket that can be closed. Amounts in billionths, times in microseconds."""

    start: int
    total: int
    closed: int | None
    pushed: int
    sequence: int
    last_event: int
    open: bool = False
    amount: int = 0  # what is sent of it, if ``sent``
    sent: bool = False

    @property
    def difference(self) -> int:
        return self.total - (self.closed or 0)


@dataclass(slots=True)
class ChangedPeriod:
    """What changed in one period of an item, with the state that closing keeps of it."""

    item: ChangedItem
    start: int
    end: int
    final: int | None = None  # when its invoice is final, if Stripe told
    hours: dict[int, ChangedHour] = field(default_factory=dict)
    carry: int = 0
    value: int = 0
    differences: dict[int, int] = field(default_factory=dict)  # by hour
    #: By hour that is too late: what makes up for a deficit.
    kept: dict[int, int] = field(default_factory=dict)


#: By (item id, period start).
Periods = dict[tuple[bytes, int], ChangedPeriod]


#: A customer without a mapping is its own Stripe customer when its reference is a Stripe id.
_DIRTY: LiteralString = """
SELECT uuid_send(i.item_id), i.tenant_id, i.customer_ref, i.meter, m.aggregation, m.scale, m.allow_negative,
       m.event_name, m.customer_payload_key, m.value_payload_key, coalesce(c.stripe_customer, i.customer_ref),
       m.dimensions, i.dimensions, i.calendar, timestamptz_send(i.dirty_from)
FROM items i
JOIN meters m USING (tenant_id, meter)
LEFT JOIN customers c USING (tenant_id, customer_ref)
WHERE i.dirty_from IS NOT NULL
  AND (c.stripe_customer IS NOT NULL OR i.customer_ref ~ '^cus_[A-Za-z0-9_]+$')
"""
_CLOSABLE: LiteralString = """
  AND coalesce((SELECT bool_or(NOT b.open) FROM buckets b WHERE b.item_id = i.item_id
                AND b.hour_start >= i.dirty_from AND b.closed IS DISTINCT FROM b.total), true)
LIMIT %s
"""
_UNLOCKED: LiteralString = " FOR UPDATE OF i SKIP LOCKED"
_ANY_ITEMS: LiteralString = _DIRTY + _CLOSABLE + _UNLOCKED
_THESE_ITEMS: LiteralString = _DIRTY + " AND i.item_id = ANY(%s)" + _UNLOCKED

#: Whoever changes what a bucket holds has its item locked. The pusher alone does without, when it settles a
#: delta, and all it does is to take ``open`` away. So with the items locked these rows need no lock as well.
_CHANGED: LiteralString = """
SELECT uuid_send(b.item_id), timestamptz_send(b.period_start), timestamptz_send(b.hour_start),
       trunc(b.total * 1000000000)::text, trunc(b.closed * 1000000000)::text,
       trunc(b.pushed * 1000000000)::text, b.sequence, timestamptz_send(b.last_event), b.open
FROM unnest(%s, %s) AS u (i, h) JOIN buckets b ON b.item_id = u.i AND b.hour_start >= u.h
WHERE b.closed IS DISTINCT FROM b.total
ORDER BY b.item_id, b.hour_start, b.period_start
"""

_KEPT: LiteralString = """
SELECT uuid_send(p.item_id), timestamptz_send(p.period_start), trunc(p.carry * 1000000000)::text,
       trunc(p.value * 1000000000)::text
FROM unnest(%s, %s) AS u (i, p) JOIN item_periods p ON (p.item_id, p.period_start) = (u.i, u.p)
"""


def changed_items(
    db: Connection, items: Collection[bytes] | None = None
) -> dict[bytes, tuple[ChangedItem, int]]:
    """Lock changed items that nobody else has locked: those of ``items``, or else up to 2,000 of all with
    hours that can be closed, or whose hours did not change in the end. Returns each with the earliest hour to
    look at."""
    if items is None:
        rows = db.execute(_ANY_ITEMS, (ITEMS_PER_ROUND,), binary=True).fetchall()
    else:
        rows = db.execute(_THESE_ITEMS, (uuid_array(sorted(items)),), binary=True).fetchall()
    return {bytes(row[0]): (_item_of(row), timestamp_of(row[14])) for row in rows}


def _item_of(row: tuple[Any, ...]) -> ChangedItem:
    names, values, calendar = row[11], row[12], row[13]
    dimensions = dict(zip(names, values, strict=True))
    tenant_id, customer_ref, meter, aggregation, scale, signed, *stripe = row[1:11]
    event_name, customer_key, value_key, stripe_customer = stripe
    return ChangedItem(
        item_id=bytes(row[0]),
        tenant_id=tenant_id,
        customer_ref=customer_ref,
        meter=meter,
        aggregation=aggregation,
        scale=scale,
        allow_negative=signed,
        event_name=event_name,
        customer_payload_key=customer_key,
        value_payload_key=value_key,
        stripe_customer=stripe_customer,
        dimensions=dimensions,
        calendar=Calendar.parse(calendar),
    )


def changed_periods(
    db: Connection, dirty: Mapping[bytes, tuple[ChangedItem, int]]
) -> tuple[Periods, dict[bytes, int]]:
    """The hours of locked items that changed. Returns those that can be closed, by period, with what closing
    kept of it; and for each item the earliest hour that has to wait."""
    rows = db.execute(
        _CHANGED,
        (uuid_array(list(dirty)), timestamp_array([since for _, since in dirty.values()])),
        binary=True,
    ).fetchall()
    periods: Periods = {}
    waiting: dict[bytes, int] = {}
    for raw_id, period_start, hour, total, closed, pushed, sequence, last_event, is_open in rows:
        item_id, hour_us = bytes(raw_id), _time_of(hour)
        item = dirty[item_id][0]
        was = None if closed is None else int(closed)
        if is_open and not (item.nets and was is not None and int(total) < was):
            waiting.setdefault(item_id, hour_us)  # rows come in the order of hours
            continue
        place = item_id, _time_of(period_start)
        period = periods.get(place)
        if period is None:
            period = periods[place] = ChangedPeriod(item, place[1], item.calendar.period_end(place[1]))
        period.hours[hour_us] = ChangedHour(
            hour_us, int(total), was, int(pushed), sequence, timestamp_of(last_event), is_open
        )
    read_kept(db, periods)
    return periods, waiting


#: A question for each period, for a join would put the limits of all customers together first.
_LIMITS: LiteralString = """
SELECT u.n, timestamptz_send((SELECT l.final_at FROM invoice_limits l
                              WHERE (l.stripe_customer, l.period_end) = (u.c, u.e)))
FROM unnest(%s::text[], %s, %s) AS u (c, e, n)
"""


def read_limits(db: Connection, periods: Periods, now_us: int) -> None:
    """What Stripe told of the invoices of periods that are over. It makes none before."""
    over = [period for period in periods.values() if period.item.calendar.anchored and period.end <= now_us]
    if not over:
        return
    rows = db.execute(
        _LIMITS,
        (
            [period.item.stripe_customer for period in over],
            timestamp_array([period.end for period in over]),
            int8_array(range(len(over))),
        ),
        binary=True,
    ).fetchall()
    for number, final_at in rows:
        over[number].final = None if final_at is None else timestamp_of(final_at)


def read_kept(db: Connection, periods: Periods) -> None:
    rows = db.execute(
        _KEPT,
        (uuid_array([place[0] for place in periods]), timestamp_array([place[1] for place in periods])),
        binary=True,
    ).fetchall()
    for item_id, period_start, carry, value in rows:
        period = periods[bytes(item_id), timestamp_of(period_start)]
        period.carry, period.value = int(carry), int(value)


@lru_cache(maxsize=4096)
def _time_of(sent: bytes) -> int:
    return timestamp_of(sent)


def numerics(values: Iterable[int]) -> str:
    """Integers as the text of a numeric array."""
    return "{" + ",".join(map(str, values)) + "}"
