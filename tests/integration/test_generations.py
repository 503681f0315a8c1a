"""How long an idempotency key is known, and what becomes of an event that may have outlived its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from services.counters.generations import rotate_generations
from tests.integration.books import Books, open_books

#: The first day; keys are kept for 35 days unless a test says otherwise.
START = "2026-03-01T12:00"


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now=START) as books:
        books.db.execute("UPDATE seen_generation SET started_at = now()")  # not that of the copied database
        books.meter("requests")
        books.meter("carried", late_policy="carry_forward")
        yield books


def table_ids(books: Books) -> tuple[int, int]:
    """Identities of the current and of the previous table: a table that is made anew has another one."""
    row = books.db.execute(
        "SELECT 'seen_current'::regclass::oid::int, 'seen_previous'::regclass::oid::int"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def rotate(books: Books, days: int = 35) -> bool:
    return rotate_generations(books.db, days)


def pass_days(books: Books, days: float) -> None:
    """Let the current generation become that much older."""
    books.db.execute(
        "UPDATE seen_generation SET started_at = started_at - make_interval(secs => %s)", (days * 86_400,)
    )


def total(books: Books, meter: str = "requests") -> int:
    return int(sum(books.hours(meter).values()))


# Rotation -----------------------------------------------------------------------------------------------


def test_a_generation_ends_by_dropping_a_table_and_not_by_deleting_rows(books: Books) -> None:
    books.count(*[books.use(f"k{n}", START) for n in range(100)])
    current, previous = table_ids(books)
    pass_days(books, 35)
    assert rotate(books)
    assert table_ids(books)[1] == current, "the current table became the previous one as it was"
    assert not books.db.execute("SELECT FROM pg_class WHERE oid = %s", (previous,)).fetchall()
    assert books.db.execute("SELECT count(*) FROM seen_current").fetchone() == (0,)
    assert books.db.execute("SELECT count(*) FROM seen_previous").fetchone() == (100,)
    second = table_ids(books)[0]
    pass_days(books, 35)
    assert rotate(books)
    assert table_ids(books)[1] == second
    assert not books.db.execute("SELECT FROM pg_class WHERE oid = %s", (current,)).fetchall()


def test_a_generation_that_is_younger_than_the_retention_is_not_ended(books: Books) -> None:
    pass_days(books, 34.999)
    assert not rotate(books)
    pass_days(books, 0.0011)
    assert rotate(books)
    assert not rotate(books)


def test_twenty_generations_in_a_row_leave_two_tables_with_their_indexes(books: Books) -> None:
    for number in range(20):
        books.count(books.use(f"k{number}", START), books.use("always", START))
        pass_days(books, 35)
        assert rotate(books)
    rows = books.db.execute(
        "SELECT tablename, count(*) FROM pg_indexes WHERE tablename LIKE 'seen\\_%' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert rows == [("seen_current", 1), ("seen_generation", 1), ("seen_previous", 1)]


@pytest.mark.parametrize("day_of_arrival", [0.0, 17.0, 34.99])
def test_a_key_is_known_for_at_least_the_retention_whenever_in_a_generation_it_came(
    books: Books, day_of_arrival: float
) -> None:
    """Given rotation as soon as it is due, the same event a moment before the end of the retention."""
    pass_days(books, day_of_arrival)
    event = books.use("k", START)
    books.count(event)
    days, passed = 35.0 - 0.001, 0.0
    while passed < days:
        step = min(1.0, days - passed)
        pass_days(books, step)
        passed += step
        rotate(books)
    books.count(event)
    assert total(books) == 1
    assert books.outcomes() == {"counted": 1, "duplicate": 1}


def test_duplicates_and_conflicts_are_found_in_both_generations(books: Books) -> None:
    books.count(books.use("old", START, 1), books.use("old-2", START, 1))
    pass_days(books, 35)
    assert rotate(books)
    books.count(books.use("new", START, 1), books.use("new-2", START, 1))
    books.count(
        *[books.use(key, START, 1) for key in ("old", "new")],
        *[books.use(key, START, 9) for key in ("old-2", "new-2")],
    )
    assert total(books) == 4
    assert books.outcomes() == {"counted": 4, "duplicate": 2, "conflict": 2}
    rows = books.db.execute("SELECT event_id FROM parked_records ORDER BY 1").fetchall()
    assert rows == [("new-2",), ("old-2",)]


# Conflicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"quantity": 2_000_000_000},
        {"occurred_at": 1_772_366_400_000_001},
        {"customer_ref": "cus_2"},
        {"meter": "carried"},
        {"properties": {"region": "eu"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_same_key_with_anything_else_changed_is_a_conflict_and_counts_nothing(
    books: Books, changes: dict[str, Any]
) -> None:
    first = books.use("k", START)
    if "quantity" in changes:
        changes = {"quantity": changes["quantity"].to_bytes(16, "big", signed=True)}
    books.count(first)
    books.count({**first, **changes})
    assert total(books) + total(books, "carried") == 1
    assert books.outcomes() == {"counted": 1, "conflict": 1}
    assert len(books.ops("usage_conflict")) == 1


def test_the_same_event_from_another_source_is_a_duplicate(books: Books) -> None:
    first = books.use("k", START)
    books.count(first)
    books.count({**first, "source": "elsewhere"})
    assert books.outcomes() == {"counted": 1, "duplicate": 1}


def test_inside_one_chunk_the_first_of_a_key_counts_and_the_others_are_judged_by_it(books: Books) -> None:
    books.count(
        books.use("k", START, 1),
        books.use("k", START, 1),
        books.use("k", START, 2),
        books.use("k", START, 2),
        books.use("other", START, 5),
        books.use("k", START, 1),
    )
    assert total(books) == 6
    assert books.outcomes() == {"counted": 2, "duplicate": 2, "conflict": 2}
    assert books.db.execute('SELECT "offset" FROM parked_records ORDER BY 1').fetchall() == [(2,), (3,)]


def test_inside_one_chunk_keys_that_were_known_before_are_judged_by_what_was_known(books: Books) -> None:
    books.count(books.use("k", START, 1))
    pass_days(books, 35)
    assert rotate(books)
    books.count(books.use("k", START, 2), books.use("k", START, 1), books.use("k", START, 2))
    assert total(books) == 1
    assert books.outcomes() == {"counted": 1, "duplicate": 1, "conflict": 2}


def test_an_adjustment_too_is_found_again_by_its_key(books: Books) -> None:
    old = books.use("k", "2026-02-10T12:00", 3)
    books.count(books.use("a", START), old, old)
    books.count(old, {**old, "properties": {"x": "y"}})
    assert books.outcomes() == {"counted": 1, "adjusted": 1, "duplicate": 2, "conflict": 1}
    assert books.adjustments() == [("k", 3, "too_late", "pending")]


# Beyond the retention -----------------------------------------------------------------------------------


def forget(books: Books, days: int = 35) -> None:
    for _ in range(2):
        pass_days(books, days)
        assert rotate(books, days)


@pytest.mark.parametrize("meter", ["requests", "carried"])
def test_an_event_that_may_have_outlived_its_key_is_never_counted_again_but_shown_to_a_person(
    books: Books, meter: str
) -> None:
    event = books.use("k", START, 3, meter)
    books.count(event)
    forget(books)
    books.now = "2026-05-10T12:00"
    books.count(event)
    assert total(books, meter) == 3
    assert books.adjustments() == [("k", 3, "beyond_retention", "pending")]
    assert (books.apply_approved(), total(books, meter)) == (0, 3)
    books.count(event)
    assert books.outcomes() == {"counted": 1, "adjusted": 1, "duplicate": 1}
    assert sum(one["amount"] for one in books.settle()) == 3


def test_what_a_person_approves_of_it_is_counted_once(books: Books) -> None:
    event = books.use("k", START, 3)
    books.now = "2026-05-10T12:00"
    books.count(event)
    books.decide("k", approved=True)
    assert [books.apply_approved() for _ in range(2)] == [1, 0]
    assert books.hours() == {"2026-05-10T12:00": 3}


def test_an_event_whose_key_is_certainly_still_known_is_carried_forward_however_late(books: Books) -> None:
    """34 days and 20 hours: too old for Stripe, younger than its key could be."""
    books.now = "2026-04-05T08:00"
    books.count(books.use("k", START, 3, "carried"))
    assert books.adjustments() == [("k", 3, "too_late", "applied")]
    assert books.hours("carried") == {"2026-04-05T08:00": 3}


@pytest.mark.parametrize("meter", ["requests", "carried"])
def test_keys_that_are_kept_for_a_day_make_everything_older_an_adjustment(
    postgres_dsn: str, meter: str
) -> None:
    with open_books(postgres_dsn, now=START, dedupe_days=1) as books:
        books.meter(meter, late_policy="carry_forward" if meter == "carried" else "manual")
        young = books.use("young", "2026-02-28T14:00", 1, meter)
        edge = books.use("edge", "2026-02-28T12:00", 10, meter)
        books.count(young, edge)
        assert total(books, meter) == 1
        assert books.adjustments() == [("edge", 10, "beyond_retention", "pending")]
        for _ in range(2):
            pass_days(books, 1)
            assert rotate(books, 1)
        books.now = "2026-03-02T14:30"
        books.count(young)
        assert total(books, meter) == 1
        assert [row[2:] for row in books.adjustments()] == [("beyond_retention", "pending")] * 2


def test_an_event_that_came_five_minutes_before_its_time_is_no_exception(postgres_dsn: str) -> None:
    """Its key may be forgotten a day after it came, when the event is five minutes younger than a day."""
    with open_books(postgres_dsn, now=START, dedupe_days=1) as books:
        books.meter("requests")
        event = books.use("k", "2026-03-01T12:05", 3)
        books.count(event)
        for _ in range(2):
            pass_days(books, 1)
            assert rotate(books, 1)
        books.now = "2026-03-02T12:00:00.001"
        books.count(event)
        assert total(books) == 3
        assert books.adjustments() == [("k", 3, "beyond_retention", "pending")]


def test_keys_that_are_kept_for_a_year_do_not_make_stripe_take_older_usage(postgres_dsn: str) -> None:
    with open_books(postgres_dsn, now=START, dedupe_days=400) as books:
        books.meter("requests", lateness_seconds=35 * 86_400)
        books.meter("carried", late_policy="carry_forward")
        books.count(
            books.use("fits", "2026-01-26T00:00", 1),
            books.use("old", "2026-01-25T23:59:59", 10),
            books.use("very-old", "2025-04-01T00:00", 100, "carried"),
        )
        assert total(books) == 1
        assert books.adjustments() == [
            ("old", 10, "too_late", "pending"),
            ("very-old", 100, "too_late", "applied"),
        ]
        assert books.hours("carried") == {"2026-03-01T12:00": 100}
