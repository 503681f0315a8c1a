"""From a window of event time to the offsets that have to be read, and whether they are still there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

import psycopg

from services.archive.files import Archive
from services.counters.decisions import BLOCK_RECORDS
from services.counters.ledger import GROUP
from services.replay.log import Log, Range
from services.streaming.chunks import Partition
from services.streaming.lag import log_ends, log_starts
from services.streaming.replays import ALWAYS, RefusedReplay, Scope, bound
from services.wire.periods import HOUR_US
from services.wire.times import instant, micros
from services.wire.topics import USAGE_VERSIONS
from services.wire.usage import FUTURE_TOLERANCE_US

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Position:
    """Where counting stands in a partition: it answers for ``start`` to ``next``, and knows what became of
    each record from ``decided`` on."""

    start: int
    decided: int
    next: int


def read_positions(db: Connection, *, lock: bool = False) -> dict[Partition, Position]:
    """Positions of all usage partitions; with ``lock`` none of them moves until the transaction ends."""
    rows = db.execute(_LOCKED if lock else _POSITIONS, (GROUP, list(USAGE_VERSIONS))).fetchall()
    return {
        Partition(topic, partition): Position(start, decided if to == next_ else next_, next_)
        for topic, partition, start, decided, to, next_ in rows
    }


_POSITIONS: LiteralString = (
    "SELECT topic, partition, start_offset, decided_from, decided_to, next_offset FROM partition_offsets "
    "WHERE consumer = %s AND topic = ANY(%s) ORDER BY consumer, topic, partition"
)
_LOCKED: LiteralString = _POSITIONS + " FOR UPDATE"


def hours_of(db: Connection, log: Log, scope: Scope, positions: Mapping[Partition, Position]) -> Scope:
    """The scope with hours of event time, if it was asked for by arrival or by offsets.

    They are those of all usage that arrived there, as far as ``log_blocks`` tells them apart: more hours than
    needed may be recomputed, never fewer. Nothing arrived: no hour.

    Raises:
        RefusedReplay: the offsets name a partition that is not counted.
    """
    if scope.arrived is not None:
        since, until = scope.arrived
        first, last = log.offsets_at(list(positions), since), log.offsets_at(list(positions), until)
        begins = log_starts(log.admin, positions)
        asked = [
            (
                tp,
                # Who asks for the log's very first record may mean what is in it no more.
                positions[tp].start if first[tp] in (begins[tp], -1) else first[tp],
                last[tp] if last[tp] >= 0 else positions[tp].next,
            )
            for tp in positions
            if first[tp] >= 0 or begins[tp] == positions[tp].next > positions[tp].start
        ]
    elif scope.offsets:
        asked = [(Partition(topic, number), start, end) for topic, number, start, end in scope.offsets]
        for number, (tp, _, _) in enumerate(asked):
            if tp not in positions:
                raise RefusedReplay(
                    "partition_unknown", "no such partition is counted", path=f"offsets[{number}]"
                )
    else:
        return scope
    bounds: list[tuple[datetime, datetime]] = []
    for tp, start, end in asked:
        position = positions[tp]
        first_asked = max(start, position.start)
        if first_asked < position.decided > position.start and first_asked < min(end, position.next):
            raise RefusedReplay(
                "window_not_held",
                f"records of {tp.topic}/{tp.partition} below offset {position.decided} were counted by an "
                "older release, and cannot be replayed",
                path="since" if scope.arrived else "offsets",
            )
        row = db.execute(
            "SELECT min(first_event), max(last_event) FROM log_blocks "
            "WHERE topic = %s AND partition = %s AND block BETWEEN %s AND %s",
            (*tp, start // BLOCK_RECORDS, (min(end, positions[tp].next) - 1) // BLOCK_RECORDS),
        ).fetchone()
        if row is not None and row[0] is not None:
            bounds.append(row)
    if not bounds:
        return scope.within(0, 0)
    return scope.within(micros(min(low for low, _ in bounds)), micros(max(high for _, high in bounds)) + 1)


def find_ranges(db: Connection, scope: Scope, positions: Mapping[Partition, Position]) -> list[Range]:
    """What has to be read: all records below the positions of which an event may lie in the window."""
    if scope.since_us == ALWAYS:
        return [Range(tp, one.start, one.next) for tp, one in positions.items() if one.start < one.next]
    rows = db.execute(
        "SELECT topic, partition, block FROM log_blocks WHERE last_event >= %s AND first_event < %s "
        "ORDER BY topic, partition, block",
        (bound(scope.since_us), bound(scope.until_us)),
    ).fetchall()
    found: list[Range] = []
    for topic, partition, block in rows:
        tp = Partition(topic, partition)
        if (position := positions.get(tp)) is None:
            continue
        start = max(block * BLOCK_RECORDS, position.start)
        end = min((block + 1) * BLOCK_RECORDS, position.next)
        if start >= end:
            continue
        if found and found[-1].tp == tp and found[-1].end == start:
            found[-1] = Range(tp, found[-1].start, end)
        else:
            found.append(Range(tp, start, end))
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """What log and archive still have: where each log begins, the offset from which on everything is there
    and its decision is kept, and, of partitions that lost something, the first full hour without a loss."""

    begins: Mapping[Partition, int]
    usable: Mapping[Partition, int]
    lost_until: Mapping[Partition, int]

    @property
    def earliest(self) -> int | None:
        """The first full hour from which on nothing is lost anywhere; None: nothing is."""
        return max(self.lost_until.values(), default=None)


def find_held(db: Connection, log: Log, positions: Mapping[Partition, Position]) -> Held:
    """Ask log and archive.

    Raises:
        Transient: Kafka does not answer.
    """
    begins = log_starts(log.admin, positions)
    usable: dict[Partition, int] = {}
    lost_until: dict[Partition, int] = {}
    for tp, position in positions.items():
        usable[tp] = max(_usable_from(log.archive, tp, position, begins[tp]), position.decided)
        if usable[tp] <= position.start:
            continue
        if (lost := _lost_until(db, log, tp, usable[tp], position)) is not None:
            lost_until[tp] = lost
    return Held(begins, usable, lost_until)


def held_part(ranges: Sequence[Range], held: Held) -> tuple[list[Range], int]:
    """What of the ranges is still there, and how many records are not."""
    found, missing = [], 0
    for one in ranges:
        start = max(one.start, min(held.usable[one.tp], one.end))
        missing += start - one.start
        if start < one.end:
            found.append(Range(one.tp, start, one.end))
    return found, missing


def require_held(db: Connection, log: Log, scope: Scope, positions: Mapping[Partition, Position]) -> Held:
    """Whether log and archive still have every record of the window. What they lost lies before it.

    Raises:
        RefusedReplay: ``window_not_held``: the message names the earliest time that is; ``log_truncated``: a
            log ends below what was counted of it, so it is another one.
        Transient: Kafka does not answer.
    """
    held = find_held(db, log, positions)
    for tp, end in log_ends(log.admin, positions).items():
        if end < positions[tp].next:
            raise RefusedReplay(
                "log_truncated",
                f"the log of {tp.topic}/{tp.partition} ends at {end}, and was counted up to "
                f"{positions[tp].next}: it is not the log that was counted",
            )
    if scope.since_us == scope.until_us:
        return held
    if scope.since_us == ALWAYS:
        for tp, position in positions.items():
            if held.usable[tp] > position.start:
                raise RefusedReplay(
                    "window_not_held",
                    f"the log of {tp.topic}/{tp.partition} can be replayed from offset {held.usable[tp]} on, "
                    f"and was counted from {position.start}: everything can only be rebuilt with an archive "
                    "of it",
                    path="since",
                )
    if held.earliest is not None and scope.since_us < held.earliest:
        raise RefusedReplay(
            "window_not_held",
            "the window begins before what is kept: the earliest it can begin is "
            f"{instant(held.earliest):%Y-%m-%dT%H:%M:%SZ}",
            path="since",
        )
    return held


def _usable_from(archive: Archive | None, tp: Partition, position: Position, log_start: int) -> int:
    """The offset from which on log and archive have everything."""
    usable = log_start
    if log_start > position.start and archive is not None:
        for start, end in reversed(archive.held(tp)):
            if start < usable <= end:
                usable = start
    return usable


def _lost_until(db: Connection, log: Log, tp: Partition, usable: int, position: Position) -> int | None:
    """The first full hour of which no record is below ``usable``; None: there was none at all."""
    row = db.execute(
        "SELECT max(last_event) FROM log_blocks WHERE topic = %s AND partition = %s AND block <= %s",
        (*tp, (usable - 1) // BLOCK_RECORDS),
    ).fetchone()
    latest = None if row is None or row[0] is None else micros(row[0])
    # What is gone arrived before what is left, and nothing that counts happens long after it arrives.
    arrived = _arrival(log, tp, usable) if usable < position.next else None
    newest = time.time_ns() // 1000 if arrived is None else arrived * 1000 + FUTURE_TOLERANCE_US
    if position.decided > position.start:  # blocks do not tell of all of it
        latest = newest
    return None if latest is None else (min(latest, newest) // HOUR_US + 1) * HOUR_US


def _arrival(log: Log, tp: Partition, offset: int) -> int | None:
    if log.archive is not None:
        for start, end in log.archive.held(tp):
            if start <= offset < end:
                batch = next(iter(log.archive.read(tp, offset, offset + 1)), None)
                return batch[0].timestamp if batch else None
    return log.first_arrival(tp, offset)
