"""The end of a billing period: what still reaches its invoice, and what is carried forward into the next."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from services.counters.deltas import Invoices
from tests.integration.books import Books, amounts, iso, open_books

#: The customer's periods: June ends on the 15th at 13:37:42, and its invoice is final an hour after.
CALENDAR = "1 month UTC 2026-01-15T13:37:42Z"
JUNE, JULY, AUGUST = "2026-05-15T13:37:42", "2026-06-15T13:37:42", "2026-07-15T13:37:42"
#: The last safe moment to push June: its end, an hour, less five minutes.
PUSH_BEFORE = "2026-06-15T14:32:42"
OPEN, FINAL = "2026-06-15T14:32:41.999999", PUSH_BEFORE


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now="2026-06-15T13:00") as books:
        books.meter("requests", lateness_seconds=35 * 86_400, scale=1)
        books.customer("cus_1", CALENDAR)
        yield books


def at(books: Books, now: str, *uses: dict[str, Any]) -> None:
    books.now = now
    books.count(*uses)


def by_period(deltas: list[dict[str, Any]]) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = {}
    for one in deltas:
        period = iso(one["period_start"])
        sums[period] = sums.get(period, Decimal(0)) + one["amount"]
    return sums


def assert_nothing_was_pushed_late(books: Books, deltas: list[dict[str, Any]], final: str) -> None:
    """No delta that was closed at ``final`` or later is for a period that ended by then."""
    moment = datetime.fromisoformat(final).replace(tzinfo=UTC)
    late = [one for one in deltas if one["closed_at"] >= moment and one["push_before"] <= one["closed_at"]]
    assert late == []


# Before and after the last safe moment ------------------------------------------------------------------


def test_usage_that_comes_before_the_last_safe_moment_goes_to_its_own_period_and_says_until_when(
    books: Books,
) -> None:
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 5))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["event_at"]), delta["amount"]) == (
        JUNE,
        "2026-06-15T13:00",
        5,
    )
    assert iso(delta["push_before"]) == PUSH_BEFORE
    assert books.carried_forward() == []


def test_usage_that_comes_after_it_is_carried_into_the_hour_open_now_and_that_is_shown_once(
    books: Books,
) -> None:
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 5))
    books.settle()
    at(books, FINAL, books.use("b", "2026-06-15T13:31", 2), books.use("c", "2026-06-10T10:00", 1))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["hour_start"]), delta["amount"]) == (
        JULY,
        "2026-06-15T14:00",
        3,
    )
    assert iso(delta["event_at"]) == "2026-06-15T14:00"
    assert iso(delta["push_before"]) == "2026-07-15T14:32:42"
    assert books.carried_forward() == [
        (JUNE, "2026-06-10T10:00", JULY, "2026-06-15T14:00", 1, "period_closed"),
        (JUNE, "2026-06-15T13:00", JULY, "2026-06-15T14:00", 2, "period_closed"),
    ]
    [event] = books.ops("usage_carried_forward")
    assert event["attributes"] == {"reason": "period_closed", "tenant": "acme", "meter": "requests"}
    assert books.periods() == {JUNE: 8}, "the counters still say when it was used"
    assert books.pushed() == {JUNE: 5, JULY: 3}
    books.assert_meets()
    assert books.settle() == []
    books.now = "2026-06-16T00:00"
    assert books.settle() == []
    assert (len(books.carried_forward()), len(books.ops("usage_carried_forward"))) == (2, 1)


def test_a_closed_period_is_never_pushed_again_whatever_comes(books: Books) -> None:
    sent = []
    moments = [OPEN, FINAL, "2026-06-15T15:10", "2026-06-15T15:20", "2026-06-20T00:00", "2026-07-10T00:00"]
    for number, now in enumerate(moments):
        at(
            books,
            now,
            books.use(f"old-{number}", "2026-06-15T13:30", 10),
            books.use(f"new-{number}", now, 1),
        )
        sent += books.settle()
    assert_nothing_was_pushed_late(books, sent, FINAL)
    assert by_period(sent) == {JUNE: 10, JULY: 56}
    assert len(books.carried_forward()) == len(books.ops("usage_carried_forward")) == 5
    assert books.periods() == {JUNE: 60, JULY: 6}
    books.assert_meets()


def test_what_is_carried_forward_joins_the_open_hours_own_usage_in_one_delta(books: Books) -> None:
    at(books, FINAL, books.use("a", "2026-06-15T13:30", 5), books.use("b", "2026-06-15T14:30", 3))
    [delta] = books.settle()
    assert (iso(delta["hour_start"]), delta["amount"], delta["sequence"]) == ("2026-06-15T14:00", 8, 1)
    at(
        books,
        "2026-06-15T14:40",
        books.use("c", "2026-06-15T14:35", 1),
        books.use("d", "2026-06-01T00:00", 2),
    )
    [delta] = books.settle()
    assert (iso(delta["hour_start"]), delta["amount"], delta["sequence"]) == ("2026-06-15T14:00", 3, 2)
    books.assert_meets()


def test_grace_and_margin_are_settings_and_no_margin_closes_a_period_before_its_end(books: Books) -> None:
    at(books, "2026-06-15T13:37:43", books.use("a", "2026-06-15T13:30", 5))
    strict = Invoices(grace_us=0, margin_us=300_000_000)
    [delta] = books.settle(strict)
    assert (iso(delta["period_start"]), len(books.carried_forward())) == (JULY, 1)
    long = Invoices(grace_us=72 * 3_600_000_000, margin_us=0)
    at(books, "2026-06-18T13:37:41.999999", books.use("b", "2026-06-15T13:30", 5))
    [delta] = books.settle(long)
    assert (iso(delta["period_start"]), iso(delta["push_before"])) == (JUNE, "2026-06-18T13:37:42")


def test_usage_before_the_end_of_the_period_is_never_carried_however_great_the_margin(books: Books) -> None:
    at(books, "2026-06-15T13:37:41.999999", books.use("a", "2026-06-15T13:37:41", 5))
    [delta] = books.settle(Invoices(grace_us=0, margin_us=86_400_000_000))
    assert iso(delta["period_start"]) == JUNE


def test_a_customer_that_is_mapped_after_its_period_closed_has_all_of_it_carried_forward(
    books: Books,
) -> None:
    books.db.execute("DELETE FROM customers")
    at(
        books,
        "2026-06-15T13:00",
        books.use("a", "2026-06-10T10:00", 5, customer_ref="new"),
        books.use("b", "2026-06-12T10:00", 6, customer_ref="new"),
    )
    assert books.settle() == []
    books.now = "2026-06-15T16:00"
    books.customer("new", CALENDAR)
    books.change_periods()
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["hour_start"]), delta["amount"]) == (
        JULY,
        "2026-06-15T16:00",
        11,
    )
    assert books.carried_forward() == [
        (JUNE, "2026-06-10T10:00", JULY, "2026-06-15T16:00", 5, "period_closed"),
        (JUNE, "2026-06-12T10:00", JULY, "2026-06-15T16:00", 6, "period_closed"),
    ]


def test_an_approved_adjustment_of_a_closed_period_is_carried_forward(books: Books) -> None:
    books.meter("strict", lateness_seconds=0)
    at(
        books,
        OPEN,
        books.use("a", "2026-06-15T13:30", 5, "strict"),
        books.use("b", "2026-06-14T13:30", 2, "strict"),
    )
    assert by_period(books.settle()) == {JUNE: 5}
    books.now = "2026-06-16T09:30"
    books.decide("b", approved=True)
    assert books.apply_approved() == 1
    assert books.hours("strict")["2026-06-14T13:00"] == 2
    [delta] = books.settle()
    assert (iso(delta["period_start"]), amounts([delta])) == (JULY, [("2026-06-16T09:00", 2)])
    books.assert_meets()


# Fractions, negatives, aggregations ---------------------------------------------------------------------


def test_fractions_are_carried_forward_exactly_and_billed_when_they_make_a_unit(books: Books) -> None:
    at(books, OPEN, books.use("a", "2026-06-15T13:30", "1.04"))
    assert by_period(books.settle()) == {JUNE: 1}
    at(books, FINAL, books.use("b", "2026-06-15T13:31", "0.03"))
    assert books.settle() == []
    assert books.carries() == {JUNE: Decimal("0.04"), JULY: Decimal("0.03")}
    at(books, "2026-06-15T16:00", books.use("c", "2026-06-15T13:32", "0.08"))
    assert amounts(books.settle()) == [("2026-06-15T16:00", Decimal("0.1"))]
    assert books.carries() == {JUNE: Decimal("0.04"), JULY: Decimal("0.01")}
    books.assert_meets()


def test_a_correction_of_a_closed_period_lowers_the_open_one(books: Books) -> None:
    books.meter("credits", allow_negative=True, lateness_seconds=35 * 86_400)
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 5, "credits"))
    books.settle()
    at(books, FINAL, books.use("b", "2026-06-15T13:31", -7, "credits"))
    assert amounts(books.settle()) == [("2026-06-15T14:00", -7)]
    assert books.carried_forward() == [
        (JUNE, "2026-06-15T13:00", JULY, "2026-06-15T14:00", -7, "period_closed")
    ]
    assert books.pushed("credits") == {JUNE: 5, JULY: -7}
    books.assert_meets()


def test_differences_of_a_closed_period_that_cancel_out_send_nothing(books: Books) -> None:
    books.meter("credits", allow_negative=True, lateness_seconds=35 * 86_400)
    at(
        books,
        FINAL,
        books.use("a", "2026-06-15T13:31", -7, "credits"),
        books.use("b", "2026-06-14T13:31", 7, "credits"),
    )
    assert books.settle() == []
    assert sum(row[4] for row in books.carried_forward()) == 0
    books.assert_meets()


def test_max_carries_only_by_how_much_the_closed_period_rose(books: Books) -> None:
    books.meter("peaks", "max", lateness_seconds=35 * 86_400)
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 10, "peaks"))
    books.settle()
    at(
        books,
        FINAL,
        books.use("b", "2026-06-15T12:30", 13, "peaks"),
        books.use("c", "2026-06-15T11:30", 12, "peaks"),
        books.use("d", "2026-06-15T14:10", 4, "peaks"),
    )
    sent = books.settle()
    assert by_period(sent) == {JULY: 7}
    assert books.carried_forward() == [
        (JUNE, "2026-06-15T12:00", JULY, "2026-06-15T14:00", 3, "period_closed")
    ]
    at(books, "2026-06-15T15:00", books.use("e", "2026-06-15T14:50", 6, "peaks"))
    assert by_period(books.settle()) == {JULY: 2}
    assert books.periods("peaks") == {JUNE: 13, JULY: 6}
    books.assert_meets()


def test_unique_carries_the_number_of_values_that_are_new_to_the_closed_period(books: Books) -> None:
    books.meter("users", "unique", value_property="user", lateness_seconds=35 * 86_400)
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 1, "users", user="ada"))
    books.settle()
    at(
        books,
        FINAL,
        books.use("b", "2026-06-15T12:30", 1, "users", user="ada"),
        books.use("c", "2026-06-15T12:30", 1, "users", user="bob"),
        books.use("d", "2026-06-15T14:10", 1, "users", user="bob"),
    )
    assert by_period(books.settle()) == {JULY: 2}
    assert sum(row[4] for row in books.carried_forward()) == 1
    assert books.periods("users") == {JUNE: 2, JULY: 1}
    books.assert_meets()


def test_count_carries_the_number_of_events(books: Books) -> None:
    books.meter("calls", "count", lateness_seconds=35 * 86_400)
    at(books, FINAL, *[books.use(f"k{n}", f"2026-06-15T13:3{n}", 9, "calls") for n in range(3)])
    assert by_period(books.settle()) == {JULY: 3}


def test_last_is_never_carried_forward(books: Books) -> None:
    books.meter("levels", "last", lateness_seconds=35 * 86_400)
    at(books, FINAL, books.use("a", "2026-06-15T13:30:05", 5, "levels"))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["event_at"])) == (JUNE, "2026-06-15T13:30:05")
    assert delta["push_before"] is None
    assert books.carried_forward() == [] == books.ops("usage_carried_forward")


def test_dimensions_are_carried_item_by_item(books: Books) -> None:
    books.meter("split", dimensions=["region"], lateness_seconds=35 * 86_400)
    at(
        books,
        FINAL,
        books.use("a", "2026-06-15T13:30", 5, "split", region="eu"),
        books.use("b", "2026-06-15T13:30", 6, "split", region="us"),
    )
    sent = {one["dimensions"]["region"]: (iso(one["period_start"]), one["amount"]) for one in books.settle()}
    assert sent == {"eu": (JULY, 5), "us": (JULY, 6)}
    assert len(books.carried_forward()) == 2


# Hours that are under way -------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum", "max", "unique"])
def test_what_should_be_carried_waits_while_the_open_hours_delta_is_under_way_and_then_goes(
    books: Books, aggregation: str
) -> None:
    books.meter("metered", aggregation, value_property="value", lateness_seconds=35 * 86_400)
    at(books, FINAL, books.use("a", "2026-06-15T14:10", 1, "metered", value="4"))
    books.close()
    at(
        books,
        "2026-06-15T14:40",
        books.use("b", "2026-06-15T13:30", 1, "metered", value="7"),
        books.use("c", "2026-06-15T12:30", 1, "metered", value="6"),
    )
    for _ in range(3):
        assert books.close() == []
        assert books.carried_forward() == []
    expected = {"sum": 13, "max": 7, "unique": 2}[aggregation]
    assert amounts(books.settle()) == [("2026-06-15T14:00", expected)]
    assert sum(row[4] for row in books.carried_forward()) == expected
    assert len(books.ops("usage_carried_forward")) == 1
    books.assert_meets()
    assert books.settle() == []
    assert not books.db.execute("SELECT FROM items WHERE dirty_from IS NOT NULL").fetchall()


def test_every_hour_that_waits_for_the_open_hour_is_closed_when_that_is_settled(books: Books) -> None:
    """Of a maximum only the highest hour is carried; the lower one before it changed too."""
    books.meter("peaks", "max", lateness_seconds=35 * 86_400)
    at(books, FINAL, books.use("a", "2026-06-15T14:10", 4, "peaks"))
    books.close()
    at(
        books,
        FINAL,
        books.use("b", "2026-06-15T13:30", 7, "peaks"),
        books.use("c", "2026-06-15T12:30", 6, "peaks"),
    )
    assert books.close() == []
    assert by_period(books.settle()) == {JULY: 7}
    rows = books.db.execute("SELECT hour_start FROM buckets WHERE closed IS DISTINCT FROM total").fetchall()
    assert rows == []


def test_while_it_waits_the_other_hours_of_the_open_period_go_on(books: Books) -> None:
    at(books, FINAL, books.use("a", "2026-06-15T14:10", 1))
    books.close()
    at(
        books,
        "2026-06-15T14:50",
        books.use("b", "2026-06-15T13:30", 7),
        books.use("c", "2026-06-15T13:40", 2),
    )
    assert amounts(books.close()) == [("2026-06-15T13:00", 2)], "that part of the hour is of the open period"
    assert amounts(books.settle()) == [("2026-06-15T14:00", 7)]
    books.assert_meets()


def test_it_goes_into_the_next_hour_when_that_has_come_meanwhile(books: Books) -> None:
    at(books, FINAL, books.use("a", "2026-06-15T14:10", 1))
    books.close()
    at(books, "2026-06-15T14:50", books.use("b", "2026-06-15T13:30", 7))
    assert books.close() == []
    books.now = "2026-06-15T15:00"
    assert amounts(books.close()) == [("2026-06-15T15:00", 7)]
    books.assert_meets()


def test_an_hour_that_was_under_way_when_its_period_closed_settles_and_its_rest_is_carried(
    books: Books,
) -> None:
    at(books, OPEN, books.use("a", "2026-06-15T13:30", 5))
    assert by_period(books.close()) == {JUNE: 5}
    at(books, FINAL, books.use("b", "2026-06-15T13:31", 2))
    assert books.close() == []
    assert by_period(books.settle()) == {JULY: 2}
    books.assert_meets()


def test_usage_is_carried_over_several_periods_at_once(books: Books) -> None:
    """Given late usage of two closed periods, each is shown by itself."""
    at(
        books,
        "2026-06-15T14:40",
        books.use("a", "2026-05-15T13:30", 5),
        books.use("b", "2026-06-15T13:30", 6),
    )
    assert by_period(books.settle()) == {JULY: 11}
    assert [(row[0], row[4]) for row in books.carried_forward()] == [("2026-04-15T13:37:42", 5), (JUNE, 6)]
    assert len({one["ops_event_id"] for one in books.ops("usage_carried_forward")}) == 2
    books.assert_meets()


# Hours that Stripe takes no more ------------------------------------------------------------------------


def test_hours_that_stripe_takes_no_more_are_carried_forward_in_any_calendar(books: Books) -> None:
    """Given a customer that was mapped 34.5 days later, to the hour."""
    at(
        books,
        "2026-06-05T12:00",
        books.use("gone", "2026-06-05T09:59", 5, customer_ref="new"),
        books.use("fits", "2026-06-05T10:00", 3, customer_ref="new"),
    )
    books.now = "2026-07-09T22:00"
    books.db.execute("INSERT INTO customers VALUES ('acme', 'new', 'cus_new')")
    sent = books.settle()
    assert amounts(sent) == [("2026-06-05T10:00", 3), ("2026-07-09T22:00", 5)]
    assert books.carried_forward() == [
        (
            "2026-06-01T00:00",
            "2026-06-05T09:00",
            "2026-07-01T00:00",
            "2026-07-09T22:00",
            5,
            "too_old_for_stripe",
        )
    ]
    [event] = books.ops("usage_carried_forward")
    assert event["attributes"]["reason"] == "too_old_for_stripe"
    assert {one["push_before"] for one in sent} == {None}
    books.assert_meets()


@pytest.mark.parametrize(("aggregation", "amount"), [("sum", 12), ("max", 7), ("unique", 2), ("count", 2)])
def test_an_old_hour_and_the_open_one_may_be_of_the_same_period(
    books: Books, aggregation: str, amount: int
) -> None:
    books.meter("metered", aggregation, value_property="value")
    books.db.execute("UPDATE customers SET calendar = '1 year UTC 2026-01-01T00:00:00Z'")
    books.db.execute("UPDATE customers SET customer_ref = 'new'")
    books.now = "2026-06-05T12:00"
    books.count(books.use("a", "2026-06-05T09:00", 1, "metered", value="7", customer_ref="new"))
    books.now = "2026-07-20T22:30"
    books.count(books.use("b", "2026-07-20T22:10", 1, "metered", value="5", customer_ref="new"))
    sent = books.settle()
    assert sum(one["amount"] for one in sent) == amount
    assert {iso(one["hour_start"]) for one in sent} == {"2026-07-20T22:00"}
    assert [row[5] for row in books.carried_forward()] == ["too_old_for_stripe"]
    books.assert_meets()
    assert books.settle() == []


def test_an_old_hour_that_makes_up_for_one_that_fell_sends_nothing_itself(books: Books) -> None:
    """Given a value that moves to an hour that is too old, after it was pushed in a later hour, and another
    one there that is new."""
    books.meter("users", "unique", value_property="user", lateness_seconds=35 * 86_400)
    books.customer("cus_1", "1 year UTC 2026-01-01T00:00:00Z")
    books.change_periods()
    at(books, "2026-06-15T13:00", books.use("a", "2026-06-15T12:00", 1, "users", user="ada"))
    books.settle()
    at(
        books,
        "2026-06-15T13:00",
        books.use("b", "2026-05-13T09:00", 1, "users", user="ada"),
        books.use("c", "2026-05-13T10:00", 1, "users", user="bob"),
    )
    books.now = "2026-06-20T13:00"
    assert amounts(books.settle()) == [("2026-06-20T13:00", 1)]
    assert [row[1] for row in books.carried_forward()] == ["2026-05-13T10:00"]
    books.assert_meets()


def test_values_of_last_that_stripe_takes_no_more_are_kept_and_not_sent(books: Books) -> None:
    books.meter("levels", "last")
    at(books, "2026-06-05T12:00", books.use("a", "2026-06-05T09:00", 5, "levels", customer_ref="new"))
    books.now = "2026-07-20T22:30"
    books.db.execute("INSERT INTO customers VALUES ('acme', 'new', 'cus_new')")
    assert books.settle() == []
    assert books.hours("levels", "new") == {"2026-06-05T09:00": 5}
    assert books.carried_forward() == []


def test_months_without_an_anchor_are_never_closed(books: Books) -> None:
    at(books, "2026-06-10T00:00", books.use("a", "2026-06-10T00:00", 1, customer_ref="cus_free"))
    books.settle()
    at(books, "2026-07-04T00:00", books.use("b", "2026-06-10T00:30", 2, customer_ref="cus_free"))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), delta["amount"]) == ("2026-06-01T00:00", 2)
    assert delta["push_before"] is None
    assert books.carried_forward() == []


def test_an_empty_hour_that_only_took_what_was_carried_counts_its_own_usage_afterwards(books: Books) -> None:
    at(books, FINAL, books.use("a", "2026-06-15T13:30", 5))
    books.settle()
    at(
        books,
        "2026-06-15T14:59",
        books.use("b", "2026-06-15T14:20", 1),
        books.use("c", "2026-06-15T14:40", 1),
    )
    assert amounts(books.settle()) == [("2026-06-15T14:00", 2)]
    row = books.db.execute(
        "SELECT first_event, last_event, events FROM buckets WHERE hour_start = '2026-06-15T14:00Z'"
    ).fetchone()
    assert row is not None
    assert (iso(row[0]), iso(row[1]), row[2]) == ("2026-06-15T14:20", "2026-06-15T14:40", 2)
    books.assert_meets()
