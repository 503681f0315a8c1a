"""The oracle itself, against figures worked out by hand."""

from __future__ import annotations

import random
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from tests.oracle import Logged, Meter, Truth, Usage, period_of, truth

NOON_S = 1_772_366_400  # 2026-03-01T12:00:00Z


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


@pytest.mark.parametrize(
    ("calendar", "at", "start", "end"),
    [
        ("1 month UTC", "2026-03-01T00:00:00Z", "2026-03-01T00:00:00Z", "2026-04-01T00:00:00Z"),
        (
            "1 month Europe/Budapest",
            "2026-03-31T21:59:59Z",
            "2026-03-01T00:00:00+01:00",
            "2026-04-01T00:00:00+02:00",
        ),
        ("1 month Asia/Kathmandu", "2026-02-28T18:15:00Z", "2026-02-28T18:15:00Z", "2026-03-31T18:15:00Z"),
        (  # the 31st: February ends on the 28th, and March is back on the 31st
            "1 month UTC 2026-01-31T13:37:42Z",
            "2026-03-31T13:37:41Z",
            "2026-02-28T13:37:42Z",
            "2026-03-31T13:37:42Z",
        ),
        (
            "1 month UTC 2026-01-31T13:37:42Z",
            "2025-11-30T13:37:42Z",
            "2025-11-30T13:37:42Z",
            "2025-12-31T13:37:42Z",
        ),
        (  # 02:30 is skipped on 2026-03-08 in Los Angeles, and read as 03:30
            "1 day America/Los_Angeles 2026-03-01T10:30:00Z",
            "2026-03-08T10:29:59Z",
            "2026-03-07T10:30:00Z",
            "2026-03-08T10:30:00Z",
        ),
        (
            "1 year UTC 2024-02-29T00:00:00Z",
            "2026-01-01T00:00:00Z",
            "2025-02-28T00:00:00Z",
            "2026-02-28T00:00:00Z",
        ),
        (
            "2 week UTC 2026-01-01T00:00:00Z",
            "2026-01-29T00:00:00Z",
            "2026-01-29T00:00:00Z",
            "2026-02-12T00:00:00Z",
        ),
    ],
)
def test_an_instant_is_in_the_period_that_a_wall_calendar_shows(
    calendar: str, at: str, start: str, end: str
) -> None:
    assert period_of(calendar, seconds(at)) == (seconds(start), seconds(end))


@pytest.mark.parametrize(
    ("aggregation", "first_hour", "second_hour", "period"),
    [("sum", 17, 7, 24), ("count", 4, 2, 6), ("max", 9, 4, 9), ("last", 3, 4, 4), ("unique", 3, 1, 4)],
)
def test_hours_and_periods_have_their_own_aggregates_in_any_order(
    aggregation: str, first_hour: int, second_hour: int, period: int
) -> None:
    meter = Meter(aggregation, lateness_s=10**6, value_property="v" if aggregation == "unique" else None)
    events = [("a", 0, 2), ("b", 0, 3), ("c", 9, 9), ("d", 9, 3), ("e", 3600, 3), ("f", 3600, 4)]
    usages = [
        Usage("t", "c", "m", Decimal(value), key, NOON_S + at, {"v": str(value)}) for key, at, value in events
    ]
    item = ("t", "c", "m")
    for seed in range(20):
        random.Random(seed).shuffle(usages)  # noqa: S311
        found = truth([Logged("usage.v3", 0, n, one) for n, one in enumerate(usages)], {("t", "m"): meter})
        march = NOON_S // 86_400 * 86_400
        assert found.buckets == {
            (item, NOON_S, march): Decimal(first_hour),
            (item, NOON_S + 3600, march): Decimal(second_hour),
        }
        assert found.periods == {(item, march): Decimal(period)}


def test_properties_split_an_item_and_carry_its_value() -> None:
    meter = Meter("max", value_property="gb", dimensions=("region", "tier"))

    def usage(key: str, **properties: Any) -> Usage:
        return Usage("t", "c", "m", Decimal(1), key, NOON_S, properties)

    found = of(
        meter,
        usage("a", region="eu", tier="1", gb="1.5"),
        usage("b", region="eu", tier="1", gb="0.5"),
        usage("c", region="us", tier="1", gb="2"),
        usage("d", region="us", gb="2"),
        usage("e", region="us", tier="1"),
        usage("f", region="us", tier="1", gb="many"),
    )
    assert {item: total for (item, _), total in found.periods.items()} == {
        ("t", "c", "m", "eu", "1"): Decimal("1.5"),
        ("t", "c", "m", "us", "1"): Decimal(2),
    }
    assert found.outcomes == {"counted": 3, "dead_lettered": 3}


def test_what_was_too_late_counts_in_its_own_hour_once_it_is_approved() -> None:
    usages = [
        Usage("t", "c", "m", Decimal(5), "now", NOON_S),
        Usage("t", "c", "m", Decimal(2), "old", NOON_S - 9 * 86_400),
    ]
    assert sum(of(Meter(), *usages).buckets.values()) == 5
    found = of(Meter(), *usages, approved=[("t", "old")])
    assert sorted(found.buckets.values()) == [2, 5]
    assert found.outcomes == {"counted": 1, "adjusted": 1}


def of(meter: Meter, *usages: Usage, **more: Any) -> Truth:
    return truth([Logged("usage.v3", 0, n, one) for n, one in enumerate(usages)], {("t", "m"): meter}, **more)
