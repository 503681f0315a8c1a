"""Close what items have counted, but not yet pushed, into deltas.

A round takes items with changed hours, splits what changed into portions (``portions``, pure), and writes
deltas, carries and the outbox in one transaction. An hour whose delta is not settled yet is *open* and waits
for a later round, so at most one delta of it is under way and an answer in doubt can be settled against
Stripe's own total; other hours of the item go on.

What comes too late for its own invoice, or for Stripe, is carried forward: it leaves in the hour and period
that are open now, and a row of ``carry_forwards`` says so. ``last`` meters send each hour's value as it is;
theirs is never carried, for an old value says nothing about a later period.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, LiteralString
from uuid import UUID

import msgspec
import psycopg

from schemas.catalog import current
from services.counters.ledger import GROUP
from services.counters.periods import Calendar, hour_start
from services.counters.portions import peak_difference, split, unit_of, whole
from services.counters.windows import OLDEST_US
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.wire import topics
from services.wire.codec import Encoder
from services.wire.pgarrays import int8_array, register, timestamp_array, timestamp_of, uuid_array
from services.wire.records import OutboxRow, ops_event
from services.wire.times import instant
from services.wire.usage import QUANTITY_SCALE, QUANTITY_UNIT

ITEMS_PER_ROUND = 2000

Connection = psycopg.Connection[Any]

_encode_json = msgspec.json.Encoder().encode
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Invoices:
    """When an invoice takes no more usage, in microseconds.

    Stripe finalises an invoice about an hour after the period ended, unless the account says otherwise
    (docs.stripe.com/billing/subscriptions/usage-based/configure-grace-period). A push that begins less than
    the margin before that may come too late.
    """

    grace_us: int = 3600 * _SECOND_US
    margin_us: int = 300 * _SECOND_US

    def push_before(self, period_end_us: int) -> int:
        """The last safe moment to begin a push for a period."""
        return period_end_us + max(0, self.grace_us - self.margin_us)


def delta_identifier(item_id: bytes, period_us: int, hour_us: int, sequence: int) -> str:
    """32 characters, the same for ever: base32 of a 160-bit BLAKE2b over item, period, hour and sequence."""
    name = _uuid_text(item_id)
    text = f'["{name}", {period_us}, {hour_us}, {sequence}]'
    digest = int.from_bytes(blake2b(text.encode(), digest_size=20).digest(), "big")
    return "".join([_BASE32_PAIRS[digest >> shift & 1023] for shift in range(150, -1, -10)])


#: Every two digits of base32 (RFC 4648, section 6) in lower case, by their ten bits: three times the speed of
#: base64.b32encode, and one is made for every delta.
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32_PAIRS = [first + second for first in _BASE32 for second in _BASE32]


@lru_cache(maxsize=4096)
def _uuid_text(item_id: bytes) -> str:
    return str(UUID(bytes=item_id))


@lru_cache(maxsize=4096)
def _time_text(at_us: int) -> str:
    return instant(at_us).isoformat()


@lru_cache(maxsize=4096)
def _time_of(sent: bytes) -> int:
    return timestamp_of(sent)


@dataclass(slots=True)
class _Item:
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
class _Hour:
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
class _Period:
    """What changed in one period of an item, with the state that closing keeps of it."""

    item: _Item
    start: int
    end: int
    hours: dict[int, _Hour] = field(default_factory=dict)
    carry: int = 0
    value: int = 0
    differences: dict[int, int] = field(default_factory=dict)  # by hour


#: By (item id, period start).
_Periods = dict[tuple[bytes, int], _Period]


@dataclass(frozen=True, slots=True)
class _Carried:
    """An amount that leaves in another period than its own."""

    period: _Period
    from_hour: int
    to_period: int
    to_hour: int
    amount: int
    reason: str


#: A customer without a mapping is its own Stripe customer when its reference is a Stripe id.
_DIRTY_ITEMS: LiteralString = """
SELECT uuid_send(i.item_id), i.tenant_id, i.customer_ref, i.meter, m.aggregation, m.scale, m.allow_negative,
       m.event_name, m.customer_payload_key, m.value_payload_key, coalesce(c.stripe_customer, i.customer_ref),
       m.dimensions, i.dimensions, i.calendar, timestamptz_send(i.dirty_from)
FROM items i
JOIN meters m USING (tenant_id, meter)
LEFT JOIN customers c USING (tenant_id, customer_ref)
WHERE i.dirty_from IS NOT NULL
  AND (c.stripe_customer IS NOT NULL OR i.customer_ref ~ '^cus_[A-Za-z0-9_]+$')
  AND coalesce((SELECT bool_or(NOT b.open) FROM buckets b WHERE b.item_id = i.item_id
                AND b.hour_start >= i.dirty_from AND b.closed IS DISTINCT FROM b.total), true)
LIMIT %s
FOR UPDATE OF i SKIP LOCKED
"""

_CHANGED: LiteralString = """
SELECT uuid_send(b.item_id), timestamptz_send(b.period_start), timestamptz_send(b.hour_start),
       trunc(b.total * 1000000000)::text, trunc(b.closed * 1000000000)::text,
       trunc(b.pushed * 1000000000)::text, b.sequence, timestamptz_send(b.last_event), b.open
FROM unnest(%s, %s) AS u (i, h) JOIN buckets b ON b.item_id = u.i AND b.hour_start >= u.h
WHERE b.closed IS DISTINCT FROM b.total
ORDER BY b.item_id, b.hour_start, b.period_start
FOR UPDATE OF b
"""

_KEPT: LiteralString = """
SELECT uuid_send(p.item_id), timestamptz_send(p.period_start), trunc(p.carry * 1000000000)::text,
       trunc(p.value * 1000000000)::text
FROM unnest(%s, %s) AS u (i, p) JOIN item_periods p ON (p.item_id, p.period_start) = (u.i, u.p)
"""


def close_round(
    db: Connection,
    encoder: Encoder | None = None,
    *,
    invoices: Invoices | None = None,
    now_us: int | None = None,
) -> tuple[int, int]:
    """Close up to 2,000 items in one transaction; returns how many items and deltas that was."""
    register(db)
    encoder = encoder or Encoder(current("usage_delta"))
    invoices = invoices or Invoices()
    now_us = now_us if now_us is not None else time.time_ns() // 1000
    with db.transaction():
        rows = db.execute(_DIRTY_ITEMS, (ITEMS_PER_ROUND,), binary=True).fetchall()
        if not rows:
            return 0, 0
        dirty = {bytes(row[0]): (_item_of(row), timestamp_of(row[14])) for row in rows}
        periods, waiting = _changed_periods(db, dirty)
        carried = _plan(db, periods, waiting, invoices, now_us)
        deltas = [
            _delta(period, hour, invoices, now_us)
            for period in periods.values()
            for hour in period.hours.values()
            if hour.sent
        ]
        _write(db, dirty, periods, waiting, deltas)
        enqueue(
            db, GROUP, [_delta_row(encoder, delta) for delta in deltas] + _write_carried(db, carried, now_us)
        )
        fault_point("close.before_commit")
    fault_point("close.after_commit")
    closed = {place[0] for place, period in periods.items() if period.hours}
    return len(closed | (dirty.keys() - waiting.keys())), len(deltas)


def _item_of(row: tuple[Any, ...]) -> _Item:
    names, values, calendar = row[11], row[12], row[13]
    dimensions = dict(zip(names, values, strict=True))
    tenant_id, customer_ref, meter, aggregation, scale, signed, *stripe = row[1:11]
    event_name, customer_key, value_key, stripe_customer = stripe
    return _Item(
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


def _changed_periods(
    db: Connection, dirty: Mapping[bytes, tuple[_Item, int]]
) -> tuple[_Periods, dict[bytes, int]]:
    """Lock the hours that changed. Returns those that can be closed, by period, with what closing kept of
    it; and for each item the earliest hour that has to wait."""
    rows = db.execute(
        _CHANGED,
        (uuid_array(list(dirty)), timestamp_array([since for _, since in dirty.values()])),
        binary=True,
    ).fetchall()
    periods: _Periods = {}
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
            period = periods[place] = _Period(item, place[1], item.calendar.period_end(place[1]))
        period.hours[hour_us] = _Hour(
            hour_us, int(total), was, int(pushed), sequence, timestamp_of(last_event), is_open
        )
    _read_kept(db, periods)
    return periods, waiting


def _read_kept(db: Connection, periods: _Periods) -> None:
    rows = db.execute(
        _KEPT,
        (uuid_array([place[0] for place in periods]), timestamp_array([place[1] for place in periods])),
        binary=True,
    ).fetchall()
    for item_id, period_start, carry, value in rows:
        period = periods[bytes(item_id), timestamp_of(period_start)]
        period.carry, period.value = int(carry), int(value)


# -- What is sent ----------------------------------------------------------------------------------------


def _plan(
    db: Connection, periods: _Periods, waiting: dict[bytes, int], invoices: Invoices, now_us: int
) -> list[_Carried]:
    """Decide what every hour sends; returns what leaves in another period than its own."""
    late: list[tuple[_Period, list[tuple[int, int]], str]] = []
    for period in periods.values():
        if period.item.aggregation == "last":
            _plan_values(period, now_us)
            continue
        differences = _differences(db, period)
        final = period.item.calendar.anchored and now_us >= invoices.push_before(period.end)
        oldest = now_us - OLDEST_US
        gone = [one for one in differences if final or one[0] < oldest]
        if gone:
            late.append((period, gone, "period_closed" if final else "too_old_for_stripe"))
        period.differences = {} if final else {hour: d for hour, d in differences if hour >= oldest}
    carried = _carry_forward(db, periods, waiting, late, now_us) if late else []
    for period in periods.values():
        item = period.item
        if item.aggregation == "last":
            continue
        signed = not item.nets
        portions, period.carry = split(
            sorted(period.differences.items()), period.carry, unit_of(item.scale), signed=signed
        )
        for portion in portions:
            hour = period.hours[portion.hour]
            if hour.open:
                period.carry += portion.amount
            else:
                hour.sent, hour.amount = True, portion.amount
    return carried


def _plan_values(period: _Period, now_us: int) -> None:
    """Each hour of a ``last`` meter sends its value, unless Stripe has it or takes it no more."""
    unit = unit_of(period.item.scale)
    for hour in period.hours.values():
        hour.amount = whole(hour.total, unit)
        hour.sent = hour.start >= now_us - OLDEST_US and (hour.closed is None or hour.amount != hour.pushed)


def _differences(db: Connection, period: _Period) -> list[tuple[int, int]]:
    """The exact changes of a period since it was closed last, by ascending hour."""
    hours = list(period.hours.values())
    if period.item.aggregation != "max":
        return [(hour.start, hour.difference) for hour in hours]
    before, peak = period.value, max(period.value, *(hour.total for hour in hours))
    # Only a correction lowers an hour, or has it closed anew; then what was kept may be the peak no longer.
    if any(hour.closed is None or hour.total < hour.closed for hour in hours):
        row = db.execute(
            _PEAK,
            (QUANTITY_UNIT, uuid_array([period.item.item_id]), timestamp_array([period.start])),
            binary=True,
        ).fetchone()
        peak = int(row[0]) if row else peak
    period.value = peak
    return peak_difference([(hour.start, hour.total) for hour in hours], before, peak)


_PEAK: LiteralString = (
    "SELECT trunc(max(total) * %s)::text FROM buckets, unnest(%s, %s) AS u (i, p) "
    "WHERE (item_id, period_start) = (u.i, u.p)"
)


def _carry_forward(
    db: Connection,
    periods: _Periods,
    waiting: dict[bytes, int],
    late: Sequence[tuple[_Period, list[tuple[int, int]], str]],
    now_us: int,
) -> list[_Carried]:
    """Move late differences to the hour that is open now; those whose hour still has a delta open wait."""
    targets = _targets(db, periods, [period for period, _, _ in late], now_us)
    carried = []
    for period, gone, reason in late:
        amount = sum(difference for _, difference in gone)
        item_id = period.item.item_id
        target, hour = targets[item_id]
        if amount and hour.open:
            if period.item.aggregation == "max":
                period.value -= amount
                period.hours.clear()
            for start, _ in gone:
                period.hours.pop(start, None)
            waiting[item_id] = min(waiting.get(item_id, gone[0][0]), gone[0][0])
            continue
        if amount:
            target.hours.setdefault(hour.start, hour)
            target.differences[hour.start] = target.differences.get(hour.start, 0) + amount
        # One for each hour: a change of calendar may part them later.
        carried += [
            _Carried(period, start, target.start, hour.start, difference, reason)
            for start, difference in gone
            if difference
        ]
    return carried


def _targets(
    db: Connection, periods: _Periods, late: Sequence[_Period], now_us: int
) -> dict[bytes, tuple[_Period, _Hour]]:
    """For each item the period and the hour that are open now; their rows are made where missing."""
    hour_us = hour_start(now_us)
    items = {period.item.item_id: period.item for period in late}
    bounds = {item_id: item.calendar.bounds(now_us) for item_id, item in items.items()}
    missing: _Periods = {}
    for item_id, (start, end) in bounds.items():
        if (item_id, start) not in periods:
            missing[item_id, start] = _Period(items[item_id], start, end)
    _read_kept(db, missing)
    periods.update(missing)
    ids = sorted(bounds)
    places = (
        uuid_array(ids),
        timestamp_array([hour_us] * len(ids)),
        timestamp_array([bounds[item_id][0] for item_id in ids]),
    )
    db.execute(_EMPTY_HOURS, (*places, *(timestamp_array([now_us]) for _ in range(2))))
    rows = db.execute(_HOURS, places, binary=True).fetchall()
    found = {}
    for raw_id, pushed, sequence, is_open in rows:
        item_id = bytes(raw_id)
        period = periods[item_id, bounds[item_id][0]]
        hour = period.hours.get(hour_us) or _Hour(hour_us, 0, 0, int(pushed), sequence, hour_us, is_open)
        found[item_id] = period, hour
    return found


#: An hour without events: its times are the ends of it, so that the first event sets both.
_EMPTY_HOURS: LiteralString = """
INSERT INTO buckets (item_id, hour_start, period_start, total, events, late_events, first_event, last_event,
                     first_arrival, last_arrival)
SELECT u.i, u.h, u.p, 0, 0, 0, u.h + interval '1 hour' - interval '1 microsecond', u.h, a.f, a.l
FROM unnest(%s, %s, %s) AS u (i, h, p), unnest(%s, %s) AS a (f, l) ON CONFLICT DO NOTHING
"""

_HOURS: LiteralString = """
SELECT uuid_send(b.item_id), trunc(b.pushed * 1000000000)::text, b.sequence, b.open
FROM unnest(%s, %s, %s) AS u (i, h, p)
JOIN buckets b ON (b.item_id, b.hour_start, b.period_start) = (u.i, u.h, u.p)
ORDER BY b.item_id FOR UPDATE OF b
"""


# -- What is written -------------------------------------------------------------------------------------


def _write(
    db: Connection,
    dirty: Mapping[bytes, tuple[_Item, int]],
    periods: _Periods,
    waiting: Mapping[bytes, int],
    deltas: Sequence[_Delta],
) -> None:
    hours = sorted(
        ((period.item.item_id, hour.start, period.start), period, hour)
        for period in periods.values()
        for hour in period.hours.values()
    )
    kept = sorted((place, period) for place, period in periods.items() if period.hours)
    changes = [
        hour.amount - (hour.pushed if period.item.aggregation == "last" else 0) if hour.sent else 0
        for _, period, hour in hours
    ]
    ids = sorted(dirty)
    wait_ids = sorted(waiting)
    with db.pipeline():
        db.execute("UPDATE items SET dirty_from = NULL WHERE item_id = ANY(%s)", (uuid_array(ids),))
        if wait_ids:
            db.execute(
                "UPDATE items SET dirty_from = u.h FROM unnest(%s, %s) AS u (i, h) WHERE item_id = u.i",
                (uuid_array(wait_ids), timestamp_array([waiting[item_id] for item_id in wait_ids])),
            )
        db.execute(
            _CLOSE_HOURS,
            (
                uuid_array([place[0] for place, _, _ in hours]),
                timestamp_array([place[1] for place, _, _ in hours]),
                timestamp_array([place[2] for place, _, _ in hours]),
                _numerics(hour.difference for _, _, hour in hours),
                _numerics(changes),
                int8_array([hour.sent for _, _, hour in hours]),
            ),
        )
        db.execute(
            _KEEP_PERIODS,
            (
                uuid_array([place[0] for place, _ in kept]),
                timestamp_array([place[1] for place, _ in kept]),
                timestamp_array([period.end for _, period in kept]),
                _numerics(period.carry for _, period in kept),
                _numerics(period.value for _, period in kept),
            ),
        )
    if deltas:
        with db.cursor().copy(_COPY_DELTAS) as copy:
            copy.write("".join([delta.copy_line() for delta in deltas]))


_CLOSE_HOURS: LiteralString = """
UPDATE buckets b SET closed = coalesce(b.closed, 0) + u.d * 0.000000001,
    pushed = b.pushed + u.a * 0.000000001, sequence = b.sequence + u.s::int, open = b.open OR u.s = 1
FROM unnest(%s, %s, %s, %s::numeric[], %s::numeric[], %s) AS u (i, h, p, d, a, s)
WHERE (b.item_id, b.hour_start, b.period_start) = (u.i, u.h, u.p)
"""

_KEEP_PERIODS: LiteralString = """
INSERT INTO item_periods (item_id, period_start, period_end, carry, value)
SELECT u.i, u.p, u.e, u.c * 0.000000001, u.v * 0.000000001
FROM unnest(%s, %s, %s, %s::numeric[], %s::numeric[]) AS u (i, p, e, c, v)
ON CONFLICT (item_id, period_start) DO UPDATE SET carry = excluded.carry, value = excluded.value
"""

_COPY_DELTAS: LiteralString = (
    "COPY deltas (identifier, item_id, period_start, hour_start, sequence, amount, closed_at) FROM STDIN"
)


def _numerics(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


@dataclass(frozen=True, slots=True)
class _Delta:
    identifier: str
    period: _Period
    hour: int
    sequence: int
    amount: int
    event_at: int
    push_before: int | None
    closed_at: int

    def copy_line(self) -> str:
        """The row of ``deltas``, in PostgreSQL's COPY text format."""
        period = self.period
        return (
            f"{self.identifier}\t{_uuid_text(period.item.item_id)}\t{_time_text(period.start)}\t"
            f"{_time_text(self.hour)}\t{self.sequence}\t{self.amount}e-{QUANTITY_SCALE}\t"
            f"{_time_text(self.closed_at)}\n"
        )


def _delta(period: _Period, hour: _Hour, invoices: Invoices, now_us: int) -> _Delta:
    item, sequence = period.item, hour.sequence + 1
    is_last = item.aggregation == "last"
    # Never outside of bucket and period; what is last carries the second of its event.
    event_at = hour.last_event - hour.last_event % _SECOND_US if is_last else max(hour.start, period.start)
    invoiced = item.calendar.anchored and not is_last
    return _Delta(
        identifier=delta_identifier(item.item_id, period.start, hour.start, sequence),
        period=period,
        hour=hour.start,
        sequence=sequence,
        amount=hour.amount,
        event_at=event_at,
        push_before=invoices.push_before(period.end) if invoiced else None,
        closed_at=now_us,
    )


def _delta_row(encoder: Encoder, delta: _Delta) -> OutboxRow:
    period, item = delta.period, delta.period.item
    value = encoder.encode(
        {
            "identifier": delta.identifier,
            "item_id": item.item_id,
            "tenant_id": item.tenant_id,
            "customer_ref": item.customer_ref,
            "meter": item.meter,
            "stripe_customer": item.stripe_customer,
            "event_name": item.event_name,
            "customer_payload_key": item.customer_payload_key,
            "value_payload_key": item.value_payload_key,
            "period_start": period.start,
            "period_end": period.end,
            "hour_start": delta.hour,
            "event_at": delta.event_at,
            "sequence": delta.sequence,
            "amount": delta.amount.to_bytes(16, "big", signed=True),
            "closed_at": delta.closed_at,
            "dimensions": item.dimensions,
            "formula": "last" if item.aggregation == "last" else "sum",
            "push_before": delta.push_before,
        }
    )
    key = _encode_json((item.stripe_customer, item.event_name))
    return OutboxRow(topics.DELTAS, key, value, encoder.header_texts)


def _write_carried(db: Connection, carried: Sequence[_Carried], now_us: int) -> list[OutboxRow]:
    """Keep what was carried forward, and return an ops event for each."""
    if not carried:
        return []
    db.execute(
        "INSERT INTO carry_forwards (item_id, period_start, hour_start, to_period, to_hour, amount, reason) "
        "SELECT u.i, u.p, u.h, u.tp, u.th, u.a * 0.000000001, u.r "
        "FROM unnest(%s, %s, %s, %s, %s, %s::numeric[], %s::text[]) AS u (i, p, h, tp, th, a, r)",
        (
            uuid_array([one.period.item.item_id for one in carried]),
            timestamp_array([one.period.start for one in carried]),
            timestamp_array([one.from_hour for one in carried]),
            timestamp_array([one.to_period for one in carried]),
            timestamp_array([one.to_hour for one in carried]),
            _numerics(one.amount for one in carried),
            [one.reason for one in carried],
        ),
    )
    return [
        ops_event(
            "usage_carried_forward",
            subject_type="item_period",
            subject_id=f"{one.period.item.item_id.hex()}/{one.period.start}/{now_us}",
            source="counters",
            at_us=now_us,
            attributes={
                "reason": one.reason,
                "tenant": one.period.item.tenant_id,
                "meter": one.period.item.meter,
            },
        )
        for one in {(id(one.period), one.reason): one for one in carried}.values()
    ]
