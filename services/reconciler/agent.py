"""The reconciler's process: everything every so often, what somebody asks for at once, and the gauges."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, LiteralString

import structlog

from schemas.catalog import check_catalog
from services.reconciler.judging import State
from services.reconciler.local import Connection
from services.reconciler.running import Limits, reconcile
from services.reconciler.storing import PRODUCER
from services.streaming import outbox
from services.streaming.alone import run_alone
from services.streaming.database import BULK_OPTIONS, TRANSIENT_ERRORS, Database
from services.streaming.loops import Clock, Loop, in_thread, utc_now
from services.streaming.observe import Health, Status
from services.streaming.reconciliation import STATES, Asked, RunState, good_for
from services.wire import metrics
from services.wire.settings import Settings
from services.wire.stripe_reader import StripeReader

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
OBSERVE_SECONDS = 5.0
#: While nothing was ever compared, it is tried so often.
FIRST_SECONDS = 15.0
SERIES_MAX = 1000

#: One reconciler is at work at a time: a run that is `running` when nobody is was left by one that died.
_TRY_LOCK: LiteralString = "SELECT pg_try_advisory_lock(hashtextextended('tidemeter/reconciler', 0))"
_CLAIM: LiteralString = """
UPDATE reconciliation_runs SET state = 'running', started_at = now()
WHERE run_id = (SELECT run_id FROM reconciliation_runs WHERE finished_at IS NULL ORDER BY run_id LIMIT 1)
RETURNING run_id, tenant_id, meters, customer_ref, period_at
"""
_DUE: LiteralString = """
INSERT INTO reconciliation_runs (requested_by)
SELECT 'loop' WHERE NOT EXISTS (
    SELECT FROM reconciliation_runs WHERE finished_at IS NULL AND requested_by = 'loop')
  AND coalesce((SELECT max(finished_at) FROM reconciliation_runs
                WHERE tenant_id IS NULL AND meters IS NULL AND customer_ref IS NULL AND period_at IS NULL),
               '-infinity')
      < now() - make_interval(secs => CASE WHEN EXISTS (SELECT FROM reconciliations) THEN %(interval)s
                                           ELSE least(%(first)s, %(interval)s) END)
"""
_ENDED: LiteralString = """
UPDATE reconciliation_runs SET state = %(state)s, finished_at = now(), ok = %(ok)s, adjust = %(adjust)s,
    drift = %(drift)s, unknown = %(unknown)s
WHERE run_id = %(run_id)s
"""
#: The history of the loop's own runs is short; what somebody asked for is kept.
_PRUNE: LiteralString = """
DELETE FROM reconciliation_runs WHERE requested_by = 'loop' AND finished_at < now() - interval '30 days'
"""
_SERIES: LiteralString = """
SELECT tenant_id, meter, item, period_start, diff_abs, diff_pct, checked_at >= %(fresh)s
FROM reconciliations WHERE period_end >= %(since)s
ORDER BY array_position(ARRAY['drift', 'unknown', 'adjust', 'ok'], state), diff_pct DESC NULLS LAST, item
LIMIT %(limit)s
"""
_STATES: LiteralString = """
SELECT CASE WHEN checked_at < %(fresh)s THEN 'unknown' WHEN state = 'drift' AND is_dismissed THEN 'adjust'
            ELSE state END, count(*)
FROM reconciliations WHERE period_end >= %(since)s GROUP BY 1
"""


def record_run(db: Connection, asked: Asked, found: Counter[State], *, by: str, began: datetime) -> None:
    """Note a run that was made outside of the process, by the command."""
    db.execute(
        "INSERT INTO reconciliation_runs (requested_by, requested_at, tenant_id, meters, customer_ref, "
        "period_at, state, started_at, finished_at, ok, adjust, drift, unknown) VALUES (%(by)s, %(began)s, "
        "%(tenant)s, %(meters)s, %(customer)s, %(period)s, 'done', %(began)s, now(), %(ok)s, %(adjust)s, "
        "%(drift)s, %(unknown)s)",
        {**asked.values(), "by": by, "began": began, **_numbers(found)},
    )


class Reconciler:
    """Carries runs out, one at a time over all processes."""

    def __init__(self, settings: Settings, stripe: StripeReader, *, clock: Clock = utc_now) -> None:
        self._settings = settings
        self._stripe = stripe
        self._clock = clock
        self._limits = Limits.from_settings(settings)
        self._deciding = Database(settings.postgres(), "reconciler")
        self._database = Database(settings.postgres(), "reconciler-bulk", BULK_OPTIONS)
        self._locked: Connection | None = None
        self._unanswered = 0
        self.loop = Loop("reconciler", LOOK_SECONDS, self.step, self._deciding)

    async def step(self) -> bool:
        """Carry out one run if one is due or asked for; True when there may be another."""
        claimed = await in_thread(self._deciding, self._claim)
        if claimed is None:
            return False
        run_id, asked = claimed
        began = time.monotonic()
        try:
            found = await reconcile(self._database, self._stripe, asked, self._limits, clock=self._clock)
        except TRANSIENT_ERRORS:
            metrics.RECON_RUNS.labels("failed", "all" if asked == Asked() else "part").inc()
            await asyncio.to_thread(self._database.reset)
            raise
        except Exception:  # a defect ends the process; the next one must not meet the same run again
            await in_thread(self._deciding, _end, run_id, "failed", Counter())
            raise
        self._unanswered = await in_thread(self._deciding, _end, run_id, "done", found)
        metrics.RECON_RUNS.labels("done", "all" if asked == Asked() else "part").inc()
        metrics.RECON_SECONDS.observe(time.monotonic() - began)
        log.info("reconciled", run=run_id, **{state: found[state] for state in STATES})
        return True

    def _claim(self, db: Connection) -> tuple[int, Asked] | None:
        if self._locked is not db:
            row = db.execute(_TRY_LOCK).fetchone()
            if row is None or not row[0]:
                return None
            self._locked = db  # as long as this connection lives
        interval = self._settings.reconcile_interval_seconds
        db.execute(_DUE, {"interval": interval, "first": FIRST_SECONDS})
        found = db.execute(_CLAIM).fetchone()
        if found is None:
            return None
        return found[0], Asked(found[1], tuple(found[2] or ()), found[3], found[4])

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        status, reason = self.loop.check()
        if status == "healthy" and self._unanswered:
            return "degraded", f"Stripe gave no answer about {self._unanswered} items and periods"
        return status, reason


def _numbers(found: Counter[State]) -> dict[str, Any]:
    return {str(state): found[state] for state in STATES}


def _end(db: Connection, run_id: int, state: RunState, found: Counter[State]) -> int:
    """Returns of how many items and periods Stripe said nothing."""
    db.execute(_ENDED, {"run_id": run_id, "state": state, **_numbers(found)})
    db.execute(_PRUNE)
    row = db.execute(
        "SELECT count(*) FROM reconciliations WHERE reason = 'no_answer' AND checked_at >= "
        "(SELECT started_at FROM reconciliation_runs WHERE run_id = %s) - interval '1 minute'",
        (run_id,),
    ).fetchone()
    return int(row[0]) if row else 0


class Gauges:
    """What was found, as metrics. What is too old to be true is not known."""

    def __init__(self, settings: Settings, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._good_for = good_for(settings)
        self._database = Database(settings.postgres(), "reconciler-gauges")
        self.loop = Loop("reconciliation gauges", OBSERVE_SECONDS, self.step, self._database)

    async def step(self) -> bool:
        """Read, and show."""
        await in_thread(self._database, self._show)
        return False

    def _show(self, db: Connection) -> None:
        now = self._clock()
        values = {"fresh": now - self._good_for, "since": now - timedelta(days=39), "limit": SERIES_MAX}
        rows = db.execute(_SERIES, values).fetchall()
        states = dict(db.execute(_STATES, values).fetchall())
        labels = [(row[0], row[1], row[2], f"{row[3]:%Y-%m-%dT%H:%M:%SZ}") for row in rows]
        for gauge, column in ((metrics.RECON_DIFF_ABS, 4), (metrics.RECON_DIFF_PCT, 5)):
            gauge.show(
                (label, float(row[column]) if row[6] and row[column] is not None else math.nan)
                for label, row in zip(labels, rows, strict=True)
            )
        for state in STATES:
            metrics.RECON_ITEMS.labels(state).set(states.get(state, 0))


async def run(settings: Settings) -> None:
    """Run until told to stop.

    Raises:
        Misconfigured: no Stripe key, or a live one that was not allowed; no PostgreSQL, no Kafka.
    """
    check_catalog()
    settings.kafka()
    stripe = StripeReader.from_settings(settings, per_second=settings.reconcile_rate_per_second)
    reconciler, gauges = Reconciler(settings, stripe), Gauges(settings)
    health = Health({"reconciler": reconciler.check})
    try:
        await run_alone(
            settings,
            health,
            [reconciler.loop.run, gauges.loop.run, lambda: outbox.relay_forever(settings, PRODUCER)],
        )
    finally:
        await stripe.close()
