"""Run one chunk handler under Faust, keeping the contract that makes it exact.

The contract, point by point:

1. one agent for the handler's topics, ``concurrency=1``, raw bytes in, decoding inside the body;
2. the body never raises: transient failures are retried in place, anything else ends the process at once
   with ``os._exit``, because Faust commits past whatever an agent body raised on;
3. a gap in the offsets stops the partition, with a reason, unless the records are still there to seek to;
   so does a log that ends below the stored position;
4. on assignment, and after every seek of Faust's own, a group offset ahead of PostgreSQL is moved back, and
   one whose records are gone is moved on;
5. a short session timeout, and static membership when the worker has a name, so that a killed worker's
   partitions move in seconds;
6. Faust's web server never starts: it would listen on every interface;
7. a watchdog ends the process when records wait and the stored offsets do not move.

While one chunk's transaction runs, the next chunk is already being decoded, and what the chunks before have
parked is on its way to Kafka. The group commits a chunk's offset only when that is done, in chunk order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import faust
import psycopg
import structlog
from aiokafka.errors import IllegalStateError
from confluent_kafka.admin import AdminClient
from faust.types import TP
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from services.streaming import offsets, outbox
from services.streaming.chunks import Chunk, Partition
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.streaming.lag import behind, log_ends, log_starts, topic_partitions
from services.streaming.observe import NO_PARTITIONS, Health, Status, serve_observation
from services.streaming.transport import ChunkConsumer, ChunkTransport, RawSchema
from services.wire import metrics
from services.wire.errors import OffsetGap, Transient
from services.wire.records import ops_event
from services.wire.settings import Settings

log = structlog.get_logger(__name__)

EXIT_BROKEN = 70
EXIT_STUCK = 75
GAP_SEEKS_MAX = 10
#: Chunks whose offsets may wait for Kafka to take what was parked, before counting waits, too.
UNSETTLED_MAX = 16
STOP_SECONDS_MAX = 8.0

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Applied:
    """What a transaction did. ``halted`` names why the partition must stop at ``next_offset``."""

    next_offset: int
    outbox_rows: int = 0
    halted: str | None = None
    #: Records of the chunk were committed before, perhaps by a worker that died before it relayed for them.
    redelivered: bool = False


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A chunk that is done, but not yet committed to Kafka. ``parked``: rows of it wait in the outbox."""

    partition: Partition
    next_offset: int
    parked: bool


class ChunkHandler(Protocol[P]):
    """The work of a service, in threads: ``prepare`` of one chunk overlaps ``apply`` of the one before."""

    def prepare(self, chunk: Chunk) -> P:
        """Pure computation on one chunk: decode, upcast, validate. Must not touch PostgreSQL or Kafka."""

    def apply(self, db: offsets.Connection, prepared: P) -> Applied:
        """One transaction: lock the position, do the work, move the position.

        Raises:
            OffsetGap: the chunk begins above the stored position.
        """


def crash(event: str, error: BaseException) -> NoReturn:
    """Log and end the process without unwinding: unwinding would let Faust commit past the failure."""
    log.critical(event, error=error, exit_code=EXIT_BROKEN, exc_info=error)
    os._exit(EXIT_BROKEN)


class Worker(Generic[P]):
    """One process of one consumer group."""

    def __init__(
        self,
        settings: Settings,
        *,
        group: str,
        topics: Sequence[str],
        handler: ChunkHandler[P],
        health: Health | None = None,
        after_apply: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.group = group
        self.topics = list(topics)
        self.handler = handler
        self.health = health or Health()
        self.after_apply = after_apply
        self.database = Database(settings.postgres(), group)
        self.kafka = outbox.relay_producer(settings.kafka())
        self.stopping = asyncio.Event()
        self._prepare_thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._apply_thread = ThreadPoolExecutor(1, thread_name_prefix="apply")
        self._relay_thread = ThreadPoolExecutor(1, thread_name_prefix="relay")
        self._relay_database = Database(settings.postgres(), f"{group}-relay")
        self._in_flight: asyncio.Task[None] | None = None
        self._unsettled: deque[_Unsettled] = deque()
        self._unsure = False  # whether rows may wait of records that do not come again: see `_finish`
        self._applied = asyncio.Event()
        self._settled = asyncio.Event()
        self._halted: dict[Partition, str] = {}
        self._sought: dict[Partition, tuple[int, int]] = {}  # where to, and how often
        self._waiting: dict[object, str] = {}  # by call: what each waits for
        self._assigned: set[Partition] = set()
        self._positions: dict[Partition, int] = {}
        self._kafka_reachable = True
        self.app = self._build_app()
        self.health.checks["stream"] = self._stream_health
        self.health.checks["kafka"] = self._kafka_health

    # -- Faust ---------------------------------------------------------------------------------------

    def _build_app(self) -> Any:
        settings = self.settings
        app = faust.App(
            self.group,
            broker=f"kafka://{settings.kafka().replace(',', ';kafka://')}",
            store="memory://",
            datadir=Path(tempfile.gettempdir())
            / f"tidemeter-faust-{os.getuid()}",  # made by Faust, never used: no tables
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=settings.worker_id and f"{self.group}-{settings.worker_id}",
            broker_session_timeout=settings.session_timeout_seconds,
            broker_heartbeat_interval=settings.session_timeout_seconds / 3.5,
            broker_commit_interval=0.5,
            broker_max_poll_records=settings.chunk_records_max,
            consumer_max_fetch_size=4 * 1024 * 1024,
            stream_buffer_maxsize=4,
            stream_wait_empty=True,
            table_standby_replicas=0,
        )
        app.transport = ChunkTransport(app.conf.broker_consumer, app, supervisor=self)
        source = app.topic(*self.topics, schema=RawSchema(), key_type=bytes, value_type=bytes)

        async def consume(chunks: Any) -> None:
            async for chunk in chunks:
                try:
                    await self._take(chunk)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:
                    crash("chunk failed", error)

        app.agent(source, concurrency=1, name=f"{self.group}.consume")(consume)
        return app

    @property
    def consumer(self) -> ChunkConsumer:
        return self.app.consumer  # type: ignore[no-any-return]

    # -- One chunk -----------------------------------------------------------------------------------

    async def _take(self, chunk: Chunk) -> None:
        """Decode this chunk while the last one commits, then start its own transaction."""
        if chunk.partition in self._halted:
            return
        if chunk.partition not in self._assigned:
            await self.reconcile_offsets()
            if chunk.partition not in self._assigned:
                return
        fault_point("chunk.received")
        with metrics.CHUNK_SECONDS.labels("prepare").time():
            prepared = await self._retried(
                "the schema registry", self._prepare_thread, self.handler.prepare, chunk
            )
        await self._drained()
        await self._until_settled(UNSETTLED_MAX - 1)
        self._in_flight = asyncio.create_task(self._finish(chunk, prepared))

    async def _drained(self) -> None:
        if self._in_flight is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._in_flight

    async def _until_settled(self, most: int) -> None:
        """Wait until no more than ``most`` chunks wait to be settled."""
        while len(self._unsettled) > most:
            self._settled.clear()
            await self._settled.wait()

    async def drain_or_abandon(self) -> None:
        """For revocation: wait for the transaction under way and for what waits to be settled, but not for a
        server that is away.

        Abandoning is safe: an uncommitted chunk is redelivered, one that commits later is skipped then, and
        what was parked is relayed by whoever gets the partition.
        """
        timeout_s = self.settings.session_timeout_seconds / 2
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if self._in_flight is not None:
                    await asyncio.wait({self._in_flight})
                await self._until_settled(0)
        if self._in_flight is not None and not self._in_flight.done():
            self._unsure = True  # a chunk behind it may be under way, and be settled without it
            self._in_flight.cancel()

    async def _finish(self, chunk: Chunk, prepared: P) -> None:
        try:
            applied = await self._retried("PostgreSQL", self._apply_thread, self._apply, prepared)
        except asyncio.CancelledError:
            raise
        except OffsetGap as gap:
            await self._recover_gap(chunk, gap)
            return
        except BaseException as error:
            crash("chunk failed", error)
        if chunk.partition in self._assigned:
            self._positions[chunk.partition] = applied.next_offset
        # A partition was halted by whoever had it, perhaps with rows that it never relayed.
        parked = bool(applied.outbox_rows or applied.redelivered or applied.halted is not None)
        parked, self._unsure = parked or self._unsure, False
        self._to_settle(chunk.partition, applied.next_offset, parked=parked)
        if applied.halted is not None:
            self._stop_partition(chunk.partition, applied.halted)
        if self.after_apply is not None:
            self.after_apply()

    def _to_settle(self, tp: Partition, next_offset: int, *, parked: bool) -> None:
        self._unsettled.append(_Unsettled(tp, next_offset, parked))
        self._applied.set()

    async def _settle(self) -> None:
        """Let the group commit what is done, chunk by chunk, once Kafka has what these chunks have parked."""
        while True:
            self._applied.clear()
            done = list(self._unsettled)
            if any(one.parked for one in done):
                await self._retried("Kafka", self._relay_thread, self._relay)
            for one in done:
                fault_point("chunk.before_settle")
                self.consumer.settle(one.partition, one.next_offset)
                self._unsettled.popleft()
                fault_point("chunk.settled")
            self._settled.set()
            if not self._unsettled:
                await self._applied.wait()

    def _apply(self, prepared: P) -> Applied:
        with metrics.CHUNK_SECONDS.labels("transaction").time():
            return self.handler.apply(self.database.connection(), prepared)

    def _relay(self) -> int:
        with metrics.CHUNK_SECONDS.labels("relay").time():
            return outbox.relay(self._relay_database.connection(), self.group, self.kafka, wait=True)

    async def _retried(
        self, world: str, pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any
    ) -> Any:
        """Call in a thread until the world is back; health says what is waited for."""

        def waiting(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            missing = "PostgreSQL" if isinstance(error, psycopg.Error) else world
            self._waiting[call_id] = f"{missing} ({type(error).__name__})"
            metrics.RETRIES.labels(missing).inc()
            log.warning("waiting", world=missing, error=error, attempt=state.attempt_number)

        call_id = object()
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TRANSIENT_ERRORS),
                wait=wait_random_exponential(multiplier=0.1, max=5),
                before_sleep=waiting,
            ):
                with attempt:
                    try:
                        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)
                    except TRANSIENT_ERRORS:
                        if pool is self._apply_thread:
                            self.database.reset()
                        elif pool is self._relay_thread:
                            self._relay_database.reset()
                        raise
        finally:
            self._waiting.pop(call_id, None)

    # -- Gaps and halts ------------------------------------------------------------------------------

    async def _recover_gap(self, chunk: Chunk, gap: OffsetGap) -> None:
        """Seek back while the missing records are still there; else stop the partition.

        Chunks fetched before the seek may still be queued, so a second gap at the same place proves nothing;
        only many of them do (records missing inside the log, as after a transaction's markers).
        """
        tp = chunk.partition
        positions, log_start = await self._retried(
            "Kafka", self._apply_thread, self._position_and_log_start, tp
        )
        stored = positions[tp].next_offset
        place, tries = self._sought.get(tp, (stored, 0))
        tries = tries + 1 if place == stored else 1
        if log_start <= stored and tries <= GAP_SEEKS_MAX:
            self._sought[tp] = (stored, tries)
            log.warning("gap; seeking back", topic=tp.topic, partition=tp.partition, offset=stored, error=gap)
            await self._seek(tp, stored)
            return
        await self._halt(tp, "offset_gap")

    def _position_and_log_start(self, tp: Partition) -> tuple[dict[Partition, offsets.Position], int]:
        admin = self._admin()
        return self._read_positions(), log_starts(admin, [tp])[tp]

    async def _halt(self, tp: Partition, reason: str, log_start: int | None = None) -> None:
        """Stop the partition for good: stored, and with an ops event. Only an operator takes it up again.

        With ``log_start``, only if the position is still below it: who had the partition before may have
        read those records in time, and commit its last transaction only now.
        """
        if await self._retried("PostgreSQL", self._apply_thread, self._store_halt, tp, reason, log_start):
            self._stop_partition(tp, reason)

    def _store_halt(self, tp: Partition, reason: str, log_start: int | None) -> bool:
        db = self.database.connection()
        with db.transaction():
            position = offsets.lock_position(db, self.group, tp)
            if position is not None and log_start is not None and position.next_offset >= log_start:
                return False
            if position is not None and offsets.halt(db, self.group, tp, reason):
                alarm = ops_event(
                    "partition_halted",
                    subject_type="partition",
                    subject_id=f"{tp.topic}/{tp.partition}/{position.next_offset}",
                    source=self.group.removeprefix("tidemeter-"),
                    at_us=time.time_ns() // 1000,
                    attributes={"reason": reason},
                )
                outbox.enqueue(db, self.group, [alarm])
        return True

    def _stop_partition(self, tp: Partition, reason: str) -> None:
        self._halted[tp] = reason
        self.consumer.pause_partitions({TP(*tp)})
        metrics.HALTED.labels(tp.topic, str(tp.partition), reason).set(1)
        log.error(
            "partition halted; see `tidemeter resume`", topic=tp.topic, partition=tp.partition, reason=reason
        )

    async def _watch_halts(self) -> None:
        """Take halted partitions up again once an operator said so."""
        while not self.stopping.is_set():
            await asyncio.sleep(1.0)
            if not self._halted:
                continue
            positions = await self._retried("PostgreSQL", self._apply_thread, self._read_positions)
            for tp in list(self._halted):
                if tp in positions and positions[tp].halted is None:
                    metrics.HALTED.labels(tp.topic, str(tp.partition), self._halted.pop(tp)).set(0)
                    self._sought.pop(tp, None)
                    self._unsure = True
                    await self._seek(tp, positions[tp].next_offset)
                    self.consumer.resume_partitions({TP(*tp)})
                    log.info("partition resumed", topic=tp.topic, partition=tp.partition)

    # -- Positions -----------------------------------------------------------------------------------

    def _read_positions(self) -> dict[Partition, offsets.Position]:
        return offsets.read_positions(self.database.connection(), self.group)

    def _positions_for(self, assigned: Sequence[Partition]) -> dict[Partition, offsets.Position]:
        known = self._read_positions()
        new = [tp for tp in assigned if tp not in known]
        if new:
            admin = self._admin()
            starts = log_starts(admin, new)
            offsets.ensure_positions(self.database.connection(), self.group, starts)
            known = self._read_positions()
        return {tp: known[tp] for tp in assigned}

    def _assignment(self) -> list[Partition]:
        """What Kafka has assigned of our topics, now."""
        return sorted(
            Partition(tp.topic, tp.partition) for tp in self.consumer.assignment() if tp.topic in self.topics
        )

    async def _seek(self, tp: Partition, offset: int) -> None:
        """Seek, unless the partition has just moved away: whoever gets it next seeks then."""
        with contextlib.suppress(IllegalStateError):
            await self.consumer.seek(TP(*tp), offset)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.settings.kafka(), "log_level": 0})

    def _log_bounds(self, assigned: Sequence[Partition]) -> dict[Partition, tuple[int, int]]:
        """First and next offset of each log."""
        admin = self._admin()
        starts, ends = log_starts(admin, assigned), log_ends(admin, assigned)
        return {tp: (starts[tp], ends[tp]) for tp in assigned}

    async def reconcile_offsets(self) -> None:
        """After Faust sought to the committed offsets: nowhere start above what PostgreSQL says.

        What the group has committed below the beginning of the log has no records any more that could come
        again and be committed past: it is moved on to the position, or lag tools show a lag for ever. But
        records that retention deleted above the position are lost, so the partition halts.

        A log that ends below the stored position is another log (a topic created anew, a restored broker):
        its records would pass for redelivered ones, so the partition halts.
        """
        consumer = self.consumer
        while True:
            assigned = self._assignment()
            positions = await self._retried("PostgreSQL", self._apply_thread, self._positions_for, assigned)
            bounds = await self._retried("Kafka", self._apply_thread, self._log_bounds, assigned)
            if assigned == self._assignment():  # it may have changed while the servers answered
                break
        committed = consumer.committed_offsets()
        self._assigned = set(assigned)
        self._positions = {tp: position.next_offset for tp, position in positions.items()}
        self._sought.clear()
        for tp, position in positions.items():
            metrics.HALTED.labels(tp.topic, str(tp.partition), "").set(0)  # a series before anything happens
            kafka_says, stored, (start, end) = committed.get(TP(*tp)), position.next_offset, bounds[tp]
            ahead = kafka_says is not None and kafka_says > stored
            if ahead:
                log.warning(
                    "group offset is ahead of PostgreSQL; seeking back",
                    topic=tp.topic,
                    partition=tp.partition,
                )
            if kafka_says is None or ahead or kafka_says < start <= stored:
                consumer.forget_commit(TP(*tp))
                # So that every lag tool can tell. What is below does not come again, to be relayed for.
                self._to_settle(tp, stored, parked=True)
                await self._seek(tp, stored)
            if position.halted is not None:
                self._stop_partition(tp, position.halted)
            elif stored > end:
                await self._halt(tp, "log_truncated")
            elif stored < start:
                await self._halt(tp, "offset_gap", start)
        for tp in [tp for tp in self._halted if tp not in self._assigned]:
            metrics.HALTED.labels(tp.topic, str(tp.partition), self._halted.pop(tp)).set(0)

    # -- Health and watchdog -------------------------------------------------------------------------

    def _stream_health(self) -> tuple[Status, str]:
        for world in list(self._waiting.values()):
            return "unhealthy", f"waiting for {world}"
        if self._halted:
            tp, reason = next(iter(self._halted.items()))
            return (
                "degraded",
                f"{len(self._halted)} partitions halted, first {tp.topic}/{tp.partition}: {reason}",
            )
        if not self._assigned:
            return "degraded", NO_PARTITIONS
        return "healthy", f"{len(self._assigned)} partitions"

    def _kafka_health(self) -> tuple[Status, str]:
        return ("healthy", "answers") if self._kafka_reachable else ("unhealthy", "brokers do not answer")

    def _watchdog(self) -> None:
        """A thread, so that a blocked event loop cannot stop it."""
        admin = self._admin()
        moved_at, last = time.monotonic(), dict(self._positions)
        while not self.stopping.is_set():
            time.sleep(1.0)
            positions = dict(self._positions)
            running = [tp for tp in positions if tp not in self._halted]
            try:
                ends = log_ends(admin, positions, 5.0)
                lag = behind(ends, positions)
                self._kafka_reachable = True
            except TRANSIENT_ERRORS:
                self._kafka_reachable = False
                moved_at = time.monotonic()
                admin = self._admin()  # after a broker was killed, the old client may never get an answer
                continue
            shrunk = [tp for tp in running if ends.get(tp, positions[tp]) < positions[tp]]
            if shrunk and positions == self._positions:
                # Its new records would pass for old ones. The next start halts it: see reconcile_offsets.
                log.critical("a log ends below its position", topic=shrunk[0].topic, exit_code=EXIT_STUCK)
                os._exit(EXIT_STUCK)
            for tp, records in lag.items():
                metrics.LAG.labels(self.group, tp.topic, str(tp.partition)).set(records)
            idle = not any(lag[tp] for tp in running if tp in lag)
            if idle or positions != last or self._waiting:
                moved_at, last = time.monotonic(), positions
            elif time.monotonic() - moved_at > self.settings.watchdog_seconds:
                log.critical("no progress with records waiting", lag=sum(lag.values()), exit_code=EXIT_STUCK)
                os._exit(EXIT_STUCK)

    # -- Life ----------------------------------------------------------------------------------------

    async def run(self, *background: Callable[[], Awaitable[None]]) -> None:
        """Consume until SIGTERM or SIGINT, beside ``background`` loops; then finish the chunk under way."""
        loop = asyncio.get_running_loop()
        # A chunk makes tens of thousands of containers that die young, by reference count. The default
        # thresholds walk all of them dozens of times for each chunk, which costs a third of the throughput.
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        # With the default of 5 ms, each answer of PostgreSQL waits that long for the decoding thread to let
        # go of the interpreter, ten times a chunk.
        sys.setswitchinterval(0.0005)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        runner, port = await serve_observation(
            self.health, self.settings.observe_host, self.settings.observe_port
        )
        log.info("worker starts", group=self.group, observe_port=port)
        if not await self._until_stopped(self._await_world()):
            await runner.cleanup()
            return
        threading.Thread(target=self._watchdog, daemon=True, name="watchdog").start()
        try:
            await self.app.start()
        except Exception as error:
            crash("Faust did not start", error)
        tasks = [
            asyncio.create_task(self._guarded(part))
            for part in (self._settle, self._watch_halts, *background)
        ]
        while not self.stopping.is_set():
            if self.app.crashed:
                crash("Faust crashed", self.app.crash_reason or RuntimeError("no reason given"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), timeout=0.5)
        log.info("worker stops", group=self.group)
        finishing = asyncio.create_task(self._finish_all())
        if not (await asyncio.wait({finishing}, timeout=STOP_SECONDS_MAX))[0]:
            # A server is away. What is done is in PostgreSQL and what is not comes again: nothing is lost.
            log.warning("stopped without a last commit to Kafka", group=self.group)
            os._exit(0)
        await finishing
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.cleanup()

    async def _finish_all(self) -> None:
        """The chunk under way, then Faust, with a last commit."""
        await self.drain_or_abandon()
        await self.app.stop()

    async def _await_world(self) -> None:
        """PostgreSQL and the brokers answer, and what an earlier process decided to send is sent."""
        await self._retried("PostgreSQL", self._apply_thread, self.database.connection)
        await self._retried("Kafka", self._apply_thread, self._find_topics)
        await self._retried("Kafka", self._relay_thread, self._relay)

    def _find_topics(self) -> None:
        """Faust gives up on brokers and topics that are not there yet, so it is not started before."""
        admin = self._admin()
        known = {tp.topic for tp in topic_partitions(admin, self.topics)}
        if missing := [topic for topic in self.topics if topic not in known]:
            raise Transient(f"no topic {missing[0]}: run `tidemeter migrate`")

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do ``work``; False when the worker was told to stop first."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self.stopping.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            return False
        await task
        return True

    async def _guarded(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            crash("background task failed", error)
