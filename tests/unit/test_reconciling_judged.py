"""What a comparison means: by hand, and by properties of every comparison."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reconciler.judging import (
    ZERO,
    AccountAnswer,
    Books,
    Finding,
    Hour,
    HourDifference,
    ItemPeriod,
    Journal,
    JournalHour,
    Period,
    Policy,
    Reason,
    compare_hours,
    judge,
    named,
    of_books,
    of_values,
    relative,
)

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)
START, END = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
POLICY = Policy(NOW, timedelta(hours=1), Decimal("0.005"))
amounts = st.integers(-1000, 1000).map(lambda number: Decimal(number) / 4)


def period(*, is_final: bool = False, has_customer: bool = True, end: datetime = END) -> Period:
    return Period(frozenset({"item"}), START, end, is_final, has_customer)


def part(reported: str = "10", **more: object) -> ItemPeriod:
    known = {"waiting": ZERO, "waits_since": None, "doubts": 0, **more}
    return ItemPeriod(Decimal(reported), Decimal(reported), **known)  # type: ignore[arg-type]


def hour(
    number: int = 0, missing: str = "1", *, explained: bool = False, reported: str = "1"
) -> HourDifference:
    told = Decimal(reported)
    return HourDifference(
        START + timedelta(hours=number), Decimal(missing), explained, False, told,
        frozenset({("item", START)}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("local", "stripe", "expected"),
    [("0", "0", "0"), ("5", "0", "1"), ("0", "5", "1"), ("995", "1000", "0.005"), ("7", "-7", "2")],
)
def test_the_relative_difference_is_of_stripes_total(local: str, stripe: str, expected: str) -> None:
    assert relative(Decimal(local), Decimal(stripe)) == Decimal(expected)


@pytest.mark.parametrize(
    ("missing", "is_final", "state"),
    [
        ("0", False, "ok"),
        ("0", True, "ok"),
        ("5", False, "drift"),
        ("-5", False, "adjust"),
        ("-5", True, "drift"),
    ],
)
def test_half_a_percent_is_small_unless_the_period_is_final(missing: str, is_final: bool, state: str) -> None:
    answers = [AccountAnswer([hour(0, missing)] if missing != "0" else [])]
    verdict = judge(period(is_final=is_final), [part("1000")], answers, POLICY)
    assert verdict.state == state
    assert verdict.stripe == 1000 - Decimal(missing)


@pytest.mark.parametrize("reason", ["no_answer", "meter_missing", "customer_missing"])
def test_without_an_answer_nothing_is_known_whatever_our_own_books_say(reason: Reason) -> None:
    wrong = part(findings=(Finding("books_differ", Decimal(3)),))
    verdict = judge(period(), [wrong], [AccountAnswer(unknown=reason)], POLICY)
    assert (verdict.state, verdict.reason, verdict.stripe) == ("unknown", reason, None)
    assert (verdict.diff_abs, verdict.diff_pct) == (None, None)


def test_a_doubt_is_unknown_even_where_everything_else_agrees() -> None:
    assert judge(period(), [part(doubts=1)], [AccountAnswer()], POLICY).reason == "in_doubt"


def test_waiting_is_left_out_for_a_while_and_unknown_later_or_once_the_period_is_over() -> None:
    young = part(waiting=Decimal(2), waits_since=NOW - timedelta(minutes=59))
    old = part(waiting=Decimal(2), waits_since=NOW - timedelta(minutes=61))
    assert judge(period(), [young], [AccountAnswer()], POLICY).state == "ok"
    assert judge(period(), [old], [AccountAnswer()], POLICY).reason == "waiting"
    assert judge(period(end=NOW), [young], [AccountAnswer()], POLICY).reason == "waiting"


def test_lag_in_an_hour_that_is_over_is_unknown_and_in_the_one_that_goes_on_is_left_out() -> None:
    over, going_on = hour(0, explained=True), hour(9 * 24 + 12, explained=True)
    assert judge(period(), [part()], [AccountAnswer([over])], POLICY).reason == "summary_lags"
    verdict = judge(period(), [part()], [AccountAnswer([going_on])], POLICY)
    assert (verdict.state, verdict.local, verdict.stripe, verdict.waiting) == ("ok", 9, 9, 1)


def test_lag_that_leaves_nothing_to_compare_is_unknown() -> None:
    going_on = hour(9 * 24 + 12, "3", explained=True, reported="10")
    assert judge(period(), [part()], [AccountAnswer([going_on])], POLICY).reason == "summary_lags"


def test_what_time_does_not_explain_is_told_although_something_else_waits() -> None:
    waits = part("10", waiting=Decimal(2), waits_since=NOW - timedelta(days=1))
    verdict = judge(period(), [waits], [AccountAnswer([hour(0, "-4")])], POLICY)
    assert (verdict.state, verdict.diff_abs) == ("drift", 4)


def test_differences_that_cancel_out_are_drift_with_a_difference_of_nothing() -> None:
    verdict = judge(period(), [part()], [AccountAnswer([hour(0, "2"), hour(1, "-2")])], POLICY)
    assert (verdict.state, verdict.diff_abs) == ("drift", 0)


@given(
    parts=st.lists(
        st.builds(
            lambda reported, findings: ItemPeriod(reported, reported, ZERO, None, 0, findings),
            amounts,
            st.lists(amounts.map(lambda amount: Finding("counter_differs", amount, START)), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    hours=st.lists(
        st.builds(lambda number, missing: hour(number, str(missing)), st.integers(0, 20), amounts), max_size=5
    ),
)
def test_the_findings_add_up_to_the_difference(parts: list[ItemPeriod], hours: list[HourDifference]) -> None:
    verdict = judge(period(), parts, [AccountAnswer(hours)], POLICY)
    assert verdict.stripe is not None
    assert verdict.local - verdict.stripe == sum((one.amount for one in verdict.findings), ZERO)
    assert (verdict.state == "ok") == (not verdict.findings)
    assert verdict.diff_abs == abs(verdict.local - verdict.stripe)


@given(
    total=amounts, closed=amounts, carried=amounts, carry=amounts, pushed=amounts, pending=amounts,
    is_max=st.booleans(), unit=st.sampled_from([Decimal(1), Decimal("0.25")]),
    hours=st.lists(st.tuples(amounts, amounts, amounts, amounts, st.booleans()), max_size=4),
)  # fmt: skip
def test_of_any_books_however_wrong_every_amount_has_its_place(
    total: Decimal, closed: Decimal, carried: Decimal, carry: Decimal, pushed: Decimal, pending: Decimal,
    is_max: bool, unit: Decimal, hours: list[tuple[Decimal, Decimal, Decimal, Decimal, bool]],
) -> None:  # fmt: skip
    """counted - fraction - waiting = reported + findings, whatever somebody has done to the rows."""
    rows = [Hour(START + timedelta(hours=number), *values) for number, values in enumerate(hours)]
    if not is_max:
        total = closed + sum((one.total - one.closed for one in rows), ZERO)
    sent = pushed + sum((one.sent - one.pushed for one in rows), ZERO)
    journal = Journal(reported=sent - pending, pending=pending)
    books = Books(total, closed, carried, carry, pushed, unit, is_max, rows)
    found = of_books(books, journal, None)
    fraction = carry - (carry / unit).to_integral_value("ROUND_DOWN") * unit
    told = sum((one.amount for one in found.findings), ZERO)
    assert found.counted - fraction - found.waiting == found.reported + told


def test_clean_books_have_nothing_to_say() -> None:
    books = Books(Decimal("4.4"), Decimal("4.4"), ZERO, Decimal("0.4"), Decimal(4), Decimal(1), False, ())
    found = of_books(books, Journal(reported=Decimal(4)), None)
    assert (found.findings, found.waiting) == ([], 0)


def test_more_sent_than_there_is_is_a_deficit() -> None:
    books = Books(Decimal("1.5"), Decimal("1.5"), ZERO, Decimal("-2.5"), Decimal(4), Decimal(1), False, ())
    found = of_books(books, Journal(reported=Decimal(4)), None)
    assert found.findings == [Finding("deficit", Decimal(-2))]


def test_what_waits_for_closing_makes_up_for_a_deficit_first() -> None:
    """A late use of a value moves it to an earlier hour: one hour fell and is closed, the other waits."""
    waits = Hour(START, Decimal(1), ZERO, ZERO, ZERO, True)
    books = Books(Decimal(10), Decimal(9), ZERO, Decimal(-1), Decimal(10), Decimal(1), False, (waits,))
    found = of_books(books, Journal(reported=Decimal(10)), NOW)
    assert (found.findings, found.waiting) == ([], 0)


def test_a_last_value_that_falls_to_nothing_is_under_way_and_no_drift() -> None:
    newest = Hour(START, ZERO, ZERO, ZERO, ZERO, False)
    journal = Journal(reported=Decimal(7), pending=ZERO, waits_since=NOW)
    found = of_values(newest, journal, Decimal(1), (), None)
    assert (found.findings, found.waiting) == ([], -7)


def test_an_hour_that_differs_and_holds_a_push_in_doubt_is_in_doubt_whoever_sent_it() -> None:
    doubted = replace(hour(0, "-5"), doubted=True)
    assert judge(period(), [part()], [AccountAnswer([doubted])], POLICY).reason == "in_doubt"


def test_an_hour_on_the_edge_belongs_to_the_period_that_sent_in_it() -> None:
    edge = replace(hour(0, "5"), senders=frozenset({("item", START - timedelta(days=30))}))
    assert judge(period(), [part()], [AccountAnswer([edge])], POLICY).state == "ok"


def test_of_a_last_meter_only_the_newest_hour_has_an_amount() -> None:
    last = replace(period(), newest=START + timedelta(hours=9))
    verdict = judge(last, [part("7")], [AccountAnswer([hour(0, "10"), hour(1, "20")])], POLICY)
    assert (verdict.state, verdict.local, verdict.stripe) == ("drift", 7, 7)
    assert [one.amount for one in verdict.findings] == [0, 0]


def test_everything_under_way_and_nothing_to_compare_is_unknown() -> None:
    fresh = part("0", waiting=Decimal(5), waits_since=NOW)
    assert judge(period(), [fresh], [AccountAnswer()], POLICY).reason == "waiting"


def test_identifiers_are_named_of_the_subjects_own_pushes_only() -> None:
    shared = replace(
        hour(0, "5"), candidates=[("a", Decimal(5), ("item", START)), ("b", Decimal(5), ("y", START))]
    )
    [finding] = judge(period(), [part()], [AccountAnswer([shared])], POLICY).findings
    assert finding.identifiers == ("a",)


# Hours --------------------------------------------------------------------------------------------------


def told(reported: str, *, young: str = "0", flying: str = "0") -> JournalHour:
    amount, air = Decimal(young), Decimal(flying)
    return JournalHour(
        Decimal(reported),
        young_more=max(amount, ZERO), young_less=min(amount, ZERO),
        flying_more=max(air, ZERO), flying_less=min(air, ZERO),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("journal", "shown", "explained"),
    [
        (told("10", young="4"), "6", True),
        (told("10", young="4"), "7", True),
        (told("10", young="4"), "5", False),
        (told("10", young="4"), "11", False),
        (told("10", flying="4"), "14", True),
        (told("10", flying="4"), "15", False),
        (told("10", flying="-4"), "6", True),
        (told("10", young="-4"), "14", True),
        (told("10"), "9", False),
    ],
)
def test_time_explains_what_was_taken_just_now_or_is_under_way_and_no_more(
    journal: JournalHour, shown: str, explained: bool
) -> None:
    [difference] = compare_hours({START: journal}, {START: Decimal(shown)})
    assert difference.explained is explained
    assert difference.missing == 10 - Decimal(shown)


@pytest.mark.parametrize(
    ("reported", "shown", "differs"),
    [
        ("0.3", "0.30000000000000004", False),
        ("1e15", "1000000000000000.1", False),
        ("0.3", "0.300000002", True),
    ],
)
def test_what_adding_doubles_may_lose_is_no_difference(reported: str, shown: str, differs: bool) -> None:
    found = compare_hours({START: told(reported)}, {START: Decimal(shown)})
    assert bool(found) is differs


def test_an_hour_that_nobody_told_of_is_a_surplus() -> None:
    [difference] = compare_hours({}, {START: Decimal(3)})
    assert (difference.missing, difference.explained) == (-3, False)


def test_missing_pushes_are_named_only_where_one_choice_adds_up() -> None:
    sent = [("a", Decimal(3)), ("b", Decimal(4)), ("c", Decimal(3))]
    assert named(sent, Decimal(4)) == ("b",)
    assert named(sent, Decimal(3)) == ()
    assert named(sent, Decimal(10)) == ("a", "b", "c")
    assert named(sent, Decimal(7)) == ()
    assert named(sent, Decimal(-3)) == ()
