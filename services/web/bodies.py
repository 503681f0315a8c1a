"""Read a request's body within bounds: bytes as sent and as inflated.

Checked while the body arrives, so that nothing larger than the limit is ever held in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from litestar.types import Receive

from services.web.problems import RequestRefused

_GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """``ratio_max`` is inflated : compressed, judged once ``ratio_from_bytes`` have come out."""

    body_bytes_max: int = 1024 * 1024
    ratio_max: int = 200
    ratio_from_bytes: int = 64 * 1024


def _too_large(limits: BodyLimits) -> RequestRefused:
    return RequestRefused(413, "body_too_large", f"the body has more than {limits.body_bytes_max} bytes")


class Inflater:
    """Inflates one gzip member in pieces; never produces more than the limit."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._inflate = zlib.decompressobj(_GZIP)
        self._read = 0
        self._written = 0

    def feed(self, data: bytes) -> bytes:
        """What ``data`` inflates to.

        Raises:
            RequestRefused: 413 beyond the size or the ratio, 400 if it is not gzip or goes on after its end.
        """
        self._read += len(data)
        try:
            out = self._inflate.decompress(data, self._limits.body_bytes_max - self._written + 1)
        except zlib.error:
            raise self._not_gzip() from None
        self._written += len(out)
        if self._written > self._limits.body_bytes_max:
            raise _too_large(self._limits)
        if self._written > max(self._limits.ratio_from_bytes, self._limits.ratio_max * self._read):
            raise RequestRefused(
                413,
                "body_ratio_too_high",
                f"the body inflates to more than {self._limits.ratio_max} times its size",
            )
        if self._inflate.unused_data:
            raise self._not_gzip()
        return out

    def end(self) -> None:
        """The input is complete.

        Raises:
            RequestRefused: 400 if the gzip stream is cut short.
        """
        if not self._inflate.eof:
            raise self._not_gzip()

    @staticmethod
    def _not_gzip() -> RequestRefused:
        return RequestRefused(
            400, "encoding_invalid", "the body is not one whole gzip stream", path="Content-Encoding"
        )


async def chunks_of(receive: Receive) -> AsyncIterator[bytes]:
    """A request's body as it arrives.

    Raises:
        RequestRefused: 400 if the connection closes before its end.
    """
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise RequestRefused(400, "body_incomplete", "the connection closed before the body was complete")
        yield message["body"]
        if not message.get("more_body", False):
            return


def check_declared(declared_bytes: str | None, limits: BodyLimits) -> None:
    """Refuse a Content-Length above the limit, and one that is no number.

    Raises:
        RequestRefused: 413.
    """
    if declared_bytes is not None and (
        len(declared_bytes) > 18
        or not declared_bytes.isdigit()
        or int(declared_bytes) > limits.body_bytes_max
    ):
        raise _too_large(limits)


async def read_body(
    chunks: AsyncIterator[bytes], *, declared_bytes: str | None, encoding: str, limits: BodyLimits
) -> bytes:
    """The inflated body. ``declared_bytes`` and ``encoding`` are its Content-Length and Content-Encoding.

    Raises:
        RequestRefused: 413 above a limit, 415 for an encoding other than gzip and identity, 400 for bad gzip.
    """
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise RequestRefused(
            415, "encoding_unsupported", "send the body as it is or with gzip", path="Content-Encoding"
        )
    check_declared(declared_bytes, limits)
    inflater = Inflater(limits) if encoding == "gzip" else None
    body = bytearray()
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > limits.body_bytes_max:
            raise _too_large(limits)
        body += inflater.feed(chunk) if inflater is not None else chunk
    if inflater is not None:
        inflater.end()
    return bytes(body)
