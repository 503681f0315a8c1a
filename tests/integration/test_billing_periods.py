"""Usage and the edges of billing periods: clocks that change, odd offsets, anchors to the second."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from tests.integration.books import Books, iso, open_books


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now="2026-12-31T00:00") as books:
        books.meter("requests", lateness_seconds=35 * 86_400)
        yield books


def in_zone(books: Books, timezone: str) -> Books:
    """A tenant of that zone with the same clock."""
    other = Books(books.db, books.now, timezone.lower().replace("/", "-")).create(timezone)
    other.meter("requests", lateness_seconds=35 * 86_400)
    return other


def count_at(books: Books, *times: str) -> None:
    """One event at each time, which arrives then; the clock stays at the last one."""
    for at in times:
        books.now = at
        books.count(books.use(f"{books.tenant}/{at}", at))


def every_hour(start: str, hours: int) -> list[str]:
    first = datetime.fromisoformat(start).replace(tzinfo=UTC)
    return [iso(first + timedelta(hours=hour, minutes=30)) for hour in range(hours)]


@pytest.mark.parametrize(
    ("timezone", "first_midnight", "periods"),
    [
        (
            "Europe/Budapest",
            "2026-03-27T23:00",
            {"2026-03-27T23:00": 24, "2026-03-28T23:00": 23, "2026-03-29T22:00": 24},
        ),
        (
            "Europe/Budapest",
            "2026-10-23T22:00",
            {"2026-10-23T22:00": 24, "2026-10-24T22:00": 25, "2026-10-25T23:00": 24},
        ),
        (
            "America/Los_Angeles",
            "2026-03-07T08:00",
            {"2026-03-07T08:00": 24, "2026-03-08T08:00": 23, "2026-03-09T07:00": 24},
        ),
        (
            "America/Los_Angeles",
            "2026-10-31T07:00",
            {"2026-10-31T07:00": 24, "2026-11-01T07:00": 25, "2026-11-02T08:00": 24},
        ),
    ],
)
def test_days_on_which_the_clocks_change_have_23_or_25_hours(
    books: Books, timezone: str, first_midnight: str, periods: dict[str, int]
) -> None:
    books.customer("cus_1", f"1 day {timezone}")
    times = every_hour(first_midnight, sum(periods.values()))
    books.now = times[-1]
    books.count(*[books.use(at, at) for at in times])
    assert books.periods() == periods
    assert all(one["period_end"] - one["period_start"] <= timedelta(hours=25) for one in books.settle())


@pytest.mark.parametrize(
    ("timezone", "edges"),
    [
        ("UTC", ["2026-03-01T00:00", "2026-04-01T00:00", "2026-11-01T00:00"]),
        ("Europe/Budapest", ["2026-02-28T23:00", "2026-03-31T22:00", "2026-10-31T23:00"]),
        (
            "America/Los_Angeles",
            ["2026-03-01T08:00", "2026-04-01T07:00", "2026-11-01T07:00", "2026-12-01T08:00"],
        ),
        ("Asia/Kathmandu", ["2026-02-28T18:15", "2026-03-31T18:15"]),
        ("Australia/Lord_Howe", ["2026-03-31T13:00", "2026-04-30T13:30"]),
    ],
)
def test_without_an_anchor_a_period_is_a_month_of_the_tenants_wall_calendar_and_begins_at_midnight(
    books: Books, timezone: str, edges: list[str]
) -> None:
    """Of two events a microsecond apart, the second is on the edge and belongs to the month that begins."""
    zone = in_zone(books, timezone)
    for edge in edges:
        before = iso(datetime.fromisoformat(edge).replace(tzinfo=UTC) - timedelta(microseconds=1))
        count_at(zone, before, edge)
    assert set(edges) <= set(zone.periods())
    assert all(zone.periods()[edge] in (1, 2) for edge in edges)
    for edge in edges:
        inside = [period for (hour, period) in zone.buckets() if hour[:13] == edge[:13]]
        assert inside.count(edge) == 1


def test_a_month_that_begins_inside_a_utc_hour_cuts_its_bucket_in_two(books: Books) -> None:
    """Kathmandu is 5:45 ahead: its June begins at 18:15 UTC."""
    zone = in_zone(books, "Asia/Kathmandu")
    count_at(
        zone, "2026-05-31T18:00", "2026-05-31T18:14:59.999999", "2026-05-31T18:15", "2026-05-31T18:59:59"
    )
    assert zone.buckets() == {
        ("2026-05-31T18:00", "2026-04-30T18:15"): 2,
        ("2026-05-31T18:00", "2026-05-31T18:15"): 2,
    }
    may, june = sorted(zone.close(), key=lambda one: one["period_start"])
    assert [iso(may[name]) for name in ("hour_start", "event_at", "period_start", "period_end")] == [
        "2026-05-31T18:00",
        "2026-05-31T18:00",
        "2026-04-30T18:15",
        "2026-05-31T18:15",
    ]
    assert [iso(june[name]) for name in ("hour_start", "event_at", "period_start", "period_end")] == [
        "2026-05-31T18:00",
        "2026-05-31T18:15",
        "2026-05-31T18:15",
        "2026-06-30T18:15",
    ]
    assert may["identifier"] != june["identifier"]
    assert (may["amount"], june["amount"]) == (2, 2)


def test_an_anchor_on_the_31st_falls_on_the_last_day_of_shorter_months_and_comes_back(books: Books) -> None:
    books.customer("cus_1", "1 month UTC 2026-01-31T00:00:00Z")
    starts = [
        "2025-11-30T00:00",
        "2025-12-31T00:00",
        "2026-01-31T00:00",
        "2026-02-28T00:00",
        "2026-03-31T00:00",
        "2026-04-30T00:00",
        "2026-05-31T00:00",
    ]
    for start in starts:
        edge = datetime.fromisoformat(start).replace(tzinfo=UTC)
        count_at(books, iso(edge - timedelta(microseconds=1)), start)
    assert books.periods() == {"2025-10-31T00:00": 1, **dict.fromkeys(starts[:-1], 2), starts[-1]: 1}


def test_an_anchor_to_the_second_parts_the_events_of_one_hour(books: Books) -> None:
    books.customer("cus_1", "1 month UTC 2026-01-15T13:37:42Z")
    count_at(
        books,
        "2026-06-15T13:00",
        "2026-06-15T13:37:41.999999",
        "2026-06-15T13:37:42",
        "2026-06-15T13:37:42.000001",
        "2026-06-15T13:59",
    )
    assert books.buckets() == {
        ("2026-06-15T13:00", "2026-05-15T13:37:42"): 2,
        ("2026-06-15T13:00", "2026-06-15T13:37:42"): 3,
    }
    old, new = sorted(books.close(), key=lambda one: one["period_start"])
    assert (iso(old["event_at"]), old["amount"]) == ("2026-06-15T13:00", 2)
    assert (iso(new["event_at"]), new["amount"]) == ("2026-06-15T13:37:42", 3)
    assert old["period_end"] == new["period_start"]


def test_one_chunk_on_both_sides_of_many_edges_is_parted_as_single_events_are(books: Books) -> None:
    """Given events in no order of time, so that no period follows from the one before."""
    books.customer("cus_1", "1 day UTC 2026-06-01T13:37:42Z")
    books.now = "2026-06-20T00:00"
    times = [f"2026-06-{day:02}T13:37:{second}" for second in (41, 42) for day in range(19, 0, -1)]
    books.count(*[books.use(at, at) for at in times])
    edges = [f"2026-06-{day:02}T13:37:42" for day in range(1, 19)]
    assert books.periods() == {
        "2026-05-31T13:37:42": 1,
        **dict.fromkeys(edges, 2),
        "2026-06-19T13:37:42": 1,
    }


@pytest.mark.parametrize(
    ("anchor", "edge"),
    [
        ("2026-01-29T01:30:00Z", "2026-03-29T01:30"),  # 02:30 does not exist: the offset before the change
        ("2026-09-25T00:30:00Z", "2026-10-25T00:30"),  # 02:30 comes twice: the first
        ("2026-02-10T08:00:00Z", "2026-06-10T07:00"),  # 09:00 on the wall, winter and summer
    ],
)
def test_an_anchor_keeps_its_wall_time_through_the_year(books: Books, anchor: str, edge: str) -> None:
    books.customer("cus_1", f"1 month Europe/Budapest {anchor}")
    before = iso(datetime.fromisoformat(edge).replace(tzinfo=UTC) - timedelta(microseconds=1))
    count_at(books, before, edge)
    assert len(books.periods()) == 2
    assert books.periods()[edge] == 1


@pytest.mark.parametrize(
    ("calendar", "inside", "period"),
    [
        ("1 week UTC", "2026-06-17T12:00", ("2026-06-15T00:00", "2026-06-22T00:00")),
        ("1 year Europe/Budapest", "2026-06-17T12:00", ("2025-12-31T23:00", "2026-12-31T23:00")),
        ("3 month UTC 2026-01-31T00:00:00Z", "2026-04-29T12:00", ("2026-01-31T00:00", "2026-04-30T00:00")),
        ("2 week UTC 2026-06-03T10:00:00Z", "2026-06-17T10:00", ("2026-06-17T10:00", "2026-07-01T10:00")),
        ("1 year UTC 2024-02-29T00:00:00Z", "2026-02-28T00:00", ("2026-02-28T00:00", "2027-02-28T00:00")),
        ("10 day UTC 2026-06-21T00:00:00Z", "2026-06-03T00:00", ("2026-06-01T00:00", "2026-06-11T00:00")),
    ],
)
def test_periods_of_other_lengths(books: Books, calendar: str, inside: str, period: tuple[str, str]) -> None:
    books.customer("cus_1", calendar)
    count_at(books, inside)
    [delta] = books.close()
    assert (iso(delta["period_start"]), iso(delta["period_end"])) == period


def test_a_customer_with_periods_of_its_own_has_no_part_in_the_tenants(books: Books) -> None:
    zone = in_zone(books, "Asia/Kathmandu")
    zone.customer("cus_own", "1 month UTC 2026-06-10T00:00:00Z")
    zone.now = "2026-06-09T12:00"
    zone.count(zone.use("a", zone.now, customer_ref="cus_own"), zone.use("b", zone.now, customer_ref="cus_1"))
    assert zone.periods("requests", "cus_own") == {"2026-05-10T00:00": 1}
    assert zone.periods("requests", "cus_1") == {"2026-05-31T18:15": 1}


def test_only_deltas_of_an_anchored_calendar_say_by_when_they_have_to_be_pushed(books: Books) -> None:
    books.meter("levels", "last")
    books.customer("cus_own", "1 month UTC 2026-06-10T00:00:00Z")
    books.now = "2026-06-12T12:00"
    books.count(
        *[
            books.use(f"{customer}/{meter}", books.now, 1, meter, customer_ref=customer)
            for customer in ("cus_own", "cus_1")
            for meter in ("requests", "levels")
        ]
    )
    told = {(one["customer_ref"], one["meter"]): one["push_before"] for one in books.close()}
    assert told.pop(("cus_own", "requests")) == datetime(2026, 7, 10, 0, 55, tzinfo=UTC)
    assert set(told.values()) == {None}
