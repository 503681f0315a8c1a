"""Billing periods that become known late, or change: what was counted moves, what was pushed still meets."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from services.counters.calendars import carry_out_changes
from services.counters.closing import close_round
from tests.integration.books import EPOCH, Books, amounts, iso, open_books, us
from tests.oracle import period_of

NOW = "2026-06-20T12:00"
#: May ends, and June begins, on the 10th at 13:37:42.
ANCHORED = "1 month UTC 2026-06-10T13:37:42Z"
MAY, JUNE = "2026-05-10T13:37:42", "2026-06-10T13:37:42"
LATENESS = 35 * 86_400

AGGREGATIONS = ("sum", "count", "max", "last", "unique")
#: Key, time, value, and who it was of: on both sides of the edge, in hours of their own.
USAGE = [
    ("a", "2026-06-02T10:10", "8", "ada"),
    ("b", "2026-06-02T10:20", "3", "bob"),
    ("c", "2026-06-10T13:20", "2", "ada"),
    ("d", "2026-06-10T14:00", "5", "ada"),
    ("e", "2026-06-19T09:00", "4", "cyd"),
]
#: What May and June amount to by then.
WHOLE = {
    "sum": {MAY: 13, JUNE: 9},
    "count": {MAY: 3, JUNE: 2},
    "max": {MAY: 8, JUNE: 5},
    "last": {MAY: 2, JUNE: 4},
    "unique": {MAY: 2, JUNE: 2},
}


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now=NOW) as books:
        meters(books)
        yield books


def meters(books: Books) -> None:
    books.meter("requests", lateness_seconds=LATENESS)
    for aggregation in AGGREGATIONS:
        value = "user" if aggregation == "unique" else "level"
        books.meter(aggregation, aggregation, value_property=value, lateness_seconds=LATENESS)


def twin_of(books: Books) -> Books:
    """A tenant with the same meters, for what would be had the periods been known from the start."""
    twin = Books(books.db, books.now, "twin").create()
    meters(twin)
    return twin


def use_all(books: Books, usage: list[tuple[str, str, str, str]], *aggregations: str) -> None:
    books.count(
        *[
            books.use(f"{aggregation}/{key}", at, 1, aggregation, level=level, user=user)
            for key, at, level, user in usage
            for aggregation in aggregations or AGGREGATIONS
        ]
    )


def calendar_of(books: Books, meter: str = "requests") -> str:
    row = books.db.execute("SELECT calendar FROM items WHERE item_id = %s", (books.item(meter),)).fetchone()
    assert row is not None
    return str(row[0])


# A mapping that arrives after the events ----------------------------------------------------------------


@pytest.mark.parametrize("settled", [False, True], ids=["before closing", "after everything was pushed"])
def test_periods_that_become_known_after_the_events_are_those_of_one_who_knew_them_from_the_start(
    books: Books, settled: bool
) -> None:
    twin = twin_of(books)
    twin.customer("cus_1", ANCHORED)
    use_all(books, USAGE)
    use_all(twin, USAGE)
    for aggregation in AGGREGATIONS:
        assert list(books.periods(aggregation)) == ["2026-06-01T00:00"]
    if settled:
        books.settle()
    books.customer("cus_1", ANCHORED)
    assert books.change_periods() == 5
    for aggregation in AGGREGATIONS:
        assert books.periods(aggregation) == WHOLE[aggregation] == twin.periods(aggregation)
    assert books.changes() == [(0, 0, 0, True), (5, 20, 0, True)]
    books.settle()
    books.assert_meets()


def test_a_change_is_shown_with_what_it_moved_and_announced_once(books: Books) -> None:
    use_all(books, USAGE, "sum", "max")
    books.customer("cus_1", ANCHORED)
    row = books.db.execute("SELECT customer_ref, calendar, done_at FROM calendar_changes").fetchone()
    assert row == ("cus_1", ANCHORED, None)
    assert books.change_periods() == 2
    assert books.change_periods() == 0
    assert books.changes() == [(2, 8, 0, True)]
    [event] = books.ops("billing_periods_changed")
    assert event["attributes"] == {"tenant": "acme", "items": "2", "buckets": "8", "straddling": "0"}


def test_usage_after_the_change_is_counted_in_the_new_periods_at_once(books: Books) -> None:
    books.count(books.use("a", "2026-06-19T10:00", 1))
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    books.count(books.use("b", "2026-06-19T10:01", 2))
    assert books.buckets() == {("2026-06-19T10:00", JUNE): 3}


def test_a_mapping_without_periods_of_its_own_changes_none(books: Books) -> None:
    books.count(books.use("a", NOW, 1))
    books.customer("cus_1")
    books.db.execute("UPDATE customers SET stripe_customer = 'cus_other'")
    assert (books.change_periods(), books.changes()) == (0, [])


def test_buckets_whose_period_stays_the_same_do_not_move(books: Books) -> None:
    """Months from the first, with and without an anchor."""
    books.count(books.use("a", NOW, 1))
    books.settle()
    books.customer("cus_1", "1 month UTC 2026-01-01T00:00:00Z")
    assert books.change_periods() == 1
    assert books.changes() == [(1, 0, 0, True)]
    assert calendar_of(books) == "1 month UTC 2026-01-01T00:00:00Z"
    assert books.settle() == []


def test_a_bucket_with_events_on_both_sides_of_the_edge_goes_to_the_first_ones_period_and_is_counted(
    books: Books,
) -> None:
    books.count(
        books.use("a", "2026-06-10T13:37:41.999999", 1),
        books.use("b", "2026-06-10T13:37:42", 2),
        books.use("c", "2026-06-10T14:00", 4),
        books.use("d", "2026-06-10T12:59:59.999999", 8),
    )
    books.settle()
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert books.changes() == [(1, 3, 1, True)]
    assert books.periods() == {MAY: 11, JUNE: 4}
    assert books.ops("billing_periods_changed")[0]["attributes"]["straddling"] == "1"
    books.count(books.use("e", "2026-06-10T13:50", 16))
    assert books.periods() == {MAY: 11, JUNE: 20}, "from now on the hour is cut"
    books.settle()
    books.assert_meets()


def test_an_hour_that_ends_or_begins_at_the_edge_does_not_straddle_it(books: Books) -> None:
    books.count(
        books.use("a", "2026-06-10T12:00", 1),
        books.use("b", "2026-06-10T12:59:59.999999", 2),
        books.use("c", "2026-06-10T13:00", 4),
        books.use("d", "2026-06-10T13:59:59.999999", 8),
    )
    books.customer("cus_1", "1 month UTC 2026-06-10T13:00:00Z")
    books.change_periods()
    assert books.changes() == [(1, 2, 0, True)]
    assert books.periods() == {"2026-05-10T13:00": 3, "2026-06-10T13:00": 12}


# What was pushed and what is counted --------------------------------------------------------------------


def test_what_was_pushed_whole_is_not_pushed_again_by_a_sum_or_a_count(books: Books) -> None:
    use_all(books, USAGE, "sum", "count")
    books.settle()
    for calendar in ("1 week UTC", ANCHORED, "1 day Asia/Kathmandu", None):
        books.customer("cus_1", calendar)
        books.change_periods()
        assert books.settle() == [], calendar
    assert (books.carries("sum"), books.carries("count"), books.carried_forward()) == ({}, {}, [])
    books.assert_meets()


def test_max_sends_what_the_new_periods_lack(books: Books) -> None:
    """8 was pushed for all of it; a week of its own with a greatest value of 5 lacks that."""
    use_all(books, USAGE, "max")
    assert sum(one["amount"] for one in books.settle()) == 8
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    assert amounts(books.settle()) == [("2026-06-10T14:00", 5), ("2026-06-19T09:00", 4)]
    assert books.pushed("max") == {"2026-06-01T00:00": 8, "2026-06-08T00:00": 5, "2026-06-15T00:00": 4}
    books.assert_meets()


def test_max_sends_less_of_what_comes_where_the_new_period_was_sent_too_much(books: Books) -> None:
    books.customer("cus_1", "1 week UTC")
    use_all(books, USAGE, "max")
    assert sum(one["amount"] for one in books.settle()) == 17
    books.customer("cus_1", None)
    books.change_periods()
    assert books.settle() == []
    books.count(books.use("f", NOW, 1, "max", level="12"))
    assert books.settle() == []
    books.count(books.use("g", NOW, 1, "max", level="20"))
    assert amounts(books.settle()) == [("2026-06-20T12:00", 3)]
    assert books.pushed("max") == {"2026-06-01T00:00": 20}
    books.assert_meets()


def test_max_carries_nothing_forward_of_a_closed_period_that_was_pushed_whole(books: Books) -> None:
    """Under the new calendar May is closed; its 8 was pushed. Only June's 5 is still owed."""
    use_all(books, USAGE, "max")
    books.settle()
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert amounts(books.settle()) == [("2026-06-10T14:00", 5)]
    assert books.carried_forward() == []
    assert books.pushed("max") == {MAY: 8, JUNE: 5}
    books.assert_meets()


def test_max_carries_nothing_forward_of_an_hour_that_was_pushed_and_that_stripe_takes_no_more(
    books: Books,
) -> None:
    books.count(books.use("a", "2026-06-02T10:00", 1, "max", level="8"))
    books.settle()
    books.now = "2026-07-10T12:00"
    books.db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu'")
    books.change_periods()
    assert books.settle() == []
    assert books.carried_forward() == []
    assert books.periods("max") == books.pushed("max") == {"2026-05-31T18:15": 8}


def test_unique_counts_each_value_again_in_the_new_periods_and_sends_what_they_lack(books: Books) -> None:
    """3 were pushed for all of it; by weeks these are 2, 1 and 1."""
    use_all(books, USAGE, "unique")
    assert sum(one["amount"] for one in books.settle()) == 3
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    weeks = {"2026-06-01T00:00": 2, "2026-06-08T00:00": 1, "2026-06-15T00:00": 1}
    assert books.periods("unique") == weeks
    assert amounts(books.settle()) == [("2026-06-10T13:00", 1)]
    assert books.pushed("unique") == weeks
    books.customer("cus_1", None)
    books.change_periods()
    assert books.periods("unique") == {"2026-06-01T00:00": 3}
    assert books.settle() == []
    use_all(books, [("f", NOW, "1", "dee"), ("g", NOW, "1", "eve"), ("h", NOW, "1", "ada")], "unique")
    assert sum(one["amount"] for one in books.settle()) == 1, "one of the two was pushed before"
    books.assert_meets()


def test_values_of_last_are_not_sent_again_because_periods_changed(books: Books) -> None:
    use_all(books, USAGE, "last")
    books.settle()
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert books.settle() == []
    use_all(books, [("f", "2026-06-02T10:30", "9", "x")], "last")
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["event_at"]), delta["amount"]) == (
        MAY,
        "2026-06-02T10:30",
        9,
    )
    assert books.periods("last") == WHOLE["last"]


def test_two_halves_of_an_hour_that_become_one_keep_what_both_were(books: Books) -> None:
    books.customer("cus_1", ANCHORED)
    halves = [("a", "2026-06-10T13:30", "5", "ada"), ("b", "2026-06-10T13:40", "3", "ada")]
    use_all(books, halves)
    books.settle()
    books.customer("cus_1", None)
    assert books.change_periods() == 5
    assert {meter: books.buckets(meter) for meter in AGGREGATIONS} == {
        meter: {("2026-06-10T13:00", "2026-06-01T00:00"): whole}
        for meter, whole in zip(AGGREGATIONS, (8, 2, 5, 3, 1), strict=True)
    }
    sent = [one for one in books.settle() if one["formula"] == "sum"]
    assert sent == []
    books.assert_meets()


def test_fractions_below_the_scale_are_neither_lost_nor_billed_twice(books: Books) -> None:
    """0.6 in each of six weeks' days: 3.6 in all, of which 3 was pushed."""
    days = ["2026-06-02", "2026-06-03", "2026-06-09", "2026-06-11", "2026-06-16", "2026-06-17"]
    books.count(*[books.use(day, f"{day}T10:00", "0.6") for day in days])
    assert sum(one["amount"] for one in books.settle()) == 3
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    books.settle()
    books.assert_meets()
    assert books.periods() == {
        "2026-06-01T00:00": Decimal("1.2"),
        "2026-06-08T00:00": Decimal("1.2"),
        "2026-06-15T00:00": Decimal("1.2"),
    }
    assert sum(books.pushed().values()) == 3
    books.customer("cus_1", None)
    books.change_periods()
    books.settle()
    books.assert_meets()
    assert books.pushed() == {"2026-06-01T00:00": 3}
    assert books.carries() == {"2026-06-01T00:00": Decimal("0.6")}
    books.count(books.use("more", NOW, "0.4"))
    assert amounts(books.settle()) == [("2026-06-20T12:00", 1)]


def test_what_was_carried_forward_is_not_billed_again_when_its_hours_part(books: Books) -> None:
    """Given late usage of two hours that was carried forward together; then each is of a week of its own."""
    books.customer("cus_1", "1 month UTC 2026-06-15T00:00:00Z")
    books.count(books.use("a", "2026-06-05T10:00", 5), books.use("b", "2026-06-10T10:00", 6))
    assert amounts(books.settle()) == [("2026-06-20T12:00", 11)]
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    assert books.settle() == []
    assert books.carries() == {}
    books.assert_meets()


def test_what_was_carried_forward_is_not_billed_again_when_its_hours_join_their_target(books: Books) -> None:
    books.customer("cus_1", "1 month UTC 2026-06-15T00:00:00Z")
    for aggregation, level in (("sum", "5"), ("max", "7"), ("unique", "1")):
        books.count(
            books.use(f"{aggregation}/a", "2026-06-05T10:00", 1, aggregation, level=level, user="ada"),
            books.use(f"{aggregation}/b", NOW, 1, aggregation, level=level, user="bob"),
        )
    assert sum(one["amount"] for one in books.settle()) == 10 + 14 + 2
    books.customer("cus_1", None)
    books.change_periods()
    assert books.settle() == []
    assert books.pushed("sum") == {"2026-06-01T00:00": 10}
    books.assert_meets()


def test_what_was_carried_into_an_hour_moves_with_it_when_its_push_was_given_back(books: Books) -> None:
    """Given a push that failed late, and whose amount left in the next hour: the hour it was carried into
    holds nothing else any more."""
    books.customer("cus_1", ANCHORED)
    books.count(books.use("a", "2026-06-02T10:00", 1, "max", level="5"))
    [carried] = books.settle()
    assert amounts([carried]) == [("2026-06-20T12:00", 5)]
    books.give_back(carried)
    books.now = "2026-06-20T13:00"
    books.count(books.use("b", books.now, 1, "max", level="7"))
    assert amounts(books.settle()) == [("2026-06-20T13:00", 12)]
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    assert books.settle() == []
    assert books.periods("max") == {"2026-06-01T00:00": 5, "2026-06-15T00:00": 7}
    assert books.carried_forward() == [
        ("2026-06-01T00:00", "2026-06-02T10:00", "2026-06-15T00:00", "2026-06-20T12:00", 5, "period_closed")
    ]
    assert (books.pushed("max"), books.carries("max")) == ({"2026-06-15T00:00": 12}, {})


def test_a_fraction_that_was_carried_forward_moves_to_the_new_period_and_makes_a_unit_there(
    books: Books,
) -> None:
    books.customer("cus_1", ANCHORED)
    books.count(books.use("a", "2026-06-02T10:00", "0.6"))
    assert books.settle() == []
    books.customer("cus_1", "1 week UTC")
    books.change_periods()
    books.settle()
    assert books.carries() == {"2026-06-15T00:00": Decimal("0.6")}
    books.count(books.use("b", NOW, "0.4"))
    assert amounts(books.settle()) == [("2026-06-20T12:00", 1)]
    assert books.carries() == {}
    books.assert_meets()


@pytest.mark.parametrize(("aggregation", "amount"), [("sum", Decimal("-0.8")), ("unique", 2)])
def test_old_hours_that_were_sent_too_little_or_too_much_when_later_ones_leave_carry_that_forward(
    books: Books, aggregation: str, amount: Decimal
) -> None:
    """Given fractions of two hours that were pushed in the earlier, and values that moved to it after they
    were pushed in the later. The earlier is too old for Stripe by now."""
    books.customer("cus_1", "1 year UTC")
    for user in ("ada", "bob"):
        for at, level in (("2026-06-06T10:00", "0.4"), ("2026-05-28T10:00", "0.6")):
            use_all(books, [(f"{user}/{at}", at, level, user)], aggregation)
            books.settle()
    assert books.pushed(aggregation) == {"2026-01-01T00:00": 2}
    books.now = "2026-07-10T12:00"
    books.customer("cus_1", "1 month UTC")
    books.change_periods()
    assert {iso(one["period_start"]) for one in books.settle()} <= {"2026-07-01T00:00"}
    assert books.carried_forward() == [
        ("2026-01-01T00:00", "2026-05-28T10:00", "2026-07-01T00:00", books.now, amount, "too_old_for_stripe")
    ]
    books.assert_meets()


def test_what_a_closed_period_was_sent_too_much_lowers_the_open_one(books: Books) -> None:
    """Given two weeks that were pushed, and a month that holds both and is long over."""
    books.customer("cus_1", "1 week UTC")
    use_all(books, USAGE[:4], "max")
    assert sum(one["amount"] for one in books.settle()) == 8 + 5
    books.now = "2026-07-20T12:00"
    books.customer("cus_1", None)
    books.change_periods()
    assert books.settle() == []
    assert books.carried_forward() == [
        ("2026-06-01T00:00", "2026-06-02T10:00", "2026-07-01T00:00", books.now, -5, "too_old_for_stripe")
    ]
    assert books.carries("max") == {"2026-07-01T00:00": -5}
    books.count(books.use("f", books.now, 1, "max", level="6"))
    assert amounts(books.settle()) == [(books.now, 1)]
    assert books.periods("max") == {"2026-06-01T00:00": 8, "2026-07-01T00:00": 6}
    assert sum(books.pushed("max").values()) == 8 + 6
    books.assert_meets()


def test_what_the_pushers_journal_says_of_an_hour_follows_it(books: Books) -> None:
    books.count(books.use("a", "2026-06-02T10:00", 1), books.use("b", "2026-06-12T10:00", 2))
    for one in books.settle():
        books.db.execute(
            "INSERT INTO meter_events (identifier, item_id, tenant_id, meter, period_start, period_end, "
            "hour_start, event_name, stripe_customer, customer_payload_key, value_payload_key, amount, "
            "event_at, state) VALUES (%s, %s, 'acme', 'requests', %s, %s, %s, 'requests', 'cus_1', 'c', 'v', "
            "%s, %s, 'reported')",
            (
                one["identifier"],
                books.item(),
                *(one[name] for name in ("period_start", "period_end", "hour_start", "amount", "event_at")),
            ),
        )
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    rows = books.db.execute(
        "SELECT amount, period_start, period_end FROM meter_events ORDER BY amount"
    ).fetchall()
    assert [(row[0], iso(row[1]), iso(row[2])) for row in rows] == [
        (1, MAY, JUNE),
        (2, JUNE, "2026-07-10T13:37:42"),
    ]


def test_hours_that_stripe_takes_no_more_and_the_periods_before_them_stay_as_they_were_billed(
    books: Books,
) -> None:
    books.now = "2026-04-02T12:00"
    books.count(books.use("old", "2026-04-02T10:00", 1))
    books.settle()
    books.now = NOW
    books.count(books.use("young", "2026-06-02T10:00", 2))
    books.settle()
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert books.periods() == {"2026-04-01T00:00": 1, MAY: 2}
    assert books.changes() == [(1, 1, 0, True)]
    assert books.settle() == []


# Zones, and changing back and forth ---------------------------------------------------------------------


def test_another_time_zone_of_the_tenant_moves_everybody_without_periods_of_their_own(books: Books) -> None:
    books.customer("cus_own", ANCHORED)
    books.change_periods()
    for customer in ("cus_1", "cus_2", "cus_own"):
        books.count(
            books.use(f"{customer}/a", "2026-05-31T18:10", 1, customer_ref=customer),
            books.use(f"{customer}/b", "2026-05-31T19:00", 2, customer_ref=customer),
        )
    books.settle()
    books.db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu'")
    assert books.change_periods() == 2
    for customer in ("cus_1", "cus_2"):
        assert books.periods("requests", customer) == {"2026-04-30T18:15": 1, "2026-05-31T18:15": 2}
    assert books.periods("requests", "cus_own") == {MAY: 3}
    books.count(books.use("new", "2026-05-31T18:20", 4, customer_ref="cus_3"))
    assert books.periods("requests", "cus_3") == {"2026-05-31T18:15": 4}
    assert books.changes()[1:] == [(2, 4, 0, True)]
    books.settle()
    books.assert_meets()


def test_another_tenants_time_zone_is_no_concern_of_this_one(books: Books) -> None:
    other = twin_of(books)
    books.count(books.use("a", NOW, 1))
    other.count(other.use("a", NOW, 1))
    books.db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu' WHERE tenant_id = 'twin'")
    assert books.change_periods() == 1
    assert books.periods() == {"2026-06-01T00:00": 1}
    assert other.periods() == {"2026-05-31T18:15": 1}


def test_a_customer_that_loses_its_periods_goes_back_to_its_tenants(books: Books) -> None:
    books.customer("cus_1", ANCHORED)
    use_all(books, USAGE)
    books.settle()
    books.customer("cus_1", None)
    assert books.change_periods() == 5
    whole = {"sum": 22, "count": 5, "max": 8, "last": 4, "unique": 3}
    assert {meter: books.periods(meter) for meter in AGGREGATIONS} == {
        meter: {"2026-06-01T00:00": amount} for meter, amount in whole.items()
    }
    books.settle()
    books.assert_meets()


def test_periods_that_change_there_and_back_before_anything_was_carried_out_move_nothing(
    books: Books,
) -> None:
    books.count(books.use("a", "2026-06-02T10:00", 1))
    books.settle()
    books.customer("cus_1", ANCHORED)
    books.customer("cus_1", None)
    books.change_periods()
    assert {row[:3] for row in books.changes()} == {(0, 0, 0)}
    assert books.settle() == []


def test_periods_that_change_back_and_forth_never_use_an_identifier_again(books: Books) -> None:
    seen: set[str] = set()
    for number, calendar in enumerate(
        [ANCHORED, None, "1 week UTC", ANCHORED, None, ANCHORED, "1 week UTC", None]
    ):
        use_all(books, [(f"k{number}", "2026-06-19T10:00", str(number), f"user-{number}")])
        for delta in books.settle():
            assert delta["identifier"] not in seen
            seen.add(delta["identifier"])
        books.assert_meets()
        books.customer("cus_1", calendar)
        books.change_periods()
    whole = {"sum": 28, "count": 8, "max": 7, "last": 7, "unique": 8}
    assert {meter: books.periods(meter) for meter in AGGREGATIONS} == {
        meter: {"2026-06-01T00:00": amount} for meter, amount in whole.items()
    }
    assert [books.pushed(meter) for meter in ("sum", "count", "max", "unique")] == [
        {"2026-06-01T00:00": whole[meter]} for meter in ("sum", "count", "max", "unique")
    ]
    assert len(seen) == 8 * 5 - 2, "each value, but for the first 0 of a sum and of a max"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_in_whatever_order_periods_are_right_and_pushes_meet_them(
    books: Books, seed: int
) -> None:
    """Random usage, closing, settling of single hours and changes of periods, with edges at full hours."""
    dice = random.Random(seed)  # noqa: S311
    calendars = [
        None,
        "1 week UTC",
        "1 day UTC",
        "1 month Europe/Budapest",
        "1 month UTC 2026-06-08T00:00:00Z",
        "1 week America/Los_Angeles 2026-06-03T07:00:00Z",
    ]
    calendar: str | None = None
    used: list[tuple[str, str, str]] = []
    sent: list[dict[str, Any]] = []
    for step in range(60):
        match dice.choice(("use", "use", "use", "close", "push", "change")):
            case "use":
                hour = us("2026-05-28T00:00") // 10**6 + 3600 * dice.randrange(23 * 24)
                at = iso(datetime.fromtimestamp(hour + dice.randrange(3600), UTC))
                value, user = str(dice.randrange(20)), dice.choice("abcdef")
                used.append((at, value, user))
                use_all(books, [(f"k{step:02}", at, value, user)])
            case "close":
                sent += books.close()
            case "push":
                books.db.execute(
                    "UPDATE buckets SET open = false "
                    "WHERE open AND extract(hour FROM hour_start)::int %% 2 = %s",
                    (dice.randrange(2),),
                )
            case "change":
                calendar = dice.choice(calendars)
                books.customer("cus_1", calendar)
                if dice.random() < 0.7:
                    books.change_periods()
    sent += books.settle()
    books.change_periods()
    sent += books.settle()
    assert all(done for *_, done in books.changes())
    expected = periods_of(used, calendar or "1 month UTC")
    for meter in AGGREGATIONS:
        assert books.periods(meter) == expected[meter], meter
    books.assert_meets()
    for meter in ("sum", "count"):
        mine = sum((one["amount"] for one in sent if one["meter"] == meter), Decimal(0))
        assert mine == sum(expected[meter].values()), meter
        assert books.carries(meter) == {}


def periods_of(used: list[tuple[str, str, str]], calendar: str) -> dict[str, dict[str, Decimal]]:
    """What the events amount to in their periods, by aggregation; nothing where that is 0."""
    by_period: dict[str, list[tuple[str, int, str]]] = {}
    for number, (at, value, user) in enumerate(used):
        start = period_of(calendar, us(at) // 10**6)[0]
        place = by_period.setdefault(iso(datetime.fromtimestamp(start, UTC)), [])
        place.append((f"{us(at)}/{number:03}", int(value), user))
    whole: dict[str, dict[str, Decimal]] = {aggregation: {} for aggregation in AGGREGATIONS}
    for period, inside in by_period.items():
        values = [value for _, value, _ in inside]
        whole["sum"][period] = Decimal(sum(values))
        whole["count"][period] = Decimal(len(values))
        whole["max"][period] = Decimal(max(values))
        whole["last"][period] = Decimal(max(inside)[1])
        whole["unique"][period] = Decimal(len({user for *_, user in inside}))
    return {
        aggregation: {period: amount for period, amount in periods.items() if amount}
        for aggregation, periods in whole.items()
    }


# Waiting ------------------------------------------------------------------------------------------------


def test_an_item_with_a_push_under_way_waits_and_others_of_the_customer_do_not(books: Books) -> None:
    use_all(books, [("a", "2026-06-02T10:00", "1", "ada")], "sum")
    books.close()
    use_all(books, [("b", "2026-06-02T10:00", "1", "ada")], "count")
    books.customer("cus_1", ANCHORED)
    assert books.change_periods() == 1
    assert books.periods("count") == {MAY: 1}
    assert books.periods("sum") == {"2026-06-01T00:00": 1}
    assert books.changes() == [(1, 1, 0, False)]
    assert books.ops("billing_periods_changed") == []
    use_all(books, [("c", "2026-06-02T11:00", "2", "ada")], "sum")
    assert books.periods("sum") == {"2026-06-01T00:00": 3}, "meanwhile it counts where it did"
    books.push()
    assert books.change_periods() == 1
    assert books.periods("sum") == {MAY: 3}
    assert books.changes() == [(2, 3, 0, True)]
    assert len(books.ops("billing_periods_changed")) == 1
    books.settle()
    books.assert_meets()


def test_a_change_that_waits_does_not_hold_up_those_of_other_customers(books: Books) -> None:
    books.count(
        books.use("a", "2026-06-02T10:00", 1, customer_ref="cus_1"),
        books.use("b", "2026-06-02T10:00", 1, customer_ref="cus_2"),
    )
    books.close()
    books.db.execute("UPDATE buckets SET open = false WHERE item_id = %s", (books.item("requests", "cus_2"),))
    books.customer("cus_1", ANCHORED)
    books.customer("cus_2", ANCHORED)
    for _ in range(3):
        books.change_periods()
    assert books.periods("requests", "cus_2") == {MAY: 1}
    assert books.periods("requests", "cus_1") == {"2026-06-01T00:00": 1}


def test_one_tick_of_the_timer_carries_out_the_changes_of_any_number_of_customers_without_usage(
    books: Books,
) -> None:
    for number in range(20):
        books.customer(f"new-{number}", ANCHORED)
    books.count(books.use("a", "2026-06-02T10:00", 1))
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert [row[3] for row in books.changes()] == [True] * 21
    assert books.periods() == {MAY: 1}


def test_a_change_of_more_items_than_one_transaction_moves_is_carried_out_whole(books: Books) -> None:
    books.count(*[books.use(f"k{n}", "2026-05-31T20:00", 1, customer_ref=f"cus_{n}") for n in range(450)])
    books.db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu'")
    assert books.change_periods() == 450
    assert books.changes() == [(450, 450, 0, True)]
    assert len(books.ops("billing_periods_changed")) == 1
    assert books.db.execute("SELECT DISTINCT calendar FROM items").fetchall() == [("1 month Asia/Kathmandu",)]


def test_items_that_wait_are_not_in_the_way_of_more_than_a_transactions_worth_of_others(books: Books) -> None:
    books.count(*[books.use(f"k{n}", "2026-05-31T20:00", 1, customer_ref=f"cus_{n}") for n in range(250)])
    books.close()
    books.count(
        *[books.use(f"l{n}", "2026-05-31T20:00", 1, customer_ref=f"cus_{n}") for n in range(250, 300)]
    )
    books.db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu'")
    assert books.change_periods() == 50
    books.push()
    assert books.change_periods() == 250
    assert books.changes() == [(300, 300, 0, True)]


# At the same moment -------------------------------------------------------------------------------------


def change_calendar(db: psycopg.Connection[Any], what: str) -> None:
    if what == "tenant":
        db.execute("UPDATE tenants SET timezone = 'Asia/Kathmandu' WHERE tenant_id = 'acme'")
    else:
        db.execute("INSERT INTO customers VALUES ('acme', 'cus_1', 'cus_1', now(), '1 month Asia/Kathmandu')")


@pytest.mark.parametrize("known", [True, False], ids=["known item", "new item"])
@pytest.mark.parametrize("what", ["tenant", "customer"])
@pytest.mark.parametrize("first", ["chunk", "change"])
def test_a_chunk_that_is_counted_while_periods_change_never_leaves_an_item_in_the_old_ones(
    books: Books, postgres_dsn: str, first: str, what: str, known: bool
) -> None:
    """Given a chunk that cannot see the change, and ends only after the change and a round of the timer."""
    if known:
        books.count(books.use("before", "2026-05-31T20:00", 1))
    books.await_contemporaries()
    carried_out = threading.Event()

    def timer() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as db:
            while carry_out_changes(db, us(NOW)):
                pass
        carried_out.set()

    with psycopg.connect(postgres_dsn) as chunk, psycopg.connect(postgres_dsn) as change:
        if first == "change":
            change_calendar(change, what)
        books.count(books.use("meanwhile", "2026-05-31T20:10", 2), db=chunk)
        if first == "chunk":
            change_calendar(change, what)
        change.commit()
        thread = threading.Thread(target=timer)
        thread.start()
        carried_out.wait(1)
        chunk.commit()
        thread.join(30)
    books.change_periods()
    assert calendar_of(books) == "1 month Asia/Kathmandu"
    assert books.periods() == {"2026-05-31T18:15": 3 if known else 2}
    assert [row[3] for row in books.changes()] == [True]
    books.settle()
    books.assert_meets()


def test_an_item_that_is_closed_at_the_moment_of_the_change_waits_for_its_push(
    books: Books, postgres_dsn: str
) -> None:
    """Given a round of closing by another worker that began before the item was looked at."""
    books.count(books.use("a", "2026-06-02T10:00", 1))
    books.customer("cus_1", ANCHORED)
    books.await_contemporaries()
    with psycopg.connect(postgres_dsn) as closing:
        assert close_round(closing, now_us=us(NOW)) == (1, 1)

        def timer() -> None:
            with psycopg.connect(postgres_dsn, autocommit=True) as db:
                carry_out_changes(db, us(NOW))

        thread = threading.Thread(target=timer)
        thread.start()
        time.sleep(1)
        closing.commit()
        thread.join(30)
    assert amounts(books.new_deltas()) == [("2026-06-02T10:00", 1)]
    assert books.db.execute("SELECT open FROM buckets").fetchall() == [(True,)]
    assert books.periods() == {"2026-06-01T00:00": 1}
    books.push()
    books.change_periods()
    assert books.periods() == {MAY: 1}
    assert books.settle() == []
    books.assert_meets()


def test_the_timer_and_chunks_at_full_speed_end_in_the_new_periods(books: Books, postgres_dsn: str) -> None:
    """Given four workers that count, close and move at once, while the calendar changes again and again."""
    stop, failures = threading.Event(), []
    customers = [f"cus_{n}" for n in range(6)]

    def repeat(work: Any) -> threading.Thread:
        def loop() -> None:
            with psycopg.connect(postgres_dsn, autocommit=True) as db:
                while not stop.is_set():
                    try:
                        work(db)
                    except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                        continue  # a worker tries again
                    except BaseException as error:
                        failures.append(error)
                        return

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    numbers = iter(range(10**9))
    counting = Books(books.db, NOW)

    def count(db: psycopg.Connection[Any]) -> None:
        number = next(numbers)
        uses = [
            counting.use(f"{number}/{c}", f"2026-06-{1 + number % 19:02}T10:00", 1, customer_ref=c)
            for c in customers
        ]
        counting.count(*uses, db=db)
        counted.append(len(uses))

    def push(db: psycopg.Connection[Any]) -> None:
        db.execute("UPDATE buckets SET open = false WHERE open")

    counted: list[int] = []
    threads = [
        repeat(count),
        repeat(lambda db: close_round(db, now_us=us(NOW))),
        repeat(lambda db: carry_out_changes(db, us(NOW))),
        repeat(push),
    ]
    for number in range(12):
        time.sleep(0.25)
        for customer in customers:
            books.customer(customer, [ANCHORED, "1 week UTC", None][number % 3])
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    books.push()
    books.change_periods()
    books.settle()
    assert all(done for *_, done in books.changes())
    books.assert_meets()
    each = Decimal(sum(counted)) / len(customers)
    for customer in customers:
        assert books.periods("requests", customer) == {"2026-06-01T00:00": each}
        assert sum(books.pushed("requests", customer).values()) == each


def test_times_are_kept_to_the_microsecond(books: Books) -> None:
    """First and last event decide about straddling, so they must be exact after buckets have merged."""
    books.customer("cus_1", ANCHORED)
    books.count(books.use("a", "2026-06-10T13:37:41.999999", 1), books.use("b", "2026-06-10T13:37:42", 2))
    books.customer("cus_1", None)
    books.change_periods()
    rows = books.db.execute("SELECT first_event, last_event FROM buckets WHERE events > 0").fetchall()
    assert [[(at - EPOCH).microseconds for at in row] for row in rows] == [[999_999, 0]]
    books.customer("cus_1", ANCHORED)
    books.change_periods()
    assert books.changes()[-1] == (1, 1, 1, True)
    assert books.periods() == {MAY: 3}
