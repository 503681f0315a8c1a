"""What other transactions do with the intent journal: record new intents, fail and release settled ones.

Each function works inside the caller's transaction and commits nothing itself. Everyone locks rows in the
order meter events by identifier, items by id, buckets by (item, hour, period), item periods by (item,
period), so that no two can deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

import psycopg

from services.pusher.intents import Intent, Policy, intent_of
from services.wire.codec import Record
from services.wire.errors import Broken, require
from services.wire.records import OutboxRow, ops_event

Connection = psycopg.Connection[Any]

PRODUCER = "tidemeter-pusher"

#: Each field of an intent is a column.
INTENT_FIELDS = tuple(field.name for field in fields(Intent))
INTENT_COLUMNS = ", ".join(INTENT_FIELDS)

#: Also what a replacement is stored with. A row is due as soon as Stripe takes its timestamp.
INSERT_INTENTS = f"""
    INSERT INTO meter_events ({INTENT_COLUMNS}, next_attempt_at)
    SELECT *, a.event_at - %s FROM unnest(
        %s::text[], %s::uuid[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
        %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[], %s::numeric[],
        %s::timestamptz[], %s::text[], %s::jsonb[], %s::text[], %s::timestamptz[]
    ) AS a ({INTENT_COLUMNS})
    ON CONFLICT (identifier) DO NOTHING
    """  # noqa: S608  constants only

_CHANGED_SINCE = """
    SELECT count(*) FROM meter_events m
    JOIN unnest(%s::text[], %s::numeric[], %s::text[], %s::text[], %s::timestamptz[], %s::jsonb[], %s::text[])
        AS a (identifier, amount, stripe_customer, event_name, event_at, dimensions, formula)
        USING (identifier)
    WHERE (m.amount, m.stripe_customer, m.event_name, m.event_at, m.dimensions, m.formula)
        IS DISTINCT FROM (a.amount, a.stripe_customer, a.event_name, a.event_at, a.dimensions, a.formula)
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
        ORDER BY identifier FOR UPDATE
    )
    UPDATE meter_events m SET state = 'cancelled'
    FROM chosen WHERE m.identifier = chosen.identifier
    RETURNING m.item_id, m.hour_start, m.period_start, m.amount, m.formula
    """

_GIVEN = """
    unnest(
        %(items)s::uuid[], %(hours)s::timestamptz[], %(periods)s::timestamptz[], %(amounts)s::numeric[],
        %(formulas)s::text[]
    ) AS a (item_id, hour_start, period_start, amount, formula)
    """

_MARK_DIRTY = f"""
    WITH held AS (
        SELECT item_id, given.hour_start
        FROM items JOIN (SELECT item_id, min(hour_start) AS hour_start FROM {_GIVEN} GROUP BY item_id) given
            USING (item_id)
        ORDER BY item_id FOR UPDATE OF items
    )
    UPDATE items i SET dirty_from = least(i.dirty_from, held.hour_start)
    FROM held WHERE i.item_id = held.item_id
    RETURNING i.item_id
    """  # noqa: S608  constants only

#: A `last` or `max` bucket counts as never closed again. What a `last` bucket pushed was no change.
_GIVE_TO_BUCKETS = f"""
    WITH given AS (
        SELECT item_id, hour_start, period_start, bool_or(formula = 'last') AS is_last,
            coalesce(sum(amount) FILTER (WHERE formula = 'sum'), 0) AS amount
        FROM {_GIVEN} GROUP BY item_id, hour_start, period_start
    ), held AS (
        SELECT item_id, hour_start, period_start, given.amount, given.is_last,
            NOT given.is_last AND EXISTS (
                SELECT FROM items JOIN meters USING (tenant_id, meter)
                WHERE items.item_id = given.item_id AND aggregation = 'max') AS is_max
        FROM buckets JOIN given USING (item_id, hour_start, period_start)
        ORDER BY item_id, hour_start, period_start FOR UPDATE OF buckets
    )
    UPDATE buckets b SET
        closed = CASE WHEN held.is_last OR held.is_max THEN NULL ELSE b.closed - held.amount END,
        pushed = b.pushed - held.amount
    FROM held
    WHERE (b.item_id, b.hour_start, b.period_start) = (held.item_id, held.hour_start, held.period_start)
    RETURNING b.item_id, b.period_start, held.is_max
    """  # noqa: S608  constants only

#: `max`: no bucket's difference can hold a rise that was not billed; its period takes it for not closed.
_GIVE_TO_PERIODS = f"""
    WITH given AS (
        SELECT item_id, period_start, sum(amount) AS amount
        FROM {_GIVEN} JOIN items USING (item_id) JOIN meters USING (tenant_id, meter)
        WHERE aggregation = 'max' AND formula = 'sum' GROUP BY item_id, period_start
    ), held AS (
        SELECT item_id, period_start, given.amount FROM item_periods JOIN given USING (item_id, period_start)
        ORDER BY item_id, period_start FOR UPDATE OF item_periods
    )
    UPDATE item_periods p SET value = p.value - held.amount
    FROM held WHERE (p.item_id, p.period_start) = (held.item_id, held.period_start)
    RETURNING p.item_id
    """  # noqa: S608  constants only


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
        [_dimensions(i) for i in intents],
        [i.formula for i in intents],
        [i.push_before for i in intents],
    )


def _dimensions(intent: Intent) -> str:
    return json.dumps(dict(intent.dimensions))


def record_intents(db: Connection, deltas: Sequence[Record]) -> int:
    """Store an intent for each decoded ``usage_delta`` and return how many are new.

    A delta that is known, because its record was delivered again, changes nothing, whatever became of it.

    Raises:
        Broken: a known identifier comes with another amount, customer, meter, time, formula or dimension.
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
                [_dimensions(i) for i in intents],
                [i.formula for i in intents],
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

    The next closing makes new deltas of them, under new identifiers: in their own hours, or, where these are
    final or too old for Stripe, carried forward. Whether a bucket is open is not touched: a failed intent is
    settled.

    Raises:
        Broken: as :meth:`GiveBack.check`.
    """
    chosen = {
        "tenant": tenant,
        "meter": meter,
        "identifiers": list(identifiers) if identifiers is not None else None,
    }
    back = GiveBack([Returned(*row) for row in db.execute(_RELEASE, chosen).fetchall()])
    if back.amounts:
        back.check(*[db.execute(statement, back.values).fetchall() for statement in GiveBack.STATEMENTS])
    return len(back.amounts)


@dataclass(frozen=True, slots=True)
class Returned:
    """The amount of an intent that was cancelled, and where it came from."""

    item_id: UUID
    hour_start: datetime
    period_start: datetime
    amount: Decimal
    formula: str


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Gives amounts back to the counters, to be closed again or carried forward.

    The caller, with a connection of either kind, runs :data:`STATEMENTS` in their order with :attr:`values`,
    in the transaction that cancelled the intents, and has :meth:`check` read what they return.
    """

    STATEMENTS: ClassVar[tuple[str, ...]] = (_MARK_DIRTY, _GIVE_TO_BUCKETS, _GIVE_TO_PERIODS)
    amounts: Sequence[Returned]

    @property
    def values(self) -> dict[str, list[Any]]:
        """Parameters of each statement."""
        return {
            "items": [one.item_id for one in self.amounts],
            "hours": [one.hour_start for one in self.amounts],
            "periods": [one.period_start for one in self.amounts],
            "amounts": [one.amount for one in self.amounts],
            "formulas": [one.formula for one in self.amounts],
        }

    def check(self, items: Sequence[Any], buckets: Sequence[Any], carries: Sequence[Any]) -> None:
        """Every amount has arrived.

        Raises:
            Broken: an item, a bucket, or for a `max` meter an item period is missing.
        """
        places = {(one.item_id, one.hour_start, one.period_start) for one in self.amounts}
        peaks = {(item, period) for item, period, is_max in buckets if is_max}
        require(len(items) == len({item for item, _, _ in places}), "an amount has no item to go back to")
        require(len(buckets) == len(places), "an amount has no bucket to go back to")
        require(len(carries) == len(peaks), "an amount has no item period to go back to")


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
