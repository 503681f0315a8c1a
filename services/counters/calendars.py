"""Move items to other billing periods when their customer's calendar arrives late, or changes.

A change is noted by the database in the transaction that causes it (``calendar_changes``). It is carried out
item by item, under the item's lock, once nothing of the item is under way to Stripe: until then the item goes
on counting in its old periods. Hours that end up in another period take their values along; what closing kept
is reckoned anew for every period concerned, so that what was pushed and what is counted still meet.

A bucket with events on both sides of a new edge cannot be cut without the events themselves: it goes to the
period of its first event, and is counted as straddling, for a replay of that hour to put right. Hours that
Stripe takes no more, and the periods before them, stay as they were billed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, LiteralString

import psycopg

from services.counters.config import TENANT_CALENDAR
from services.counters.decisions import hold_beside_the_log
from services.counters.ledger import GROUP
from services.counters.windows import OLDEST_US
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.wire.periods import Calendar, hour_start
from services.wire.records import ops_event
from services.wire.times import instant, micros

ITEMS_PER_ROUND = 200

Connection = psycopg.Connection[Any]

#: A chunk that was running when the change was committed may make an item under the old calendar. So a
#: change is first seen, which is after its commit, and carried out once everything that ran then has ended.
_SEE: LiteralString = (
    "UPDATE calendar_changes SET not_before = pg_current_xact_id() "
    "WHERE done_at IS NULL AND not_before IS NULL"
)

#: Those tried least lately come first.
_NEXT_CHANGE: LiteralString = """
SELECT change_id, tenant_id, customer_ref FROM calendar_changes
WHERE done_at IS NULL AND (tried_at IS NULL OR tried_at < %s)
  AND not_before <= pg_snapshot_xmin(pg_current_snapshot())
ORDER BY tried_at NULLS FIRST, change_id LIMIT 1 FOR UPDATE SKIP LOCKED
"""

_BEHIND: LiteralString = (
    "FROM meters m JOIN tenants t USING (tenant_id) "
    "JOIN items i ON i.tenant_id = m.tenant_id AND i.meter = m.meter "
    "AND (%(customer)s::text IS NULL OR i.customer_ref = %(customer)s) "
    "LEFT JOIN customers c ON c.tenant_id = i.tenant_id AND c.customer_ref = i.customer_ref "
    "WHERE m.tenant_id = %(tenant)s AND i.calendar <> coalesce(c.calendar, " + TENANT_CALENDAR + ")"
)
_MOVABLE: LiteralString = (
    "SELECT i.item_id, m.aggregation, coalesce(c.calendar, "  # noqa: S608
    + TENANT_CALENDAR
    + ") "
    + _BEHIND
    + " AND NOT EXISTS (SELECT FROM buckets b WHERE b.item_id = i.item_id AND b.open) "
    "ORDER BY i.item_id LIMIT %(limit)s FOR UPDATE OF i"
)
_LEFT: LiteralString = "SELECT EXISTS (SELECT " + _BEHIND + ")"  # noqa: S608
_OPEN: LiteralString = "SELECT DISTINCT item_id FROM buckets WHERE item_id = ANY(%s) AND open"

#: A bucket ``b`` that holds more than what a bucket leaves behind when it moves. One that only took what was
#: carried may hold nothing else any more: its push was given back, or its fraction was never sent.
_HOLDS: LiteralString = """
(b.events > 0 OR b.pushed <> 0 OR b.closed IS DISTINCT FROM 0 OR EXISTS (
    SELECT FROM carry_forwards c WHERE c.item_id = b.item_id AND (
        (c.hour_start, c.period_start) = (b.hour_start, b.period_start)
        OR (c.to_hour, c.to_period) = (b.hour_start, b.period_start))))
"""


@dataclass(frozen=True, slots=True)
class Move:
    """One bucket and the period it belongs to from now on."""

    hour: datetime
    old: datetime
    new: datetime
    new_end: datetime


def carry_out_changes(db: Connection, now_us: int | None = None, *, seconds_max: float = 1.0) -> int:
    """Try every open change once, for about a second at most; returns how many items moved.

    Up to 200 items move in one transaction. Items with a delta under way to Stripe are left for a later call;
    a change stays open until none is left.
    """
    began, moved = datetime.now(UTC), 0
    deadline = time.monotonic() + seconds_max
    db.execute(_SEE)
    while time.monotonic() < deadline:
        found = _carry_out_next(db, began, now_us if now_us is not None else time.time_ns() // 1000)
        if found is None:
            break
        moved += found
    return moved


def _carry_out_next(db: Connection, began: datetime, now_us: int) -> int | None:
    """One round of the change tried least lately; None when every change was tried since ``began``."""
    with db.transaction():
        hold_beside_the_log(db)
        change = db.execute(_NEXT_CHANGE, (began,)).fetchone()
        if change is None:
            return None
        change_id, tenant_id, customer_ref = change
        whose = {"tenant": tenant_id, "customer": customer_ref, "limit": ITEMS_PER_ROUND}
        rows = db.execute(_MOVABLE, whose).fetchall()
        # Asked again, now that the items are locked: a delta may have been closed while we waited for that.
        busy = {row[0] for row in db.execute(_OPEN, ([row[0] for row in rows],)).fetchall()}
        moved = buckets = straddling = 0
        for item_id, aggregation, calendar in rows:
            if item_id not in busy:
                number, cut = _move_item(db, item_id, aggregation, calendar, now_us)
                moved, buckets, straddling = moved + 1, buckets + number, straddling + cut
        more = len(rows) == ITEMS_PER_ROUND
        left = more or bool((db.execute(_LEFT, whose).fetchone() or (False,))[0])
        totals = db.execute(
            "UPDATE calendar_changes SET items = items + %s, buckets = buckets + %s, "
            "straddling = straddling + %s, tried_at = CASE WHEN %s THEN tried_at ELSE clock_timestamp() END, "
            "done_at = CASE WHEN %s THEN NULL ELSE now() END WHERE change_id = %s "
            "RETURNING items, buckets, straddling",
            (moved, buckets, straddling, more, left, change_id),
        ).fetchone()
        if not left and totals is not None:
            attributes = dict(zip(("items", "buckets", "straddling"), map(str, totals), strict=True))
            event = ops_event(
                "billing_periods_changed",
                subject_type="calendar_change",
                subject_id=str(change_id),
                source="counters",
                at_us=now_us,
                attributes={"tenant": tenant_id, **attributes},
            )
            enqueue(db, GROUP, [event])
        fault_point("calendar.before_commit")
    fault_point("calendar.after_commit")
    return moved


def _move_item(db: Connection, item_id: Any, aggregation: str, text: str, now_us: int) -> tuple[int, int]:
    """Move one locked item to the calendar ``text``; returns how many buckets moved, and how many straddle
    an edge."""
    calendar = Calendar.parse(text)
    since = instant(hour_start(calendar.period_start(now_us - OLDEST_US)))
    rows = db.execute(
        "SELECT hour_start, period_start, first_event, last_event, events FROM buckets b "  # noqa: S608
        f"WHERE item_id = %s AND hour_start >= %s AND {_HOLDS} ORDER BY hour_start, period_start FOR UPDATE",
        (item_id, since),
    ).fetchall()
    moves, straddling = [], 0
    for hour, old, first_event, last_event, events in rows:
        # Without events an hour holds what was carried into it, at its beginning.
        start, end = calendar.bounds(micros(first_event if events else max(hour, old)))
        straddling += events > 0 and micros(last_event) >= end
        if instant(start) != old:
            moves.append(Move(hour, old, instant(start), instant(end)))
    if moves:
        _move_buckets(db, item_id, aggregation, moves)
        periods = sorted({move.old for move in moves} | {move.new for move in moves})
        if aggregation == "unique":
            _move_values(db, item_id, moves, periods)
        reckon_periods(db, item_id, aggregation, calendar, periods)
    db.execute(
        "UPDATE items SET calendar = %s, dirty_from = least(dirty_from, (SELECT min(hour_start) "
        "FROM buckets b WHERE b.item_id = items.item_id AND b.closed IS DISTINCT FROM b.total)) "
        "WHERE item_id = %s",
        (text, item_id),
    )
    return len(moves), straddling


_KEPT = (
    "hour_start, total, events, late_events, closed, pushed, first_arrival, last_arrival, first_event, "
    "last_event, last_key"
)

#: Two buckets of one hour become one. A `last` hour is closed anew when its value is not what was sent.
_LATER = "(excluded.last_event, excluded.last_key) > (b.last_event, b.last_key)"
_TOTALS = {
    "max": "greatest(b.total, excluded.total)",
    "last": f"CASE WHEN {_LATER} THEN excluded.total ELSE b.total END",
}
_JOINED = {
    "last": f"closed = NULL, pushed = CASE WHEN {_LATER} THEN excluded.pushed ELSE b.pushed END, "
    f"last_key = CASE WHEN {_LATER} THEN excluded.last_key ELSE b.last_key END",
}


def _move_buckets(db: Connection, item_id: Any, aggregation: str, moves: Sequence[Move]) -> None:
    """Give buckets their new period, and everything that names them by it."""
    columns = (
        item_id,
        [move.hour for move in moves],
        [move.old for move in moves],
        [move.new for move in moves],
        [move.new_end for move in moves],
    )
    taken = db.execute(
        "SELECT u.n, "  # noqa: S608
        + ", ".join("b." + name for name in _KEPT.split(", "))
        + " FROM unnest(%s::timestamptz[], %s::timestamptz[], %s::timestamptz[]) AS u (h, o, n) "
        "JOIN buckets b ON b.item_id = %s AND (b.hour_start, b.period_start) = (u.h, u.o)",
        (*columns[1:4], item_id),
    ).fetchall()
    db.execute(_EMPTY, columns[:3])
    total = _TOTALS.get(aggregation, "b.total + excluded.total")
    joined = _JOINED.get(
        aggregation, "closed = b.closed + excluded.closed, pushed = b.pushed + excluded.pushed"
    )
    db.cursor().executemany(
        f"INSERT INTO buckets AS b (item_id, period_start, {_KEPT}) "  # noqa: S608
        f"VALUES (%s, %s, {', '.join(['%s'] * len(_KEPT.split(', ')))}) "
        f"ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET total = {total}, {joined}, "
        f"events = b.events + excluded.events, late_events = b.late_events + excluded.late_events, "
        f"first_arrival = least(b.first_arrival, excluded.first_arrival), "
        f"last_arrival = greatest(b.last_arrival, excluded.last_arrival), "
        f"first_event = least(b.first_event, excluded.first_event), "
        f"last_event = greatest(b.last_event, excluded.last_event)",
        [(item_id, *row) for row in taken],
    )
    for statement in _FOLLOW:
        db.execute(statement, columns)


#: What a bucket leaves behind: its sequence, so that no identifier comes back if its hour does. The times are
#: the ends of the hour, so that the first event sets both.
_EMPTY: LiteralString = """
UPDATE buckets b SET total = 0, events = 0, late_events = 0, closed = 0, pushed = 0,
    first_event = b.hour_start + interval '1 hour' - interval '1 microsecond', last_event = b.hour_start,
    last_key = CASE WHEN last_key IS NOT NULL THEN '' END
FROM (SELECT %s::uuid AS i, m.* FROM unnest(%s::timestamptz[], %s::timestamptz[]) AS m (h, o)) AS u
WHERE (b.item_id, b.hour_start, b.period_start) = (u.i, u.h, u.o)
"""

#: The journal of what was pushed, and the record of what was carried, follow their hours.
_MOVES: LiteralString = (
    "(SELECT %s::uuid AS i, m.* FROM unnest(%s::timestamptz[], %s::timestamptz[], %s::timestamptz[], "
    "%s::timestamptz[]) AS m (h, o, n, e)) AS u"
)
_FOLLOW: tuple[LiteralString, ...] = (
    f"UPDATE meter_events m SET period_start = u.n, period_end = u.e FROM {_MOVES} "  # noqa: S608
    "WHERE m.item_id = u.i AND m.period_start = u.o AND m.hour_start = u.h",
    f"UPDATE carry_forwards c SET period_start = u.n FROM {_MOVES} "  # noqa: S608
    "WHERE c.item_id = u.i AND c.period_start = u.o AND c.hour_start = u.h",
    f"UPDATE carry_forwards c SET to_period = u.n FROM {_MOVES} "  # noqa: S608
    "WHERE c.item_id = u.i AND c.to_period = u.o AND c.to_hour = u.h",
)


def _move_values(db: Connection, item_id: Any, moves: Sequence[Move], periods: Sequence[datetime]) -> None:
    """Move the distinct values of a ``unique`` item, and count each again in its earliest hour."""
    db.execute(
        "WITH u AS (SELECT * FROM unnest(%s::timestamptz[], %s::timestamptz[], %s::timestamptz[]) "
        "AS u (h, o, n)), taken AS (DELETE FROM unique_values v USING u WHERE v.item_id = %s "
        "AND (v.hour_start, v.period_start) = (u.h, u.o) RETURNING u.n, v.value, v.hour_start) "
        "INSERT INTO unique_values (item_id, period_start, value, hour_start) SELECT %s, * FROM taken "
        "ON CONFLICT DO NOTHING",
        (
            [move.hour for move in moves],
            [move.old for move in moves],
            [move.new for move in moves],
            item_id,
            item_id,
        ),
    )
    db.execute(
        "UPDATE buckets b SET total = coalesce(f.n, 0) FROM buckets x LEFT JOIN ("
        "SELECT period_start, h, count(*) AS n FROM (SELECT period_start, value, min(hour_start) AS h "
        "FROM unique_values WHERE item_id = %(item)s AND period_start = ANY(%(periods)s) "
        "GROUP BY period_start, value) AS earliest GROUP BY period_start, h) AS f "
        "ON f.period_start = x.period_start AND f.h = x.hour_start "
        "WHERE x.item_id = %(item)s AND x.period_start = ANY(%(periods)s) "
        "AND (b.item_id, b.hour_start, b.period_start) = (x.item_id, x.hour_start, x.period_start)",
        {"item": item_id, "periods": list(periods)},
    )


def reckon_periods(
    db: Connection, item_id: Any, aggregation: str, calendar: Calendar, periods: Sequence[datetime]
) -> None:
    """Put what closing kept of these periods together again, from their hours and what was carried.

    For a period, closed + carried in - carried out - pushed is what was closed but not sent: the carry. It is
    given back to the period's last hour, or for ``max`` taken off the value that was closed, so that the next
    round decides about it with everything else.
    """
    if aggregation == "last":
        return
    for period in periods:
        row = db.execute(_OWED, {"item": item_id, "period": period}).fetchone()
        closed, pushed, carried, last_hour = row or (0, 0, 0, None)
        value = 0
        if last_hour is not None and aggregation == "max":
            value = pushed - carried
            db.execute(
                f"UPDATE buckets b SET closed = NULL WHERE item_id = %s AND period_start = %s AND {_HOLDS}",  # noqa: S608
                (item_id, period),
            )
        elif last_hour is not None:
            db.execute(
                "UPDATE buckets SET closed = closed - %s "
                "WHERE item_id = %s AND period_start = %s AND hour_start = %s",
                (closed + carried - pushed, item_id, period, last_hour),
            )
        end = instant(calendar.period_end(micros(period)))
        db.execute(
            "INSERT INTO item_periods (item_id, period_start, period_end, carry, value) "
            "VALUES (%s, %s, %s, 0, %s) "
            "ON CONFLICT (item_id, period_start) DO UPDATE SET carry = 0, value = excluded.value",
            (item_id, period, end, value),
        )
    db.execute(
        "DELETE FROM item_periods p WHERE item_id = %s AND period_start = ANY(%s) "  # noqa: S608
        "AND NOT EXISTS (SELECT FROM buckets b "
        f"WHERE b.item_id = p.item_id AND b.period_start = p.period_start AND {_HOLDS})",
        (item_id, list(periods)),
    )


_OWED: LiteralString = f"""
SELECT sum(coalesce(closed, 0)), sum(pushed),
       coalesce((SELECT sum(amount) FROM carry_forwards
                 WHERE item_id = %(item)s AND to_period = %(period)s), 0)
       - coalesce((SELECT sum(amount) FROM carry_forwards
                   WHERE item_id = %(item)s AND period_start = %(period)s), 0),
       max(hour_start)
FROM buckets b WHERE item_id = %(item)s AND period_start = %(period)s AND {_HOLDS}
"""  # noqa: S608  constants only
