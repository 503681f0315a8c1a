"""What is kept of an item: its row and its hours. The SQL that merges a chunk's share into them.

Every statement merges in a way that no order of chunks can change: sums add up, the greatest value wins, the
last is the greatest by (``occurred_at``, idempotency key). A value of a ``unique`` meter is counted in the
earliest hour of the period it was used in, so the hours of a period add up to its distinct values.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, LiteralString

import psycopg

from services.counters.prepare import Bucket, Item
from services.wire.errors import require
from services.wire.periods import HOUR_US, Calendar
from services.wire.pgarrays import int8_array, timestamp_array, timestamp_of, uuid_array
from services.wire.usage import QUANTITY_UNIT

Connection = psycopg.Connection[Any]


def lock_items(db: Connection, items: Iterable[Item]) -> None:
    """Lock the rows of ``items``, made where missing, by ascending id; fill watermarks and calendars in."""
    by_id = {item.item_id: item for item in items}
    missing = _read_items(db, by_id)
    if missing:
        new = sorted((by_id[item_id] for item_id in missing), key=_item_id)
        db.execute(
            _NEW_ITEMS,
            (
                uuid_array([item.item_id for item in new]),
                [item.meter.tenant_id for item in new],
                [item.customer_ref for item in new],
                [item.meter.meter for item in new],
                [json.dumps(item.dimensions) for item in new],
                [item.meter.calendar for item in new],
            ),
        )
        still_missing = _read_items(db, {item.item_id: item for item in new})
        require(not still_missing, "an item that was just inserted is not there")


_NEW_ITEMS = """
INSERT INTO items (item_id, tenant_id, customer_ref, meter, dimensions, watermark, calendar)
SELECT u.i, u.t, u.c, u.m, ARRAY(SELECT jsonb_array_elements_text(u.d)), '-infinity',
       coalesce(c.calendar, u.p)
FROM unnest(%s, %s::text[], %s::text[], %s::text[], %s::jsonb[], %s::text[]) AS u (i, t, c, m, d, p)
LEFT JOIN customers c ON (c.tenant_id, c.customer_ref) = (u.t, u.c)
ON CONFLICT DO NOTHING
"""


def _read_items(db: Connection, by_id: dict[bytes, Item]) -> list[bytes]:
    """Lock the rows, fill the items in, and return the ids without a row."""
    rows = db.execute(
        "SELECT uuid_send(item_id), timestamptz_send(watermark), calendar FROM items "
        "WHERE item_id = ANY(%s) ORDER BY item_id FOR UPDATE",
        (uuid_array(sorted(by_id)),),
        binary=True,
    ).fetchall()
    for item_id, watermark, calendar in rows:
        item = by_id[bytes(item_id)]
        item.watermark = timestamp_of(watermark)
        item.calendar = Calendar.parse(calendar)
    if len(rows) == len(by_id):
        return []
    return list(by_id.keys() - {bytes(row[0]) for row in rows})


def write(db: Connection, items: Iterable[Item], arrivals_us: tuple[int, int]) -> set[bytes]:
    """Merge the buckets of ``items``, which must be locked, and mark them for closing.

    Returns the items with a *revised* hour: one that is over and whose delta is settled got a late event.
    ``arrivals_us``: when the first and the last of these events arrived.
    """
    changed = sorted((item for item in items if item.buckets), key=_item_id)
    if not changed:
        return set()
    distinct = [item for item in changed if item.meter.aggregation == "unique"]
    if distinct:
        _count_distinct(db, distinct)
    with db.pipeline():
        db.execute(
            "UPDATE items SET watermark = greatest(watermark, u.w), dirty_from = least(dirty_from, u.h) "
            "FROM unnest(%s, %s, %s) AS u (i, w, h) WHERE item_id = u.i",
            (
                uuid_array([item.item_id for item in changed]),
                timestamp_array([item.watermark for item in changed]),
                timestamp_array([min(hour for hour, _ in item.buckets) for item in changed]),
            ),
        )
        late = {
            (item.item_id, *place)
            for item in changed
            if item.account.late_counted
            for place, bucket in item.buckets.items()
            if bucket.late and place[0] + HOUR_US <= item.watermark
        }
        merged = merge(db, "buckets", changed, arrivals_us, asked=bool(late))
    if not late:
        return set()
    return {
        bytes(item_id)
        for cursor in merged
        for item_id, hour, period, is_settled in cursor.fetchall()
        if is_settled and (bytes(item_id), timestamp_of(hour), timestamp_of(period)) in late
    }


#: Aggregations whose hours do not simply add up.
_KINDS = {"max": "max", "last": "last"}

_IS_LATER: LiteralString = "(excluded.last_event, excluded.last_key) > (b.last_event, b.last_key)"
_MERGE: dict[str, LiteralString] = {
    "sum": "total = b.total + excluded.total",
    "max": "total = greatest(b.total, excluded.total)",
    "last": f"total = CASE WHEN {_IS_LATER} THEN excluded.total ELSE b.total END, "
    f"last_key = CASE WHEN {_IS_LATER} THEN excluded.last_key ELSE b.last_key END, "
    # An hour without events has no value that could have been sent, not even 0.
    "closed = CASE WHEN b.events > 0 THEN b.closed END",
}


#: Asked for only when there are late events: most chunks have none.
_SETTLED: LiteralString = (
    " RETURNING uuid_send(b.item_id), timestamptz_send(b.hour_start), timestamptz_send(b.period_start), "
    "b.sequence > 0 AND NOT b.open"
)


def merge(
    db: Connection,
    table: LiteralString,
    items: Iterable[Item],
    arrivals_us: tuple[int, int],
    *,
    asked: bool = False,
) -> list[psycopg.Cursor[Any]]:
    """Merge the buckets of ``items`` into ``table``, which has the columns of ``buckets``.

    With ``asked``, the cursors tell for each whether it had a delta that is settled.
    """
    rows: dict[str, list[tuple[bytes, int, int, Bucket]]] = defaultdict(list)
    for item in items:
        kept = rows[_KINDS.get(item.meter.aggregation, "sum")]
        kept.extend((item.item_id, *place, bucket) for place, bucket in item.buckets.items())
    return [_merge(db, table, kind, ours, arrivals_us, asked=asked) for kind, ours in rows.items()]


def _merge(
    db: Connection,
    table: LiteralString,
    kind: str,
    rows: Sequence[tuple[bytes, int, int, Bucket]],
    arrivals_us: tuple[int, int],
    *,
    asked: bool,
) -> psycopg.Cursor[Any]:
    buckets = [row[3] for row in rows]
    is_last = kind == "last"
    keys = ([bucket.key for bucket in buckets],) if is_last else ()
    return db.execute(
        f"INSERT INTO {table} AS b (item_id, hour_start, period_start, total, events, late_events, "  # noqa: S608
        "first_event, last_event, first_arrival, last_arrival, closed"
        + (", last_key" if is_last else "")
        + ") SELECT u.i, u.h, u.p, u.t * 0.000000001, u.n, u.l, u.f, u.e, a.f, a.l, "
        + ("NULL, u.k" if is_last else "0")
        + " FROM unnest(%s, %s) AS a (f, l), unnest(%s, %s, %s, %s::numeric[], %s, %s, %s, %s"
        + (", %s::text[]) AS u (i, h, p, t, n, l, f, e, k)" if is_last else ") AS u (i, h, p, t, n, l, f, e)")
        + " ON CONFLICT (item_id, hour_start, period_start) DO UPDATE SET "
        + _MERGE[kind]
        + ", events = b.events + excluded.events, late_events = b.late_events + excluded.late_events, "
        "first_event = least(b.first_event, excluded.first_event), "
        "last_event = greatest(b.last_event, excluded.last_event), "
        "first_arrival = least(b.first_arrival, excluded.first_arrival), "
        "last_arrival = greatest(b.last_arrival, excluded.last_arrival)" + (_SETTLED if asked else ""),
        (
            timestamp_array(arrivals_us[:1]),
            timestamp_array(arrivals_us[1:]),
            uuid_array([row[0] for row in rows]),
            timestamp_array([row[1] for row in rows]),
            timestamp_array([row[2] for row in rows]),
            "{" + ",".join(str(bucket.total) for bucket in buckets) + "}",
            int8_array([bucket.events for bucket in buckets]),
            int8_array([bucket.late for bucket in buckets]),
            timestamp_array([bucket.first_us for bucket in buckets]),
            timestamp_array([bucket.last_us for bucket in buckets]),
            *keys,
        ),
        binary=True,
    )


def _count_distinct(db: Connection, items: Sequence[Item]) -> None:
    """Turn the values of ``unique`` buckets into totals: what is new, or was used earlier than we knew."""
    hours: dict[tuple[bytes, int, bytes], list[int]] = defaultdict(list)
    for item in items:
        for (hour, period), bucket in item.buckets.items():
            for value in bucket.values or ():
                hours[item.item_id, period, value.to_bytes(16, "big")].append(hour)
    known = sorted(hours)
    columns = (
        uuid_array([item_id for item_id, _, _ in known]),
        timestamp_array([period for _, period, _ in known]),
        uuid_array([value for _, _, value in known]),
    )
    rows = db.execute(
        "SELECT uuid_send(u.i), timestamptz_send(u.p), uuid_send(u.v), timestamptz_send(v.h) "
        "FROM unnest(%s, %s, %s) AS u (i, p, v), LATERAL (SELECT min(hour_start) AS h FROM unique_values "
        "WHERE (item_id, period_start, value) = (u.i, u.p, u.v)) v WHERE v.h IS NOT NULL",
        columns,
        binary=True,
    ).fetchall()
    before = {
        (bytes(item_id), timestamp_of(period), bytes(value)): timestamp_of(hour)
        for item_id, period, value, hour in rows
    }
    by_id = {item.item_id: item for item in items}
    for place, used in hours.items():
        item, period, first = by_id[place[0]], place[1], min(used)
        was = before.get(place)
        if was is None or first < was:
            item.buckets[first, period].total += QUANTITY_UNIT
            if was is not None:
                _bucket_of_hour(item, was, period).total -= QUANTITY_UNIT
    new = sorted((*place, hour) for place, used in hours.items() for hour in used)
    db.execute(
        "INSERT INTO unique_values (item_id, period_start, value, hour_start) "
        "SELECT * FROM unnest(%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (
            uuid_array([row[0] for row in new]),
            timestamp_array([row[1] for row in new]),
            uuid_array([row[2] for row in new]),
            timestamp_array([row[3] for row in new]),
        ),
    )


def _bucket_of_hour(item: Item, hour: int, period: int) -> Bucket:
    """A bucket that exists and gets no event; its times must not move those that are stored."""
    bucket = item.buckets.get((hour, period))
    if bucket is None:
        bucket = item.buckets[hour, period] = Bucket(hour + HOUR_US - 1, hour)
    return bucket


def _item_id(item: Item) -> bytes:
    return item.item_id
