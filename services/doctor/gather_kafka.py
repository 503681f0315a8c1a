"""Topics and brokers as Kafka has them. Reads only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import TopicPartition

from services.doctor.facts import Clock, Topic, Topics
from services.wire.errors import Transient
from services.wire.settings import Settings
from services.wire.topics import USAGE_VERSIONS, plan_for

TIMEOUT_SECONDS = 10.0


def connect(settings: Settings) -> AdminClient:
    """A client that is silent about brokers that are away.

    Raises:
        Misconfigured: no address is known.
    """
    config: dict[str, Any] = {"bootstrap.servers": settings.kafka(), "log_level": 0, "error_cb": _ignore}
    return AdminClient(config)


def gather_topics(admin: AdminClient, settings: Settings) -> Topics:
    """Our topics with their configuration.

    Raises:
        Transient: the brokers do not answer.
        Misconfigured: more replicas shall confirm a write than there shall be.
    """
    try:
        cluster = admin.list_topics(timeout=TIMEOUT_SECONDS)
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    plans = plan_for(settings, len(cluster.brokers))
    there = {plan.name: cluster.topics[plan.name] for plan in plans if plan.name in cluster.topics}
    configs = _configs(admin, ResourceType.TOPIC, list(there))
    found = {
        name: Topic(
            len(topic.partitions),
            min((len(part.replicas) for part in topic.partitions.values()), default=0),
            configs[name],
        )
        for name, topic in there.items()
    }
    return Topics(len(cluster.brokers), settings.kafka(), tuple(plans), found)


def gather_brokers(admin: AdminClient) -> dict[str, Mapping[str, str]]:
    """The configuration of each broker, by its id.

    Raises:
        Transient: the brokers do not answer, or do not tell.
    """
    try:
        numbers = [str(number) for number in admin.list_topics(timeout=TIMEOUT_SECONDS).brokers]
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    return _configs(admin, ResourceType.BROKER, numbers)


def gather_kafka_clock(admin: AdminClient, topics: Topics) -> list[Clock]:
    """How far the newest arrival that a broker has stamped is ahead of us; nothing if none is.

    A broker's clock that is behind cannot be seen without writing a record.

    Raises:
        Transient: the brokers do not answer.
    """
    newest: Any = OffsetSpec.max_timestamp()  # type: ignore[no-untyped-call]
    wanted = {
        TopicPartition(name, number): newest
        for name, topic in topics.found.items()
        if name in USAGE_VERSIONS
        for number in range(topic.partitions)
    }
    if not wanted:
        return []
    try:
        futures = admin.list_offsets(wanted, request_timeout=TIMEOUT_SECONDS)
        stamped = max(int(future.result().timestamp) for future in futures.values()) / 1000
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    ahead = stamped - time.time()
    return [Clock("Kafka", ahead, 0.1)] if ahead > 0 else []


def _ignore(_: object) -> None:
    """What librdkafka has to say of brokers that are away is said by the finding."""


def _configs(admin: AdminClient, kind: ResourceType, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    if not names:
        return {}
    resources = [ConfigResource(kind, name) for name in names]
    futures = admin.describe_configs(resources, request_timeout=TIMEOUT_SECONDS)
    try:
        return {
            resource.name: {
                key: entry.value for key, entry in future.result().items() if entry.value is not None
            }
            for resource, future in futures.items()
        }
    except KafkaException as error:
        raise Transient(f"Kafka does not tell configurations: {error.args[0].name()}") from error
