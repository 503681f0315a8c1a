"""Whatever is written is read back; whatever else arrives is refused by name, at once, and never crashes."""

from __future__ import annotations

import io
import math
import time
import tracemalloc
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.catalog import Schema, current, released, writers
from services.wire.codec import (
    SINGLE_OBJECT_MAGIC,
    VALUE_BYTES_MAX,
    WEBHOOK_BODY_BYTES_MAX,
    Decoder,
    Encoder,
    read_body,
    write_body,
)
from services.wire.errors import Undecodable, UnknownSchema
from tests.strategies import records_of

EVERY = sorted(writers(), key=lambda schema: schema.label)
USAGE = current("usage_event")
RECORD = {
    "idempotency_key": "evt-1",
    "tenant_id": "acme",
    "customer_ref": "cust-1",
    "meter": "requests",
    "quantity": (7).to_bytes(16, "big", signed=True),
    "occurred_at": None,
    "properties": {"region": "eu-west"},
    "source": "test",
}
VALUE = Encoder(USAGE).encode(RECORD)
REGISTRY_ID = 4711
V1_EMPTY = {"event_id": "", "customer": "", "metric": "", "value": 0.0, "timestamp": 0, "tags": []}


def registry(schema_id: int) -> Schema:
    """A Confluent registry that knows one id."""
    if schema_id != REGISTRY_ID:
        raise UnknownSchema("unknown_schema", "no such id")
    return USAGE


BOTH_FRAMINGS = Decoder(registry)


def refused(value: bytes, decoder: Decoder = BOTH_FRAMINGS) -> bool:
    """True when ``value`` is refused by name; anything else that is raised fails the test."""
    try:
        decoder.decode(value)
    except (Undecodable, UnknownSchema):
        return True
    return False


def same(left: Any, right: Any) -> bool:
    """Equal, and NaN equals NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("schema", EVERY, ids=lambda schema: schema.name)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_every_record_of_every_schema_comes_back_as_it_was(schema: Schema, data: st.DataObject) -> None:
    record = data.draw(records_of(schema))
    found, read = Decoder().decode(Encoder(schema).encode(record))
    assert found is schema
    assert same(read, record)


@given(records_of(USAGE))
@settings(max_examples=50, deadline=None)
def test_the_confluent_framing_carries_the_same_record(record: dict[str, Any]) -> None:
    value = Encoder(USAGE, REGISTRY_ID).encode(record)
    assert value[:5] == b"\x00" + REGISTRY_ID.to_bytes(4, "big")
    assert BOTH_FRAMINGS.decode(value) == (USAGE, record)
    assert value[5:] == Encoder(USAGE).encode(record)[10:]


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_a_named_refusal(value: bytes) -> None:
    assert refused(value) or Encoder(USAGE, REGISTRY_ID).prefix == value[:5]


@pytest.mark.parametrize("schema", EVERY, ids=lambda schema: schema.name)
@given(body=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bodies_under_a_known_fingerprint_raise_nothing_but_a_named_refusal(
    schema: Schema, body: bytes
) -> None:
    refused(SINGLE_OBJECT_MAGIC + schema.fingerprint + body)


def fastavro_reads(schema: Schema, body: bytes) -> Any:
    """What fastavro makes of ``body`` if it is exactly one record to it, else None."""
    stream = io.BytesIO(body)
    try:
        record = fastavro.schemaless_reader(stream, schema.plain, None)
    except Exception:
        return None
    return record if stream.tell() == len(body) else None


def we_read(schema: Schema, body: bytes) -> Any:
    """What we make of ``body``, or None when it is refused."""
    try:
        return read_body(schema, body)
    except Undecodable:
        return None


@st.composite
def bodies(draw: st.DrawFn) -> tuple[Schema, bytes]:
    """Right bodies, slightly wrong ones and noise, of any schema."""
    schema = draw(st.sampled_from(EVERY))
    body = bytearray(write_body(schema, draw(records_of(schema))))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3)):
        if body:
            body[at % len(body)] = byte
    return schema, bytes(body) + draw(st.sampled_from([b"", b"", b"", b"\x00", b"\x02a"]))


@given(bodies())
@settings(max_examples=600, deadline=None)
def test_our_reader_and_fastavro_agree(found: tuple[Schema, bytes]) -> None:
    """What we read, fastavro reads alike; what fastavro reads and would write so, we read."""
    schema, body = found
    ours, theirs = we_read(schema, body), fastavro_reads(schema, body)
    if ours is not None:
        assert same(ours, theirs)
    elif theirs is not None:
        assert write_body(schema, theirs) != body


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
@settings(max_examples=500, deadline=None)
def test_a_flipped_byte_is_refused_or_read_as_a_record_of_the_same_schema(at: int, flip: int) -> None:
    mutated = bytearray(VALUE)
    mutated[at] ^= flip
    try:
        schema, record = BOTH_FRAMINGS.decode(bytes(mutated))
    except (Undecodable, UnknownSchema):
        return
    assert schema is USAGE
    assert record.keys() == RECORD.keys()


@pytest.mark.parametrize("length", range(len(VALUE)))
def test_a_value_that_was_cut_short_is_refused_wherever_it_was_cut(length: int) -> None:
    assert refused(VALUE[:length])


@given(st.binary(min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_bytes_after_the_record_are_refused(tail: bytes) -> None:
    with pytest.raises(Undecodable):
        Decoder().decode(VALUE + tail)


def test_a_value_above_64_kib_is_refused_before_it_is_decoded() -> None:
    fits = {**RECORD, "properties": {"filler": "x" * (VALUE_BYTES_MAX - len(VALUE) - 20)}}
    assert Decoder().decode(Encoder(USAGE).encode(fits))[1] == fits

    too_large = Encoder(USAGE).encode({**RECORD, "properties": {"filler": "x" * VALUE_BYTES_MAX}})
    with pytest.raises(Undecodable, match="the limit is 65536"):
        Decoder().decode(too_large)


@pytest.mark.parametrize("decoder", [Decoder(), BOTH_FRAMINGS], ids=["single-object", "both"])
def test_a_webhook_may_be_as_large_as_the_bridge_takes_it_and_no_larger(decoder: Decoder) -> None:
    schema = current("stripe_webhook")
    longest = "\U0001f30a" * 255
    record = {
        "endpoint": "e" * 64,
        "event_id": longest,
        "event_type": longest,
        "object_id": longest,
        "received_at": 1,
        "body": b"x" * WEBHOOK_BODY_BYTES_MAX,
    }
    assert decoder.decode(Encoder(schema).encode(record)) == (schema, record)
    with pytest.raises(Undecodable, match="the limit is 266240"):
        decoder.decode(Encoder(schema).encode({**record, "body": b"x" * (WEBHOOK_BODY_BYTES_MAX + 4096)}))


def varint(number: int) -> bytes:
    """Avro's zig-zag long, by the specification."""
    zigzag, out = (number << 1) ^ (number >> 63), bytearray()
    while zigzag > 0x7F:
        out.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    return bytes([*out, zigzag])


@pytest.mark.parametrize(
    "body",
    [
        varint(100_000_000),
        varint(100_000_000) + b"x" * 1000,
        varint(2**62),
        varint(-5),
        varint(2**31) * 8,
        b"\xff" * 60_000,
        b"\x80" * 60_000 + b"\x01",
        varint(4) + b"\xff\xfe\xff\xfe",
        b"\x00" * 20 + varint(9),
    ],
    ids=[
        "declares 100 MB",
        "declares 100 MB and gives a little",
        "declares four exabytes",
        "negative length",
        "lengths all the way",
        "endless varint",
        "varint of 60 KB",
        "not UTF-8",
        "no such branch of the union",
    ],
)
def test_a_hostile_body_is_refused_at_once(body: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(Undecodable):
        Decoder().decode(SINGLE_OBJECT_MAGIC + USAGE.fingerprint + body)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("count", [30_000_000, -30_000_000, 2**62])
def test_a_map_or_array_that_claims_millions_of_entries_is_refused_at_once(count: int) -> None:
    v1 = released()["usage_event", 1]
    head = write_body(v1, V1_EMPTY)
    started = time.perf_counter()
    with pytest.raises(Undecodable):
        read_body(v1, head[:-1] + varint(count) + varint(8))
    assert time.perf_counter() - started < 0.5


# Mutations of whole values ------------------------------------------------------------------------------

#: Lengths and counts that lie, and encodings of numbers that no writer makes.
NUMBERS = [
    *(varint(n) for n in (0, 1, -1, 2, 63, -64, 64, 8192, 30_000_000, 2**31, -(2**31), 2**40, -(2**40))),
    *(varint(n) for n in (2**62, -(2**62), 2**63 - 1, -(2**63))),
    *(b"\x80" * 9 + b"\x01", b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 9 + b"\x7f", b"\x80" * 12),
]
#: The most that reading may take beside the value: an empty object costs a byte there and about fifty here.
MEMORY_MAX = 64 * VALUE_BYTES_MAX


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A value of any released schema after some flips, cuts, splices, copies and lying numbers."""
    schema = draw(st.sampled_from(EVERY))
    value = Encoder(schema).encode(draw(records_of(schema)))
    start = draw(st.sampled_from([0, len(SINGLE_OBJECT_MAGIC) + 8]))  # the framing too, or the body alone
    for _ in range(draw(st.integers(0, 6))):
        at, end = sorted(draw(st.integers(start, max(start, len(value)))) for _ in range(2))
        match draw(st.sampled_from(["flip", "cut", "number", "replace", "copy", "splice", "noise"])):
            case "flip" if at < len(value):
                value = value[:at] + bytes([value[at] ^ 1 << draw(st.integers(0, 7))]) + value[at + 1 :]
            case "cut":
                value = value[:at] + value[end:]
            case "number":
                value = value[:at] + draw(st.sampled_from(NUMBERS)) + value[at:]
            case "replace":
                value = value[:at] + draw(st.sampled_from(NUMBERS)) + value[at + 1 :]
            case "copy":
                value = value[:end] + value[at:end] * draw(st.integers(1, 3)) + value[end:]
            case "splice":
                other = draw(st.sampled_from(EVERY))
                value = value[:at] + write_body(other, draw(records_of(other)))[at - start :]
            case "noise":
                value = value[:at] + draw(st.binary(max_size=20)) + value[end:]
    return value


def holds(value: bytes) -> bool:
    """Refused by name within the memory allowed; or read, and the same again after it is written again."""
    tracemalloc.start()
    try:
        schema, record = BOTH_FRAMINGS.decode(value)
    except (Undecodable, UnknownSchema):
        record = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_MAX
    if record is None:
        return False
    assert same(read_body(schema, write_body(schema, record)), record)
    return True


@given(mutated())
@settings(max_examples=600, deadline=None)
def test_a_mutated_value_is_refused_by_name_or_read_as_a_record_that_comes_back(value: bytes) -> None:
    holds(value)


@pytest.mark.parametrize("schema", EVERY, ids=lambda schema: schema.label)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_number_that_lies_anywhere_in_a_record_is_refused_by_name_or_harmless(
    schema: Schema, data: st.DataObject
) -> None:
    body = write_body(schema, data.draw(records_of(schema)))
    at = data.draw(st.integers(0, len(body)))
    for number in NUMBERS:
        for tail in (body[at:], body[at + 1 :], b"", b"\x00" * 1000):
            holds(SINGLE_OBJECT_MAGIC + schema.fingerprint + body[:at] + number + tail)


@pytest.mark.parametrize(
    ("version", "entry"),
    [
        (1, lambda n: b"\x00"),
        (1, lambda n: b"\x04" + chr(0x400 + n % 1000).encode()),
        (3, lambda n: b"\x00\x00"),
        (3, lambda n: b"\x08" + n.to_bytes(2, "big").hex().encode() + b"\x00"),
    ],
    ids=["empty tags", "small tags", "one key for ever", "many keys"],
)
def test_the_most_entries_that_fit_into_a_value_fit_into_memory(version: int, entry: Any) -> None:
    """A reader must not make more of 64 KiB than so much, whatever they hold."""
    schema = released()["usage_event", version]
    empty = {**RECORD, "properties": {}} if version == 3 else V1_EMPTY
    body = write_body(schema, empty)
    head, tail = (body[:-6], body[-5:]) if version == 3 else (body[:-1], b"")
    room = VALUE_BYTES_MAX - len(body) - 20
    count = room // len(entry(0))
    entries = b"".join(entry(number) for number in range(count))
    for block in (varint(count), varint(-count) + varint(len(entries))):
        value = SINGLE_OBJECT_MAGIC + schema.fingerprint + head + block + entries + b"\x00" + tail
        assert len(value) <= VALUE_BYTES_MAX
        assert holds(value)


@pytest.mark.parametrize(
    "value", [b"", b"\xc3", b"\xc3\x01", b"\xc3\x01" + b"\x00" * 7, b"\x00\x00\x00\x00", b"{}"]
)
def test_what_has_no_framing_is_undecodable(value: bytes) -> None:
    with pytest.raises(Undecodable):
        BOTH_FRAMINGS.decode(value)


def test_an_item_of_negative_length_cannot_send_the_reader_round_in_circles() -> None:
    """Without a check, each item would step back over itself, a million million times."""
    head = write_body(released()["usage_event", 1], V1_EMPTY)[:-1]
    with pytest.raises(Undecodable):
        read_body(released()["usage_event", 1], head + varint(2**40) + varint(-1))


def test_an_enum_has_no_symbol_before_its_first_and_none_after_its_last() -> None:
    schema = current("adjustment")

    def body(index: int) -> bytes:
        return bytes(5) + bytes(16) + varint(0) * 3 + varint(index) + bytes(3)

    assert read_body(schema, body(1))["policy"] == "carry_forward"
    for index in (-1, 2):
        with pytest.raises(Undecodable):
            read_body(schema, body(index))


def test_a_number_of_more_than_ten_bytes_is_refused() -> None:
    schema = current("ops_event")
    head = bytes(6)
    assert read_body(schema, head + b"\x80" * 9 + b"\x00")["at"] == 0
    with pytest.raises(Undecodable):
        read_body(schema, head + b"\x80" * 10 + b"\x00")


def test_a_fingerprint_of_no_released_schema_is_an_unknown_schema() -> None:
    with pytest.raises(UnknownSchema):
        Decoder().decode(SINGLE_OBJECT_MAGIC + b"\x00" * 8 + VALUE[10:])


def test_confluent_framing_without_a_registry_is_an_unknown_schema() -> None:
    with pytest.raises(UnknownSchema, match="without a schema registry"):
        Decoder().decode(Encoder(USAGE, REGISTRY_ID).encode(RECORD))


def test_an_id_that_the_registry_does_not_know_is_an_unknown_schema() -> None:
    with pytest.raises(UnknownSchema):
        BOTH_FRAMINGS.decode(Encoder(USAGE, REGISTRY_ID + 1).encode(RECORD))


def test_refusals_do_not_repeat_what_was_sent() -> None:
    planted = b"4242424242424242"
    for body in (planted, varint(40) + planted, VALUE[10:] + planted):
        with pytest.raises(Undecodable) as caught:
            Decoder().decode(SINGLE_OBJECT_MAGIC + USAGE.fingerprint + body)
        assert planted.decode() not in str(caught.value)
