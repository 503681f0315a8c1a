"""What other transactions do with the intent journal: record new intents, fail and release settled ones.

Each function works inside the caller's transaction and commits nothing itself. Rows are always locked in the
order intents, item periods, items, buckets, each by key, so that two of them cannot deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from services.pusher.intents import Intent, Policy, intent_of
from services.wire.codec import Record
from services.wire.errors import Broken
from services.wire.records import OutboxRow, ops_event

Connection = psycopg.Connection[Any]

PRODUCER = "tidemeter-pusher"
TOO_OLD = "too_old_for_stripe"

#: Columns of an intent, in the order of its fields.
INTENT_COLUMNS = (
    "identifier, item_id, tenant_id, meter, period_start, period_end, hour_start, event_name, "
    "stripe_customer, customer_payload_key, value_payload_key, amount, event_at, replaces"
)

#: Also what a replacement is stored with. A row is due as soon as Stripe takes its timestamp.
INSERT_INTENTS = f"""
    INSERT INTO meter_events ({INTENT_COLUMNS}, next_attempt_at)
    SELECT *, a.event_at - %s FROM unnest(
        %s::text[], %s::uuid[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
        %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[], %s::numeric[],
        %s::timestamptz[], %s::text[]
    ) AS a ({INTENT_COLUMNS})
    ON CONFLICT (identifier) DO NOTHING
    """  # noqa: S608  constants only

_CHANGED_SINCE = """
    SELECT count(*) FROM meter_events m
    JOIN unnest(%s::text[], %s::numeric[], %s::text[], %s::text[], %s::timestamptz[])
        AS a (identifier, amount, stripe_customer, event_name, event_at) USING (identifier)
    WHERE (m.amount, m.stripe_customer, m.event_name, m.event_at)
        IS DISTINCT FROM (a.amount, a.stripe_customer, a.event_name, a.event_at)
    """

_FAIL_REPORTED = """
    WITH named AS (
        SELECT identifier FROM meter_events WHERE identifier = ANY(%s) AND state = 'reported'
        ORDER BY identifier FOR UPDATE
    )
    UPDATE meter_events m SET state = 'failed', error_code = %s, settled_at = %s
    FROM named WHERE m.identifier = named.identifier
    RETURNING m.identifier, m.tenant_id, m.meter
    """

_RELEASE = """
    WITH chosen AS (
        SELECT identifier FROM meter_events
        WHERE state = 'failed' AND tenant_id = %(tenant)s
            AND (%(meter)s::text IS NULL OR meter = %(meter)s)
            AND (%(identifiers)s::text[] IS NULL OR identifier = ANY(%(identifiers)s))
            AND error_code IS DISTINCT FROM %(too_old)s
        ORDER BY identifier FOR UPDATE
    )
    UPDATE meter_events m SET state = 'cancelled'
    FROM chosen WHERE m.identifier = chosen.identifier
    RETURNING m.item_id, m.hour_start, m.period_start, m.amount
    """

_GIVE_TO_BUCKETS = """
    WITH given AS (
        SELECT item_id, hour_start, period_start, sum(amount) AS amount
        FROM unnest(%s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::numeric[])
            AS a (item_id, hour_start, period_start, amount)
        GROUP BY item_id, hour_start, period_start
    ), held AS (
        SELECT item_id, hour_start, period_start, given.amount
        FROM buckets JOIN given USING (item_id, hour_start, period_start)
        ORDER BY item_id, hour_start, period_start FOR UPDATE OF buckets
    )
    UPDATE buckets b SET closed = b.closed - held.amount, pushed = b.pushed - held.amount
    FROM held
    WHERE (b.item_id, b.hour_start, b.period_start) = (held.item_id, held.hour_start, held.period_start)
    """

_MARK_DIRTY = """
    WITH held AS (
        SELECT item_id, given.hour_start
        FROM items JOIN (
            SELECT item_id, min(hour_start) AS hour_start
            FROM unnest(%s::uuid[], %s::timestamptz[]) AS a (item_id, hour_start) GROUP BY item_id
        ) given USING (item_id)
        ORDER BY item_id FOR UPDATE OF items
    )
    UPDATE items i SET dirty_from = least(i.dirty_from, held.hour_start)
    FROM held WHERE i.item_id = held.item_id
    """


def intent_values(intents: Sequence[Intent], policy: Policy) -> tuple[Any, ...]:
    """Parameters of :data:`INSERT_INTENTS`."""
    return (
        policy.future_max,
        [i.identifier for i in intents],
        [i.item_id for i in intents],
        [i.tenant_id for i in intents],
        [i.meter for i in intents],
        [i.period_start for i in intents],
        [i.period_end for i in intents],
        [i.hour_start for i in intents],
        [i.event_name for i in intents],
        [i.stripe_customer for i in intents],
        [i.customer_payload_key for i in intents],
        [i.value_payload_key for i in intents],
        [i.amount for i in intents],
        [i.event_at for i in intents],
        [i.replaces for i in intents],
    )


def record_intents(db: Connection, deltas: Sequence[Record]) -> int:
    """Store an intent for each decoded ``usage_delta`` and return how many are new.

    A delta that is known, because its record was delivered again, changes nothing, whatever became of it.

    Raises:
        Broken: a known identifier comes with another amount, customer, meter or time.
    """
    if not deltas:
        return 0
    intents = [intent_of(delta) for delta in deltas]
    new = db.execute(INSERT_INTENTS, intent_values(intents, Policy())).rowcount
    if new < len(intents):
        changed = db.execute(
            _CHANGED_SINCE,
            (
                [i.identifier for i in intents],
                [i.amount for i in intents],
                [i.stripe_customer for i in intents],
                [i.event_name for i in intents],
                [i.event_at for i in intents],
            ),
        ).fetchone()
        if changed is None or changed[0]:
            raise Broken("a delta came again with other content; its identifier cannot be sent for both")
    return new


def fail_reported(
    db: Connection,
    identifiers: Sequence[str],
    *,
    code: str,
    source: str,
    now: datetime,
    producer: str = PRODUCER,
) -> list[str]:
    """Fail reported intents that the billing system rejected after accepting them; returns which.

    Each failure writes one ops event to the outbox of ``producer``, and happens once: an intent that is not
    ``reported`` is left alone.
    """
    rows = db.execute(_FAIL_REPORTED, (list(identifiers), code, now)).fetchall()
    events = [failure_event(row[0], row[1], row[2], code, source=source, now=now) for row in rows]
    if events:
        db.execute(OUTBOX_INSERT, outbox_values(events, producer))
    return [row[0] for row in rows]


def release_failed(
    db: Connection, tenant: str, meter: str | None = None, identifiers: Sequence[str] | None = None
) -> int:
    """Give the amounts of failed intents back to their buckets, to be closed again; returns how many.

    The next closing makes a new delta of them, under a new identifier. Usage that is too old for Stripe is
    not released: it becomes an adjustment instead.

    Raises:
        Broken: a bucket or an item of a failed intent is missing.
    """
    chosen = {
        "tenant": tenant,
        "meter": meter,
        "identifiers": list(identifiers) if identifiers is not None else None,
        "too_old": TOO_OLD,
    }
    rows = db.execute(_RELEASE, chosen).fetchall()
    if not rows:
        return 0
    items, hours, periods, amounts = ([row[column] for row in rows] for column in range(4))
    # Items before buckets, as the counters lock them.
    dirty = db.execute(_MARK_DIRTY, (items, hours)).rowcount
    buckets = db.execute(_GIVE_TO_BUCKETS, (items, hours, periods, amounts)).rowcount
    if buckets != len(set(zip(items, hours, periods, strict=True))) or dirty != len(set(items)):
        raise Broken("a failed intent has no bucket or no item to give its amount back to")
    return len(rows)


def failure_event(
    identifier: str, tenant: str, meter: str, code: str, *, source: str, now: datetime
) -> OutboxRow:
    """``meter_reporting_failed`` for one intent: the same one however often it is written."""
    return ops_event(
        "meter_reporting_failed",
        subject_type="meter_event",
        subject_id=identifier,
        source=source,
        at_us=int((now - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)),
        attributes={"reason": code, "tenant_id": tenant, "meter": meter},
    )


OUTBOX_INSERT = """
    INSERT INTO outbox (producer, topic, key, value, headers)
    SELECT %s, * FROM unnest(%s::text[], %s::bytea[], %s::bytea[], %s::jsonb[])
    """


def outbox_values(rows: Sequence[OutboxRow], producer: str) -> tuple[Any, ...]:
    """Parameters of :data:`OUTBOX_INSERT`."""
    return (
        producer,
        [row.topic for row in rows],
        [row.key for row in rows],
        [row.value for row in rows],
        [json.dumps(dict(row.headers)) for row in rows],
    )
