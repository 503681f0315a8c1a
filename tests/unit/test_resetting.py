"""What is wrong with where a group stands, and what a reset may do about each partition."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.streaming.chunks import Partition
from services.streaming.resetting import (
    PROBLEMS,
    Current,
    Earliest,
    Exactly,
    First,
    Shift,
    Since,
    Stand,
    Step,
    Target,
    falls_short,
    in_scope,
    plan,
)
from services.wire.errors import Misconfigured

TP = Partition("usage.v3", 0)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOON_MS = int(NOON.timestamp() * 1000)
#: A log of 100 to 200, done up to 180.
STAND = Stand(committed=180, position=180, log_start=100, log_end=200)


def step(target: Target, stand: Stand = STAND, first: First | None = None) -> Step:
    [only] = plan({TP: stand}, target, {TP: first})
    return only


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"committed": 150}, []),
        ({"committed": None}, []),
        ({"committed": None, "position": None}, []),
        ({"committed": 181}, ["committed_above_position"]),
        ({"position": None}, ["committed_without_position"]),
        ({"committed": 90, "position": 99}, ["position_below_log"]),
        ({"position": 201}, ["position_above_log"]),
        ({"committed": 99, "position": 98}, ["committed_above_position", "position_below_log"]),
    ],
)
def test_what_does_not_fit_together_is_named(changes: dict[str, int | None], problems: list[str]) -> None:
    assert replace(STAND, **changes).problems() == problems  # type: ignore[arg-type]
    assert set(problems) <= PROBLEMS.keys()


@pytest.mark.parametrize(
    ("position", "lag"), [(180, 20), (200, 0), (None, 100), (50, 100), (300, 0)], ids=str
)
def test_lag_is_what_waits_behind_the_position(position: int | None, lag: int) -> None:
    assert replace(STAND, position=position, committed=100).lag == lag


@pytest.mark.parametrize(
    ("target", "to", "read_again"),
    [
        (Earliest(), 100, 80),
        (Exactly(120), 120, 60),
        (Shift(-10), 170, 10),
        (Current(), 180, 0),
    ],
)
def test_a_move_says_how_many_records_are_read_again(target: Target, to: int, read_again: int) -> None:
    found = step(target)
    assert (found.to, found.read_again, found.reason) == (to, read_again, None)
    assert found.moves == (to != 180)


def test_what_is_read_again_is_counted_from_the_position_and_not_from_what_is_committed() -> None:
    behind = replace(STAND, committed=110)
    assert step(Exactly(130), behind).read_again == 50
    assert step(Current(), behind) == Step(TP, 110, 180, 180)
    assert step(Shift(5), behind).to == 115


def test_a_committed_offset_of_0_is_nothing_to_a_worker_which_begins_at_its_position() -> None:
    assert step(Earliest(), Stand(committed=180, position=180, log_start=0, log_end=200)).read_again == 0


def test_a_shift_begins_at_the_position_where_nothing_is_committed() -> None:
    assert step(Shift(-30), replace(STAND, committed=None)).to == 150


@pytest.mark.parametrize("target", [Exactly(181), Shift(1), Exactly(10**6)])
def test_nothing_is_moved_above_the_position(target: Target) -> None:
    found = step(target)
    assert (found.to, found.reason, found.moves) == (None, "above_position", False)
    assert "above the position 180: a worker would move it back" in found.why
    assert falls_short([found])


def test_a_log_that_begins_above_the_position_has_no_place_to_go_to() -> None:
    lost = replace(STAND, committed=90, position=90)
    assert step(Earliest(), lost).reason == "above_position"
    assert step(Current(), lost).reason == "below_log"


def test_a_position_above_its_log_is_no_place_to_go_to() -> None:
    assert step(Current(), replace(STAND, position=300)).reason == "above_log"
    assert step(Exactly(250), replace(STAND, position=300)).reason == "above_log"


@pytest.mark.parametrize("target", [Exactly(99), Shift(-81)])
def test_what_lies_before_the_log_is_not_taken_for_its_beginning(target: Target) -> None:
    found = step(target)
    assert (found.to, found.reason) == (None, "below_log")
    assert "begins at 100" in found.why and "--to-earliest" in found.why


def test_a_time_is_the_first_record_at_or_after_it() -> None:
    assert step(Since(NOON), first=First(150, NOON_MS + 5)).to == 150
    assert step(Since(NOON), first=First(100, NOON_MS)).to == 100


def test_a_time_after_the_last_record_changes_nothing_and_says_so() -> None:
    found = step(Since(NOON))
    assert (found.to, found.reason) == (None, "no_record")
    assert found.why == "no record at or after 2026-11-22T12:00:00.000Z"


def test_a_time_before_the_log_is_not_taken_for_its_beginning_and_names_the_earliest() -> None:
    found = step(Since(NOON), first=First(100, NOON_MS + 60_000))
    assert (found.to, found.reason) == (None, "before_log")
    assert "2026-11-22T12:01:00.000Z" in found.why and "--to-earliest" in found.why


def test_a_time_behind_which_the_group_has_not_come_is_above_the_position() -> None:
    assert step(Since(NOON), first=First(190, NOON_MS)).reason == "above_position"


def test_a_partition_that_was_never_read_is_left_alone() -> None:
    fresh = Stand(committed=None, position=None, log_start=0, log_end=7)
    for target in (Earliest(), Current(), Exactly(3), Shift(-1), Since(NOON)):
        assert step(target, fresh, First(0, NOON_MS)).reason == "never_read"


def test_idle_partitions_do_no_harm_beside_one_that_moves_but_alone_they_are_no_reset() -> None:
    moving, idle = step(Earliest()), step(Since(NOON))
    assert not falls_short([moving, idle])
    assert falls_short([idle])
    assert not falls_short([step(Current())])  # is there already


KNOWN = [Partition("usage.v1", 0), *(Partition("usage.v3", number) for number in range(3))]
TOPICS = ("usage.v1", "usage.v3")


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ([], KNOWN),
        (["usage.v1"], KNOWN[:1]),
        (["usage.v3:2,0"], [KNOWN[1], KNOWN[3]]),
        (["usage.v3:1", "usage.v3:1", "usage.v1"], [KNOWN[0], KNOWN[2]]),
    ],
)
def test_topics_and_partitions_are_chosen_as_kafkas_own_tool_has_them(
    wanted: list[str], chosen: list[Partition]
) -> None:
    assert in_scope(wanted, TOPICS, KNOWN) == chosen


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("deltas.v1", "is no topic of this group, which reads usage.v1, usage.v3"),
        ("tidemeter-counters-__assignor-__leader", "is no topic of this group"),
        ("", "is no topic of this group"),
        ("usage.v3:", "is not topic:partition,…"),
        ("usage.v3:1-2", "is not topic:partition,…, such as usage.v3:0,2"),
        ("usage.v3:١", "is not topic:partition,…"),
        ("usage.v3:0,3", "usage.v3 has no partition 3"),
        ("usage.v1,usage.v3", "is no topic of this group"),
    ],
)
def test_another_topic_is_refused(wanted: str, sentence: str) -> None:
    with pytest.raises(Misconfigured, match=sentence):
        in_scope([wanted], TOPICS, KNOWN)


def test_times_are_shown_to_the_millisecond_in_utc() -> None:
    here = NOON.astimezone(tz=None) + timedelta(microseconds=1500)
    assert step(Since(here)).why == "no record at or after 2026-11-22T12:00:00.001Z"
