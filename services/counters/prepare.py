"""Turn a chunk of raw records into events to count and records to park.

Pure: no clock, no I/O. The same chunk and configuration give the same result, which is what makes replay
and the crash tests meaningful. What depends on earlier chunks (duplicates, watermarks) is decided later, in
the transaction (``ledger``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from schemas.catalog import Schema, current, released
from services.counters.config import Configuration, Meter
from services.streaming.chunks import Chunk, RawRecord
from services.streaming.parking import Kind, ParkedRow
from services.wire import groups, topics
from services.wire.codec import SCHEMA_HEADER, Decoder, Record
from services.wire.errors import Invalid, Undecodable, UnknownSchema
from services.wire.periods import Calendar
from services.wire.records import OutboxRow, Source, header_texts, ops_event, parked_record
from services.wire.times import instant
from services.wire.usage import (
    EARLIEST_US,
    FUTURE_TOLERANCE_US,
    QUANTITY_MAX,
    QUANTITY_UNIT,
    content_digest,
    event_id_hash,
    item_id_hash,
    parse_quantity,
    value_hash,
)
from services.wire.usage import (
    IDEMPOTENCY_KEY_CHARS_MAX as KEY_CHARS_MAX,
)
from upcasters.chain import InvalidAfterUpcast, MissingUpcaster, UpcasterFailed, Upcasters
from upcasters.values import Rejected

SERVICE = groups.COUNTERS
DAY_US = 86_400_000_000
_QUANTITY_LIMIT = QUANTITY_MAX * QUANTITY_UNIT

ParkedOutcome = Literal["dead_lettered", "upcast_failed"]
KIND_OF: Mapping[ParkedOutcome, Kind] = {"dead_lettered": "dead_letter", "upcast_failed": "upcast_failure"}


class Account:
    """What became of the records of one (tenant, meter) in this chunk."""

    __slots__ = (
        "adjusted",
        "conflict",
        "counted",
        "dead_lettered",
        "duplicate",
        "late_counted",
        "received",
        "upcast_failed",
    )

    def __init__(self) -> None:
        self.received = self.counted = self.duplicate = self.conflict = self.late_counted = 0
        self.adjusted = self.dead_lettered = self.upcast_failed = 0


OUTCOMES = ("counted", "duplicate", "conflict", "late_counted", "adjusted", "dead_lettered", "upcast_failed")


class Bucket:
    """What one hour of an item gets from this chunk.

    ``total`` in billionths, as the meter aggregates; ``key`` is the idempotency key of the event that the
    total of a ``last`` meter comes from; ``values`` are the hashed values of a ``unique`` one.
    """

    __slots__ = ("events", "first_us", "key", "last_us", "late", "total", "values")

    def __init__(self, first_us: int, last_us: int) -> None:
        self.first_us, self.last_us = first_us, last_us
        self.total = self.events = self.late = 0
        self.key = ""
        self.values: set[int] | None = None


class Item:
    """One metered item of this chunk. Its watermark and its calendar are filled in inside the transaction."""

    __slots__ = (
        "account",
        "buckets",
        "calendar",
        "customer_ref",
        "dimensions",
        "item_id",
        "meter",
        "period_end",
        "period_start",
        "watermark",
    )

    def __init__(
        self,
        item_id: bytes,
        customer_ref: str,
        meter: Meter,
        account: Account,
        dimensions: tuple[str, ...] = (),
    ) -> None:
        self.item_id = item_id
        self.customer_ref = customer_ref
        self.meter = meter
        self.account = account
        self.dimensions = dimensions
        self.watermark = 0
        self.calendar: Calendar | None = None
        #: The period that was last looked up: events come in runs of one.
        self.period_start = self.period_end = 0
        #: By (hour start, period start), in microseconds.
        self.buckets: dict[tuple[int, int], Bucket] = {}


#: (index in the chunk, id hash, digest, item, occurred_at µs, amount, idempotency key). The amount is in
#: billionths; for a `unique` meter it is the hash of the value. A plain tuple: one is made for every event.
Event = tuple[int, bytes, int, Item, int, int, str]


@dataclass(slots=True)
class Parked:
    """A record that cannot be counted as it is."""

    index: int
    outcome: ParkedOutcome
    reason: str
    stage: str
    error_class: str
    tenant_id: str = ""
    meter: str = ""
    identifiers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Prepared:
    """A chunk, ready for its transaction. ``events`` holds each id once; ``repeats`` the later ones."""

    chunk: Chunk
    config_version: int
    events: list[Event] = field(default_factory=list)
    repeats: list[Event] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    #: By (tenant, customer, meter, values of the meter's dimensions).
    items: dict[tuple[str, ...], Item] = field(default_factory=dict)
    accounts: dict[tuple[str, str], Account] = field(default_factory=dict)
    #: A transaction fills it in, so one that is repeated needs it afresh.
    used: bool = False

    def account(self, tenant_id: str, meter: str) -> Account:
        """The account of (tenant, meter), made on first use."""
        found = self.accounts.get((tenant_id, meter))
        if found is None:
            found = self.accounts[tenant_id, meter] = Account()
        return found


class Preparer:
    """Decoder, upcasters and limits, built once."""

    def __init__(self, decoder: Decoder, upcasters: Upcasters) -> None:
        self._decoder = decoder
        self._upcasters = upcasters
        self._current = current("usage_event")

    def prepare(self, chunk: Chunk, config: Configuration) -> Prepared:
        """Decode, upcast and validate every record of ``chunk`` against ``config``."""
        prepared = Prepared(chunk, config.version)
        expected = released()["usage_event", topics.USAGE_VERSIONS[chunk.partition.topic]]
        expected_headers = ((SCHEMA_HEADER, expected.name.encode()),)
        decode, to_current = self._decoder.decode, self.to_current
        seen: set[bytes] = set()
        for index, raw in enumerate(chunk.records):
            record: Record = {}
            try:
                schema, record = decode(raw.value or b"")
                if schema is not expected or raw.headers != expected_headers:
                    _check_agreement(schema, expected, raw)
                if schema is not self._current:
                    record = to_current(schema, record)
            except (Undecodable, UnknownSchema) as error:
                prepared.parked.append(_upcast_failure(index, error.reason, "decode", error, {}))
                continue
            except (MissingUpcaster, UpcasterFailed, InvalidAfterUpcast) as error:
                prepared.parked.append(
                    _upcast_failure(index, _UPCAST_REASONS[type(error)], "upcast", error, record)
                )
                continue
            except Rejected as error:
                prepared.parked.append(_dead_letter(index, error.reason, record))
                continue
            try:
                item, occurred, amount = self.measure(prepared, config, raw.timestamp * 1000, record)
            except Invalid as error:
                prepared.parked.append(_dead_letter(index, error.reason, record))
                continue
            item.account.received += 1
            key = record["idempotency_key"]
            event_id = event_id_hash(record["tenant_id"], key)
            event = (index, event_id, content_digest(record), item, occurred, amount, key)
            if event_id in seen:
                prepared.repeats.append(event)
            else:
                seen.add(event_id)
                prepared.events.append(event)
        return prepared

    def read(self, value: bytes, expected: Schema) -> Record:
        """The current record in ``value``, which was written to the topic of ``expected``.

        Raises:
            Poison, Rejected, MissingUpcaster, UpcasterFailed, InvalidAfterUpcast: it cannot be read.
        """
        schema, record = self._decoder.decode(value)
        if schema is not expected:
            raise UnknownSchema("unknown_schema", "topic and framing name different schemas")
        return record if schema is self._current else self.to_current(schema, record)

    def to_current(self, schema: Schema, record: Record) -> Record:
        """``record`` upcast to the current version."""
        return self._upcasters.to_current(schema.subject, schema.version, record)

    def measure(
        self, prepared: Prepared, config: Configuration, arrival_us: int, record: Record
    ) -> tuple[Item, int, int]:
        """The item of a current record, when it happened (µs), and what it is worth: billionths, or for a
        ``unique`` meter the hash of the value.

        Raises:
            Invalid: it cannot be counted.
        """
        item = prepared.items.get((record["tenant_id"], record["customer_ref"], record["meter"]))
        if item is None:
            item = _item(prepared, config, record)
        quantity = int.from_bytes(record["quantity"], "big", signed=True)
        occurred = record["occurred_at"]
        if occurred is None:
            occurred = arrival_us
        key = record["idempotency_key"]
        if not (
            0 < len(key) <= KEY_CHARS_MAX
            and "\x00" not in key
            and (0 if not item.meter.allow_negative else -_QUANTITY_LIMIT) <= quantity <= _QUANTITY_LIMIT
            and EARLIEST_US <= occurred <= arrival_us + FUTURE_TOLERANCE_US
        ):
            raise Invalid(_unfit(key, quantity, occurred, arrival_us), "", "")
        if item.meter.value_property is not None:
            quantity = _value(item.meter, record["properties"])
        elif item.meter.aggregation == "count":
            quantity = QUANTITY_UNIT
        return item, occurred, quantity


def _item(prepared: Prepared, config: Configuration, record: Record) -> Item:
    """The item of a record, made on first use.

    Raises:
        Invalid: the record names none.
    """
    tenant_id, customer_ref, slug = record["tenant_id"], record["customer_ref"], record["meter"]
    reason = _unfit_identity(record)
    meter = config.meters.get((tenant_id, slug))
    if reason is not None or meter is None:
        raise Invalid(reason or "unknown_meter", "meter", "the record names no item")
    properties = record["properties"]
    values = tuple(properties.get(name, "") for name in meter.dimensions)
    if "" in values or any("\x00" in value for value in values):
        raise Invalid("dimension_missing", "properties", "a dimension of this meter is missing")
    name = (tenant_id, customer_ref, slug, *values)
    item = prepared.items.get(name)
    if item is None:
        item = prepared.items[name] = Item(
            item_id_hash(*name), customer_ref, meter, prepared.account(tenant_id, slug), values
        )
    return item


def _value(meter: Meter, properties: Mapping[str, str]) -> int:
    """What a property is worth to ``meter``.

    Raises:
        Invalid: ``value_missing``, ``value_negative``, or as :func:`parse_quantity` with ``value`` for
            ``quantity``.
    """
    text = properties.get(meter.value_property or "", "")
    if not text:
        raise Invalid("value_missing", "properties", "the property that this meter measures is missing")
    if meter.aggregation == "unique":
        return value_hash(text)
    try:
        value = parse_quantity(text)
    except Invalid as error:
        raise Invalid(error.reason.replace("quantity", "value", 1), "properties", str(error)) from None
    if value < 0 and not meter.allow_negative:
        raise Invalid("value_negative", "properties", "must not be negative")
    return value if meter.aggregation != "count" else QUANTITY_UNIT


_UPCAST_REASONS: Mapping[type[Exception], str] = {
    MissingUpcaster: "missing_upcaster",
    UpcasterFailed: "upcaster_error",
    InvalidAfterUpcast: "invalid_after_upcast",
}


def _check_agreement(schema: Schema, expected: Schema, raw: RawRecord) -> None:
    if schema is not expected:
        raise UnknownSchema("unknown_schema", "topic and framing name different schemas")
    for name, text in raw.headers:
        if name == SCHEMA_HEADER and text != expected.name.encode():
            raise UnknownSchema("unknown_schema", "header and framing name different schemas")


def _unfit_identity(record: Record) -> str | None:
    """Why tenant, customer or meter cannot name an item. PostgreSQL's text cannot hold NUL."""
    for name in ("tenant_id", "customer_ref", "meter"):
        text = record[name]
        if not 0 < len(text) <= 255 or "\x00" in text:
            return f"invalid_{name}"
    return None


def _unfit(key: str, quantity: int, occurred_us: int, arrival_us: int) -> str:
    """Which rule an event broke that passed none of :meth:`Preparer._event`'s."""
    if not 0 < len(key) <= KEY_CHARS_MAX or "\x00" in key:
        return "invalid_idempotency_key"
    if not -_QUANTITY_LIMIT <= quantity <= _QUANTITY_LIMIT:
        return "quantity_out_of_range"
    if occurred_us > arrival_us + FUTURE_TOLERANCE_US:
        return "timestamp_in_future"
    return "timestamp_out_of_range" if occurred_us < EARLIEST_US else "quantity_negative"


def _identifiers(record: Record) -> dict[str, str]:
    """What names the event, in any version; capped, and safe as header text."""
    found = {
        "event_id": record.get("idempotency_key", record.get("event_id")),
        "tenant": record.get("tenant_id", record.get("tenant")),
        "meter": record.get("meter", record.get("metric")),
    }
    return {name: text.replace("\x00", "\\0")[:255] for name, text in found.items() if isinstance(text, str)}


def _dead_letter(index: int, reason: str, record: Record) -> Parked:
    names = _identifiers(record)
    return Parked(
        index, "dead_lettered", reason, "validate", "", names.get("tenant", ""), names.get("meter", ""), names
    )


def _upcast_failure(index: int, reason: str, stage: str, error: Exception, record: Record) -> Parked:
    names = _identifiers(record)
    cause = error.__cause__ or error
    return Parked(
        index,
        "upcast_failed",
        reason,
        stage,
        type(cause).__name__,
        names.get("tenant", ""),
        names.get("meter", ""),
        names,
    )


def rows_to_park(chunk: Chunk, parked: Sequence[Parked]) -> list[ParkedRow]:
    """What is kept of parked records."""
    rows = []
    for one in parked:
        raw = chunk.records[one.index]
        rows.append(
            ParkedRow(
                kind=KIND_OF[one.outcome],
                topic=chunk.partition.topic,
                partition=chunk.partition.partition,
                offset=raw.offset,
                arrived_at=instant(raw.timestamp * 1000),
                reason=one.reason,
                stage=one.stage,
                error_class=one.error_class,
                value=raw.value or b"",
                headers=header_texts(raw.headers),
                tenant_id=one.tenant_id,
                meter=one.meter,
                event_id=one.identifiers.get("event_id", ""),
            )
        )
    return rows


def parked_rows(chunk: Chunk, parked: Sequence[Parked], at_us: int) -> list[OutboxRow]:
    """The outbox rows of parked records: the record on its topic, and one ops event each."""
    rows: list[OutboxRow] = []
    for one in parked:
        raw = chunk.records[one.index]
        source = Source(chunk.partition.topic, chunk.partition.partition, raw.offset, raw.timestamp)
        dead = one.outcome == "dead_lettered"
        rows.append(
            parked_record(
                topics.DEAD_LETTERS if dead else topics.UPCAST_FAILURES,
                source,
                raw.value or b"",
                reason=one.reason,
                stage=one.stage,
                error_class=one.error_class,
                service=SERVICE,
                original_headers=header_texts(raw.headers),
                **one.identifiers,
            )
        )
        rows.append(
            ops_event(
                "usage_dead_lettered" if dead else "events_upcast_failed",
                subject_type="usage_record",
                subject_id=f"{source.topic}/{source.partition}/{source.offset}",
                source="counters",
                at_us=at_us,
                attributes={
                    "reason": one.reason,
                    "schema_version": str(topics.USAGE_VERSIONS[source.topic]),
                    **one.identifiers,
                },
            )
        )
    return rows
