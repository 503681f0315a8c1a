"""Intake: what the bridge wrote becomes events and runs, in one transaction with the position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.streaming import breaker, offsets, outbox
from services.streaming.chunks import Chunk
from services.streaming.parking import ParkedRow, park
from services.streaming.redriving import ParkedRecord, Settled, StillParked, Verdict
from services.streaming.worker import Applied
from services.webhooks.handling import Handler
from services.webhooks.own import BUILT_IN, UserHandler
from services.webhooks.reading import Facts, facts_of
from services.webhooks.store import Delivered, NewRun, store
from services.wire.codec import Decoder
from services.wire.errors import OffsetGap, Poison, UnknownSchema, require
from services.wire.ops import DISPATCHER
from services.wire.records import OutboxRow, Source, header_texts, ops_event, parked_record
from services.wire.times import instant, micros
from services.wire.topics import DEAD_LETTERS
from upcasters.chain import revision


@dataclass(frozen=True, slots=True)
class Envelopes:
    """A chunk of stripe_webhooks.v1: events by index, and why the rest is none."""

    chunk: Chunk
    facts: dict[int, Facts]
    refused: dict[int, Poison]


class Intake:
    """The chunk handler of the dispatcher's group. ``handlers`` by event type."""

    def __init__(
        self,
        decoder: Decoder,
        handlers: Mapping[str, Handler],
        own: Sequence[UserHandler],
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._decoder = decoder
        self._handlers = handlers
        self._own = own
        self._clock = clock

    def prepare(self, chunk: Chunk) -> Envelopes:
        """Decode every envelope, and its body."""
        facts: dict[int, Facts] = {}
        refused: dict[int, Poison] = {}
        for index, raw in enumerate(chunk.records):
            try:
                facts[index] = self._read(raw.value or b"")
            except Poison as error:
                refused[index] = error
        return Envelopes(chunk, facts, refused)

    def _read(self, value: bytes) -> Facts:
        schema, record = self._decoder.decode(value)
        if schema.subject != "stripe_webhook":
            raise UnknownSchema("unknown_schema", "not a stripe_webhook")
        return facts_of(record)

    def retry(
        self, db: offsets.Connection, parked: Sequence[ParkedRecord], now: datetime
    ) -> Mapping[int, Verdict]:
        """Parked deliveries, tried again: see :data:`services.streaming.redriving.Retry`."""
        verdicts: dict[int, Verdict] = {}
        for one in sorted(parked, key=lambda one: (one.topic, one.partition, one.offset)):
            try:
                facts = self._read(one.value)
            except Poison as error:
                verdicts[one.parked_id] = StillParked(
                    "dead_letter", error.reason, "decode", type(error).__name__
                )
                continue
            store(db, [Delivered(facts, 1, one.topic, one.partition, one.offset)], self._runs(facts), now)
            verdicts[one.parked_id] = Settled("recorded")
        return verdicts

    def apply(self, db: offsets.Connection, prepared: Envelopes) -> Applied:
        """Store events and runs and move the position, in one transaction.

        Raises:
            OffsetGap: the chunk begins above the stored position.
        """
        chunk = prepared.chunk
        with db.transaction():
            position = offsets.lock_position(db, DISPATCHER, chunk.partition)
            require(position is not None, f"no position for {chunk.partition}")
            assert position is not None  # noqa: S101  (for the type checker; require() is the check)
            if position.halted is not None:
                return Applied(position.next_offset, halted=position.halted)
            if chunk.next_offset <= position.next_offset:
                return Applied(position.next_offset, redelivered=True)
            if chunk.first_offset > position.next_offset:
                raise OffsetGap(f"{chunk.partition} is at {position.next_offset}")
            fresh = [i for i, raw in enumerate(chunk.records) if raw.offset >= position.next_offset]
            parked, trip = breaker.feed(
                position.parked_offsets, (chunk.records[i].offset for i in fresh if i in prepared.refused)
            )
            taken = [i for i in fresh if trip is None or chunk.records[i].offset < trip]
            now = self._clock()
            events = _delivered(chunk, {i: prepared.facts[i] for i in taken if i in prepared.facts})
            store(db, events, [run for one in events for run in self._runs(one.facts)], now)
            rows = [
                row
                for i in taken
                if i in prepared.refused
                for row in _parked(chunk, i, prepared.refused[i], now)
            ]
            outbox.enqueue(db, DISPATCHER, rows)
            to_park = [_to_park(chunk, i, prepared.refused[i]) for i in taken if i in prepared.refused]
            park(db, DISPATCHER, to_park, tried_with=revision())
            next_offset = chunk.next_offset if trip is None else trip
            offsets.advance(db, DISPATCHER, chunk.partition, next_offset, parked)
            halted = None if trip is None else "too_many_parked"
            if halted is not None:
                offsets.halt(db, DISPATCHER, chunk.partition, halted)
        return Applied(next_offset, outbox_rows=len(rows), halted=halted)

    def _runs(self, facts: Facts) -> list[NewRun]:
        """One for the product, and one for each of a user's handlers that wants the type."""
        handler = self._handlers.get(facts.event_type)
        built_in = NewRun(
            facts.event_id, BUILT_IN, facts.subject(is_state=handler is None or handler.is_state)
        )
        return [
            built_in,
            *(
                NewRun(facts.event_id, one.name, facts.subject(is_state=one.is_state))
                for one in self._own
                if one.takes(facts.event_type)
            ),
        ]


def _delivered(chunk: Chunk, facts: Mapping[int, Facts]) -> list[Delivered]:
    """Each event once: a statement cannot touch one row twice. By id, so that locks are taken in order."""
    found: dict[str, Delivered] = {}
    for index, one in facts.items():
        known = found.get(one.event_id)
        if known is None:
            found[one.event_id] = Delivered(one, 1, *chunk.partition, chunk.records[index].offset)
        else:
            found[one.event_id] = replace(known, deliveries=known.deliveries + 1)
    return [found[event_id] for event_id in sorted(found)]


def _parked(chunk: Chunk, index: int, error: Poison, now: datetime) -> list[OutboxRow]:
    raw, tp = chunk.records[index], chunk.partition
    source = Source(tp.topic, tp.partition, raw.offset, raw.timestamp)
    return [
        parked_record(
            DEAD_LETTERS,
            source,
            raw.value or b"",
            reason=error.reason,
            stage="decode",
            error_class=type(error).__name__,
            service=DISPATCHER,
            original_headers=header_texts(raw.headers),
        ),
        ops_event(
            "webhook_dead_lettered",
            subject_type="webhook_record",
            subject_id=f"{tp.topic}/{tp.partition}/{raw.offset}",
            source="dispatcher",
            at_us=micros(now),
            attributes={"reason": error.reason},
        ),
    ]


def _to_park(chunk: Chunk, index: int, error: Poison) -> ParkedRow:
    raw, tp = chunk.records[index], chunk.partition
    return ParkedRow(
        kind="dead_letter",
        topic=tp.topic,
        partition=tp.partition,
        offset=raw.offset,
        arrived_at=instant(raw.timestamp * 1000),
        reason=error.reason,
        stage="decode",
        error_class=type(error).__name__,
        value=raw.value or b"",
        headers=header_texts(raw.headers),
    )
