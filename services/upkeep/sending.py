"""Mails to operators: claimed by a lease, sent, and settled. At least once.

``pending`` was certainly not taken by a mail server; ``sending`` is under way or may have been taken. What
was claimed together shares the end of its lease, and while it is ``sending`` it stays together: a mail that
is sent again after a crash tells the same ops events under the same ``Message-ID``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from services.upkeep.mails import BURST, Notice, Post, message
from services.upkeep.smtp import TOTAL_SECONDS, Delivered, MailServer
from services.wire import metrics
from services.wire.records import ops_event
from services.wire.times import micros

log = structlog.get_logger(__name__)

Connection = psycopg.Connection[Any]

#: What comes within this time is looked at together, so a burst is one mail.
LOOK_SECONDS = 10.0
DIGEST_MAX = 1000
ATTEMPTS_MAX = 25
#: A recipient that the server puts off holds the mail for the others up to this attempt.
ATTEMPTS_FOR_ALL = 5
PAUSE = timedelta(seconds=30)
PAUSE_MAX = timedelta(hours=6)
LEASE = timedelta(seconds=4 * TOTAL_SECONDS)
#: Of the lock that claims take turns by.
CLAIM_LOCK_ID = int.from_bytes(b"tidmails", "big", signed=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """One mail. ``lease`` is its mark: no other claim of that name ends at this moment."""

    notices: tuple[Notice, ...]
    attempts: int
    lease: datetime

    @property
    def ids(self) -> list[str]:
        return [notice.ops_event_id for notice in self.notices]


def pause_after(attempts: int) -> timedelta:
    """Until the next attempt: 25 of them span about four days."""
    return min(PAUSE_MAX, PAUSE * (1 << min(attempts - 1, 20)))


_NOTICE = "ops_event_id, name, subject_type, subject_id, source, attributes, happened_at"
_UNDER_WAY = """
    SELECT name, next_attempt_at FROM notifications WHERE state = 'sending' AND next_attempt_at <= %s
    ORDER BY next_attempt_at, name LIMIT 1
    """
_TOGETHER = f"""
    SELECT attempts, {_NOTICE} FROM notifications
    WHERE state = 'sending' AND name = %s AND next_attempt_at = %s ORDER BY happened_at, ops_event_id
    """  # noqa: S608  (a constant)
_WAITING = """
    SELECT name, count(*) FROM notifications WHERE state = 'pending' AND next_attempt_at <= %s
    GROUP BY name ORDER BY min(next_attempt_at), name LIMIT 1
    """
_OLDEST = f"""
    SELECT attempts, {_NOTICE} FROM notifications
    WHERE state = 'pending' AND name = %s AND next_attempt_at <= %s
    ORDER BY happened_at, ops_event_id LIMIT %s
    """  # noqa: S608  (a constant)
_FREE_LEASE = """
    SELECT greatest(%s, max(next_attempt_at) + interval '1 microsecond') FROM notifications
    WHERE state = 'sending'
    """
_CLAIM = """
    UPDATE notifications SET state = 'sending', attempts = attempts + 1, next_attempt_at = %s
    WHERE ops_event_id = ANY(%s)
    """
_MINE = "ops_event_id = ANY(%(ids)s) AND state = 'sending' AND next_attempt_at = %(lease)s"
_SENT = f"""
    UPDATE notifications SET state = 'sent', settled_at = %(now)s, error_class = NULL WHERE {_MINE}
    """  # noqa: S608  (a constant)
_FAILED = f"""
    UPDATE notifications SET error_class = %(code)s,
        state = CASE WHEN attempts >= %(max)s THEN 'dead' ELSE %(state)s END,
        settled_at = CASE WHEN attempts >= %(max)s THEN %(now)s::timestamptz END,
        next_attempt_at = %(at)s
    WHERE {_MINE} RETURNING ops_event_id, name, state
    """  # noqa: S608  (a constant)


def claim(db: Connection, now: datetime, lease: timedelta = LEASE) -> Claim | None:
    """The next mail that is due; None when none is. Claims take turns, so each sees what others took."""
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (CLAIM_LOCK_ID,))
        rows = _next_mail(db, now)
        if not rows:
            return None
        free = db.execute(_FREE_LEASE, (now + lease,)).fetchone()
        end: datetime = free[0] if free else now + lease
        notices = tuple(Notice(*row[1:]) for row in rows)
        db.execute(_CLAIM, (end, [notice.ops_event_id for notice in notices]))
    return Claim(notices, max(row[0] for row in rows) + 1, end)


def _next_mail(db: Connection, now: datetime) -> Sequence[tuple[Any, ...]]:
    if (group := db.execute(_UNDER_WAY, (now,)).fetchone()) is not None:
        return db.execute(_TOGETHER, group).fetchall()
    if (waiting := db.execute(_WAITING, (now,)).fetchone()) is None:
        return []
    name, number = waiting
    return db.execute(_OLDEST, (name, now, DIGEST_MAX if number > BURST else 1)).fetchall()


def settle(db: Connection, claimed: Claim, delivered: Delivered, now: datetime) -> int:
    """Store what became of it, in one transaction; returns how many notifications are dead now."""
    values = {"ids": claimed.ids, "lease": claimed.lease, "now": now}
    with db.transaction():
        if delivered.outcome == "sent":
            db.execute(_SENT, values)
            return 0
        pause = pause_after(claimed.attempts)
        unknown = delivered.outcome == "unknown"
        # What may have been taken stays together by its moment, which therefore depends on its lease.
        at = claimed.lease + pause if unknown else now + pause
        state = "sending" if unknown else "pending"
        values |= {"code": delivered.code, "state": state, "at": at, "max": ATTEMPTS_MAX}
        rows = db.execute(_FAILED, values).fetchall()
        dead = [(ops_event_id, name) for ops_event_id, name, state in rows if state == "dead"]
        events = [
            ops_event(
                "notification_dead",
                subject_type="ops_event",
                subject_id=ops_event_id,
                source="notifier",
                at_us=micros(now),
                attributes={"name": name, "reason": delivered.code or delivered.outcome},
            )
            for ops_event_id, name in dead
        ]
        outbox.enqueue(db, PRODUCER, events)
    return len(dead)


class Mails:
    """The job: one mail at a time."""

    def __init__(self, database: Database, server: MailServer, post: Post, *, clock: Clock) -> None:
        self._database = database
        self._server = server
        self._post = post
        self._clock = clock
        self._trouble: str | None = None

    async def step(self) -> bool:
        """One mail. After a failure nothing else is tried at once: the next one would likely fail too."""
        claimed = await in_thread(self._database, claim, self._clock())
        if claimed is None:
            return False
        mail = message(claimed.notices, self._post, self._clock())
        delivered = await asyncio.to_thread(
            self._server.deliver, mail, self._post, wait_for_all=claimed.attempts <= ATTEMPTS_FOR_ALL
        )
        dead = await in_thread(self._database, settle, claimed, delivered, self._clock())
        self._note(claimed, delivered, dead)
        return delivered.outcome == "sent"

    def _note(self, claimed: Claim, delivered: Delivered, dead: int) -> None:
        metrics.NOTIFICATIONS.labels(delivered.outcome).inc()
        metrics.NOTIFICATIONS.labels("dead").inc(dead)
        self._trouble = delivered.code
        if delivered.refused:
            self._trouble = f"{delivered.refused} recipients refused"
        told = {"ops_event": claimed.notices[0].name, "events": len(claimed.notices), "code": self._trouble}
        if self._trouble is None:
            log.info("mail sent", **told)
        else:
            log.warning("mail not sent to all", outcome=delivered.outcome, dead=dead, **told)

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        return ("healthy", "works") if self._trouble is None else ("degraded", f"last mail: {self._trouble}")
