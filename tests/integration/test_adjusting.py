"""Events that come late: counted in their own hour inside the lateness window, else only once approved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from services.counters.adjusting import apply_approved
from tests.integration.books import Books, amounts, iso, open_books, us

NOW = "2026-06-20T12:00"


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now=NOW) as books:
        books.meter("requests")
        yield books


def late(books: Books, key: str = "b", quantity: str | int = 2, **more: Any) -> dict[str, Any]:
    """Nine days late."""
    return books.use(key, "2026-06-11T12:00", quantity, **more)


# Inside the lateness window -----------------------------------------------------------------------------


def test_100_and_250_and_a_duplicate_100_and_a_late_75_are_425(books: Books) -> None:
    first = books.use("a", NOW, 100)
    books.count(first, books.use("b", NOW, 250))
    books.count(first, books.use("c", "2026-06-19T12:00", 75))
    assert books.periods() == {"2026-06-01T00:00": 425}
    assert sum(one["amount"] for one in books.settle()) == 425
    assert books.outcomes() == {"counted": 2, "duplicate": 1, "late_counted": 1}


def test_5_and_then_3_of_a_day_ago_are_8_without_an_adjustment(books: Books) -> None:
    books.count(books.use("a", NOW, 5))
    assert amounts(books.settle()) == [("2026-06-20T12:00", 5)]
    books.count(books.use("b", "2026-06-19T12:00", 3))
    assert amounts(books.settle()) == [("2026-06-19T12:00", 3)]
    assert books.hours() == {"2026-06-20T12:00": 5, "2026-06-19T12:00": 3}
    assert books.adjustments() == []


def test_the_last_moment_of_the_lateness_window_is_inside_it(books: Books) -> None:
    books.count(books.use("a", NOW))
    books.count(books.use("inside", "2026-06-18T12:00"), books.use("outside", "2026-06-18T11:59:59.999999"))
    assert books.outcomes() == {"counted": 1, "late_counted": 1, "adjusted": 1}
    assert [row[0] for row in books.adjustments()] == ["outside"]


def test_each_meter_has_a_lateness_of_its_own_from_none_to_35_days(books: Books) -> None:
    books.meter("strict", lateness_seconds=0)
    books.meter("patient", lateness_seconds=35 * 86_400)
    before, month = "2026-06-20T11:59:59.999999", "2026-05-18T12:00"
    for meter in ("strict", "requests", "patient"):
        books.count(books.use(f"{meter}/a", NOW, 1, meter))
        books.count(
            books.use(f"{meter}/same", NOW, 10, meter),
            books.use(f"{meter}/before", before, 100, meter),
            books.use(f"{meter}/month", month, 1000, meter),
        )
    assert [row[0] for row in books.adjustments()] == ["requests/month", "strict/before", "strict/month"]
    assert {meter: sum(books.hours(meter).values()) for meter in ("strict", "requests", "patient")} == {
        "strict": 11,
        "requests": 111,
        "patient": 1111,
    }


def test_what_stripe_would_refuse_when_it_leaves_is_an_adjustment_whatever_the_lateness(books: Books) -> None:
    books.meter("patient", lateness_seconds=35 * 86_400)
    books.count(books.use("a", NOW, 1, "patient"))
    books.count(
        books.use("fits", "2026-05-17T00:00", 1, "patient"),
        books.use("too-old", "2026-05-16T23:59:59.999999", 1, "patient"),
    )
    assert [(row[0], row[2]) for row in books.adjustments()] == [("too-old", "too_late")]


# Adjustments --------------------------------------------------------------------------------------------


def test_5_and_then_2_of_nine_days_ago_are_5_and_once_approved_7_however_often_that_is_repeated(
    books: Books,
) -> None:
    books.count(books.use("a", NOW, 5))
    books.count(late(books))
    books.count(late(books))
    assert books.outcomes() == {"counted": 1, "adjusted": 1, "duplicate": 1}
    assert books.adjustments() == [("b", 2, "too_late", "pending")]
    assert (books.apply_approved(), sum(books.hours().values())) == (0, 5), "nobody has approved it"
    assert sum(one["amount"] for one in books.settle()) == 5
    books.decide("b", approved=True)
    assert books.adjustments() == [("b", 2, "too_late", "approved")]
    assert books.hours() == {"2026-06-20T12:00": 5}, "approving alone counts nothing"
    assert [books.apply_approved() for _ in range(3)] == [1, 0, 0]
    books.decide("b", approved=True)
    books.decide("b", approved=False)
    assert books.apply_approved() == 0
    assert books.hours() == {"2026-06-20T12:00": 5, "2026-06-11T12:00": 2}
    assert books.adjustments() == [("b", 2, "too_late", "applied")]
    assert amounts(books.settle()) == [("2026-06-11T12:00", 2)]
    row = books.db.execute(
        "SELECT applied_hour, decided_by, applied_at IS NOT NULL FROM adjustments"
    ).fetchone()
    assert row is not None and (iso(row[0]), *row[1:]) == ("2026-06-11T12:00", "ada", True)
    books.assert_meets()


def test_what_was_rejected_never_counts(books: Books) -> None:
    books.count(books.use("a", NOW, 5))
    books.count(late(books))
    books.decide("b", approved=False)
    books.decide("b", approved=True)
    books.count(late(books))
    assert books.apply_approved() == 0
    assert books.adjustments() == [("b", 2, "too_late", "rejected")]
    assert sum(one["amount"] for one in books.settle()) == 5


def test_an_adjustment_moves_no_watermark(books: Books) -> None:
    books.count(books.use("a", NOW, 5))
    books.count(late(books))
    books.decide("b", approved=True)
    books.apply_approved()
    books.count(late(books, "c"))
    assert [row[0] for row in books.adjustments()] == ["b", "c"]


def test_two_workers_that_apply_at_the_same_moment_count_everything_once(
    books: Books, postgres_dsn: str
) -> None:
    books.count(books.use("a", NOW, 1))
    books.count(*[late(books, f"k{n}", 1, customer_ref="cus_1") for n in range(50)])
    books.db.execute("UPDATE adjustments SET state = 'approved'")
    applied, start = [], threading.Barrier(3)

    def worker() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as db:
            start.wait(20)
            applied.append(apply_approved(db, us(NOW)))

    threads = [threading.Thread(target=worker) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    applied.append(books.apply_approved())
    assert sum(applied) == 50
    assert books.hours() == {"2026-06-20T12:00": 1, "2026-06-11T12:00": 50}


def test_more_than_one_round_of_adjustments_is_applied_round_by_round(books: Books) -> None:
    books.count(books.use("a", NOW, 1))
    books.count(*[late(books, f"k{n}", 1) for n in range(501)])
    books.db.execute("UPDATE adjustments SET state = 'approved'")
    assert [books.apply_approved() for _ in range(3)] == [500, 1, 0]
    assert sum(books.hours().values()) == 502


@pytest.mark.parametrize(
    ("aggregation", "before", "after", "sent"),
    [
        # On the 11th "ada" and 4, on the 20th "ada" and 3; late on the 11th "bob" and 9, and "ada" and 1.
        ("sum", 7, 17, 10),
        ("count", 2, 4, 2),
        ("max", 4, 9, 5),
        ("unique", 1, 2, 1),
    ],
)
def test_an_approved_adjustment_counts_as_if_it_had_come_in_time(
    books: Books, aggregation: str, before: int, after: int, sent: int
) -> None:
    columns = {"value_property": "user" if aggregation == "unique" else "level"}
    books.meter("metered", aggregation, **columns)

    def use(key: str, at: str, level: str, user: str) -> dict[str, Any]:
        return books.use(key, at, 1, "metered", level=level, user=user)

    books.count(use("a", "2026-06-11T12:30", "4", "ada"), use("b", NOW, "3", "ada"))
    books.settle()
    books.count(use("c", "2026-06-11T12:40", "9", "bob"), use("d", "2026-06-11T12:50", "1", "ada"))
    assert books.periods("metered") == {"2026-06-01T00:00": before}
    for key in "cd":
        books.decide(key, approved=True)
    assert books.apply_approved() == 2
    assert books.periods("metered") == {"2026-06-01T00:00": after}
    assert amounts(books.settle()) == [("2026-06-11T12:00", sent)]
    books.assert_meets()


def test_an_approved_adjustment_of_a_last_meter_is_the_last_of_its_hour_only_if_it_was(books: Books) -> None:
    books.meter("levels", "last")
    books.count(books.use("a", "2026-06-11T12:30", 4, "levels"), books.use("b", NOW, 3, "levels"))
    books.settle()
    books.count(
        books.use("c", "2026-06-11T12:29", 8, "levels"),
        books.use("d", "2026-06-11T12:31:07.5", 9, "levels"),
        books.use("e", "2026-06-10T12:00", 1, "levels"),
    )
    books.decide("c", approved=True)
    books.apply_approved()
    assert (books.settle(), books.hours("levels")["2026-06-11T12:00"]) == ([], 4)
    for key in "de":
        books.decide(key, approved=True)
    books.apply_approved()
    sent = [(one["amount"], iso(one["event_at"])) for one in books.settle()]
    assert sorted(sent) == [(1, "2026-06-10T12:00"), (9, "2026-06-11T12:31:07")]
    assert books.periods("levels") == {"2026-06-01T00:00": 3}


def test_an_adjustment_of_a_split_meter_goes_to_its_own_item(books: Books) -> None:
    books.meter("split", dimensions=["region"])
    books.count(books.use("a", NOW, 5, "split", region="eu"), books.use("b", NOW, 5, "split", region="us"))
    books.settle()
    books.count(late(books, "c", 2, meter="split", region="eu"))
    books.decide("c", approved=True)
    books.apply_approved()
    [delta] = books.settle()
    assert (delta["amount"], delta["dimensions"]) == (2, {"region": "eu"})
    assert sum(books.hours("split", "cus_1", "us").values()) == 5


def test_a_negative_adjustment_of_a_meter_that_takes_them_is_taken_off(books: Books) -> None:
    books.meter("credits", allow_negative=True)
    books.count(books.use("a", NOW, 5, "credits"))
    books.settle()
    books.count(late(books, "b", -2, meter="credits"))
    books.decide("b", approved=True)
    books.apply_approved()
    assert amounts(books.settle()) == [("2026-06-11T12:00", -2)]


@pytest.mark.parametrize("aggregation", ["sum", "max", "unique", "count"])
def test_what_is_approved_when_stripe_refuses_its_time_counts_in_the_hour_open_then(
    books: Books, aggregation: str
) -> None:
    books.meter("metered", aggregation, value_property="level")
    books.count(books.use("a", NOW, 1, "metered", level="3"))
    books.count(books.use("b", "2026-06-11T12:00", 1, "metered", level="7"))
    books.settle()
    books.now = "2026-07-16T00:00:00.000001"
    books.decide("b", approved=True)
    books.apply_approved()
    amount = {"sum": 7, "max": 7, "unique": 1, "count": 1}[aggregation]
    assert books.periods("metered")["2026-07-01T00:00"] == amount
    assert amounts(books.settle()) == [("2026-07-16T00:00", amount)]
    row = books.db.execute("SELECT applied_hour FROM adjustments").fetchone()
    assert row is not None and iso(row[0]) == "2026-07-16T00:00"


def test_what_is_approved_just_in_time_for_stripe_counts_in_its_own_hour(books: Books) -> None:
    books.count(books.use("a", NOW, 1))
    books.count(late(books))
    books.settle()
    books.now = "2026-07-15T23:59"
    books.decide("b", approved=True)
    books.apply_approved()
    assert books.hours() == {"2026-06-20T12:00": 1, "2026-06-11T12:00": 2}
    assert amounts(books.settle()) == [("2026-06-11T12:00", 2)]


# Carrying forward ---------------------------------------------------------------------------------------


def test_what_carries_forward_counts_in_the_open_hour_at_once_and_only_once(books: Books) -> None:
    books.meter("carried", late_policy="carry_forward")
    event = late(books, "b", 2, meter="carried")
    books.count(books.use("a", NOW, 5, "carried"), event, event)
    books.count(event)
    assert books.outcomes() == {"counted": 1, "adjusted": 1, "duplicate": 2}
    assert books.hours("carried") == {"2026-06-20T12:00": 7}
    assert books.adjustments() == [("b", 2, "too_late", "applied")]
    assert (books.apply_approved(), amounts(books.settle())) == (0, [("2026-06-20T12:00", 7)])


def test_what_carried_forward_does_not_again_when_it_is_sent_after_its_key_was_forgotten(
    books: Books,
) -> None:
    books.meter("carried", late_policy="carry_forward")
    event = late(books, "b", 2, meter="carried")
    books.count(books.use("a", NOW, 5, "carried"), event)
    forget_keys(books)
    books.count(event)
    assert books.hours("carried") == {"2026-06-20T12:00": 7}
    assert books.adjustments() == [("b", 2, "too_late", "applied")]


@pytest.mark.parametrize(("aggregation", "amount"), [("count", 2), ("max", 9), ("unique", 2)])
def test_every_aggregation_that_may_carries_forward(books: Books, aggregation: str, amount: int) -> None:
    books.meter("carried", aggregation, late_policy="carry_forward", value_property="level")
    books.count(books.use("a", NOW, 1, "carried", level="5"))
    books.count(books.use("b", "2026-06-01T12:00", 1, "carried", level="9"))
    assert books.hours("carried") == {"2026-06-20T12:00": amount}
    assert sum(one["amount"] for one in books.settle()) == amount
    books.assert_meets()


def test_a_decision_that_was_made_stands_when_the_event_is_sent_after_its_key_was_forgotten(
    books: Books,
) -> None:
    books.count(books.use("a", NOW, 5))
    books.count(late(books, "yes"), late(books, "no"), late(books, "open"))
    books.decide("yes", approved=True)
    books.decide("no", approved=False)
    books.apply_approved()
    forget_keys(books)
    books.count(late(books, "yes"), late(books, "no"), late(books, "open"))
    assert books.apply_approved() == 0
    assert [(row[0], row[3]) for row in books.adjustments()] == [
        ("no", "rejected"),
        ("open", "pending"),
        ("yes", "applied"),
    ]
    assert sum(books.hours().values()) == Decimal(7)


def forget_keys(books: Books) -> None:
    books.db.execute("TRUNCATE seen_current, seen_previous")
