"""Subscriptions that stayed past due for too long: told once as ``dunning_exhaustion``.

Webhooks say so too, at the moment Stripe gives up; this is for accounts whose rules leave a subscription past
due for ever, and for webhooks that never came. What is stored may be late, so Stripe is asked before anything
is said, and what Stripe says now is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
import structlog

from services.streaming import outbox
from services.streaming.database import Database
from services.streaming.loops import Clock, in_thread
from services.streaming.observe import Status
from services.upkeep import PRODUCER
from services.wire.records import ops_event
from services.wire.stripe_reader import Away, Missing, StripeReader
from services.wire.times import EPOCH, micros

log = structlog.get_logger(__name__)

Connection = psycopg.Connection[Any]

LOOK_SECONDS = 600.0
PAGE_MAX = 100
#: So many questions without an answer end a round; fewer are about single subscriptions.
AWAY_IN_A_ROW_MAX = 3
#: Stripe has not given up on it and has not been paid.
UNPAID = frozenset({"past_due", "unpaid"})


@dataclass(frozen=True, slots=True)
class Overdue:
    """A subscription as it is stored."""

    subscription_id: str
    account: str
    status: str
    past_due_since: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Fresh:
    """What Stripe says now. ``wanted``: its customer ended it, it did not run out of tries."""

    status: str
    wanted: bool
    asked_at: datetime


def is_exhausted(fresh: Fresh) -> bool:
    """Whether the money is given up, or overdue for so long that it counts as given up."""
    return fresh.status in UNPAID or (fresh.status == "canceled" and not fresh.wanted)


_PAGE = """
    SELECT subscription_id, account, status, past_due_since, seen_at FROM stripe_subscriptions
    WHERE past_due_since <= %(before)s AND exhausted_at IS NULL
        AND (past_due_since, subscription_id) > (%(since)s, %(last)s)
    ORDER BY past_due_since, subscription_id LIMIT %(limit)s
    """
#: ``seen_at``: a webhook that came while Stripe was asked wins; the next round looks again.
_STORE = """
    UPDATE stripe_subscriptions SET status = %(status)s, seen_at = greatest(seen_at, %(asked_at)s),
        past_due_since = CASE WHEN %(unpaid)s OR %(exhausted)s THEN past_due_since END,
        exhausted_at = CASE WHEN %(exhausted)s THEN %(now)s::timestamptz END
    WHERE subscription_id = %(id)s AND exhausted_at IS NULL AND past_due_since = %(past_due_since)s
        AND seen_at = %(seen_at)s
    """


def page(
    db: Connection, before: datetime, after: Overdue | None = None, limit: int = PAGE_MAX
) -> list[Overdue]:
    """The next subscriptions that are past due since ``before`` or longer, longest first."""
    values = {
        "before": before,
        "since": after.past_due_since if after else EPOCH,
        "last": after.subscription_id if after else "",
        "limit": limit,
    }
    return [Overdue(*row) for row in db.execute(_PAGE, values).fetchall()]


def store(db: Connection, overdue: Overdue, fresh: Fresh, now: datetime) -> bool:
    """What Stripe says, and the ops event, in one transaction; True when it was told now."""
    exhausted = is_exhausted(fresh)
    with db.transaction():
        changed = db.execute(
            _STORE,
            {
                "id": overdue.subscription_id,
                "past_due_since": overdue.past_due_since,
                "seen_at": overdue.seen_at,
                "status": fresh.status,
                "unpaid": fresh.status in UNPAID,
                "exhausted": exhausted,
                # Stripe counts its events in whole seconds: one of this very second is not older than this.
                "asked_at": fresh.asked_at.replace(microsecond=0),
                "now": now,
            },
        ).rowcount
        if not changed or not exhausted:
            return False
        event = ops_event(
            "dunning_exhaustion",
            subject_type="subscription",
            # It can be paid and become past due again: that is another one.
            subject_id=f"{overdue.subscription_id}/{micros(overdue.past_due_since)}",
            source="sweeper",
            at_us=micros(now),
            attributes={
                "subscription_id": overdue.subscription_id,
                "account": overdue.account,
                "from_status": overdue.status,
                "to_status": fresh.status,
            },
        )
        outbox.enqueue(db, PRODUCER, [event])
    return True


async def ask(stripe: StripeReader, overdue: Overdue, asked_at: datetime) -> Fresh:
    """What Stripe says of it.

    Raises:
        Away: no answer to go by.
        Missing: there is none, so the key is of another account or mode.
    """
    found = await stripe.subscription(overdue.subscription_id, overdue.account)
    details = getattr(found, "cancellation_details", None)
    status = getattr(found, "status", None)
    if not isinstance(status, str):
        raise Away("unreadable")
    return Fresh(status, getattr(details, "reason", None) == "cancellation_requested", asked_at)


class Dunning:
    """The job: all that is overdue, a page at a time. What Stripe cannot say now waits for the next round."""

    def __init__(self, database: Database, stripe: StripeReader, *, days: int, clock: Clock) -> None:
        self._database = database
        self._stripe = stripe
        self._patience = timedelta(days=days)
        self._clock = clock
        self._away: str | None = None
        self._missing = 0

    async def step(self) -> bool:
        """One round; ends early when Stripe is away."""
        before = self._clock() - self._patience
        last: Overdue | None = None
        missing = told = away_in_a_row = 0
        self._away = None
        while overdue := await in_thread(self._database, page, before, last):
            for one in overdue:
                try:
                    fresh = await ask(self._stripe, one, self._clock())
                except Missing:
                    missing += 1
                    away_in_a_row = 0
                    continue
                except Away as away:
                    self._away = away.reason
                    away_in_a_row += 1
                    log.warning("waiting", world="Stripe", job="dunning", code=away.reason)
                    if away_in_a_row == AWAY_IN_A_ROW_MAX:
                        return False
                    continue
                away_in_a_row = 0
                told += await in_thread(self._database, store, one, fresh, self._clock())
            last = overdue[-1]
        self._missing = missing
        if told:
            log.info("dunning exhausted", subscriptions=told)
        return False

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        if self._away is not None:
            return "degraded", f"no answer of Stripe in the last round: {self._away}"
        if self._missing:
            return "degraded", f"{self._missing} subscriptions that Stripe does not have for this key"
        return "healthy", "last round complete"
