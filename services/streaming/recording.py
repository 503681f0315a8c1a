"""The chunk handler of a service that stores what it reads: deltas, webhooks, ops events.

Each record is read by itself (``read``), and what could be read is stored in the transaction that moves the
position (``store``), which must take what comes again for what it knows. What cannot be read is parked; too
much of it halts the partition (``breaker``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar, Generic, TypeVar

from services.streaming import breaker, offsets, outbox
from services.streaming.chunks import Chunk, RawRecord
from services.streaming.parking import ParkedRow, park
from services.streaming.redriving import ParkedRecord, Settled, StillParked, Verdict
from services.streaming.worker import Applied
from services.wire.errors import OffsetGap, Poison, require
from services.wire.records import OutboxRow, Source, header_texts, ops_event, parked_record
from services.wire.times import instant, micros
from services.wire.topics import DEAD_LETTERS
from upcasters.chain import revision

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Found(Generic[R]):
    """What was read, and where."""

    topic: str
    partition: int
    offset: int
    record: R


@dataclass(frozen=True, slots=True)
class Prepared(Generic[R]):
    """A chunk: what could be read, by index, and why the rest could not."""

    chunk: Chunk
    records: dict[int, R]
    refused: dict[int, Poison]


class Recorder(ABC, Generic[R]):
    """A chunk handler: see :class:`services.streaming.worker.ChunkHandler`."""

    #: Consumer group, which is also the producer of the outbox.
    group: ClassVar[str]
    #: Name and subject type of the ops event that tells of a parked record; None: nobody is told.
    told: ClassVar[tuple[str, str] | None] = None

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock

    @abstractmethod
    def read(self, raw: RawRecord) -> R | None:
        """What one record says; None when there is nothing to store. Pure.

        Raises:
            Poison: it cannot be read.
        """

    @abstractmethod
    def store(self, db: offsets.Connection, found: Sequence[Found[R]], now: datetime) -> None:
        """Keep what was read, in the current transaction; what is known already changes nothing."""

    def prepare(self, chunk: Chunk) -> Prepared[R]:
        """Read every record of ``chunk``."""
        records: dict[int, R] = {}
        refused: dict[int, Poison] = {}
        for index, raw in enumerate(chunk.records):
            try:
                record = self.read(raw)
                if record is not None:
                    records[index] = record
            except Poison as error:
                refused[index] = error
        return Prepared(chunk, records, refused)

    def apply(self, db: offsets.Connection, prepared: Prepared[R]) -> Applied:
        """Store what was read and move the position, in one transaction.

        Raises:
            OffsetGap: the chunk begins above the stored position.
        """
        chunk, tp = prepared.chunk, prepared.chunk.partition
        with db.transaction():
            position = offsets.lock_position(db, self.group, tp)
            require(position is not None, f"no position for {tp}")
            assert position is not None  # noqa: S101  (for the type checker; require() is the check)
            if position.halted is not None:
                return Applied(position.next_offset, halted=position.halted)
            if chunk.next_offset <= position.next_offset:
                return Applied(position.next_offset, redelivered=True)
            if chunk.first_offset > position.next_offset:
                raise OffsetGap(
                    f"{tp} is at {position.next_offset}, the chunk begins at {chunk.first_offset}"
                )
            fresh = [i for i, raw in enumerate(chunk.records) if raw.offset >= position.next_offset]
            parked, trip = breaker.feed(
                position.parked_offsets, (chunk.records[i].offset for i in fresh if i in prepared.refused)
            )
            taken = [i for i in fresh if trip is None or chunk.records[i].offset < trip]
            now = self._clock()
            found = [
                Found(*tp, chunk.records[i].offset, prepared.records[i])
                for i in taken
                if i in prepared.records
            ]
            self.store(db, found, now)
            rows = self._park(
                db, chunk, {i: prepared.refused[i] for i in taken if i in prepared.refused}, now
            )
            next_offset = chunk.next_offset if trip is None else trip
            offsets.advance(db, self.group, tp, next_offset, parked)
            halted = None if trip is None else "too_many_parked"
            if halted is not None:
                offsets.halt(db, self.group, tp, halted)
        redelivered = len(fresh) < len(chunk.records)
        return Applied(next_offset, outbox_rows=rows, halted=halted, redelivered=redelivered)

    def retry(
        self, db: offsets.Connection, parked: Sequence[ParkedRecord], now: datetime
    ) -> Mapping[int, Verdict]:
        """Parked records, tried again: see :data:`services.streaming.redriving.Retry`."""
        verdicts: dict[int, Verdict] = {}
        found: list[Found[R]] = []
        for one in parked:
            try:
                record = self.read(one)
            except Poison as error:
                verdicts[one.parked_id] = StillParked(
                    "dead_letter", error.reason, "decode", type(error).__name__
                )
                continue
            verdicts[one.parked_id] = Settled("recorded")
            if record is not None:
                found.append(Found(one.topic, one.partition, one.offset, record))
        self.store(db, found, now)
        return verdicts

    def _park(
        self, db: offsets.Connection, chunk: Chunk, refused: Mapping[int, Poison], now: datetime
    ) -> int:
        """Keep what could not be read; the number of outbox rows."""
        rows: list[OutboxRow] = []
        to_park: list[ParkedRow] = []
        for index, error in refused.items():
            raw, tp = chunk.records[index], chunk.partition
            source = Source(tp.topic, tp.partition, raw.offset, raw.timestamp)
            headers = header_texts(raw.headers)
            rows.append(
                parked_record(
                    DEAD_LETTERS,
                    source,
                    raw.value or b"",
                    reason=error.reason,
                    stage="decode",
                    error_class=type(error).__name__,
                    service=self.group,
                    original_headers=headers,
                )
            )
            if self.told is not None:
                rows.append(self._tell(source, error, now))
            to_park.append(
                ParkedRow(
                    kind="dead_letter",
                    topic=tp.topic,
                    partition=tp.partition,
                    offset=raw.offset,
                    arrived_at=instant(raw.timestamp * 1000),
                    reason=error.reason,
                    stage="decode",
                    error_class=type(error).__name__,
                    value=raw.value or b"",
                    headers=headers,
                )
            )
        outbox.enqueue(db, self.group, rows)
        park(db, self.group, to_park, tried_with=revision())
        return len(rows)

    def _tell(self, source: Source, error: Poison, now: datetime) -> OutboxRow:
        require(self.told is not None, "nobody is told")
        assert self.told is not None  # noqa: S101  (for the type checker; require() is the check)
        name, subject_type = self.told
        return ops_event(
            name,
            subject_type=subject_type,
            subject_id=f"{source.topic}/{source.partition}/{source.offset}",
            source=self.group.removeprefix("tidemeter-"),
            at_us=micros(now),
            attributes={"reason": error.reason},
        )
