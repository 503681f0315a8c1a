"""Billing periods: calendar months of a time zone. Expected values are UTC instants worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.counters.periods import Calendar, hour_start
from services.wire.errors import Misconfigured

HOUR_US = 3_600_000_000


def us(text: str) -> int:
    """Microseconds since 1970 of a UTC time."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


#: zone, first instant of the period, first instant of the next, both in UTC
PERIODS = [
    ("UTC", "2026-02-01T00:00", "2026-03-01T00:00"),
    ("UTC", "2024-02-01T00:00", "2024-03-01T00:00"),
    # Clocks go forward on 29 March 2026 and back on 25 October.
    ("Europe/Budapest", "2026-02-28T23:00", "2026-03-31T22:00"),
    ("Europe/Budapest", "2026-03-31T22:00", "2026-04-30T22:00"),
    ("Europe/Budapest", "2026-09-30T22:00", "2026-10-31T23:00"),
    ("Europe/Budapest", "2026-12-31T23:00", "2027-01-31T23:00"),
    # Forward on 8 March 2026; back on 1 November at two, two hours after the period has begun.
    ("America/Los_Angeles", "2026-03-01T08:00", "2026-04-01T07:00"),
    ("America/Los_Angeles", "2026-10-01T07:00", "2026-11-01T07:00"),
    ("America/Los_Angeles", "2026-11-01T07:00", "2026-12-01T08:00"),
    # Five hours and 45 minutes ahead, all year.
    ("Asia/Kathmandu", "2025-12-31T18:15", "2026-01-31T18:15"),
    ("Asia/Kathmandu", "2026-02-28T18:15", "2026-03-31T18:15"),
    # Midnight of 1 October 2017 did not exist: clocks went from 00:00 to 01:00.
    ("America/Asuncion", "2017-10-01T04:00", "2017-11-01T03:00"),
    # Midnight of 1 November 2020 came twice: clocks went from 01:00 back to 00:00.
    ("America/Havana", "2020-11-01T04:00", "2020-12-01T05:00"),
]


@pytest.mark.parametrize(("zone", "start", "end"), PERIODS)
def test_a_period_is_the_month_of_its_zone_also_when_clocks_change(zone: str, start: str, end: str) -> None:
    calendar = Calendar(zone)
    middle = (us(start) + us(end)) // 2
    assert calendar.period_start(middle) == us(start)
    assert calendar.period_end(us(start)) == us(end)


@pytest.mark.parametrize(("zone", "start", "end"), PERIODS)
def test_an_instant_on_the_edge_belongs_to_the_period_that_starts_there(
    zone: str, start: str, end: str
) -> None:
    calendar = Calendar(zone)
    assert calendar.period_start(us(start)) == us(start)
    assert calendar.period_start(us(start) - 1) < us(start)
    assert calendar.period_start(us(end) - 1) == us(start)
    assert calendar.period_start(us(end)) == us(end)


def test_the_days_on_which_clocks_change_are_shorter_and_longer() -> None:
    calendar = Calendar("Europe/Budapest")
    hours = {
        month: (calendar.period_end(us(start)) - us(start)) // HOUR_US
        for month, start in (("March", "2026-02-28T23:00"), ("October", "2026-09-30T22:00"))
    }
    assert hours == {"March": 31 * 24 - 1, "October": 31 * 24 + 1}


def test_periods_follow_one_another_without_gap_or_overlap() -> None:
    calendar = Calendar("America/Los_Angeles")
    start = calendar.period_start(us("2024-01-15T00:00"))
    for _ in range(36):
        end = calendar.period_end(start)
        assert calendar.period_start(end) == end
        assert calendar.period_start(end - 1) == start
        start = end
    assert start == us("2027-01-01T08:00")


def test_an_hour_starts_on_the_full_utc_hour_and_holds_its_own_edge() -> None:
    noon = us("2026-03-01T12:00")
    assert hour_start(noon) == noon
    assert hour_start(noon + HOUR_US - 1) == noon
    assert hour_start(noon - 1) == noon - HOUR_US
    assert hour_start(-1) == -HOUR_US


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "../etc/passwd"])
def test_a_zone_that_does_not_exist_is_named_with_what_to_do(name: str) -> None:
    with pytest.raises(Misconfigured, match="IANA"):
        Calendar(name)
