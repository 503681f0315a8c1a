"""Did Stripe sign this body, for this endpoint, just now?

``Stripe-Signature: t=1700000000,v1=<hex>[,v1=<hex>...][,v0=<hex>]``. A ``v1`` is the HMAC-SHA256 of
``{t}.{body}`` with a secret of the endpoint; every other scheme is worth nothing. The body is taken as bytes
and is not looked into before one of them holds.

Stricter than Stripe's library, in what Stripe never sends: one ``t``, digits only; a bounded number of
signatures; and the time may not lie in the future either.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.web.problems import RequestRefused

HEADER: Final = "Stripe-Signature"
HEADER_BYTES_MAX: Final = 4 * 1024
SIGNATURES_MAX: Final = 16
TOLERANCE_S: Final = 300

_TIMESTAMP = re.compile(rb"[1-9][0-9]{0,11}")


@dataclass(frozen=True, slots=True)
class Signature:
    """What a header claims: when it was signed, and its ``v1`` signatures."""

    timestamp: bytes
    candidates: tuple[bytes, ...]


def read_signature(lines: Sequence[bytes]) -> Signature:
    """The signature in the header, given as the lines it came in.

    Raises:
        RequestRefused: 400 ``signature_missing`` or ``signature_malformed``.
    """
    if not lines:
        raise RequestRefused(400, "signature_missing", "the request is not signed", path=HEADER)
    if len(lines) > 1 or len(lines[0]) > HEADER_BYTES_MAX:
        raise _malformed("send it once, with at most 4 KiB")
    timestamps, candidates = [], []
    for item in lines[0].split(b","):
        scheme, equals, value = item.partition(b"=")
        if not equals:
            raise _malformed("must be t=<seconds>,v1=<signature>")
        if scheme == b"t":
            timestamps.append(value)
        elif scheme == b"v1":
            candidates.append(value)
    if len(timestamps) != 1 or _TIMESTAMP.fullmatch(timestamps[0]) is None:
        raise _malformed("must have one t, in seconds")
    if len(candidates) > SIGNATURES_MAX:
        raise _malformed(f"must have at most {SIGNATURES_MAX} signatures")
    return Signature(timestamps[0], tuple(candidates))


def verify(signature: Signature, body: bytes, secrets: Sequence[bytes], now_s: float) -> None:
    """Refuse ``body`` unless a ``v1`` of it holds under one of ``secrets``, and is of now.

    Every signature is compared with every secret, whichever holds. The age is judged last, so that only who
    has a secret learns what is wrong with it.

    Raises:
        RequestRefused: 400 ``signature_invalid`` or ``timestamp_outside_tolerance``.
    """
    signed = signature.timestamp + b"." + body
    holds = False
    for secret in secrets:
        expected = hmac.digest(secret, signed, "sha256").hex().encode()
        for candidate in signature.candidates:
            holds |= hmac.compare_digest(expected, candidate)
    if not holds:
        raise RequestRefused(
            400, "signature_invalid", "no signature of this body holds at this endpoint", path=HEADER
        )
    if abs(now_s - int(signature.timestamp)) > TOLERANCE_S:
        raise RequestRefused(
            400, "timestamp_outside_tolerance", f"signed more than {TOLERANCE_S} s from now", path=HEADER
        )


def _malformed(message: str) -> RequestRefused:
    return RequestRefused(400, "signature_malformed", message, path=HEADER)
