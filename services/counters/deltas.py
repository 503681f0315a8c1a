"""A delta: what one hour sends, its identifier, and its form in ``deltas`` and on ``deltas.v1``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from uuid import UUID

import msgspec

from services.counters.changed import ChangedHour, ChangedPeriod
from services.wire import topics
from services.wire.codec import Encoder
from services.wire.records import OutboxRow
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

    def push_before(self, period_end_us: int) -> int:
        """The last safe moment to begin a push for a period."""
        return period_end_us + max(0, self.grace_us - self.margin_us)


def delta_identifier(item_id: bytes, period_us: int, hour_us: int, sequence: int) -> str:
    """32 characters, the same for ever: base32 of a 160-bit BLAKE2b over item, period, hour and sequence."""
    name = _uuid_text(item_id)
    text = f'["{name}", {period_us}, {hour_us}, {sequence}]'
    digest = int.from_bytes(blake2b(text.encode(), digest_size=20).digest(), "big")
    return "".join([_BASE32_PAIRS[digest >> shift & 1023] for shift in range(150, -1, -10)])


#: Every two digits of base32 (RFC 4648, section 6) in lower case, by their ten bits: three times the speed of
#: base64.b32encode, and one is made for every delta.
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32_PAIRS = [first + second for first in _BASE32 for second in _BASE32]


@lru_cache(maxsize=4096)
def _uuid_text(item_id: bytes) -> str:
    return str(UUID(bytes=item_id))


@lru_cache(maxsize=4096)
def _time_text(at_us: int) -> str:
    return instant(at_us).isoformat()


@dataclass(frozen=True, slots=True)
class Delta:
    identifier: str
    period: ChangedPeriod
    hour: int
    sequence: int
    amount: int
    event_at: int
    push_before: int | None
    closed_at: int

    def copy_line(self) -> str:
        """The row of ``deltas``, in PostgreSQL's COPY text format."""
        period = self.period
        return (
            f"{self.identifier}\t{_uuid_text(period.item.item_id)}\t{_time_text(period.start)}\t"
            f"{_time_text(self.hour)}\t{self.sequence}\t{self.amount}e-{QUANTITY_SCALE}\t"
            f"{_time_text(self.closed_at)}\n"
        )


def delta_of(period: ChangedPeriod, hour: ChangedHour, invoices: Invoices, now_us: int) -> Delta:
    item, sequence = period.item, hour.sequence + 1
    is_last = item.aggregation == "last"
    # Never outside of bucket and period; what is last carries the second of its event.
    event_at = hour.last_event - hour.last_event % _SECOND_US if is_last else max(hour.start, period.start)
    invoiced = item.calendar.anchored and not is_last
    return Delta(
        identifier=delta_identifier(item.item_id, period.start, hour.start, sequence),
        period=period,
        hour=hour.start,
        sequence=sequence,
        amount=hour.amount,
        event_at=event_at,
        push_before=invoices.push_before(period.end) if invoiced else None,
        closed_at=now_us,
    )


def delta_row(encoder: Encoder, delta: Delta) -> OutboxRow:
    period, item = delta.period, delta.period.item
    value = encoder.encode(
        {
            "identifier": delta.identifier,
            "item_id": item.item_id,
            "tenant_id": item.tenant_id,
            "customer_ref": item.customer_ref,
            "meter": item.meter,
            "stripe_customer": item.stripe_customer,
            "event_name": item.event_name,
            "customer_payload_key": item.customer_payload_key,
            "value_payload_key": item.value_payload_key,
            "period_start": period.start,
            "period_end": period.end,
            "hour_start": delta.hour,
            "event_at": delta.event_at,
            "sequence": delta.sequence,
            "amount": delta.amount.to_bytes(16, "big", signed=True),
            "closed_at": delta.closed_at,
            "dimensions": item.dimensions,
            "formula": "last" if item.aggregation == "last" else "sum",
            "push_before": delta.push_before,
        }
    )
    key = _encode_json((item.stripe_customer, item.event_name))
    return OutboxRow(topics.DELTAS, key, value, encoder.header_texts)
