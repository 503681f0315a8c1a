"""Read logs and the lag of a consumer group with the brokers' own numbers, not with the consumer's view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import ListOffsetsResultInfo, OffsetSpec

from services.streaming.chunks import Partition
from services.streaming.resetting import First
from services.wire.errors import Transient


def topic_partitions(admin: AdminClient, topics: Iterable[str], timeout_s: float = 10.0) -> list[Partition]:
    """Every partition of ``topics`` that exists.

    Raises:
        Transient: the brokers do not answer.
    """
    try:
        known = admin.list_topics(timeout=timeout_s).topics
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    return [
        Partition(topic, number) for topic in topics if topic in known for number in known[topic].partitions
    ]


def log_starts(
    admin: AdminClient, partitions: Iterable[Partition], timeout_s: float = 10.0
) -> dict[Partition, int]:
    """The first offset that is still there, for each partition.

    Raises:
        Transient: the brokers do not answer.
    """
    return _list_offsets(admin, partitions, OffsetSpec.earliest(), timeout_s)  # type: ignore[no-untyped-call]


def log_ends(
    admin: AdminClient, partitions: Iterable[Partition], timeout_s: float = 10.0
) -> dict[Partition, int]:
    """The offset after the last record, for each partition.

    Raises:
        Transient: the brokers do not answer.
    """
    return _list_offsets(admin, partitions, OffsetSpec.latest(), timeout_s)  # type: ignore[no-untyped-call]


def first_records(
    admin: AdminClient, partitions: Iterable[Partition], at_ms: int, timeout_s: float = 10.0
) -> dict[Partition, First | None]:
    """The first record whose timestamp is ``at_ms`` or later, for each partition; None when there is none.

    Raises:
        Transient: the brokers do not answer.
    """
    spec = OffsetSpec.for_timestamp(max(0, at_ms))  # below 0 they mean something else
    firsts = {
        tp: First(found.offset, found.timestamp) if found.offset >= 0 else None
        for tp, found in _ask(admin, partitions, spec, timeout_s).items()
    }
    # A broker that died under the question has said the same as one without such a record: see below.
    log_ends(admin, [tp for tp, first in firsts.items() if first is None], timeout_s)
    return firsts


def _list_offsets(
    admin: AdminClient, partitions: Iterable[Partition], spec: OffsetSpec, timeout_s: float
) -> dict[Partition, int]:
    offsets = {tp: found.offset for tp, found in _ask(admin, partitions, spec, timeout_s).items()}
    # When a broker dies under a question, librdkafka answers with less than 0 and without an error.
    if min(offsets.values(), default=0) < 0:
        raise Transient("Kafka does not answer")
    return offsets


def _ask(
    admin: AdminClient, partitions: Iterable[Partition], spec: OffsetSpec, timeout_s: float
) -> dict[Partition, ListOffsetsResultInfo]:
    wanted = {TopicPartition(tp.topic, tp.partition): spec for tp in partitions}
    if not wanted:
        return {}
    try:
        futures = admin.list_offsets(wanted, request_timeout=timeout_s)
        return {Partition(tp.topic, tp.partition): future.result() for tp, future in futures.items()}
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error


def behind(ends: Mapping[Partition, int], positions: Mapping[Partition, int]) -> dict[Partition, int]:
    """Records between each position and the end of its log; a partition without a position counts from 0."""
    return {tp: max(0, end - positions.get(tp, 0)) for tp, end in ends.items()}
