"""Records for the archive, and archives that hold them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from confluent_kafka import Producer
from hypothesis import strategies as st

from services.archive.files import Archive, ArchivedRecord, FileBuilder
from services.archive.writing import Store
from services.streaming.chunks import Partition

TP = Partition("usage.v3", 2)
SOME_BYTES = st.binary(max_size=40)
HEADERS = st.lists(st.tuples(st.text(max_size=8), st.none() | SOME_BYTES), max_size=3).map(tuple)


@st.composite
def logs(draw: st.DrawFn, *, sparse: bool = True) -> list[ArchivedRecord]:
    """Records of one partition; with ``sparse`` some offsets have none."""
    offset = draw(st.integers(0, 2**40))
    records = []
    for step in draw(st.lists(st.integers(1, 3 if sparse else 1), min_size=1, max_size=60)):
        offset += step
        records.append(
            ArchivedRecord(
                offset,
                draw(st.integers(-(2**40), 2**45)),
                draw(st.none() | SOME_BYTES),
                draw(st.none() | SOME_BYTES),
                draw(HEADERS),
            )
        )
    return records


def record(offset: int, value: bytes = b"value") -> ArchivedRecord:
    """One like another."""
    return ArchivedRecord(offset, 1_790_000_000_000 + offset, b"key", value, (("h", b"1"),))


def write(
    store: Store,
    records: Sequence[ArchivedRecord],
    first: int | None = None,
    last: int | None = None,
    tp: Partition = TP,
) -> None:
    """One file; ``first`` and ``last`` are those of the records unless they are given."""
    builder = FileBuilder(tp)
    for one in records:
        builder.add(one)
    first = records[0].offset if first is None else first
    last = records[-1].offset if last is None else last
    store.put(tp, first, last, builder.finish(first, last))


def everything(
    archive: Archive, tp: Partition = TP, runs: Iterable[tuple[int, int]] | None = None
) -> list[ArchivedRecord]:
    """All that is held."""
    return [
        one
        for start, end in (archive.held(tp) if runs is None else runs)
        for batch in archive.read(tp, start, end)
        for one in batch
    ]


def log_of(kafka: str, tp: Partition) -> list[ArchivedRecord]:
    """Every record of a log."""
    return logs_of(kafka, [tp])[tp]


def logs_of(kafka: str, partitions: Sequence[Partition]) -> dict[Partition, list[ArchivedRecord]]:
    """Every record of these logs, as a client reads them that has nothing in common with the archiver's."""

    async def read() -> dict[Partition, list[ArchivedRecord]]:
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka, enable_auto_commit=False, fetch_max_wait_ms=20)
        await consumer.start()
        try:
            parts = [TopicPartition(*tp) for tp in partitions]
            consumer.assign(parts)
            starts, ends = await consumer.beginning_offsets(parts), await consumer.end_offsets(parts)
            for part in parts:
                consumer.seek(part, starts[part])
            found: dict[Partition, list[ArchivedRecord]] = {tp: [] for tp in partitions}
            while any([await consumer.position(part) < ends[part] for part in parts]):
                for part, records in (await consumer.getmany(timeout_ms=1000)).items():
                    found[Partition(*part)] += [
                        ArchivedRecord(one.offset, one.timestamp, one.key, one.value, tuple(one.headers))
                        for one in records
                    ]
            return found
        finally:
            await consumer.stop()

    return asyncio.run(read())


def assert_as_the_log(kafka: str, archive: Store, partitions: Sequence[Partition]) -> None:
    """Each log is held whole and byte for byte, in files that adjoin, with nothing left behind."""
    for tp, log in logs_of(kafka, partitions).items():
        files = archive.files(tp)
        assert all(one.next == two.first for one, two in pairwise(files))
        assert archive.held(tp) == ([(log[0].offset, log[-1].offset + 1)] if log else [])
        assert everything(archive, tp) == log
        assert archive.first_arrival(tp) == (log[0].timestamp if log else None)
        assert archive.clean(tp) == 0


def send_any(kafka: str, topics: Sequence[str], number: int, seed: int) -> None:
    """Records with any bytes, none, and headers with and without a value."""
    chance = random.Random(seed)  # noqa: S311

    def some() -> bytes | None:
        return chance.choice([None, b"", chance.randbytes(chance.randrange(300))])

    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 5})
    for _ in range(number):
        headers = [(chance.choice(["", "same", "ключ"]), some()) for _ in range(chance.randrange(4))]
        producer.produce(chance.choice(topics), some(), some(), headers=headers)
    assert producer.flush(60) == 0
