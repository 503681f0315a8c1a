"""What each aggregation makes of usage, in whatever order it comes, and what Stripe is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from tests.integration.books import Books, amounts, iso, open_books


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now="2026-06-15T18:00") as books:
        yield books


def meters(books: Books, **columns: Any) -> None:
    """One meter of each aggregation; ``peaks``, ``levels`` and ``users`` measure a property."""
    books.meter("requests", "sum", **columns)
    books.meter("calls", "count", **columns)
    books.meter("peaks", "max", value_property="level", **columns)
    books.meter("levels", "last", value_property="level", **columns)
    books.meter("users", "unique", value_property="user", **columns)


METERS = ("requests", "calls", "peaks", "levels", "users")


def everywhere(books: Books, key: str, at: str, level: str, user: str, customer: str = "cus_1") -> list[Any]:
    """One event of 100 for each meter."""
    return [
        books.use(f"{meter}/{key}", at, 100, meter, customer_ref=customer, level=level, user=user)
        for meter in METERS
    ]


# A month ------------------------------------------------------------------------------------------------

#: Of each day of June: a value, and who used it. The greatest value is on the 17th; 11 people.
LEVELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 23, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9]
USERS = [
    "ada",
    "bob",
    "ada",
    "cyd",
    "dee",
    "ada",
    "bob",
    "eve",
    "fay",
    "fay",
    "gil",
    "hal",
    "ivy",
    "joe",
    "kim",
]
USERS += ["ada", "bob", "cyd", "dee", "eve", "fay", "gil", "hal", "ivy", "joe", "kim"]
USERS += ["ada"] * 4


def test_30_days_of_100_with_48_hours_of_lateness_are_3000_and_30_the_greatest_the_last_and_the_distinct(
    books: Books,
) -> None:
    """Of three days each, the third arrives first and the first last, 48 hours late."""
    meters(books)
    sent = []
    for first in range(1, 31, 3):
        books.now = f"2026-06-{first + 2:02}T12:30"
        for day in (first + 2, first + 1, first):
            level, user = str(LEVELS[day - 1]), USERS[day - 1]
            books.count(*everywhere(books, str(day), f"2026-06-{day:02}T12:00", level, user))
            sent += books.settle()
    assert books.outcomes() == {"counted": 50, "late_counted": 100}
    whole = {"requests": 3000, "calls": 30, "peaks": 23, "levels": 9, "users": 11}
    assert {meter: books.periods(meter) for meter in METERS} == {
        meter: {"2026-06-01T00:00": amount} for meter, amount in whole.items()
    }
    by_meter = {meter: [one for one in sent if one["meter"] == meter] for meter in METERS}
    for meter in ("requests", "calls", "peaks", "users"):
        assert sum(one["amount"] for one in by_meter[meter]) == whole[meter], meter
    newest = max(by_meter["levels"], key=lambda one: one["event_at"])
    assert (newest["amount"], iso(newest["event_at"])) == (9, "2026-06-30T12:00")
    assert not books.db.execute("SELECT FROM adjustments").fetchall()
    books.assert_meets()


def test_every_order_of_arrival_gives_every_hour_the_same_total(books: Books) -> None:
    """Given five events in three hours, in all 120 orders, one chunk an event."""
    meters(books)
    events = [
        ("k1", "2026-06-15T09:10:00", "5", "ada"),
        ("k2", "2026-06-15T09:50:00", "4", "bob"),
        ("k4", "2026-06-15T10:30:00", "2", "ada"),
        ("k3", "2026-06-15T10:30:00", "7", "cyd"),
        ("k5", "2026-06-15T11:00:00", "1", "bob"),
    ]
    orders = list(itertools.permutations(events))
    for place in range(len(events)):
        chunk = []
        for number, order in enumerate(orders):
            key, at, level, user = order[place]
            chunk += everywhere(books, f"{key}/{number}", at, level, user, f"cus_{number}")
        books.count(*chunk)
    expected = {
        "requests": (200, 200, 100),
        "calls": (2, 2, 1),
        "peaks": (5, 7, 1),
        "levels": (4, 2, 1),  # k4 and k3 in the same microsecond: the greater key is the later one
        "users": (2, 1, 0),
    }
    for number in range(len(orders)):
        for meter, totals in expected.items():
            assert books.hours(meter, f"cus_{number}") == dict(
                zip(("2026-06-15T09:00", "2026-06-15T10:00", "2026-06-15T11:00"), totals, strict=True)
            ), (meter, orders[number])


# Sums and counts ----------------------------------------------------------------------------------------


def test_a_sum_of_a_property_leaves_the_quantity_alone(books: Books) -> None:
    books.meter("bytes", "sum", value_property="size", scale=9)
    books.count(
        books.use("a", "2026-06-15T10:00", 7, "bytes", size="1.000000001"),
        books.use("b", "2026-06-15T10:30", 7, "bytes", size="2"),
    )
    assert books.hours("bytes") == {"2026-06-15T10:00": Decimal("3.000000001")}
    assert amounts(books.close()) == [("2026-06-15T10:00", Decimal("3.000000001"))]


def test_quantities_that_differ_by_a_billionth_are_counted_and_sent_exactly(books: Books) -> None:
    books.meter("exact", "sum", scale=9)
    books.count(
        books.use("a", "2026-06-15T10:00", 2**53, "exact"),
        books.use("b", "2026-06-15T10:00", "0.000000001", "exact"),
    )
    [delta] = books.close()
    assert delta["amount"] == Decimal(2**53) + Decimal("0.000000001")


# max ----------------------------------------------------------------------------------------------------


def test_max_sends_by_how_much_the_greatest_value_of_the_period_rose_and_nothing_else(books: Books) -> None:
    books.meter("peaks", "max")
    steps = [
        ("2026-06-15T10:05", 7, [("2026-06-15T10:00", 7)]),
        ("2026-06-15T11:05", 5, []),
        ("2026-06-15T12:05", 9, [("2026-06-15T12:00", 2)]),
        ("2026-06-15T12:06", 9, []),
        ("2026-06-15T10:07", 12, [("2026-06-15T10:00", 3)]),
        ("2026-06-15T10:08", 11, []),
    ]
    for number, (at, value, expected) in enumerate(steps):
        books.count(books.use(f"k{number}", at, value, "peaks"))
        assert amounts(books.settle()) == expected, at
    assert books.hours("peaks") == {"2026-06-15T10:00": 12, "2026-06-15T11:00": 5, "2026-06-15T12:00": 9}
    assert books.pushed("peaks") == {"2026-06-01T00:00": 12}
    books.assert_meets()


def test_max_begins_again_with_every_period(books: Books) -> None:
    books.meter("peaks", "max")
    books.count(books.use("a", "2026-05-31T23:59:59.999999", 50, "peaks"))
    books.count(books.use("b", "2026-06-01T00:00", 8, "peaks"))
    assert amounts(books.settle()) == [("2026-05-31T23:00", 50), ("2026-06-01T00:00", 8)]
    assert books.pushed("peaks") == {"2026-05-01T00:00": 50, "2026-06-01T00:00": 8}


def test_max_below_the_scale_waits_until_it_makes_a_whole_unit(books: Books) -> None:
    books.meter("peaks", "max")
    sent = []
    for number, value in enumerate(("0.6", "1.4", "2.5", "2.9")):
        books.count(books.use(f"k{number}", f"2026-06-15T1{number}:00", value, "peaks"))
        sent.append(sum(one["amount"] for one in books.settle()))
    assert sent == [0, 1, 1, 0]
    assert books.carries("peaks") == {"2026-06-01T00:00": Decimal("0.9")}
    books.assert_meets()


def test_max_rises_in_one_hour_while_the_push_of_another_is_under_way(books: Books) -> None:
    books.meter("peaks", "max")
    books.count(books.use("a", "2026-06-15T10:00", 5, "peaks"))
    assert amounts(books.close()) == [("2026-06-15T10:00", 5)]
    books.count(
        books.use("b", "2026-06-15T10:01", 9, "peaks"), books.use("c", "2026-06-15T11:00", 8, "peaks")
    )
    assert amounts(books.close()) == [("2026-06-15T11:00", 3)]
    assert amounts(books.settle()) == [("2026-06-15T10:00", 1)]
    books.assert_meets()


# last ---------------------------------------------------------------------------------------------------


def test_what_is_last_is_sent_as_it_is_at_the_second_of_its_event(books: Books) -> None:
    books.meter("levels", "last", scale=1)
    books.count(books.use("a", "2026-06-15T10:15:42.999999", "3.5", "levels"))
    [first] = books.settle()
    assert (first["formula"], first["amount"], first["sequence"]) == ("last", Decimal("3.5"), 1)
    assert first["event_at"] == datetime(2026, 6, 15, 10, 15, 42, tzinfo=UTC)
    assert first["push_before"] is None
    books.count(books.use("b", "2026-06-15T10:20:01", "1.25", "levels"))
    [second] = books.settle()
    assert (second["amount"], second["sequence"]) == (Decimal("1.2"), 2)
    assert second["event_at"] == datetime(2026, 6, 15, 10, 20, 1, tzinfo=UTC)
    assert first["identifier"] != second["identifier"]


def test_other_aggregations_are_sent_for_a_formula_of_sum_at_the_start_of_their_hour(books: Books) -> None:
    meters(books)
    books.count(*everywhere(books, "k", "2026-06-15T10:15:42.5", "3", "ada"))
    deltas = {one["meter"]: one for one in books.close()}
    assert deltas.pop("levels")["formula"] == "last"
    assert {one["formula"] for one in deltas.values()} == {"sum"}
    assert {iso(one["event_at"]) for one in deltas.values()} == {"2026-06-15T10:00"}
    assert {meter: one["amount"] for meter, one in deltas.items()} == {
        "requests": 100,
        "calls": 1,
        "peaks": 3,
        "users": 1,
    }


def test_a_value_of_zero_and_a_value_that_falls_to_zero_are_sent_by_last(books: Books) -> None:
    books.meter("levels", "last")
    books.count(books.use("a", "2026-06-15T10:00:05", 0, "levels"))
    assert amounts(books.settle()) == [("2026-06-15T10:00", 0)]
    books.count(books.use("b", "2026-06-15T11:00:05", 8, "levels"))
    assert amounts(books.settle()) == [("2026-06-15T11:00", 8)]
    books.count(books.use("c", "2026-06-15T11:00:06", 0, "levels"))
    [fallen] = books.settle()
    assert (fallen["amount"], iso(fallen["event_at"])) == (0, "2026-06-15T11:00:06")


def test_a_late_value_is_the_last_of_its_own_hour_only(books: Books) -> None:
    books.meter("levels", "last")
    books.count(books.use("a", "2026-06-15T12:30", 8, "levels"))
    books.settle()
    books.count(books.use("b", "2026-06-15T12:29", 3, "levels"))
    assert books.settle() == []
    books.count(books.use("c", "2026-06-15T11:59:59", 4, "levels"))
    [late] = books.settle()
    assert (late["amount"], iso(late["event_at"])) == (4, "2026-06-15T11:59:59")
    assert books.hours("levels") == {"2026-06-15T12:00": 8, "2026-06-15T11:00": 4}
    assert books.periods("levels") == {"2026-06-01T00:00": 8}


def elsewhere(record: dict[str, Any], customer: str) -> dict[str, Any]:
    """The same of another customer; its key keeps its rank."""
    return {**record, "customer_ref": customer, "idempotency_key": customer + record["idempotency_key"]}


@pytest.mark.parametrize(
    ("lesser", "greater"),
    [
        ("a", "b"),
        ("B", "a"),  # a dictionary would have it the other way round
        ("a", "aa"),
        ("z", "é"),
        ("a-b", "a_b"),
        ("\uffff", "\U0001f600"),  # UTF-16 would have it the other way round
    ],
)
def test_of_two_values_at_the_same_microsecond_the_greater_key_is_last_whatever_the_order(
    books: Books, lesser: str, greater: str
) -> None:
    books.meter("levels", "last")
    at = "2026-06-15T10:00:00.000001"
    one = books.use(lesser, at, 1, "levels", customer_ref="cus_1")
    two = books.use(greater, at, 2, "levels", customer_ref="cus_1")
    books.count(one, two)
    reverse = [elsewhere(record, "cus_2") for record in (two, one)]
    books.count(*reverse)
    for record in (two, one):
        books.count(elsewhere(record, "cus_3"))
    for customer in ("cus_1", "cus_2", "cus_3"):
        assert books.hours("levels", customer) == {"2026-06-15T10:00": 2}, customer


# unique -------------------------------------------------------------------------------------------------


def test_a_value_is_counted_once_in_a_period_in_the_earliest_hour_that_it_was_used_in(books: Books) -> None:
    books.meter("users", "unique", value_property="user")

    def use(key: str, hour: int, user: str) -> Any:
        return books.use(key, f"2026-06-15T{hour:02}:30", 1, "users", user=user)

    books.count(use("a", 12, "ada"), use("b", 12, "bob"), use("c", 13, "ada"))
    assert amounts(books.settle()) == [("2026-06-15T12:00", 2)]
    books.count(use("d", 10, "ada"))
    assert books.hours("users") == {"2026-06-15T10:00": 1, "2026-06-15T12:00": 1, "2026-06-15T13:00": 0}
    assert books.settle() == [], "an hour changed, the period's number did not"
    books.count(use("e", 11, "bob"), use("f", 9, "cyd"))
    assert books.hours("users") == {
        "2026-06-15T09:00": 1,
        "2026-06-15T10:00": 1,
        "2026-06-15T11:00": 1,
        "2026-06-15T12:00": 0,
        "2026-06-15T13:00": 0,
    }
    assert amounts(books.settle()) == [("2026-06-15T09:00", 1)]
    assert books.pushed("users") == {"2026-06-01T00:00": 3}
    books.assert_meets()


def test_a_value_counts_again_in_the_next_period(books: Books) -> None:
    books.meter("users", "unique", value_property="user")
    books.count(books.use("a", "2026-05-31T23:30", 1, "users", user="ada"))
    books.count(
        books.use("b", "2026-06-01T00:30", 1, "users", user="ada"),
        books.use("c", "2026-06-01T01:30", 1, "users", user="ada"),
    )
    assert books.periods("users") == {"2026-05-01T00:00": 1, "2026-06-01T00:00": 1}


def test_values_are_told_apart_by_every_character(books: Books) -> None:
    books.meter("users", "unique", value_property="user")
    values = ["ada", "Ada", "ada ", "a", "ad", "é", "e\u0301", "1", "1.0", "01"]
    books.count(
        *[
            books.use(f"k{n}", "2026-06-15T10:00", 1, "users", user=value)
            for n, value in enumerate(values * 2)
        ]
    )
    assert books.hours("users") == {"2026-06-15T10:00": len(values)}


def test_values_of_one_customer_and_meter_say_nothing_about_another(books: Books) -> None:
    for meter in ("users", "members"):
        books.meter(meter, "unique", value_property="user")
    places = list(itertools.product(("users", "members"), ("cus_1", "cus_2")))
    books.count(
        *[
            books.use(f"k{n}", "2026-06-15T10:00", 1, meter, customer_ref=customer, user="ada")
            for n, (meter, customer) in enumerate(places)
        ]
    )
    for meter, customer in places:
        assert books.hours(meter, customer) == {"2026-06-15T10:00": 1}


def test_a_value_that_moves_to_an_earlier_hour_is_billed_once_while_its_later_hour_is_under_way(
    books: Books,
) -> None:
    books.meter("users", "unique", value_property="user")
    books.count(books.use("a", "2026-06-15T12:30", 1, "users", user="ada"))
    sent = books.close()
    books.count(books.use("b", "2026-06-15T10:30", 1, "users", user="ada"))
    sent += books.close()
    sent += books.settle()
    assert sum(one["amount"] for one in sent) == 1
    assert books.carries("users") == {}


def test_usage_that_changes_no_total_leaves_nothing_to_be_closed(books: Books) -> None:
    """An item that stayed dirty would be looked at by every round of closing for ever."""
    meters(books)
    books.count(*everywhere(books, "a", "2026-06-15T10:10", "5", "ada"))
    books.settle()
    books.count(
        books.use("zero", "2026-06-15T10:20", 0, "requests"),
        books.use("lower", "2026-06-15T10:20", 1, "peaks", level="4"),
        books.use("earlier", "2026-06-15T10:05", 1, "levels", level="4"),
        books.use("again", "2026-06-15T10:20", 1, "users", user="ada"),
    )
    assert books.settle() == []
    assert not books.db.execute("SELECT meter FROM items WHERE dirty_from IS NOT NULL").fetchall()


# Dimensions ---------------------------------------------------------------------------------------------


def test_dimensions_make_items_with_deltas_of_their_own_that_name_them(books: Books) -> None:
    books.meter("requests", dimensions=["region", "tier"])
    books.count(
        books.use("a", "2026-06-15T10:00", 1, region="eu", tier="free"),
        books.use("b", "2026-06-15T10:10", 2, region="eu", tier="pro"),
        books.use("c", "2026-06-15T10:20", 4, region="us", tier="pro", other="x"),
        books.use("d", "2026-06-15T10:30", 8, region="eu", tier="pro"),
    )
    deltas = books.close()
    assert sorted((one["amount"], sorted(one["dimensions"].items())) for one in deltas) == [
        (1, [("region", "eu"), ("tier", "free")]),
        (4, [("region", "us"), ("tier", "pro")]),
        (10, [("region", "eu"), ("tier", "pro")]),
    ]
    assert len({one["item_id"] for one in deltas}) == len({one["identifier"] for one in deltas}) == 3
    assert books.hours("requests", "cus_1", "eu", "pro") == {"2026-06-15T10:00": 10}


def test_items_whose_dimensions_only_read_alike_are_kept_apart(books: Books) -> None:
    books.meter("requests", dimensions=["a", "b"])
    pairs = [("x", "y"), ("y", "x"), ("xy", "z"), ("x", "yz"), ('x","y', "z"), ("x", "y ")]
    books.count(*[books.use(f"k{n}", "2026-06-15T10:00", 1, a=a, b=b) for n, (a, b) in enumerate(pairs)])
    assert len(books.close()) == len(pairs)
    for pair in pairs:
        assert books.hours("requests", "cus_1", *pair) == {"2026-06-15T10:00": 1}


@pytest.mark.parametrize("aggregation", ["count", "max", "unique"])
def test_every_aggregation_but_last_can_be_split(books: Books, aggregation: str) -> None:
    books.meter("split", aggregation, dimensions=["region"], value_property="value")
    uses = [("eu", "5"), ("eu", "7"), ("us", "7"), ("eu", "5")]
    books.count(
        *[
            books.use(f"k{n}", f"2026-06-15T1{n}:00", 1, "split", region=region, value=value)
            for n, (region, value) in enumerate(uses)
        ]
    )
    sums: dict[str, Decimal] = {}
    for one in books.settle():
        region = one["dimensions"]["region"]
        sums[region] = sums.get(region, Decimal(0)) + one["amount"]
    assert (
        sums
        == {"count": {"eu": 3, "us": 1}, "max": {"eu": 7, "us": 7}, "unique": {"eu": 2, "us": 1}}[aggregation]
    )


def test_each_item_of_a_split_meter_has_a_watermark_of_its_own(books: Books) -> None:
    books.meter("requests", dimensions=["region"])
    books.count(
        books.use("a", "2026-06-15T10:00", 1, region="eu"),
        books.use("b", "2026-06-05T10:00", 1, region="us"),
        books.use("c", "2026-06-05T10:00", 1, region="eu"),
    )
    assert books.outcomes() == {"counted": 2, "adjusted": 1}


def test_a_missing_dimension_or_an_unfit_value_parks_with_its_reason_and_stops_nothing(books: Books) -> None:
    books.meter("requests", dimensions=["region"])
    books.meter("bytes", "sum", value_property="size")
    books.meter("users", "unique", value_property="user")
    at = "2026-06-15T10:00"
    reasons = {
        "no-region": (books.use("no-region", at), "dimension_missing"),
        "empty-region": (books.use("empty-region", at, region=""), "dimension_missing"),
        "other-case": (books.use("other-case", at, Region="eu"), "dimension_missing"),
        "nul-region": (books.use("nul-region", at, region="e\x00u"), "dimension_missing"),
        "no-size": (books.use("no-size", at, 5, "bytes"), "value_missing"),
        "empty-size": (books.use("empty-size", at, 5, "bytes", size=""), "value_missing"),
        "text": (books.use("text", at, 5, "bytes", size="many"), "value_not_a_number"),
        "comma": (books.use("comma", at, 5, "bytes", size="1,5"), "value_not_a_number"),
        "nan": (books.use("nan", at, 5, "bytes", size="NaN"), "value_not_finite"),
        "minus": (books.use("minus", at, 5, "bytes", size="-1"), "value_negative"),
        "huge": (books.use("huge", at, 5, "bytes", size="1e99"), "value_out_of_range"),
        "fine": (books.use("fine", at, 5, "bytes", size="0.0000000001"), "value_too_precise"),
        "no-user": (books.use("no-user", at, 5, "users"), "value_missing"),
        "no-user-2": (books.use("no-user-2", at, 5, "users", user=""), "value_missing"),
    }
    good = [
        books.use("ok-1", at, 5, region="eu"),
        books.use("ok-2", at, 5, "bytes", size="3"),
        books.use("ok-3", at, 5, "users", user="ada"),
    ]
    books.count(*[record for record, _ in reasons.values()], *good)
    assert books.parked() == [(key, reason) for key, (_, reason) in reasons.items()]
    assert books.outcomes() == {"counted": 3, "dead_lettered": len(reasons)}
    assert {(one["meter"], one["amount"]) for one in books.close()} == {
        ("requests", 5),
        ("bytes", 3),
        ("users", 1),
    }


@pytest.mark.parametrize(
    "columns",
    [
        {"aggregation": "unique"},
        {"aggregation": "max", "allow_negative": True},
        {"aggregation": "last", "dimensions": ["region"]},
        {"aggregation": "last", "late_policy": "carry_forward"},
        {"aggregation": "median"},
    ],
    ids=["unique without a value", "max of negatives", "split last", "last carried forward", "unknown"],
)
def test_the_database_refuses_meters_that_cannot_be_counted_right(
    books: Books, columns: dict[str, Any]
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        books.meter("odd", **columns)
