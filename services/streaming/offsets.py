"""SQL of ``partition_offsets``: where a consumer group stands, stored in the transaction that did the work.

The row lock fences: a worker that lost its partition, or that was stopped and wakes later, finds
``next_offset`` moved and skips. A partition that must not go on carries the reason in ``halted``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg

from services.streaming.chunks import Partition

Connection = psycopg.Connection[Any]

#: The lock that keeps out, while a replay compares counters, whoever changes them without moving a position.
BESIDE_THE_LOG: LiteralString = "hashtextextended('tidemeter/beside-the-log', 0)"


@dataclass(frozen=True, slots=True)
class Position:
    """The stored position of one partition."""

    next_offset: int
    parked_offsets: list[int]
    halted: str | None


def ensure_positions(db: Connection, consumer: str, starts: Mapping[Partition, int]) -> None:
    """Create the rows of partitions that this consumer group never read; ``starts`` is the log start."""
    with db.transaction():
        # A replay locks the positions that there are: none may begin while it compares.
        db.execute(f"SELECT pg_advisory_xact_lock_shared({BESIDE_THE_LOG})")
        db.cursor().executemany(
            "INSERT INTO partition_offsets (consumer, topic, partition, start_offset, next_offset, "
            "decided_from, decided_to) VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [(consumer, tp.topic, tp.partition, *([start] * 4)) for tp, start in starts.items()],
        )


def read_positions(db: Connection, consumer: str) -> dict[Partition, Position]:
    """Every partition the group ever read."""
    rows = db.execute(
        "SELECT topic, partition, next_offset, parked_offsets, halted FROM partition_offsets "
        "WHERE consumer = %s",
        (consumer,),
    ).fetchall()
    return {Partition(row[0], row[1]): Position(row[2], row[3], row[4]) for row in rows}


def lock_position(db: Connection, consumer: str, tp: Partition) -> Position | None:
    """Lock the row until the transaction ends; None when the partition was never assigned."""
    row = db.execute(
        "SELECT next_offset, parked_offsets, halted FROM partition_offsets "
        "WHERE consumer = %s AND topic = %s AND partition = %s FOR UPDATE",
        (consumer, tp.topic, tp.partition),
    ).fetchone()
    return None if row is None else Position(row[0], row[1], row[2])


def advance(
    db: Connection, consumer: str, tp: Partition, next_offset: int, parked_offsets: list[int]
) -> None:
    """Move the locked row forward. Never back: a rewind belongs to the operator's own command."""
    db.execute(
        "UPDATE partition_offsets SET next_offset = %s, parked_offsets = %s, updated_at = now(), "
        "decided_from = CASE WHEN decided_to = next_offset THEN decided_from ELSE next_offset END, "
        "decided_to = %s WHERE consumer = %s AND topic = %s AND partition = %s AND next_offset <= %s",
        (next_offset, parked_offsets, next_offset, consumer, tp.topic, tp.partition, next_offset),
    )


def halt(db: Connection, consumer: str, tp: Partition, reason: str) -> bool:
    """Stop the partition; True when it was running until now."""
    changed = db.execute(
        "UPDATE partition_offsets SET halted = %s, halted_at = now() "
        "WHERE consumer = %s AND topic = %s AND partition = %s AND halted IS NULL",
        (reason, consumer, tp.topic, tp.partition),
    )
    return changed.rowcount == 1


def resume(
    db: Connection, consumer: str | None, topics: Iterable[Partition] | None
) -> list[tuple[str, str, int, str]]:
    """Let halted partitions go on, with fresh breakers; returns (consumer, topic, partition, reason).

    Not those halted by ``log_truncated``: theirs is another log, and its records would pass for old ones.
    """
    wanted = None if topics is None else [f"{tp.topic}/{tp.partition}" for tp in topics]
    return db.execute(
        "WITH stopped AS (SELECT consumer, topic, partition, halted FROM partition_offsets "
        "  WHERE halted IS NOT NULL AND halted <> 'log_truncated' "
        "  AND (%(consumer)s::text IS NULL OR consumer = %(consumer)s) "
        "  AND (%(wanted)s::text[] IS NULL OR topic || '/' || partition = ANY(%(wanted)s)) FOR UPDATE) "
        "UPDATE partition_offsets p SET halted = NULL, halted_at = NULL, parked_offsets = '{}' "
        "FROM stopped s "
        "WHERE (p.consumer, p.topic, p.partition) = (s.consumer, s.topic, s.partition) "
        "RETURNING p.consumer, p.topic, p.partition, s.halted",
        {"consumer": consumer, "wanted": wanted},
    ).fetchall()


def accept_lost(db: Connection, starts: Mapping[Partition, int]) -> list[tuple[str, Partition, int, int]]:
    """Move partitions halted by ``offset_gap`` to the first record that is left.

    ``starts`` holds the log's first offsets. Returns (consumer, partition, old position, records lost); the
    consumer is no longer accountable for those. Run it in a transaction, before :func:`resume`.
    """
    moved = []
    for tp, start in starts.items():
        rows = db.execute(
            "UPDATE partition_offsets p SET next_offset = %(start)s, decided_to = %(start)s, "
            "decided_from = CASE WHEN p.decided_to = old.next_offset THEN p.decided_from ELSE %(start)s END, "
            "start_offset = p.start_offset + %(start)s - old.next_offset "
            "FROM (SELECT consumer, next_offset FROM partition_offsets WHERE topic = %(topic)s "
            "  AND partition = %(partition)s AND halted = 'offset_gap' AND next_offset < %(start)s "
            "  FOR UPDATE) old "
            "WHERE p.consumer = old.consumer AND p.topic = %(topic)s AND p.partition = %(partition)s "
            "RETURNING p.consumer, old.next_offset, %(start)s - old.next_offset",
            {"start": start, "topic": tp.topic, "partition": tp.partition},
        ).fetchall()
        moved += [(consumer, tp, position, lost) for consumer, position, lost in rows]
    return moved
