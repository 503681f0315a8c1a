"""Where a live group stands, what is wrong with that, and how far back its committed offsets may go. Pure.

The position in PostgreSQL is the truth and never moves here; only what Kafka remembers for the group does. So
nothing planned here can count a record twice or leave one out: a worker skips what is below its position, and
moves back what is committed above it. Promises of a plan: every partition that was asked for is in it; each
move ends inside the log and at or below the position; what cannot be done as asked is left alone, and named.

What asks the servers is in ``groups``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from services.streaming.chunks import Partition
from services.wire.errors import Misconfigured
from services.wire.times import instant, utc

Problem = Literal[
    "committed_above_position", "committed_without_position", "position_below_log", "position_above_log"
]
#: What each means, and what becomes of it.
PROBLEMS: dict[Problem, str] = {
    "committed_above_position": "Kafka remembers more than was done; a worker moves it back when it starts",
    "committed_without_position": "PostgreSQL has no position of this group: is it the right database?",
    "position_below_log": "records were deleted before they were read; the partition halts as offset_gap",
    "position_above_log": "the log ends below the position: it is another log; halts as log_truncated",
}


@dataclass(frozen=True, slots=True)
class Stand:
    """One partition of a group, as the servers say. None: nothing is committed, it was never read."""

    committed: int | None
    position: int | None
    log_start: int
    log_end: int
    halted: str | None = None

    @property
    def lag(self) -> int:
        """Records that wait: between the position and the end of the log."""
        return max(0, self.log_end - max(self.log_start, self.position or 0))

    def problems(self) -> list[Problem]:
        """What does not fit together."""
        if self.position is None:
            return [] if self.committed is None else ["committed_without_position"]
        found: list[Problem] = []
        if self.committed is not None and self.committed > self.position:
            found.append("committed_above_position")
        if self.position < self.log_start:
            found.append("position_below_log")
        if self.position > self.log_end:
            found.append("position_above_log")
        return found


class First(NamedTuple):
    """The first record at or after a time: where it is, and its own time in milliseconds."""

    offset: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Since:
    """To the first record at or after ``moment``."""

    moment: datetime


@dataclass(frozen=True, slots=True)
class Earliest:
    """To the first record that is left."""


@dataclass(frozen=True, slots=True)
class Current:
    """To the position."""


@dataclass(frozen=True, slots=True)
class Exactly:
    """To ``offset``, in every partition."""

    offset: int


@dataclass(frozen=True, slots=True)
class Shift:
    """``by`` records on from what is committed, or from the position where nothing is; back if negative."""

    by: int


Target = Since | Earliest | Current | Exactly | Shift

Reason = Literal["never_read", "no_record", "before_log", "below_log", "above_log", "above_position"]
#: Nothing of what was asked for is missing when a partition is left alone for one of these.
HARMLESS: frozenset[Reason] = frozenset({"never_read", "no_record"})


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one partition. ``to`` is None when it is left alone: ``reason`` and ``why`` say why."""

    partition: Partition
    committed: int | None
    position: int | None
    to: int | None
    reason: Reason | None = None
    why: str = ""

    @property
    def moves(self) -> bool:
        """Kafka will remember something else."""
        return self.to is not None and self.to != self.committed

    @property
    def read_again(self) -> int:
        """Records that a worker reads again and skips, because they are below its position.

        From 0 none is: Faust takes a committed offset of 0 for nothing, and a worker begins at its position.
        """
        return self.position - self.to if self.to and self.position is not None else 0


def plan(
    stands: Mapping[Partition, Stand], target: Target, firsts: Mapping[Partition, First | None]
) -> list[Step]:
    """One step for each of ``stands``. ``firsts`` is for :class:`Since`: None, or missing, is no record."""
    return [_step(tp, stand, target, firsts.get(tp)) for tp, stand in sorted(stands.items())]


def falls_short(steps: Sequence[Step]) -> bool:
    """Something that was asked for is not done by ``steps``; or there is nothing at all in it."""
    return any(step.reason is not None and step.reason not in HARMLESS for step in steps) or all(
        step.reason is not None for step in steps
    )


def _step(tp: Partition, stand: Stand, target: Target, first: First | None) -> Step:
    def leave(reason: Reason, why: str) -> Step:
        return Step(tp, stand.committed, stand.position, None, reason, why)

    if stand.position is None:
        return leave("never_read", "no worker of the group has read it: one begins at the log's first record")
    match target:
        case Since(moment):
            if first is None:
                return leave("no_record", f"no record at or after {shown(moment)}")
            earliest = instant(first.at_ms * 1000)
            if first.offset <= stand.log_start and earliest > moment:
                return leave(
                    "before_log",
                    f"the earliest record is of {shown(earliest)}: --to-earliest goes there",
                )
            to = first.offset
        case Earliest():
            to = stand.log_start
        case Current():
            to = stand.position
        case Exactly(offset):
            to = offset
        case Shift(by):
            to = (stand.position if stand.committed is None else stand.committed) + by
    if to < stand.log_start:
        return leave("below_log", f"{to} is below the log, which begins at {stand.log_start}: --to-earliest")
    if to > stand.position:
        return leave(
            "above_position",
            f"{to} is above the position {stand.position}: a worker would move it back",
        )
    if to > stand.log_end:
        return leave("above_log", f"{to} is above the log, which ends at {stand.log_end}")
    return Step(tp, stand.committed, stand.position, to)


def shown(moment: datetime) -> str:
    """A time in UTC, to the millisecond: Kafka's own precision."""
    return utc(moment).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def in_scope(wanted: Iterable[str], topics: Sequence[str], known: Collection[Partition]) -> list[Partition]:
    """The partitions that ``topic`` or ``topic:partition,…`` mean; all of ``known`` when nothing is wanted.

    Raises:
        Misconfigured: it is written otherwise, or is none of ``topics``, or no such partition is ``known``.
    """
    found: set[Partition] = set()
    for text in wanted:
        topic, colon, numbers = text.partition(":")
        if topic not in topics:
            raise Misconfigured(f"{topic!r} is no topic of this group, which reads {', '.join(topics)}")
        if not colon:
            found |= {tp for tp in known if tp.topic == topic}
            continue
        for number in numbers.split(","):
            if not (number.isascii() and number.isdigit()):
                raise Misconfigured(f"{text!r} is not topic:partition,…, such as {topic}:0,2")
            tp = Partition(topic, int(number))
            if tp not in known:
                raise Misconfigured(f"{topic} has no partition {tp.partition}")
            found.add(tp)
    return sorted(found or known)
