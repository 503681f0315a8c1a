"""The records of an hour, read with the counters' own decoder, and what became of each.

What counted is not decided again but looked up (``services.counters.decisions``); why something did not is
told by the parked record, the adjustment, or the first record of its key. Every record is counted and at most
``limit`` are listed; besides these nothing is held but one batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import groupby, islice
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row

from schemas.catalog import released
from services.archive.files import ArchivedRecord
from services.counters.ledger import GROUP
from services.counters.prepare import Preparer
from services.replay.customer_hours import Connection, CustomerHour, number, stream, utc, utc_or_none
from services.replay.log import FromArchive, Range, Record
from services.replay.recompute import CHUNK_RECORDS_MAX, UNREADABLE
from services.streaming.chunks import Partition
from services.streaming.explanation import Event, EventAdjustment, EventParked, Fate, Place, Source
from services.wire import codec
from services.wire.times import instant, micros
from services.wire.topics import USAGE_TOPICS, USAGE_VERSIONS
from services.wire.usage import FUTURE_TOLERANCE_US, QUANTITY_UNIT, content_digest, event_id_hash

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class _Found:
    """A record of the hour."""

    offset: int
    arrived_ms: int
    record: codec.Record
    occurred_us: int
    event_id: UUID


class Events:
    """Everything that happened in the hour, counted by what became of it, and the first of it listed.

    ``unreadable`` counts, by reason, what counted once and this release cannot read.
    """

    def __init__(self, db: Connection, asked: CustomerHour, preparer: Preparer, limit: int) -> None:
        self._db, self._asked, self._read, self._limit = db, asked, preparer.read, limit
        self.listed: list[Event] = []
        self.fates: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()

    def take(self, tp: Partition, batch: Sequence[Record], source: Source) -> list[Record]:
        """Look at a batch of the log; returns the records of it that are of the hour."""
        found, unreadable = self._matching(tp, batch)
        if unreadable:
            uncounted = self._uncounted(tp, sorted(unreadable))
            self.unreadable.update(
                reason for offset, reason in unreadable.items() if not _stays_uncounted(uncounted, offset)
            )
        if not found:
            return []
        self._keep(tp, found, self._uncounted(tp, [one.offset for one in found]), source)
        offsets = {one.offset for one in found}
        return [record for record in batch if record.offset() in offsets]

    def take_kept(self, ranges: Sequence[Range]) -> None:
        """What is of the hour and outside of what was read: parked records, with the bytes that are kept of
        them, and adjustments. In the log's own order; in a transaction."""
        read = _Ranges(ranges)
        values = {
            **self._asked.values(),
            "service": GROUP,
            "topics": list(USAGE_VERSIONS),
            "arrived": self._asked.hour - timedelta(microseconds=FUTURE_TOLERANCE_US),
        }
        parked = (row for row in stream(self._db, _PARKED_ELSEWHERE, values) if not read.hold(row))
        for tp, rows in _by_partition(parked):
            records = [
                FromArchive(
                    ArchivedRecord(row.offset, micros(row.arrived_at) // 1000, None, bytes(row.value), ())
                )
                for row in rows
            ]
            found, _ = self._matching(tp, records)
            if found:
                self._keep(tp, found, self._uncounted(tp, [one.offset for one in found]), "parked_record")
        for row in stream(self._db, _ADJUSTMENTS_HERE, values):
            if not read.hold(row):
                self._keep_adjustment(row)

    # -- Inside --------------------------------------------------------------------------------------------

    def _matching(self, tp: Partition, batch: Iterable[Record]) -> tuple[list[_Found], dict[int, str]]:
        """Records of the hour; and why others cannot be read, by offset."""
        asked = self._asked
        expected = released()["usage_event", USAGE_VERSIONS[tp.topic]]
        read, tenant, meters, refs = self._read, asked.tenant_id, asked.meters, frozenset(asked.customer_refs)
        since, until = asked.since_us, asked.until_us
        found: list[_Found] = []
        unreadable: dict[int, str] = {}
        for raw in batch:
            offset, arrived_ms = raw.offset(), raw.timestamp()[1]
            try:
                record = read(raw.value() or b"", expected)
            except UNREADABLE as error:
                unreadable[offset] = getattr(error, "reason", type(error).__name__)
                continue
            if record["customer_ref"] not in refs or record["meter"] not in meters:
                continue
            occurred = record["occurred_at"]
            if occurred is None:
                occurred = arrived_ms * 1000
            if record["tenant_id"] == tenant and since <= occurred < until:
                event_id = UUID(bytes=event_id_hash(tenant, record["idempotency_key"]))
                found.append(_Found(offset, arrived_ms, record, occurred, event_id))
        return found, unreadable

    def _uncounted(self, tp: Partition, offsets: Sequence[int]) -> dict[int, bool]:
        """Of ascending offsets those that did not count as they came, and whether a re-drive counted them."""
        rows = self._db.execute(
            _UNCOUNTED,
            {
                "topic": tp.topic,
                "partition": tp.partition,
                "first": offsets[0],
                "last": offsets[-1],
                "chunk": CHUNK_RECORDS_MAX,
                "offsets": list(offsets),
            },
        ).fetchall()
        return dict(rows)

    def _keep(
        self, tp: Partition, found: Sequence[_Found], uncounted: Mapping[int, bool], source: Source
    ) -> None:
        """Count these records by what became of them, and list them while there is room."""
        aside = [one for one in found if one.offset in uncounted]
        why = _Reasons(self._db, tp, aside) if aside else None
        for one in found:
            fate: Fate = "counted"
            first: Place | None = None
            adjustment: EventAdjustment | None = None
            parked: EventParked | None = None
            if why is not None and one.offset in uncounted:
                fate, first, adjustment, parked = why.of(one, recounted=uncounted[one.offset])
            self.fates[fate] += 1
            if len(self.listed) < self._limit:
                self.listed.append(self._event(tp, one, source, fate, first, adjustment, parked))

    def _event(
        self,
        tp: Partition,
        one: _Found,
        source: Source,
        fate: Fate,
        first: Place | None,
        adjustment: EventAdjustment | None,
        parked: EventParked | None,
    ) -> Event:
        record = one.record
        meter = self._asked.meters[record["meter"]]
        properties = record["properties"]
        return Event(
            topic=tp.topic,
            partition=tp.partition,
            offset=one.offset,
            schema_version=USAGE_VERSIONS[tp.topic],
            source=source,
            arrived_at=instant(one.arrived_ms * 1000),
            idempotency_key=record["idempotency_key"],
            occurred_at=instant(one.occurred_us),
            customer_ref=record["customer_ref"],
            meter=record["meter"],
            dimensions={name: properties[name] for name in meter.dimensions if name in properties},
            quantity=number(Decimal(int.from_bytes(record["quantity"], "big", signed=True)) / QUANTITY_UNIT),
            value=None if meter.value_property is None else properties.get(meter.value_property),
            fate=fate,
            first=first,
            adjustment=adjustment,
            parked=parked,
        )

    def _keep_adjustment(self, row: Any) -> None:
        """An event of which only the adjustment is left."""
        self.fates["adjusted"] += 1
        if len(self.listed) >= self._limit:
            return
        meter = self._asked.meters[row.meter]
        self.listed.append(
            Event(
                topic=row.topic,
                partition=row.partition,
                offset=row.offset,
                schema_version=USAGE_VERSIONS[row.topic],
                source="adjustment",
                arrived_at=utc(row.arrived_at),
                idempotency_key=row.idempotency_key,
                occurred_at=utc(row.occurred_at),
                customer_ref=row.customer_ref,
                meter=row.meter,
                dimensions=dict(zip(meter.dimensions, row.dimensions or (), strict=False)),
                quantity=number(row.quantity),
                value=None,
                fate="adjusted",
                first=None,
                adjustment=_adjustment(row),
                parked=None,
            )
        )


class _Reasons:
    """Why records of one partition did not count as they came."""

    def __init__(self, db: Connection, tp: Partition, found: Sequence[_Found]) -> None:
        self._tp = tp
        cursor: psycopg.Cursor[Any] = db.cursor(row_factory=namedtuple_row)
        values = {
            "topic": tp.topic,
            "partition": tp.partition,
            "offsets": [one.offset for one in found],
            "ids": [one.event_id for one in found],
        }
        self._parked: dict[int, Any] = {row.offset: row for row in cursor.execute(_PARKED, values).fetchall()}
        self._adjustments = {row.adjustment_id: row for row in cursor.execute(_ADJUSTED, values).fetchall()}
        self._first = {row.event_id: row for row in cursor.execute(_FIRST, values).fetchall()}

    def of(
        self, one: _Found, *, recounted: bool
    ) -> tuple[Fate, Place | None, EventAdjustment | None, EventParked | None]:
        """What became of a record, the first of its key, its adjustment and what it is parked as."""
        here = Place(*self._tp, one.offset)
        row = self._adjustments.get(one.event_id)
        adjustment = None if row is None else _adjustment(row)
        adjusted_at = None if row is None else Place(row.topic, row.partition, row.offset)
        kept = self._parked.get(one.offset)
        parked = None if kept is None else EventParked(
            id=kept.parked_id, kind=kept.kind, reason=kept.reason, state=kept.state, outcome=kept.outcome
        )  # fmt: skip
        seen = self._first.get(one.event_id)
        first = None if seen is None else Place(USAGE_TOPICS[seen.source], seen.partition, seen.offset)
        first = None if first == here else first
        if recounted:
            return "recounted", None, None, parked
        if adjusted_at == here:
            return "adjusted", None, adjustment, parked
        if kept is not None and kept.kind == "conflict":
            return "conflict", first, None, parked
        if kept is not None and kept.state != "redriven":
            return "parked", None, None, parked
        if seen is not None and first is not None:
            same = seen.digest == content_digest(one.record)
            return ("duplicate" if same else "conflict"), first, None, parked
        if adjustment is not None:  # its key was forgotten, and it came too late once more
            return "adjusted", adjusted_at, adjustment, parked
        return "uncounted", None, None, parked


def _adjustment(row: Any) -> EventAdjustment:
    return EventAdjustment(
        id=row.adjustment_id.hex,
        state=row.state,
        reason=row.reason,
        counted_at=utc_or_none(row.counted_at),
    )


def _stays_uncounted(uncounted: Mapping[int, bool], offset: int) -> bool:
    return uncounted.get(offset) is False


class _Ranges:
    """Whether a record lies in what was read."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._starts: defaultdict[Partition, list[int]] = defaultdict(list)
        self._ends: defaultdict[Partition, list[int]] = defaultdict(list)
        for one in ranges:  # ascending, apart
            self._starts[one.tp].append(one.start)
            self._ends[one.tp].append(one.end)

    def hold(self, row: Any) -> bool:
        tp = Partition(row.topic, row.partition)
        place = bisect_right(self._starts[tp], row.offset) - 1
        return place >= 0 and row.offset < self._ends[tp][place]


def _by_partition(rows: Iterable[Any]) -> Iterator[tuple[Partition, list[Any]]]:
    """Runs of one partition, of a thousand rows at most."""
    for tp, run in groupby(rows, key=lambda row: Partition(row.topic, row.partition)):
        while part := list(islice(run, _BATCH)):
            yield tp, part


_UNCOUNTED: LiteralString = """
SELECT o, r."offset" IS NOT NULL FROM uncounted_records u CROSS JOIN unnest(u.offsets) o
LEFT JOIN recounted_records r ON (r.topic, r.partition, r."offset") = (u.topic, u.partition, o)
WHERE u.topic = %(topic)s AND u.partition = %(partition)s
  AND u.first_offset BETWEEN %(first)s - %(chunk)s AND %(last)s AND u.last_offset >= %(first)s
  AND o = ANY(%(offsets)s)
"""
_PARKED: LiteralString = """
SELECT "offset", parked_id, kind, reason, state, outcome FROM parked_records
WHERE topic = %(topic)s AND partition = %(partition)s AND "offset" = ANY(%(offsets)s)
"""
_ADJUSTED: LiteralString = """
SELECT adjustment_id, state, reason, counted_at, topic, partition, "offset" FROM adjustments
WHERE adjustment_id = ANY(%(ids)s)
"""
_FIRST: LiteralString = """
SELECT event_id, digest, source, partition, "offset" FROM seen_current WHERE event_id = ANY(%(ids)s)
UNION ALL
SELECT event_id, digest, source, partition, "offset" FROM seen_previous WHERE event_id = ANY(%(ids)s)
"""
#: Usage happens before it arrives, but for what is parked because it does not.
_PARKED_ELSEWHERE: LiteralString = """
SELECT topic, partition, "offset", arrived_at, value FROM parked_records
WHERE service = %(service)s AND tenant_id = %(tenant)s AND meter = ANY(%(meters)s)
  AND topic = ANY(%(topics)s) AND value IS NOT NULL
  AND (arrived_at >= %(arrived)s OR reason = 'timestamp_in_future')
ORDER BY topic, partition, "offset"
"""
_ADJUSTMENTS_HERE: LiteralString = """
SELECT a.*, i.dimensions FROM adjustments a LEFT JOIN items i USING (item_id)
WHERE a.tenant_id = %(tenant)s AND a.meter = ANY(%(meters)s) AND a.customer_ref = ANY(%(refs)s)
  AND a.occurred_at >= %(hour)s AND a.occurred_at < %(until)s
  AND NOT EXISTS (SELECT FROM parked_records p  -- of which more is kept
    WHERE (p.topic, p.partition, p."offset") = (a.topic, a.partition, a."offset")
      AND (p.service, p.tenant_id, p.meter) = (%(service)s, a.tenant_id, a.meter) AND p.value IS NOT NULL)
ORDER BY a.topic, a.partition, a."offset"
"""
