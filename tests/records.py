"""Usage records as a consumer gets them from Kafka, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from schemas.catalog import released
from services.counters.config import Configuration, Meter
from services.streaming.chunks import Chunk, Partition
from services.wire.codec import Encoder
from services.wire.topics import USAGE_TOPICS

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
UNIT = 10**9
#: 2026-03-01T12:00:00Z
ARRIVAL_US = 1_772_366_400_000_000

ENCODERS = {version: Encoder(released()["usage_event", version]) for version in USAGE_TOPICS}


@dataclass(frozen=True, slots=True)
class Raw:
    """One record; ``timestamp`` is its arrival in milliseconds."""

    offset: int
    value: bytes | None
    timestamp: int = ARRIVAL_US // 1000
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


def v3(**changes: Any) -> dict[str, Any]:
    """A current usage record; ``quantity`` in billionths."""
    record = {
        "idempotency_key": "evt-1",
        "tenant_id": "acme",
        "customer_ref": "cust-1",
        "meter": "requests",
        "quantity": 5 * UNIT,
        "occurred_at": ARRIVAL_US,
        "properties": {},
        "source": "test",
        **changes,
    }
    return {**record, "quantity": record["quantity"].to_bytes(16, "big", signed=True)}


def encoded(record: dict[str, Any], version: int = 3) -> bytes:
    """``record`` as a Kafka value."""
    return ENCODERS[version].encode(record)


def chunk_of(values: Sequence[bytes | None | Raw], version: int = 3, first_offset: int = 0) -> Chunk:
    """A chunk of one partition; plain values get consecutive offsets."""
    records = [
        value if isinstance(value, Raw) else Raw(first_offset + index, value)
        for index, value in enumerate(values)
    ]
    return Chunk(Partition(USAGE_TOPICS[version], 0), records)


def meter(slug: str = "requests", tenant: str = "acme", **changes: Any) -> Meter:
    """A meter with 48 hours of lateness, in UTC."""
    fields: dict[str, Any] = {
        "tenant_id": tenant,
        "meter": slug,
        "aggregation": "sum",
        "lateness_us": 2 * DAY_US,
        "late_policy": "manual",
        "allow_negative": False,
        "calendar": "1 month UTC",
        **changes,
    }
    return Meter(**fields)


def configuration(*meters: Meter) -> Configuration:
    """These meters, or the usual one."""
    return Configuration(1, {(one.tenant_id, one.meter): one for one in meters or (meter(),)})
