"""Billing periods: from an anchor, every so many days, weeks, months or years, in UTC.

As documented (docs.stripe.com/billing/subscriptions/billing-cycle): a month without the anchor's day ends the
period on its last day, and the next one is on the anchor's day again.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime

DAY_SECONDS = 24 * 3600
FIXED_SECONDS = {"day": DAY_SECONDS, "week": 7 * DAY_SECONDS}
MONTHS = {"month": 1, "year": 12}
INTERVALS = ("day", "month", "week", "year")


def period_at(anchor: int, interval: str, count: int, moment: int, start: int) -> tuple[int, int]:
    """The period [start, end) that holds ``moment``; before the anchor it is ``start`` until the anchor."""
    if moment < anchor:
        return start, anchor
    number = _guess(anchor, interval, count, moment)
    while boundary(anchor, interval, count, number) > moment:
        number -= 1
    return boundary(anchor, interval, count, number), boundary(anchor, interval, count, number + 1)


def boundary(anchor: int, interval: str, count: int, number: int) -> int:
    """Where the period of this number begins, counted from the anchor."""
    if interval in FIXED_SECONDS:
        return anchor + number * count * FIXED_SECONDS[interval]
    first = datetime.fromtimestamp(anchor, UTC)
    years, month = divmod(first.month - 1 + number * count * MONTHS[interval], 12)
    year, month = first.year + years, month + 1
    day = min(first.day, calendar.monthrange(year, month)[1])
    return int(first.replace(year=year, month=month, day=day).timestamp())


def _guess(anchor: int, interval: str, count: int, moment: int) -> int:
    """A number that is not too small."""
    if interval in FIXED_SECONDS:
        return (moment - anchor) // (count * FIXED_SECONDS[interval])
    first, last = datetime.fromtimestamp(anchor, UTC), datetime.fromtimestamp(moment, UTC)
    return ((last.year - first.year) * 12 + last.month - first.month) // (count * MONTHS[interval])
