"""Why does Stripe hold this number for this customer in this hour? From its meter events down to the log.

Everything is looked at in one read-only snapshot; the records of the hour are found by ``log_blocks``, read
from Kafka and the archive, and added up again by the counters' own rules, apart from them. Nothing is changed
anywhere but in temporary tables. Memory does not grow with the hour: lists are cut, numbers are not.

``python -m services.replay.explaining`` answers one question in a process of its own: see ``answering``.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby, islice
from typing import Any, LiteralString
from uuid import UUID

import msgspec
import psycopg
from psycopg import IsolationLevel

from services.archive.files import Archive
from services.counters.config import load_configuration
from services.counters.prepare import Preparer
from services.replay import comparing
from services.replay.answering import answer_one
from services.replay.customer_hours import (
    ZERO,
    Connection,
    CustomerHour,
    Items,
    RefusedQuestion,
    find_adjusted,
    find_at_stripe,
    find_items,
    find_sent,
    number,
    resolve,
    stream,
    utc,
    utc_or_none,
)
from services.replay.fates import Events
from services.replay.log import Log
from services.replay.ranges import Held, Position, find_held, find_ranges, held_part, read_positions
from services.replay.recompute import Recount
from services.replay.verdicts import (
    HourNumbers,
    PeriodNumbers,
    check_events,
    check_period,
    check_pushes,
)
from services.streaming.chunks import Partition
from services.streaming.database import TRANSIENT_ERRORS
from services.streaming.explanation import (
    Bucket,
    Check,
    Explained,
    Explanation,
    Question,
    Records,
    Totals,
)
from services.streaming.lag import log_ends
from services.streaming.replay_plan import Refusal
from services.streaming.replays import Scope
from services.wire.pgarrays import register
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.times import instant
from upcasters.chain import upcasters

GROUP = "tidemeter-explain"

#: Told how many records were read, and of how many.
Progress = Callable[[int, int], None]

_ITEMS_AT_ONCE = 500


class Explainer:
    """Answers questions, one at a time."""

    def __init__(self, settings: Settings, archive: Archive | None = None) -> None:
        self._settings = settings
        if archive is None and settings.archive_url is not None:
            archive = Archive(settings.archive_url)
        self._archive = archive
        self._preparer = Preparer(decoder_for(settings), upcasters())

    def explain(
        self,
        question: Question,
        *,
        now: datetime | None = None,
        progress: Progress = lambda *_: None,
    ) -> Explanation:
        """The answer, as of now.

        Raises:
            RefusedQuestion: there is no such customer, meter or hour, or too much would have to be read.
            TRANSIENT_ERRORS: Kafka or PostgreSQL is away.
        """
        with self._connect() as db:
            comparing.prepare_tables(db, dry=True)
            db.isolation_level, db.read_only = IsolationLevel.REPEATABLE_READ, True
            with db.transaction():
                asked = resolve(db, question, now or datetime.now(UTC))
                source = Log(self._settings.kafka(), GROUP, self._archive)
                try:
                    hour = _Hour(self._settings, self._preparer, db, source, asked, question, progress)
                    return hour.explain()
                finally:
                    source.close()

    def _connect(self) -> Connection:
        db = psycopg.connect(
            self._settings.postgres(),
            autocommit=True,
            application_name="tidemeter-explain",
            connect_timeout=5,
            options="-c idle_in_transaction_session_timeout=120000 -c jit=off",
        )
        register(db)
        return db


@dataclass(slots=True)
class _Checks:
    """At most ``limit`` of them, those that do not agree before the others; all are counted."""

    limit: int
    numbers: Counter[str] = field(default_factory=Counter)
    _wrong: list[Check] = field(default_factory=list)
    _right: list[Check] = field(default_factory=list)

    def add(self, check: Check) -> None:
        self.numbers[check.verdict] += 1
        kept = self._right if check.verdict in ("agree", "explained") else self._wrong
        if len(kept) < self.limit:
            kept.append(check)

    def listed(self) -> list[Check]:
        return [*self._wrong, *self._right][: self.limit]


class _Hour:
    """One question while it is answered, inside its snapshot."""

    def __init__(
        self,
        settings: Settings,
        preparer: Preparer,
        db: Connection,
        source: Log,
        asked: CustomerHour,
        question: Question,
        progress: Progress,
    ) -> None:
        self._settings, self._db, self._log, self._asked = settings, db, source, asked
        self._question, self._progress = question, progress
        self._events = Events(db, asked, preparer, question.limit)
        self._scope = Scope(asked.tenant_id, tuple(asked.meters), None).within(asked.since_us, asked.until_us)
        basis = db.execute("SELECT coalesce(max(recount_id), 0) FROM recounted_records").fetchone()
        self._recount = Recount(
            preparer,
            load_configuration(db),
            self._scope,
            basis=basis[0] if basis else 0,
            now_us=time.time_ns() // 1000,
        )
        self._checks = _Checks(question.limit)
        self._buckets: list[Bucket] = []
        self._bucket_number = 0

    def explain(self) -> Explanation:
        """Read and add up; then compare."""
        db, asked, limit = self._db, self._asked, self._question.limit
        records = self._read()
        items = find_items(db, asked, limit)
        whole = records.complete and not records.unreadable
        for rows in _runs(stream(db, _BUCKETS, {"items": items.ids, "hour": asked.hour})):
            self._check(items, rows, whole=whole)
        sent = find_sent(db, asked, items, limit)
        adjustments, adjusted = find_adjusted(db, asked, limit)
        events = sorted(self._events.listed, key=lambda one: (one.topic, one.partition, one.offset))
        totals = Totals(
            items=len(items.ids),
            intents=sent.numbers[0],
            deltas=sent.numbers[1],
            carried=sent.numbers[2],
            buckets=self._bucket_number,
            events=self._events.fates.total(),
            adjustments=adjusted,
            checks=dict(self._checks.numbers),
        )
        checks = self._checks.listed()
        lists: tuple[Sequence[Any], ...] = (
            *(items.shown, sent.intents, sent.deltas, sent.carried, self._buckets, events, adjustments),
            checks,
        )
        counted = (totals.items, *sent.numbers, totals.buckets, totals.events, totals.adjustments)
        return Explanation(
            tenant_id=asked.tenant_id,
            hour=asked.hour,
            stripe_customer=asked.stripe_customer,
            event_name=asked.event_name,
            customer_refs=list(asked.customer_refs),
            meters=list(asked.meters),
            stripe=find_at_stripe(db, asked, items, with_others=self._question.others),
            items=items.shown,
            intents=sent.intents,
            deltas=sent.deltas,
            carried=sent.carried,
            buckets=self._buckets,
            events=events,
            fates=dict(sorted(self._events.fates.items())),
            adjustments=adjustments,
            records=records,
            checks=checks,
            totals=totals,
            truncated=tuple(map(len, lists)) != (*counted, self._checks.numbers.total()),
        )

    # -- The log -------------------------------------------------------------------------------------------

    def _read(self) -> Records:
        """Read every record that may be of the hour, list it, and add it up."""
        db, log, events = self._db, self._log, self._events
        positions = read_positions(db)
        held = find_held(db, log, positions)
        waiting = sum(max(0, end - positions[tp].next) for tp, end in log_ends(log.admin, positions).items())
        ranges, missing = held_part(find_ranges(db, self._scope, positions), held)
        total = sum(one.records for one in ranges)
        if total > self._settings.replay_records_max:
            raise RefusedQuestion(
                "hour_too_large",
                f"{total} records would be read, more than TIDEMETER_REPLAY_RECORDS_MAX allows "
                f"({self._settings.replay_records_max})",
                "hour",
            )
        read = 0
        for one in ranges:
            begins = held.begins[one.tp]
            for batch in log.read(one, begins):
                # A batch is of the archive or of Kafka, never of both.
                kept = events.take(one.tp, batch, "archive" if batch[0].offset() < begins else "kafka")
                if kept:
                    self._recount.take(db, one.tp, kept)
                if self._recount.full:
                    self._recount.flush(db)
                read += len(batch)
                self._progress(read, total)
        events.take_kept(ranges)
        self._recount.flush(db)
        for ref in self._asked.customer_refs:
            self._recount.scope = replace(self._scope, customer_ref=ref)
            self._recount.take_adjustments(db)
        complete = not missing and not self._undecided(positions, held)
        unreadable = events.unreadable + self._recount.unreadable
        earliest = None if complete or held.earliest is None else instant(held.earliest)
        return Records(
            read=read,
            complete=complete,
            missing=missing,
            earliest=earliest,
            unreadable=dict(sorted(unreadable.items())),
            waiting=waiting,
            sentence=_told(complete, missing, earliest, unreadable.total(), waiting),
        )

    def _undecided(self, positions: Mapping[Partition, Position], held: Held) -> bool:
        """Whether a release that kept no decisions may have counted usage of the hour: no block tells."""
        return any(
            position.decided > position.start and self._asked.since_us < held.lost_until.get(tp, 0)
            for tp, position in positions.items()
        )

    # -- The numbers ---------------------------------------------------------------------------------------

    def _check(self, items: Items, rows: Sequence[Any], *, whole: bool) -> None:
        """List the buckets of some items, and compare them with the log and with what was sent."""
        db, hour = self._db, self._asked.hour
        values = {"items": [row.item_id for row in rows], "hour": hour}
        reported: dict[UUID, Decimal] = {}
        unsettled: dict[UUID, dict[str, Decimal]] = {}
        for item_id, state, amount in db.execute(_STATES, values).fetchall():
            if state == "reported":
                reported[item_id] = amount
            else:
                unsettled.setdefault(item_id, {})[state] = amount
        carried = {row[0]: row[1:] for row in db.execute(_CARRIED, values).fetchall()}
        newest = {row[0]: row[1:] for row in db.execute(_NEWEST, values).fetchall()}
        for item_id, group in groupby(rows, key=lambda row: row.item_id):
            buckets = list(group)
            one = _numbers(items.places[item_id], buckets)
            one.carried_out, one.carried_in = carried.get(item_id, (ZERO, ZERO))
            if one.aggregation == "last":
                state, one.reported = newest.get(item_id, ("reported", ZERO))
                if state != "reported":
                    one.unsettled = {state: one.pushed - one.reported}
            else:
                one.reported = reported.get(item_id, ZERO)
                one.unsettled = unsettled.get(item_id, {})
            for row in buckets:
                self._list(items, row, whole=whole)
            if any(row.total is not None for row in buckets):
                self._checks.add(check_pushes(one))
        for row in db.execute(
            _PERIODS, {**values, "periods": sorted({row.period_start for row in rows})}
        ).fetchall():
            self._checks.add(check_period(PeriodNumbers(items.places[row[0]], utc(row[1]), *row[2:])))

    def _list(self, items: Items, row: Any, *, whole: bool) -> None:
        own = (number(row.own_total), row.own_events) if whole else None
        place, start = items.places[row.item_id], utc(row.period_start)
        total = ZERO if row.total is None else number(row.total)
        self._checks.add(check_events(place, start, (total, row.events or 0), own, row.aggregation))
        if row.total is None:  # it was added up, and there is no such bucket
            return
        self._bucket_number += 1
        if len(self._buckets) >= self._question.limit:
            return
        self._buckets.append(
            Bucket(
                item=place,
                period_start=start,
                period_end=utc_or_none(row.period_end),
                total=total,
                events=row.events,
                late_events=row.late_events,
                closed=None if row.closed is None else number(row.closed),
                pushed=number(row.pushed),
                sequence=row.sequence,
                open=row.open,
                carry=None if row.carry is None else number(row.carry),
                recomputed=None if own is None else own[0],
                recomputed_events=None if own is None else own[1],
            )
        )


def _told(complete: bool, missing: int, earliest: datetime | None, unreadable: int, waiting: int) -> str:
    if complete:
        sentence = "Every record that may be of this hour was read."
    else:
        lost = f"{missing} records that may be" if missing else "Records that may be"
        sentence = f"{lost} of this hour are neither in the log nor in the archive any more"
        since = "" if earliest is None else f"; everything is there from {earliest:%Y-%m-%dT%H:%M:%SZ} on"
        sentence += since + "."
    if unreadable:
        sentence += f" {unreadable} records counted once and cannot be read by this release."
    if waiting:
        sentence += f" {waiting} records of the log are not counted yet."
    return sentence


def _numbers(item: int, buckets: Sequence[Any]) -> HourNumbers:
    """Of the buckets of one item and hour. A value is no sum: of a ``last`` meter the newest counts."""
    kept = [row for row in buckets if row.total is not None]
    first = buckets[0]
    if first.aggregation == "last":
        kept = kept[-1:]
    return HourNumbers(
        item=item,
        aggregation=first.aggregation,
        scale=first.scale,
        billable=first.billable,
        total=sum((row.total for row in kept), ZERO),
        closed=sum((row.closed or ZERO for row in kept), ZERO),
        pushed=sum((row.pushed for row in kept), ZERO),
        open=any(row.open for row in kept),
    )


def _runs(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """The buckets of some hundred items at once, those of one item together."""
    groups = groupby(rows, key=lambda row: row.item_id)
    while part := [list(group) for _, group in islice(groups, _ITEMS_AT_ONCE)]:
        yield [row for group in part for row in group]


#: Buckets of the hour beside what was added up again; either may be missing. A value of a `unique` meter
#: counts in the earliest hour of its period.
_BUCKETS: LiteralString = """
SELECT x.*, p.period_end, p.carry, m.aggregation, m.scale,
       c.stripe_customer IS NOT NULL OR i.customer_ref ~ '^cus_[A-Za-z0-9_]+$' AS billable,
       CASE WHEN m.aggregation <> 'unique' THEN x.recounted ELSE (
           SELECT count(*) FROM replay_values v
           WHERE (v.item_id, v.hour_start, v.period_start) = (x.item_id, x.hour_start, x.period_start)
             AND NOT EXISTS (SELECT FROM unique_values u WHERE u.hour_start < v.hour_start
                 AND (u.item_id, u.period_start, u.value) = (v.item_id, v.period_start, v.value)))
       END AS own_total
FROM (SELECT coalesce(b.item_id, r.item_id) AS item_id, coalesce(b.hour_start, r.hour_start) AS hour_start,
             coalesce(b.period_start, r.period_start) AS period_start,
             b.total, b.events, b.late_events, b.closed, b.pushed, b.sequence, b.open,
             coalesce(r.total, 0) AS recounted, coalesce(r.events, 0) AS own_events
      FROM (SELECT * FROM buckets WHERE item_id = ANY(%(items)s) AND hour_start = %(hour)s) b
      FULL JOIN (SELECT * FROM replay_buckets WHERE hour_start = %(hour)s) r
      ON (b.item_id, b.hour_start, b.period_start) = (r.item_id, r.hour_start, r.period_start)) x
JOIN (SELECT item_id, tenant_id, customer_ref, meter FROM items WHERE item_id = ANY(%(items)s)
      UNION SELECT item_id, tenant_id, customer_ref, meter FROM replay_items) i USING (item_id)
JOIN meters m USING (tenant_id, meter)
LEFT JOIN customers c USING (tenant_id, customer_ref)
LEFT JOIN item_periods p ON (p.item_id, p.period_start) = (x.item_id, x.period_start)
ORDER BY x.item_id, x.period_start
"""
#: A failed intent that was released is back in its bucket, and what it held is no part of it any more.
_STATES: LiteralString = """
SELECT item_id, state, sum(amount) FROM meter_events
WHERE item_id = ANY(%(items)s) AND hour_start = %(hour)s AND state <> 'cancelled' AND released_at IS NULL
GROUP BY item_id, state
UNION ALL
SELECT d.item_id, 'not_recorded', sum(d.amount) FROM deltas d
WHERE d.item_id = ANY(%(items)s) AND d.hour_start = %(hour)s
  AND NOT EXISTS (SELECT FROM meter_events m WHERE m.identifier = d.identifier) GROUP BY d.item_id
"""
_CARRIED: LiteralString = """
SELECT item_id, coalesce(sum(amount) FILTER (WHERE hour_start = %(hour)s), 0),
       coalesce(sum(amount) FILTER (WHERE to_hour = %(hour)s), 0)
FROM carry_forwards WHERE item_id = ANY(%(items)s) AND (hour_start = %(hour)s OR to_hour = %(hour)s)
GROUP BY item_id
"""
#: Of `last` meters the state of the newest delta, and the newest value that was reported.
_NEWEST: LiteralString = """
SELECT DISTINCT ON (d.item_id) d.item_id,
    coalesce((SELECT m.state FROM meter_events m WHERE m.item_id = d.item_id AND m.hour_start = d.hour_start
              AND coalesce(m.replaces, m.identifier) = d.identifier ORDER BY m.replaces LIMIT 1),
             'not_recorded'),
    coalesce((SELECT m.amount FROM meter_events m
              JOIN deltas o ON o.identifier = coalesce(m.replaces, m.identifier)
              WHERE m.item_id = d.item_id AND m.hour_start = d.hour_start AND m.state = 'reported'
              ORDER BY o.period_start DESC, o.sequence DESC LIMIT 1), 0)
FROM deltas d WHERE d.item_id = ANY(%(items)s) AND d.hour_start = %(hour)s
ORDER BY d.item_id, d.period_start DESC, d.sequence DESC
"""
_PERIODS: LiteralString = """
SELECT b.item_id, b.period_start,
       CASE WHEN m.aggregation = 'max' THEN coalesce(p.value, 0) ELSE sum(coalesce(b.closed, 0)) END,
       sum(b.pushed),
       coalesce((SELECT sum(amount) FROM carry_forwards c
                 WHERE (c.item_id, c.period_start) = (b.item_id, b.period_start)), 0),
       coalesce((SELECT sum(amount) FROM carry_forwards c
                 WHERE (c.item_id, c.to_period) = (b.item_id, b.period_start)), 0),
       coalesce(p.carry, 0)
FROM buckets b JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter)
LEFT JOIN item_periods p USING (item_id, period_start)
WHERE b.item_id = ANY(%(items)s) AND b.period_start = ANY(%(periods)s) AND m.aggregation <> 'last'
GROUP BY b.item_id, b.period_start, m.aggregation, p.value, p.carry
ORDER BY b.item_id, b.period_start
"""


def answer(settings: Settings, question: Question) -> Explained:
    """The answer to one question, or why there is none."""
    try:
        found = Explainer(settings).explain(question)
    except RefusedQuestion as error:
        return Explained(refusal=Refusal(error.code, str(error), error.path))
    except TRANSIENT_ERRORS as error:
        return Explained(away="PostgreSQL" if isinstance(error, psycopg.Error) else "Kafka")
    return Explained(explanation=msgspec.Raw(msgspec.json.encode(found)))


if __name__ == "__main__":
    sys.exit(answer_one("explain", Question, answer))
