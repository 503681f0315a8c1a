"""Close what an item has counted, but not yet pushed, into deltas.

The arithmetic is pure: hours in order, each hour's exact difference joins the carry, and what the meter's
scale can carry leaves as that hour's delta. The rest stays in the carry of the item's period, so ten times
0.4 on an integer meter bills 4, in whatever hours they came.

An item-period with open deltas is not closed again: at most one set of deltas of it is under way, so that an
answer in doubt can be settled against Stripe's own total.
"""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any

import psycopg

from schemas.catalog import current
from services.counters.ledger import GROUP
from services.counters.periods import Calendar
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.wire import topics
from services.wire.codec import Encoder
from services.wire.errors import require
from services.wire.records import OutboxRow

ITEMS_PER_ROUND = 1000

_EXACT = Context(prec=60)
_HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Portion:
    """What one bucket sends: ``amount`` is a multiple of 10**-scale and not zero."""

    hour: datetime
    amount: Decimal


def quantise(
    differences: Sequence[tuple[datetime, Decimal]], carry: Decimal, scale: int, *, allow_negative: bool
) -> tuple[list[Portion], Decimal]:
    """Split exact hourly differences, in hour order, into portions and the new carry.

    Rounds towards zero, so the carry stays below one unit of the scale in size; where the meter takes no
    negative values, a negative carry waits for later usage instead.
    """
    unit = Decimal(1).scaleb(-scale)
    portions: list[Portion] = []
    for hour, difference in differences:
        carry = _EXACT.add(carry, difference)
        amount = carry.quantize(unit, ROUND_DOWN, _EXACT)
        if amount == 0 or (amount < 0 and not allow_negative):
            continue
        portions.append(Portion(hour, amount))
        carry = _EXACT.subtract(carry, amount)
    return portions, carry


def delta_identifier(item_id: uuid.UUID, period_start: datetime, hour_start: datetime, sequence: int) -> str:
    """32 characters, the same for ever: base32 of a 160-bit BLAKE2b over item, period, hour and sequence."""
    parts = [str(item_id), _micros(period_start), _micros(hour_start), sequence]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).digest()
    return base64.b32encode(digest).decode().lower()


def _micros(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _time(micros: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


@dataclass(frozen=True, slots=True)
class _Closable:
    """A dirty item whose meter and Stripe customer are known."""

    item_id: uuid.UUID
    tenant_id: str
    customer_ref: str
    meter: str
    dirty_from: datetime
    scale: int
    allow_negative: bool
    event_name: str
    customer_payload_key: str
    value_payload_key: str
    timezone: str
    stripe_customer: str


#: A customer without a mapping is its own Stripe customer when its reference is a Stripe id.
_DIRTY_ITEMS = """
SELECT i.item_id, i.tenant_id, i.customer_ref, i.meter, i.dirty_from, m.scale, m.allow_negative, m.event_name,
       m.customer_payload_key, m.value_payload_key, t.timezone, coalesce(c.stripe_customer, i.customer_ref)
FROM items i
JOIN meters m USING (tenant_id, meter)
JOIN tenants t USING (tenant_id)
LEFT JOIN customers c USING (tenant_id, customer_ref)
WHERE i.dirty_from IS NOT NULL
  AND (c.stripe_customer IS NOT NULL OR i.customer_ref ~ '^cus_[A-Za-z0-9_]+$')
  AND NOT EXISTS (SELECT FROM item_periods p WHERE p.item_id = i.item_id AND p.open_deltas > 0)
LIMIT %s
FOR UPDATE OF i SKIP LOCKED
"""


def close_round(db: psycopg.Connection[Any], encoder: Encoder | None = None) -> tuple[int, int]:
    """Close up to 1,000 items in one transaction; returns how many items and deltas that was."""
    encoder = encoder or Encoder(current("usage_delta"))
    with db.transaction():
        items = [_Closable(*row) for row in db.execute(_DIRTY_ITEMS, (ITEMS_PER_ROUND,)).fetchall()]
        # The statement's snapshot may be older than its locks: another timer may have closed one meanwhile.
        open_now = db.execute(
            "SELECT DISTINCT item_id FROM item_periods WHERE item_id = ANY(%s) AND open_deltas > 0",
            ([item.item_id for item in items],),
        ).fetchall()
        under_way = {row[0] for row in open_now}
        items = [item for item in items if item.item_id not in under_way]
        if not items:
            return 0, 0
        deltas = _close_items(db, items)
        enqueue(db, GROUP, [_delta_row(encoder, delta) for delta in deltas])
        fault_point("close.before_commit")
    fault_point("close.after_commit")
    return len(items), len(deltas)


@dataclass(frozen=True, slots=True)
class _Delta:
    item: _Closable
    period_start: datetime
    period_end: datetime
    portion: Portion
    sequence: int
    closed_at: datetime

    @property
    def identifier(self) -> str:
        return delta_identifier(self.item.item_id, self.period_start, self.portion.hour, self.sequence)


def _close_items(db: psycopg.Connection[Any], items: list[_Closable]) -> list[_Delta]:
    by_id = {item.item_id: item for item in items}
    now = datetime.now(UTC)
    ids = list(by_id)
    rows = db.execute(
        "SELECT b.item_id, b.period_start, b.hour_start, b.total - b.closed, b.sequence FROM buckets b "
        "JOIN unnest(%s::uuid[], %s::timestamptz[]) AS u (i, h) ON b.item_id = u.i AND b.hour_start >= u.h "
        "WHERE b.total <> b.closed ORDER BY b.item_id, b.period_start, b.hour_start",
        (ids, [item.dirty_from for item in items]),
    ).fetchall()
    changed: dict[tuple[uuid.UUID, datetime], list[tuple[datetime, Decimal, int]]] = defaultdict(list)
    for item_id, period_start, hour, difference, sequence in rows:
        changed[item_id, period_start].append((hour, difference, sequence))
    carries = {
        (row[0], row[1]): row[2]
        for row in db.execute(
            "SELECT item_id, period_start, carry FROM item_periods WHERE item_id = ANY(%s)", (ids,)
        ).fetchall()
    }
    deltas: list[_Delta] = []
    periods: list[tuple[uuid.UUID, datetime, datetime, Decimal, int]] = []
    for (item_id, period_start), hours in changed.items():
        item = by_id[item_id]
        portions, carry = quantise(
            [(hour, difference) for hour, difference, _ in hours],
            carries.get((item_id, period_start), Decimal(0)),
            item.scale,
            allow_negative=item.allow_negative,
        )
        period_end = _time(Calendar(item.timezone).period_end(_micros(period_start)))
        sequences = {hour: sequence for hour, _, sequence in hours}
        deltas.extend(
            _Delta(item, period_start, period_end, portion, sequences[portion.hour] + 1, now)
            for portion in portions
        )
        periods.append((item_id, period_start, period_end, carry, len(portions)))
    _write_closed(db, ids, rows, periods, deltas)
    return deltas


def _write_closed(
    db: psycopg.Connection[Any],
    ids: list[uuid.UUID],
    rows: list[Any],
    periods: list[tuple[uuid.UUID, datetime, datetime, Decimal, int]],
    deltas: list[_Delta],
) -> None:
    sent = {(d.item.item_id, d.period_start, d.portion.hour): d for d in deltas}
    require(len(sent) == len(deltas), "one bucket closed twice in one round")
    keys = [(row[0], row[1], row[2]) for row in rows]
    amounts = [sent[key].portion.amount if key in sent else Decimal(0) for key in keys]
    with db.pipeline():
        db.execute("UPDATE items SET dirty_from = NULL WHERE item_id = ANY(%s)", (ids,))
        db.execute(
            "UPDATE buckets b SET closed = b.closed + u.d, pushed = b.pushed + u.a, "
            "sequence = b.sequence + (u.a <> 0)::int "
            "FROM unnest(%s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::numeric[], %s::numeric[]) "
            "AS u (i, p, h, d, a) WHERE (b.item_id, b.hour_start, b.period_start) = (u.i, u.h, u.p)",
            (
                [key[0] for key in keys],
                [key[1] for key in keys],
                [key[2] for key in keys],
                [row[3] for row in rows],
                amounts,
            ),
        )
        db.execute(
            "INSERT INTO item_periods (item_id, period_start, period_end, carry, open_deltas) "
            "SELECT * FROM "
            "unnest(%s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::numeric[], %s::int[]) "
            "ON CONFLICT (item_id, period_start) DO UPDATE SET carry = excluded.carry, "
            "open_deltas = item_periods.open_deltas + excluded.open_deltas",
            tuple(list(column) for column in zip(*periods, strict=True)) if periods else ([], [], [], [], []),
        )
        db.execute(
            "INSERT INTO deltas (identifier, item_id, period_start, hour_start, sequence, amount, closed_at) "
            "SELECT * FROM unnest(%s::text[], %s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::int[], "
            "%s::numeric[], %s::timestamptz[])",
            (
                [d.identifier for d in deltas],
                [d.item.item_id for d in deltas],
                [d.period_start for d in deltas],
                [d.portion.hour for d in deltas],
                [d.sequence for d in deltas],
                [d.portion.amount for d in deltas],
                [d.closed_at for d in deltas],
            ),
        )


def _delta_row(encoder: Encoder, delta: _Delta) -> OutboxRow:
    item, hour = delta.item, delta.portion.hour
    value = encoder.encode(
        {
            "identifier": delta.identifier,
            "item_id": item.item_id.bytes,
            "tenant_id": item.tenant_id,
            "customer_ref": item.customer_ref,
            "meter": item.meter,
            "stripe_customer": item.stripe_customer,
            "event_name": item.event_name,
            "customer_payload_key": item.customer_payload_key,
            "value_payload_key": item.value_payload_key,
            "period_start": _micros(delta.period_start),
            "period_end": _micros(delta.period_end),
            "hour_start": _micros(hour),
            "event_at": _micros(max(hour, delta.period_start)),
            "sequence": delta.sequence,
            "amount": int(delta.portion.amount.scaleb(9, _EXACT)).to_bytes(16, "big", signed=True),
            "closed_at": _micros(delta.closed_at),
        }
    )
    headers = {name: text.decode() for name, text in encoder.headers}
    key = json.dumps([item.stripe_customer, item.event_name], separators=(",", ":")).encode()
    return OutboxRow(topics.DELTAS, key, value, headers)
