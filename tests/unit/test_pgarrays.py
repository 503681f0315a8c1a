"""The binary arrays are byte for byte what psycopg itself would send, without asking a server."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.array import ListBinaryDumper
from psycopg.types.datetime import DatetimeBinaryDumper
from psycopg.types.numeric import Int8BinaryDumper

from services.wire.pgarrays import (
    EPOCH_US,
    MINUS_INFINITY,
    int8_array,
    register,
    timestamp_array,
    timestamp_of,
    uuid_array,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Int8:
    """psycopg chooses the smallest integer that fits; bigint[] wants eight bytes each."""

    def __init__(self, value: int) -> None:
        self.value = value


class _Int8Dumper(Int8BinaryDumper):
    def dump(self, obj: Any) -> Any:
        return super().dump(obj.value)


def psycopg_dumps(values: list[Any]) -> bytes:
    transformer = Transformer()
    transformer.adapters.register_dumper(_Int8, _Int8Dumper)
    transformer.adapters.register_dumper(datetime, DatetimeBinaryDumper)
    dumper = transformer.get_dumper(values, PyFormat.BINARY)
    assert isinstance(dumper, ListBinaryDumper)
    return bytes(dumper.dump(values))


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=20))
def test_ids_go_out_as_psycopg_sends_uuids(ids: list[bytes]) -> None:
    assert uuid_array(ids) == psycopg_dumps([uuid.UUID(bytes=one) for one in ids])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_integers_go_out_as_psycopg_sends_bigints(values: list[int]) -> None:
    assert int8_array(values) == psycopg_dumps([_Int8(value) for value in values])


@given(st.lists(st.integers(0, 4_102_444_800_000_000), min_size=1, max_size=20))
def test_times_go_out_as_psycopg_sends_timestamps(micros: list[int]) -> None:
    expected = psycopg_dumps([EPOCH + timedelta(microseconds=one) for one in micros])
    assert timestamp_array(micros) == expected


@given(st.integers(-(10**15), 4_102_444_800_000_000))
def test_a_time_that_went_out_comes_back(micros: int) -> None:
    assert timestamp_of(timestamp_array([micros])[-8:]) == micros


def test_minus_infinity_comes_back_below_every_time_and_goes_out_as_itself() -> None:
    lowest = timestamp_of(MINUS_INFINITY.to_bytes(8, "big", signed=True))
    assert lowest == MINUS_INFINITY + EPOCH_US
    assert timestamp_array([lowest])[-8:] == b"\x80" + b"\x00" * 7


def test_an_empty_array_has_no_dimension() -> None:
    assert uuid_array([]) == bytes.fromhex("00000000 00000000 00000b86")
    assert int8_array([]) == bytes.fromhex("00000000 00000000 00000014")
    assert timestamp_array([]) == bytes.fromhex("00000000 00000000 000004a0")


def test_a_registered_context_sends_them_under_their_own_types() -> None:
    transformer = Transformer()
    register(transformer)
    oids = {
        type(array).__name__: transformer.get_dumper(array, PyFormat.AUTO).oid
        for array in (uuid_array([]), int8_array([]), timestamp_array([]))
    }
    assert oids == {"UuidArray": 2951, "Int8Array": 1016, "TimestampArray": 1185}
