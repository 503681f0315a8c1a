"""What closing and pushing keep of an hour, against the journal of what was sent.

The log tells what was used. What was sent of it stands in ``deltas`` and ``meter_events``, the journal;
``pushed``, ``closed``, ``sequence`` and ``open`` of a bucket, and the carry of a period, are kept so that
closing need not ask it. A damaged one bills too much or too little, or uses an identifier twice; so a replay
checks them in the periods that it touches.

For each period: closed + carried in - carried out - pushed = carry; for ``max`` the value that was closed
takes the place of closed. What a ``last`` meter closed and pushed is no sum, and is left alone.
"""

from __future__ import annotations

from typing import Any, LiteralString

from services.counters.calendars import reckon_periods
from services.replay.recompute import Connection
from services.wire.periods import Calendar

TABLES: LiteralString = """
CREATE TEMP TABLE IF NOT EXISTS replay_books (
    item_id uuid, period_start timestamptz, aggregation text, pushed numeric, sent numeric,
    PRIMARY KEY (item_id, period_start));
CREATE TEMP TABLE IF NOT EXISTS replay_held (
    item_id uuid, period_start timestamptz, PRIMARY KEY (item_id, period_start));
CREATE TEMP TABLE IF NOT EXISTS replay_sent (
    item_id uuid, period_start timestamptz, hour_start timestamptz,
    sent numeric, sequence int, under_way boolean,
    PRIMARY KEY (item_id, period_start, hour_start));
"""

#: What was sent of each hour of the periods ``touched``: amount, newest delta, and whether one is under
#: way.
_SENT: LiteralString = """
sent AS (
    SELECT item_id, period_start, hour_start, sum(amount) AS amount, max(sequence) AS sequence,
           bool_or(under_way) AS under_way
    FROM (
        SELECT item_id, period_start, hour_start,
               CASE WHEN state = 'cancelled' OR released_at IS NOT NULL OR formula = 'last' THEN 0
                   ELSE amount END AS amount,
               0 AS sequence, state IN ('pending', 'in_flight', 'in_doubt') AS under_way
        FROM meter_events JOIN touched USING (item_id, period_start)
        UNION ALL
        SELECT d.item_id, d.period_start, d.hour_start,
               CASE WHEN e.identifier IS NOT NULL OR m.aggregation = 'last' THEN 0 ELSE d.amount END,
               d.sequence, e.identifier IS NULL
        FROM deltas d JOIN touched USING (item_id, period_start) JOIN items i USING (item_id)
        JOIN meters m USING (tenant_id, meter) LEFT JOIN meter_events e USING (identifier)) AS every
    GROUP BY item_id, period_start, hour_start
)
"""

#: In one statement, for closing and pushing go on: the periods of which an hour of the window was counted, or
#: sent, and where what is kept of them is not what was sent.
_COMPARE: LiteralString = """
WITH touched AS MATERIALIZED (
    SELECT b.item_id, b.period_start FROM buckets b JOIN items i USING (item_id) WHERE {scope} AND {buckets}
    UNION
    SELECT d.item_id, d.period_start FROM deltas d JOIN items i USING (item_id) WHERE {scope} AND {deltas}
), {sent}, carried AS (
    SELECT item_id, period_start, sum(amount) AS amount FROM (
        SELECT item_id, to_period AS period_start, amount FROM carry_forwards
        UNION ALL SELECT item_id, period_start, -amount FROM carry_forwards) AS both_ways
    GROUP BY item_id, period_start
), hours AS (
    SELECT coalesce(b.item_id, s.item_id) AS item_id,
           coalesce(b.period_start, s.period_start) AS period_start,
           b.closed, coalesce(b.pushed, 0) AS pushed, coalesce(s.amount, 0) AS sent,
           coalesce(b.sequence, 0) < coalesce(s.sequence, 0)
               OR coalesce(b.open, false) <> coalesce(s.under_way, false) AS differs
    FROM (SELECT b.* FROM buckets b JOIN touched USING (item_id, period_start)) b
    FULL JOIN sent s ON (b.item_id, b.hour_start, b.period_start) = (s.item_id, s.hour_start, s.period_start)
), periods AS (
    SELECT h.item_id, h.period_start, m.aggregation, sum(coalesce(h.closed, 0)) AS closed,
           sum(h.pushed) AS pushed, sum(h.sent) AS sent,
           bool_or(h.differs OR (m.aggregation <> 'last' AND h.pushed <> h.sent)) AS differs
    FROM hours h JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter)
    GROUP BY h.item_id, h.period_start, m.aggregation
)
INSERT INTO replay_books
SELECT p.item_id, p.period_start, p.aggregation, trim_scale(p.pushed), trim_scale(p.sent)
FROM periods p LEFT JOIN item_periods k USING (item_id, period_start)
LEFT JOIN carried c USING (item_id, period_start)
WHERE p.differs OR (p.aggregation <> 'last' AND
    CASE WHEN p.aggregation = 'max' THEN coalesce(k.value, 0) ELSE p.closed END
    + coalesce(c.amount, 0) - p.sent <> coalesce(k.carry, 0))
"""

_FILL: LiteralString = """
WITH touched AS MATERIALIZED (SELECT item_id, period_start FROM replay_books), {sent}
INSERT INTO replay_sent
SELECT item_id, period_start, hour_start, sum(amount), max(sequence), bool_or(under_way)
FROM (SELECT * FROM sent UNION ALL
      SELECT b.item_id, b.period_start, b.hour_start, 0, 0, false
      FROM buckets b JOIN touched USING (item_id, period_start)) AS hours
GROUP BY item_id, period_start, hour_start
"""

_CORRECT: tuple[LiteralString, ...] = (
    "INSERT INTO buckets (item_id, hour_start, period_start, total, events, late_events, first_event, "
    "last_event, first_arrival, last_arrival) SELECT s.item_id, s.hour_start, s.period_start, 0, 0, 0, "
    "s.hour_start + interval '1 hour' - interval '1 microsecond', s.hour_start, now(), now() "
    "FROM replay_sent s JOIN replay_books USING (item_id, period_start) ON CONFLICT DO NOTHING",
    "UPDATE buckets b SET pushed = CASE WHEN p.aggregation = 'last' THEN b.pushed ELSE s.sent END, "
    "sequence = greatest(b.sequence, s.sequence), open = s.under_way "
    "FROM replay_sent s JOIN replay_books p USING (item_id, period_start) "
    "WHERE (b.item_id, b.hour_start, b.period_start) = (s.item_id, s.hour_start, s.period_start)",
)

_DIRTY: LiteralString = """
UPDATE items i SET dirty_from = least(i.dirty_from, c.h)
FROM (SELECT b.item_id, min(b.hour_start) AS h FROM buckets b JOIN replay_books USING (item_id)
      WHERE b.closed IS DISTINCT FROM b.total GROUP BY b.item_id) c WHERE c.item_id = i.item_id
"""


def compare_books(
    db: Connection, values: dict[str, Any], *, scope: LiteralString, window: LiteralString
) -> None:
    """Find the periods of which what is kept is not what was sent."""
    db.execute("DELETE FROM replay_books")
    parts = {"scope": scope, "buckets": window.format("b"), "deltas": window.format("d"), "sent": _SENT}
    db.execute(_COMPARE.format(**parts), values)


def lock_books(db: Connection) -> None:
    """Lock the hours of all periods that differ, whose items are locked: settling a delta must not change
    them now. Then compare again, and :func:`keep_only_locked`."""
    db.execute("DELETE FROM replay_held")
    db.execute(
        "INSERT INTO replay_held SELECT item_id, period_start FROM replay_books "
        "UNION SELECT item_id, period_start FROM replay_changes"
    )
    db.execute(
        "SELECT FROM buckets b JOIN replay_held USING (item_id, period_start) "
        "ORDER BY b.item_id, b.hour_start, b.period_start FOR UPDATE OF b"
    )


def keep_only_locked(db: Connection) -> None:
    """Leave out what changed only since it was compared first."""
    db.execute(
        "DELETE FROM replay_books p WHERE NOT EXISTS (SELECT FROM replay_held h "
        "WHERE (h.item_id, h.period_start) = (p.item_id, p.period_start))"
    )


def correct_books(db: Connection) -> None:
    """Keep what was sent, and reckon what is owed anew; items and hours are locked."""
    db.execute("DELETE FROM replay_sent")
    db.execute(_FILL.format(sent=_SENT))
    for statement in _CORRECT:
        db.execute(statement)
    rows = db.execute(
        "SELECT p.item_id, p.aggregation, i.calendar, array_agg(p.period_start ORDER BY p.period_start) "
        "FROM replay_books p JOIN items i USING (item_id) GROUP BY 1, 2, 3 ORDER BY 1"
    ).fetchall()
    for item_id, aggregation, calendar, periods in rows:
        reckon_periods(db, item_id, aggregation, Calendar.parse(calendar), periods)
    db.execute(_DIRTY)
