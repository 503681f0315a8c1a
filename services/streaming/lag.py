"""Read the lag of a consumer group with the brokers' own numbers, not with the consumer's view of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from services.streaming.chunks import Partition
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


def _list_offsets(
    admin: AdminClient, partitions: Iterable[Partition], spec: OffsetSpec, timeout_s: float
) -> dict[Partition, int]:
    wanted = {TopicPartition(tp.topic, tp.partition): spec for tp in partitions}
    if not wanted:
        return {}
    try:
        futures = admin.list_offsets(wanted, request_timeout=timeout_s)
        offsets = {
            Partition(tp.topic, tp.partition): future.result().offset for tp, future in futures.items()
        }
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    # When a broker dies under a question, librdkafka answers with less than 0 and without an error.
    if min(offsets.values()) < 0:
        raise Transient("Kafka does not answer")
    return offsets


def behind(ends: Mapping[Partition, int], positions: Mapping[Partition, int]) -> dict[Partition, int]:
    """Records between each position and the end of its log; a partition without a position counts from 0."""
    return {tp: max(0, end - positions.get(tp, 0)) for tp, end in ends.items()}
