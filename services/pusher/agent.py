"""The pusher process: deltas become intents in one transaction with the position; the sender sends them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from schemas.catalog import check_catalog
from services.pusher.intents import intent_of
from services.pusher.journal import record_intents
from services.pusher.ops import PRODUCER
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks import Sink
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.pusher.sinks.webhook import WebhookSink
from services.streaming import breaker, offsets, outbox
from services.streaming.chunks import Chunk
from services.streaming.observe import Health
from services.streaming.parking import ParkedRow, park
from services.streaming.redriving import (
    ParkedRecord,
    Redrives,
    Settled,
    StillParked,
    Verdict,
    redrive_forever,
)
from services.streaming.worker import Applied, Worker
from services.wire.codec import Decoder, Record
from services.wire.errors import OffsetGap, Poison, Undecodable, UnknownSchema, require
from services.wire.records import OutboxRow, Source, header_texts, ops_event, parked_record
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.times import instant
from services.wire.topics import DEAD_LETTERS, DELTAS
from upcasters.chain import (
    InvalidAfterUpcast,
    MissingUpcaster,
    UpcasterFailed,
    Upcasters,
    check_chain,
    revision,
    upcasters,
)

log = structlog.get_logger(__name__)

GROUP = PRODUCER


@dataclass(frozen=True, slots=True)
class Deltas:
    """A chunk of deltas.v1: what could be read, by index, and why the rest could not."""

    chunk: Chunk
    records: dict[int, Record]
    refused: dict[int, Poison]


class Intents:
    """The chunk handler of the pusher group."""

    def __init__(self, decoder: Decoder, upcasters: Upcasters) -> None:
        self._decoder = decoder
        self._upcasters = upcasters

    def prepare(self, chunk: Chunk) -> Deltas:
        """Decode every delta, of whatever released version: older ones wait in the topic at an upgrade."""
        records: dict[int, Record] = {}
        refused: dict[int, Poison] = {}
        for index, raw in enumerate(chunk.records):
            try:
                records[index] = self.read(raw.value or b"")
            except Poison as error:
                refused[index] = error
        return Deltas(chunk, records, refused)

    def read(self, value: bytes) -> Record:
        """One delta, as a current record.

        Raises:
            Poison: it is none that an intent can be made of.
        """
        try:
            schema, record = self._decoder.decode(value)
            if schema.subject != "usage_delta":
                raise UnknownSchema("unknown_schema", "not a usage_delta")
            record = self._upcasters.to_current(schema.subject, schema.version, record)
            intent_of(record)  # what no intent can hold is refused here, not when it is stored
        except (OverflowError, ValueError, ArithmeticError) as error:
            raise Undecodable("invalid_delta", type(error).__name__) from None
        except (MissingUpcaster, UpcasterFailed, InvalidAfterUpcast) as error:
            raise Undecodable("upcaster_error", type(error).__name__) from None
        return record

    def retry(
        self, db: offsets.Connection, parked: Sequence[ParkedRecord], _: datetime
    ) -> Mapping[int, Verdict]:
        """Parked deltas, tried again: see :data:`services.streaming.redriving.Retry`."""
        verdicts: dict[int, Verdict] = {}
        records: list[Record] = []
        for one in parked:
            try:
                records.append(self.read(one.value))
                verdicts[one.parked_id] = Settled("recorded")
            except Poison as error:
                verdicts[one.parked_id] = StillParked(
                    "dead_letter", error.reason, "decode", type(error).__name__
                )
        record_intents(db, records)
        return verdicts

    def apply(self, db: offsets.Connection, prepared: Deltas) -> Applied:
        """Store the intents and move the position, in one transaction.

        Raises:
            OffsetGap: the chunk begins above the stored position.
            Broken: a known identifier comes with other content.
        """
        chunk = prepared.chunk
        with db.transaction():
            position = offsets.lock_position(db, GROUP, chunk.partition)
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
            record_intents(db, [prepared.records[i] for i in taken if i in prepared.records])
            rows = [
                row for i in taken if i in prepared.refused for row in _parked(chunk, i, prepared.refused[i])
            ]
            outbox.enqueue(db, GROUP, rows)
            to_park = [_to_park(chunk, i, prepared.refused[i]) for i in taken if i in prepared.refused]
            park(db, GROUP, to_park, tried_with=revision())
            next_offset = chunk.next_offset if trip is None else trip
            offsets.advance(db, GROUP, chunk.partition, next_offset, parked)
            halted = None if trip is None else "too_many_parked"
            if halted is not None:
                offsets.halt(db, GROUP, chunk.partition, halted)
        redelivered = len(fresh) < len(chunk.records)
        return Applied(next_offset, outbox_rows=len(rows), halted=halted, redelivered=redelivered)


def _parked(chunk: Chunk, index: int, error: Poison) -> list[OutboxRow]:
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
            service="tidemeter-pusher",
            original_headers=header_texts(raw.headers),
        ),
        ops_event(
            "delta_dead_lettered",
            subject_type="delta_record",
            subject_id=f"{tp.topic}/{tp.partition}/{raw.offset}",
            source="pusher",
            at_us=int(datetime.now(UTC).timestamp() * 1_000_000),
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


def sink_of(settings: Settings) -> Sink:
    """The sink that the operator chose.

    Raises:
        Misconfigured: no Stripe key, or a live one that was not allowed; a webhook without address or secret.
    """
    if settings.sink == "webhook":
        url, secret = settings.webhook_sink()
        return WebhookSink(url, secret=secret, timeout_seconds=settings.stripe_timeout_seconds)
    return (StripeStreamSink if settings.streams else StripeSink).from_settings(settings)


async def run(settings: Settings, sink: Sink | None = None) -> None:
    """Run one pusher until it is told to stop.

    Raises:
        Misconfigured: as :func:`sink_of`.
    """
    check_catalog()
    chain = upcasters()
    check_chain(chain)
    sink = sink or sink_of(settings)
    health = Health()
    sender = Sender(settings.postgres(), sink, SenderConfig.from_settings(settings))
    health.checks["sender"] = sender.check
    health.checks["meters"] = sender.paused_meters.check
    intents = Intents(decoder_for(settings), chain)
    redrives = Redrives(GROUP, intents.retry, tried_with=revision())
    worker = Worker(
        settings,
        group=GROUP,
        topics=[DELTAS],
        handler=intents,
        health=health,
        after_apply=sender.wake,
    )
    try:
        await worker.run(
            sender.run,
            lambda: outbox.relay_forever(settings, GROUP),
            lambda: redrive_forever(settings, redrives),
        )
    finally:
        await sink.close()
