"""The lateness decision and what it does to an item's buckets. Pure."""

from __future__ import annotations

from enum import Enum

from services.counters.periods import hour_start
from services.counters.prepare import DAY_US, Item


class Arrival(Enum):
    """How an event stands to its item's watermark."""

    ON_TIME = "counted"
    LATE = "late_counted"
    TOO_LATE = "adjusted"


#: Stripe takes meter events up to 35 days old. A delta carries the start of its hour and leaves some time
#: after the event arrived, so half a day less can be counted; an older event only becomes an adjustment.
OLDEST_US = 34 * DAY_US + DAY_US // 2


def classify(occurred_us: int, watermark_us: int, lateness_us: int, arrival_us: int) -> Arrival:
    """On time at or above the watermark; late inside the lateness window; else too late."""
    if occurred_us < arrival_us - OLDEST_US:
        return Arrival.TOO_LATE
    if occurred_us >= watermark_us:
        return Arrival.ON_TIME
    if occurred_us >= watermark_us - lateness_us:
        return Arrival.LATE
    return Arrival.TOO_LATE


def add(item: Item, at_us: int, quantity: int, late: int) -> None:
    """Count ``quantity`` (billionths) into the hour and period of ``at_us``."""
    key = (hour_start(at_us), item.meter.calendar.period_start(at_us))
    bucket = item.buckets.get(key)
    if bucket is None:
        item.buckets[key] = [quantity, 1, late]
    else:
        bucket[0] += quantity
        bucket[1] += 1
        bucket[2] += late
