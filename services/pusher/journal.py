"""Record new intents in the journal, in the caller's transaction.

Everyone who writes to the journal or gives amounts back locks rows in the order meter events by identifier,
items by id, buckets by (item, hour, period), item periods by (item, period), so that no two can deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import psycopg

from services.pusher.intents import Formula, Intent, Policy, intent_of
from services.wire.codec import Record
from services.wire.errors import Broken

Connection = psycopg.Connection[Any]

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

#: A failed intent whose amount went back to its bucket names the delta that holds it now.
_LINK_RETRIED = """
    UPDATE meter_events f SET retried_as = a.identifier
    FROM unnest(%s::text[], %s::uuid[], %s::timestamptz[], %s::timestamptz[], %s::int[])
        AS a (identifier, item_id, hour_start, period_start, sequence)
    WHERE (f.item_id, f.hour_start, f.period_start) = (a.item_id, a.hour_start, a.period_start)
        AND f.released_at IS NOT NULL AND f.retried_as IS NULL AND a.sequence > f.released_sequence
    """


#: Lets the counters close the buckets of settled intents again; parameters: their identifiers.
FREE_BUCKETS = """
    WITH settled AS (
        SELECT DISTINCT item_id, hour_start, period_start FROM meter_events WHERE identifier = ANY(%s)
    ), held AS (
        SELECT item_id, hour_start, period_start FROM buckets
        JOIN settled USING (item_id, hour_start, period_start)
        ORDER BY item_id, hour_start, period_start FOR UPDATE OF buckets
    )
    UPDATE buckets b SET open = false
    FROM held
    WHERE (b.item_id, b.hour_start, b.period_start) = (held.item_id, held.hour_start, held.period_start)
        AND b.open
    """


def stored_intent(row: Sequence[Any]) -> Intent:
    """The intent of a row of :data:`INTENT_COLUMNS`."""
    values = dict(zip(INTENT_FIELDS, row, strict=True))
    return Intent(**{**values, "item_id": values["item_id"].hex, "formula": Formula(values["formula"])})


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
    db.execute(
        _LINK_RETRIED,
        (
            [i.identifier for i in intents],
            [i.item_id for i in intents],
            [i.hour_start for i in intents],
            [i.period_start for i in intents],
            [delta["sequence"] for delta in deltas],
        ),
    )
    return new
