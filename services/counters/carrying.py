"""Carry forward: what is too late for its own invoice, or for Stripe, leaves in the hour that is open now.

The bucket keeps the usage where it happened; only the push goes elsewhere, and a row of ``carry_forwards``
for each hour says so. While the open hour has a delta under way, the late difference waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from services.counters.changed import ChangedHour, ChangedPeriod, Connection, Periods, numerics, read_kept
from services.wire.periods import hour_start
from services.wire.pgarrays import timestamp_array, uuid_array
from services.wire.records import OutboxRow, ops_event


@dataclass(frozen=True, slots=True)
class Late:
    """Exact differences of a period, by hour, in billionths, that cannot leave in it."""

    period: ChangedPeriod
    differences: dict[int, int]
    reason: str

    @property
    def amount(self) -> int:
        return sum(self.differences.values())


@dataclass(frozen=True, slots=True)
class Carried:
    """An amount that leaves in another period than its own."""

    period: ChangedPeriod
    from_hour: int
    to_period: int
    to_hour: int
    amount: int
    reason: str


def carry_forward(
    db: Connection,
    periods: Periods,
    waiting: dict[bytes, int],
    late: Sequence[Late],
    now_us: int,
) -> list[Carried]:
    """Move late differences to the hour that is open now; those whose hour still has a delta open wait."""
    if not late:
        return []
    targets = _targets(db, periods, [one.period for one in late], now_us)
    carried = []
    for one in late:
        period, gone, amount = one.period, one.differences, one.amount
        item_id = period.item.item_id
        target, hour = targets[item_id]
        if amount and hour.open:
            first = min(period.hours)
            _put_back(period, gone)
            waiting[item_id] = min(waiting.get(item_id, first), first)
            continue
        if amount:
            target.hours.setdefault(hour.start, hour)
            target.differences[hour.start] = target.differences.get(hour.start, 0) + amount
        # One for each hour: a change of calendar may part them later.
        carried += [
            Carried(period, start, target.start, hour.start, difference, one.reason)
            for start, difference in gone.items()
            if difference
        ]
    return carried


def _put_back(period: ChangedPeriod, gone: Mapping[int, int]) -> None:
    """Leave these differences, and what was kept of them for a deficit, to a later round."""
    if period.item.aggregation == "max":  # one difference speaks for all hours
        period.value -= sum(gone.values()) + sum(period.kept.values())
        period.hours.clear()
        period.differences.clear()
    for start in gone:
        period.hours.pop(start, None)
    period.kept.clear()


def _targets(
    db: Connection, periods: Periods, late: Sequence[ChangedPeriod], now_us: int
) -> dict[bytes, tuple[ChangedPeriod, ChangedHour]]:
    """For each item the period and the hour that are open now; their rows are made where missing."""
    hour_us = hour_start(now_us)
    items = {period.item.item_id: period.item for period in late}
    bounds = {item_id: item.calendar.bounds(now_us) for item_id, item in items.items()}
    missing: Periods = {}
    for item_id, (start, end) in bounds.items():
        if (item_id, start) not in periods:
            missing[item_id, start] = ChangedPeriod(items[item_id], start, end)
    read_kept(db, missing)
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
        hour = period.hours.get(hour_us) or ChangedHour(
            hour_us, 0, 0, int(pushed), sequence, hour_us, is_open
        )
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


def write_carried(db: Connection, carried: Sequence[Carried], now_us: int) -> list[OutboxRow]:
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
            numerics(one.amount for one in carried),
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
