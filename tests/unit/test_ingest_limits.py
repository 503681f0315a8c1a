"""Bounds hold while the body arrives, for plain and for compressed bodies."""

from __future__ import annotations

import asyncio
import gzip
import random
import tracemalloc
import zlib
from collections.abc import AsyncIterator

import pytest

from services.ingest.answers import Result, answer_of
from services.ingest.limits import Limits, RateLimit
from services.web.bodies import read_body
from services.web.problems import RequestRefused

LIMITS = Limits(body_bytes_max=100_000, ratio_max=50, ratio_from_bytes=10_000)


class Upload:
    """Pieces of a body, counted as they are taken."""

    def __init__(self, body: bytes, piece: int = 1000) -> None:
        self.taken = 0
        self._pieces = [body[start : start + piece] for start in range(0, len(body), piece)]

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            self.taken += len(piece)
            yield piece


def noise(size: int) -> bytes:
    return random.Random(7).randbytes(size)  # noqa: S311


def read(body: bytes, encoding: str = "", declared: str | None = None, limits: Limits = LIMITS) -> bytes:
    upload = Upload(body)
    return asyncio.run(read_body(upload.chunks(), declared_bytes=declared, encoding=encoding, limits=limits))


def refused(body: bytes, encoding: str = "", declared: str | None = None) -> tuple[int, str]:
    with pytest.raises(RequestRefused) as caught:
        read(body, encoding, declared)
    return caught.value.status, caught.value.problem.code


def test_a_body_passes_up_to_its_limit_and_not_one_byte_more() -> None:
    assert read(b"x" * 100_000) == b"x" * 100_000
    assert refused(b"x" * 100_001) == (413, "body_too_large")


def test_a_declared_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    upload = Upload(b"x" * 200_000)
    with pytest.raises(RequestRefused):
        asyncio.run(read_body(upload.chunks(), declared_bytes="200000", encoding="", limits=LIMITS))
    assert upload.taken == 0
    assert refused(b"", declared="-1") == (413, "body_too_large")
    assert refused(b"", declared="9" * 5000) == (413, "body_too_large")


def test_an_upload_without_a_length_is_stopped_at_the_limit() -> None:
    upload = Upload(b"x" * 10_000_000)
    with pytest.raises(RequestRefused):
        asyncio.run(read_body(upload.chunks(), declared_bytes=None, encoding="", limits=LIMITS))
    assert upload.taken <= 101_000


def test_gzip_is_inflated_piece_by_piece() -> None:
    body = noise(50_000)
    assert read(gzip.compress(body), "gzip") == body
    assert read(gzip.compress(b""), " GZIP ") == b""


def test_a_bomb_is_refused_by_its_ratio_and_never_unpacked() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(100)) + packer.flush()
    generous = Limits(body_bytes_max=10_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(RequestRefused) as caught:
            read(bomb, "gzip", limits=generous)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.problem.code == "body_ratio_too_high"
    assert peak < 5_000_000


def test_a_body_that_inflates_beyond_the_limit_is_too_large() -> None:
    assert refused(gzip.compress(noise(120_000)), "gzip") == (413, "body_too_large")


@pytest.mark.parametrize(
    "body",
    [b"", b"plain", gzip.compress(b"x" * 5000)[:-3], gzip.compress(b"x") + b"y", gzip.compress(b"x") * 2],
    ids=["empty", "plain", "cut", "trailing", "two members"],
)
def test_what_is_not_one_whole_gzip_stream_is_refused(body: bytes) -> None:
    assert refused(body, "gzip") == (400, "encoding_invalid")


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "zstd"])
def test_other_encodings_are_refused(encoding: str) -> None:
    assert refused(b"{}", encoding) == (415, "encoding_unsupported")


def test_a_key_may_burst_then_send_at_its_rate_and_other_keys_do_not_feel_it() -> None:
    now = [0.0]
    rate = RateLimit(Limits(events_per_second=10, burst_events=100), lambda: now[0])
    rate.spend("a", 100)
    with pytest.raises(RequestRefused) as caught:
        rate.spend("a", 1)
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "2"})
    rate.spend("b", 100)
    now[0] = 1.0
    rate.spend("a", 10)
    with pytest.raises(RequestRefused):
        rate.spend("a", 1)
    now[0] = 1000.0
    rate.spend("a", 100)


def test_buckets_of_many_keys_are_forgotten_oldest_first() -> None:
    rate = RateLimit(Limits(events_per_second=1, burst_events=10), lambda: 0.0, keys_max=2)
    for key in ("a", "b", "c"):
        rate.spend(key, 10)
    rate.spend("a", 10)
    with pytest.raises(RequestRefused):
        rate.spend("c", 10)


def results(*statuses: str, code: str = "x") -> list[Result]:
    return [Result(index, status, code=code) for index, status in enumerate(statuses)]  # type: ignore[arg-type]


def test_the_status_tells_whether_to_retry() -> None:
    assert answer_of(results("accepted", "accepted"))[0] == 202
    assert answer_of(results("accepted", "rejected"))[0] == 207
    assert answer_of(results("rejected", "rejected"))[0] == 400
    assert answer_of(results("rejected", code="tenant_forbidden"))[0] == 403
    assert answer_of(results("accepted", "rejected", "unavailable"))[0] == 503
    assert answer_of(results("rejected", "unavailable"))[0] == 503
