"""The group's offset passes a record only once Kafka has what was parked of it, whoever parked it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from faust.types import TP as FaustTP

from services.streaming.chunks import Chunk, Partition
from services.streaming.offsets import Position
from services.streaming.transport import ChunkConsumer
from services.streaming.worker import Applied, Worker
from services.wire.settings import load_settings
from tests.records import Raw

TP = Partition("usage.v3", 0)


class Handler:
    """Applies what a test says: by first offset of the chunk."""

    def __init__(self) -> None:
        self.applied: dict[int, Applied] = {}
        self.free = threading.Event()
        self.free.set()

    def prepare(self, chunk: Chunk) -> Chunk:
        return chunk

    def apply(self, db: object, prepared: Chunk) -> Applied:
        self.free.wait(10)
        return self.applied[prepared.first_offset]


class Consumer:
    """Notes what the group may commit; ``committed`` is what it has."""

    def __init__(self, told: list[object]) -> None:
        self.told = told
        self.committed: dict[Any, int | None] = {}

    def settle(self, partition: Partition, next_offset: int) -> None:
        self.told.append(next_offset)

    def assignment(self) -> set[Partition]:
        return {TP}

    def committed_offsets(self) -> dict[Any, int | None]:
        return self.committed

    def forget_commit(self, tp: object) -> None:
        pass

    def pause_partitions(self, partitions: object) -> None:
        pass

    async def seek(self, tp: object, offset: int) -> None:
        pass


class Bench:
    """A worker without servers; ``told``: relays and settled offsets, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = load_settings(
            kafka_bootstrap="127.0.0.1:1",
            postgres_dsn="postgresql://127.0.0.1:1/none",
            session_timeout_seconds=2.0,
        )
        self.told: list[object] = []
        self.handler = Handler()
        self.consumer = Consumer(self.told)
        self.worker: Worker[Chunk] = Worker(settings, group="g", topics=[TP.topic], handler=self.handler)
        monkeypatch.setattr(Worker, "consumer", self.consumer)
        monkeypatch.setattr(self.worker, "_relay", lambda: self.told.append("relayed"))
        monkeypatch.setattr(self.worker.database, "connection", lambda: None)
        monkeypatch.setattr(self.worker, "_positions_for", lambda _: {TP: Position(7, [], None)})
        self.log = (0, 100)
        monkeypatch.setattr(self.worker, "_log_bounds", lambda _: {TP: self.log})
        self.worker._assigned = {TP}

    def run(self, scenario: Callable[[], Coroutine[Any, Any, None]]) -> list[object]:
        """What was told until everything was settled."""

        async def whole() -> None:
            await scenario()
            settling = asyncio.create_task(self.worker._settle())
            await self.worker._drained()
            await asyncio.wait_for(self.worker._until_settled(0), 10)
            settling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await settling

        asyncio.run(whole())
        return self.told

    async def take(self, first: int, applied: Applied) -> None:
        self.handler.applied[first] = applied
        await self.worker._take(Chunk(TP, [Raw(first, b"")]))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_chunk_that_parked_nothing_waits_for_no_relay(bench: Bench) -> None:
    assert bench.run(lambda: bench.take(0, Applied(1))) == [1]


@pytest.mark.parametrize(
    "applied", [Applied(1, outbox_rows=1), Applied(1, redelivered=True), Applied(1, halted="too_many_parked")]
)
def test_what_may_have_rows_waiting_is_relayed_for_first(bench: Bench, applied: Applied) -> None:
    """Halted: by another worker, that may have been killed before it relayed for the record in front."""
    assert bench.run(lambda: bench.take(0, applied)) == ["relayed", 1]


def test_a_chunk_behind_an_abandoned_one_is_settled_only_after_a_relay(bench: Bench) -> None:
    """The transaction of the first parks, and commits after a rebalance gave up waiting for it."""

    async def scenario() -> None:
        bench.handler.free.clear()
        await bench.take(0, Applied(1, outbox_rows=2))
        behind = asyncio.create_task(bench.take(1, Applied(2)))
        await bench.worker.drain_or_abandon()
        await behind
        bench.handler.free.set()

    assert bench.run(scenario) == ["relayed", 2]


@pytest.mark.parametrize("committed", [None, 9])
def test_a_group_offset_that_is_set_to_the_stored_position_waits_for_a_relay(
    bench: Bench, committed: int | None
) -> None:
    """Nothing below that position comes again, and its last owner may not have relayed for it."""
    bench.consumer.committed = {TP: committed}
    assert bench.run(bench.worker.reconcile_offsets) == ["relayed", 7]


def test_a_group_offset_whose_records_are_gone_is_set_to_the_stored_position_after_a_relay(
    bench: Bench,
) -> None:
    """What lies between may be gone too when it would be fetched, and then nothing comes to be committed."""
    bench.consumer.committed, bench.log = {TP: 3}, (5, 100)
    assert bench.run(bench.worker.reconcile_offsets) == ["relayed", 7]


@pytest.mark.parametrize(("committed", "log_start"), [(3, 3), (7, 7)])
def test_a_group_offset_inside_the_log_is_left_to_what_is_read_again(
    bench: Bench, committed: int, log_start: int
) -> None:
    bench.consumer.committed, bench.log = {TP: committed}, (log_start, 100)
    assert bench.run(bench.worker.reconcile_offsets) == []


@pytest.mark.parametrize(
    ("log", "reason"), [((8, 100), ("offset_gap", 8)), ((0, 6), ("log_truncated", None))]
)
def test_a_position_outside_of_the_log_halts_and_the_group_offset_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, log: tuple[int, int], reason: tuple[str, int | None]
) -> None:
    """Also without a record that would show the gap: a lag that nobody works off ends workers for ever."""
    halts: list[tuple[str, int | None]] = []

    def store_halt(tp: Partition, reason: str, log_start: int | None) -> bool:
        halts.append((reason, log_start))
        return True

    monkeypatch.setattr(bench.worker, "_store_halt", store_halt)
    bench.consumer.committed, bench.log = {TP: 5}, log
    assert bench.run(bench.worker.reconcile_offsets) == []
    assert halts == [reason]
    assert bench.worker._halted == {TP: reason[0]}


def test_what_is_settled_of_a_partition_that_moved_away_is_not_committed_again_and_again() -> None:
    """Faust tries to, and tells of it in its log, at every commit until the partition comes back."""
    consumer = ChunkConsumer.__new__(ChunkConsumer)
    consumer._settled = {}
    assert not set(consumer._filter_tps_with_pending_acks())
    here, away = FaustTP(TP.topic, 0), FaustTP(TP.topic, 1)
    consumer.assignment = lambda: {here}
    for tp in (here, away):
        consumer.settle(Partition(tp.topic, tp.partition), 5)
    assert set(consumer._filter_tps_with_pending_acks()) == {here}
    assert set(consumer._filter_tps_with_pending_acks([TP.topic])) == {here}
    assert not set(consumer._filter_tps_with_pending_acks([away]))
