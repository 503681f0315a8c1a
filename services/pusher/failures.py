"""Intents that failed for good: what error reports say of accepted ones, and sending failed ones again.

Each function works inside the caller's transaction and commits nothing itself. ``failed`` is terminal: what
an operator retries goes back to its bucket and leaves in a later delta. That is a new intent with an
identifier of its own, which the failed row names, and with the mapping, scale and period of that moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from services.pusher.giving_back import GiveBack, Returned
from services.pusher.intents import METER_AWAY_CODES
from services.pusher.journal import Connection
from services.pusher.ops import OUTBOX_INSERT, PRODUCER, failure_event, outbox_values
from services.pusher.pausing import PAUSE, pause_values, paused_events

_FAIL_REPORTED = """
    WITH named AS (
        SELECT identifier, a.code FROM meter_events
        JOIN unnest(%s::text[], %s::text[]) AS a (identifier, code) USING (identifier)
        WHERE state = 'reported' ORDER BY identifier FOR UPDATE OF meter_events
    )
    UPDATE meter_events m SET state = 'failed', error_code = named.code, settled_at = %s
    FROM named WHERE m.identifier = named.identifier
    RETURNING m.identifier, m.tenant_id, m.meter, m.event_name, named.code
    """

_CHOSEN = """
    SELECT identifier FROM meter_events m
    WHERE state = 'failed' AND released_at IS NULL
        AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
        AND (%(meter)s::text IS NULL OR meter = %(meter)s)
        AND (%(code)s::text IS NULL OR error_code = %(code)s)
        AND (%(identifiers)s::text[] IS NULL OR identifier = ANY(%(identifiers)s))
    """

_RELEASE = f"""
    WITH chosen AS ({_CHOSEN} ORDER BY identifier LIMIT %(limit)s FOR UPDATE)
    UPDATE meter_events m SET released_at = %(now)s, released_sequence = 0
    FROM chosen WHERE m.identifier = chosen.identifier
    RETURNING m.identifier, m.item_id, m.hour_start, m.period_start, m.amount, m.formula
    """  # noqa: S608  constants only

#: The deltas of a bucket up to this one do not hold what was given back to it.
_RELEASED_AFTER = """
    UPDATE meter_events m SET released_sequence = b.sequence
    FROM buckets b
    WHERE m.identifier = ANY(%s)
        AND (b.item_id, b.hour_start, b.period_start) = (m.item_id, m.hour_start, m.period_start)
    """

RELEASED_AT_ONCE_MAX = 1000


def fail_reported(
    db: Connection, codes: Mapping[str, str], *, source: str, now: datetime, producer: str = PRODUCER
) -> list[str]:
    """Fail reported intents that the billing system rejected after accepting them; returns which.

    ``codes`` by identifier, as an error report names them. Each failure writes one ops event to the outbox of
    ``producer``, and happens once: an intent that is not ``reported`` is left alone. A meter that does not
    exist or is archived is paused.

    ``source`` is ``webhook`` or ``reconciler``.
    """
    names = sorted(codes)
    rows = db.execute(_FAIL_REPORTED, (names, [codes[name] for name in names], now)).fetchall()
    events = [
        failure_event(identifier, tenant, meter, code, source=source, now=now)
        for identifier, tenant, meter, _, code in rows
    ]
    away = {event_name: code for *_, event_name, code in rows if code in METER_AWAY_CODES}
    if away:
        paused = db.execute(PAUSE, pause_values(away, source=source, now=now)).fetchall()
        events += paused_events(paused, source=source, now=now)
    if events:
        db.execute(OUTBOX_INSERT, outbox_values(events, producer))
    return [row[0] for row in rows]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which failed intents; None does not restrict."""

    tenant: str | None = None
    meter: str | None = None
    code: str | None = None
    identifiers: Sequence[str] | None = None

    def values(self) -> dict[str, object]:
        """Parameters of the queries here."""
        identifiers = None if self.identifiers is None else list(self.identifiers)
        return {
            "tenant": self.tenant,
            "meter": self.meter,
            "code": self.code,
            "identifiers": identifiers,
        }


def count_failed(db: Connection, choice: Choice) -> tuple[int, Decimal]:
    """How many failed intents wait for an operator, and the sum of those that are changes."""
    row = db.execute(
        f"SELECT count(*), coalesce(sum(amount) FILTER (WHERE formula = 'sum'), 0) FROM meter_events "  # noqa: S608
        f"WHERE identifier IN ({_CHOSEN})",
        choice.values(),
    ).fetchone()
    return row if row is not None else (0, Decimal(0))


def release_failed(
    db: Connection, choice: Choice, *, now: datetime, limit: int = RELEASED_AT_ONCE_MAX
) -> list[str]:
    """Give the amounts of failed intents back to their buckets, to be closed again, once; returns which.

    The next closing makes new deltas of them, under new identifiers: in their own hours, or, where these are
    final or too old for Stripe, carried forward. Whether a bucket is open is not touched: a failed intent is
    settled.

    Raises:
        Broken: as :meth:`GiveBack.check`.
    """
    rows = db.execute(_RELEASE, {**choice.values(), "now": now, "limit": limit}).fetchall()
    if not rows:
        return []
    back = GiveBack([Returned(*row[1:]) for row in rows])
    back.check(*[db.execute(statement, back.values).fetchall() for statement in GiveBack.STATEMENTS])
    released = [row[0] for row in rows]
    db.execute(_RELEASED_AFTER, (released,))
    return released
