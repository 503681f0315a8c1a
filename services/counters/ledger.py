"""The one transaction of a chunk, numbered like its crash points.

1. lock the partition's position: fences a revived worker, skips redelivery, finds gaps;
2. check the configuration's version, and prepare again when it moved;
3. feed the breaker;
4. remember the ids, set-wise, and learn which were there before;
5. lock the items and read their watermarks;
6. decide every event's outcome (pure);
7. write items, buckets, accounts, decisions, adjustments, conflicts and the outbox;
8. move the position. Commit.

Rows are locked in one order by everyone (position, ids ascending, items ascending), so two workers can wait
for each other but not in a circle.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import psycopg

from services.counters import buckets
from services.counters.config import Configuration, load_configuration, read_version
from services.counters.decisions import keep_decisions
from services.counters.prepare import (
    DAY_US,
    OUTCOMES,
    Event,
    Prepared,
    Preparer,
    parked_rows,
    rows_to_park,
)
from services.counters.records import adjustment_row, conflict_rows, conflict_to_park
from services.counters.windows import OLDEST_US, Arrival, add, classify
from services.streaming import breaker, offsets
from services.streaming.chunks import Chunk
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.streaming.parking import park
from services.streaming.worker import Applied
from services.wire import groups, metrics
from services.wire.errors import OffsetGap, Transient, require
from services.wire.periods import HOUR_US
from services.wire.pgarrays import int8_array, register, uuid_array
from services.wire.records import OutboxRow, ops_event
from services.wire.topics import USAGE_VERSIONS
from upcasters.chain import revision

GROUP = groups.COUNTERS

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class FirstSeen:
    """The record that an id was first counted from."""

    digest: int
    version: int
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class TooLate:
    """An event that is not counted as it came. ``watermark`` judged it; ``resend`` is whether its key may
    have been forgotten since it was counted: then only a person can tell. ``counted_us`` is the time it
    counts at if its meter carries it forward."""

    event: Event
    watermark: int
    resend: bool
    counted_us: int

    @property
    def carried(self) -> bool:
        """Whether it is counted into the open period."""
        return self.event[3].meter.late_policy == "carry_forward" and not self.resend


@dataclass(slots=True)
class Decisions:
    """Outcomes that write more than a counter. ``uncounted``: indexes of records that count nowhere yet."""

    too_late: list[TooLate] = field(default_factory=list)
    conflicts: list[tuple[Event, FirstSeen]] = field(default_factory=list)
    uncounted: list[int] = field(default_factory=list)


class Counters:
    """The chunk handler of the counters group.

    ``dedupe_days``: how long keys are kept. An older event may be one that was counted before.
    ``revised``: told, once it is committed, which items have an hour that was revised (``buckets.write``).
    """

    def __init__(
        self,
        preparer: Preparer,
        load: Callable[[], Configuration],
        *,
        dedupe_days: int = 35,
        revised: Callable[[Collection[bytes]], None] = lambda _: None,
    ) -> None:
        self._preparer = preparer
        self._revised = revised
        self._load = load
        self._config: Configuration | None = None
        # A key is kept from its arrival on. An event may be a little ahead of its own, and clocks differ.
        self._key_age_us = dedupe_days * DAY_US - HOUR_US
        for outcome in OUTCOMES:  # from 0 on, so that the first one is an increase
            metrics.OUTCOMES.labels(outcome)

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
            applied, counts, revised = self._transaction(db, prepared)
            fault_point("tx.before_commit")
        fault_point("tx.after_commit")
        if revised:
            self._revised(revised)
        for outcome, number in counts.items():
            metrics.OUTCOMES.labels(outcome).inc(number)
        return applied

    def _transaction(self, db: Connection, prepared: Prepared) -> tuple[Applied, dict[str, int], set[bytes]]:
        """What the transaction did, how many records had which outcome, and which items were revised."""
        tp = prepared.chunk.partition
        position = offsets.lock_position(db, GROUP, tp)  # 1
        require(position is not None, f"no position for {tp}")
        assert position is not None  # noqa: S101  (for the type checker; require() is the check)
        fault_point("tx.locked")
        if position.halted is not None:
            return Applied(position.next_offset, halted=position.halted), {}, set()
        chunk = prepared.chunk
        if chunk.next_offset <= position.next_offset:
            metrics.REDELIVERED.inc(len(chunk.records))
            return Applied(position.next_offset, redelivered=True), {}, set()
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
        revised: set[bytes] = set()
        if prepared.chunk.records:
            rows, revised = self._count(db, prepared)
        next_offset = prepared.chunk.next_offset if prepared.chunk.records else position.next_offset
        if trip is not None:
            offsets.halt(db, GROUP, tp, "too_many_parked")
            rows.append(_halted_event(tp.topic, tp.partition, trip))
        enqueue(db, GROUP, rows)
        offsets.advance(db, GROUP, tp, next_offset, parked_offsets)  # 8
        halted = "too_many_parked" if trip is not None else None
        applied = Applied(next_offset, len(rows), halted, redelivered=fresh is not chunk)
        return applied, _outcome_totals(prepared), revised

    def _version(self) -> int:
        return -1 if self._config is None else self._config.version

    def _count(self, db: Connection, prepared: Prepared) -> tuple[list[OutboxRow], set[bytes]]:
        """Steps 4 to 7 for a chunk with at least one record; returns what has to leave, and revised items."""
        account_parked(prepared)
        known = remember_ids(db, prepared)  # 4
        fault_point("tx.ids_remembered")
        buckets.lock_items(db, prepared.items.values())  # 5
        decisions = decide(prepared, known, self._key_age_us)  # 6
        carry_forward(db, prepared, decisions)
        now_us = time.time_ns() // 1000
        chunk = prepared.chunk
        arrivals_us = chunk.records[0].timestamp * 1000, chunk.records[-1].timestamp * 1000
        revised = buckets.write(db, prepared.items.values(), arrivals_us)  # 7
        with db.pipeline():
            write_accounts(db, prepared)
            keep_decisions(db, prepared, decisions.uncounted)
            rows = parked_rows(chunk, prepared.parked, now_us)
            rows.extend(adjustment_row(db, chunk, one) for one in decisions.too_late)
            to_park = rows_to_park(chunk, prepared.parked)
            for event, first in decisions.conflicts:
                rows.extend(conflict_rows(chunk, event, first, now_us))
                to_park.append(conflict_to_park(chunk, event))
        park(db, GROUP, to_park, tried_with=revision())
        fault_point("tx.counted")
        return rows, revised


def account_parked(prepared: Prepared) -> None:
    """Give every parked record its outcome."""
    for one in prepared.parked:
        account = prepared.account(one.tenant_id, one.meter)
        account.received += 1
        setattr(account, one.outcome, getattr(account, one.outcome) + 1)


def remember_ids(db: Connection, prepared: Prepared) -> dict[bytes, FirstSeen]:
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
        for index, event_id, digest, *_ in events
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


def decide(
    prepared: Prepared, known: dict[bytes, FirstSeen], key_age_us: int, redriven_us: int | None = None
) -> Decisions:
    """Give every event its outcome, in offset order, and add what counts to the items' buckets.

    ``redriven_us``: the time at which parked records are tried again. How long they waited makes them no
    later for the lateness window. For the limits of age they arrive then: Stripe takes nothing older, and
    meanwhile their keys may have been counted and forgotten.
    """
    decisions = Decisions(uncounted=[one.index for one in prepared.parked])
    uncounted = decisions.uncounted
    records = prepared.chunk.records
    tp = prepared.chunk.partition
    age_max_us = min(OLDEST_US, key_age_us)
    for event in prepared.events:
        index, event_id, digest, item, occurred, amount, key = event
        account = item.account
        if known and (first := known.get(event_id)) is not None:
            uncounted.append(index)
            if first.digest == digest:
                account.duplicate += 1
            else:
                account.conflict += 1
                decisions.conflicts.append((event, first))
            continue
        watermark, arrival_us = item.watermark, records[index].timestamp * 1000
        lateness_us = item.meter.lateness_us
        if redriven_us is not None:
            lateness_us += max(0, redriven_us - arrival_us)  # the brokers' clock may be ahead of this one
            arrival_us = redriven_us
        arrival = classify(occurred, watermark, lateness_us, arrival_us, age_max_us)
        if arrival is Arrival.ON_TIME:
            account.counted += 1
            item.watermark = occurred
            add(item, occurred, amount, key, 0)
        elif arrival is Arrival.LATE:
            account.late_counted += 1
            add(item, occurred, amount, key, 1)
        else:
            uncounted.append(index)
            account.adjusted += 1
            resend = occurred < arrival_us - key_age_us
            decisions.too_late.append(TooLate(event, watermark, resend, max(watermark, arrival_us)))
    if prepared.repeats:
        firsts = {event[1]: event for event in prepared.events}
        for event in prepared.repeats:
            uncounted.append(event[0])
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


def carry_forward(db: Connection, prepared: Prepared, decisions: Decisions) -> None:
    """Count what came too late into the open period, where the meter says so: once, however often it came."""
    carried = [one for one in decisions.too_late if one.carried]
    if not carried:
        return
    ids = uuid_array([one.event[1] for one in carried])
    rows = db.execute(
        "SELECT uuid_send(adjustment_id) FROM adjustments WHERE adjustment_id = ANY(%s)", (ids,), binary=True
    ).fetchall()
    before = {bytes(row[0]) for row in rows}
    for one in carried:
        _, event_id, _, item, _, amount, key = one.event
        if event_id not in before:
            add(item, one.counted_us, amount, key, 1)


def write_accounts(db: Connection, prepared: Prepared) -> None:
    """Add what became of the records of ``prepared`` to the accounts.

    Raises:
        Broken: a record has no outcome, or two.
    """
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
