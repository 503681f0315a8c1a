"""The short truth: what a log of usage records must add up to. Imports nothing of the product.

Records are framed here too, from the published schema files, so that a mistake shared by the product's
writer and reader cannot hide, and billing periods have an arithmetic of their own. A record is judged from
what was sent and from the coordinates that Kafka acknowledged. An item's records must all be on one partition
of one topic, or their order, and the truth, is open.
"""

from __future__ import annotations

import io
import json
import struct
from calendar import monthrange
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

SCHEMAS = Path(__file__).parent.parent / "schemas"
HOUR_S, DAY_S = 3600, 86_400

#: (tenant, customer, meter, values of the meter's dimensions)
Item = tuple[str, ...]
#: (item, start of the hour, start of the billing period)
Bucket = tuple[Item, int, int]


@dataclass(frozen=True)
class Meter:
    """What decides a meter's counting. ``value_property`` holds the value instead of the quantity."""

    aggregation: str = "sum"
    lateness_s: int = 2 * DAY_S
    value_property: str | None = None
    dimensions: tuple[str, ...] = ()
    scale: int = 0


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
    def name(self) -> tuple[str, str, str]:
        return (self.tenant, self.customer, self.meter)

    @property
    def content(self) -> tuple[Any, ...]:
        return (*self.name, self.quantity, self.occurred_s, tuple(sorted(self.properties.items())))

    def item(self, meter: Meter) -> Item | None:
        """None without all of the meter's dimensions."""
        values = [self.properties.get(name, "") for name in meter.dimensions]
        return None if "" in values else (*self.name, *values)

    def amount(self, meter: Meter) -> Decimal | str | None:
        """What the event is worth to the meter; None when it has no such value."""
        text = self.properties.get(meter.value_property or "", "")
        if meter.value_property is None or meter.aggregation == "unique":
            return text or None if meter.aggregation == "unique" else self.quantity
        try:
            value = Decimal(text)
        except InvalidOperation:
            return None
        return value if value.is_finite() and value >= 0 else None

    @property
    def topic(self) -> str:
        return f"usage.v{self.version}"

    def record_key(self) -> bytes:
        return json.dumps(self.name, separators=(",", ":")).encode()

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
    """Aggregates by hour and by period, how many records met which end, and the adjustments that wait."""

    buckets: dict[Bucket, Decimal] = field(default_factory=dict)
    periods: dict[tuple[Item, int], Decimal] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    adjustments: dict[Item, Decimal] = field(default_factory=dict)
    watermarks: dict[Item, int] = field(default_factory=dict)
    #: Coordinates of what parks, by outcome.
    parked: dict[str, set[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(set))


def truth(
    log: Iterable[Logged],
    meters: Mapping[tuple[str, str], Meter],
    calendars: Mapping[tuple[str, ...], str] | None = None,
    approved: Collection[tuple[str, str]] = (),
) -> Truth:
    """Go through the log partition by partition, one record at a time; then aggregate what was counted.

    ``calendars`` by (tenant, customer), else by (tenant,), else UTC months. ``approved`` names, by tenant and
    idempotency key, what was too late and was counted all the same.
    """
    result = Truth()
    first: dict[tuple[str, str], Usage] = {}
    homes: dict[tuple[str, ...], tuple[str, int]] = {}
    counted: dict[Item, list[Usage]] = defaultdict(list)
    for one in sorted(log, key=lambda one: (one.topic, one.partition, one.offset)):
        usage = one.sent
        meter = meters.get((usage.tenant, usage.meter)) if usage else None
        item = usage.item(meter) if usage and meter else None
        amount = usage.amount(meter) if usage and meter else None
        if usage is None or meter is None or item is None or amount is None:
            outcome = "upcast_failed" if usage is None else "dead_lettered"
            result.outcomes[outcome] += 1
            result.parked[outcome].add((one.topic, one.partition, one.offset))
            continue
        assert usage.occurred_s is not None
        assert homes.setdefault(usage.name, (one.topic, one.partition)) == (one.topic, one.partition)
        earlier = first.get((usage.tenant, usage.key))
        if earlier is not None:
            result.outcomes["duplicate" if earlier.content == usage.content else "conflict"] += 1
            continue
        first[usage.tenant, usage.key] = usage
        watermark = result.watermarks.get(item)
        if watermark is not None and usage.occurred_s < watermark - meter.lateness_s:
            result.outcomes["adjusted"] += 1
            worth = Decimal(1 if meter.aggregation in ("count", "unique") else amount)
            result.adjustments[item] = result.adjustments.get(item, Decimal(0)) + worth
            if (usage.tenant, usage.key) in approved:
                counted[item].append(usage)
            continue
        late = watermark is not None and usage.occurred_s < watermark
        result.outcomes["late_counted" if late else "counted"] += 1
        result.watermarks[item] = max(watermark or 0, usage.occurred_s)
        counted[item].append(usage)
    for item, usages in counted.items():
        known = calendars or {}
        calendar = known.get(item[:2]) or known.get(item[:1]) or "1 month UTC"
        _aggregate(result, item, usages, meters[item[0], item[2]], calendar)
    return result


def _aggregate(result: Truth, item: Item, usages: Sequence[Usage], meter: Meter, calendar: str) -> None:
    """Every hour's and every period's own aggregate: what is in them decides, never the order it came in."""
    hours: dict[tuple[int, int], list[Usage]] = defaultdict(list)
    periods: dict[int, list[Usage]] = defaultdict(list)
    for usage in usages:
        at = usage.occurred_s or 0
        period = period_of(calendar, at)[0]
        hours[at // HOUR_S * HOUR_S, period].append(usage)
        periods[period].append(usage)
    for period, inside in periods.items():
        result.periods[item, period] = _whole(inside, meter)
    used: set[tuple[int, Any]] = set()
    for hour, period in sorted(hours):
        inside = hours[hour, period]
        total = _whole(inside, meter)
        if (
            meter.aggregation == "unique"
        ):  # a value belongs to the first hour of the period that it is used in
            values = {(period, one.amount(meter)) for one in inside}
            total = Decimal(len(values - used))
            used |= values
        result.buckets[item, hour, period] = total


def _whole(usages: Sequence[Usage], meter: Meter) -> Decimal:
    values: list[Any] = [one.amount(meter) for one in usages]
    match meter.aggregation:
        case "count":
            return Decimal(len(values))
        case "unique":
            return Decimal(len(set(values)))
        case "max":
            return max(values)  # type: ignore[no-any-return]
        case "last":
            newest = max(usages, key=lambda one: (one.occurred_s or 0, one.key))
            return values[usages.index(newest)]  # type: ignore[no-any-return]
    return sum(values, Decimal(0))


@cache
def _start(calendar: str, number: int) -> int:
    """Start of the ``number``-th period, in seconds; of an anchored calendar the 0th starts at the anchor."""
    count, unit, zone, *anchor = calendar.split()
    place, steps = ZoneInfo(zone), number * int(count)
    wall = datetime(2000, 1, 3 if unit == "week" else 1)  # 2000-01-03 was a Monday
    if anchor:
        wall = datetime.fromisoformat(anchor[0]).astimezone(place).replace(tzinfo=None, fold=0)
    if unit in ("day", "week"):
        wall += timedelta(days=steps * (7 if unit == "week" else 1))
    else:
        months = wall.year * 12 + wall.month - 1 + steps * (12 if unit == "year" else 1)
        year, month = months // 12, months % 12 + 1
        wall = wall.replace(year=year, month=month, day=min(wall.day, monthrange(year, month)[1]))
    return int(wall.replace(tzinfo=place).timestamp())


def period_of(calendar: str, at_s: int) -> tuple[int, int]:
    """Start, inclusive, and end, exclusive, of the period that holds ``at_s``. See `items.calendar`."""
    number = (at_s - _start(calendar, 0)) // (_start(calendar, 1) - _start(calendar, 0))
    while at_s < _start(calendar, number):
        number -= 1
    while at_s >= _start(calendar, number + 1):
        number += 1
    return _start(calendar, number), _start(calendar, number + 1)


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
