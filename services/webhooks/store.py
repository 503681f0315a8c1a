"""SQL of ``webhook_events``, ``webhook_runs`` and ``webhook_subjects``.

Lock order: a run, then its subject. Claims of one handler take turns, so that two processes cannot take two
events of one object at once; nothing else waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg

from services.webhooks.deciding import Failure, Next, Policy
from services.webhooks.own import BUILT_IN
from services.webhooks.reading import Facts

Connection = psycopg.Connection[Any]
Gone = Literal["succeeded", "stale"]

#: First half of the advisory lock of a claim; the second is the handler's.
CLAIM_LOCK = 0x7768

_EVENT_COLUMNS = (
    "event_id, endpoint, account, event_type, object_id, is_thin, livemode, created_at, received_at, body"
)


@dataclass(frozen=True, slots=True)
class Delivered:
    """An event as it was read: how often, and where first."""

    facts: Facts
    deliveries: int
    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run of an event, if the event is new."""

    event_id: str
    handler: str
    subject: str


def store(db: Connection, events: Sequence[Delivered], runs: Sequence[NewRun], now: datetime) -> list[str]:
    """Store events, each once in ``events``, and the runs of those that are new; returns which are."""
    if not events:
        return []
    facts = [one.facts for one in events]
    rows = db.execute(
        f"INSERT INTO webhook_events AS known ({_EVENT_COLUMNS}, deliveries, topic, partition, "  # noqa: S608
        '"offset") SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], '
        "%s::boolean[], %s::boolean[], %s::timestamptz[], %s::timestamptz[], %s::bytea[], %s::int[], "
        "%s::text[], %s::int[], %s::bigint[]) "
        "ON CONFLICT (event_id) DO UPDATE SET deliveries = known.deliveries + EXCLUDED.deliveries "
        "RETURNING event_id, xmax = 0",
        (
            [one.event_id for one in facts],
            [one.endpoint for one in facts],
            [one.account for one in facts],
            [one.event_type for one in facts],
            [one.object_id for one in facts],
            [one.is_thin for one in facts],
            [one.livemode for one in facts],
            [one.created_at for one in facts],
            [one.received_at for one in facts],
            [one.body for one in facts],
            [one.deliveries for one in events],
            [one.topic for one in events],
            [one.partition for one in events],
            [one.offset for one in events],
        ),
    ).fetchall()
    new = {event_id for event_id, is_new in rows if is_new}
    wanted = [run for run in runs if run.event_id in new]
    db.execute(
        "INSERT INTO webhook_runs (event_id, handler, subject, created_at, next_attempt_at) "
        "SELECT event_id, handler, subject, e.created_at, %s "
        "FROM unnest(%s::text[], %s::text[], %s::text[]) AS r (event_id, handler, subject) "
        "JOIN webhook_events e USING (event_id) ORDER BY e.created_at, event_id",
        (
            now,
            [run.event_id for run in wanted],
            [run.handler for run in wanted],
            [run.subject for run in wanted],
        ),
    )
    return sorted(new)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A run that is this process's until ``lease_ends``. ``attempts`` counts this one; with ``replays``
    it is the fence, for a replay counts anew."""

    facts: Facts
    handler: str
    subject: str
    attempts: int
    replays: int
    lease_ends: datetime
    #: The attempt before, the last that there may be, never came to an end.
    is_spent: bool
    topic: str
    partition: int
    offset: int


#: In order: nothing older of the subject is unsettled, and nobody is at work on it. A user's handler comes
#: after the built-in one of its event.
_CLAIM = f"""
    WITH due AS (
        SELECT r.event_id, r.state = 'processing' AND r.attempts >= %(attempts_max)s AS is_spent
        FROM webhook_runs r
        WHERE r.handler = %(handler)s AND r.state IN ('received', 'processing', 'failed')
            AND r.next_attempt_at <= %(now)s
            AND NOT EXISTS (
                SELECT FROM webhook_runs o
                WHERE o.handler = r.handler AND o.subject = r.subject AND o.event_id <> r.event_id
                    AND o.state IN ('received', 'processing', 'failed')
                    AND ((o.created_at, o.event_id) < (r.created_at, r.event_id)
                        OR o.state = 'processing' AND o.next_attempt_at > %(now)s))
            AND (r.handler = '{BUILT_IN}' OR NOT EXISTS (
                SELECT FROM webhook_runs b
                WHERE b.event_id = r.event_id AND b.handler = '{BUILT_IN}'
                    AND b.state IN ('received', 'processing', 'failed')))
        ORDER BY r.next_attempt_at
        LIMIT 1 FOR UPDATE OF r SKIP LOCKED
    )
    UPDATE webhook_runs r SET state = 'processing', next_attempt_at = %(lease_ends)s,
        attempts = r.attempts + CASE WHEN due.is_spent THEN 0 ELSE 1 END
    FROM due JOIN webhook_events e USING (event_id)
    WHERE r.event_id = due.event_id AND r.handler = %(handler)s
    RETURNING r.subject, r.attempts, r.replays, due.is_spent, e.topic, e.partition, e."offset",
        {", ".join(f"e.{name}" for name in _EVENT_COLUMNS.split(", "))}
    """  # noqa: S608  constants only


def claim(db: Connection, handler: str, *, now: datetime, policy: Policy) -> Claimed | None:
    """Take the run of ``handler`` that is due longest, if any is: committed before anything is done."""
    lease_ends = now + policy.lease
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (CLAIM_LOCK, handler))
        row = db.execute(
            _CLAIM,
            {
                "handler": handler,
                "now": now,
                "lease_ends": lease_ends,
                "attempts_max": policy.attempts_max,
            },
        ).fetchone()
    if row is None:
        return None
    subject, attempts, replays, is_spent, topic, partition, offset, *facts = row
    return Claimed(
        Facts(*facts), handler, subject, attempts, replays, lease_ends, is_spent, topic, partition, offset
    )


def is_mine(db: Connection, run: Claimed) -> bool:
    """Lock the run; false when another took it over, or it is settled: then nothing more may be done."""
    row = db.execute(
        "SELECT FROM webhook_runs WHERE event_id = %s AND handler = %s AND state = 'processing' "
        "AND attempts = %s AND replays = %s FOR UPDATE",
        (run.facts.event_id, run.handler, run.attempts, run.replays),
    ).fetchone()
    return row is not None


def newest_of(db: Connection, run: Claimed) -> datetime | None:
    """When the newest event that was handled of the run's subject was made."""
    row = db.execute(
        "SELECT newest_at FROM webhook_subjects WHERE handler = %s AND subject = %s",
        (run.handler, run.subject),
    ).fetchone()
    return None if row is None else row[0]


def lock_newest(db: Connection, run: Claimed) -> datetime:
    """The same, locked until the transaction ends; of a new subject the run's own event is the newest."""
    row = db.execute(
        "INSERT INTO webhook_subjects AS s (handler, subject, newest_at) VALUES (%s, %s, %s) "
        "ON CONFLICT (handler, subject) DO UPDATE SET newest_at = s.newest_at RETURNING newest_at",
        (run.handler, run.subject, run.facts.created_at),
    ).fetchone()
    newest: datetime = row[0] if row is not None else run.facts.created_at
    return newest


def remember_newest(db: Connection, run: Claimed) -> None:
    """The run's event is handled: what is older of its locked subject is stale from now on."""
    db.execute(
        "UPDATE webhook_subjects SET newest_at = %s WHERE handler = %s AND subject = %s",
        (run.facts.created_at, run.handler, run.subject),
    )


def settle(db: Connection, run: Claimed, state: Gone, now: datetime) -> None:
    """The locked run is done."""
    db.execute(
        "UPDATE webhook_runs SET state = %s, settled_at = %s, error_class = NULL, error_code = NULL "
        "WHERE event_id = %s AND handler = %s",
        (state, now, run.facts.event_id, run.handler),
    )


def fail(db: Connection, run: Claimed, failure: Failure, then: Next) -> None:
    """The attempt at the locked run failed."""
    db.execute(
        "UPDATE webhook_runs SET state = %s, next_attempt_at = %s, error_class = %s, error_code = %s, "
        "settled_at = %s WHERE event_id = %s AND handler = %s",
        (
            then.state,
            then.at,
            failure.error_class,
            failure.error_code,
            then.at if then.state == "dead" else None,
            run.facts.event_id,
            run.handler,
        ),
    )


def counts(db: Connection) -> dict[str, int]:
    """Runs that are not done, by state."""
    rows = db.execute(
        "SELECT state, count(*) FROM webhook_runs WHERE state IN ('received', 'processing', 'failed') "
        "GROUP BY state UNION ALL SELECT 'dead', count(*) FROM webhook_runs WHERE state = 'dead'"
    ).fetchall()
    return dict(rows)


def orphans(db: Connection, handlers: Iterable[str]) -> list[tuple[str, int]]:
    """Handlers that no process with these ``handlers`` runs, and how many runs wait for each."""
    return db.execute(
        "SELECT handler, count(*) FROM webhook_runs WHERE state IN ('received', 'processing', 'failed') "
        "AND handler <> ALL(%s) GROUP BY handler ORDER BY handler",
        (list(handlers),),
    ).fetchall()
