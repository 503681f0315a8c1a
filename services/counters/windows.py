"""The lateness decision, and what an event does to the hours of its item. Pure.

Every hour ends up with its own aggregate, whatever order its events came in: sums and counts add up, the
greatest value wins, and the last is the greatest by (``occurred_at``, idempotency key), which is a total
order. Distinct values are gathered here and counted against those of the period in ``buckets``.
"""

from __future__ import annotations

from enum import Enum

from services.counters.prepare import DAY_US, Bucket, Item
from services.wire.errors import require
from services.wire.periods import HOUR_US


class Arrival(Enum):
    """How an event stands to its item's watermark."""

    ON_TIME = "counted"
    LATE = "late_counted"
    TOO_LATE = "adjusted"


#: Stripe takes meter events up to 35 days old. A delta carries the start of its hour and leaves some time
#: after the event arrived, so half a day less can be counted; an older event only becomes an adjustment.
OLDEST_US = 34 * DAY_US + DAY_US // 2


def classify(
    occurred_us: int, watermark_us: int, lateness_us: int, arrival_us: int, age_max_us: int = OLDEST_US
) -> Arrival:
    """On time at or above the watermark; late inside the lateness window; else too late.

    An event older than ``age_max_us`` at its arrival is always too late.
    """
    if occurred_us < arrival_us - age_max_us:
        return Arrival.TOO_LATE
    if occurred_us >= watermark_us:
        return Arrival.ON_TIME
    if occurred_us >= watermark_us - lateness_us:
        return Arrival.LATE
    return Arrival.TOO_LATE


def add(item: Item, at_us: int, amount: int, key: str, late: int) -> None:
    """Count one event into the hour and period of ``at_us``, as the item's meter aggregates.

    ``amount`` is in billionths; for a ``unique`` meter it is the hash of the value. The item's calendar must
    be known.
    """
    if not item.period_start <= at_us < item.period_end:
        require(item.calendar is not None, "an item's calendar is not known yet")
        assert item.calendar is not None  # noqa: S101  (for the type checker; require() is the check)
        item.period_start, item.period_end = item.calendar.bounds(at_us)
    add_to(item, (at_us - at_us % HOUR_US, item.period_start), at_us, amount, key, late)


def add_to(item: Item, place: tuple[int, int], at_us: int, amount: int, key: str, late: int) -> None:
    """Count one event into the bucket of this (hour start, period start)."""
    bucket = item.buckets.get(place)
    if bucket is None:
        bucket = item.buckets[place] = Bucket(at_us, at_us)
    aggregation = item.meter.aggregation
    if aggregation == "sum" or aggregation == "count":  # noqa: PLR1714  (half the time of a tuple)
        bucket.total += amount
    elif aggregation == "max":
        bucket.total = max(bucket.total, amount)
    elif aggregation == "unique":
        if bucket.values is None:
            bucket.values = set()
        bucket.values.add(amount)
    elif bucket.events == 0 or (at_us, key) > (bucket.last_us, bucket.key):
        bucket.total, bucket.key = amount, key
    bucket.events += 1
    bucket.late += late
    if at_us > bucket.last_us:
        bucket.last_us = at_us
    elif at_us < bucket.first_us:
        bucket.first_us = at_us
