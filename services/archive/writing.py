"""Writes the archive: one file at a time, from where the files of its partition end.

Kafka itself keeps what is not archived yet, so nothing is collected here: a partition is read when a file of
it is due, from the end of what is held up to where the file is cut. Memory is that of one file, however many
partitions there are. A file appears whole or not at all, under a name that says where the next one begins; so
a process that is killed at any instruction leaves nothing out and writes nothing twice.

One archiver works at a time: it holds a lock of its PostgreSQL session, and looks whether it still does in
front of every file. Were two to overlap all the same, so would their files, and the reader gives each record
once.

Where the log no longer has what comes next, the partition stops, tells of it once, and waits for an operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from fsspec.implementations.local import LocalFileSystem

from services.archive.files import (
    FILE_BYTES,
    Archive,
    ArchivedRecord,
    FileBuilder,
    StorageAway,
    asked_of_storage,
    file_name,
    hole_name,
)
from services.streaming import outbox
from services.streaming.chunks import Partition
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.streaming.lag import behind, log_ends, log_starts, topic_partitions
from services.streaming.observe import Status
from services.wire import metrics
from services.wire.errors import Transient
from services.wire.records import ops_event
from services.wire.settings import Settings
from services.wire.topics import USAGE_VERSIONS
from services.wire.waits import full_jitter

log = structlog.get_logger(__name__)

#: Progress is committed under this name, so that every tool that shows lag shows this one. Nothing reads it.
GROUP: Final = "tidemeter-archive"
#: Of the session lock that one archiver at a time holds.
LOCK_ID: Final = int.from_bytes(b"tidarchv", "big", signed=True)
LOOK_SECONDS = 5.0
STANDBY_SECONDS = 1.0
#: The brokers forget what a group without members has committed after a week.
COMMIT_AGAIN_SECONDS = 3600.0
KAFKA_SILENCE_SECONDS = 30.0
_CONSUME_RECORDS = 250
_TMP = ".tmp"

Connection = psycopg.Connection[Any]


class AnotherWorks(Exception):
    """Another archiver holds the lock."""


class Stopped(Exception):
    """Told to stop; what was read and not written is read again."""


class Store(Archive):
    """The archive, with what only its writer does."""

    def put(self, tp: Partition, first: int, last: int, parts: Sequence[bytes | memoryview]) -> None:
        """Add a file made of ``parts``, whole and durable, or not at all.

        Raises:
            StorageAway: it could not be stored; at most a leftover is there.
        """
        self._put(self.directory(tp), file_name(first, last), parts)

    def _put(self, directory: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """In a directory, by a rename; elsewhere by one call, which object stores carry out whole."""
        with asked_of_storage():
            if not isinstance(self.fs, LocalFileSystem):
                self.fs.pipe_file(f"{directory}/{name}", b"".join(parts))
                return
            _make_directory(Path(directory))
            temporary = Path(directory) / f"{name}.{uuid.uuid4().hex}{_TMP}"
            with temporary.open("xb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
            fault_point("archive.written")
            temporary.rename(Path(directory) / name)
            _sync_directory(Path(directory))

    def clean(self, tp: Partition) -> int:
        """Remove what a killed archiver left half-written; returns how many files that was."""
        if not isinstance(self.fs, LocalFileSystem):
            return 0
        names = [name for name, _ in self.listed(self.directory(tp)) if name.endswith(_TMP)]
        with asked_of_storage():
            for name in names:
                (Path(self.directory(tp)) / name).unlink(missing_ok=True)
        return len(names)

    def accept_hole(self, tp: Partition, first: int, by: str) -> None:
        """Leave word that the records from ``first`` on that are gone will not come."""
        self._put(self.directory(tp), hole_name(first), [json.dumps({"accepted_by": by}).encode()])

    def accepts_hole(self, tp: Partition, first: int) -> bool:
        """Has an operator left that word?"""
        return self.exists(f"{self.directory(tp)}/{hole_name(first)}")


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Halt:
    """Why a partition is not archived any more. ``first`` is the offset that would come next."""

    reason: str
    first: int
    log_offset: int

    def __str__(self) -> str:
        if self.reason == "offset_gap":
            return f"offsets {self.first} to {self.log_offset - 1} were deleted before they were archived"
        return f"the log ends at offset {self.log_offset}, the archive at {self.first}: it is another log"


@dataclass(slots=True)
class Standing:
    """Where one partition stands. ``begun``: something is held, so what comes next must follow it.

    ``oldest_ms`` is the arrival of the record at ``position``, once that was looked at.
    """

    position: int
    begun: bool
    oldest_ms: int | None = None
    halt: Halt | None = None
    committed: int | None = None


@dataclass(slots=True)
class Written:
    """A file that was written just now, for whoever shows progress."""

    partition: Partition
    first: int
    last: int
    bytes: int
    left: int


@dataclass(slots=True)
class Summary:
    """What one look did."""

    records: int = 0
    files: int = 0
    halted: dict[Partition, Halt] = field(default_factory=dict)


def find_halt(store: Store, tp: Partition, position: int, start: int, end: int) -> Halt | None:
    """Why nothing can be read at ``position`` of a log from ``start`` to ``end``; a hole may be accepted."""
    if position > end:
        return Halt("log_truncated", position, end)
    if position < start and not store.accepts_hole(tp, position):
        return Halt("offset_gap", position, start)
    return None


def end_of_held(store: Store, tp: Partition) -> int | None:
    """The offset after all that is held; None when nothing is."""
    return max((file.next for file in store.files(tp)), default=None)


def accept_holes(settings: Settings, db: Connection, by: str) -> list[tuple[Partition, Halt]]:
    """Have every partition that stopped at deleted records go on behind them; returns what was given up.

    The hole stays visible: nothing ever fills it. Who accepted it is in the audit log.

    Raises:
        Misconfigured: no archive or Kafka is set.
        Transient: Kafka or the storage does not answer.
    """
    store = Store(settings.archive())
    admin = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
    partitions = topic_partitions(admin, USAGE_VERSIONS)
    starts, ends = log_starts(admin, partitions), log_ends(admin, partitions)
    accepted = []
    for tp in partitions:
        position = end_of_held(store, tp)
        halt = None if position is None else find_halt(store, tp, position, starts[tp], ends[tp])
        if halt is None or halt.reason != "offset_gap":
            continue
        store.accept_hole(tp, halt.first, by)
        db.execute(
            "INSERT INTO audit_log (actor, action, subject, details) "
            "VALUES (%s, 'archive_hole_accepted', %s, %s)",
            (by, f"{tp.topic}/{tp.partition}/{halt.first}", json.dumps({"log_offset": halt.log_offset})),
        )
        accepted.append((tp, halt))
    return accepted


class Archiver:
    """The job. In one thread; :meth:`check` may be asked from another."""

    def __init__(
        self,
        settings: Settings,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.time,
        written: Callable[[Written], None] = lambda _: None,
    ) -> None:
        """
        Raises:
            Misconfigured: no archive, Kafka or PostgreSQL is set, or the archive's URL cannot be used.
        """
        self._settings = settings
        self._kafka = settings.kafka()
        self._store = Store(settings.archive())
        self._database = Database(settings.postgres(), "archive")
        self._stop = stop or threading.Event()
        self._clock = clock
        self._written = written
        self._standings: dict[Partition, Standing] = {}
        self._locked_on: Connection | None = None
        self._told: set[tuple[Partition, int]] = set()
        self._commit_all_at = 0.0
        self._clients: tuple[AdminClient, Consumer] | None = None
        self._state: tuple[Status, str] = ("unhealthy", "starts")

    # -- Life ----------------------------------------------------------------------------------------

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        return self._state

    def run(self) -> None:
        """Until told to stop. Whatever is away is waited for."""
        look_seconds = min(LOOK_SECONDS, self._settings.archive_file_seconds / 4)
        failures = 0
        while not self._stop.is_set():
            pause = look_seconds
            try:
                self._show(self.look())
                failures = 0
            except Stopped:
                break
            except AnotherWorks:
                self._forget()
                self._state = ("degraded", "another archiver is at work; this one waits for its end")
                pause = STANDBY_SECONDS
            except TRANSIENT_ERRORS as error:
                failures += 1
                world = _world(error)
                self._state = ("unhealthy", f"waits for {world} ({type(error).__name__})")
                metrics.RETRIES.labels(world).inc()
                log.warning("waiting", world=world, error=error, attempt=failures)
                self._measure_age()
                self.close_clients()
                if world == "PostgreSQL":
                    self._database.reset()
                pause = full_jitter(failures, random.random(), base_seconds=0.2, cap_seconds=15.0)  # noqa: S311
            self._stop.wait(pause)
        self.close()

    def close(self) -> None:
        """Let go of the lock and of Kafka."""
        self.close_clients()
        self._database.reset()

    def close_clients(self) -> None:
        """After a broker was killed, an old client may never get an answer."""
        if self._clients is not None:
            self._clients[1].close()
            self._clients = None

    def _show(self, summary: Summary) -> None:
        if not summary.halted:
            self._state = ("healthy", f"{len(self._standings)} partitions")
            return
        tp, halt = next(iter(summary.halted.items()))
        number = len(summary.halted)
        self._state = ("degraded", f"{number} partitions stopped, first {tp.topic}/{tp.partition}: {halt}")

    # -- One look ------------------------------------------------------------------------------------

    def look(self, *, everything: bool = False) -> Summary:
        """Write the files that are due now, or all that the log has, and say what was done.

        Raises:
            AnotherWorks: another archiver holds the lock.
            Transient, psycopg.OperationalError: something is away; what is written is.
            Stopped: told to.
        """
        self._hold_lock()
        admin = self._client()[0]
        partitions = topic_partitions(admin, USAGE_VERSIONS)
        starts, ends = log_starts(admin, partitions), log_ends(admin, partitions)
        summary = Summary()
        for tp in partitions:
            standing = self._standing(tp, starts[tp])
            self._judge(tp, standing, starts[tp], ends[tp])
            if standing.halt is not None:
                summary.halted[tp] = standing.halt
                continue
            target = ends[tp] if everything else self._due_until(tp, standing, ends[tp])
            if target > standing.position:
                self._archive(tp, standing, target, ends[tp], summary)
                self._commit()
        self._commit()
        self._measure(ends)
        return summary

    def _standing(self, tp: Partition, start: int) -> Standing:
        if tp not in self._standings:
            held = end_of_held(self._store, tp)
            self._standings[tp] = Standing(start if held is None else held, begun=held is not None)
        return self._standings[tp]

    def _due_until(self, tp: Partition, standing: Standing, end: int) -> int:
        """Where a file would be cut now: full ones only, or all there is once the oldest is old enough."""
        if standing.oldest_ms is None and end > standing.position:
            standing.oldest_ms = self._arrival_at(tp, standing.position)
        due_ms = (self._clock() - self._settings.archive_file_seconds) * 1000
        if standing.oldest_ms is not None and standing.oldest_ms <= due_ms:
            return end
        full = self._settings.archive_file_records
        return standing.position + max(0, end - standing.position) // full * full

    def _judge(self, tp: Partition, standing: Standing, start: int, end: int) -> None:
        """Halt, or let go on, by what the log has."""
        if not standing.begun and not start <= standing.position <= end:
            standing.position, standing.oldest_ms = start, None
        before = standing.halt
        metrics.ARCHIVE_HALTED.labels(tp.topic, str(tp.partition), "").set(0)
        standing.halt = find_halt(self._store, tp, standing.position, start, end)
        if standing.halt is None and standing.position < start:
            log.warning(
                "goes on behind a hole that was accepted",
                topic=tp.topic,
                partition=tp.partition,
                first=standing.position,
                next=start,
            )
            standing.position, standing.oldest_ms = start, None
        if before is not None and (standing.halt is None or standing.halt.reason != before.reason):
            metrics.ARCHIVE_HALTED.labels(tp.topic, str(tp.partition), before.reason).set(0)
        if standing.halt is not None:
            metrics.ARCHIVE_HALTED.labels(tp.topic, str(tp.partition), standing.halt.reason).set(1)
            self._tell(tp, standing.halt)

    def _tell(self, tp: Partition, halt: Halt) -> None:
        """One ops event for each halt, however often a process finds it: the audit log knows."""
        if (tp, halt.first) in self._told:
            return
        subject = f"{tp.topic}/{tp.partition}/{halt.first}"
        attributes = {
            "reason": halt.reason,
            "first_offset": str(halt.first),
            "log_offset": str(halt.log_offset),
        }
        db = self._database.connection()
        with db.transaction():
            known = db.execute(
                "SELECT FROM audit_log WHERE action = 'archive_halted' AND subject = %s LIMIT 1", (subject,)
            ).fetchone()
            if known is None:
                log.error("partition stopped", topic=tp.topic, partition=tp.partition, **attributes)
                db.execute(
                    "INSERT INTO audit_log (actor, action, subject, details) "
                    "VALUES ('archive', 'archive_halted', %s, %s)",
                    (subject, json.dumps(attributes)),
                )
                event = ops_event(
                    "archive_halted",
                    subject_type="partition",
                    subject_id=subject,
                    source="archive",
                    at_us=time.time_ns() // 1000,
                    attributes=attributes,
                )
                outbox.enqueue(db, GROUP, [event])
        self._told.add((tp, halt.first))

    def _measure(self, ends: dict[Partition, int]) -> None:
        self._measure_age()
        lag = behind(ends, {tp: standing.position for tp, standing in self._standings.items()})
        for tp, records in lag.items():
            metrics.ARCHIVE_LAG.labels(tp.topic, str(tp.partition)).set(records)

    def _measure_age(self) -> None:
        """While something is away, too: that is when it grows."""
        waiting = [
            one.oldest_ms for one in self._standings.values() if one.oldest_ms is not None and not one.halt
        ]
        age = self._clock() - min(waiting) / 1000 if waiting else 0.0
        metrics.ARCHIVE_OLDEST.set(max(0.0, age))

    def _forget(self) -> None:
        """What another archiver may have changed."""
        self._standings.clear()
        metrics.ARCHIVE_LAG.clear()
        metrics.ARCHIVE_HALTED.clear()
        self._measure_age()

    # -- The lock ------------------------------------------------------------------------------------

    def _hold_lock(self) -> None:
        """Have it, still or now. A session that answers has it still."""
        if self._still_locked():
            return
        db = self._database.connection()
        row = db.execute("SELECT pg_try_advisory_lock(%s)", (LOCK_ID,)).fetchone()
        if row is None or not row[0]:
            raise AnotherWorks
        self._forget()
        for tp in self._store.partitions(USAGE_VERSIONS):
            if left := self._store.clean(tp):
                log.info("removed leftovers", topic=tp.topic, partition=tp.partition, files=left)
        self._locked_on = db

    def _still_locked(self) -> bool:
        db = self._database.connection()
        if db is not self._locked_on:
            return False
        db.execute("SELECT 1")
        return True

    # -- Kafka ---------------------------------------------------------------------------------------

    def _client(self) -> tuple[AdminClient, Consumer]:
        if self._clients is None:
            servers: dict[str, Any] = {"bootstrap.servers": self._kafka, "log_level": 0}
            consumer = Consumer(
                {
                    **servers,
                    "group.id": GROUP,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "error",  # what is gone must not be passed over
                    "enable.partition.eof": True,
                    "isolation.level": "read_uncommitted",  # as the counters read
                    "check.crcs": True,
                    "fetch.wait.max.ms": 20,  # what is asked for is there
                    "queued.max.messages.kbytes": 8 * 1024,
                    "max.partition.fetch.bytes": 2 * 1024 * 1024,
                }
            )
            self._clients = AdminClient(servers), consumer
        return self._clients

    @contextlib.contextmanager
    def _reading(self, tp: Partition, offset: int) -> Iterator[Iterator[Message]]:
        """What the log has from ``offset`` on: records, and its end as it was when that was reached."""
        consumer = self._client()[1]
        try:
            consumer.assign([TopicPartition(tp.topic, tp.partition, offset)])
            yield self._messages(consumer, tp)
        except KafkaException as error:
            raise Transient("Kafka does not answer") from error
        finally:
            with contextlib.suppress(KafkaException):
                consumer.unassign()

    def _messages(self, consumer: Consumer, tp: Partition) -> Iterator[Message]:
        heard_at = time.monotonic()
        while True:
            first = consumer.poll(0.5)
            messages = [] if first is None else [first, *consumer.consume(_CONSUME_RECORDS, 0)]
            if self._stop.is_set():
                raise Stopped
            if messages:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > KAFKA_SILENCE_SECONDS:
                raise Transient("Kafka gives no records")
            for message in messages:
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise Transient(f"Kafka gives no records: {error.name()}")
                if (message.topic(), message.partition()) == tp:
                    yield message

    def _arrival_at(self, tp: Partition, offset: int) -> int | None:
        """When the first record from ``offset`` on arrived; None when there is none."""
        with self._reading(tp, offset) as messages:
            message = next(messages)
            return None if message.error() is not None else int(message.timestamp()[1])

    def _is_deleted(self, tp: Partition, offset: int) -> bool:
        """An offset was passed over: did the log delete it, or was there never a record?"""
        return log_starts(self._client()[0], [tp])[tp] > offset

    # -- Files ---------------------------------------------------------------------------------------

    def _archive(self, tp: Partition, standing: Standing, target: int, end: int, summary: Summary) -> None:
        """Write [position, target) in files, or what is left of it in front of what the log has deleted."""
        full = self._settings.archive_file_records
        builder, expected = FileBuilder(tp), standing.position
        with self._reading(tp, standing.position) as messages:
            while expected < target:
                message = next(messages)
                offset = _offset(message)
                if offset > expected and self._is_deleted(tp, expected):
                    break
                if message.error() is not None or offset >= target:
                    expected = min(offset, target)
                    continue
                builder.add(_record(message, offset))
                expected = offset + 1
                if builder.records >= full or builder.payload_bytes >= FILE_BYTES:
                    self._store_file(tp, standing, builder, expected, end, summary)
                    builder = FileBuilder(tp)
        if builder.records:
            self._store_file(tp, standing, builder, expected, end, summary)

    def _store_file(
        self,
        tp: Partition,
        standing: Standing,
        builder: FileBuilder,
        next_offset: int,
        end: int,
        summary: Summary,
    ) -> None:
        parts = builder.finish(standing.position, next_offset - 1)
        size = sum(map(len, parts))
        fault_point("archive.read")
        if not self._still_locked():
            raise AnotherWorks
        self._store.put(tp, standing.position, next_offset - 1, parts)
        fault_point("archive.stored")
        first, standing.position = standing.position, next_offset
        standing.begun, standing.oldest_ms = True, None
        summary.records += builder.records
        summary.files += 1
        if self._state[0] == "unhealthy":  # until the look is over, which may take long
            self._state = ("healthy", "catches up")
        metrics.ARCHIVED.labels(tp.topic).inc(builder.records)
        metrics.ARCHIVE_LAG.labels(tp.topic, str(tp.partition)).set(max(0, end - next_offset))
        log.info(
            "archived",
            topic=tp.topic,
            partition=tp.partition,
            first=first,
            last=next_offset - 1,
            records=builder.records,
            bytes=size,
        )
        self._written(Written(tp, first, next_offset - 1, size, max(0, end - next_offset)))

    def _commit(self) -> None:
        """Tell the group what is in the archive, where that changed; now and then all of it."""
        now = time.monotonic()
        again = now >= self._commit_all_at
        changed = [(tp, one) for tp, one in self._standings.items() if again or one.committed != one.position]
        if changed:
            offsets = [TopicPartition(tp.topic, tp.partition, one.position) for tp, one in changed]
            _commit_offsets(self._client()[1], offsets)
            fault_point("archive.committed")
        for _, one in changed:
            one.committed = one.position
        if again:
            self._commit_all_at = now + COMMIT_AGAIN_SECONDS


def _commit_offsets(consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
    try:
        done = consumer.commit(offsets=list(offsets), asynchronous=False)
    except KafkaException as error:
        raise Transient("Kafka took no commit") from error
    if any(one.error is not None for one in done or ()):
        raise Transient("Kafka took no commit")


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:
        raise Transient("Kafka gives no offset")
    return offset


def _record(message: Message, offset: int) -> ArchivedRecord:
    headers: Any = message.headers() or ()
    return ArchivedRecord(offset, message.timestamp()[1], message.key(), message.value(), tuple(headers))


def _world(error: Exception) -> str:
    if isinstance(error, psycopg.Error):
        return "PostgreSQL"
    return "the archive's storage" if isinstance(error, StorageAway) else "Kafka"
