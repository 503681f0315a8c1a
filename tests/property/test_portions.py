"""Portions: what leaves and what is carried add up to what was counted, whatever the hours and the rounds."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.counters.deltas import delta_identifier
from services.counters.portions import Portion, peak_difference, split, unit_of, whole
from tests.records import HOUR_US, UNIT

#: 2026-03-01T00:00:00Z
START = 1_772_323_200_000_000
HOURS = [START + number * HOUR_US for number in range(6)]

#: One round: changes of hourly totals, in billionths.
rounds = st.lists(
    st.dictionaries(st.sampled_from(HOURS), st.integers(-(10**13), 10**13), min_size=1, max_size=4),
    max_size=8,
)
scales = st.integers(0, 9)


def close_all(history: list[dict[int, int]], scale: int, *, signed: bool) -> tuple[dict[int, int], list[int]]:
    """Close every round; returns what left for each hour, and the carry after each round."""
    sent: dict[int, int] = defaultdict(int)
    unit = unit_of(scale)
    carry, carries = 0, []
    for changes in history:
        portions, carry = split(
            [(hour, changes[hour]) for hour in sorted(changes)], carry, unit, signed=signed
        )
        assert len({portion.hour for portion in portions}) == len(portions)
        for portion in portions:
            sent[portion.hour] += portion.amount
            assert portion.amount != 0
            assert portion.amount % unit == 0
            assert signed or portion.amount > 0
        carries.append(carry)
    return sent, carries


def counted(history: list[dict[int, int]]) -> int:
    return sum(sum(changes.values()) for changes in history)


@given(rounds, scales, st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_left_and_what_is_carried_is_what_was_counted(
    history: list[dict[int, int]], scale: int, signed: bool
) -> None:
    sent, carries = close_all(history, scale, signed=signed)
    carry = carries[-1] if carries else 0
    assert sum(sent.values()) + carry == counted(history)


@given(rounds, scales)
@settings(max_examples=300, deadline=None)
def test_a_meter_that_takes_negative_values_never_carries_a_whole_unit(
    history: list[dict[int, int]], scale: int
) -> None:
    _, carries = close_all(history, scale, signed=True)
    assert all(abs(carry) < unit_of(scale) for carry in carries)


@given(rounds, scales)
@settings(max_examples=300, deadline=None)
def test_a_meter_without_negative_values_carries_less_than_a_unit_up_and_lets_a_deficit_wait(
    history: list[dict[int, int]], scale: int
) -> None:
    sent, carries = close_all(history, scale, signed=False)
    assert all(carry < unit_of(scale) for carry in carries)
    assert all(amount >= 0 for amount in sent.values())


@given(rounds, scales)
@settings(max_examples=300, deadline=None)
def test_a_meter_without_negative_values_never_sends_more_than_there_is(
    history: list[dict[int, int]], scale: int
) -> None:
    most = sent = carry = 0
    for number, changes in enumerate(history, 1):
        portions, carry = split(sorted(changes.items()), carry, unit_of(scale), signed=False)
        most = max(most, counted(history[:number]))
        sent += sum(portion.amount for portion in portions)
        assert sent <= most


@given(
    st.lists(st.tuples(st.sampled_from(HOURS), st.integers(0, 9)), min_size=10, max_size=10),
)
def test_ten_times_point_four_on_an_integer_meter_bills_four_in_any_hours_and_any_rounds(
    placed: list[tuple[int, int]],
) -> None:
    history: list[dict[int, int]] = [defaultdict(int) for _ in range(10)]
    for hour, round_number in placed:
        history[round_number][hour] += 400_000_000
    sent, carries = close_all([changes for changes in history if changes], 0, signed=False)
    assert sum(sent.values()) == 4 * UNIT
    assert carries[-1] == 0


def test_usage_below_the_scale_waits_and_leaves_with_the_hour_that_completes_it() -> None:
    first, carry = split([(HOURS[0], 600_000_000)], 0, unit_of(0), signed=False)
    assert (first, carry) == ([], 600_000_000)

    second, carry = split([(HOURS[1], 600_000_000)], carry, unit_of(0), signed=False)
    assert second == [Portion(HOURS[1], UNIT)]
    assert carry == 200_000_000


def test_a_correction_downwards_waits_on_a_meter_without_negative_values_until_usage_makes_up_for_it() -> (
    None
):
    portions, carry = split([(HOURS[0], -5 * UNIT)], 0, unit_of(0), signed=False)
    assert (portions, carry) == ([], -5 * UNIT)
    portions, carry = split([(HOURS[1], 7 * UNIT)], carry, unit_of(0), signed=False)
    assert [portion.amount for portion in portions] == [2 * UNIT]
    assert carry == 0


def test_an_hour_that_fell_is_taken_out_of_one_that_rose_in_the_same_round_whichever_comes_first() -> None:
    for differences in ([(HOURS[0], -UNIT), (HOURS[1], UNIT)], [(HOURS[0], UNIT), (HOURS[1], -UNIT)]):
        assert split(differences, 0, unit_of(0), signed=False) == ([], 0)


def test_only_an_hour_that_rose_sends_what_the_carry_makes_up_for() -> None:
    portions, carry = split([(HOURS[0], -UNIT), (HOURS[1], UNIT)], 2 * UNIT, unit_of(0), signed=False)
    assert (portions, carry) == ([Portion(HOURS[1], 2 * UNIT)], 0)


def test_the_largest_sums_keep_their_last_digit() -> None:
    most = 2**53 * 10**6 * UNIT
    portions, carry = split([(HOURS[0], most + 1)], 0, unit_of(0), signed=False)
    assert portions == [Portion(HOURS[0], most)]
    assert carry == 1


@given(st.integers(-(10**30), 10**30), scales)
def test_whole_rounds_towards_zero(amount: int, scale: int) -> None:
    unit = unit_of(scale)
    rounded = whole(amount, unit)
    assert rounded % unit == 0
    assert abs(amount) - unit < abs(rounded) <= abs(amount)
    assert rounded == 0 or (rounded < 0) == (amount < 0)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(HOURS), st.integers(0, 50), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    )
)
def test_the_rises_of_a_peak_add_up_to_it_and_are_booked_in_hours_that_changed(
    history: list[dict[int, int]],
) -> None:
    totals: dict[int, int] = {}
    sent = peak = 0
    for changes in history:
        changed = {hour: max(value, totals.get(hour, 0)) for hour, value in changes.items()}
        totals |= changed
        before, peak = peak, max(totals.values())
        booked = peak_difference(sorted(changed.items()), before, peak)
        assert all(hour in changed for hour, _ in booked)
        sent += sum(difference for _, difference in booked)
        assert sent == peak == max(totals.values())


@pytest.mark.parametrize(
    ("hours", "before", "peak", "booked"),
    [
        ([(HOURS[0], 3), (HOURS[1], 7)], 5, 7, [(HOURS[1], 2)]),
        ([(HOURS[0], 7), (HOURS[1], 3)], 5, 7, [(HOURS[0], 2)]),
        ([(HOURS[0], 3), (HOURS[1], 5)], 5, 5, []),
        ([(HOURS[0], 3), (HOURS[1], 4)], 9, 8, [(HOURS[1], -1)]),
        ([(HOURS[2], 6)], 0, 6, [(HOURS[2], 6)]),
    ],
    ids=[
        "risen",
        "risen in an earlier hour",
        "equal",
        "fallen, held by an hour that did not change",
        "first",
    ],
)
def test_a_peak_is_booked_in_the_hour_that_holds_it_or_else_in_the_last(
    hours: list[tuple[int, int]], before: int, peak: int, booked: list[tuple[int, int]]
) -> None:
    assert peak_difference(hours, before, peak) == booked


keys = st.tuples(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 40).map(lambda months: START + 30 * 24 * HOUR_US * months),
    st.integers(0, 1000).map(lambda hours: START + HOUR_US * hours),
    st.integers(1, 1000),
)


@given(st.lists(keys, unique=True, min_size=2, max_size=20))
def test_two_deltas_never_share_an_identifier(several: list[tuple[bytes, int, int, int]]) -> None:
    identifiers = {delta_identifier(*one) for one in several}
    assert len(identifiers) == len(several)
    assert all(len(identifier) == 32 and identifier.islower() for identifier in identifiers)


def test_an_identifier_is_the_same_for_ever() -> None:
    """Changing this value would bill again whatever is under way while a new release starts."""
    item = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert delta_identifier(item, START, HOURS[3], 7) == "csul7nrq2b3hzi4dwb5sbpztascs24ua"
