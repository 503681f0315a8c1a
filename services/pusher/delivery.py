"""The sender's transactions on the intent journal: lock keys, claim, settle, resolve.

Two pushers never call for one (customer, event name) at a time, because:

1. a call needs the key's advisory lock, held by a session of its own that lives as long as the process: a
   killed process loses it, a stopped one keeps it;
2. a claimed row is ``in_flight`` on disk before the first byte leaves, and ``next_attempt_at`` is then its
   lease: while it runs nobody else takes the row or anything else of its key, even with the lock in hand, so
   a lock that the database lost (restart, cut connection) does not let a second call begin;
3. every later write about a claim is fenced by ``attempts``, which each claim raises.

A row ``in_flight`` whose key is free and whose lease is over has no owner, and is taken as in doubt.

Rows are locked in the order that ``journal`` names. A bucket stays open, so that the counters do not close it
again, until its delta is settled: reported, failed or given back, but not when another identifier replaces
it. The counters may move a bucket to another period meanwhile; they then rewrite its rows of the journal, so
what a bucket or a period is written by is read back from the row and never taken from a claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any

import msgspec
import psycopg

from services.pusher.giving_back import GiveBack, Returned
from services.pusher.intents import (
    OPEN,
    TRANSITIONS,
    Action,
    Answer,
    Claim,
    Intent,
    Meaning,
    Policy,
    Settlement,
    Shown,
    State,
    Verdict,
    expired_because,
    judge,
    next_action,
)
from services.pusher.journal import (
    FREE_BUCKETS,
    INSERT_INTENTS,
    INTENT_COLUMNS,
    intent_values,
    stored_intent,
)
from services.pusher.ops import OUTBOX_INSERT, failure_event, outbox_values
from services.pusher.pausing import NOT_PAUSED, PAUSE, pause_values, paused_events
from services.wire.errors import require
from services.wire.records import OutboxRow

AsyncConnection = psycopg.AsyncConnection[Any]
Key = tuple[str, str]

_encode_json = msgspec.json.Encoder().encode

SOURCE = "sync"
UNCLEAR = "in_doubt_unresolved"

_SESSION_OPTIONS = (
    "-c lock_timeout=5s -c statement_timeout=60s -c idle_in_transaction_session_timeout=30s -c TimeZone=UTC"
)

#: Nothing new of a customer, meter and hour leaves while something of it is in doubt, or the meter is paused.
_NOT_BLOCKED = f"""
    (m.state <> 'pending' OR ({NOT_PAUSED} AND NOT EXISTS (
        SELECT FROM meter_events doubted
        WHERE doubted.stripe_customer = m.stripe_customer AND doubted.event_name = m.event_name
            AND doubted.hour_start = m.hour_start AND doubted.state = 'in_doubt')))
    """  # noqa: S608  constants only
_URGENCY = "coalesce(m.push_before, m.period_end), m.hour_start, m.created_at"

#: Keys whose first intent is due: many that only have others due would keep the rest out of the window. One
#: pass over what is open; a join of what is due with what is under way grows with the product of both.
_DUE_KEYS = f"""
    SELECT stripe_customer, event_name FROM (
        SELECT stripe_customer, event_name,
            min(ARRAY[{_URGENCY}]) FILTER (WHERE next_attempt_at <= %(now)s) AS urgency,
            min(ARRAY[{_URGENCY}]) FILTER (WHERE next_attempt_at > %(now)s AND state = 'pending') AS waiting,
            bool_or(next_attempt_at > %(now)s AND state = 'in_flight') AS under_way
        FROM meter_events m WHERE m.state IN ('pending', 'in_flight', 'in_doubt') AND {_NOT_BLOCKED}
        GROUP BY stripe_customer, event_name
    ) keys
    WHERE urgency IS NOT NULL AND NOT under_way AND (waiting IS NULL OR waiting >= urgency)
    ORDER BY urgency LIMIT %(limit)s
    """  # noqa: S608  constants only

#: Stripe may tell that an invoice is final, or will be, earlier than closing took for granted. Asked when an
#: intent is claimed, so that none can leave once that is known, nor within the margin before it. A later
#: moment counts for nothing.
_PUSH_BEFORE = """
    CASE WHEN m.push_before IS NOT NULL THEN least(m.push_before, (
        SELECT greatest(m.period_end, final_at - %(margin)s::interval) FROM invoice_limits l
        WHERE (l.stripe_customer, l.period_end) = (m.stripe_customer, m.period_end))) END AS push_before
    """
_CLAIMED_COLUMNS = INTENT_COLUMNS.replace("push_before", _PUSH_BEFORE)

_HEADS = f"""
    WITH heads AS MATERIALIZED (
        SELECT head.identifier
        FROM unnest(%(customers)s::text[], %(event_names)s::text[]) AS key (stripe_customer, event_name)
        CROSS JOIN LATERAL (
            SELECT m.identifier, m.next_attempt_at FROM meter_events m
            WHERE m.stripe_customer = key.stripe_customer AND m.event_name = key.event_name
                AND m.state IN ('pending', 'in_flight', 'in_doubt')
                AND NOT (m.state = 'in_doubt' AND m.next_attempt_at > %(now)s)
                AND {_NOT_BLOCKED}
            ORDER BY m.state <> 'in_flight', {_URGENCY}, m.identifier
            LIMIT 1
        ) head
        WHERE head.next_attempt_at <= %(now)s
    )
    SELECT {_CLAIMED_COLUMNS}, m.state, m.attempts, m.first_sent_at, m.error_code, m.refusals
    FROM meter_events m JOIN heads USING (identifier)
    WHERE m.state IN ('pending', 'in_flight', 'in_doubt') AND m.next_attempt_at <= %(now)s
    ORDER BY m.identifier FOR UPDATE OF m SKIP LOCKED
    """  # noqa: S608  constants only

_MARK = """
    UPDATE meter_events m
    SET state = a.state, attempts = m.attempts + 1, first_sent_at = a.first_sent_at, next_attempt_at = %s
    FROM jsonb_to_recordset(%s::jsonb) AS a (identifier text, state text, first_sent_at timestamptz)
    WHERE m.identifier = a.identifier
    """

_SETTLE = """
    UPDATE meter_events m
    SET state = a.state, first_sent_at = a.first_sent_at, next_attempt_at = a.next_attempt_at,
        settled_at = CASE WHEN a.state IN ('reported', 'failed', 'cancelled') THEN %s::timestamptz END,
        error_code = a.error_code, http_status = a.http_status,
        request_id = coalesce(a.request_id, m.request_id), refusals = m.refusals + a.refused
    FROM jsonb_to_recordset(%s::jsonb) AS a (
        identifier text, attempts int, from_state text, state text, first_sent_at timestamptz,
        next_attempt_at timestamptz, error_code text, http_status int, request_id text, refused int
    )
    WHERE m.identifier = a.identifier AND m.attempts = a.attempts AND m.state = a.from_state
    RETURNING m.identifier, m.state, m.item_id, m.hour_start, m.period_start, m.amount, m.formula
    """

_STORED = """
    SELECT coalesce(error_code, ''), period_start, period_end, push_before FROM meter_events
    WHERE identifier = %s AND attempts = %s AND state = 'in_doubt' FOR UPDATE
    """

_HOUR = """
    SELECT
        (SELECT coalesce(sum(amount), 0) FROM meter_events
         WHERE stripe_customer = %(customer)s AND event_name = %(event_name)s AND hour_start = %(hour)s
            AND state = 'reported'),
        (SELECT count(*) FROM meter_events
         WHERE stripe_customer = %(customer)s AND event_name = %(event_name)s AND hour_start = %(hour)s
            AND state = 'reported'
            AND CASE WHEN formula = 'last' THEN amount = %(amount)s ELSE amount * %(amount)s < 0 END),
        (SELECT count(*) FROM meter_events
         WHERE stripe_customer = %(customer)s AND event_name = %(event_name)s AND hour_start = %(hour)s
            AND state IN ('in_flight', 'in_doubt') AND identifier <> %(identifier)s)
    """

_CANCEL = """
    UPDATE meter_events SET state = 'cancelled', settled_at = %s
    WHERE identifier = %s AND attempts = %s AND state = 'in_doubt'
    """

_COUNTS = """
    SELECT state, count(*), min(created_at),
        min(least(first_sent_at + %s, push_before)) FILTER (WHERE state = 'in_doubt')
    FROM meter_events WHERE state IN ('pending', 'in_flight', 'in_doubt') GROUP BY state
    UNION ALL
    SELECT 'failed', count(*), min(settled_at), NULL FROM meter_events
    WHERE state = 'failed' AND released_at IS NULL
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
    """Keys whose first intent is due, nearest deadline first."""
    cursor = await session.execute(_DUE_KEYS, {"now": now, "limit": limit})
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

    The keys must be locked by ``session``. Returns the claims to act on, nearest deadline first, and how many
    needed no action by the caller: what comes too late was given back to the counters, what must wait waits.

    Raises:
        Broken: as :func:`settle`, or an amount cannot be given back.
    """
    async with session.transaction():
        cursor = await session.execute(
            _HEADS,
            {
                "customers": [key[0] for key in keys],
                "event_names": [key[1] for key in keys],
                "now": now,
                "margin": policy.invoice_margin,
            },
        )
        claims = [_claim_of(row, now, policy) for row in await cursor.fetchall()]
        if not claims:
            return [], 0
        await session.execute(
            _MARK,
            (
                now + lease,
                _rows(
                    {
                        "identifier": c.intent.identifier,
                        "state": c.from_state,
                        "first_sent_at": c.doubted_from,
                    }
                    for c in claims
                ),
            ),
        )
        expired = [_expired(c, policy) for c in claims if c.action is Action.EXPIRE]
        waiting = [_waiting(c, policy) for c in claims if c.action is Action.WAIT]
        await _write(session, expired + waiting, now)
    taken = [c for c in claims if c.action in (Action.SEND, Action.LOOK, Action.ASK)]
    taken.sort(key=lambda c: (c.intent.deadline, c.intent.hour_start))
    return taken, len(claims) - len(taken)


def _rows(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as one parameter: psycopg dumps arrays element by element, a datetime in some 3 µs."""
    return _encode_json(list(rows)).decode()


def _claim_of(row: tuple[Any, ...], now: datetime, policy: Policy) -> Claim:
    *fields, state, attempts, doubted_since, error_code, refusals = row
    intent = stored_intent(fields)
    require((state == State.PENDING) == (doubted_since is None), f"first_sent_at does not fit state {state}")
    action = next_action(
        doubted_since=doubted_since,
        event_at=intent.event_at,
        push_before=intent.push_before,
        attempts=attempts,
        now=now,
        policy=policy,
    )
    return Claim(intent, action, attempts + 1, doubted_since, error_code, now, refusals)


def _expired(claim: Claim, policy: Policy) -> Settlement:
    intent, now = claim.intent, claim.claimed_at
    code = expired_because(event_at=intent.event_at, push_before=intent.push_before, now=now, policy=policy)
    return Settlement(claim, State.CANCELLED, None, now, Answer(Meaning.NOT_SENT, code))


def _waiting(claim: Claim, policy: Policy) -> Settlement:
    turn = policy.outside_gap(claim.claimed_at, claim.doubted_since)
    answer = Answer(Meaning.NOT_SENT, claim.error_code)
    return Settlement(claim, State.IN_DOUBT, claim.doubted_since, turn, answer)


# -- Settling ----------------------------------------------------------------------------------------


async def settle(session: AsyncConnection, settlements: Sequence[Settlement], now: datetime) -> int:
    """Make many settlements durable in one transaction; returns the number of ops events written.

    Writing the same settlements again, because a commit was not acknowledged, changes nothing.

    Raises:
        Broken: the bucket of a settled intent is missing or was not open.
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
        expired = s.claim.action is Action.EXPIRE
        require((s.state is State.CANCELLED) == expired, "only what expired is given back")
    cursor = await session.execute(
        _SETTLE,
        (
            now,
            _rows(
                {
                    "identifier": s.claim.intent.identifier,
                    "attempts": s.claim.attempts,
                    "from_state": s.claim.from_state,
                    "state": s.state,
                    "first_sent_at": s.first_sent_at,
                    "next_attempt_at": s.next_attempt_at,
                    "error_code": s.answer.code,
                    "http_status": s.answer.http_status,
                    "request_id": s.answer.request_id,
                    "refused": int(s.state is State.PENDING and s.answer.meaning is Meaning.METER_AWAY),
                }
                for s in ordered
            ),
        ),
    )
    settled = [
        (identifier, state, Returned(*rest))
        for identifier, state, *rest in await cursor.fetchall()
        if state in (State.REPORTED, State.FAILED, State.CANCELLED)
    ]
    # A claim only gives back and an answer only settles, so buckets are locked once, and behind their items.
    await _give_back(session, [place for _, state, place in settled if state == State.CANCELLED])
    await _free_buckets(session, [identifier for identifier, _, _ in settled])
    by_identifier = {s.claim.intent.identifier: s for s in ordered}
    failed = [by_identifier[identifier] for identifier, state, _ in settled if state == State.FAILED]
    events = [_failure(s.claim.intent, s.answer.code or "refused", now) for s in failed]
    away = {
        s.claim.intent.event_name: s.answer.code or "no_meter"
        for s in ordered
        if s.answer.meaning is Meaning.METER_AWAY
    }
    return await _write_outbox(session, events + await _pause(session, away, now))


async def _pause(session: AsyncConnection, reasons: dict[str, str], now: datetime) -> list[OutboxRow]:
    if not reasons:
        return []
    cursor = await session.execute(PAUSE, pause_values(reasons, source=SOURCE, now=now))
    return paused_events(await cursor.fetchall(), source=SOURCE, now=now)


async def _give_back(session: AsyncConnection, amounts: Sequence[Returned]) -> None:
    if amounts:
        back = GiveBack(amounts)
        returned = [
            await (await session.execute(statement, back.values)).fetchall()
            for statement in GiveBack.STATEMENTS
        ]
        back.check(*returned)


async def _free_buckets(session: AsyncConnection, settled: Sequence[str]) -> None:
    """Let the counters close these buckets again. One delta of a bucket is open at a time, so two settled at
    once are as wrong as one that the bucket does not know of."""
    if settled:
        cursor = await session.execute(FREE_BUCKETS, (list(settled),))
        require(cursor.rowcount == len(settled), "an intent was settled whose bucket is missing or not open")


def _failure(intent: Intent, code: str, now: datetime) -> OutboxRow:
    return failure_event(intent.identifier, intent.tenant_id, intent.meter, code, source=SOURCE, now=now)


async def _write_outbox(session: AsyncConnection, rows: Sequence[OutboxRow]) -> int:
    if rows:
        await session.execute(OUTBOX_INSERT, outbox_values(rows))
    return len(rows)


# -- Doubts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    """What reading the sink led to. No verdict: the claim was not ours any more."""

    verdict: Verdict | None
    events: int


async def resolve(
    session: AsyncConnection,
    claim: Claim,
    shown: Shown | None,
    *,
    now: datetime,
    chance: float,
    policy: Policy,
) -> Resolved:
    """Settle a doubted intent by what the sink shows of its hour, or leave it in doubt.

    Inside one transaction: applied → reported; not applied → cancelled, with a replacement under another
    identifier, once; neither → in doubt, with one ops event after a while. While an intent is in doubt
    nothing else of its customer, meter and hour is sent, so every reported amount compared here is at least
    as old as the doubt.

    Raises:
        Broken: as :func:`settle`.
    """
    intent = claim.intent
    async with session.transaction():
        cursor = await session.execute(_STORED, (intent.identifier, claim.attempts))
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
                "amount": intent.amount,
            },
        )
        row = await cursor.fetchone()
        require(row is not None, "an aggregate without a row")
        reported, mistakable, others_doubted = row  # type: ignore[misc]
        verdict = judge(shown, reported=reported, amount=intent.amount, formula=intent.formula)
        # Summaries lag. Before it is time to ask they prove nothing of a value that the hour had before,
        # nor of a change that is undone by others they may not show yet.
        stale = claim.action is Action.LOOK and mistakable
        if (others_doubted or stale) and verdict is not Verdict.UNREADABLE:
            verdict = Verdict.UNCLEAR
        if verdict is Verdict.APPLIED:
            answer = Answer(Meaning.ALREADY_DELIVERED, "applied_by_summary")
            settlement = Settlement(claim, State.REPORTED, claim.doubted_since, now, answer)
            return Resolved(verdict, await _write(session, [settlement], now))
        if verdict is Verdict.NOT_APPLIED and claim.action is Action.ASK and intent.replaces is None:
            period_start, period_end, push_before = stored[1:]
            successor = replace(
                intent.replacement(),
                period_start=period_start,
                period_end=period_end,
                push_before=push_before,
            )
            await _replace(session, claim, successor, now, policy)
            return Resolved(verdict, 0)
        stuck = is_stuck(claim, verdict, now, policy)
        code = UNCLEAR if stuck else claim.error_code
        since = claim.doubted_since
        turn = policy.turn_after(now, attempts=claim.attempts, chance=chance, doubted_since=since)
        answer = Answer(Meaning.UNKNOWN, code)
        await _write(session, [Settlement(claim, State.IN_DOUBT, since, turn, answer)], now)
        told = [_failure(intent, UNCLEAR, now)] if stuck and stored[0] != UNCLEAR else []
        return Resolved(verdict, await _write_outbox(session, told))


async def _replace(
    session: AsyncConnection, claim: Claim, successor: Intent, now: datetime, policy: Policy
) -> None:
    """The old identifier is never sent again; the delta stays open under the new one."""
    cursor = await session.execute(_CANCEL, (now, claim.intent.identifier, claim.attempts))
    if cursor.rowcount == 1:
        cursor = await session.execute(INSERT_INTENTS, intent_values([successor], policy))
        require(cursor.rowcount == 1, "an intent was replaced twice")


def is_stuck(claim: Claim, verdict: Verdict, now: datetime, policy: Policy) -> bool:
    """Whether to tell an operator: at once when totals differ, after a while when they are unreadable."""
    if claim.action is not Action.ASK or claim.doubted_since is None:
        return False
    unreadable_for = now - claim.doubted_since - policy.ask_after
    return verdict is not Verdict.UNREADABLE or unreadable_for >= policy.unclear_after


# -- Health ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """What the journal holds that is not settled. Failed intents are those that were not retried."""

    #: By state, for every state that is counted.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: Since when the oldest intent of a state waits: it was recorded then; of failed ones, it failed then.
    oldest: Mapping[str, datetime] = field(default_factory=dict)
    #: When the first intent in doubt is no longer resent, or misses its invoice.
    deadline: datetime | None = None

    @property
    def oldest_open(self) -> datetime | None:
        """When the oldest open intent was recorded."""
        return min((since for state, since in self.oldest.items() if state in OPEN), default=None)


async def standing(session: AsyncConnection, policy: Policy) -> Standing:
    """Count what is not settled, and how long it waits."""
    rows = await (await session.execute(_COUNTS, (policy.resend_for,))).fetchall()
    found = {str(state): 0 for state in (*OPEN, State.FAILED)}
    return Standing(
        found | {row[0]: row[1] for row in rows},
        {row[0]: row[2] for row in rows if row[2] is not None},
        next((row[3] for row in rows if row[3] is not None), None),
    )
