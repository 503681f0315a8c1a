"""A Faust transport whose messages are chunks, and whose commits are what PostgreSQL says.

A Faust agent spends about 75 µs on each message outside its own body. This transport hands an agent one
message for each contiguous run of records of a partition, so that cost is paid once per run.

Faust infers the offset to commit from single consecutive acknowledgements, and commits whatever an agent body
raised on. Neither is used here: :meth:`ChunkConsumer.settle` is told the offset that a committed transaction
stored, and that is what the group commits, at Faust's own commit points.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

import structlog
from faust.serializers.schemas import Schema
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from services.streaming.chunks import Chunk, Partition

log = structlog.get_logger(__name__)


class RawSchema(Schema):  # type: ignore[misc]
    """Passes a chunk through undecoded: decoding belongs into the agent's body, where failures are caught."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        return None

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        return message.value


class Supervisor(Protocol):
    """The worker, as its consumer sees it."""

    async def drain_or_abandon(self) -> None:
        """Wait for the chunk under way, within bounds."""

    async def reconcile_offsets(self) -> None:
        """Move positions that are ahead of PostgreSQL back."""


class ChunkConsumer(driver.Consumer):  # type: ignore[misc]
    """Delivers runs instead of records and commits settled offsets only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settled: dict[TP, int] = {}

    def settle(self, partition: Partition, next_offset: int) -> None:
        """Everything below ``next_offset`` is durable and relayed; the group may commit it."""
        self._settled[TP(partition.topic, partition.partition)] = next_offset

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Fetch, and yield one message for each partition that has records."""
        records, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if records is None or self.should_stop:
            return
        if not self.flow_active:
            try:
                await self.perform_seek()
            except (
                Exception
            ) as error:  # partitions moved meanwhile; when they have settled, Faust seeks again
                log.info("seek interrupted by a rebalance", error=error)
            return
        for tp, run in records.items():
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return
            if run and (active is None or tp in active or tp in self._buffered_partitions):
                yield tp, self._chunk_message(TP(tp.topic, tp.partition), run)

    def _chunk_message(self, tp: TP, run: list[Any]) -> Any:
        last = run[-1]
        chunk = Chunk(Partition(tp.topic, tp.partition), run)
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            last.timestamp_type,
            (),
            None,
            chunk,
            None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    def ack(self, message: Any) -> bool:
        """Faust's acknowledgement carries no meaning here; :meth:`settle` does."""
        message.acked = True
        self._unacked_messages.discard(message)
        return True

    def on_buffer_full(self, tp: TP) -> None:
        """Back-pressure is the queue's own limit: the fetcher waits for room in it.

        Faust would stop fetching the partition, and sleep a whole second once all of them are stopped.
        """

    def on_buffer_drop(self, tp: TP) -> None:
        """See :meth:`on_buffer_full`."""

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps are judged against the stored position, in the transaction."""

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        """What is settled of our partitions: one that moved away meanwhile is for its new owner to commit."""
        ours = self.assignment() if self._settled else set()
        return (
            tp for tp in ours & self._settled.keys() if topics is None or tp in topics or tp.topic in topics
        )

    def _new_offset(self, tp: TP) -> int | None:
        return self._settled.get(tp)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Finish and commit what is under way, then forget the partitions."""
        await super().on_partitions_revoked(revoked)
        for tp in revoked:
            self._settled.pop(tp, None)

    async def wait_empty(self) -> None:
        """Wait for the chunk under way, then commit."""
        await self.transport.supervisor.drain_or_abandon()
        await self.commit_and_end_transactions()

    async def perform_seek(self) -> None:
        """Seek to the committed offsets, but never above what PostgreSQL says."""
        await super().perform_seek()
        await self.transport.supervisor.reconcile_offsets()

    def forget_commit(self, tp: TP) -> None:
        """The group's offset is wrong: let the next settled one be committed even if it is lower."""
        self._settled.pop(tp, None)
        self._committed_offset.pop(tp, None)

    def committed_offsets(self) -> Mapping[TP, int | None]:
        """What the group had committed when the partitions were assigned."""
        return dict(self._committed_offset)


class ChunkTransport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport with :class:`ChunkConsumer`."""

    Consumer = ChunkConsumer

    def __init__(self, url: Any, app: Any, supervisor: Supervisor) -> None:
        super().__init__(url, app)
        self.supervisor = supervisor
