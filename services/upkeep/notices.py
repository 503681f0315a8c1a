"""The notifier's consumer group: ops events that make a mail become notifications, with the position."""

from __future__ import annotations

import json
from dataclasses import dataclass

import structlog

from services.streaming import breaker, offsets, outbox
from services.streaming.chunks import Chunk, RawRecord
from services.streaming.worker import Applied
from services.upkeep.mails import Notice
from services.wire.codec import Decoder
from services.wire.errors import OffsetGap, Poison, Undecodable, UnknownSchema, require
from services.wire.ops import NAME_HEADER
from services.wire.records import OutboxRow, Source, header_texts, parked_record
from services.wire.times import instant
from services.wire.topics import DEAD_LETTERS
from upcasters.chain import InvalidAfterUpcast, MissingUpcaster, UpcasterFailed, Upcasters

log = structlog.get_logger(__name__)

GROUP = "tidemeter-notifier"

_INSERT = """
    INSERT INTO notifications
        (ops_event_id, name, subject_type, subject_id, source, attributes, happened_at, next_attempt_at)
    SELECT id, name, subject_type, subject_id, source, attributes, happened_at, happened_at
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::jsonb[], %s::timestamptz[])
        AS n (id, name, subject_type, subject_id, source, attributes, happened_at)
    ON CONFLICT (ops_event_id) DO NOTHING
    """


@dataclass(frozen=True, slots=True)
class Noticed:
    """A chunk of ops.v1: what makes a mail, by index, and why the rest could not be read."""

    chunk: Chunk
    notices: dict[int, Notice]
    refused: dict[int, Poison]


class Notices:
    """The chunk handler. An ops event that was relayed twice is one notification."""

    def __init__(self, decoder: Decoder, upcasters: Upcasters, names: frozenset[str]) -> None:
        self._decoder = decoder
        self._upcasters = upcasters
        self._names = names

    def prepare(self, chunk: Chunk) -> Noticed:
        """Decode what makes a mail; the header says which without decoding."""
        notices: dict[int, Notice] = {}
        refused: dict[int, Poison] = {}
        for index, raw in enumerate(chunk.records):
            header = dict(raw.headers or ()).get(NAME_HEADER)
            if header is not None and header.decode("utf-8", "replace") not in self._names:
                continue
            try:
                notice = self._notice(raw)
                if notice.name in self._names:
                    notices[index] = notice
            except (OverflowError, ValueError, ArithmeticError) as error:
                refused[index] = Undecodable("invalid_ops_event", type(error).__name__)
            except (MissingUpcaster, UpcasterFailed, InvalidAfterUpcast) as error:
                refused[index] = Undecodable("upcaster_error", type(error).__name__)
            except Poison as error:
                refused[index] = error
        return Noticed(chunk, notices, refused)

    def _notice(self, raw: RawRecord) -> Notice:
        schema, record = self._decoder.decode(raw.value or b"")
        if schema.subject != "ops_event":
            raise UnknownSchema("unknown_schema", "not an ops_event")
        record = self._upcasters.to_current(schema.subject, schema.version, record)
        return Notice(
            ops_event_id=_storable(record["ops_event_id"]),
            name=_storable(record["name"]),
            subject_type=_storable(record["subject_type"]),
            subject_id=_storable(record["subject_id"]),
            source=_storable(record["source"]),
            attributes={_storable(name): _storable(text) for name, text in record["attributes"].items()},
            happened_at=instant(record["at"]),
        )

    def apply(self, db: offsets.Connection, prepared: Noticed) -> Applied:
        """Store the notifications and move the position, in one transaction.

        Raises:
            OffsetGap: the chunk begins above the stored position.
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
            record_notices(db, [prepared.notices[i] for i in taken if i in prepared.notices])
            rows = [_parked(chunk, i, prepared.refused[i]) for i in taken if i in prepared.refused]
            outbox.enqueue(db, GROUP, rows)
            next_offset = chunk.next_offset if trip is None else trip
            offsets.advance(db, GROUP, chunk.partition, next_offset, parked)
            halted = None if trip is None else "too_many_parked"
            if halted is not None:
                offsets.halt(db, GROUP, chunk.partition, halted)
        return Applied(next_offset, outbox_rows=len(rows), halted=halted)


def record_notices(db: offsets.Connection, notices: list[Notice]) -> None:
    """Write notifications that are not there yet, in the current transaction."""
    if notices:
        columns = zip(
            *(
                (
                    *(one.ops_event_id, one.name, one.subject_type, one.subject_id, one.source),
                    *(json.dumps(dict(one.attributes)), one.happened_at),
                )
                for one in notices
            ),
            strict=True,
        )
        db.execute(_INSERT, [list(column) for column in columns])


def _parked(chunk: Chunk, index: int, error: Poison) -> OutboxRow:
    raw, tp = chunk.records[index], chunk.partition
    return parked_record(
        DEAD_LETTERS,
        Source(tp.topic, tp.partition, raw.offset, raw.timestamp),
        raw.value or b"",
        reason=error.reason,
        stage="decode",
        error_class=type(error).__name__,
        service=GROUP,
        original_headers=header_texts(raw.headers),
    )


def _storable(text: str) -> str:
    """PostgreSQL holds every text but NUL."""
    return text.replace("\x00", "\\x00")
