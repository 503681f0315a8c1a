"""Decide an adjustment: count it, once, or not at all."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg

from services.counters.periods import Calendar, hour_start
from services.wire.errors import TidemeterError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Below Stripe's 35 days, with room for the push itself.
_PUSHABLE = timedelta(days=34, hours=12)


class UnknownAdjustment(TidemeterError):
    """No adjustment has this id."""


def decide(
    db: psycopg.Connection[Any], adjustment_id: str, *, approved: bool, by: str, now: datetime | None = None
) -> tuple[str, str, bool]:
    """Approve or reject; returns (id, state, whether this call changed it). Repeating changes nothing.

    An approved one goes to the bucket of its own hour and period, or, when Stripe would refuse that time, to
    the current hour. Lock order is the counters': item before bucket.

    Raises:
        UnknownAdjustment: no such id.
    """
    now = now or datetime.now(UTC)
    try:
        key = uuid.UUID(adjustment_id)
    except ValueError:
        raise UnknownAdjustment(
            f"{adjustment_id!r} is not an adjustment id; see `tidemeter adjustments list`"
        ) from None
    with db.transaction():
        row = db.execute(
            "SELECT a.item_id, a.quantity, a.occurred_at, a.arrived_at, a.state, t.timezone, m.aggregation "
            "FROM adjustments a JOIN tenants t USING (tenant_id) JOIN meters m USING (tenant_id, meter) "
            "WHERE adjustment_id = %s FOR UPDATE OF a",
            (key,),
        ).fetchone()
        if row is None:
            raise UnknownAdjustment(
                f"no adjustment {adjustment_id}; see `tidemeter adjustments list --state all`"
            )
        item_id, quantity, occurred_at, arrived_at, state, timezone, aggregation = row
        if state != "pending":
            return str(key), state, False
        applied_hour = None
        if approved:
            at = occurred_at if occurred_at >= now - _PUSHABLE else now
            amount = quantity if aggregation == "sum" else Decimal(1)
            applied_hour = _count(db, item_id, at, arrived_at, amount, Calendar(timezone))
        state = "applied" if approved else "rejected"
        db.execute(
            "UPDATE adjustments SET state = %s, applied_hour = %s, decided_by = %s, decided_at = %s "
            "WHERE adjustment_id = %s",
            (state, applied_hour, by, now, key),
        )
    return str(key), state, True


def _count(
    db: psycopg.Connection[Any],
    item_id: uuid.UUID,
    at: datetime,
    arrived_at: datetime,
    amount: Decimal,
    calendar: Calendar,
) -> datetime:
    at_us = (at - _EPOCH) // timedelta(microseconds=1)
    hour = _EPOCH + timedelta(microseconds=hour_start(at_us))
    period = _EPOCH + timedelta(microseconds=calendar.period_start(at_us))
    db.execute(
        "UPDATE items SET dirty_from = least(dirty_from, %s) WHERE item_id = %s",
        (hour, item_id),
    )
    db.execute(
        "INSERT INTO buckets AS b "
        "(item_id, hour_start, period_start, total, events, late_events, first_arrival, last_arrival) "
        "VALUES (%s, %s, %s, %s, 1, 1, %s, %s) ON CONFLICT (item_id, hour_start, period_start) DO UPDATE "
        "SET total = b.total + excluded.total, events = b.events + 1, late_events = b.late_events + 1, "
        "first_arrival = least(b.first_arrival, excluded.first_arrival), "
        "last_arrival = greatest(b.last_arrival, excluded.last_arrival)",
        (item_id, hour, period, amount, arrived_at, arrived_at),
    )
    return hour
