"""Whatever is asked for, wherever a group stands: a reset can do no harm."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.streaming.chunks import Partition
from services.streaming.resetting import Current, Earliest, Exactly, First, Shift, Since, Stand, Target, plan

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOON_MS = int(NOON.timestamp() * 1000)
SMALL = st.integers(0, 60)

PARTITIONS = st.builds(Partition, st.sampled_from(["usage.v1", "usage.v3"]), st.integers(0, 3))


@st.composite
def stand(draw: st.DrawFn) -> Stand:
    """Any, also what no healthy group has."""
    start, end = sorted((draw(SMALL), draw(SMALL)))
    return Stand(draw(st.none() | SMALL), draw(st.none() | SMALL), start, end)


TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.just(Earliest()),
    st.just(Current()),
    st.builds(Exactly, st.integers(0, 80)),
    st.builds(Shift, st.integers(-80, 80)),
    st.builds(Since, st.integers(-5, 5).map(lambda s: NOON + timedelta(seconds=s))),
)
FIRSTS = st.none() | st.builds(First, SMALL, st.integers(NOON_MS - 5000, NOON_MS + 5000))
GROUPS = st.dictionaries(PARTITIONS, st.tuples(stand(), FIRSTS), max_size=8)


@given(GROUPS, TARGETS)
def test_every_move_ends_in_the_log_and_never_above_the_position(
    group: dict[Partition, tuple[Stand, First | None]], target: Target
) -> None:
    steps = plan(
        {tp: one for tp, (one, _) in group.items()}, target, {tp: first for tp, (_, first) in group.items()}
    )
    assert [step.partition for step in steps] == sorted(group)
    for step in steps:
        one, _ = group[step.partition]
        assert (step.committed, step.position) == (one.committed, one.position)
        assert (step.to is None) == (step.reason is not None) == bool(step.why)
        if step.to is None:
            assert not step.moves and step.read_again == 0
        else:
            assert one.position is not None
            assert one.log_start <= step.to <= min(one.position, one.log_end)
            assert step.read_again == (one.position - step.to if step.to else 0)
            assert step.moves == (step.to != one.committed)


@given(GROUPS, TARGETS)
def test_a_move_adds_no_problem_and_cures_a_commit_that_ran_ahead(
    group: dict[Partition, tuple[Stand, First | None]], target: Target
) -> None:
    stands = {tp: one for tp, (one, _) in group.items()}
    for step in plan(stands, target, {tp: first for tp, (_, first) in group.items()}):
        if step.to is not None:
            before = stands[step.partition]
            after = replace(before, committed=step.to)
            assert set(after.problems()) == set(before.problems()) - {"committed_above_position"}


@given(GROUPS, TARGETS.filter(lambda target: not isinstance(target, Shift)))
def test_a_reset_that_was_done_has_nothing_left_to_do(
    group: dict[Partition, tuple[Stand, First | None]], target: Target
) -> None:
    stands = {tp: one for tp, (one, _) in group.items()}
    firsts = {tp: first for tp, (_, first) in group.items()}
    for step in plan(stands, target, firsts):
        if step.to is not None:
            stands[step.partition] = replace(stands[step.partition], committed=step.to)
    assert not any(step.moves for step in plan(stands, target, firsts))
