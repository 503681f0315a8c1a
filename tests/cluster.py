"""Three real brokers on this machine, to be killed: one at a time, or two.

Each is a process of its own with a data directory of its own. Internal topics have three replicas, of which
two must confirm, as have the product's topics that ``tidemeter migrate`` creates here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from services.embedded.kafka import EmbeddedKafka, Membership, new_cluster_id
from services.embedded.processes import PORT_FIRST, PORT_LAST, is_free
from tests.pipeline import until

Answer = TypeVar("Answer")

NODES = (1, 2, 3)
HEAP_MB = 256


class Cluster:
    """``controllers`` are the nodes that are controllers, too: of three one may go, of one none."""

    def __init__(self, directory: Path, controllers: Sequence[int] = NODES) -> None:
        ports = dict(zip([(kind, node) for kind in "cb" for node in NODES], free_ports(6), strict=True))
        cluster_id = new_cluster_id()
        self.controllers = tuple(controllers)
        quorum = {node: ports["c", node] for node in controllers}
        self.nodes = {
            node: EmbeddedKafka(
                directory / f"kafka-{node}",
                port=ports["b", node],
                heap_mb=HEAP_MB,
                jvm_flags=("-Xms64m",),
                membership=Membership(node, len(NODES), quorum, cluster_id),
            )
            for node in NODES
        }
        self.bootstrap = ",".join(f"127.0.0.1:{ports['b', node]}" for node in NODES)

    @cached_property
    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "socket.timeout.ms": 5000})

    def make_offsets_topic(self) -> None:
        """Have the brokers make the topic of committed offsets, as the first consumer does.

        Asked for a group before it is there, librdkafka's admin client waits for a minute, and then fails an
        assertion of its own, which ends the process.
        """
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "first", "log_level": 0})

        def answered() -> bool:
            try:
                return bool(consumer.committed([TopicPartition("usage.v3", 0)], timeout=10))
            except KafkaException:  # being elected
                return False

        try:
            until(answered, "a coordinator", 60)
        finally:
            consumer.close()

    def start(self, nodes: Iterable[int] = NODES) -> None:
        """Start them at once, and wait for all."""
        every([self.nodes[node].start for node in nodes])

    def restart(self, node: int) -> None:
        """SIGTERM, which hands its leaderships over, and start it again."""
        self.nodes[node].stop()
        self.start([node])

    def leader(self, topic: str, partition: int) -> int:
        """Who leads a partition now."""
        topics = settled(lambda: self.admin.list_topics(topic, timeout=10).topics)
        return int(topics[topic].partitions[partition].leader)

    def coordinator(self, group: str) -> int:
        """Who keeps the group's offsets and members now."""

        def ask() -> int:
            # A new client each time: an old one keeps asking the coordinator that it knew.
            admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
            found = admin.describe_consumer_groups([group], request_timeout=10)[group].result()
            return int(found.coordinator.id)

        return settled(ask)

    def await_in_sync(self, away: Collection[int] = (), timeout_s: float = 60) -> None:
        """Wait until all replicas but those on ``away`` are in sync and every partition has a leader."""

        def in_sync() -> bool:
            try:
                topics = self.admin.list_topics(timeout=5).topics.values()
            except KafkaException:
                return False
            return all(
                part.leader > 0 and set(part.isrs) == set(part.replicas) - set(away)
                for topic in topics
                for part in topic.partitions.values()
            )

        until(in_sync, f"replicas in sync without {set(away) or 'exception'}", timeout_s)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            if node.pid is not None:
                node.kill()


def settled(ask: Callable[[], Answer], timeout_s: float = 30) -> Answer:
    """The answer, once leaders and coordinators know themselves; raises the last KafkaException."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except KafkaException:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def every(calls: Sequence[Callable[[], None]]) -> None:
    """Run all in threads; raises the first error once all have ended."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def free_ports(number: int) -> list[int]:
    """Different ports on loopback that are free now, below those that outgoing connections get."""
    candidates = random.sample(range(PORT_FIRST, PORT_LAST), number * 20)
    return [port for port in candidates if is_free(port)][:number]
