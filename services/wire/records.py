"""Records that leave for Kafka beside the usage events: parked records and ops events.

A parked record's value is the original, byte for byte; everything about the failure is in its headers. No
header holds content: reasons are codes, exceptions are class names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from schemas.catalog import current
from services.wire.codec import Encoder
from services.wire.errors import require
from services.wire.ops import NAME_HEADER, NAMES
from services.wire.topics import OPS

CONNECT_PREFIX: Final = "__connect.errors."
ERROR_PREFIX: Final = "tidemeter-error-"
#: Of the original. With a value as large as a topic takes, twice that fits into the parked topics.
HEADER_BYTES_MAX: Final = 512 * 1024


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One record to send. Header values are text."""

    topic: str
    key: bytes | None
    value: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record was read. ``timestamp_ms`` is its arrival."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int

    def key(self) -> bytes:
        """Key of what is written about this record: ``["topic",partition,offset]``."""
        return json.dumps([self.topic, self.partition, self.offset], separators=(",", ":")).encode()


def header_texts(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    """Kafka headers as text that both Kafka and PostgreSQL hold.

    A header may be null or hold any bytes; what is not UTF-8, and NUL, becomes an escape such as ``\\xff``.
    """
    return {
        _without_nul(name): _without_nul((value or b"").decode("utf-8", "backslashreplace"))
        for name, value in headers
    }


def _without_nul(text: str) -> str:
    return text.replace("\x00", "\\x00")


def parked_record(
    topic: str,
    source: Source,
    value: bytes,
    *,
    reason: str,
    stage: str,
    error_class: str,
    service: str,
    original_headers: Mapping[str, str],
    **identifiers: str,
) -> OutboxRow:
    """A record parked on ``topic``: ``value`` is the original value, untouched."""
    headers = {
        **_bounded(original_headers),
        **error_headers(source, reason=reason, stage=stage, error_class=error_class, service=service),
        **{f"{ERROR_PREFIX}{name.replace('_', '-')}": text for name, text in identifiers.items()},
    }
    return OutboxRow(topic, source.key(), value, headers)


def _bounded(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers of the original, unless escaping made them so large that the topic would refuse the record."""
    size = sum(len(name.encode()) + len(text.encode()) for name, text in headers.items())
    return headers if size <= HEADER_BYTES_MAX else {f"{ERROR_PREFIX}headers-left-out": str(size)}


def error_headers(
    source: Source, *, reason: str, stage: str, error_class: str, service: str
) -> dict[str, str]:
    """Why a record is where it is. What dead letters of Kafka Connect have too has its name (KIP-298)."""
    return {
        f"{CONNECT_PREFIX}topic": source.topic,
        f"{CONNECT_PREFIX}partition": str(source.partition),
        f"{CONNECT_PREFIX}offset": str(source.offset),
        f"{CONNECT_PREFIX}stage": stage,
        f"{CONNECT_PREFIX}exception.class.name": error_class,
        f"{ERROR_PREFIX}reason": reason,
        f"{ERROR_PREFIX}timestamp": str(source.timestamp_ms),
        f"{ERROR_PREFIX}service": service,
    }


def ops_event(
    name: str,
    *,
    subject_type: str,
    subject_id: str,
    source: str,
    at_us: int,
    attributes: Mapping[str, str] | None = None,
) -> OutboxRow:
    """An ops event: identifiers, counts and codes only. The same transition always gets the same id.

    Raises:
        Broken: the name is not in the catalogue.
    """
    require(name in NAMES, f"{name} is not in the catalogue of ops events")
    identity = json.dumps([name, subject_type, subject_id, source])
    encoder = Encoder(current("ops_event"))
    value = encoder.encode(
        {
            "ops_event_id": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
            "name": name,
            "subject_type": subject_type,
            "subject_id": subject_id,
            "source": source,
            "attributes": dict(attributes or {}),
            "at": at_us,
        }
    )
    return OutboxRow(OPS, subject_id.encode(), value, {**encoder.header_texts, NAME_HEADER: name})
