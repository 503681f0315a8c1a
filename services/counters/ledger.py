"""The one transaction of a chunk, numbered like its crash points.

1. lock the partition's position: fences a revived worker, skips redelivery, finds gaps;
2. check the configuration's version, and prepare again when it moved;
3. feed the breaker;
4. remember the ids, set-wise, and learn which were there before;
5. lock the items and read their watermarks;
6. decide every event's outcome (pure);
7. write items, buckets, accounts, adjustments, conflicts and the outbox;
8. move the position. Commit.

Rows are locked in one order by everyone (position, ids ascending, items ascending), so two workers can wait
for each other but not in a circle.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg

from services.counters.config import Configuration, load_configuration, read_version
from services.counters.prepare import (
    OUTCOMES,
    Event,
    Item,
    Prepared,
    Preparer,
    parked_rows,
)
from services.counters.records import adjustment_row, conflict_row
from services.counters.windows import Arrival, add, classify
from services.streaming import breaker, offsets
from services.streaming.chunks import Chunk
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.streaming.worker import Applied
from services.wire import metrics
from services.wire.errors import OffsetGap, Transient, require
from services.wire.pgarrays import int8_array, register, timestamp_array, timestamp_of, uuid_array
from services.wire.records import OutboxRow, ops_event
from services.wire.topics import USAGE_VERSIONS

GROUP = "tidemeter-counters"

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class FirstSeen:
    """The record that an id was first counted from."""

    digest: int
    version: int
    partition: int
    offset: int


@dataclass(slots=True)
class Decisions:
    """Outcomes that write more than a counter."""

    adjusted: list[tuple[Event, int]] = field(default_factory=list)  # with the watermark that judged it
    conflicts: list[tuple[Event, FirstSeen]] = field(default_factory=list)


class Counters:
    """The chunk handler of the counters group."""

    def __init__(self, preparer: Preparer, load: Callable[[], Configuration]) -> None:
        self._preparer = preparer
        self._load = load
        self._config: Configuration | None = None

    def prepare(self, chunk: Chunk) -> Prepared:
        """See :class:`services.counters.prepare.Preparer`."""
        if self._config is None:
            self._config = self._load()
        return self._preparer.prepare(chunk, self._config)

    def apply(self, db: Connection, prepared: Prepared) -> Applied:
        """Make one chunk durable, in effect once, or not at all.

        Raises:
            OffsetGap: the chunk begins above the stored position.
        """
        register(db)
        if prepared.used:
            prepared = self.prepare(prepared.chunk)
        prepared.used = True
        with db.transaction():
            applied, counts = self._transaction(db, prepared)
            fault_point("tx.before_commit")
        fault_point("tx.after_commit")
        for outcome, number in counts.items():
            metrics.OUTCOMES.labels(outcome).inc(number)
        return applied

    def _transaction(self, db: Connection, prepared: Prepared) -> tuple[Applied, dict[str, int]]:
        tp = prepared.chunk.partition
        position = offsets.lock_position(db, GROUP, tp)  # 1
        require(position is not None, f"no position for {tp}")
        assert position is not None  # noqa: S101  (for the type checker; require() is the check)
        fault_point("tx.locked")
        if position.halted is not None:
            return Applied(position.next_offset, halted=position.halted), {}
        chunk = prepared.chunk
        if chunk.next_offset <= position.next_offset:
            metrics.REDELIVERED.inc(len(chunk.records))
            return Applied(position.next_offset, redelivered=True), {}
        if chunk.first_offset > position.next_offset:
            raise OffsetGap(f"{tp} is at {position.next_offset}, the chunk begins at {chunk.first_offset}")
        fresh = chunk.after(position.next_offset)
        if read_version(db) != prepared.config_version:  # 2
            self._config = load_configuration(db)
        if fresh is not chunk or prepared.config_version != self._version():
            prepared = self.prepare(fresh)
        parked_offsets, trip = breaker.feed(  # 3
            position.parked_offsets,
            # Only what a release can break; a tenant's wrong meter or clock must not stop everybody else.
            (fresh.records[one.index].offset for one in prepared.parked if one.outcome == "upcast_failed"),
        )
        if trip is not None:
            prepared = self.prepare(fresh.until(trip))
        rows: list[OutboxRow] = []
        if prepared.chunk.records:
            rows = self._count(db, prepared)
        next_offset = prepared.chunk.next_offset if prepared.chunk.records else position.next_offset
        if trip is not None:
            offsets.halt(db, GROUP, tp, "too_many_parked")
            rows.append(_halted_event(tp.topic, tp.partition, trip))
        enqueue(db, GROUP, rows)
        offsets.advance(db, GROUP, tp, next_offset, parked_offsets)  # 8
        halted = "too_many_parked" if trip is not None else None
        applied = Applied(next_offset, len(rows), halted, redelivered=fresh is not chunk)
        return applied, _outcome_totals(prepared)

    def _version(self) -> int:
        return -1 if self._config is None else self._config.version

    def _count(self, db: Connection, prepared: Prepared) -> list[OutboxRow]:
        """Steps 4 to 7 for a chunk with at least one record; returns what has to leave."""
        _account_parked(prepared)
        known = _remember_ids(db, prepared)  # 4
        fault_point("tx.ids_remembered")
        _lock_items(db, prepared)  # 5
        decisions = _decide(prepared, known)  # 6
        _carry_forward(db, prepared, decisions)
        now_us = time.time_ns() // 1000
        with db.pipeline():  # 7
            _write_items(db, prepared)
            _write_buckets(db, prepared)
            _write_accounts(db, prepared)
            rows = parked_rows(prepared.chunk, prepared.parked, now_us)
            for event, watermark in decisions.adjusted:
                key = self._preparer.idempotency_key(prepared.chunk, event[0])
                rows.append(adjustment_row(db, prepared.chunk, event, key, watermark))
            for event, first in decisions.conflicts:
                key = self._preparer.idempotency_key(prepared.chunk, event[0])
                rows.extend(conflict_row(db, prepared.chunk, event, key, first, now_us))
        fault_point("tx.counted")
        return rows


def _account_parked(prepared: Prepared) -> None:
    for one in prepared.parked:
        account = prepared.account(one.tenant_id, one.meter)
        account.received += 1
        setattr(account, one.outcome, getattr(account, one.outcome) + 1)


def _remember_ids(db: Connection, prepared: Prepared) -> dict[bytes, FirstSeen]:
    """Insert the ids of this chunk; returns those that were there before, with their first record.

    A look-up and a binary COPY of the rest cost half of INSERT … ON CONFLICT, which writes a second WAL
    record for each row. The price: when another worker inserts one of the ids in between, the COPY fails.

    Raises:
        Transient: that happened; the next attempt finds the id.
    """
    events = sorted(prepared.events, key=_event_id)
    if not events:
        return {}
    rows = db.execute(
        _FIRST_SEEN, {"ids": uuid_array([event[1] for event in events])}, binary=True
    ).fetchall()
    known = {bytes(row[0]): FirstSeen(*row[1:]) for row in rows}
    tp, records = prepared.chunk.partition, prepared.chunk.records
    version, partition = USAGE_VERSIONS[tp.topic], tp.partition
    new = [
        _SEEN_ROW(5, 16, event_id, 8, digest, 2, version, 4, partition, 8, records[index].offset)
        for index, event_id, digest, _, _, _ in events
        if event_id not in known
    ]
    try:
        with db.cursor().copy(_COPY_SEEN) as copy:
            copy.write(_COPY_HEADER + b"".join(new) + _COPY_END)
    except psycopg.errors.UniqueViolation as error:
        raise Transient("another worker has counted one of these ids meanwhile") from error
    return known


_FIRST_SEEN = """
SELECT uuid_send(s.event_id), s.digest, s.source, s.partition, s."offset"
FROM unnest(%(ids)s) AS u (i) JOIN seen_current s ON s.event_id = u.i
UNION ALL
SELECT uuid_send(s.event_id), s.digest, s.source, s.partition, s."offset"
FROM unnest(%(ids)s) AS u (i) JOIN seen_previous s ON s.event_id = u.i
"""
_COPY_SEEN = 'COPY seen_current (event_id, digest, source, partition, "offset") FROM STDIN (FORMAT BINARY)'
#: PostgreSQL, COPY, "Binary Format": signature, flags, no extension; then rows of five fields with lengths.
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
_COPY_END = struct.pack(">h", -1)
_SEEN_ROW = struct.Struct(">hi16siqihiiiq").pack


def _event_id(event: Event) -> bytes:
    return event[1]


def _lock_items(db: Connection, prepared: Prepared) -> None:
    by_id = {item.item_id: item for item in prepared.items.values()}
    missing = _read_watermarks(db, by_id)
    if missing:
        new = sorted((by_id[item_id] for item_id in missing), key=_item_id)
        db.execute(
            "INSERT INTO items (item_id, tenant_id, customer_ref, meter, watermark) "
            "SELECT u.i, u.t, u.c, u.m, '-infinity' FROM unnest(%s, %s::text[], %s::text[], %s::text[]) "
            "AS u (i, t, c, m) ON CONFLICT DO NOTHING",
            (
                uuid_array([item.item_id for item in new]),
                [item.meter.tenant_id for item in new],
                [item.customer_ref for item in new],
                [item.meter.meter for item in new],
            ),
        )
        still_missing = _read_watermarks(db, {item.item_id: item for item in new})
        require(not still_missing, "an item that was just inserted is not there")


def _item_id(item: Item) -> bytes:
    return item.item_id


def _read_watermarks(db: Connection, by_id: dict[bytes, Item]) -> list[bytes]:
    """Lock the rows, fill the watermarks in, and return the ids without a row."""
    rows = db.execute(
        "SELECT uuid_send(item_id), timestamptz_send(watermark) FROM items WHERE item_id = ANY(%s) "
        "ORDER BY item_id FOR UPDATE",
        (uuid_array(sorted(by_id)),),
        binary=True,
    ).fetchall()
    for item_id, watermark in rows:
        by_id[bytes(item_id)].watermark = timestamp_of(watermark)
    if len(rows) == len(by_id):
        return []
    return list(by_id.keys() - {bytes(row[0]) for row in rows})


def _decide(prepared: Prepared, known: dict[bytes, FirstSeen]) -> Decisions:
    """Give every event its outcome, in offset order, and add what counts to the items' buckets."""
    decisions = Decisions()
    records = prepared.chunk.records
    tp = prepared.chunk.partition
    for event in prepared.events:
        index, event_id, digest, item, occurred, quantity = event
        account = item.account
        if known and (first := known.get(event_id)) is not None:
            if first.digest == digest:
                account.duplicate += 1
            else:
                account.conflict += 1
                decisions.conflicts.append((event, first))
            continue
        watermark = item.watermark
        arrival = classify(occurred, watermark, item.meter.lateness_us, records[index].timestamp * 1000)
        if arrival is Arrival.ON_TIME:
            account.counted += 1
            item.watermark = occurred
            add(item, occurred, quantity, 0)
        elif arrival is Arrival.LATE:
            account.late_counted += 1
            add(item, occurred, quantity, 1)
        else:
            account.adjusted += 1
            decisions.adjusted.append((event, watermark))
    if prepared.repeats:
        firsts = {event[1]: event for event in prepared.events}
        for event in prepared.repeats:
            original = firsts[event[1]]
            first = known.get(event[1]) or FirstSeen(
                original[2], USAGE_VERSIONS[tp.topic], tp.partition, records[original[0]].offset
            )
            if first.digest == event[2]:
                event[3].account.duplicate += 1
            else:
                event[3].account.conflict += 1
                decisions.conflicts.append((event, first))
    return decisions


def _carry_forward(db: Connection, prepared: Prepared, decisions: Decisions) -> None:
    """Count what came too late into the open period, where the meter says so: once, expired key or not."""
    carried = [one for one in decisions.adjusted if one[0][3].meter.late_policy == "carry_forward"]
    if not carried:
        return
    ids = uuid_array([event[1] for event, _ in carried])
    rows = db.execute(
        "SELECT uuid_send(adjustment_id) FROM adjustments WHERE adjustment_id = ANY(%s)", (ids,), binary=True
    ).fetchall()
    before = {bytes(row[0]) for row in rows}
    for (index, event_id, _, item, _, quantity), watermark in carried:
        if event_id not in before:
            add(item, max(watermark, prepared.chunk.records[index].timestamp * 1000), quantity, 1)


def _write_items(db: Connection, prepared: Prepared) -> None:
    changed = sorted((item for item in prepared.items.values() if item.buckets), key=_item_id)
    if changed:
        db.execute(
            "UPDATE items SET watermark = greatest(watermark, u.w), dirty_from = least(dirty_from, u.h) "
            "FROM unnest(%s, %s, %s) AS u (i, w, h) WHERE item_id = u.i",
            (
                uuid_array([item.item_id for item in changed]),
                timestamp_array([item.watermark for item in changed]),
                timestamp_array([min(hour for hour, _ in item.buckets) for item in changed]),
            ),
        )


def _write_buckets(db: Connection, prepared: Prepared) -> None:
    rows = [
        (item.item_id, hour, period, *sums)
        for item in sorted(prepared.items.values(), key=_item_id)
        for (hour, period), sums in item.buckets.items()
    ]
    if not rows:
        return
    ids, hours, periods, totals, events, late = zip(*rows, strict=True)
    records = prepared.chunk.records
    db.execute(
        "INSERT INTO buckets AS b "
        "(item_id, hour_start, period_start, total, events, late_events, first_arrival, last_arrival) "
        "SELECT u.i, u.h, u.p, u.t * 0.000000001, u.n, u.l, to_timestamp(%s), to_timestamp(%s) "
        "FROM unnest(%s, %s, %s, %s::numeric[], %s, %s) AS u (i, h, p, t, n, l) "
        "ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET total = b.total + excluded.total, "
        "events = b.events + excluded.events, late_events = b.late_events + excluded.late_events, "
        "first_arrival = least(b.first_arrival, excluded.first_arrival), "
        "last_arrival = greatest(b.last_arrival, excluded.last_arrival)",
        (
            records[0].timestamp / 1000,
            records[-1].timestamp / 1000,
            uuid_array(ids),
            timestamp_array(hours),
            timestamp_array(periods),
            "{" + ",".join(map(str, totals)) + "}",
            int8_array(events),
            int8_array(late),
        ),
    )


def _write_accounts(db: Connection, prepared: Prepared) -> None:
    tp = prepared.chunk.partition
    rows = sorted(prepared.accounts.items())
    for names, account in rows:
        outcomes = sum(getattr(account, outcome) for outcome in OUTCOMES)
        require(
            account.received == outcomes, f"{names}: {account.received} received, {outcomes} with an outcome"
        )
    require(
        sum(account.received for _, account in rows) == len(prepared.chunk.records),
        "a record of the chunk has no account",
    )
    columns = ("received", *OUTCOMES)
    db.execute(
        "INSERT INTO partition_accounts AS a (topic, partition, tenant_id, meter, "  # noqa: S608
        + ", ".join(columns)
        + ") SELECT %s, %s, * FROM unnest(%s::text[], %s::text[], "
        + ", ".join("%s" for _ in columns)
        + ") ON CONFLICT (topic, partition, tenant_id, meter) DO UPDATE SET "
        + ", ".join(f"{column} = a.{column} + excluded.{column}" for column in columns),
        (
            tp.topic,
            tp.partition,
            [names[0] for names, _ in rows],
            [names[1] for names, _ in rows],
            *(int8_array([getattr(account, column) for _, account in rows]) for column in columns),
        ),
    )


def _outcome_totals(prepared: Prepared) -> dict[str, int]:
    return {
        outcome: sum(getattr(account, outcome) for account in prepared.accounts.values())
        for outcome in OUTCOMES
    }


def _halted_event(topic: str, partition: int, offset: int) -> OutboxRow:
    return ops_event(
        "partition_halted",
        subject_type="partition",
        subject_id=f"{topic}/{partition}/{offset}",
        source="counters",
        at_us=time.time_ns() // 1000,
        attributes={"reason": "too_many_parked"},
    )
