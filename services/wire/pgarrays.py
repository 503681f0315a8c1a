"""PostgreSQL arrays of fixed-width values, in the binary wire form, built with one join.

psycopg dumps a list element by element, about 1 µs each. An id or an integer already has its wire form, so an
array of them is a header and the elements with their length in front (PostgreSQL, ``array_send``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

#: Microseconds between 1970-01-01 and PostgreSQL's epoch, 2000-01-01.
EPOCH_US = 946_684_800_000_000
MINUS_INFINITY = -(2**63)


class _Array(bytes):
    """The wire form; the subclass names the type."""


class UuidArray(_Array):
    """``uuid[]``."""


class Int8Array(_Array):
    """``bigint[]``."""


class TimestampArray(_Array):
    """``timestamptz[]``."""


def _array(element_oid: int, width: int, elements: Sequence[bytes]) -> bytes:
    if not elements:
        return struct.pack(">iiI", 0, 0, element_oid)
    length = struct.pack(">i", width)
    return struct.pack(">iiIii", 1, 0, element_oid, len(elements), 1) + length + length.join(elements)


def uuid_array(ids: Sequence[bytes]) -> UuidArray:
    """16-byte values as ``uuid[]``."""
    return UuidArray(_array(2950, 16, ids))


def int8_array(values: Sequence[int]) -> Int8Array:
    """Signed 64-bit integers as ``bigint[]``."""
    packed = struct.pack(f">{len(values)}q", *values)
    return Int8Array(_array(20, 8, [packed[at : at + 8] for at in range(0, len(packed), 8)]))


def timestamp_array(micros: Sequence[int]) -> TimestampArray:
    """Microseconds since 1970 as ``timestamptz[]``."""
    shifted = [value - EPOCH_US for value in micros]
    packed = struct.pack(f">{len(shifted)}q", *shifted)
    return TimestampArray(_array(1184, 8, [packed[at : at + 8] for at in range(0, len(packed), 8)]))


def timestamp_of(sent: bytes) -> int:
    """Microseconds since 1970 from ``timestamptz_send``; ``-infinity`` stays far below every time."""
    return int.from_bytes(sent, "big", signed=True) + EPOCH_US


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> Buffer | None:
        return bytes(obj)


class _UuidArrayDumper(_ArrayDumper):
    oid = 2951


class _Int8ArrayDumper(_ArrayDumper):
    oid = 1016


class _TimestampArrayDumper(_ArrayDumper):
    oid = 1185


def register(context: Any) -> None:
    """Teach a psycopg connection the three array types."""
    context.adapters.register_dumper(UuidArray, _UuidArrayDumper)
    context.adapters.register_dumper(Int8Array, _Int8ArrayDumper)
    context.adapters.register_dumper(TimestampArray, _TimestampArrayDumper)
