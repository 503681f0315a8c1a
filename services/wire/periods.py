"""Billing periods: how they repeat, and which one holds an instant. Pure; times are microseconds since 1970.

A calendar is written ``"<count> <unit> <time zone>[ <anchor>]"``. Without an anchor its periods are those of
the wall calendar: months begin on the first at midnight, weeks on Monday. With one they are those of a
subscription: the k-th starts k counts after the anchor, at the anchor's wall time in that zone, on the
anchor's day or the month's last. Always counted from the anchor, so a 31st comes back after a February. A
wall time that the clocks skip or repeat is read with ``fold=0``: by the offset before the change, so of two
the first.

Every instant is in exactly one period, and an edge belongs to the period that starts there. When a zone skips
a whole day, two starts fall on one instant: the period between them would be empty and does not exist.
"""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from services.wire.errors import Misconfigured
from services.wire.times import EPOCH

HOUR_US = 3_600_000_000
COUNT_MAX = 365
UNITS = ("day", "week", "month", "year")

_SECOND_US = 1_000_000
_TEXT = re.compile(r"([0-9]{1,9}) ([a-z]+) (\S+)(?: (\S+))?")
_ANCHOR = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_ANCHOR_YEARS = range(1970, 2201)
_FORM = "write it like '1 month Europe/Budapest' or '1 month Europe/Budapest 2026-01-31T13:37:42Z'"
#: Units as multiples of the two that arithmetic knows.
_DAYS = {"day": 1, "week": 7}
_MONTHS = {"month": 1, "year": 12}
#: Where the periods without an anchor are counted from: a first of January, and a Monday for weeks.
_ORIGINS = {"week": datetime(1970, 1, 5)}
_ORIGIN = datetime(1970, 1, 1)


def calendar_text(
    timezone: str, anchor: datetime | None = None, *, count: int = 1, unit: str = "month"
) -> str:
    """The text of a calendar, in its one canonical form.

    Raises:
        Misconfigured: no such zone or unit, a count or an anchor out of range.
    """
    _zone(timezone)  # by itself, so that a blank in it is not read as the end of it
    if anchor is None:
        return Calendar.parse(f"{count} {unit} {timezone}").text
    if anchor.utcoffset() is None or anchor.microsecond:
        raise Misconfigured("an anchor is a full second with an offset, such as 2026-01-31T13:37:42+01:00")
    return Calendar.parse(f"{count} {unit} {timezone} {anchor.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}").text


def in_zone(calendar: str, timezone: str) -> str:
    """The same periods by the wall time of another zone.

    Raises:
        Misconfigured: no such zone.
    """
    _zone(timezone)
    count, unit, _, *anchor = calendar.split(" ")
    return Calendar.parse(" ".join([count, unit, timezone, *anchor])).text


class Calendar:
    """Periods that repeat: :meth:`parse` makes one. ``anchored``: they are those of a subscription.

    Good for instants of the years 1800 to 2500 at least; far outside of these OverflowError is raised.
    """

    __slots__ = ("_count", "_in_days", "_newest", "_origin", "_zone", "anchored", "text")

    def __init__(self, count: int, unit: str, zone: ZoneInfo, anchor: datetime | None) -> None:
        if anchor is None:
            self._origin = _ORIGINS.get(unit, _ORIGIN).replace(tzinfo=zone)
        else:
            self._origin = anchor.astimezone(zone)
        self._in_days = unit in _DAYS
        self._count = count * (_DAYS[unit] if self._in_days else _MONTHS[unit])
        self._zone = zone
        self._newest = (0, 0)
        self.anchored = anchor is not None
        self.text = f"{count} {unit} {zone.key}" + (f" {anchor:%Y-%m-%dT%H:%M:%SZ}" if anchor else "")

    @staticmethod
    def parse(text: str) -> Calendar:
        """The calendar that ``text`` describes. The most recently used ones are kept.

        Raises:
            Misconfigured: it describes none; the message says what is wrong and what to write.
        """
        return _parse(text)

    def bounds(self, at_us: int) -> tuple[int, int]:
        """Start, inclusive, and end, exclusive, of the period that holds ``at_us``."""
        newest = self._newest  # events come in runs of one period
        if newest[0] <= at_us < newest[1]:
            return newest
        second = at_us // _SECOND_US  # starts are full seconds
        k = self._guess(second)
        start = self._start(k)
        if start <= second:
            end = self._start(k + 1)
            while end <= second:
                k += 1
                start, end = end, self._start(k + 1)
        else:
            while start > second:
                k -= 1
                start, end = self._start(k), start
        self._newest = found = (start * _SECOND_US, end * _SECOND_US)
        return found

    def period_start(self, at_us: int) -> int:
        """Start of the period that holds ``at_us``, inclusive."""
        return self.bounds(at_us)[0]

    def period_end(self, period_start_us: int) -> int:
        """End of the period that starts at ``period_start_us``, exclusive."""
        return self.bounds(period_start_us)[1]

    def _guess(self, second: int) -> int:
        """A number near that of the period that holds ``second``: what its wall time alone would say."""
        wall = (EPOCH + timedelta(seconds=second)).astimezone(self._zone)
        origin = self._origin
        if self._in_days:
            return (wall.toordinal() - origin.toordinal()) // self._count
        return ((wall.year - origin.year) * 12 + wall.month - origin.month) // self._count

    def _start(self, k: int) -> int:
        """The second that period ``k`` starts at.

        Never less than that of ``k - 1``: offsets differ by a day at most, which is the shortest period.
        """
        origin = self._origin
        if self._in_days:
            wall = origin + timedelta(days=k * self._count)  # wall time; fold=0
        else:
            months = origin.year * 12 + origin.month - 1 + k * self._count
            year, month, day = months // 12, months % 12 + 1, origin.day
            if day > 28:
                day = min(day, monthrange(year, month)[1])
            wall = origin.replace(year=year, month=month, day=day, fold=0)
        since = wall - EPOCH
        return since.days * 86_400 + since.seconds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calendar) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Calendar.parse({self.text!r})"


@lru_cache(maxsize=10_000)
def _parse(text: str) -> Calendar:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise Misconfigured(f"{text!r} is no calendar; {_FORM}")
    count, unit, timezone, anchor = int(match[1]), match[2], match[3], match[4]
    if unit not in UNITS:
        raise Misconfigured(f"unknown unit {unit!r}; use {', '.join(UNITS[:-1])} or {UNITS[-1]}")
    if not 1 <= count <= COUNT_MAX:
        raise Misconfigured(f"a period cannot be {count} {unit}s long; use a count of 1 to {COUNT_MAX}")
    return Calendar(count, unit, _zone(timezone), None if anchor is None else _anchor(anchor))


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise Misconfigured(f"unknown time zone {name!r}; use an IANA name such as Europe/Budapest") from None


def _anchor(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text) if _ANCHOR.fullmatch(text) else None
    except ValueError:
        moment = None
    if moment is None:
        raise Misconfigured(
            f"{text!r} is no anchor; write a full second in UTC, such as 2026-01-31T13:37:42Z"
        )
    if moment.year not in _ANCHOR_YEARS:
        first, last = _ANCHOR_YEARS[0], _ANCHOR_YEARS[-1]
        raise Misconfigured(f"the anchor {text} is out of range; use a time of the years {first} to {last}")
    return moment


def hour_start(at_us: int) -> int:
    """Start of the UTC hour that holds ``at_us``."""
    return at_us - at_us % HOUR_US
