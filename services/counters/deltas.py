"""A delta: what one hour sends, its identifier, and its form in ``deltas`` and on ``deltas.v1``.

Late events come by the thousand, each with an hour of its own, so a delta costs little beside its hour: what
all deltas of a period have in common is put into its form once.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any
from uuid import UUID

import fastavro
import msgspec

from schemas.catalog import Schema
from services.counters.changed import ChangedPeriod
from services.wire.codec import Encoder
from services.wire.errors import require
from services.wire.times import instant
from services.wire.usage import QUANTITY_SCALE

COPY_DELTAS = (
    "COPY deltas (identifier, item_id, period_start, hour_start, sequence, amount, closed_at) FROM STDIN"
)

_SECOND_US = 1_000_000
_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Invoices:
    """When an invoice takes no more usage, in microseconds.

    Stripe finalises an invoice about an hour after the period ended, unless the account says otherwise
    (docs.stripe.com/billing/subscriptions/usage-based/configure-grace-period). A push that begins less than
    the margin before that may come too late.
    """

    grace_us: int = 3600 * _SECOND_US
    margin_us: int = 300 * _SECOND_US

    def push_before(self, period_end_us: int, final_us: int | None = None) -> int:
        """The last safe moment to begin a push for a period; ``final_us``: Stripe told when its invoice is
        final."""
        final_us = period_end_us + self.grace_us if final_us is None else final_us
        return max(period_end_us, final_us - self.margin_us)


def delta_identifier(item_id: bytes, period_us: int, hour_us: int, sequence: int) -> str:
    """32 characters, the same for ever: base32 of a 160-bit BLAKE2b over item, period, hour and sequence."""
    return _identifier(_identity(item_id, period_us), hour_us, sequence)


def _identity(item_id: bytes, period_us: int) -> bytes:
    """How the identified text of every delta of a period begins."""
    return b'["%b", %d, ' % (str(UUID(bytes=item_id)).encode(), period_us)


def _identifier(identity: bytes, hour_us: int, sequence: int) -> str:
    digest = blake2b(b"%b%d, %d]" % (identity, hour_us, sequence), digest_size=20).digest()
    # Written out: a loop takes twice as long, base64.b32encode three times, and one is made for every delta.
    a, b = int.from_bytes(digest[:10], "big"), int.from_bytes(digest[10:], "big")
    two = _BASE32_PAIRS
    return (
        f"{two[a >> 70]}{two[a >> 60 & 1023]}{two[a >> 50 & 1023]}{two[a >> 40 & 1023]}"
        f"{two[a >> 30 & 1023]}{two[a >> 20 & 1023]}{two[a >> 10 & 1023]}{two[a & 1023]}"
        f"{two[b >> 70]}{two[b >> 60 & 1023]}{two[b >> 50 & 1023]}{two[b >> 40 & 1023]}"
        f"{two[b >> 30 & 1023]}{two[b >> 20 & 1023]}{two[b >> 10 & 1023]}{two[b & 1023]}"
    )


#: Every two digits of base32 (RFC 4648, section 6) in lower case, by their ten bits.
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32_PAIRS = [first + second for first in _BASE32 for second in _BASE32]


@dataclass(frozen=True, slots=True)
class Deltas:
    """The deltas of one round: lines for ``COPY_DELTAS``, in text format, and (key, value) for the topic."""

    lines: Sequence[str]
    records: Sequence[tuple[bytes, bytes]]


class DeltaWriter:
    """Writes deltas in both forms. ``headers`` go with every record.

    An Avro record is its fields, one after the other. So the runs of fields that a period's deltas have in
    common are written once, by fastavro, and what is written for each delta is put between them.
    """

    def __init__(self, encoder: Encoder) -> None:
        fields = encoder.schema.plain["fields"]
        require(
            [field["name"] for field in fields] == _FIELDS, "usage_delta has other fields than are written"
        )
        self._start = encoder.prefix + _long(32)
        self._before = _part(encoder.schema, _BEFORE)
        self._after = _part(encoder.schema, _AFTER)
        self.headers = encoder.header_texts

    def write(self, periods: Sequence[ChangedPeriod], invoices: Invoices, now_us: int) -> Deltas:
        """What the hours of ``periods`` send; closed at ``now_us``, in microseconds."""
        lines: list[str] = []
        records: list[tuple[bytes, bytes]] = []
        for period in periods:
            if any(hour.sent for hour in period.hours.values()):
                self._write_period(period, invoices, now_us, lines, records)
        return Deltas(lines, records)

    def _write_period(
        self,
        period: ChangedPeriod,
        invoices: Invoices,
        now_us: int,
        lines: list[str],
        records: list[tuple[bytes, bytes]],
    ) -> None:
        item, start, is_last = period.item, period.start, period.item.aggregation == "last"
        identity = _identity(item.item_id, start)
        place = f"\t{UUID(bytes=item.item_id)}\t{_time_text(start)}\t"
        closed = f"e-{QUANTITY_SCALE}\t{_time_text(now_us)}\n"
        key = _encode_json((item.stripe_customer, item.event_name))
        before = _encoded(
            self._before,
            {
                "item_id": item.item_id,
                "tenant_id": item.tenant_id,
                "customer_ref": item.customer_ref,
                "meter": item.meter,
                "stripe_customer": item.stripe_customer,
                "event_name": item.event_name,
                "customer_payload_key": item.customer_payload_key,
                "value_payload_key": item.value_payload_key,
                "period_start": start,
                "period_end": period.end,
            },
        )
        invoiced = item.calendar.anchored and not is_last
        after = _long(now_us) + _encoded(
            self._after,
            {
                "dimensions": item.dimensions,
                "formula": "last" if is_last else "sum",
                "push_before": invoices.push_before(period.end, period.final) if invoiced else None,
            },
        )
        for hour in period.hours.values():
            if not hour.sent:
                continue
            hour_us, amount, sequence = hour.start, hour.amount, hour.sequence + 1
            # Never outside of bucket and period; what is last carries the second of its event.
            event_us = hour.last_event - hour.last_event % _SECOND_US if is_last else max(hour_us, start)
            identifier = _identifier(identity, hour_us, sequence)
            lines.append(f"{identifier}{place}{_time_text(hour_us)}\t{sequence}\t{amount}{closed}")
            value = b"%b%b%b%b%b%b%b%b" % (
                self._start,
                identifier.encode(),
                before,
                _long(hour_us),
                _long(event_us),
                _long(sequence),
                amount.to_bytes(16, "big", signed=True),
                after,
            )
            records.append((key, value))


_BEFORE = [
    *("item_id", "tenant_id", "customer_ref", "meter", "stripe_customer", "event_name"),
    *("customer_payload_key", "value_payload_key", "period_start", "period_end"),
]
_AFTER = ["dimensions", "formula", "push_before"]
_FIELDS = ["identifier", *_BEFORE, "hour_start", "event_at", "sequence", "amount", "closed_at", *_AFTER]


def _part(schema: Schema, names: Sequence[str]) -> Any:
    """A schema of these fields of ``schema`` alone."""
    fields = [field for field in schema.plain["fields"] if field["name"] in names]
    return fastavro.parse_schema({"type": "record", "name": "part", "fields": fields})


def _encoded(part: Any, record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, part, record, strict=True)
    return stream.getvalue()


@lru_cache(maxsize=4096)
def _long(value: int) -> bytes:
    """An Avro ``long`` or ``int``: zigzag, then seven bits to a byte, the lowest first."""
    left = value << 1 if value >= 0 else ~(value << 1)
    text = bytearray()
    while left > 0x7F:
        text.append(left & 0x7F | 0x80)
        left >>= 7
    text.append(left)
    return bytes(text)


@lru_cache(maxsize=4096)
def _time_text(at_us: int) -> str:
    return instant(at_us).isoformat()
