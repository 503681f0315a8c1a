"""Whether numbers agree: every difference is taken apart exactly, or told to have no explanation."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.replay.verdicts import (
    UNSETTLED,
    HourNumbers,
    PeriodNumbers,
    check_events,
    check_period,
    check_pushes,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
amounts = st.integers(-(10**12), 10**12).map(lambda n: Decimal(n) / 10**9)


def hour(**numbers: object) -> HourNumbers:
    fields: dict[str, object] = {"item": 0, "aggregation": "sum", "scale": 0, "billable": True, **numbers}
    fields = {
        name: Decimal(value) if isinstance(value, str) and name not in ("aggregation",) else value
        for name, value in fields.items()
    }
    return HourNumbers(**fields)  # type: ignore[arg-type]


@given(
    aggregation=st.sampled_from(["sum", "max", "last"]),
    numbers=st.fixed_dictionaries(
        dict.fromkeys(("total", "closed", "pushed", "carried_out", "carried_in", "reported"), amounts)
    ),
    unsettled=st.dictionaries(st.sampled_from(UNSETTLED), amounts),
)
def test_the_parts_are_always_the_whole_difference(
    aggregation: str, numbers: dict[str, Decimal], unsettled: dict[str, Decimal]
) -> None:
    found = check_pushes(hour(aggregation=aggregation, unsettled=unsettled, **numbers))
    assert found.difference == numbers["total"] - numbers["reported"]
    assert sum(found.parts.values(), Decimal(0)) == found.difference
    assert (found.verdict == "differ") == ("unexplained" in found.parts)
    assert (found.verdict == "agree") == (not found.parts)


@pytest.mark.parametrize(
    ("numbers", "parts"),
    [
        ({"total": "5", "closed": "5", "pushed": "5", "reported": "5"}, {}),
        ({"total": "5.4", "closed": "5.4", "pushed": "5", "reported": "5"}, {"carried_in_period": "0.4"}),
        ({"total": "5", "closed": "5", "carried_out": "5"}, {"carried_forward_out": "5"}),
        (
            {"total": "1", "closed": "1", "pushed": "6", "reported": "6", "carried_in": "5"},
            {"carried_forward_in": "-5"},
        ),
        ({"total": "5", "closed": "5", "pushed": "4", "reported": "4"}, {"carried_in_period": "1"}),
        ({"total": "5", "closed": "5", "pushed": "5", "reported": "4"}, {"unexplained": "1"}),
        (
            {"aggregation": "last", "total": "3.7", "pushed": "3", "reported": "3"},
            {"carried_in_period": "0.7"},
        ),
        ({"aggregation": "last", "total": "4", "pushed": "3", "reported": "3"}, {"not_closed": "1"}),
        ({"aggregation": "last", "total": "4", "pushed": "4", "reported": "3"}, {"unexplained": "1"}),
    ],
)
def test_each_part_has_its_name(numbers: dict[str, str], parts: dict[str, str]) -> None:
    found = check_pushes(hour(**numbers))
    assert found.parts == {name: Decimal(amount) for name, amount in parts.items()}
    assert found.sentence.endswith(".")


def test_events_agree_only_in_amount_and_number() -> None:
    bucket = Decimal(5), 2
    assert check_events(0, START, bucket, (Decimal(5), 2), "sum").verdict == "agree"
    assert check_events(0, START, bucket, (Decimal(5), 3), "sum").verdict == "differ"
    less = check_events(0, START, bucket, (Decimal(6), 2), "sum")
    assert (less.verdict, less.difference) == ("differ", -1) and "1 less than the log proves" in less.sentence
    assert check_events(0, START, bucket, None, "sum").verdict == "unknown"


def test_a_period_keeps_what_it_closed_and_did_not_send() -> None:
    def period(*numbers: str) -> PeriodNumbers:
        return PeriodNumbers(0, START, *map(Decimal, numbers))

    assert check_period(period("5.5", "4", "1", "0", "0.5")).verdict == "agree"
    assert check_period(period("5.5", "4", "0", "0", "0.5")).verdict == "differ"
