"""Billing periods, of the wall calendar and of subscriptions. Expected values are UTC, worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from services.wire.errors import Misconfigured
from services.wire.periods import Calendar, calendar_text, hour_start, in_zone
from services.wire.times import instant, micros

HOUR_US = 3_600_000_000


def us(text: str) -> int:
    """Microseconds since 1970 of a UTC time."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


#: calendar, first instant of the period, first instant of the next, both in UTC
PERIODS = [
    # Months of the wall calendar.
    ("1 month UTC", "2026-02-01T00:00", "2026-03-01T00:00"),
    ("1 month UTC", "2024-02-01T00:00", "2024-03-01T00:00"),
    # Clocks go forward on 29 March 2026 and back on 25 October.
    ("1 month Europe/Budapest", "2026-02-28T23:00", "2026-03-31T22:00"),
    ("1 month Europe/Budapest", "2026-03-31T22:00", "2026-04-30T22:00"),
    ("1 month Europe/Budapest", "2026-09-30T22:00", "2026-10-31T23:00"),
    ("1 month Europe/Budapest", "2026-12-31T23:00", "2027-01-31T23:00"),
    # Forward on 8 March 2026; back on 1 November at two, two hours after the period has begun.
    ("1 month America/Los_Angeles", "2026-03-01T08:00", "2026-04-01T07:00"),
    ("1 month America/Los_Angeles", "2026-10-01T07:00", "2026-11-01T07:00"),
    ("1 month America/Los_Angeles", "2026-11-01T07:00", "2026-12-01T08:00"),
    # Five hours and 45 minutes ahead, all year.
    ("1 month Asia/Kathmandu", "2025-12-31T18:15", "2026-01-31T18:15"),
    ("1 month Asia/Kathmandu", "2026-02-28T18:15", "2026-03-31T18:15"),
    # Half an hour of summer time: from +11:00 to +10:30 on 5 April, back on 4 October.
    ("1 month Australia/Lord_Howe", "2026-03-31T13:00", "2026-04-30T13:30"),
    ("1 month Australia/Lord_Howe", "2026-09-30T13:30", "2026-10-31T13:00"),
    # Midnight of 1 October 2017 did not exist: clocks went from 00:00 to 01:00.
    ("1 month America/Asuncion", "2017-10-01T04:00", "2017-11-01T03:00"),
    # Midnight of 1 November 2020 came twice: clocks went from 01:00 back to 00:00.
    ("1 month America/Havana", "2020-11-01T04:00", "2020-12-01T05:00"),
    # Other units, and more than one.
    ("1 day UTC", "2026-11-22T00:00", "2026-11-23T00:00"),
    ("1 day Europe/Budapest", "2026-03-28T23:00", "2026-03-29T22:00"),
    ("1 day Europe/Budapest", "2026-10-24T22:00", "2026-10-25T23:00"),
    ("1 day America/Los_Angeles", "2026-03-08T08:00", "2026-03-09T07:00"),
    ("1 day America/Los_Angeles", "2026-11-01T07:00", "2026-11-02T08:00"),
    ("1 week UTC", "2026-11-16T00:00", "2026-11-23T00:00"),
    ("1 week Europe/Budapest", "2026-03-22T23:00", "2026-03-29T22:00"),
    ("3 month UTC", "2026-10-01T00:00", "2027-01-01T00:00"),
    ("1 year Europe/Budapest", "2025-12-31T23:00", "2026-12-31T23:00"),
    # There was no 30 December 2011 in Samoa: the 29th (-10:00) was followed by the 31st (+14:00).
    ("1 day Pacific/Apia", "2011-12-29T10:00", "2011-12-30T10:00"),
    ("1 day Pacific/Apia", "2011-12-30T10:00", "2011-12-31T10:00"),
    ("1 month Pacific/Apia", "2011-12-01T10:00", "2011-12-31T10:00"),
    ("1 day Pacific/Apia 2011-12-25T23:37:42Z", "2011-12-29T23:37:42", "2011-12-30T23:37:42"),
    ("1 day Pacific/Apia 2011-12-25T23:37:42Z", "2011-12-30T23:37:42", "2011-12-31T23:37:42"),
    # A subscription: the anchor's wall time, to the second. 13:37:42Z is 14:37:42 in Budapest's winter.
    ("1 month UTC 2026-01-15T13:37:42Z", "2026-01-15T13:37:42", "2026-02-15T13:37:42"),
    ("1 month Europe/Budapest 2026-01-15T13:37:42Z", "2026-03-15T13:37:42", "2026-04-15T12:37:42"),
    ("1 month Europe/Budapest 2026-01-15T13:37:42Z", "2026-10-15T12:37:42", "2026-11-15T13:37:42"),
    # On the 29th, 30th and 31st, or the month's last day; a short month shortens only its own.
    ("1 month UTC 2026-01-29T13:37:42Z", "2026-02-28T13:37:42", "2026-03-29T13:37:42"),
    ("1 month UTC 2023-12-30T13:37:42Z", "2024-02-29T13:37:42", "2024-03-30T13:37:42"),
    ("1 month UTC 2026-01-31T13:37:42Z", "2026-01-31T13:37:42", "2026-02-28T13:37:42"),
    ("1 month UTC 2026-01-31T13:37:42Z", "2026-02-28T13:37:42", "2026-03-31T13:37:42"),
    ("1 month UTC 2026-01-31T13:37:42Z", "2026-03-31T13:37:42", "2026-04-30T13:37:42"),
    # The day is the zone's: in Budapest this anchor is 00:30 on 1 March.
    ("1 month Europe/Budapest 2026-02-28T23:30:00Z", "2026-03-31T22:30", "2026-04-30T22:30"),
    # Before the anchor, in the same way.
    ("1 month UTC 2026-01-31T13:37:42Z", "2025-12-31T13:37:42", "2026-01-31T13:37:42"),
    ("1 month UTC 2026-01-31T13:37:42Z", "2025-11-30T13:37:42", "2025-12-31T13:37:42"),
    ("1 month UTC 2026-03-31T13:37:42Z", "2024-02-29T13:37:42", "2024-03-31T13:37:42"),
    ("2 week UTC 2026-11-20T08:00:00Z", "2026-11-06T08:00", "2026-11-20T08:00"),
    ("3 month UTC 2026-01-31T00:00:00Z", "2025-04-30T00:00", "2025-07-31T00:00"),
    # Yearly from a leap day: the last of February in other years.
    ("1 year UTC 2024-02-29T13:37:42Z", "2025-02-28T13:37:42", "2026-02-28T13:37:42"),
    ("1 year UTC 2024-02-29T13:37:42Z", "2027-02-28T13:37:42", "2028-02-29T13:37:42"),
    ("1 year UTC 2024-02-29T13:37:42Z", "2020-02-29T13:37:42", "2021-02-28T13:37:42"),
    # 02:30 on 29 March does not exist in Budapest: it is read by the offset of the winter, as 01:30Z.
    ("1 day Europe/Budapest 2026-03-20T01:30:00Z", "2026-03-29T01:30", "2026-03-30T00:30"),
    # 02:30 on 25 October comes twice: the first, of the summer, counts.
    ("1 day Europe/Budapest 2026-10-20T00:30:00Z", "2026-10-25T00:30", "2026-10-26T01:30"),
    # Lord Howe repeats half an hour, 01:30 to 02:00, on 5 April 2026.
    ("1 day Australia/Lord_Howe 2026-03-31T14:45:00Z", "2026-04-04T14:45", "2026-04-05T15:15"),
]


@pytest.mark.parametrize(("text", "start", "end"), PERIODS)
def test_a_period_is_that_of_its_zones_wall_time_also_when_clocks_change(
    text: str, start: str, end: str
) -> None:
    calendar = Calendar.parse(text)
    middle = (us(start) + us(end)) // 2
    assert calendar.bounds(middle) == (us(start), us(end))
    assert calendar.period_start(middle) == us(start)
    assert calendar.period_end(us(start)) == us(end)


@pytest.mark.parametrize(("text", "start", "end"), PERIODS)
def test_an_instant_on_the_edge_belongs_to_the_period_that_starts_there(
    text: str, start: str, end: str
) -> None:
    calendar = Calendar.parse(text)
    assert calendar.period_start(us(start)) == us(start)
    assert calendar.period_end(us(start) - 1) == us(start)
    assert calendar.period_start(us(end) - 1) == us(start)
    assert calendar.period_start(us(end)) == us(end)


def test_the_months_in_which_clocks_change_are_shorter_and_longer() -> None:
    calendar = Calendar.parse("1 month Europe/Budapest")
    hours = {
        month: (calendar.period_end(us(start)) - us(start)) // HOUR_US
        for month, start in (("March", "2026-02-28T23:00"), ("October", "2026-09-30T22:00"))
    }
    assert hours == {"March": 31 * 24 - 1, "October": 31 * 24 + 1}


@pytest.mark.parametrize(
    ("text", "first", "periods", "last"),
    [
        ("1 month America/Los_Angeles", "2024-01-15T00:00", 36, "2027-01-01T08:00"),
        ("1 month UTC 2026-01-31T13:37:42Z", "2020-02-01T00:00", 24, "2022-01-31T13:37:42"),
        ("1 day Pacific/Apia", "2011-12-25T12:00", 10, "2012-01-04T10:00"),
    ],
)
def test_periods_follow_one_another_without_gap_or_overlap(
    text: str, first: str, periods: int, last: str
) -> None:
    calendar = Calendar.parse(text)
    start = calendar.period_start(us(first))
    for _ in range(periods):
        end = calendar.period_end(start)
        assert end > start
        assert calendar.period_start(end) == end
        assert calendar.period_start(end - 1) == start
        start = end
    assert start == us(last)


def test_a_calendar_says_whether_it_is_a_subscriptions() -> None:
    assert Calendar.parse("1 month UTC 2026-01-31T13:37:42Z").anchored
    assert not Calendar.parse("1 month UTC").anchored


def test_a_calendar_is_known_by_its_text() -> None:
    text = "2 week Europe/Budapest 2026-01-31T13:37:42Z"
    calendar = Calendar.parse(text)
    assert calendar.text == text
    assert calendar == Calendar.parse(text) != Calendar.parse("2 week Europe/Budapest")
    assert len({calendar, Calendar.parse(text)}) == 1
    assert text in repr(calendar)
    assert Calendar.parse("01 month UTC").text == "1 month UTC"


def test_many_calendars_share_their_zones_and_only_the_newest_are_kept() -> None:
    from services.wire.periods import _parse

    for number in range(10_050):
        Calendar.parse(f"1 month UTC {instant(number * HOUR_US * 10):%Y-%m-%dT%H:%M:%SZ}")
    assert _parse.cache_info().currsize == 10_000


def test_the_text_of_a_subscription_has_its_anchor_in_utc() -> None:
    anchor = datetime(2026, 1, 31, 14, 37, 42, tzinfo=timezone(timedelta(hours=1)))
    assert calendar_text("Europe/Budapest", anchor) == "1 month Europe/Budapest 2026-01-31T13:37:42Z"
    assert calendar_text("UTC", anchor, count=2, unit="week") == "2 week UTC 2026-01-31T13:37:42Z"
    assert calendar_text("UTC") == "1 month UTC"


def test_a_zone_is_taken_as_one_name_and_can_be_exchanged() -> None:
    for wrong in ("UTC 2026-01-31T13:37:42Z", "Mars/Olympus", ""):
        with pytest.raises(Misconfigured, match="IANA"):
            calendar_text(wrong)
        with pytest.raises(Misconfigured, match="IANA"):
            in_zone("1 month UTC", wrong)
    assert (
        in_zone("1 month UTC 2026-01-31T13:37:42Z", "Asia/Tokyo") == "1 month Asia/Tokyo 2026-01-31T13:37:42Z"
    )
    assert in_zone("2 week UTC", "Asia/Tokyo") == "2 week Asia/Tokyo"


@pytest.mark.parametrize("anchor", [datetime(2026, 1, 31), datetime(2026, 1, 31, 0, 0, 0, 1, tzinfo=UTC)])
def test_an_anchor_without_an_offset_or_between_two_seconds_is_refused(anchor: datetime) -> None:
    with pytest.raises(Misconfigured, match="full second with an offset"):
        calendar_text("UTC", anchor)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "write it like '1 month Europe/Budapest'"),
        ("1 month", "write it like"),
        ("month UTC", "write it like"),
        ("1  month UTC", "write it like"),
        ("1 month UTC\n", "write it like"),
        ("-1 month UTC", "write it like"),
        ("1 month UTC 2026-01-31 13:37:42Z", "write it like"),
        ("1 fortnight UTC", "unknown unit 'fortnight'; use day, week, month or year"),
        ("0 month UTC", "count of 1 to 365"),
        ("366 day UTC", "count of 1 to 365"),
        ("1 month Mars/Olympus", "unknown time zone 'Mars/Olympus'; use an IANA name"),
        ("1 month ../etc/passwd", "IANA"),
        ("1 month Europe", "IANA"),
        ("1 month UTC\0", "IANA"),
        ("1 month UTC 2026-01-31", "full second in UTC, such as"),
        ("1 month UTC 2026-01-31T13:37:42", "full second in UTC, such as"),
        ("1 month UTC 2026-01-31T13:37:42+01:00", "full second in UTC, such as"),
        ("1 month UTC 2026-01-31T13:37:42.5Z", "full second in UTC, such as"),
        ("1 month UTC 2026-02-30T13:37:42Z", "full second in UTC, such as"),
        ("1 month UTC 1969-12-31T23:59:59Z", "years 1970 to 2200"),
        ("1 month UTC 9999-12-31T23:59:59Z", "years 1970 to 2200"),
    ],
)
def test_a_text_that_is_no_calendar_is_refused_with_what_to_write(text: str, named: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        Calendar.parse(text)
    assert named in str(refused.value)


def test_an_hour_starts_on_the_full_utc_hour_and_holds_its_own_edge() -> None:
    noon = us("2026-03-01T12:00")
    assert hour_start(noon) == noon
    assert hour_start(noon + HOUR_US - 1) == noon
    assert hour_start(noon - 1) == noon - HOUR_US
    assert hour_start(-1) == -HOUR_US


@pytest.mark.parametrize("number", [0, 1, -1, 1_767_225_599_999_999, -62_135_596_800_000_000, 10**17 + 1])
def test_an_instant_is_the_same_microsecond_as_a_datetime_and_as_a_number(number: int) -> None:
    assert micros(instant(number)) == number


def test_a_datetime_of_another_zone_is_the_same_instant() -> None:
    assert micros(datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))) == 0
    assert instant(0) == datetime(1970, 1, 1, tzinfo=UTC)
