"""The log by offsets: what Kafka still has, and before that what the archive has, as one."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from services.archive.files import Archive, DamagedFile, NotHeld
from services.streaming.chunks import Partition, RawRecord
from services.streaming.replays import RefusedReplay
from services.wire.errors import Transient


class Record(Protocol):
    """A record as confluent-kafka has it: nothing is copied of what nobody asks for."""

    def offset(self) -> int: ...
    def timestamp(self) -> tuple[int, int]: ...  # kind; arrival, milliseconds since 1970
    def value(self) -> bytes | None: ...


BATCH_RECORDS = 10_000
_SILENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Range:
    """Records of one partition, from ``start`` to before ``end``."""

    tp: Partition
    start: int
    end: int

    @property
    def records(self) -> int:
        """How many that is."""
        return self.end - self.start


class FromArchive:
    """A raw record of the archive in that form."""

    __slots__ = ("_raw",)

    def __init__(self, raw: RawRecord) -> None:
        self._raw = raw

    def offset(self) -> int:
        return self._raw.offset

    def timestamp(self) -> tuple[int, int]:
        return 2, self._raw.timestamp

    def value(self) -> bytes | None:
        return self._raw.value


class Log:
    """Reads ranges in a consumer group of its own. Use it in one thread; close it."""

    def __init__(self, bootstrap: str, group: str, archive: Archive | None = None) -> None:
        self.group = group
        self.archive = archive
        self.admin = AdminClient({"bootstrap.servers": bootstrap, "socket.timeout.ms": 10_000})
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "queued.max.messages.kbytes": 32 * 1024,
                # A fetch at the end of one partition must not hold up the first fetch of the next.
                "fetch.wait.max.ms": 10,
                "check.crcs": True,
            }
        )

    def close(self) -> None:
        """Leave Kafka."""
        self._consumer.close()

    def read(self, one: Range, log_start: int) -> Iterator[Sequence[Record]]:
        """The records of a range, in batches, in offset order; below ``log_start`` they are the archive's.

        Raises:
            Transient: Kafka, or the archive's storage, does not answer.
            RefusedReplay: ``archive_damaged``.
        """
        at = one.start
        if at < log_start and self.archive is not None:
            try:
                for kept in self.archive.read(one.tp, at, min(one.end, log_start)):
                    yield [FromArchive(raw) for raw in kept]
            except (NotHeld, DamagedFile) as error:
                raise RefusedReplay("archive_damaged", str(error)) from error
            at = min(one.end, log_start)
        if at < one.end:
            yield from self._fetch(one.tp, at, one.end)

    def _fetch(self, tp: Partition, start: int, end: int) -> Iterator[Sequence[Record]]:
        consumer = self._consumer
        consumer.assign([TopicPartition(tp.topic, tp.partition, start)])
        heard = time.monotonic()
        try:
            while True:
                # A batch never goes past the end, so what was fetched beyond it costs nothing.
                messages = consumer.consume(min(BATCH_RECORDS, end - start), timeout=0.2)
                if not messages:
                    if time.monotonic() - heard > _SILENCE_SECONDS:
                        raise Transient(f"Kafka sends nothing of {tp.topic}/{tp.partition} from {start} on")
                    continue
                heard = time.monotonic()
                batch: list[Any] = [message for message in messages if message.error() is None]
                at_end = len(batch) < len(messages) and any(
                    _is_end(message.error()) for message in messages if message.error() is not None
                )
                if batch:
                    start = batch[-1].offset() + 1
                    if start > end:  # offsets may be missing, so there may be fewer records than offsets
                        batch = [message for message in batch if message.offset() < end]
                    if batch:
                        yield batch
                if start >= end:
                    return
                if at_end:
                    raise Transient(f"{tp.topic}/{tp.partition} ends at {start}, and was counted up to {end}")
        except KafkaException as error:
            raise Transient("Kafka does not answer") from error
        finally:
            consumer.unassign()

    def first_arrival(self, tp: Partition, offset: int) -> int | None:
        """When the record at ``offset``, or the next after it, arrived (ms); None: there is none."""
        consumer = self._consumer
        consumer.assign([TopicPartition(tp.topic, tp.partition, offset)])
        deadline = time.monotonic() + _SILENCE_SECONDS
        try:
            while time.monotonic() < deadline:
                message = consumer.poll(0.2)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    return int(message.timestamp()[1])
                if _is_end(error):
                    return None
        except KafkaException as error:
            raise Transient("Kafka does not answer") from error
        finally:
            consumer.unassign()
        raise Transient(f"Kafka sends nothing of {tp.topic}/{tp.partition}")

    def offsets_at(self, partitions: Sequence[Partition], at_us: int) -> dict[Partition, int]:
        """The first offset that arrived at ``at_us`` or later; -1: none did.

        Raises:
            Transient: Kafka does not answer.
        """
        at_ms = max(0, -(-at_us // 1000))  # below 0 Kafka takes it for a word, such as "the end"
        asked = [TopicPartition(tp.topic, tp.partition, at_ms) for tp in partitions]
        try:
            found = self._consumer.offsets_for_times(asked, timeout=_SILENCE_SECONDS) if asked else []
        except KafkaException as error:
            raise Transient("Kafka does not answer") from error
        return {Partition(one.topic, one.partition): one.offset for one in found}

    def commit(self, positions: dict[Partition, int]) -> None:
        """Tell the group's position, for whoever watches its lag. Nothing depends on it."""
        offsets = [TopicPartition(tp.topic, tp.partition, offset) for tp, offset in positions.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._NO_OFFSET:
                raise Transient("Kafka does not answer") from error


def forget_group(admin: AdminClient, group: str) -> None:
    """Delete a consumer group that has ended its work.

    Raises:
        Transient: Kafka does not answer.
    """
    try:
        admin.delete_consumer_groups([group], request_timeout=10)[group].result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise Transient("Kafka does not answer") from error


def forget_groups(admin: AdminClient, prefix: str, alive: Collection[str]) -> None:
    """Delete the consumer groups whose names begin so, but for those: a replay that has ended has no lag.

    Raises:
        Transient: Kafka does not answer.
    """
    try:
        groups = admin.list_consumer_groups(request_timeout=10).result().valid
        ended = [one.group_id for one in groups if one.group_id.startswith(prefix)]
        ended = [name for name in ended if name not in alive]
        for future in admin.delete_consumer_groups(ended, request_timeout=10).values() if ended else ():
            try:
                future.result()
            except KafkaException as error:
                if error.args[0].code() not in (KafkaError.GROUP_ID_NOT_FOUND, KafkaError.NON_EMPTY_GROUP):
                    raise
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error


def _is_end(error: Any) -> bool:
    """Whether it says the end of the partition; other errors of a fetch are for a retry.

    Raises:
        Transient: the records cannot be fetched.
    """
    if error.code() == KafkaError._PARTITION_EOF:
        return True
    if error.retriable() or error.code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):
        return False
    raise Transient(f"Kafka refuses to send records: {error.name()}")
