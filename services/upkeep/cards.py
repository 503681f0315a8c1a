"""Cards that are about to expire, or have: told once for each expiry as ``card_expiring``."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import psycopg
import structlog

from services.streaming import outbox
from services.streaming.database import Database
from services.streaming.loops import Clock, in_thread
from services.upkeep import PRODUCER
from services.wire.records import OutboxRow, ops_event
from services.wire.times import micros

log = structlog.get_logger(__name__)

Connection = psycopg.Connection[Any]

LOOK_SECONDS = 3600.0
BATCH_MAX = 500

_TELL = """
    UPDATE stripe_cards c SET told_for = c.expires_on
    FROM (
        SELECT payment_method FROM stripe_cards s
        WHERE expires_on <= %(until)s AND told_for IS DISTINCT FROM expires_on AND NOT EXISTS (
            SELECT FROM stripe_customers k
            WHERE k.stripe_customer = s.stripe_customer AND k.deleted_at IS NOT NULL
        )
        ORDER BY expires_on, payment_method LIMIT %(limit)s FOR UPDATE OF s SKIP LOCKED
    ) due
    WHERE c.payment_method = due.payment_method
    RETURNING c.payment_method, c.account, c.stripe_customer, c.expires_on
    """


def tell(db: Connection, now: datetime, days: int, limit: int = BATCH_MAX) -> int:
    """Mark what ends within ``days`` as told, with its ops events, in one transaction; returns how many."""
    with db.transaction():
        until = now.date() + timedelta(days=days)
        rows = db.execute(_TELL, {"until": until, "limit": limit}).fetchall()
        outbox.enqueue(db, PRODUCER, [_event(row, now) for row in rows])
    return len(rows)


def _event(row: tuple[str, str, str, date], now: datetime) -> OutboxRow:
    payment_method, account, customer, expires_on = row
    return ops_event(
        "card_expiring",
        subject_type="payment_method",
        subject_id=f"{payment_method}/{expires_on}",
        source="cards",
        at_us=micros(now),
        attributes={
            "payment_method": payment_method,
            "stripe_customer": customer,
            "account": account,
            "last_month": f"{expires_on - timedelta(days=1):%Y-%m}",
        },
    )


class Cards:
    """The job."""

    def __init__(self, database: Database, *, days: int, clock: Clock) -> None:
        self._database = database
        self._days = days
        self._clock = clock

    async def step(self) -> bool:
        """One batch; True when there may be more."""
        told = await in_thread(self._database, tell, self._clock(), self._days)
        if told:
            log.info("expiring cards told of", cards=told)
        return told == BATCH_MAX
