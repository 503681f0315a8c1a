"""What became of each record of the log, in few bytes: the part of counting that a replay cannot repeat.

Whether an event is a duplicate, late or too late was decided by what had come before it, from all partitions
at once. So the decision is kept, in the transaction that made it: the offsets that did *not* count as they
came. Every other record below the position counted. A replay decodes and adds up again; it decides nothing
anew.

Also kept: when the events of each 2,000 records in a row happened (``log_blocks``). It finds a window of
event time in a log that is ordered by arrival, however late some of it came, and does not lean on the
counters that a replay is there to check.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from services.counters.prepare import Event, Prepared
from services.streaming.chunks import Partition, RawRecord
from services.streaming.offsets import BESIDE_THE_LOG
from services.wire.pgarrays import int8_array, timestamp_array

Connection = psycopg.Connection[Any]

#: Records of one row of ``log_blocks``: few enough that a narrow window reads little beside itself.
BLOCK_RECORDS = 2_000


def hold_beside_the_log(db: Connection) -> None:
    """For whoever changes counters without moving a position (re-drives, adjustments, calendars): not while a
    replay compares and corrects them. Until the end of the transaction; take it first."""
    db.execute(f"SELECT pg_advisory_xact_lock_shared({BESIDE_THE_LOG})")


def exclude_beside_the_log(db: Connection) -> None:
    """For a replay: wait for those, and keep them out until the transaction ends."""
    db.execute(f"SELECT pg_advisory_xact_lock({BESIDE_THE_LOG})")


def keep_decisions(db: Connection, prepared: Prepared, uncounted: Sequence[int]) -> None:
    """Keep which records of a chunk, by index, did not count as they came, and when its events happened."""
    chunk = prepared.chunk
    tp, records = chunk.partition, chunk.records
    if uncounted:
        offsets = sorted(records[index].offset for index in uncounted)
        db.execute(
            "INSERT INTO uncounted_records (topic, partition, first_offset, last_offset, offsets) "
            "VALUES (%s, %s, %s, %s, %s)",
            (tp.topic, tp.partition, offsets[0], offsets[-1], int8_array(offsets)),
        )
    if prepared.events:
        events = prepared.events
        if prepared.repeats:  # a repeat without a time of its own may be of another hour
            events = sorted([*events, *prepared.repeats], key=_index)
        times = [event[4] for event in events]
        blocks, start = [], 0
        for block in range(chunk.first_offset // BLOCK_RECORDS, (chunk.next_offset - 1) // BLOCK_RECORDS + 1):
            after = bisect_left(records, (block + 1) * BLOCK_RECORDS, key=_offset)
            end = bisect_left(events, after, lo=start, key=_index)
            if end > start:
                blocks.append((block, min(times[start:end]), max(times[start:end])))
            start = end
        _keep_blocks(db, tp, blocks)


def keep_recounted(db: Connection, prepared: Prepared, uncounted: Iterable[int]) -> None:
    """Keep which of these records, parked once, count now; ``uncounted`` still do not."""
    left = set(uncounted)
    counted = [event for event in prepared.events if event[0] not in left]
    if not counted:
        return
    tp, records = prepared.chunk.partition, prepared.chunk.records
    db.execute(
        'INSERT INTO recounted_records (topic, partition, "offset") SELECT %s, %s, unnest(%s)',
        (tp.topic, tp.partition, int8_array([records[event[0]].offset for event in counted])),
    )
    blocks: defaultdict[int, list[int]] = defaultdict(list)
    for event in counted:
        blocks[records[event[0]].offset // BLOCK_RECORDS].append(event[4])
    _keep_blocks(db, tp, [(block, min(times), max(times)) for block, times in sorted(blocks.items())])


def _offset(record: RawRecord) -> int:
    return record.offset


def _index(event: Event) -> int:
    return event[0]


def _keep_blocks(db: Connection, tp: Partition, blocks: Sequence[tuple[int, int, int]]) -> None:
    db.execute(
        "INSERT INTO log_blocks AS b (topic, partition, block, first_event, last_event) "
        "SELECT %s, %s, u.* FROM unnest(%s, %s, %s) AS u (n, f, l) "
        "ON CONFLICT (topic, partition, block) DO UPDATE "
        "SET first_event = least(b.first_event, excluded.first_event), "
        "last_event = greatest(b.last_event, excluded.last_event)",
        (
            tp.topic,
            tp.partition,
            int8_array([block for block, _, _ in blocks]),
            timestamp_array([first for _, first, _ in blocks]),
            timestamp_array([last for _, _, last in blocks]),
        ),
    )
