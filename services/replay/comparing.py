"""What was added up again against the counters: the differences, and putting them right.

Runs inside one transaction, in which the positions are known and nobody else changes what is compared: a
snapshot for a dry run, locks for an apply. The differences lie in temporary tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import namedtuple_row

from services.replay import books
from services.replay.recompute import Connection
from services.streaming.replays import Scope, bound

#: What a dry run needs besides, under the names of an apply's tables. A temporary table hides the other.
_DRY: LiteralString = """
CREATE TEMP TABLE replay_items (LIKE replay_items INCLUDING ALL);
CREATE TEMP TABLE replay_buckets (LIKE replay_buckets INCLUDING ALL);
CREATE TEMP TABLE replay_values (LIKE replay_values INCLUDING ALL);
"""

_DIFFERENCES: LiteralString = """
CREATE TEMP TABLE IF NOT EXISTS replay_changes (
    item_id uuid, hour_start timestamptz, period_start timestamptz, is_new boolean,
    before numeric, after numeric, events_before bigint, events_after bigint,
    first_event timestamptz, last_event timestamptz, last_key text COLLATE "C",
    PRIMARY KEY (item_id, hour_start, period_start));
CREATE TEMP TABLE IF NOT EXISTS replay_value_changes (
    item_id uuid, period_start timestamptz, value uuid, hour_start timestamptz, is_missing boolean,
    PRIMARY KEY (item_id, period_start, value, hour_start));
CREATE TEMP TABLE IF NOT EXISTS replay_watermarks (
    item_id uuid PRIMARY KEY, before timestamptz, after timestamptz);
CREATE TEMP TABLE IF NOT EXISTS replay_candidates (item_id uuid PRIMARY KEY);
CREATE TEMP TABLE IF NOT EXISTS replay_periods (
    item_id uuid, period_start timestamptz, PRIMARY KEY (item_id, period_start));
"""

#: With ``only``, of items that are among the candidates.
_IN_SCOPE: LiteralString = """
    (NOT %(only)s OR i.item_id IN (SELECT item_id FROM replay_candidates))
    AND (%(tenant)s::text IS NULL OR i.tenant_id = %(tenant)s)
    AND (%(meters)s::text[] IS NULL OR i.meter = ANY(%(meters)s))
    AND (%(customer)s::text IS NULL OR i.customer_ref = %(customer)s)
"""
_RECOUNTED: LiteralString = (
    "(SELECT * FROM {0} WHERE NOT %(only)s OR item_id IN (SELECT item_id FROM replay_candidates))"
)
_IN_WINDOW: LiteralString = "{0}.hour_start >= %(since)s AND {0}.hour_start < %(until)s"

#: The periods of `unique` meters that the window touches. A value counts in the earliest hour of its period,
#: so their other hours are compared as well.
_PERIODS: LiteralString = f"""
INSERT INTO replay_periods
SELECT i.item_id, b.period_start
FROM items i JOIN meters m USING (tenant_id, meter) JOIN buckets b USING (item_id)
WHERE m.aggregation = 'unique' AND {_IN_SCOPE} AND {_IN_WINDOW.format("b")}
UNION
SELECT r.item_id, r.period_start FROM {_RECOUNTED.format("replay_buckets")} r
JOIN replay_items i USING (item_id) JOIN meters m USING (tenant_id, meter) WHERE m.aggregation = 'unique'
"""  # noqa: S608  constants only

_OTHER_HOURS: LiteralString = f"""
INSERT INTO replay_buckets SELECT b.* FROM buckets b JOIN replay_periods p USING (item_id, period_start)
WHERE NOT ({_IN_WINDOW.format("b")}) ON CONFLICT DO NOTHING
"""  # noqa: S608  constants only

_DISTINCT: LiteralString = f"""
UPDATE replay_buckets r SET total = coalesce(f.n, 0)
FROM replay_buckets x JOIN replay_periods p USING (item_id, period_start) LEFT JOIN (
    SELECT item_id, period_start, h, count(*) AS n FROM (
        SELECT item_id, period_start, value, min(hour_start) AS h FROM (
            SELECT v.* FROM unique_values v JOIN replay_periods USING (item_id, period_start)
            WHERE NOT ({_IN_WINDOW.format("v")})
            UNION ALL SELECT item_id, period_start, value, hour_start FROM replay_values) AS every
        GROUP BY item_id, period_start, value) AS earliest
    GROUP BY item_id, period_start, h) AS f
ON (f.item_id, f.period_start, f.h) = (x.item_id, x.period_start, x.hour_start)
WHERE (r.item_id, r.hour_start, r.period_start) = (x.item_id, x.hour_start, x.period_start)
"""  # noqa: S608  constants only

_VALUE_CHANGES: LiteralString = f"""
INSERT INTO replay_value_changes
SELECT coalesce(v.item_id, r.item_id), coalesce(v.period_start, r.period_start), coalesce(v.value, r.value),
       coalesce(v.hour_start, r.hour_start), v.item_id IS NULL
FROM (SELECT v.* FROM unique_values v JOIN items i USING (item_id)
      WHERE {_IN_SCOPE} AND {_IN_WINDOW.format("v")}) v
FULL JOIN {_RECOUNTED.format("replay_values")} r ON (v.item_id, v.period_start, v.value, v.hour_start)
                           = (r.item_id, r.period_start, r.value, r.hour_start)
WHERE v.item_id IS NULL OR r.item_id IS NULL
"""  # noqa: S608  constants only

_CHANGES: LiteralString = f"""
INSERT INTO replay_changes
SELECT coalesce(a.item_id, r.item_id), coalesce(a.hour_start, r.hour_start),
       coalesce(a.period_start, r.period_start), a.item_id IS NULL,
       coalesce(trim_scale(a.total), 0), coalesce(trim_scale(r.total), 0),
       coalesce(a.events, 0), coalesce(r.events, 0),
       coalesce(r.first_event, a.hour_start + interval '1 hour' - interval '1 microsecond'),
       coalesce(r.last_event, a.hour_start),
       coalesce(r.last_key, CASE WHEN a.last_key IS NOT NULL THEN '' END)
FROM (SELECT b.* FROM buckets b JOIN items i USING (item_id)
      WHERE {_IN_SCOPE} AND ({_IN_WINDOW.format("b")} OR EXISTS (SELECT FROM replay_periods p WHERE
            (p.item_id, p.period_start) = (b.item_id, b.period_start)))) a
FULL JOIN {_RECOUNTED.format("replay_buckets")} r ON (a.item_id, a.hour_start, a.period_start)
                            = (r.item_id, r.hour_start, r.period_start)
WHERE coalesce(a.total, 0) <> coalesce(r.total, 0) OR coalesce(a.events, 0) <> coalesce(r.events, 0)
   OR a.item_id IS NULL
   OR (r.events > 0 AND (a.first_event, a.last_event) <> (r.first_event, r.last_event))
   OR (r.events > 0 AND r.last_key IS DISTINCT FROM a.last_key)
"""  # noqa: S608  constants only

#: A window knows a least watermark of its items; only everything knows the watermark.
_WATERMARKS: LiteralString = f"""
INSERT INTO replay_watermarks
SELECT item_id, i.watermark, r.watermark
FROM {_RECOUNTED.format("replay_items")} r JOIN items i USING (item_id)
WHERE CASE WHEN %(exact)s THEN i.watermark <> r.watermark ELSE i.watermark < r.watermark END
  AND r.watermark > '1970-01-01T00:00:00Z'
"""  # noqa: S608  constants only

_ORDERED: LiteralString = """
SELECT c.*, coalesce(i.tenant_id, r.tenant_id) AS tenant_id,
       coalesce(i.customer_ref, r.customer_ref) AS customer_ref,
       coalesce(i.meter, r.meter) AS meter, coalesce(i.dimensions, r.dimensions) AS dimensions
FROM replay_changes c LEFT JOIN items i USING (item_id) LEFT JOIN replay_items r USING (item_id)
ORDER BY c.item_id, c.hour_start, c.period_start
"""

#: What the window holds before and after, by meter.
_TOTALS: LiteralString = f"""
SELECT tenant_id, meter, sum(events_before)::bigint AS events_before,
       sum(events_after)::bigint AS events_after,
       trim_scale(sum(before)) AS before, trim_scale(sum(after)) AS after
FROM (SELECT i.tenant_id, i.meter, b.events AS events_before, 0 AS events_after, b.total AS before, 0 AS after
      FROM buckets b JOIN items i USING (item_id) WHERE {_IN_SCOPE} AND {_IN_WINDOW.format("b")}
      UNION ALL
      SELECT i.tenant_id, i.meter, 0, r.events, 0, r.total
      FROM replay_buckets r JOIN replay_items i USING (item_id) WHERE {_IN_WINDOW.format("r")}) AS hours
GROUP BY tenant_id, meter ORDER BY tenant_id, meter
"""  # noqa: S608  constants only


@dataclass(frozen=True, slots=True)
class Differences:
    """How many there are; ``digest`` names exactly these."""

    buckets: int
    items: int
    values: int
    watermarks: int
    periods: int
    digest: str

    @property
    def any(self) -> bool:
        """Whether an apply would change anything."""
        return bool(self.buckets or self.values or self.watermarks or self.periods)


def prepare_tables(db: Connection, *, dry: bool) -> None:
    """Make the temporary tables of this session, before the transaction that compares."""
    if dry:
        db.execute(_DRY)
    db.execute(_DIFFERENCES)
    db.execute(books.TABLES)


def clear(db: Connection) -> None:
    """Empty what was added up, for a new beginning."""
    db.execute("TRUNCATE replay_items, replay_buckets, replay_values")


def values_of(scope: Scope, *, only: bool = False) -> dict[str, Any]:
    """Parameters of the statements of this module."""
    return {
        "only": only,
        "tenant": scope.tenant_id,
        "meters": list(scope.meters) or None,
        "customer": scope.customer_ref,
        "since": bound(scope.since_us),
        "until": bound(scope.until_us),
        "exact": scope.everything,
    }


def forget(db: Connection) -> None:
    """Forget the differences that were found last on this connection."""
    tables = ("replay_changes", "replay_value_changes", "replay_watermarks", "replay_periods", "replay_books")
    for table in tables:
        db.execute(f"DELETE FROM {table}")  # noqa: S608  (TRUNCATE is no read-only statement)


def compare(db: Connection, scope: Scope, *, only: bool = False) -> Differences:
    """Find every difference in the scope; ``only``: of the candidates."""
    values = values_of(scope, only=only)
    forget(db)
    for statement in (_PERIODS, _OTHER_HOURS, _DISTINCT, _VALUE_CHANGES, _CHANGES, _WATERMARKS):
        db.execute(statement, values)
    books.compare_books(db, values, scope=_IN_SCOPE, window=_IN_WINDOW)
    digest = hashlib.sha256()
    number, items, last = 0, 0, None
    for row in _ordered(db):
        number += 1
        items += row.item_id != last
        last = row.item_id
        digest.update(
            f"{row.item_id} {row.hour_start} {row.period_start} {row.before} {row.after} "
            f"{row.events_before} {row.events_after} {row.first_event} {row.last_event}\n".encode()
        )
    counts: list[int] = []
    for statement in (
        "SELECT item_id, period_start, value, hour_start, is_missing FROM replay_value_changes "
        "ORDER BY 1, 2, 3, 4",
        "SELECT item_id, before, after FROM replay_watermarks ORDER BY 1",
        "SELECT item_id, period_start, pushed, sent FROM replay_books ORDER BY 1, 2",
    ):
        counts.append(0)
        with db.cursor(name="differences") as cursor:
            for row in cursor.execute(statement):
                counts[-1] += 1
                digest.update(f"{row}\n".encode())
    values_changed, watermarks, periods_changed = counts
    return Differences(number, items, values_changed, watermarks, periods_changed, digest.hexdigest())


_CHANGED_ITEMS: LiteralString = (
    "SELECT item_id FROM replay_changes UNION SELECT item_id FROM replay_watermarks "
    "UNION SELECT item_id FROM replay_value_changes UNION SELECT item_id FROM replay_books"
)


def changed_items(db: Connection) -> list[UUID]:
    """The items that differ."""
    return [row[0] for row in db.execute(_CHANGED_ITEMS).fetchall()]


def set_candidates(db: Connection, items: Sequence[UUID]) -> None:
    """Name the items that :func:`compare` looks at with ``only``."""
    db.execute("DELETE FROM replay_candidates")
    with db.cursor().copy("COPY replay_candidates FROM STDIN") as copy:
        copy.write("".join(f"{item}\n" for item in items))
    db.execute("ANALYZE replay_candidates")


def _ordered(db: Connection) -> Iterator[Any]:
    with db.cursor(name="changes", row_factory=namedtuple_row) as cursor:
        cursor.itersize = 5000
        yield from cursor.execute(_ORDERED)


def changes(db: Connection, limit: int) -> list[Any]:
    """The first differences, as rows with the names of their items."""
    return (
        db.cursor(row_factory=namedtuple_row).execute(_ORDERED + " LIMIT %s", (limit,)).fetchall()  # noqa: S608
    )


def periods(db: Connection, limit: int) -> list[Any]:
    """The first billing periods of which what is kept is not what was sent."""
    return (
        db.cursor(row_factory=namedtuple_row)
        .execute(
            "SELECT i.tenant_id, i.customer_ref, i.meter, p.period_start, p.pushed, p.sent "
            "FROM replay_books p JOIN items i USING (item_id) ORDER BY p.item_id, p.period_start LIMIT %s",
            (limit,),
        )
        .fetchall()
    )


def totals(db: Connection, scope: Scope) -> list[Any]:
    """Events and sums of the window before and after, by meter."""
    return db.cursor(row_factory=namedtuple_row).execute(_TOTALS, values_of(scope)).fetchall()


# -- Putting it right --------------------------------------------------------------------------------------

_NEW_ITEMS: LiteralString = """
INSERT INTO items (item_id, tenant_id, customer_ref, meter, dimensions, watermark, calendar)
SELECT item_id, tenant_id, customer_ref, meter, dimensions, watermark, calendar FROM replay_items r
WHERE EXISTS (SELECT FROM replay_changes c WHERE c.item_id = r.item_id)
ORDER BY item_id ON CONFLICT DO NOTHING
"""
_LOCK_ITEMS: LiteralString = f"""
SELECT FROM items WHERE item_id IN ({_CHANGED_ITEMS}) ORDER BY item_id FOR UPDATE
"""
_LOCK_HOURS: LiteralString = """
SELECT FROM buckets b JOIN replay_changes c USING (item_id, hour_start, period_start)
ORDER BY b.item_id, b.hour_start, b.period_start FOR UPDATE OF b
"""
_CORRECT: LiteralString = """
UPDATE buckets b SET total = c.after, events = c.events_after,
    late_events = least(b.late_events, c.events_after),
    first_event = c.first_event, last_event = c.last_event, last_key = c.last_key
FROM replay_changes c
WHERE NOT c.is_new AND (b.item_id, b.hour_start, b.period_start) = (c.item_id, c.hour_start, c.period_start)
"""
_RESTORE: LiteralString = """
INSERT INTO buckets (item_id, hour_start, period_start, total, events, late_events, first_event, last_event,
                     first_arrival, last_arrival, last_key, closed)
SELECT c.item_id, c.hour_start, c.period_start, c.after, c.events_after, 0, c.first_event, c.last_event,
       r.first_arrival, r.last_arrival, c.last_key, r.closed
FROM replay_changes c JOIN replay_buckets r USING (item_id, hour_start, period_start) WHERE c.is_new
ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET total = excluded.total,
    events = excluded.events, first_event = excluded.first_event, last_event = excluded.last_event,
    last_key = excluded.last_key
"""
_CORRECT_VALUES: tuple[LiteralString, ...] = (
    "DELETE FROM unique_values v USING replay_value_changes c WHERE NOT c.is_missing "
    "AND (v.item_id, v.period_start, v.value, v.hour_start) "
    "= (c.item_id, c.period_start, c.value, c.hour_start)",
    "INSERT INTO unique_values (item_id, period_start, value, hour_start) "
    "SELECT item_id, period_start, value, hour_start FROM replay_value_changes WHERE is_missing "
    "ON CONFLICT DO NOTHING",
)
_MARK_DIRTY: LiteralString = """
UPDATE items i SET dirty_from = least(i.dirty_from, c.h)
FROM (SELECT item_id, min(hour_start) AS h FROM replay_changes GROUP BY item_id) c WHERE c.item_id = i.item_id
"""
_CORRECT_WATERMARKS: LiteralString = (
    "UPDATE items i SET watermark = w.after FROM replay_watermarks w WHERE w.item_id = i.item_id"
)


def lock_changed(db: Connection) -> None:
    """Lock the items that differ, made where missing: closing must not read them meanwhile."""
    db.execute(_NEW_ITEMS)
    db.execute(_LOCK_ITEMS)


def correct(db: Connection, scope: Scope, found: Differences, *, only: bool = False) -> None:
    """Write what :func:`compare` found; the items are locked. Closing pushes the difference."""
    db.execute(_LOCK_HOURS)
    with_books = found.periods or db.execute("SELECT FROM replay_changes WHERE is_new LIMIT 1").fetchone()
    if with_books:
        books.lock_books(db)
    for statement in (_CORRECT, _RESTORE, *_CORRECT_VALUES, _MARK_DIRTY, _CORRECT_WATERMARKS):
        db.execute(statement)
    if with_books:  # what is kept of an hour that was there all along does not depend on its total
        books.compare_books(db, values_of(scope, only=only), scope=_IN_SCOPE, window=_IN_WINDOW)
        books.keep_only_locked(db)
        books.correct_books(db)


def moved_calendars(db: Connection) -> bool:
    """Whether an item has another calendar by now than it was added up by."""
    row = db.execute(
        "SELECT EXISTS (SELECT FROM replay_items r JOIN items i USING (item_id) "
        "WHERE i.calendar <> r.calendar)"
    ).fetchone()
    return bool(row and row[0])
