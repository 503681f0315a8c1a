"""Frame, write and read Avro values.

Two framings are read, told apart by the first byte: Avro single-object encoding (``C3 01`` and the schema's
CRC-64-AVRO fingerprint, little-endian; Avro 1.12 specification) and, when a registry is configured, the
Confluent wire format (``00`` and a four-byte big-endian id). The writer follows the setting.

Values are written by fastavro and read by a reader compiled from the schema (``reader``). Limits: at most 64
KiB, or a webhook's own limit; only our own writer schemas (none is recursive or has zero-width items);
nothing may follow the record; whatever the reader raises is :class:`Undecodable`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import fastavro

from schemas.catalog import Schema, by_fingerprint, released
from services.wire.errors import Undecodable, UnknownSchema
from services.wire.reader import Reader, compile_reader

Record = dict[str, Any]

SINGLE_OBJECT_MAGIC = b"\xc3\x01"
SINGLE_OBJECT_PREFIX_BYTES = 10
CONFLUENT_MAGIC = b"\x00"
CONFLUENT_PREFIX_BYTES = 5
VALUE_BYTES_MAX = 64 * 1024
#: Of a webhook's body, which Stripe makes as large as the object is.
WEBHOOK_BODY_BYTES_MAX = 256 * 1024
#: Limits of subjects that have one of their own: a webhook's body, and room for what stands beside it.
_LIMITS = {"stripe_webhook": WEBHOOK_BODY_BYTES_MAX + 4 * 1024}
SCHEMA_HEADER = "tidemeter-schema"

#: Looks a Confluent schema id up: the released schema it stands for.
SchemaIds = Callable[[int], Schema]


def _no_registry(schema_id: int) -> Schema:
    raise UnknownSchema("unknown_schema", f"Confluent framing (id {schema_id}) without a schema registry")


def write_body(schema: Schema, record: Record) -> bytes:
    """The Avro binary of ``record``, without framing.

    Raises:
        Exception: whatever fastavro raises when the record does not fit the schema.
    """
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, schema.plain, record, strict=True)
    return stream.getvalue()


class Encoder:
    """Writes values of one schema in the configured framing."""

    def __init__(self, schema: Schema, confluent_id: int | None = None) -> None:
        self.schema = schema
        if confluent_id is None:
            self.prefix = SINGLE_OBJECT_MAGIC + schema.fingerprint
        else:
            self.prefix = CONFLUENT_MAGIC + confluent_id.to_bytes(4, "big")
        self.headers: list[tuple[str, bytes]] = [(SCHEMA_HEADER, schema.name.encode())]
        #: The same for the outbox, which keeps headers as text.
        self.header_texts: dict[str, str] = {SCHEMA_HEADER: schema.name}

    def encode(self, record: Record) -> bytes:
        """``record`` framed."""
        return self.prefix + write_body(self.schema, record)


class Decoder:
    """Reads framed values. Thread-safe."""

    def __init__(
        self, schema_ids: SchemaIds = _no_registry, *, value_bytes_max: int = VALUE_BYTES_MAX
    ) -> None:
        self._schema_ids = schema_ids
        self._value_bytes_max = value_bytes_max
        self._fingerprints = by_fingerprint()
        self._prefixes = {
            SINGLE_OBJECT_MAGIC + fingerprint: (shape_of(schema), _reader(schema), _bytes_max(schema))
            for fingerprint, schema in self._fingerprints.items()
        }

    def schema_of(self, value: bytes) -> tuple[Schema, int]:
        """The schema a value was written with, as it claims, and where its body begins.

        Raises:
            Undecodable: too large, too short, or no framing that we know.
            UnknownSchema: the framing names no released schema.
        """
        schema, start = self._framing_of(value)
        limit = _bytes_max(schema)
        if len(value) > limit:
            raise Undecodable("undecodable", f"value of {len(value)} bytes; the limit is {limit}")
        return schema, start

    def _framing_of(self, value: bytes) -> tuple[Schema, int]:
        if value[:2] == SINGLE_OBJECT_MAGIC and len(value) >= SINGLE_OBJECT_PREFIX_BYTES:
            schema = self._fingerprints.get(value[2:SINGLE_OBJECT_PREFIX_BYTES])
            if schema is None and len(value) > VALUE_BYTES_MAX:
                raise Undecodable("undecodable", f"value of {len(value)} bytes, and of no schema")
            if schema is None:
                raise UnknownSchema("unknown_schema", "fingerprint of no released schema")
            return schema, SINGLE_OBJECT_PREFIX_BYTES
        if value[:1] == CONFLUENT_MAGIC and len(value) >= CONFLUENT_PREFIX_BYTES:
            return self._schema_ids(int.from_bytes(value[1:5], "big")), CONFLUENT_PREFIX_BYTES
        raise Undecodable("undecodable", "neither Avro single-object nor Confluent framing")

    def decode(self, value: bytes) -> tuple[Schema, Record]:
        """One value's record, and the schema it fits: the shape of its version, whatever revision wrote it.

        Raises:
            Undecodable: the body is not exactly one record of its schema.
            UnknownSchema: the framing names no released schema.
        """
        known = self._prefixes.get(value[:SINGLE_OBJECT_PREFIX_BYTES])
        if known is None or len(value) > known[2]:
            schema, start = self.schema_of(value)
            return shape_of(schema), read_body(schema, value, start)
        try:  # the same in one step: this runs for every event
            return known[0], known[1](value, SINGLE_OBJECT_PREFIX_BYTES)
        except Exception as error:
            raise Undecodable("undecodable", type(error).__name__) from None


def shape_of(schema: Schema) -> Schema:
    """What records of ``schema`` are read as: the newest revision of its version."""
    return released()[schema.subject, schema.version]


def _bytes_max(schema: Schema) -> int:
    return _LIMITS.get(schema.subject, VALUE_BYTES_MAX)


@cache
def _reader(schema: Schema) -> Reader:
    return compile_reader(schema.plain, shape_of(schema).plain)


def read_body(schema: Schema, value: bytes, start: int = 0) -> Record:
    """The one record, written with ``schema``, that fills ``value`` from ``start`` to its end.

    Raises:
        Undecodable: it is not exactly one record.
    """
    try:
        return _reader(schema)(value, start)
    except Exception as error:
        raise Undecodable("undecodable", type(error).__name__) from None
