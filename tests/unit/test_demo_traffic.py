"""The demo's plan: seeded, with everything that goes wrong in it, and an oracle that adds it up."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import pytest

from services.demo.oracle import expect
from services.demo.traffic import DAY_S, HOUR_S, METERS, TENANTS, Planned, customers, plan

NOW_S = 1_772_366_400
EVENTS = 5000
PLAN = plan(EVENTS, 7, NOW_S)


def test_the_same_seed_plans_the_same_records_and_another_seed_others() -> None:
    assert plan(EVENTS, 7, NOW_S) == PLAN
    assert plan(EVENTS, 8, NOW_S) != PLAN


@pytest.mark.parametrize("events", [100, 101, EVENTS])
def test_as_many_records_are_planned_as_were_asked_for(events: int) -> None:
    assert len(plan(events, 3, NOW_S)) == events


def test_every_kind_of_record_and_every_way_in_is_in_the_plan() -> None:
    kinds = {one.kind for one in PLAN}
    assert kinds == {"on_time", "late", "too_late", "duplicate", "conflict", "unknown_meter", "corrupt"}
    assert {one.path for one in PLAN} == {"api", "producer", "v1", "v2", "raw"}
    assert {one.tenant for one in PLAN} == {*TENANTS, ""}
    assert {one.meter for one in PLAN} == {*METERS, "carrier_pigeons", ""}


def test_nothing_is_in_the_future_and_nothing_is_older_than_stripe_takes() -> None:
    times = [one.occurred_s for one in PLAN if one.kind != "corrupt"]
    assert max(times) <= NOW_S
    assert min(times) >= NOW_S - 35 * DAY_S


def test_a_repeat_follows_the_record_it_repeats_on_the_same_way() -> None:
    firsts: dict[tuple[str, str], Planned] = {}
    for one in PLAN:
        if one.kind in ("on_time", "late"):
            firsts[one.tenant, one.key] = one
        elif one.kind in ("duplicate", "conflict"):
            first = firsts[one.tenant, one.key]
            assert one.path == first.path
            assert (one.quantity == first.quantity) == (one.kind == "duplicate")
            assert (one.customer, one.meter, one.occurred_s) == (
                first.customer,
                first.meter,
                first.occurred_s,
            )


def test_late_records_stay_inside_the_window_and_too_late_ones_do_not() -> None:
    start_s = NOW_S - 5 * HOUR_S
    assert all(one.occurred_s > start_s - 41 * HOUR_S for one in PLAN if one.kind == "late")
    assert all(one.occurred_s < start_s - 48 * HOUR_S for one in PLAN if one.kind == "too_late")


def test_quantities_have_the_places_that_their_meter_can_carry() -> None:
    for one in PLAN:
        if one.meter in METERS:
            assert one.quantity == one.quantity.quantize(Decimal(1).scaleb(-METERS[one.meter][2]))
            assert one.quantity > 0


def test_customers_of_two_tenants_never_share_a_reference() -> None:
    references = [reference for tenant in TENANTS for reference in customers(tenant)]
    assert len(set(references)) == len(references)


def test_the_oracle_counts_each_record_once_and_gives_the_rest_its_outcome() -> None:
    expected = expect(PLAN)
    kinds = Counter(one.kind for one in PLAN)
    assert expected.outcomes == {
        "counted_in_all": kinds["on_time"] + kinds["late"],
        "duplicate": kinds["duplicate"],
        "conflict": kinds["conflict"],
        "adjusted": kinds["too_late"],
        "dead_lettered": kinds["unknown_meter"],
        "upcast_failed": kinds["corrupt"],
    }
    assert sum(expected.outcomes.values()) == EVENTS
    assert sum(expected.hours.values()) == expected.total == sum(expected.totals.values())


def test_the_oracle_leaves_out_what_was_not_acknowledged() -> None:
    some = [one for index, one in enumerate(PLAN) if index % 2 and one.kind in ("on_time", "late")]
    by_hand = sum(one.quantity if METERS[one.meter][0] == "sum" else 1 for one in some)
    assert expect(some).total == by_hand


def test_the_oracle_refuses_a_plan_that_repeats_a_key() -> None:
    first = next(one for one in PLAN if one.kind == "on_time")
    with pytest.raises(AssertionError):
        expect([first, first])
