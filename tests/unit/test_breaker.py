"""The breaker trips at the 100th parked record in a row, or above 1 % of the last 10,000 offsets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.streaming.breaker import feed


def tripped_at(offsets: list[int]) -> int | None:
    return feed([], offsets)[1]


def test_ninety_nine_parked_records_in_a_row_are_let_through_and_the_hundredth_is_not() -> None:
    assert tripped_at(list(range(99))) is None
    assert tripped_at(list(range(100))) == 99
    assert tripped_at(list(range(7, 107))) == 106


def test_a_good_record_between_them_starts_the_row_again() -> None:
    assert tripped_at([*range(99), *range(100, 101)]) is None


def test_one_percent_of_the_last_ten_thousand_is_let_through_and_one_more_is_not() -> None:
    every_hundredth = list(range(0, 10_000, 100))
    assert len(every_hundredth) == 100
    assert tripped_at(every_hundredth) is None
    assert tripped_at([*every_hundredth, 9_999]) == 9_999


def test_exactly_one_percent_for_ever_never_trips() -> None:
    assert tripped_at(list(range(0, 1_000_000, 100))) is None


def test_slightly_more_than_one_percent_trips_in_the_first_window() -> None:
    assert tripped_at(list(range(0, 1_000_000, 99))) == 100 * 99


def test_the_record_that_trips_is_not_remembered_because_the_partition_stops_in_front_of_it() -> None:
    kept, trip = feed([], range(100))
    assert trip == 99
    assert kept == list(range(99))


def test_a_fresh_breaker_after_a_resume_lets_another_ninety_nine_through() -> None:
    assert feed([], range(99, 199))[1] == 198


def test_no_parked_record_changes_nothing() -> None:
    assert feed([1, 2, 3], []) == ([1, 2, 3], None)


@pytest.mark.parametrize("size", [1, 3, 50])
@given(offsets=st.lists(st.integers(0, 12_000), unique=True, max_size=250).map(sorted))
def test_the_verdict_does_not_depend_on_how_the_offsets_are_chunked(size: int, offsets: list[int]) -> None:
    whole = feed([], offsets)
    kept: list[int] = []
    trip = None
    for start in range(0, len(offsets), size):
        kept, trip = feed(kept, offsets[start : start + size])
        if trip is not None:
            break
    assert trip == whole[1]
    assert kept == whole[0]


@given(st.lists(st.integers(0, 30_000), unique=True, max_size=400).map(sorted))
def test_it_trips_where_counting_by_hand_says(offsets: list[int]) -> None:
    expected = None
    for index, offset in enumerate(offsets):
        so_far = offsets[: index + 1]
        in_window = sum(1 for other in so_far if other > offset - 10_000)
        in_a_row = all(offset - back in so_far for back in range(100))
        if in_window > 100 or in_a_row:
            expected = offset
            break
    assert tripped_at(offsets) == expected


@given(st.lists(st.integers(0, 30_000), unique=True, max_size=400).map(sorted))
def test_what_is_kept_is_bounded(offsets: list[int]) -> None:
    assert len(feed([], offsets)[0]) <= 100
