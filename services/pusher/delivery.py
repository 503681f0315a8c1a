"""The sender's transactions on the intent journal: lock keys, claim, settle, resolve.

Two pushers never call for one (customer, event name) at a time, because:

1. a call needs the key's advisory lock, held by a session of its own that lives as long as the process: a
   killed process loses it, a stopped one keeps it;
2. a claimed row is ``in_flight`` on disk before the first byte leaves, and ``next_attempt_at`` is then its
   lease: while it runs nobody else takes the row or anything else of its key, even with the lock in hand, so
   a lock that the database lost (restart, cut connection) does not let a second call begin;
3. every later write about a claim is fenced by ``attempts``, which each claim raises.

A row ``in_flight`` whose key is free and whose lease is over has no owner, and is taken as in doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import psycopg

from services.pusher.intents import (
    TRANSITIONS,
    Action,
    Answer,
    Claim,
    Intent,
    Meaning,
    Policy,
    Settlement,
    State,
    Verdict,
    judge,
    next_action,
)
from services.pusher.journal import (
    INSERT_INTENTS,
    INTENT_COLUMNS,
    OUTBOX_INSERT,
    PRODUCER,
    TOO_OLD,
    failure_event,
    intent_values,
    outbox_values,
)
from services.wire.errors import Broken, require
from services.wire.records import OutboxRow

AsyncConnection = psycopg.AsyncConnection[Any]
Key = tuple[str, str]

#: What a retry can cure: lost connections, restarts, deadlocks, time-outs.
TRANSIENT_ERRORS = (psycopg.OperationalError, psycopg.InterfaceError)

SOURCE = "sync"
UNCLEAR = "in_doubt_unresolved"

_SESSION_OPTIONS = (
    "-c lock_timeout=5s -c statement_timeout=60s -c idle_in_transaction_session_timeout=30s -c TimeZone=UTC"
)

_DUE_KEYS = """
    SELECT stripe_customer, event_name FROM meter_events
    WHERE state IN ('pending', 'in_flight', 'in_doubt') AND next_attempt_at <= %s
    GROUP BY stripe_customer, event_name ORDER BY min(period_end), min(hour_start) LIMIT %s
    """

_HEADS = f"""
    WITH heads AS MATERIALIZED (
        SELECT head.identifier
        FROM unnest(%(customers)s::text[], %(event_names)s::text[]) AS key (stripe_customer, event_name)
        CROSS JOIN LATERAL (
            SELECT m.identifier, m.next_attempt_at FROM meter_events m
            WHERE m.stripe_customer = key.stripe_customer AND m.event_name = key.event_name
                AND m.state IN ('pending', 'in_flight', 'in_doubt')
                AND NOT (m.state = 'in_doubt' AND m.next_attempt_at > %(now)s)
                AND (m.state <> 'pending' OR NOT EXISTS (
                    SELECT FROM meter_events doubted
                    WHERE doubted.stripe_customer = m.stripe_customer AND doubted.event_name = m.event_name
                        AND doubted.hour_start = m.hour_start AND doubted.state = 'in_doubt'))
            ORDER BY m.state <> 'in_flight', m.period_end, m.hour_start, m.created_at, m.identifier
            LIMIT 1
        ) head
        WHERE head.next_attempt_at <= %(now)s
    )
    SELECT {INTENT_COLUMNS}, m.state, m.attempts, m.first_sent_at, m.error_code
    FROM meter_events m JOIN heads USING (identifier)
    WHERE m.state IN ('pending', 'in_flight', 'in_doubt') AND m.next_attempt_at <= %(now)s
    ORDER BY m.identifier FOR UPDATE OF m SKIP LOCKED
    """  # noqa: S608  constants only

_MARK = """
    UPDATE meter_events m
    SET state = a.state, attempts = m.attempts + 1, first_sent_at = a.first_sent_at, next_attempt_at = %s
    FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS a (identifier, state, first_sent_at)
    WHERE m.identifier = a.identifier
    """

_SETTLE = """
    UPDATE meter_events m
    SET state = a.state, first_sent_at = a.first_sent_at, next_attempt_at = a.next_attempt_at,
        settled_at = CASE WHEN a.state IN ('reported', 'failed') THEN %s::timestamptz END,
        error_code = a.error_code, http_status = a.http_status,
        request_id = coalesce(a.request_id, m.request_id)
    FROM unnest(
        %s::text[], %s::int[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
        %s::text[], %s::int[], %s::text[]
    ) AS a (
        identifier, attempts, from_state, state, first_sent_at, next_attempt_at,
        error_code, http_status, request_id
    )
    WHERE m.identifier = a.identifier AND m.attempts = a.attempts AND m.state = a.from_state
    RETURNING m.identifier, m.item_id, m.period_start, m.state
    """

_CLOSE_DELTAS = """
    WITH settled AS (
        SELECT item_id, period_start, count(*) AS deltas
        FROM unnest(%s::uuid[], %s::timestamptz[]) AS a (item_id, period_start) GROUP BY item_id, period_start
    ), held AS (
        SELECT item_id, period_start, deltas FROM item_periods JOIN settled USING (item_id, period_start)
        ORDER BY item_id, period_start FOR UPDATE OF item_periods
    )
    UPDATE item_periods p SET open_deltas = p.open_deltas - held.deltas
    FROM held WHERE p.item_id = held.item_id AND p.period_start = held.period_start
    """

_STORED_CODE = """
    SELECT coalesce(error_code, '') FROM meter_events
    WHERE identifier = %s AND attempts = %s AND state = 'in_doubt' FOR UPDATE
    """

_HOUR = """
    SELECT
        (SELECT coalesce(sum(amount), 0) FROM meter_events
         WHERE stripe_customer = %(customer)s AND event_name = %(event_name)s AND hour_start = %(hour)s
            AND state = 'reported'),
        (SELECT count(*) FROM meter_events
         WHERE stripe_customer = %(customer)s AND event_name = %(event_name)s AND hour_start = %(hour)s
            AND state IN ('in_flight', 'in_doubt') AND identifier <> %(identifier)s)
    """

_CANCEL = """
    UPDATE meter_events SET state = 'cancelled', settled_at = %s
    WHERE identifier = %s AND attempts = %s AND state = 'in_doubt'
    """

_COUNTS = """
    SELECT state, count(*), min(created_at) FROM meter_events
    WHERE state IN ('pending', 'in_flight', 'in_doubt') GROUP BY state
    UNION ALL SELECT 'failed', count(*), NULL FROM meter_events WHERE state = 'failed'
    """


async def connect(dsn: str, name: str) -> AsyncConnection:
    """A session in autocommit mode; transactions are explicit.

    Raises:
        psycopg.OperationalError: PostgreSQL is away.
    """
    return await psycopg.AsyncConnection.connect(
        dsn,
        autocommit=True,
        application_name=f"tidemeter-pusher-{name}",
        connect_timeout=5,
        prepare_threshold=1,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        options=_SESSION_OPTIONS,
    )


# -- Keys --------------------------------------------------------------------------------------------


def lock_id(key: Key) -> int:
    """The advisory lock of a (customer, event name). Two keys may share one: they then take turns."""
    name = b"pusher\x00" + b"\x00".join(part.encode() for part in key)
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big", signed=True)


async def due_keys(session: AsyncConnection, now: datetime, limit: int) -> list[Key]:
    """Keys with something due, nearest end of period first."""
    cursor = await session.execute(_DUE_KEYS, (now, limit))
    return [(customer, event_name) for customer, event_name in await cursor.fetchall()]


async def try_lock(session: AsyncConnection, keys: Sequence[Key]) -> list[Key]:
    """Lock what no other session holds, and return it."""
    cursor = await session.execute(
        "SELECT pg_try_advisory_lock(id) FROM unnest(%s::bigint[]) WITH ORDINALITY AS k (id, n) ORDER BY n",
        ([lock_id(key) for key in keys],),
    )
    return [key for key, (locked,) in zip(keys, await cursor.fetchall(), strict=True) if locked]


async def unlock(session: AsyncConnection, keys: Iterable[Key]) -> None:
    """Release keys this session holds.

    Raises:
        Broken: it did not hold one of them.
    """
    ids = [lock_id(key) for key in keys]
    if ids:
        cursor = await session.execute(
            "SELECT bool_and(pg_advisory_unlock(id)) FROM unnest(%s::bigint[]) AS id", (ids,)
        )
        row = await cursor.fetchone()
        require(row is not None and row[0], "a key was released that this session does not hold")


# -- Claims ------------------------------------------------------------------------------------------


async def claim(
    session: AsyncConnection, keys: Sequence[Key], *, now: datetime, lease: timedelta, policy: Policy
) -> tuple[list[Claim], int]:
    """Take the first due intent of each key, and commit that it is taken.

    The keys must be locked by ``session``. Returns the claims to act on, nearest end of period
    first, and how many ops events were written.
    """
    async with session.transaction():
        cursor = await session.execute(
            _HEADS,
            {"customers": [key[0] for key in keys], "event_names": [key[1] for key in keys], "now": now},
        )
        claims = [_claim_of(row, now, policy) for row in await cursor.fetchall()]
        if not claims:
            return [], 0
        await session.execute(
            _MARK,
            (
                now + lease,
                [c.intent.identifier for c in claims],
                [c.from_state for c in claims],
                [c.doubted_from for c in claims],
            ),
        )
        expired = [_expired(c) for c in claims if c.action is Action.EXPIRE]
        waiting = [_waiting(c, policy) for c in claims if c.action is Action.WAIT]
        events = await _write(session, expired + waiting, now)
    taken = [c for c in claims if c.action in (Action.SEND, Action.LOOK, Action.ASK)]
    return sorted(taken, key=lambda c: (c.intent.period_end, c.intent.hour_start)), events


def _claim_of(row: tuple[Any, ...], now: datetime, policy: Policy) -> Claim:
    *fields, state, attempts, doubted_since, error_code = row
    fields[1] = fields[1].hex
    intent = Intent(*fields)
    require((state == State.PENDING) == (doubted_since is None), f"first_sent_at does not fit state {state}")
    action = next_action(
        doubted_since=doubted_since, event_at=intent.event_at, attempts=attempts, now=now, policy=policy
    )
    return Claim(intent, action, attempts + 1, doubted_since, error_code, now)


def _expired(claim: Claim) -> Settlement:
    return Settlement(claim, State.FAILED, None, claim.claimed_at, Answer(Meaning.REFUSED, TOO_OLD))


def _waiting(claim: Claim, policy: Policy) -> Settlement:
    turn = policy.outside_gap(claim.claimed_at, claim.doubted_since)
    answer = Answer(Meaning.NOT_SENT, claim.error_code)
    return Settlement(claim, State.IN_DOUBT, claim.doubted_since, turn, answer)


# -- Settling ----------------------------------------------------------------------------------------


async def settle(session: AsyncConnection, settlements: Sequence[Settlement], now: datetime) -> int:
    """Make many settlements durable in one transaction; returns the number of ops events written.

    Writing the same settlements again, because a commit was not acknowledged, changes nothing.

    Raises:
        Broken: an item period is missing, or has fewer open deltas than were settled.
    """
    async with session.transaction():
        return await _write(session, settlements, now)


async def _write(session: AsyncConnection, settlements: Sequence[Settlement], now: datetime) -> int:
    if not settlements:
        return 0
    ordered = sorted(settlements, key=lambda s: s.claim.intent.identifier)
    for s in ordered:
        source = s.claim.from_state
        require(s.state in TRANSITIONS[source], f"{source} → {s.state} is no transition")
    cursor = await session.execute(
        _SETTLE,
        (
            now,
            [s.claim.intent.identifier for s in ordered],
            [s.claim.attempts for s in ordered],
            [s.claim.from_state for s in ordered],
            [s.state for s in ordered],
            [s.first_sent_at for s in ordered],
            [s.next_attempt_at for s in ordered],
            [s.answer.code for s in ordered],
            [s.answer.http_status for s in ordered],
            [s.answer.request_id for s in ordered],
        ),
    )
    written = await cursor.fetchall()
    closed = [(row[1], row[2]) for row in written if row[3] in (State.REPORTED, State.FAILED)]
    await _close_deltas(session, closed)
    by_identifier = {s.claim.intent.identifier: s for s in ordered}
    failed = [by_identifier[row[0]] for row in written if row[3] == State.FAILED]
    return await _write_outbox(
        session, [_failure(s.claim.intent, s.answer.code or "refused", now) for s in failed]
    )


async def _close_deltas(session: AsyncConnection, settled: Sequence[tuple[Any, datetime]]) -> None:
    if not settled:
        return
    try:
        cursor = await session.execute(_CLOSE_DELTAS, ([s[0] for s in settled], [s[1] for s in settled]))
    except psycopg.errors.CheckViolation as error:
        raise Broken("more deltas were settled than the item period has open") from error
    if cursor.rowcount != len(set(settled)):
        raise Broken("an intent was settled whose item period does not exist")


def _failure(intent: Intent, code: str, now: datetime) -> OutboxRow:
    return failure_event(intent.identifier, intent.tenant_id, intent.meter, code, source=SOURCE, now=now)


async def _write_outbox(session: AsyncConnection, rows: Sequence[OutboxRow]) -> int:
    if rows:
        await session.execute(OUTBOX_INSERT, outbox_values(rows, PRODUCER))
    return len(rows)


# -- Doubts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    """What reading the sink's total led to. No verdict: the claim was not ours any more."""

    verdict: Verdict | None
    events: int


async def resolve(
    session: AsyncConnection,
    claim: Claim,
    total: Decimal | None,
    *,
    now: datetime,
    chance: float,
    policy: Policy,
) -> Resolved:
    """Settle a doubted intent by the sink's total for its hour, or leave it in doubt.

    Inside one transaction: applied → reported; not applied → cancelled, with a replacement under another
    identifier, once; neither → in doubt, with one ops event after a while. While an intent is in doubt
    nothing else of its customer, meter and hour is sent, so every reported amount compared here is at least
    as old as the doubt.

    Raises:
        Broken: as :func:`settle`.
    """
    intent = claim.intent
    async with session.transaction():
        cursor = await session.execute(_STORED_CODE, (intent.identifier, claim.attempts))
        stored = await cursor.fetchone()
        if stored is None:
            return Resolved(None, 0)
        cursor = await session.execute(
            _HOUR,
            {
                "customer": intent.stripe_customer,
                "event_name": intent.event_name,
                "hour": intent.hour_start,
                "identifier": intent.identifier,
            },
        )
        row = await cursor.fetchone()
        require(row is not None, "an aggregate without a row")
        reported, others_doubted = row  # type: ignore[misc]
        verdict = judge(total, reported=reported, amount=intent.amount)
        if others_doubted and verdict is not Verdict.UNREADABLE:
            verdict = Verdict.UNCLEAR
        if verdict is Verdict.APPLIED:
            answer = Answer(Meaning.ALREADY_DELIVERED, "applied_by_summary")
            settlement = Settlement(claim, State.REPORTED, claim.doubted_since, now, answer)
            return Resolved(verdict, await _write(session, [settlement], now))
        if verdict is Verdict.NOT_APPLIED and claim.action is Action.ASK and intent.replaces is None:
            await _replace(session, claim, now, policy)
            return Resolved(verdict, 0)
        stuck = is_stuck(claim, verdict, now, policy)
        code = UNCLEAR if stuck else claim.error_code
        since = claim.doubted_since
        turn = policy.turn_after(now, attempts=claim.attempts, chance=chance, doubted_since=since)
        answer = Answer(Meaning.UNKNOWN, code)
        await _write(session, [Settlement(claim, State.IN_DOUBT, since, turn, answer)], now)
        told = [_failure(intent, UNCLEAR, now)] if stuck and stored[0] != UNCLEAR else []
        return Resolved(verdict, await _write_outbox(session, told))


async def _replace(session: AsyncConnection, claim: Claim, now: datetime, policy: Policy) -> None:
    """The old identifier is never sent again; the delta stays open under the new one."""
    cursor = await session.execute(_CANCEL, (now, claim.intent.identifier, claim.attempts))
    if cursor.rowcount == 1:
        cursor = await session.execute(INSERT_INTENTS, intent_values([claim.intent.replacement()], policy))
        require(cursor.rowcount == 1, "an intent was replaced twice")


def is_stuck(claim: Claim, verdict: Verdict, now: datetime, policy: Policy) -> bool:
    """Whether to tell an operator: at once when totals differ, after a while when they are unreadable."""
    if claim.action is not Action.ASK or claim.doubted_since is None:
        return False
    unreadable_for = now - claim.doubted_since - policy.ask_after
    return verdict is not Verdict.UNREADABLE or unreadable_for >= policy.unclear_after


# -- Health ------------------------------------------------------------------------------------------


async def counts(session: AsyncConnection) -> tuple[dict[str, int], datetime | None]:
    """Open and failed intents by state, and when the oldest open one was recorded."""
    rows = await (await session.execute(_COUNTS)).fetchall()
    oldest = [row[2] for row in rows if row[2] is not None]
    found = {str(state): 0 for state in (State.PENDING, State.IN_FLIGHT, State.IN_DOUBT, State.FAILED)}
    return found | {row[0]: row[1] for row in rows}, min(oldest, default=None)
