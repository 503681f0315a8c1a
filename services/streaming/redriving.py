"""Try parked records again: the part that is the same for every service that parks.

A re-drive is a row of ``redrives``. Each batch is one transaction: the records are tried, those that succeed
are settled, the others stay parked with their new reason, and the row says how far it got. So a kill loses
nothing and repeats nothing, any worker goes on where another stopped, and a record is counted once.

A dry run does the same and rolls the work back; only its results are kept.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg
import structlog

from schemas.catalog import CURRENT_VERSIONS
from services.streaming import outbox
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.streaming.parking import CHOSEN, KINDS, REDRIVABLE, RELEASE_REASONS, Choice, Kind, audit
from services.wire import metrics
from services.wire.records import ops_event
from services.wire.settings import Settings
from services.wire.times import micros

Connection = psycopg.Connection[Any]

BATCH_MAX = 500
#: A dry run holds its locks for this many records, so that it sees what earlier ones of them would do.
DRY_RUN_MAX = 10_000
AUTOMATIC = "automatic"
LOOK_SECONDS = 0.5
LOOK_FOR_FIXES_SECONDS = 15.0
OBSERVE_SECONDS = 15.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ParkedRecord:
    """One record to try again, as it was parked. ``timestamp`` is its arrival, milliseconds since 1970."""

    parked_id: int
    kind: Kind
    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    tenant_id: str
    meter: str

    @property
    def key(self) -> bytes | None:
        """Of no use any more: it only chose the partition."""
        return None


@dataclass(frozen=True, slots=True)
class Settled:
    """It was processed; ``outcome`` is what became of it."""

    outcome: str


@dataclass(frozen=True, slots=True)
class StillParked:
    """It cannot be processed yet, for this reason."""

    kind: Kind
    reason: str
    stage: str
    error_class: str = ""
    tenant_id: str = ""
    meter: str = ""
    event_id: str = ""


Verdict = Settled | StillParked
#: Tries records again inside the caller's transaction; a verdict by ``parked_id`` for each.
Retry = Callable[[Connection, Sequence[ParkedRecord], datetime], Mapping[int, Verdict]]


@dataclass(frozen=True, slots=True)
class _Job:
    redrive_id: int
    choice: Choice
    dry_run: bool
    next_id: int
    last_id: int
    tried: int
    results: Counter[str]


class Redrives:
    """Carries out the re-drives of one service, a batch at each :meth:`step`.

    ``tried_with`` names the schemas and upcasters of this release, and so what a new one may have cured.
    """

    def __init__(
        self,
        service: str,
        retry: Retry,
        *,
        tried_with: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.service = service
        self._retry = retry
        self._tried_with = tried_with
        self._clock = clock

    def step(self, db: Connection) -> int:
        """One batch of the oldest re-drive that nobody else works on; returns how many records it tried.

        A defect that a record brings to light pauses its re-drive: it must not stop the service.

        Raises:
            TRANSIENT_ERRORS: nothing was done; try again.
        """
        job: _Job | None = None
        try:
            with db.transaction():
                job = self._take(db)
                if job is None:
                    return 0
                tried = self._run(db, job)
                fault_point("redrive.before_commit")
            fault_point("redrive.after_commit")
            return tried
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:
            if job is None:
                raise
            log.error("re-drive paused by a defect", redrive_id=job.redrive_id, error=error, exc_info=error)
            self._pause(db, job.redrive_id, f"defect:{type(error).__name__}")
            return 0

    # -- One batch -----------------------------------------------------------------------------------

    def _take(self, db: Connection) -> _Job | None:
        row = db.execute(
            "SELECT redrive_id, choice, dry_run, next_id, last_id, tried, results FROM redrives "
            "WHERE service = %s AND state IN ('requested', 'running') "
            "ORDER BY redrive_id LIMIT 1 FOR UPDATE SKIP LOCKED",
            (self.service,),
        ).fetchone()
        if row is None:
            return None
        redrive_id, choice, dry_run, next_id, last_id, tried, results = row
        chosen = msgspec.convert(choice, Choice, strict=False)
        return _Job(redrive_id, chosen, dry_run, next_id, last_id, tried, Counter(results))

    def _run(self, db: Connection, job: _Job) -> int:
        if job.choice.automatic and (skew := version_skew(db, self.service)):
            self._pause(db, job.redrive_id, f"version_skew:{skew}")
            return 0
        if job.dry_run:
            with db.transaction(force_rollback=True):
                tried, next_id = 0, job.next_id
                while tried < DRY_RUN_MAX and (number := self._batch(db, job, next_id)):
                    tried, next_id = tried + number[0], number[1]
        else:
            number = self._batch(db, job, job.next_id)
            tried, next_id = number or (0, job.next_id)
        self._note(db, job, tried, next_id)
        return tried

    def _batch(self, db: Connection, job: _Job, next_id: int) -> tuple[int, int] | None:
        """Try the next records; how many, and the id after the last. None: there are no more."""
        automatic = f"AND {_FIXED}" if job.choice.automatic else ""
        rows = db.execute(
            f'SELECT p.parked_id, p.kind, p.topic, p.partition, p."offset", '  # noqa: S608  constants only
            f"(extract(epoch FROM p.arrived_at) * 1000)::bigint, p.value, p.headers, p.tenant_id, p.meter "
            f"FROM parked_records p WHERE p.service = %(service)s AND p.state = 'parked' "
            f"AND p.kind = ANY(%(redrivable)s) AND p.parked_id BETWEEN %(next)s AND %(last)s AND {CHOSEN} "
            f"{automatic} ORDER BY p.parked_id LIMIT %(limit)s FOR UPDATE OF p",
            {
                **job.choice.values(),
                **self._fix_values(),
                "redrivable": list(REDRIVABLE),
                "next": next_id,
                "last": job.last_id,
                "limit": BATCH_MAX,
            },
        ).fetchall()
        if not rows:
            return None
        records = [
            ParkedRecord(
                parked_id=row[0],
                kind=row[1],
                topic=row[2],
                partition=row[3],
                offset=row[4],
                timestamp=row[5],
                value=bytes(row[6] or b""),
                headers=_headers(row[7]),
                tenant_id=row[8],
                meter=row[9],
            )
            for row in rows
        ]
        now = self._clock()
        verdicts = self._retry(db, records, now)
        self._settle(db, verdicts, f"redrive:{job.redrive_id}", now)
        for verdict in verdicts.values():
            job.results[_result(verdict)] += 1
        return len(records), records[-1].parked_id + 1

    def _settle(self, db: Connection, verdicts: Mapping[int, Verdict], by: str, now: datetime) -> None:
        settled = {one: verdict.outcome for one, verdict in verdicts.items() if isinstance(verdict, Settled)}
        parked = {one: verdict for one, verdict in verdicts.items() if isinstance(verdict, StillParked)}
        db.execute(
            "UPDATE parked_records p SET state = 'redriven', outcome = u.o, attempts = attempts + 1, "
            "tried_at = %(now)s, tried_with = %(tried_with)s, settled_at = %(now)s, settled_by = %(by)s "
            "FROM unnest(%(ids)s::bigint[], %(outcomes)s::text[]) AS u (i, o) WHERE p.parked_id = u.i",
            {
                "ids": list(settled),
                "outcomes": list(settled.values()),
                "now": now,
                "by": by,
                "tried_with": self._tried_with,
            },
        )
        db.execute(
            "UPDATE parked_records p SET kind = u.k, reason = u.r, stage = u.s, error_class = u.c, "
            "tenant_id = u.t, meter = u.m, event_id = u.e, attempts = attempts + 1, tried_at = %s, "
            "tried_with = %s FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], "
            "%s::text[], %s::text[], %s::text[]) AS u (i, k, r, s, c, t, m, e) WHERE p.parked_id = u.i",
            (
                now,
                self._tried_with,
                list(parked),
                [one.kind for one in parked.values()],
                [one.reason for one in parked.values()],
                [one.stage for one in parked.values()],
                [one.error_class for one in parked.values()],
                [one.tenant_id for one in parked.values()],
                [one.meter for one in parked.values()],
                [one.event_id for one in parked.values()],
            ),
        )

    def _note(self, db: Connection, job: _Job, tried: int, next_id: int) -> None:
        """How far it got; at its end, what it did."""
        done = tried == 0
        now = self._clock()
        db.execute(
            "UPDATE redrives SET state = %s, next_id = %s, tried = tried + %s, results = %s, "
            "finished_at = %s WHERE redrive_id = %s",
            (
                "done" if done else "running",
                next_id,
                tried,
                json.dumps(dict(job.results)),
                now if done else None,
                job.redrive_id,
            ),
        )
        if done and not job.dry_run:
            self._tell(db, "parked_redriven", job.redrive_id, now, _texts(job.results))

    def _pause(self, db: Connection, redrive_id: int, reason: str) -> None:
        with db.transaction():
            changed = db.execute(
                "UPDATE redrives SET state = 'paused', paused_reason = %s "
                "WHERE redrive_id = %s AND state IN ('requested', 'running')",
                (reason, redrive_id),
            )
            if changed.rowcount:
                self._tell(db, "redrive_paused", f"{redrive_id}/{reason}", self._clock(), {"reason": reason})

    def _tell(
        self, db: Connection, name: str, subject: object, now: datetime, attributes: Mapping[str, str]
    ) -> None:
        event = ops_event(
            name,
            subject_type="redrive",
            subject_id=str(subject),
            source=self.service.removeprefix("tidemeter-"),
            at_us=micros(now),
            attributes=attributes,
        )
        outbox.enqueue(db, self.service, [event])

    # -- By itself -----------------------------------------------------------------------------------

    def look_for_fixes(self, db: Connection) -> int:
        """Ask for a re-drive of what a fix may be there for; returns how many records that is.

        A fix is a meter that exists now, or a release with other schemas or upcasters. While records wait
        that were written by a newer release than this, nothing is tried: this release is what has to change.
        """
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"redrive/{self.service}",))
            if skew := version_skew(db, self.service):
                log.warning("re-drives wait for a newer release", schema=skew)
                return 0
            db.execute(
                "UPDATE redrives SET state = 'running', paused_reason = NULL WHERE service = %s "
                "AND state = 'paused' AND paused_reason LIKE 'version_skew:%%'",
                (self.service,),
            )
            row = db.execute(
                f"SELECT count(*), coalesce(max(p.parked_id), 0) FROM parked_records p "  # noqa: S608
                f"WHERE p.service = %(service)s AND p.state = 'parked' AND {_FIXED} "
                f"AND NOT EXISTS (SELECT FROM redrives WHERE service = %(service)s "
                f"AND requested_by = %(by)s AND finished_at IS NULL)",
                {**self._fix_values(), "by": AUTOMATIC},
            ).fetchone()
            if row is None or not row[0]:
                return 0
            choice = msgspec.json.encode(Choice(automatic=True)).decode()
            made = db.execute(
                "INSERT INTO redrives (service, choice, dry_run, requested_by, last_id, selected) "
                "VALUES (%s, %s, false, %s, %s, %s) RETURNING redrive_id",
                (self.service, choice, AUTOMATIC, row[1], row[0]),
            ).fetchone()
            if made is not None:
                audit(db, AUTOMATIC, "redrive.request", str(made[0]), {"selected": row[0]})
            return int(row[0])

    def _fix_values(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "tried_with": self._tried_with,
            "release_reasons": list(RELEASE_REASONS),
        }


_FIXED = """
    (p.reason = ANY(%(release_reasons)s) AND p.tried_with <> %(tried_with)s
    OR p.reason = 'unknown_meter'
        AND EXISTS (SELECT FROM meters m WHERE (m.tenant_id, m.meter) = (p.tenant_id, p.meter)))
"""


def observe(db: Connection, service: str) -> None:
    """Set the gauges of what is parked."""
    rows = db.execute(
        "SELECT kind, reason, count(*) FROM parked_records WHERE state = 'parked' AND service = %s "
        "GROUP BY 1, 2",
        (service,),
    ).fetchall()
    metrics.PARKED.clear()
    for name in KINDS:
        metrics.PARKED.labels(name, "").set(0)  # so that the first one is an increase
    for kind, reason, number in rows:
        metrics.PARKED.labels(kind, reason).set(number)


async def redrive_forever(settings: Settings, redrives: Redrives) -> None:
    """Carry re-drives out as they come, on a connection of its own; a world that is away is waited for."""
    database = Database(settings.postgres(), "redrive")
    observed = looked = float("-inf")
    while True:
        try:
            db = await asyncio.to_thread(database.connection)
            while await asyncio.to_thread(redrives.step, db):
                pass
            if settings.parked_auto_redrive and time.monotonic() - looked > LOOK_FOR_FIXES_SECONDS:
                looked = time.monotonic()
                await asyncio.to_thread(redrives.look_for_fixes, db)
            if time.monotonic() - observed > OBSERVE_SECONDS:
                observed = time.monotonic()
                await asyncio.to_thread(observe, db, redrives.service)
        except TRANSIENT_ERRORS as error:
            log.warning("re-drives wait", error=error)
            await asyncio.to_thread(database.reset)
        await asyncio.sleep(LOOK_SECONDS)


def version_skew(db: Connection, service: str) -> str | None:
    """A schema newer than this release, of records that wait here; None when there is none."""
    rows = db.execute(
        "SELECT DISTINCT schema_name FROM parked_records "
        "WHERE service = %s AND state = 'parked' AND reason = 'unknown_schema' AND schema_name <> ''",
        (service,),
    ).fetchall()
    for (name,) in rows:
        subject, _, version = name.partition("/")
        if int(version) > CURRENT_VERSIONS.get(subject, int(version)):
            return str(name)
    return None


def _headers(texts: Mapping[str, str]) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, text.encode()) for name, text in texts.items())


def _result(verdict: Verdict) -> str:
    return verdict.outcome if isinstance(verdict, Settled) else f"parked:{verdict.reason}"


def _texts(results: Mapping[str, int]) -> dict[str, str]:
    return {name: str(number) for name, number in sorted(results.items())}
