"""Apply adjustments that were approved: each is counted once, in the transaction that says so."""

from __future__ import annotations

import time
from typing import Any, LiteralString

import psycopg

from services.counters import buckets
from services.counters.config import TENANT_CALENDAR, Meter
from services.counters.decisions import hold_beside_the_log
from services.counters.prepare import Account, Item
from services.counters.windows import OLDEST_US, add
from services.streaming.faults import fault_point
from services.wire.periods import hour_start
from services.wire.pgarrays import register
from services.wire.times import instant, micros
from services.wire.usage import QUANTITY_UNIT

APPLIED_PER_ROUND = 500

_APPROVED: LiteralString = (
    "SELECT a.adjustment_id, a.item_id, a.customer_ref, a.quantity, a.unique_value, a.occurred_at, "  # noqa: S608
    "a.arrived_at, a.idempotency_key, m.tenant_id, m.meter, m.aggregation, m.lateness_seconds, "
    f"m.late_policy, m.allow_negative, {TENANT_CALENDAR} "
    "FROM adjustments a JOIN tenants t USING (tenant_id) JOIN meters m USING (tenant_id, meter) "
    "WHERE a.state = 'approved' ORDER BY a.adjustment_id LIMIT %s FOR UPDATE OF a SKIP LOCKED"
)


def apply_approved(db: psycopg.Connection[Any], now_us: int | None = None) -> int:
    """Count up to 500 approved adjustments in one transaction; returns how many that was.

    Each goes to the hour and period it happened in, or, when Stripe would refuse that time, to the hour that
    is open now. Closing carries it on when the invoice of its period is final.
    """
    register(db)
    now_us = now_us if now_us is not None else time.time_ns() // 1000
    with db.transaction():
        hold_beside_the_log(db)
        rows = db.execute(_APPROVED, (APPLIED_PER_ROUND,)).fetchall()
        if not rows:
            return 0
        items: dict[bytes, Item] = {}
        for (
            _,
            item_id,
            customer_ref,
            *_,
            tenant_id,
            slug,
            aggregation,
            lateness,
            policy,
            signed,
            calendar,
        ) in rows:
            meter = Meter(tenant_id, slug, aggregation, lateness * 1_000_000, policy, signed, calendar)
            items.setdefault(item_id.bytes, Item(item_id.bytes, customer_ref, meter, Account()))
        buckets.lock_items(db, items.values())
        applied = []
        for adjustment_id, item_id, _, quantity, unique_value, occurred_at, _, key, *_ in rows:
            item, occurred_us = items[item_id.bytes], micros(occurred_at)
            fits = occurred_us >= now_us - OLDEST_US or item.meter.aggregation == "last"
            at_us = occurred_us if fits else now_us
            amount = int(quantity * QUANTITY_UNIT) if unique_value is None else unique_value.int
            add(item, at_us, amount, key, 1)
            applied.append((adjustment_id, instant(hour_start(at_us)), instant(at_us)))
        arrivals = [micros(row[6]) for row in rows]
        buckets.write(db, items.values(), (min(arrivals), max(arrivals)))
        db.execute(
            "UPDATE adjustments a SET state = 'applied', applied_hour = u.h, counted_at = u.c, "
            "applied_at = now() FROM unnest(%s::uuid[], %s::timestamptz[], %s::timestamptz[]) AS u (i, h, c) "
            "WHERE a.adjustment_id = u.i",
            ([one[0] for one in applied], [one[1] for one in applied], [one[2] for one in applied]),
        )
        fault_point("adjust.before_commit")
    fault_point("adjust.after_commit")
    return len(applied)
