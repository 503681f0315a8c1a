"""What Kafka remembers of a consumer group: its members and its committed offsets; and the change of these.

Reads as the brokers say, and joins the positions in PostgreSQL to it for ``resetting``. A worker may go on
meanwhile, so the questions are asked in the order in which nothing that is well can look wrong: what is
committed, the beginnings of the logs, the positions, the ends of the logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from services.streaming.chunks import Partition
from services.streaming.lag import log_ends, log_starts, topic_partitions
from services.streaming.offsets import Connection, read_positions
from services.streaming.resetting import Stand
from services.wire.errors import Transient

REQUEST_SECONDS = 10.0
#: For so long a coordinator that is being elected, or reads its log, is asked again.
COORDINATOR_SECONDS = 15.0
_COORDINATOR_LATER = ("COORDINATOR_LOAD_IN_PROGRESS", "COORDINATOR_NOT_AVAILABLE", "NOT_COORDINATOR")
_NO_SUCH_GROUP = "GROUP_ID_NOT_FOUND"

EMPTY, DEAD = "Empty", "Dead"


@dataclass(frozen=True, slots=True)
class Member:
    """A process that holds the group. ``name`` is that of static membership."""

    name: str | None
    client: str
    host: str
    partitions: int

    def __str__(self) -> str:
        return f"{self.name or self.client} at {self.host}, with {self.partitions} partitions"


@dataclass(frozen=True, slots=True)
class Group:
    """State in Kafka's words; ``Dead`` is a group that Kafka does not know."""

    state: str
    members: tuple[Member, ...] = ()

    @property
    def active(self) -> bool:
        """Kafka lets nobody but its members commit."""
        return self.state not in (EMPTY, DEAD)


def describe(admin: AdminClient, group: str) -> Group:
    """State and members of ``group``.

    Raises:
        Transient: the brokers do not answer.
    """

    def ask() -> Future[Any]:
        return admin.describe_consumer_groups([group], request_timeout=REQUEST_SECONDS)[group]

    try:
        found = _answer(ask)
    except KafkaException as error:
        if error.args[0].name() == _NO_SUCH_GROUP:
            return Group(DEAD)
        raise Transient("Kafka does not answer") from error
    members = [
        Member(
            member.group_instance_id,
            member.client_id,
            member.host.removeprefix("/"),
            len(member.assignment.topic_partitions),
        )
        for member in found.members
    ]
    state = found.state.name.replace("_", " ").capitalize()
    return Group(state, tuple(sorted(members, key=str)))


def committed(admin: AdminClient, group: str) -> dict[Partition, int]:
    """Every offset that Kafka remembers for ``group``.

    Raises:
        Transient: the brokers do not answer.
    """

    def ask() -> Future[Any]:
        return admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(group)], request_timeout=REQUEST_SECONDS
        )[group]

    try:
        found = _answer(ask).topic_partitions
        if wrong := [tp for tp in found if tp.error is not None]:
            raise KafkaException(wrong[0].error)
    except KafkaException as error:
        raise Transient("Kafka does not answer") from error
    return {Partition(tp.topic, tp.partition): tp.offset for tp in found if tp.offset >= 0}


def stands(admin: AdminClient, db: Connection, group: str, topics: Sequence[str]) -> dict[Partition, Stand]:
    """Where ``group`` stands in every partition that ``topics`` have or that it ever read of them.

    A partition that is not there any more shows as an empty log.

    Raises:
        Transient: the brokers do not answer.
    """
    there = topic_partitions(admin, topics)
    offsets = committed(admin, group)
    starts = log_starts(admin, there)
    positions = read_positions(db, group)
    ends = log_ends(admin, there)
    return {
        tp: Stand(
            offsets.get(tp),
            positions[tp].next_offset if tp in positions else None,
            starts.get(tp, 0),
            ends.get(tp, 0),
            positions[tp].halted if tp in positions else None,
        )
        for tp in sorted({*there, *(tp for tp in positions if tp.topic in topics)})
    }


def commit(admin: AdminClient, group: str, moves: Mapping[Partition, int]) -> dict[Partition, str]:
    """Have Kafka remember ``moves`` for a group without members; returns why, for each that it refused.

    When no answer comes, nobody knows what it remembers now: that is said of each, too.
    """
    wanted = [TopicPartition(tp.topic, tp.partition, offset) for tp, offset in moves.items()]

    def ask() -> Future[Any]:
        return admin.alter_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(group, wanted)], request_timeout=REQUEST_SECONDS
        )[group]

    try:
        answered = _answer(ask).topic_partitions
    except KafkaException as error:
        return dict.fromkeys(moves, f"{error.args[0].name()}: it may have moved, or not")
    return {
        Partition(tp.topic, tp.partition): _refusal(tp.error.name())
        for tp in answered
        if tp.error is not None
    }


def _refusal(name: str) -> str:
    return f"{name}: the group has a member again" if name == "UNKNOWN_MEMBER_ID" else name


def _answer(ask: Callable[[], Future[Any]]) -> Any:
    """The answer of the group's coordinator, once there is one.

    Raises:
        KafkaException: it refuses, or does not answer.
    """
    deadline = time.monotonic() + COORDINATOR_SECONDS
    while True:
        try:
            return ask().result()
        except KafkaException as error:
            if error.args[0].name() not in _COORDINATOR_LATER or time.monotonic() > deadline:
                raise
        time.sleep(0.2)
