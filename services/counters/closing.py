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
from collections.abc import Collection, Mapping
from typing import LiteralString

from schemas.catalog import current
from services.counters.carrying import Carried, Late, carry_forward, write_carried
from services.counters.changed import (
    ChangedItem,
    ChangedPeriod,
    Connection,
    Periods,
    changed_items,
    changed_periods,
    numerics,
    read_limits,
)
from services.counters.deltas import COPY_DELTAS, DeltaWriter, Invoices
from services.counters.ledger import GROUP
from services.counters.portions import peak_difference, split, unit_of, whole
from services.counters.windows import OLDEST_US
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue, enqueue_packed
from services.wire import topics
from services.wire.codec import Encoder
from services.wire.pgarrays import int8_array, register, timestamp_array, uuid_array
from services.wire.usage import QUANTITY_UNIT


def close_round(
    db: Connection,
    writer: DeltaWriter | None = None,
    *,
    items: Collection[bytes] | None = None,
    invoices: Invoices | None = None,
    now_us: int | None = None,
) -> tuple[int, int]:
    """Close up to 2,000 items, or these, in one transaction; returns how many items and deltas that was."""
    register(db)
    writer = writer or DeltaWriter(Encoder(current("usage_delta")))
    invoices = invoices or Invoices()
    now_us = now_us if now_us is not None else time.time_ns() // 1000
    with db.transaction():
        dirty = changed_items(db, items)
        if not dirty:
            return 0, 0
        periods, waiting = changed_periods(db, dirty)
        read_limits(db, periods, now_us)
        carried = _plan(db, periods, waiting, invoices, now_us)
        _write(db, dirty, periods, waiting)
        deltas = writer.write(list(periods.values()), invoices, now_us)
        if deltas.lines:
            with db.cursor().copy(COPY_DELTAS) as copy:
                copy.write("".join(deltas.lines))
        enqueue_packed(db, GROUP, topics.DELTAS, writer.headers, deltas.records)
        enqueue(db, GROUP, write_carried(db, carried, now_us))
        fault_point("close.before_commit")
    fault_point("close.after_commit")
    closed = {place[0] for place, period in periods.items() if period.hours}
    return len(closed | (dirty.keys() - waiting.keys())), len(deltas.lines)


# -- What is sent ----------------------------------------------------------------------------------------


def _plan(
    db: Connection, periods: Periods, waiting: dict[bytes, int], invoices: Invoices, now_us: int
) -> list[Carried]:
    """Decide what every hour sends; returns what leaves in another period than its own."""
    late: list[Late] = []
    for period in periods.values():
        if period.item.aggregation == "last":
            _plan_values(period, now_us)
            continue
        final = period.item.calendar.anchored and now_us >= invoices.push_before(period.end, period.final)
        gone: dict[int, int] = {}
        for hour_us, difference in _differences(db, period):
            too_late = final or hour_us < now_us - OLDEST_US
            (gone if too_late else period.differences)[hour_us] = difference
        _cover_deficit(period, gone)
        if any(gone.values()):
            late.append(Late(period, gone, "period_closed" if final else "too_old_for_stripe"))
    carried = carry_forward(db, periods, waiting, late, now_us)
    for period in periods.values():
        item = period.item
        if item.aggregation == "last":
            continue
        signed = not item.nets
        period.carry += sum(period.kept.values())  # nothing leaves in these hours
        portions, period.carry = split(
            sorted(period.differences.items()), period.carry, unit_of(item.scale), signed=signed
        )
        for portion in portions:
            hour = period.hours[portion.hour]
            hour.sent, hour.amount = True, portion.amount
    return carried


def _cover_deficit(period: ChangedPeriod, gone: dict[int, int]) -> None:
    """Keep of ``gone`` what the period owes: what it has sent too much is not to be sent again elsewhere."""
    deficit = -(period.carry + sum(period.differences.values()))
    left = min(deficit, sum(gone.values())) if period.item.nets else 0
    for hour, difference in gone.items():
        kept = min(left, difference)
        if kept > 0:
            gone[hour] -= kept
            period.kept[hour] = kept
            left -= kept


def _plan_values(period: ChangedPeriod, now_us: int) -> None:
    """Each hour of a ``last`` meter sends its value, unless Stripe has it or takes it no more."""
    unit = unit_of(period.item.scale)
    for hour in period.hours.values():
        hour.amount = whole(hour.total, unit)
        hour.sent = hour.start >= now_us - OLDEST_US and (hour.closed is None or hour.amount != hour.pushed)


def _differences(db: Connection, period: ChangedPeriod) -> list[tuple[int, int]]:
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


# -- What is written -------------------------------------------------------------------------------------


def _write(
    db: Connection,
    dirty: Mapping[bytes, tuple[ChangedItem, int]],
    periods: Periods,
    waiting: Mapping[bytes, int],
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
                numerics(hour.difference for _, _, hour in hours),
                numerics(changes),
                int8_array([hour.sent for _, _, hour in hours]),
            ),
        )
        db.execute(
            _KEEP_PERIODS,
            (
                uuid_array([place[0] for place, _ in kept]),
                timestamp_array([place[1] for place, _ in kept]),
                timestamp_array([period.end for _, period in kept]),
                numerics(period.carry for _, period in kept),
                numerics(period.value for _, period in kept),
            ),
        )


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
