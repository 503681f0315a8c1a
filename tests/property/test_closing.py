"""Closing: what leaves and what is carried add up to what was counted, whatever the hours and the rounds."""

from __future__ import annotations

import uuid
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from services.counters.closing import delta_identifier, quantise

START = datetime(2026, 3, 1, tzinfo=UTC)
HOURS = [START + timedelta(hours=number) for number in range(6)]

#: One round: changes of hourly totals, in billionths.
rounds = st.lists(
    st.dictionaries(st.sampled_from(HOURS), st.integers(-(10**13), 10**13), min_size=1, max_size=4),
    max_size=8,
)
scales = st.integers(0, 9)


def close_all(
    history: list[dict[datetime, int]], scale: int, *, allow_negative: bool
) -> tuple[dict[datetime, Fraction], list[Decimal]]:
    """Close every round; returns what left for each hour, and the carry after each round."""
    sent: dict[datetime, Fraction] = defaultdict(Fraction)
    carry, carries = Decimal(0), []
    for changes in history:
        differences = [(hour, Decimal(changes[hour]).scaleb(-9)) for hour in sorted(changes)]
        portions, carry = quantise(differences, carry, scale, allow_negative=allow_negative)
        for portion in portions:
            sent[portion.hour] += Fraction(portion.amount)
            assert portion.amount != 0
            assert portion.amount % Decimal(1).scaleb(-scale) == 0
            assert allow_negative or portion.amount > 0
        carries.append(carry)
    return sent, carries


def counted(history: list[dict[datetime, int]]) -> Fraction:
    return Fraction(sum(sum(changes.values()) for changes in history), 10**9)


@given(rounds, scales, st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_left_and_what_is_carried_is_what_was_counted(
    history: list[dict[datetime, int]], scale: int, allow_negative: bool
) -> None:
    sent, carries = close_all(history, scale, allow_negative=allow_negative)
    carry = carries[-1] if carries else Decimal(0)
    assert sum(sent.values()) + Fraction(carry) == counted(history)


@given(rounds, scales)
@settings(max_examples=300, deadline=None)
def test_a_meter_that_takes_negative_values_never_carries_a_whole_unit(
    history: list[dict[datetime, int]], scale: int
) -> None:
    _, carries = close_all(history, scale, allow_negative=True)
    assert all(abs(Fraction(carry)) < Fraction(1, 10**scale) for carry in carries)


@given(rounds, scales)
@settings(max_examples=300, deadline=None)
def test_a_meter_without_negative_values_carries_less_than_a_unit_up_and_lets_a_deficit_wait(
    history: list[dict[datetime, int]], scale: int
) -> None:
    sent, carries = close_all(history, scale, allow_negative=False)
    assert all(Fraction(carry) < Fraction(1, 10**scale) for carry in carries)
    assert all(amount >= 0 for amount in sent.values())


@given(
    st.lists(st.tuples(st.sampled_from(HOURS), st.integers(0, 9)), min_size=10, max_size=10),
)
def test_ten_times_point_four_on_an_integer_meter_bills_four_in_any_hours_and_any_rounds(
    placed: list[tuple[datetime, int]],
) -> None:
    history: list[dict[datetime, int]] = [defaultdict(int) for _ in range(10)]
    for hour, round_number in placed:
        history[round_number][hour] += 400_000_000
    sent, carries = close_all([changes for changes in history if changes], 0, allow_negative=False)
    assert sum(sent.values()) == 4
    assert carries[-1] == 0


def test_usage_below_the_scale_waits_and_leaves_with_the_hour_that_completes_it() -> None:
    first, carry = quantise([(HOURS[0], Decimal("0.6"))], Decimal(0), 0, allow_negative=False)
    assert (first, carry) == ([], Decimal("0.6"))

    second, carry = quantise([(HOURS[1], Decimal("0.6"))], carry, 0, allow_negative=False)
    assert [(portion.hour, portion.amount) for portion in second] == [(HOURS[1], Decimal(1))]
    assert carry == Decimal("0.2")


def test_a_correction_downwards_waits_on_a_meter_without_negative_values_until_usage_makes_up_for_it() -> (
    None
):
    portions, carry = quantise([(HOURS[0], Decimal(-5))], Decimal(0), 0, allow_negative=False)
    assert (portions, carry) == ([], Decimal(-5))
    portions, carry = quantise([(HOURS[1], Decimal(7))], carry, 0, allow_negative=False)
    assert [portion.amount for portion in portions] == [Decimal(2)]


def test_the_largest_sums_keep_their_last_digit() -> None:
    whole = 2**53 * 10**6
    portions, carry = quantise(
        [(HOURS[0], Decimal(f"{whole}.000000001"))], Decimal(0), 0, allow_negative=False
    )
    assert portions[0].amount == whole
    assert carry == Decimal("0.000000001")


keys = st.tuples(
    st.uuids(),
    st.integers(0, 40).map(lambda months: START + timedelta(days=30 * months)),
    st.integers(0, 1000).map(lambda hours: START + timedelta(hours=hours)),
    st.integers(1, 1000),
)


@given(st.lists(keys, unique=True, min_size=2, max_size=20))
def test_two_deltas_never_share_an_identifier(
    several: list[tuple[uuid.UUID, datetime, datetime, int]],
) -> None:
    identifiers = {delta_identifier(*one) for one in several}
    assert len(identifiers) == len(several)
    assert all(len(identifier) == 32 and identifier.islower() for identifier in identifiers)


def test_an_identifier_is_the_same_for_ever() -> None:
    """Changing this value would bill again whatever is under way while a new release starts."""
    item = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    assert delta_identifier(item, START, HOURS[3], 7) == "csul7nrq2b3hzi4dwb5sbpztascs24ua"
