"""What the pusher tells operators: ops events, written to the outbox in the transaction that is told of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.wire import groups
from services.wire.records import OutboxRow, ops_event
from services.wire.times import micros

PRODUCER = groups.PUSHER

OUTBOX_INSERT = """
    INSERT INTO outbox (producer, topic, key, value, headers)
    SELECT %s, * FROM unnest(%s::text[], %s::bytea[], %s::bytea[], %s::jsonb[])
    """


def outbox_values(rows: Sequence[OutboxRow], producer: str = PRODUCER) -> tuple[Any, ...]:
    """Parameters of :data:`OUTBOX_INSERT`."""
    return (
        producer,
        [row.topic for row in rows],
        [row.key for row in rows],
        [row.value for row in rows],
        [json.dumps(dict(row.headers)) for row in rows],
    )


def failure_event(
    identifier: str, tenant: str, meter: str, code: str, *, source: str, now: datetime
) -> OutboxRow:
    """``meter_reporting_failed`` for one intent: the same one however often it is written."""
    return ops_event(
        "meter_reporting_failed",
        subject_type="meter_event",
        subject_id=identifier,
        source=source,
        at_us=micros(now),
        attributes={"reason": code, "tenant_id": tenant, "meter": meter},
    )


def meter_event(name: str, event_name: str, reason: str, *, source: str, now: datetime) -> OutboxRow:
    """``meter_paused`` or ``meter_resumed``. A meter can be paused again, so the moment is part of it."""
    return ops_event(
        name,
        subject_type="stripe_meter",
        subject_id=f"{event_name}/{micros(now)}",
        source=source,
        at_us=micros(now),
        attributes={"event_name": event_name, "reason": reason},
    )
