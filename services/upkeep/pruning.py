"""Retention: what grows without bound and is settled is deleted after its time, in batches, each on record.

Nothing open is ever deleted. A dry run counts with the same conditions and the same moment that a run deletes
with. Webhooks have a command of their own (``tidemeter webhooks prune``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
import structlog
from psycopg import sql

from services.streaming.database import Database
from services.streaming.loops import Clock, in_thread
from services.wire.settings import Settings

log = structlog.get_logger(__name__)

Connection = psycopg.Connection[Any]

EVERY_SECONDS = 86_400.0
BATCH_MAX = 5000
#: As long as a bank may take money back, and a month.
BILLING_DAYS = 400
#: Of the session lock that one pruner at a time holds.
LOCK_ID = int.from_bytes(b"tidprune", "big", signed=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """Rows of ``table`` for which ``condition`` holds; ``%(before)s`` is ``days`` ago. -1 keeps for ever."""

    table: str
    key: str
    condition: str
    days: int

    @property
    def keeps_for_ever(self) -> bool:
        return self.days < 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a run deleted of a table, or a dry run would."""

    table: str
    days: int
    rows: int


class AlreadyRunning(Exception):
    """Another process prunes at this moment."""


def rules(settings: Settings) -> list[Rule]:
    """Every table that is pruned."""
    settled = settings.parked_settled_days
    return [
        Rule("parked_records", "parked_id", "state <> 'parked' AND settled_at < %(before)s", settled),
        Rule("redrives", "redrive_id", "finished_at < %(before)s", settled),
        Rule("notifications", "ops_event_id", "settled_at < %(before)s", settled),
        Rule("stripe_fees", "object_id", "state = 'matched' AND settled_at < %(before)s", BILLING_DAYS),
        Rule(
            "stripe_subscriptions",
            "subscription_id",
            "status IN ('canceled', 'incomplete_expired') AND seen_at < %(before)s",
            BILLING_DAYS,
        ),
        Rule(
            "stripe_invoices",
            "invoice_id",
            "status IN ('paid', 'void', 'uncollectible') AND seen_at < %(before)s",
            BILLING_DAYS,
        ),
        Rule(
            "stripe_cards",
            "payment_method",
            "expires_on < %(before)s::date AND seen_at < %(before)s",
            BILLING_DAYS,
        ),
    ]


def count(db: Connection, wanted: Sequence[Rule], now: datetime) -> list[Pruned]:
    """What :func:`prune` would delete at ``now``."""
    found = []
    for rule in wanted:
        query = sql.SQL("SELECT count(*) FROM {} WHERE ").format(sql.Identifier(rule.table))
        row = db.execute(query + sql.SQL(rule.condition), _values(rule, now)).fetchone()
        found.append(Pruned(rule.table, rule.days, row[0] if row and not rule.keeps_for_ever else 0))
    return found


def prune(
    db: Connection, wanted: Sequence[Rule], now: datetime, *, actor: str, batch: int = BATCH_MAX
) -> list[Pruned]:
    """Delete; every batch is a transaction with its own line in the audit log.

    Raises:
        AlreadyRunning: another process does.
    """
    row = db.execute("SELECT pg_try_advisory_lock(%s)", (LOCK_ID,)).fetchone()
    if row is None or not row[0]:
        raise AlreadyRunning
    try:
        return [Pruned(rule.table, rule.days, _prune_table(db, rule, now, actor, batch)) for rule in wanted]
    finally:
        if not db.broken:
            db.execute("SELECT pg_advisory_unlock(%s)", (LOCK_ID,))


def _prune_table(db: Connection, rule: Rule, now: datetime, actor: str, batch: int) -> int:
    deleted = 0
    while not rule.keeps_for_ever:
        with db.transaction():
            rows = db.execute(_delete(rule), {**_values(rule, now), "limit": batch}).rowcount
            if rows:
                details = {"rows": rows, "days": rule.days, "at": now.isoformat()}
                db.execute(
                    "INSERT INTO audit_log (actor, action, subject, details) VALUES (%s, 'prune', %s, %s)",
                    (actor, rule.table, json.dumps(details)),
                )
        deleted += rows
        if rows < batch:
            break
    return deleted


def _delete(rule: Rule) -> sql.Composed:
    table, key = sql.Identifier(rule.table), sql.Identifier(rule.key)
    condition = sql.SQL(rule.condition)  # a constant of this module
    return sql.SQL(
        "DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE {condition} "
        "ORDER BY {key} LIMIT %(limit)s FOR UPDATE)"
    ).format(table=table, key=key, condition=condition)


def _values(rule: Rule, now: datetime) -> dict[str, Any]:
    return {"before": now - timedelta(days=max(rule.days, 0))}


class Pruner:
    """The job: at the start, and then every day."""

    def __init__(self, database: Database, settings: Settings, *, clock: Clock) -> None:
        self._database = database
        self._rules = rules(settings)
        self._clock = clock

    async def step(self) -> bool:
        """One run; none when another process prunes."""
        try:
            await in_thread(self._database, self._prune)
        except AlreadyRunning:
            log.info("another process prunes")
        return False

    def _prune(self, db: Connection) -> None:
        for pruned in prune(db, self._rules, self._clock(), actor="upkeep"):
            if pruned.rows:
                log.info("pruned", table=pruned.table, rows=pruned.rows)
