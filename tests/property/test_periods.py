"""Periods against an oracle that knows of a zone only what its clocks show, and searches the rest."""

from __future__ import annotations

import calendar as months_of
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.wire.periods import Calendar

ZONES = (
    "UTC",
    "Europe/Budapest",
    "America/Los_Angeles",
    "America/St_Johns",  # changed its clocks at one minute past midnight until 2011
    "America/Havana",  # repeats midnight
    "America/Asuncion",  # skipped midnight
    "Asia/Kathmandu",
    "Asia/Gaza",  # rules as irregular as they come
    "Africa/Casablanca",  # winter time for Ramadan
    "Australia/Lord_Howe",
    "Antarctica/Troll",  # two hours of summer time
    "Pacific/Apia",  # skipped 30 December 2011
    "Pacific/Chatham",
    "Pacific/Norfolk",
)
EPOCH = datetime(1970, 1, 1)
SECONDS = st.integers(
    int(datetime(2000, 1, 1, tzinfo=UTC).timestamp()), int(datetime(2036, 1, 1, tzinfo=UTC).timestamp())
)
MICROS = st.integers(0, 999_999)
UNITS = st.sampled_from(
    [(1, "month"), (1, "day"), (1, "week"), (1, "year"), (3, "month"), (5, "day"), (2, "year")]
)


def wall_of(second: int, zone: str) -> datetime:
    """Naive wall time of an instant."""
    return datetime.fromtimestamp(second, ZoneInfo(zone)).replace(tzinfo=None)


def ahead_of_utc(second: int, zone: str) -> int:
    """Seconds that the clocks of a zone are ahead of UTC at an instant."""
    return round((wall_of(second, zone) - EPOCH).total_seconds()) - second


@cache
def offsets_about(day: int, zone: str) -> list[tuple[int, int]]:
    """Every change of the clocks about a day as (instant, seconds ahead since), with what was before."""
    first = (day - 3) * 86_400
    found = [(first, ahead_of_utc(first, zone))]
    for second in range(first, first + 6 * 86_400, 3600):
        before, after = second, second + 3600
        if ahead_of_utc(after, zone) == found[-1][1]:
            continue
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (
                (middle, after) if ahead_of_utc(middle, zone) == found[-1][1] else (before, middle)
            )
        found.append((after, ahead_of_utc(after, zone)))
    return found


def second_of(wall: datetime, zone: str) -> int:
    """The first instant with that wall time; for a skipped one, what it would be had the clocks gone on."""
    since = round((wall - EPOCH).total_seconds())
    offsets = offsets_about(since // 86_400, zone)
    spans = [*offsets, (10**12, 0)]
    for (start, ahead), (end, _) in pairwise(spans):
        if start <= since - ahead < end:
            return since - ahead
    for (_, before), (change, after) in pairwise(offsets):
        if change + before <= since < change + after:
            return since - before
    raise AssertionError("a wall time is either there or skipped")


def add(wall: datetime, number: int, unit: str) -> datetime:
    """``number`` units later by the wall; a day that is not in the month is its last."""
    if unit in ("day", "week"):
        return wall + timedelta(**{unit + "s": number})
    year, month = wall.year + (number if unit == "year" else 0), wall.month
    for _ in range(abs(number) if unit == "month" else 0):
        month += 1 if number > 0 else -1
        if month in (0, 13):
            year, month = (year - 1, 12) if month == 0 else (year + 1, 1)
    last = months_of.monthrange(year, month)[1]
    return wall.replace(year=year, month=month, day=min(wall.day, last))


def expected(anchor: datetime, count: int, unit: str, zone: str, second: int) -> tuple[int, int]:
    """The edges on both sides of an instant, among all starts near it."""
    length = {"day": 1, "week": 7, "month": 30.436875, "year": 365.2425}[unit] * count * 86_400
    near = round((second - round((anchor - EPOCH).total_seconds())) / length)
    edges = [second_of(add(anchor, k * count, unit), zone) for k in range(near - 3, near + 4)]
    return max(edge for edge in edges if edge <= second), min(edge for edge in edges if edge > second)


@given(st.sampled_from(ZONES), UNITS, SECONDS, SECONDS, MICROS)
@example("Pacific/Apia", (1, "day"), 1_325_239_200, 1_325_239_200, 0)  # the skipped day
@example("Pacific/Apia", (1, "day"), 1_325_289_600, 1_325_239_199, 999_999)
@example("Australia/Lord_Howe", (1, "day"), 1_775_314_800, 1_775_314_800, 0)  # the repeated half hour
@example("Europe/Budapest", (1, "month"), 1_706_664_600, 1_711_850_400, 0)  # anchor on a 31st at 02:30
@settings(max_examples=150, deadline=None)
def test_a_subscriptions_period_is_the_one_between_the_nearest_starts(
    zone: str, every: tuple[int, str], anchor: int, second: int, fraction: int
) -> None:
    count, unit = every
    calendar = Calendar.parse(
        f"{count} {unit} {zone} {datetime.fromtimestamp(anchor, UTC):%Y-%m-%dT%H:%M:%SZ}"
    )
    start, end = expected(wall_of(anchor, zone), count, unit, zone, second)
    assert calendar.bounds(second * 1_000_000 + fraction) == (start * 1_000_000, end * 1_000_000)


@given(st.sampled_from(ZONES), st.sampled_from(["day", "week", "month", "year"]), SECONDS, MICROS)
@settings(max_examples=100, deadline=None)
def test_a_wall_calendars_period_starts_at_its_midnight(
    zone: str, unit: str, second: int, fraction: int
) -> None:
    today = wall_of(second, zone).replace(hour=0, minute=0, second=0)
    anchor = {
        "day": today,
        "week": today - timedelta(days=today.weekday()),
        "month": today.replace(day=1),
        "year": today.replace(month=1, day=1),
    }[unit]
    start, end = expected(anchor, 1, unit, zone, second)
    calendar = Calendar.parse(f"1 {unit} {zone}")
    assert calendar.bounds(second * 1_000_000 + fraction) == (start * 1_000_000, end * 1_000_000)


ANY = st.builds(
    lambda zone, every, anchor: (
        f"{every[0]} {every[1]} {zone}"
        + (f" {datetime.fromtimestamp(anchor, UTC):%Y-%m-%dT%H:%M:%SZ}" if anchor is not None else "")
    ),
    st.sampled_from(ZONES),
    UNITS,
    st.none() | SECONDS,
)


@given(ANY, SECONDS, MICROS)
@settings(max_examples=300, deadline=None)
def test_every_instant_is_in_exactly_one_period(text: str, second: int, fraction: int) -> None:
    calendar = Calendar.parse(text)
    at_us = second * 1_000_000 + fraction
    start, end = calendar.bounds(at_us)
    assert start <= at_us < end
    # Each of the period's own instants names the same period, its edges the neighbours.
    assert calendar.bounds(start) == calendar.bounds(end - 1) == (start, end)
    assert calendar.bounds(end)[0] == end
    assert calendar.bounds(start - 1)[1] == start
    assert calendar.period_start(at_us) == start
    assert calendar.period_end(start) == end


@given(ANY, SECONDS)
@settings(max_examples=100, deadline=None)
def test_walking_from_end_to_end_visits_what_every_instant_between_names(text: str, second: int) -> None:
    calendar = Calendar.parse(text)
    start, end = calendar.bounds(second * 1_000_000)
    for _ in range(20):
        following = calendar.bounds(end)
        assert following[0] == end < following[1]
        assert calendar.bounds((end + following[1]) // 2) == following
        start, end = following
