"""Webhook runs as operators see them: find, replay, prune. Commands, API and the daily pruning share it.

A replay and a pruning are each one act: one ops event, and one row of the audit log with who did it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row

from services.streaming.outbox import enqueue
from services.wire.errors import TidemeterError
from services.wire.ops import DISPATCHER
from services.wire.records import ops_event
from services.wire.settings import Settings
from services.wire.times import micros

Connection = psycopg.Connection[Any]
Row = Mapping[str, Any]
#: Created, event, handler: the place of a run in a list.
Key = tuple[datetime, str, str]

STATES = ("received", "processing", "succeeded", "failed", "dead", "stale")
#: What waits for a person, or will.
ATTENTION = ("dead", "failed")

REPLAY_MAX = 10_000
REPLAY_BATCH = 100
PRUNE_BATCH = 1000
SUBJECTS_BATCH = 5000
DAYS_MAX = 36_500
#: Stripe delivers again for three days. What is forgotten before would be handled twice.
DAYS_MIN = 4
#: Nothing was settled before.
NEVER = datetime.min.replace(tzinfo=UTC)

_RUN_COLUMNS: LiteralString = (
    "r.event_id, r.handler, r.state, e.event_type, e.object_id, e.account, e.endpoint, r.created_at, "
    "e.received_at, e.deliveries, r.attempts, r.replays, r.next_attempt_at, r.error_class, r.error_code, "
    "r.settled_at"
)


class WebhookRefused(TidemeterError):
    """A replay that cannot be; ``code`` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Choice:
    """Which runs; None does not restrict. ``event_type`` may be a glob such as ``invoice.*``."""

    ids: Sequence[str] | None = None
    event_type: str | None = None
    object_id: str | None = None
    account: str | None = None
    endpoint: str | None = None
    handler: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def values(self) -> dict[str, Any]:
        """Parameters of :data:`_CHOSEN`."""
        return {
            **asdict(self),
            "ids": None if self.ids is None else list(self.ids),
            "event_type": None if self.event_type is None else _like(self.event_type),
        }


_CHOSEN: LiteralString = (
    "(%(ids)s::text[] IS NULL OR e.event_id = ANY(%(ids)s)) "
    "AND (%(event_type)s::text IS NULL OR e.event_type LIKE %(event_type)s) "
    "AND (%(object_id)s::text IS NULL OR e.object_id = %(object_id)s) "
    "AND (%(account)s::text IS NULL OR e.account = %(account)s) "
    "AND (%(endpoint)s::text IS NULL OR e.endpoint = %(endpoint)s) "
    "AND (%(handler)s::text IS NULL OR r.handler = %(handler)s) "
    "AND (%(since)s::timestamptz IS NULL OR r.created_at >= %(since)s) "
    "AND (%(until)s::timestamptz IS NULL OR r.created_at < %(until)s)"
)


def _like(glob: str) -> str:
    """A glob of ``*`` as SQL's pattern."""
    for special in ("\\", "%", "_"):
        glob = glob.replace(special, "\\" + special)
    return glob.replace("*", "%")


def find(
    db: Connection,
    choice: Choice,
    *,
    states: Sequence[str] = STATES,
    after: Key | None = None,
    limit: int | None = None,
) -> Sequence[Row]:
    """Runs with what is told of their events, newest event first; ``after`` such a key, ``limit`` many."""
    created_after, event_after, handler_after = after or (None, None, None)
    return (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_RUN_COLUMNS} FROM webhook_runs r JOIN webhook_events e USING (event_id) "  # noqa: S608
            f"WHERE r.state = ANY(%(states)s) AND {_CHOSEN} AND (%(created_after)s::timestamptz IS NULL "
            "OR (r.created_at, r.event_id, r.handler) "
            "< (%(created_after)s, %(event_after)s, %(handler_after)s)) "
            "ORDER BY r.created_at DESC, r.event_id DESC, r.handler DESC LIMIT %(limit)s",
            {
                **choice.values(),
                "states": list(states),
                "created_after": created_after,
                "event_after": event_after,
                "handler_after": handler_after,
                "limit": limit,
            },
        )
        .fetchall()
    )


@dataclass(frozen=True, slots=True)
class Found:
    """An event, without its body, and its runs: the built-in handler's first."""

    event: Row
    runs: Sequence[Row]


def find_event(db: Connection, event_id: str) -> Found | None:
    """One event with its runs."""
    cursor = db.cursor(row_factory=dict_row)
    event = cursor.execute(
        "SELECT event_id, event_type, object_id, account, endpoint, is_thin, livemode, created_at, "
        'received_at, deliveries, length(body) AS body_bytes, topic, partition, "offset" '
        "FROM webhook_events WHERE event_id = %s",
        (event_id,),
    ).fetchone()
    if event is None:
        return None
    runs = cursor.execute(
        "SELECT handler, subject, state, attempts, replays, next_attempt_at, error_class, error_code, "
        "settled_at FROM webhook_runs WHERE event_id = %s ORDER BY handler <> 'tidemeter', handler",
        (event_id,),
    ).fetchall()
    return Found(event, runs)


def body_of(db: Connection, event_id: str) -> bytes:
    """What Stripe sent, byte for byte; empty for an event that is not there."""
    row = db.execute("SELECT body FROM webhook_events WHERE event_id = %s", (event_id,)).fetchone()
    return b"" if row is None else bytes(row[0])


# -- Replay ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many runs begin anew, and how many of the events asked for by id had none that could."""

    requeued: int
    skipped: int
    dry_run: bool


_REPLAYABLE: LiteralString = (
    "FROM webhook_runs r JOIN webhook_events e USING (event_id) "
    "WHERE (r.state = 'dead' OR r.state = 'failed' AND %(ids)s::text[] IS NOT NULL) AND " + _CHOSEN
)


def replay(
    db: Connection, choice: Choice, *, now: datetime, actor: str, dry_run: bool = False, force: bool = False
) -> Replayed:
    """Have dead runs handled anew, with all their attempts; those asked for by id also when they only failed.

    They are due a hundred at a time, a second apart, oldest event first: all of it is one transaction, so
    nothing depends on who asked staying alive.

    Raises:
        WebhookRefused: ``not_found``, ``not_dead_lettered`` or ``replay_too_large``; nothing was changed.
    """
    values = choice.values()
    with db.transaction():
        lock: LiteralString = "" if dry_run else " FOR UPDATE OF r"
        rows = db.execute(
            "SELECT r.event_id, r.handler "
            + _REPLAYABLE
            + " ORDER BY r.created_at, r.event_id, r.handler"
            + lock,
            values,
        ).fetchall()
        skipped = _skipped(db, choice, {row[0] for row in rows})
        if len(rows) > REPLAY_MAX and not force:
            raise WebhookRefused(
                "replay_too_large", f"{len(rows)} runs would be replayed; more than {REPLAY_MAX} need force"
            )
        if rows and not dry_run:
            _requeue(db, rows, now)
            counts = {"requeued": str(len(rows)), "skipped": str(skipped)}
            _tell(db, "webhook_dlq.replay", actor, counts, {"choice": _shown(choice), "force": force}, now)
    return Replayed(len(rows), skipped, dry_run)


def _skipped(db: Connection, choice: Choice, chosen: set[str]) -> int:
    """Of the events asked for by id, those with nothing to replay."""
    if choice.ids is None:
        return 0
    wanted = set(choice.ids)
    known = {
        row[0]
        for row in db.execute(
            "SELECT event_id FROM webhook_events WHERE event_id = ANY(%s)", (sorted(wanted),)
        ).fetchall()
    }
    if missing := sorted(wanted - known):
        raise WebhookRefused("not_found", f"there is no webhook event {missing[0]}")
    if wanted and not chosen:
        raise WebhookRefused("not_dead_lettered", "none of these has a run that is dead or failed")
    return len(wanted - chosen)


def _requeue(db: Connection, rows: Sequence[tuple[str, str]], now: datetime) -> None:
    due = [now + timedelta(seconds=place // REPLAY_BATCH) for place in range(len(rows))]
    db.execute(
        "UPDATE webhook_runs r SET state = 'received', attempts = 0, replays = r.replays + 1, "
        "settled_at = NULL, next_attempt_at = c.due "
        "FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS c (event_id, handler, due) "
        "WHERE r.event_id = c.event_id AND r.handler = c.handler",
        ([row[0] for row in rows], [row[1] for row in rows], due),
    )


# -- Prune -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retention:
    """How long runs are kept once they are settled, in days, at least :data:`DAYS_MIN`; -1: for ever."""

    succeeded_days: int
    dead_days: int

    @classmethod
    def from_settings(cls, settings: Settings) -> Retention:
        """What the operator chose."""
        return cls(settings.webhook_succeeded_days, settings.webhook_dead_days)

    def cutoffs(self, now: datetime) -> dict[str, datetime]:
        """Before when a run must have been settled to go."""
        days = {"succeeded": self.succeeded_days, "dead": self.dead_days}
        return {
            name: NEVER if kept < 0 else now - timedelta(days=min(max(kept, DAYS_MIN), DAYS_MAX))
            for name, kept in days.items()
        }


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would."""

    events: int
    runs: int
    subjects: int
    dry_run: bool


#: Runs that may go; never null.
_MAY_GO: LiteralString = (
    "({0}.state IN ('succeeded', 'stale') AND {0}.settled_at < %(succeeded)s "
    "OR {0}.state = 'dead' AND {0}.settled_at < %(dead)s)"
)
#: Events of which every run may go.
_DOOMED: LiteralString = (
    "SELECT DISTINCT r.event_id FROM webhook_runs r "  # noqa: S608  constants only
    "WHERE r.settled_at < greatest(%(succeeded)s, %(dead)s) "
    f"AND {_MAY_GO.format('r')} AND NOT EXISTS (SELECT FROM webhook_runs o WHERE o.event_id = r.event_id "
    f"AND NOT {_MAY_GO.format('o')})"
)
#: A subject is forgotten once nothing of it can come again: no run waits or may be replayed, and an older
#: event would have to be delivered after so long.
_FORGOTTEN: LiteralString = (
    "s.newest_at < %(succeeded)s AND NOT EXISTS (SELECT FROM webhook_runs u "
    "WHERE u.handler = s.handler AND u.subject = s.subject "
    "AND u.state IN ('received', 'processing', 'failed')) "
    "AND (s.handler, s.subject) NOT IN (SELECT d.handler, d.subject FROM webhook_runs d "
    "WHERE d.state = 'dead' AND NOT {0})"
)


def prune(
    db: Connection, retention: Retention, *, now: datetime, actor: str, dry_run: bool = False
) -> Pruned:
    """Delete events whose every run was settled long enough ago, in batches, each a transaction of its own.

    The last one tells of the act, so one that is cut short is told of by the next.
    """
    cutoffs = retention.cutoffs(now)
    if dry_run:
        return _would_go(db, cutoffs)
    events = runs = 0
    while True:
        with db.transaction():
            row = db.execute(
                "WITH doomed AS (SELECT e.event_id FROM webhook_events e "  # noqa: S608
                f"  WHERE e.event_id IN ({_DOOMED} LIMIT {PRUNE_BATCH}) "
                "  ORDER BY e.event_id FOR UPDATE SKIP LOCKED), "
                "gone AS (DELETE FROM webhook_runs r USING doomed d WHERE r.event_id = d.event_id "
                f"  AND {_MAY_GO.format('r')} RETURNING r.event_id) "
                "SELECT (SELECT count(*) FROM doomed), (SELECT count(*) FROM gone), "
                "  ARRAY(SELECT event_id FROM doomed)",
                cutoffs,
            ).fetchone()
            found, gone, names = row if row is not None else (0, 0, [])
            # A run that is replayed at this moment stays, and its event with it.
            deleted = db.execute(
                "DELETE FROM webhook_events e WHERE e.event_id = ANY(%s) "
                "AND NOT EXISTS (SELECT FROM webhook_runs r WHERE r.event_id = e.event_id)",
                (names,),
            )
            events, runs = events + deleted.rowcount, runs + gone
            if found < PRUNE_BATCH:
                break
    subjects = _forget(db, cutoffs)
    if events or subjects:
        counts = {"events": str(events), "runs": str(runs), "subjects": str(subjects)}
        with db.transaction():
            _tell(db, "webhook_dlq.prune", actor, counts, asdict(retention), now)
    return Pruned(events, runs, subjects, False)


def _would_go(db: Connection, cutoffs: Mapping[str, datetime]) -> Pruned:
    """Counted by the rules that the deletion goes by."""
    row = db.execute(
        f"SELECT count(DISTINCT r.event_id), count(*) FROM webhook_runs r WHERE r.event_id IN ({_DOOMED})",  # noqa: S608
        cutoffs,
    ).fetchone()
    events, runs = row if row is not None else (0, 0)
    subjects = db.execute(
        f"SELECT count(*) FROM webhook_subjects s WHERE {_FORGOTTEN.format(_MAY_GO.format('d'))}",  # noqa: S608
        cutoffs,
    ).fetchone()
    return Pruned(events, runs, 0 if subjects is None else subjects[0], True)


def _forget(db: Connection, cutoffs: Mapping[str, datetime]) -> int:
    """Walk the subjects by key, so that none is looked at twice."""
    forgotten, handler, subject = 0, "", ""
    while True:
        row = db.execute(
            "WITH page AS (SELECT s.handler, s.subject FROM webhook_subjects s "  # noqa: S608
            "  WHERE (s.handler, s.subject) > (%(handler)s, %(name)s) "
            f"  ORDER BY s.handler, s.subject LIMIT {SUBJECTS_BATCH}), "
            "gone AS (DELETE FROM webhook_subjects s USING page p "
            "  WHERE (s.handler, s.subject) = (p.handler, p.subject) "
            f"  AND {_FORGOTTEN.format(_MAY_GO.format('d'))} RETURNING 1) "
            "SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM page), "
            "  (SELECT array[handler, subject] FROM page ORDER BY handler DESC, subject DESC LIMIT 1)",
            {**cutoffs, "handler": handler, "name": subject},
        ).fetchone()
        gone, seen, last = row if row is not None else (0, 0, None)
        forgotten += gone
        if seen < SUBJECTS_BATCH or last is None:
            return forgotten
        handler, subject = last


def _tell(
    db: Connection,
    name: str,
    actor: str,
    counts: Mapping[str, str],
    details: Mapping[str, Any],
    now: datetime,
) -> None:
    """The audit log and the ops event of one act, in the caller's transaction."""
    row = db.execute(
        "INSERT INTO audit_log (actor, action, subject, details) VALUES (%s, %s, 'webhooks', %s) "
        "RETURNING audit_id",
        (actor, name, json.dumps({**details, **counts})),
    ).fetchone()
    act = "" if row is None else str(row[0])
    event = ops_event(
        name,
        subject_type="webhook_act",
        subject_id=act,
        source="console",
        at_us=micros(now),
        attributes=counts,
    )
    enqueue(db, DISPATCHER, [event])


def _shown(choice: Choice) -> dict[str, Any]:
    """A choice as JSON."""
    fields = {name: value for name, value in asdict(choice).items() if value is not None}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()
    }
