"""Billing periods: calendar months in the tenant's time zone. Pure.

An event on an edge belongs to the period that starts there. Times are microseconds since 1970.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import datetime
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from services.wire.errors import Misconfigured

HOUR_US = 3_600_000_000
_FIRST_YEAR, _LAST_YEAR = 1999, 2150


@cache
def _month_starts(timezone: str) -> list[int]:
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise Misconfigured(
            f"unknown time zone {timezone!r}; use an IANA name such as Europe/Budapest"
        ) from error
    return [
        int(datetime(year, month, 1, tzinfo=zone).timestamp()) * 1_000_000
        for year in range(_FIRST_YEAR, _LAST_YEAR)
        for month in range(1, 13)
    ]


class Calendar:
    """The billing periods of one time zone.

    Raises:
        Misconfigured: no such time zone.
    """

    __slots__ = ("_starts",)

    def __init__(self, timezone: str) -> None:
        self._starts = _month_starts(timezone)

    def period_start(self, at_us: int) -> int:
        """Start of the period that holds ``at_us``, inclusive."""
        return self._starts[bisect_right(self._starts, at_us) - 1]

    def period_end(self, period_start: int) -> int:
        """End of the period that starts at ``period_start``, exclusive."""
        return self._starts[bisect_right(self._starts, period_start)]


def hour_start(at_us: int) -> int:
    """Start of the UTC hour that holds ``at_us``."""
    return at_us - at_us % HOUR_US
