"""Every topic of the product: its name, and how it is created.

The names stand here and nowhere else. Usage topics carry *arrival* time as the record timestamp
(``LogAppendTime``): offset windows over time are then exact, and retention cannot delete a late event early.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic

from services.wire.errors import Misconfigured, Transient
from services.wire.settings import Settings

#: Topic of each usage_event version. Readers take all of them; writers use the current one.
USAGE_TOPICS: dict[int, str] = {1: "usage.v1", 2: "usage.v2", 3: "usage.v3"}
USAGE_VERSIONS: dict[str, int] = {topic: version for version, topic in USAGE_TOPICS.items()}
USAGE_CURRENT = USAGE_TOPICS[max(USAGE_TOPICS)]

STRIPE_WEBHOOKS = "stripe_webhooks.v1"
DELTAS = "deltas.v1"
DEAD_LETTERS = "dead_letters.v1"
UPCAST_FAILURES = "upcast_failures.v1"
CONFLICTS = "conflicts.v1"
ADJUSTMENTS = "adjustments.v1"
OPS = "ops.v1"

DAY_MS = 86_400_000
#: One may be away, and another be lost meanwhile.
REPLICAS_WANTED = 3


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """One topic as it shall be. Retention in milliseconds, -1 for ever."""

    name: str
    partitions: int
    replication: int
    min_insync_replicas: int
    retention_ms: int
    config: dict[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """Topic configuration as Kafka names it."""
        return {
            "retention.ms": str(self.retention_ms),
            "min.insync.replicas": str(self.min_insync_replicas),
            "max.message.bytes": str(1024 * 1024),
            **self.config,
        }


def plan_topics(
    *, partitions: int, replication: int, min_insync_replicas: int, usage_retention_days: int
) -> list[TopicPlan]:
    """All topics of the product for a cluster of the given size."""

    def topic(name: str, retention_days: int, **config: str) -> TopicPlan:
        retention_ms = retention_days * DAY_MS if retention_days > 0 else -1
        return TopicPlan(name, partitions, replication, min_insync_replicas, retention_ms, config)

    arrival = {"message.timestamp.type": "LogAppendTime"}
    # The largest record of another topic, and the headers that say why it is here.
    roomy = {"max.message.bytes": str(2 * 1024 * 1024)}
    return [
        *(topic(name, usage_retention_days, **arrival) for name in USAGE_TOPICS.values()),
        topic(STRIPE_WEBHOOKS, 90, **arrival),
        topic(DELTAS, usage_retention_days),
        topic(DEAD_LETTERS, -1, **roomy),
        topic(UPCAST_FAILURES, -1, **roomy),
        topic(CONFLICTS, usage_retention_days, **roomy),
        topic(ADJUSTMENTS, -1),
        topic(OPS, 90),
    ]


def plan_for(settings: Settings, brokers: int | None = None) -> list[TopicPlan]:
    """All topics as ``settings`` say; where they do not, as safe as the brokers that there are can keep them.

    Without ``brokers``, how many they are, they are asked.

    Raises:
        Transient: the brokers do not answer.
        Misconfigured: no brokers are named, or more replicas must confirm a write than there are.
    """
    replication = settings.topic_replication or min(
        REPLICAS_WANTED, _brokers(settings.kafka()) if brokers is None else brokers
    )
    in_sync = settings.min_insync_replicas or max(1, replication - 1)
    if in_sync > replication:
        raise Misconfigured(
            f"TIDEMETER_MIN_INSYNC_REPLICAS={in_sync} of {replication} replicas: nothing could be written"
        )
    return plan_topics(
        partitions=settings.topic_partitions,
        replication=replication,
        min_insync_replicas=in_sync,
        usage_retention_days=settings.usage_retention_days,
    )


def _brokers(bootstrap: str) -> int:
    try:
        return len(AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10.0).brokers)
    except KafkaException as error:
        raise Transient(f"Kafka at {bootstrap} does not answer") from error


def create_topics(bootstrap: str, plans: Iterable[TopicPlan], *, timeout_s: float = 30.0) -> list[str]:
    """Create what is missing, check what is there, and return the names created.

    Raises:
        Transient: the brokers do not answer.
        Misconfigured: an existing usage topic has producer timestamps, which would make windows inexact.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap, "socket.timeout.ms": int(timeout_s * 1000)})
    wanted = {plan.name: plan for plan in plans}
    try:
        present = set(admin.list_topics(timeout=timeout_s).topics)
    except KafkaException as error:
        raise Transient(f"Kafka at {bootstrap} does not answer") from error
    missing = [plan for name, plan in wanted.items() if name not in present]
    requests = [
        NewTopic(
            plan.name,
            num_partitions=plan.partitions,
            replication_factor=plan.replication,
            config=plan.settings(),
        )
        for plan in missing
    ]
    if requests:
        for name, future in admin.create_topics(requests, operation_timeout=timeout_s).items():
            try:
                future.result()
            except KafkaException as error:
                if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                    raise Misconfigured(f"cannot create topic {name}: {error.args[0].str()}") from error
        _await_leaders(admin, [plan.name for plan in missing], timeout_s)
    _check_timestamps(admin, [name for name in wanted if name in present and name in USAGE_VERSIONS])
    return [plan.name for plan in missing]


def _await_leaders(admin: AdminClient, names: list[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        topics = admin.list_topics(timeout=timeout_s).topics
        if all(
            name in topics and all(part.leader >= 0 for part in topics[name].partitions.values())
            for name in names
        ):
            return
        time.sleep(0.05)
    raise Transient(f"topics have no leader after {timeout_s:.0f} s: {', '.join(names)}")


def _check_timestamps(admin: AdminClient, names: list[str]) -> None:
    if not names:
        return
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    for resource, future in admin.describe_configs(resources).items():
        entry = future.result().get("message.timestamp.type")
        if entry is not None and entry.value != "LogAppendTime":
            raise Misconfigured(
                f"topic {resource.name} has message.timestamp.type={entry.value}; usage topics need "
                f"LogAppendTime: kafka-configs --alter --topic {resource.name} "
                "--add-config message.timestamp.type=LogAppendTime"
            )
