"""Add usage up again, apart from the counters: the same decoder, upcasters, rules and merging.

What became of a record is not decided again but looked up (``services.counters.decisions``). The result
lies in ``replay_items``, ``replay_buckets`` and ``replay_values``: tables of the one replay that runs, or
temporary ones of the same names, which PostgreSQL finds first. Nothing is held in memory but what was added
up since the last :meth:`Recount.flush`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg

from schemas.catalog import released
from services.counters import buckets
from services.counters.config import Configuration
from services.counters.prepare import Account, Item, Prepared, Preparer
from services.counters.windows import OLDEST_US, add, add_to
from services.replay.log import Record
from services.streaming.chunks import Chunk, Partition
from services.streaming.replays import Scope, bound
from services.wire.errors import Poison
from services.wire.periods import HOUR_US, Calendar
from services.wire.pgarrays import timestamp_array, timestamp_of, uuid_array
from services.wire.times import micros
from services.wire.topics import USAGE_VERSIONS
from services.wire.usage import QUANTITY_UNIT
from upcasters.chain import InvalidAfterUpcast, MissingUpcaster, UpcasterFailed
from upcasters.values import Rejected

Connection = psycopg.Connection[Any]

#: Buckets and values that are held before they are written, about so many at most. Looked at only after as
#: many events.
HELD_MAX = 100_000
#: No chunk is longer: what it left uncounted begins at most so far below its last record.
CHUNK_RECORDS_MAX = 50_000

#: Why a record cannot be read.
UNREADABLE = (Poison, Rejected, MissingUpcaster, UpcasterFailed, InvalidAfterUpcast)

#: Uncounted by now, or by the time that ``basis`` names; what was counted afterwards is read once more.
_UNCOUNTED: LiteralString = """
SELECT o FROM uncounted_records u, unnest(u.offsets) o
WHERE u.topic = %(topic)s AND u.partition = %(partition)s
  AND u.first_offset BETWEEN %(first)s - %(chunk)s AND %(last)s AND u.last_offset >= %(first)s
  AND o BETWEEN %(first)s AND %(last)s
EXCEPT
SELECT "offset" FROM recounted_records
WHERE topic = %(topic)s AND partition = %(partition)s AND "offset" BETWEEN %(first)s AND %(last)s
  AND recount_id <= %(basis)s
"""

_CALENDARS: LiteralString = """
SELECT uuid_send(u.i), coalesce(i.calendar, c.calendar)
FROM unnest(%s, %s::text[], %s::text[]) AS u (i, t, c)
LEFT JOIN items i ON i.item_id = u.i
LEFT JOIN customers c ON (c.tenant_id, c.customer_ref) = (u.t, u.c)
"""

#: The periods that hours are kept in. Those that Stripe takes no more stay where they were billed.
_KEPT_PERIODS: LiteralString = """
SELECT uuid_send(b.item_id), timestamptz_send(b.hour_start), timestamptz_send(b.period_start),
       timestamptz_send(coalesce(p.period_end, 'infinity'))
FROM unnest(%s, %s) AS u (i, h) JOIN buckets b ON (b.item_id, b.hour_start) = (u.i, u.h)
LEFT JOIN item_periods p USING (item_id, period_start)
WHERE b.events > 0
"""

_ITEMS: LiteralString = """
INSERT INTO replay_items AS r (item_id, tenant_id, customer_ref, meter, dimensions, calendar, watermark)
SELECT u.i, u.t, u.c, u.m, ARRAY(SELECT jsonb_array_elements_text(u.d)), u.p, u.w
FROM unnest(%s, %s::text[], %s::text[], %s::text[], %s::jsonb[], %s::text[], %s) AS u (i, t, c, m, d, p, w)
ON CONFLICT (item_id) DO UPDATE SET watermark = greatest(r.watermark, excluded.watermark),
    calendar = CASE WHEN r.calendar = excluded.calendar THEN r.calendar ELSE 'changed' END
"""

_VALUES: LiteralString = """
INSERT INTO replay_values (item_id, period_start, value, hour_start)
SELECT * FROM unnest(%s, %s, %s, %s) ON CONFLICT DO NOTHING
"""

_ADJUSTMENTS: LiteralString = """
SELECT a.adjustment_id, a.item_id, a.customer_ref, a.tenant_id, a.meter, i.dimensions, i.calendar, a.quantity,
       a.unique_value, a.counted_at, a.idempotency_key
FROM adjustments a JOIN items i USING (item_id)
WHERE a.state = 'applied' AND a.counted_at >= %(since)s AND a.counted_at < %(until)s
  AND (%(tenant)s::text IS NULL OR a.tenant_id = %(tenant)s)
  AND (%(meters)s::text[] IS NULL OR a.meter = ANY(%(meters)s))
  AND (%(customer)s::text IS NULL OR a.customer_ref = %(customer)s)
  AND a.adjustment_id > %(after)s::uuid
ORDER BY a.adjustment_id LIMIT 5000
"""


class Recount:
    """Adds records up for one scope, with the configuration at its start.

    ``basis``: records that a re-drive counted are counted up to this ``recount_id``; later ones are taken by
    :meth:`take` with ``only``. ``unreadable`` counts, by reason, what was counted once and cannot be now.
    """

    def __init__(
        self, preparer: Preparer, config: Configuration, scope: Scope, *, basis: int, now_us: int
    ) -> None:
        self._preparer = preparer
        self.scope = scope
        self.configure(config)
        self.basis = basis
        self._kept_before = now_us - OLDEST_US
        self.matched = 0
        self.unreadable: Counter[str] = Counter()
        self._held = Prepared(Chunk(Partition("", 0), []), config.version)
        self._periods: dict[tuple[bytes, int], list[tuple[int, int]]] = {}
        self._arrivals = [2**62, 0]
        self._since_look = 0
        self.full = False  #: whether it is time to flush

    def configure(self, config: Configuration) -> None:
        """Go on with this configuration."""
        scope = self.scope
        wanted = {
            name: meter
            for name, meter in config.meters.items()
            if (scope.tenant_id is None or name[0] == scope.tenant_id)
            and (not scope.meters or name[1] in scope.meters)
        }
        self._config = Configuration(config.version, wanted)
        self.config_version = config.version

    def take(
        self, db: Connection, tp: Partition, batch: Sequence[Record], only: frozenset[int] | None = None
    ) -> None:
        """Count the records of a batch that counted; ``only``: of these offsets, which counted late."""
        if only is None:
            skipped = self._uncounted(db, tp, batch[0].offset(), batch[-1].offset())
            if skipped:
                batch = [record for record in batch if record.offset() not in skipped]
        else:
            batch = [record for record in batch if record.offset() in only]
        if not batch:
            return
        read, measure = self._preparer.read, self._preparer.measure
        expected = released()["usage_event", USAGE_VERSIONS[tp.topic]]
        scope, config, held, kept_before = self.scope, self._config, self._held, self._kept_before
        since, until, tenant, customer = scope.since_us, scope.until_us, scope.tenant_id, scope.customer_ref
        meters = frozenset(scope.meters)
        later: list[tuple[Item, int, int, str]] = []
        matched = 0
        for raw in batch:
            try:
                record = read(raw.value() or b"", expected)
                arrival_us = raw.timestamp()[1] * 1000
                occurred = record["occurred_at"]
                if occurred is None:
                    occurred = arrival_us
                if (
                    not since <= occurred < until
                    or (tenant is not None and record["tenant_id"] != tenant)
                    or (meters and record["meter"] not in meters)
                    or (customer is not None and record["customer_ref"] != customer)
                ):
                    continue
                item, occurred, amount = measure(held, config, arrival_us, record)
            except UNREADABLE as error:
                self.unreadable[getattr(error, "reason", type(error).__name__)] += 1
                continue
            matched += 1
            if occurred > item.watermark:
                item.watermark = occurred
            if item.calendar is None or occurred < kept_before:
                later.append((item, occurred, amount, record["idempotency_key"]))
                continue
            if not item.period_start <= occurred < item.period_end:
                item.period_start, item.period_end = item.calendar.bounds(occurred)
            place = (occurred - occurred % HOUR_US, item.period_start)
            add_to(item, place, occurred, amount, record["idempotency_key"], 0)
        if later:
            self._add(db, later)
        self.matched += matched
        self._arrivals = [
            min(self._arrivals[0], batch[0].timestamp()[1] * 1000),
            max(self._arrivals[1], batch[-1].timestamp()[1] * 1000),
        ]
        self._since_look += matched
        if self._since_look >= HELD_MAX:
            self._since_look, self.full = 0, self._size() >= HELD_MAX

    def take_adjustments(self, db: Connection) -> None:
        """Count what was adjusted, at the time it counts at."""
        after = "00000000-0000-0000-0000-000000000000"
        values = {
            "since": bound(self.scope.since_us),
            "until": bound(self.scope.until_us),
            "tenant": self.scope.tenant_id,
            "meters": list(self.scope.meters) or None,
            "customer": self.scope.customer_ref,
        }
        while rows := db.execute(_ADJUSTMENTS, {**values, "after": after}).fetchall():
            found = []
            for _, item_id, customer, tenant, slug, dimensions, calendar, quantity, unique, at, key in rows:
                meter = self._config.meters.get((tenant, slug))
                if meter is None:
                    continue
                name = (tenant, customer, slug, *dimensions)
                item = self._held.items.get(name)
                if item is None:
                    item = self._held.items[name] = Item(
                        item_id.bytes, customer, meter, Account(), tuple(dimensions)
                    )
                item.calendar = Calendar.parse(calendar)
                amount = int(quantity * QUANTITY_UNIT) if unique is None else unique.int
                found.append((item, micros(at), amount, key))
            self._add(db, found)
            self.flush(db)
            after = rows[-1][0]

    def flush(self, db: Connection) -> None:
        """Write what was added up, in the current transaction, and let go of it."""
        items = [item for item in self._held.items.values() if item.calendar is not None]
        self._held = Prepared(Chunk(Partition("", 0), []), self._config.version)
        self._periods.clear()
        self._since_look, self.full = 0, False
        if not items:
            return
        items.sort(key=_item_id)
        db.execute(
            _ITEMS,
            (
                uuid_array([item.item_id for item in items]),
                [item.meter.tenant_id for item in items],
                [item.customer_ref for item in items],
                [item.meter.meter for item in items],
                [json.dumps(item.dimensions) for item in items],
                [item.calendar.text for item in items if item.calendar is not None],
                timestamp_array([item.watermark for item in items]),
            ),
        )
        low, high = self._arrivals
        buckets.merge(db, "replay_buckets", items, (low if low < 2**62 else high, high))
        values = sorted(
            (item.item_id, period, value.to_bytes(16, "big"), hour)
            for item in items
            if item.meter.aggregation == "unique"
            for (hour, period), bucket in item.buckets.items()
            for value in bucket.values or ()
        )
        if values:
            db.execute(
                _VALUES,
                (
                    uuid_array([row[0] for row in values]),
                    timestamp_array([row[1] for row in values]),
                    uuid_array([row[2] for row in values]),
                    timestamp_array([row[3] for row in values]),
                ),
            )

    # -- Inside --------------------------------------------------------------------------------------------

    def _uncounted(self, db: Connection, tp: Partition, first: int, last: int) -> set[int]:
        rows = db.execute(
            _UNCOUNTED,
            {
                "topic": tp.topic,
                "partition": tp.partition,
                "first": first,
                "last": last,
                "chunk": CHUNK_RECORDS_MAX,
                "basis": self.basis,
            },
        ).fetchall()
        return {row[0] for row in rows}

    def _find_calendars(self, db: Connection, items: Sequence[Item]) -> None:
        fresh = {item.item_id: item for item in items}
        rows = db.execute(
            _CALENDARS,
            (
                uuid_array(list(fresh)),
                [item.meter.tenant_id for item in fresh.values()],
                [item.customer_ref for item in fresh.values()],
            ),
            binary=True,
        ).fetchall()
        for item_id, text in rows:
            item = fresh[bytes(item_id)]
            item.calendar = Calendar.parse(text or item.meter.calendar)

    def _add(self, db: Connection, found: Sequence[tuple[Item, int, int, str]]) -> None:
        fresh = [item for item, _, _, _ in found if item.calendar is None]
        if fresh:
            self._find_calendars(db, fresh)
        old: list[tuple[Item, int, int, str]] = []
        for one in found:
            if one[1] < self._kept_before:
                old.append(one)
            else:
                add(*one, 0)
        if old:
            self._add_old(db, old)

    def _add_old(self, db: Connection, found: Sequence[tuple[Item, int, int, str]]) -> None:
        """The same for hours that no change of calendar moves any more."""
        places = {(item.item_id, at - at % HOUR_US) for item, at, _, _ in found}
        unknown = sorted(place for place in places if place not in self._periods)
        if unknown:
            self._periods.update((place, []) for place in unknown)
            rows = db.execute(
                _KEPT_PERIODS,
                (
                    uuid_array([item_id for item_id, _ in unknown]),
                    timestamp_array([hour for _, hour in unknown]),
                ),
                binary=True,
            ).fetchall()
            for item_id, hour, start, end in rows:
                self._periods[bytes(item_id), timestamp_of(hour)].append(
                    (timestamp_of(start), timestamp_of(end))
                )
        for item, at, amount, key in found:
            hour = at - at % HOUR_US
            kept = self._periods[item.item_id, hour]
            fitting = kept if len(kept) == 1 else [one for one in kept if one[0] <= at < one[1]]
            if fitting:
                add_to(item, (hour, fitting[0][0]), at, amount, key, 0)
            else:
                add(item, at, amount, key, 0)

    def _size(self) -> int:
        number = 0
        for item in self._held.items.values():
            number += 1 + len(item.buckets)
            if item.meter.aggregation == "unique":
                number += sum(len(bucket.values or ()) for bucket in item.buckets.values())
        return number


def _item_id(item: Item) -> bytes:
    return item.item_id
