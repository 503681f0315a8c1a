"""Carry a replay out: read, add up, catch up with the counters, compare, and put right.

A dry run and an apply are the same until the end. A dry run compares inside a snapshot and keeps nothing. An
apply stores how far it got with every flush, so it goes on after a kill; it compares while every position is
locked and nobody else changes counters, which is for as long as the last few records take.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

import msgspec
import psycopg
import structlog
from confluent_kafka.admin import AdminClient
from psycopg import IsolationLevel

from services.archive.files import Archive
from services.counters.config import load_configuration, read_version
from services.counters.decisions import exclude_beside_the_log
from services.counters.ledger import GROUP
from services.counters.prepare import Preparer
from services.replay import comparing
from services.replay.comparing import Differences
from services.replay.log import Log, Range, forget_group, forget_groups
from services.replay.ranges import (
    Position,
    find_ranges,
    held_part,
    hours_of,
    read_positions,
    require_held,
)
from services.replay.recompute import Connection, Recount
from services.streaming.chunks import Partition
from services.streaming.database import BULK_OPTIONS, TRANSIENT_ERRORS
from services.streaming.faults import fault_point
from services.streaming.outbox import enqueue
from services.streaming.parking import audit
from services.streaming.replay_plan import (
    HOURS_SHOWN,
    Plan,
    PlannedHour,
    PlannedItem,
    PlannedPeriod,
    PlannedRange,
    PlannedTotal,
)
from services.streaming.replays import (
    ALWAYS,
    NEVER_ENDING,
    RefusedReplay,
    ReplayRequest,
    Scope,
    everything,
    resolve,
)
from services.wire.errors import Transient
from services.wire.pgarrays import register
from services.wire.records import ops_event
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.times import instant
from upcasters.chain import upcasters

GROUP_PREFIX = "tidemeter-replay"
#: An apply that nobody has seen the plan of changes at most so many hours, unless forced.
CHANGES_MAX = 10_000
#: Few enough to be read while counting waits.
_TAIL_RECORDS = 2_000
_FLUSH_SECONDS = 5.0
_RESTARTS_MAX = 5

#: Told how many records were read, and of how many.
Progress = Callable[[int, int], None]

log = structlog.get_logger(__name__)


class Cancelled(Exception):
    """Somebody has stopped it."""


class _CalendarsMoved(Exception):
    """What was added up is in periods that are no more."""


@dataclass(slots=True)
class State:
    """How far a replay got: everything a flush has to keep."""

    since_us: int
    until_us: int
    ranges: list[Range]
    left: list[Range]
    to: dict[Partition, int]
    basis: int
    read: int = 0
    matched: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)

    def dump(self) -> str:
        return json.dumps(
            {
                "window": [self.since_us, self.until_us],
                "ranges": [[*one.tp, one.start, one.end] for one in self.ranges],
                "left": [[*one.tp, one.start, one.end] for one in self.left],
                "to": [[*tp, offset] for tp, offset in self.to.items()],
                "basis": self.basis,
                "read": self.read,
                "matched": self.matched,
                "unreadable": self.unreadable,
            }
        )

    @staticmethod
    def load(kept: Mapping[str, Any]) -> State:
        def ranges(rows: Sequence[Sequence[Any]]) -> list[Range]:
            return [Range(Partition(topic, number), start, end) for topic, number, start, end in rows]

        since_us, until_us = kept["window"]
        return State(
            since_us,
            until_us,
            ranges(kept["ranges"]),
            ranges(kept["left"]),
            {Partition(topic, number): offset for topic, number, offset in kept["to"]},
            kept["basis"],
            kept["read"],
            kept["matched"],
            Counter(kept["unreadable"]),
        )


class Replayer:
    """Carries replays out, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._archive = None if settings.archive_url is None else Archive(settings.archive_url)
        self._preparer = Preparer(decoder_for(settings), upcasters())
        self._swept = False

    def connect(self) -> Connection:
        """A connection for this work: its statements read whole tables, unlike the workers'."""
        db = psycopg.connect(
            self._settings.postgres(),
            autocommit=True,
            application_name="tidemeter-replay",
            connect_timeout=5,
            options=BULK_OPTIONS,
        )
        # The hash of a plan is of texts, so times are written alike everywhere, whatever PGTZ says.
        db.execute("SET timezone = 'UTC'")
        register(db)
        return db

    # -- Dry run -------------------------------------------------------------------------------------------

    def dry_run(
        self,
        request: ReplayRequest,
        *,
        now: datetime | None = None,
        progress: Progress = lambda *_: None,
        scope: Scope | None = None,
    ) -> Plan:
        """What an apply of ``request`` would do now. Changes no row, offset or topic.

        Raises:
            RefusedReplay: there can be no such replay.
            TRANSIENT_ERRORS: Kafka or PostgreSQL is away.
        """
        with self.connect() as db:
            scope = scope or resolve(db, request, now or datetime.now(UTC))
            source = Log(self._settings.kafka(), f"{GROUP_PREFIX}-dry-run", self._archive)
            try:
                comparing.prepare_tables(db, dry=True)
                work = _Work(self, db, source, scope, force=request.force, progress=progress)
                work.begin()
                work.scan()
                work.catch_up()
                for table in ("replay_items", "replay_buckets", "replay_values"):
                    db.execute(f"ANALYZE {table}")  # noqa: S608  constants only
                db.isolation_level, db.read_only = IsolationLevel.REPEATABLE_READ, True
                with db.transaction():
                    found = work.finish()
                    return work.plan(found, comparing.totals(db, work.scope))
            finally:
                source.close()

    # -- Apply ---------------------------------------------------------------------------------------------

    def step(self, db: Connection, progress: Progress = lambda *_: None) -> int | None:
        """Carry out the oldest replay that is asked for; returns its id, or None: there is none, or somebody
        else is at work.

        Raises:
            TRANSIENT_ERRORS: Kafka or PostgreSQL is away; the next step goes on with it.
        """
        held = db.execute("SELECT pg_try_advisory_lock(hashtextextended('tidemeter/replay', 0))").fetchone()
        if held is None or not held[0]:
            return None
        try:
            rows = db.execute(
                "SELECT replay_id FROM replays WHERE finished_at IS NULL ORDER BY replay_id"
            ).fetchall()
            replay_ids = [int(row[0]) for row in rows]
            if not self._swept:  # also of one that was killed when it had just ended
                self._forget_groups(replay_ids)
            if not rows:
                return None
            self._carry_out(db, replay_ids[0], progress)
            return replay_ids[0]
        finally:
            if not db.closed:
                db.execute("SELECT pg_advisory_unlock(hashtextextended('tidemeter/replay', 0))")

    def _forget_groups(self, running: Sequence[int]) -> None:
        admin = AdminClient({"bootstrap.servers": self._settings.kafka(), "socket.timeout.ms": 10_000})
        forget_groups(admin, f"{GROUP_PREFIX}-", [f"{GROUP_PREFIX}-{replay_id}" for replay_id in running])
        self._swept = True

    def _carry_out(self, db: Connection, replay_id: int, progress: Progress) -> None:
        group = f"{GROUP_PREFIX}-{replay_id}"
        source = Log(self._settings.kafka(), group, self._archive)
        try:
            try:
                for _ in range(_RESTARTS_MAX):
                    try:
                        self._try(db, source, replay_id, progress)
                        break
                    except _CalendarsMoved:
                        log.info("billing periods have changed: the replay begins again", replay_id=replay_id)
                        with db.transaction():
                            comparing.clear(db)
                            db.execute(
                                "UPDATE replays SET progress = '{}' WHERE replay_id = %s", (replay_id,)
                            )
                else:
                    raise RefusedReplay("periods_unsettled", "billing periods keep changing: try again later")
            except Cancelled:
                with db.transaction():
                    comparing.clear(db)
            except RefusedReplay as error:
                self._end(db, replay_id, "refused", f"{error.code}: {error}")
            except TRANSIENT_ERRORS:
                raise
            except Exception as error:
                log.error("replay failed", replay_id=replay_id, exc_info=error)
                self._end(db, replay_id, "failed", f"defect: {type(error).__name__}")
            source.close()  # with its commits: one that came later would bring the group back
            try:
                forget_group(source.admin, group)
            except Transient:
                self._swept = False  # the next step does it
        finally:
            source.close()

    def _try(self, db: Connection, source: Log, replay_id: int, progress: Progress) -> None:
        row = db.execute(
            "UPDATE replays SET state = 'running', started_at = coalesce(started_at, now()) "
            "WHERE replay_id = %s AND finished_at IS NULL RETURNING request, progress, requested_by",
            (replay_id,),
        ).fetchone()
        if row is None:
            raise Cancelled
        request, kept, by = msgspec.convert(row[0], ReplayRequest), row[1], row[2]
        whole = request == ReplayRequest(mode="apply", plan_hash=request.plan_hash, force=request.force)
        scope = everything() if whole else resolve(db, request, datetime.now(UTC))
        comparing.prepare_tables(db, dry=False)
        comparing.forget(db)
        work = _Work(self, db, source, scope, force=request.force, progress=progress, replay_id=replay_id)
        if kept:
            work.go_on(State.load(kept))
        else:
            with db.transaction():
                comparing.clear(db)
            work.begin()
            work.save()
        work.scan()
        work.catch_up()
        for table in ("replay_items", "replay_buckets", "replay_values"):
            db.execute(f"ANALYZE {table}")  # noqa: S608  constants only
        preview, totals = work.preview()
        if preview.any:
            work.catch_up()  # that took a while, and counting shall wait for little
        with db.transaction():
            if preview.any:  # else nobody has to wait
                exclude_beside_the_log(db)
                found = work.finish(lock=True)
                fault_point("replay.locked")
                if comparing.moved_calendars(db):
                    raise _CalendarsMoved
            else:
                found = preview
            plan = work.plan(found, totals)
            self._check(db, request, plan, found)
            if found.any:
                comparing.lock_changed(db)
                comparing.correct(db, work.scope, found, only=True)
            self._finish(db, replay_id, plan, by)
            comparing.clear(db)
            fault_point("replay.before_commit")
        fault_point("replay.after_commit")

    @staticmethod
    def _check(db: Connection, request: ReplayRequest, plan: Plan, found: Differences) -> None:
        if request.plan_hash is not None and request.plan_hash != found.digest:
            if not found.any and _was_done(db, request):
                return
            raise RefusedReplay(
                "plan_stale",
                "the counters are no longer as this plan found them: make a new dry run",
                path="planHash",
            )
        if plan.unreadable and not request.force:
            number = sum(plan.unreadable.values())
            raise RefusedReplay(
                "records_unreadable",
                f"{number} records counted once and cannot be counted by this release "
                f"({', '.join(sorted(plan.unreadable))}): they would be taken out of the counters; "
                "mend the release, or force it",
                path="force",
            )
        if found.buckets > CHANGES_MAX and request.plan_hash is None and not request.force:
            raise RefusedReplay(
                "changes_too_many",
                f"{found.buckets} hours would change, more than {CHANGES_MAX}: look at a dry run and give "
                "its planHash, or force it",
                path="planHash",
            )

    def _finish(self, db: Connection, replay_id: int, plan: Plan, by: str) -> None:
        changed = db.execute(
            "UPDATE replays SET state = 'done', finished_at = now(), result = %s, progress = '{}', "
            "records_read = %s WHERE replay_id = %s AND state = 'running'",
            (msgspec.json.encode(plan).decode(), plan.records_read, replay_id),
        )
        if changed.rowcount != 1:
            raise Cancelled
        numbers = {
            "records": plan.records_read,
            "hours": plan.changed_hours,
            "items": plan.changed_items,
            "values": plan.changed_values,
            "watermarks": plan.changed_watermarks,
            "periods": plan.changed_periods,
        }
        audit(db, by, "replay.apply", str(replay_id), {**numbers, "plan_hash": plan.plan_hash})
        event = ops_event(
            "replay_applied",
            subject_type="replay",
            subject_id=str(replay_id),
            source="replay",
            at_us=time.time_ns() // 1000,
            attributes={name: str(number) for name, number in numbers.items()},
        )
        enqueue(db, GROUP, [event])

    def _end(self, db: Connection, replay_id: int, state: str, error: str) -> None:
        with db.transaction():
            comparing.clear(db)
            changed = db.execute(
                "UPDATE replays SET state = %s, error = %s, finished_at = now(), progress = '{}' "
                "WHERE replay_id = %s AND finished_at IS NULL",
                (state, error, replay_id),
            )
            if changed.rowcount and state == "failed":
                event = ops_event(
                    "replay_failed",
                    subject_type="replay",
                    subject_id=str(replay_id),
                    source="replay",
                    at_us=time.time_ns() // 1000,
                    attributes={"reason": error.partition(":")[2].strip()},
                )
                enqueue(db, GROUP, [event])


def _was_done(db: Connection, request: ReplayRequest) -> bool:
    """Whether a replay has done exactly this before."""
    row = db.execute(
        "SELECT EXISTS (SELECT FROM replays WHERE state = 'done' AND tenant_id IS NOT DISTINCT FROM %s "
        "AND result ->> 'planHash' = %s)",
        (request.tenant_id, request.plan_hash),
    ).fetchone()
    return bool(row and row[0])


class _Work:
    """One replay while it runs. ``replay_id`` None: a dry run, which keeps no state."""

    def __init__(
        self,
        replayer: Replayer,
        db: Connection,
        source: Log,
        scope: Scope,
        *,
        force: bool,
        progress: Progress,
        replay_id: int | None = None,
    ) -> None:
        self._replayer, self._db, self._log, self.scope = replayer, db, source, scope
        self._force, self._progress, self._replay_id = force, progress, replay_id
        self._begins: dict[Partition, int] = {}
        self._flushed_at = time.monotonic()

    def begin(self) -> None:
        """Find what has to be read.

        Raises:
            RefusedReplay: it is not there any more, or too much.
        """
        db = self._db
        basis, positions = self._look(db)
        self.scope = hours_of(db, self._log, self.scope, positions)
        held = require_held(db, self._log, self.scope, positions)
        self._begins = dict(held.begins)
        ranges, _ = held_part(find_ranges(db, self.scope, positions), held)
        records = sum(one.records for one in ranges)
        limit = self._replayer._settings.replay_records_max
        if records > limit and not self._force:
            raise RefusedReplay(
                "window_too_large",
                f"{records} records would be read, more than TIDEMETER_REPLAY_RECORDS_MAX allows ({limit}): "
                "narrow the window, or force it",
                path="since",
            )
        to = {tp: position.next for tp, position in positions.items()}
        self.state = State(self.scope.since_us, self.scope.until_us, ranges, list(ranges), to, basis)
        self._recount()
        if self._replay_id is not None:
            self._log.commit({one.tp: one.start for one in reversed(ranges)})

    def go_on(self, state: State) -> None:
        """Take up what a killed process left."""
        self.scope = self.scope.within(state.since_us, state.until_us)
        self.state = state
        positions = read_positions(self._db)
        held = require_held(self._db, self._log, self.scope, positions)
        self._begins = dict(held.begins)
        state.left, _ = held_part(state.left, held)
        self._recount()
        self.recount.matched, self.recount.unreadable = state.matched, state.unreadable

    def _recount(self) -> None:
        self.recount = Recount(
            self._replayer._preparer,
            load_configuration(self._db),
            self.scope,
            basis=self.state.basis,
            now_us=time.time_ns() // 1000,
        )

    def scan(self) -> None:
        """Read everything that is left, and add it up."""
        state = self.state
        total = state.read + sum(one.records for one in state.left)
        while state.left:
            one = state.left[0]
            for batch in self._log.read(one, self._begins[one.tp]):
                self.recount.take(self._db, one.tp, batch)
                state.read += len(batch)
                state.left[0] = Range(one.tp, batch[-1].offset() + 1, one.end)
                self._progress(state.read, total)
                overdue = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
                if self.recount.full or (overdue and self._replay_id is not None):
                    self.save(total)
            state.left.pop(0)
        self.save(total)

    def save(self, total: int = 0) -> None:
        """Write what was added up and how far that is, at once.

        Raises:
            Cancelled: somebody has stopped it.
        """
        state, recount, db = self.state, self.recount, self._db
        state.basis, state.matched, state.unreadable = recount.basis, recount.matched, recount.unreadable
        with db.transaction():
            recount.flush(db)
            if self._replay_id is not None:
                changed = db.execute(
                    "UPDATE replays SET progress = %s, records_read = %s, "
                    "records_total = greatest(records_total, %s) "
                    "WHERE replay_id = %s AND state = 'running'",
                    (state.dump(), state.read, total, self._replay_id),
                )
                if changed.rowcount != 1:
                    raise Cancelled
                fault_point("replay.before_flush")
        if self._replay_id is not None:
            fault_point("replay.after_flush")
            self._log.commit({one.tp: one.start for one in reversed(state.left)})
        self._flushed_at = time.monotonic()

    def catch_up(self) -> None:
        """Read what was counted meanwhile, until it is little."""
        for _ in range(20):
            basis, positions = self._look(self._db)
            tail = self._missing(self._db, basis, positions)
            if not tail:
                return
            self.state.left = tail
            self.scan()
            if sum(one.records for one in tail) <= _TAIL_RECORDS:
                return

    def preview(self) -> tuple[Differences, list[Any]]:
        """What :meth:`finish` would find now, while everything goes on, and the totals by meter. It names the
        candidates: what is equal now is not damaged by those who go on."""
        db, state, recount = self._db, self.state, self.recount
        self.save()
        kept = dict(state.to), state.read, recount.basis, recount.matched, Counter(recount.unreadable)
        db.isolation_level = IsolationLevel.REPEATABLE_READ
        try:
            with db.transaction(force_rollback=True):
                found = self.finish()
                items, totals = comparing.changed_items(db), comparing.totals(db, self.scope)
        finally:
            if not db.closed:
                db.isolation_level = None
            state.to, state.read, recount.basis, recount.matched, recount.unreadable = kept
        comparing.set_candidates(db, items)
        return found, totals

    def finish(self, *, lock: bool = False) -> Differences:
        """The rest, inside the transaction that compares; with ``lock`` counting waits, and only candidates
        are compared."""
        db = self._db
        positions = read_positions(db, lock=lock)
        for one in self._missing(db, _basis(db), positions):
            for batch in self._log.read(one, self._begins[one.tp]):
                self.recount.take(db, one.tp, batch)
                self.state.read += len(batch)
                if self.recount.full:
                    self.recount.flush(db)
        self.recount.flush(db)
        self.recount.take_adjustments(db)
        return comparing.compare(db, self.scope, only=lock)

    def _look(self, db: Connection) -> tuple[int, dict[Partition, Position]]:
        """Where counting stands; every re-drive up to the basis is committed."""
        with db.transaction():
            exclude_beside_the_log(db)
            return _basis(db), read_positions(db)

    def _missing(self, db: Connection, basis: int, positions: Mapping[Partition, Position]) -> list[Range]:
        """Count what re-drives counted since the last look; returns what chunks did."""
        state = self.state
        if read_version(db) != self.recount.config_version:
            self.recount.configure(load_configuration(db))
        rows = db.execute(
            'SELECT topic, partition, "offset" FROM recounted_records '
            "WHERE recount_id > %s AND recount_id <= %s ORDER BY 1, 2, 3",
            (self.recount.basis, basis),
        ).fetchall()
        for (topic, number), group in groupby(rows, key=lambda row: (row[0], row[1])):
            tp = Partition(topic, number)
            offsets = [row[2] for row in group if row[2] < state.to.get(tp, 0)]
            if not all(self._is_held(tp, offset) for offset in offsets):
                # A parked record outlives the log. By now the blocks know when it happened.
                require_held(db, self._log, self.scope, positions)
                offsets = [offset for offset in offsets if self._is_held(tp, offset)]
            for start, end in _runs(offsets):
                for batch in self._log.read(Range(tp, start, end), self._begins.get(tp, 0)):
                    self.recount.take(db, tp, batch, frozenset(offsets))
        self.recount.basis = basis
        tail = []
        for tp, position in positions.items():
            start = state.to.get(tp, position.start)
            if start < position.next:
                if position.decided > start:
                    raise RefusedReplay(
                        "window_not_held",
                        f"an older release has counted records of {tp.topic}/{tp.partition} meanwhile, and "
                        "they cannot be replayed",
                        path="since",
                    )
                self._begins.setdefault(tp, 0)
                tail.append(Range(tp, start, position.next))
            state.to[tp] = position.next
        return tail

    def _is_held(self, tp: Partition, offset: int) -> bool:
        """Whether log or archive has it."""
        archive = self._log.archive
        return offset >= self._begins.get(tp, 0) or (
            archive is not None and any(start <= offset < end for start, end in archive.held(tp))
        )

    def plan(self, found: Differences, totals: Sequence[Any]) -> Plan:
        """What was found, as it is shown."""
        db, scope, recount = self._db, self.scope, self.recount
        rows = comparing.changes(db, HOURS_SHOWN)
        items = []
        for _, group in groupby(rows, key=lambda row: row.item_id):
            hours = list(group)
            first = hours[0]
            before, after = sum(row.before for row in hours), sum(row.after for row in hours)
            items.append(
                PlannedItem(
                    first.tenant_id,
                    first.customer_ref,
                    first.meter,
                    first.dimensions,
                    _plain(before),
                    _plain(after),
                    _plain(after - before),
                    [
                        PlannedHour(
                            row.hour_start.astimezone(UTC),
                            row.period_start.astimezone(UTC),
                            _plain(row.before),
                            _plain(row.after),
                            _plain(row.after - row.before),
                            row.events_before,
                            row.events_after,
                        )
                        for row in hours
                    ],
                )
            )
        return Plan(
            since=None if scope.since_us <= ALWAYS else instant(scope.since_us),
            until=None if scope.until_us >= NEVER_ENDING else instant(scope.until_us),
            ranges=[PlannedRange(*one.tp, one.start, one.end) for one in self.state.ranges],
            records_read=self.state.read,
            events_matched=recount.matched,
            unreadable=dict(recount.unreadable),
            changed_hours=found.buckets,
            changed_items=found.items,
            changed_values=found.values,
            changed_watermarks=found.watermarks,
            changed_periods=found.periods,
            items=items,
            periods=[
                PlannedPeriod(
                    row.tenant_id,
                    row.customer_ref,
                    row.meter,
                    row.period_start.astimezone(UTC),
                    _plain(row.pushed),
                    _plain(row.sent),
                )
                for row in comparing.periods(db, HOURS_SHOWN)
            ],
            truncated=found.buckets > len(rows) or found.periods > HOURS_SHOWN,
            totals=[
                PlannedTotal(
                    row.tenant_id,
                    row.meter,
                    row.events_before,
                    row.events_after,
                    _plain(row.before),
                    _plain(row.after),
                )
                for row in totals
            ],
            plan_hash=found.digest,
        )


def _basis(db: Connection) -> int:
    row = db.execute("SELECT coalesce(max(recount_id), 0) FROM recounted_records").fetchone()
    return int(row[0]) if row else 0


def _runs(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Few ranges that hold these ascending offsets."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][1] < 1000:
            runs[-1] = runs[-1][0], offset + 1
        else:
            runs.append((offset, offset + 1))
    return runs


def _plain(value: Decimal | int) -> Decimal:
    """Without an exponent, and without trailing zeros."""
    normal = Decimal(value).normalize()
    return Decimal(f"{normal:f}")
