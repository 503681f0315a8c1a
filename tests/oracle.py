"""The short truth: what a log of usage records must add up to. Imports nothing of the product.

Records are framed here too, from the published schema files, so that a mistake shared by the product's
writer and reader cannot hide. A record is judged from what was sent and from the coordinates that Kafka
acknowledged. An item's records must all be on one partition of one topic, or their order, and the truth, is
open.
"""

from __future__ import annotations

import io
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

SCHEMAS = Path(__file__).parent.parent / "schemas"
HOUR_S, DAY_S = 3600, 86_400

#: (tenant, customer, meter)
Item = tuple[str, str, str]


@dataclass(frozen=True)
class Meter:
    """What decides a meter's counting."""

    aggregation: str = "sum"
    lateness_s: int = 2 * DAY_S


@dataclass(frozen=True)
class Usage:
    """One usage event as its producer means it. ``version`` is the release that writes it."""

    tenant: str
    customer: str
    meter: str
    quantity: Decimal
    key: str
    occurred_s: int | None
    properties: Mapping[str, str] = field(default_factory=dict)
    version: int = 3

    @property
    def item(self) -> Item:
        return (self.tenant, self.customer, self.meter)

    @property
    def content(self) -> tuple[Any, ...]:
        return (*self.item, self.quantity, self.occurred_s, tuple(sorted(self.properties.items())))

    @property
    def topic(self) -> str:
        return f"usage.v{self.version}"

    def record_key(self) -> bytes:
        return json.dumps(self.item, separators=(",", ":")).encode()

    def value(self) -> bytes:
        return frame("usage_event", self.version, self._fields())

    def _fields(self) -> dict[str, Any]:
        if self.version == 1:
            return {
                "event_id": self.key,
                "customer": f"{self.tenant}/{self.customer}",
                "metric": self.meter,
                "value": float(self.quantity),
                "timestamp": self.occurred_s,
                "tags": [f"{name}={text}" for name, text in self.properties.items()],
            }
        if self.version == 2:
            return {
                "event_id": self.key,
                "tenant": self.tenant,
                "customer": self.customer,
                "metric": self.meter,
                "quantity": self.quantity,
                "used_at": None if self.occurred_s is None else self.occurred_s * 1_000_000,
                "attributes": dict(self.properties),
            }
        return {
            "idempotency_key": self.key,
            "tenant_id": self.tenant,
            "customer_ref": self.customer,
            "meter": self.meter,
            "quantity": self.quantity,
            "occurred_at": None if self.occurred_s is None else self.occurred_s * 1_000_000,
            "properties": dict(self.properties),
            "source": "test",
        }


@dataclass(frozen=True)
class Logged:
    """A record as the log holds it. ``sent`` is None for bytes that are no record."""

    topic: str
    partition: int
    offset: int
    sent: Usage | None


@dataclass
class Truth:
    """Totals by item and hour, how many records met which end, and the adjustments that wait."""

    hours: dict[tuple[Item, int], Decimal] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    adjustments: dict[Item, Decimal] = field(default_factory=dict)
    watermarks: dict[Item, int] = field(default_factory=dict)


def truth(log: Iterable[Logged], meters: Mapping[tuple[str, str], Meter]) -> Truth:
    """Go through the log partition by partition, one record at a time."""
    result = Truth()
    first: dict[tuple[str, str], Usage] = {}
    homes: dict[Item, tuple[str, int]] = {}
    for one in sorted(log, key=lambda one: (one.topic, one.partition, one.offset)):
        usage = one.sent
        if usage is None:
            result.outcomes["upcast_failed"] += 1
            continue
        meter = meters.get((usage.tenant, usage.meter))
        if meter is None:
            result.outcomes["dead_lettered"] += 1
            continue
        assert usage.occurred_s is not None
        assert homes.setdefault(usage.item, (one.topic, one.partition)) == (one.topic, one.partition)
        earlier = first.get((usage.tenant, usage.key))
        if earlier is not None:
            result.outcomes["duplicate" if earlier.content == usage.content else "conflict"] += 1
            continue
        first[usage.tenant, usage.key] = usage
        amount = usage.quantity if meter.aggregation == "sum" else Decimal(1)
        watermark = result.watermarks.get(usage.item)
        if watermark is not None and usage.occurred_s < watermark - meter.lateness_s:
            result.outcomes["adjusted"] += 1
            result.adjustments[usage.item] = result.adjustments.get(usage.item, Decimal(0)) + amount
            continue
        late = watermark is not None and usage.occurred_s < watermark
        result.outcomes["late_counted" if late else "counted"] += 1
        result.watermarks[usage.item] = max(watermark or 0, usage.occurred_s)
        hour = (usage.item, usage.occurred_s // HOUR_S * HOUR_S)
        result.hours[hour] = result.hours.get(hour, Decimal(0)) + amount
    return result


def by_item(hours: Mapping[tuple[Item, int], Decimal]) -> dict[Item, Decimal]:
    """Totals by item."""
    totals: dict[Item, Decimal] = defaultdict(Decimal)
    for (item, _), total in hours.items():
        totals[item] += total
    return dict(totals)


@cache
def published(subject: str, version: int) -> tuple[Any, bytes]:
    """The committed schema, parsed by stock fastavro with its logical types, and its framing."""
    document = json.loads((SCHEMAS / subject / f"v{version}.avsc").read_text(encoding="utf-8"))
    crc = bytes.fromhex(fingerprint(to_parsing_canonical_form(document), "CRC-64-AVRO"))
    return fastavro.parse_schema(document), struct.pack(">H", 0xC301) + crc


def frame(subject: str, version: int, record: Mapping[str, Any]) -> bytes:
    """Avro single-object encoding of ``record``."""
    schema, prefix = published(subject, version)
    body = io.BytesIO()
    fastavro.schemaless_writer(body, schema, dict(record))
    return prefix + body.getvalue()


def unframe(subject: str, version: int, value: bytes) -> dict[str, Any]:
    """The record in ``value``, which must be nothing but that."""
    schema, prefix = published(subject, version)
    assert value[: len(prefix)] == prefix, "another schema"
    body = io.BytesIO(value[len(prefix) :])
    record = fastavro.schemaless_reader(body, schema, None)
    assert not body.read(), "bytes after the record"
    assert isinstance(record, dict)
    return record
