"""Publish to Kafka from an event loop, and wait for the acknowledgement of every record.

``produce`` only appends to librdkafka's queue, so it runs on the loop; one thread polls for delivery reports.
A batch wakes its waiter once, when its last report is in. A full queue refuses at once instead of growing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import structlog
from confluent_kafka import KafkaError, KafkaException, Producer

from services.wire.errors import Transient
from services.wire.kafka import producer_config

POLL_S = 0.1
HEALTH_TIMEOUT_S = 2.0

log = structlog.get_logger(__name__)


class Delivery(StrEnum):
    """What is known of one record. All but the first may be sent again under the same identity."""

    ACKNOWLEDGED = "acknowledged"
    #: Kafka refused it, or the time limit passed in the queue or on the way: it may or may not be stored.
    NOT_ACKNOWLEDGED = "not_acknowledged"
    #: Never left this process.
    QUEUE_FULL = "queue_full"


class Publisher(Protocol):
    """What a process that serves HTTP needs of Kafka."""

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]: ...
    async def check(self) -> None: ...
    async def close(self) -> None: ...


class _Batch:
    """Delivery reports of one call of ``publish``; reported to by the polling thread."""

    def __init__(self, size: int) -> None:
        self.deliveries = [Delivery.NOT_ACKNOWLEDGED] * size
        self._loop = asyncio.get_running_loop()
        self._all_in: asyncio.Future[None] = self._loop.create_future()
        self._reported = 0
        self._expected = -1

    def report(self, index: int, error: KafkaError | None, _: object) -> None:
        """One record was delivered, or was not. Runs in the polling thread."""
        if error is None:
            self.deliveries[index] = Delivery.ACKNOWLEDGED
        self._reported += 1
        if self._reported == self._expected:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    async def wait(self, expected: int, timeout_s: float) -> list[Delivery]:
        """All deliveries, once ``expected`` reports are in or the time is up."""
        # Set before it is compared, as `report` counts before it compares: one of them sees the last report.
        self._expected = expected
        if self._reported == expected:
            self._wake()
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_in
        except TimeoutError:
            pass
        return list(self.deliveries)

    def _wake(self) -> None:
        if not self._all_in.done():
            self._all_in.set_result(None)


class KafkaPublisher:
    """Publishes to one topic. ``ack_timeout_s`` bounds every wait.

    librdkafka gives up one second before the caller does, so that a record which was reported unavailable
    rarely arrives later. When it does, its retry is a duplicate.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        headers: Sequence[tuple[str, str | bytes | None]],
        *,
        client_id: str = "tidemeter",
        ack_timeout_s: float = 10.0,
        queue_messages_max: int = 100_000,
        queue_kib_max: int = 64 * 1024,
        **overrides: Any,
    ) -> None:
        self._topic = topic
        self._headers = list(headers)
        self._ack_timeout_s = ack_timeout_s
        self._config = producer_config(
            bootstrap,
            **{
                "delivery.timeout.ms": max(1000, int((ack_timeout_s - 1) * 1000)),
                "queue.buffering.max.messages": queue_messages_max,
                "queue.buffering.max.kbytes": queue_kib_max,
                # A silent broker is given up, and a returning one found, well within the wait.
                "socket.timeout.ms": max(1000, int(ack_timeout_s * 500)),
                "socket.connection.setup.timeout.ms": max(1000, int(ack_timeout_s * 500)),
                "reconnect.backoff.max.ms": 1000,
                "client.id": client_id,
                "logger": logging.getLogger("librdkafka"),  # instead of its own lines on stderr
                "error_cb": self._on_error,
                **overrides,
            },
        )
        self._fatal = False
        self._closing = threading.Event()
        self._producer = Producer(self._config)
        self._thread = threading.Thread(target=self._poll, name="tidemeter-kafka-poll", daemon=True)
        self._thread.start()

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        """Publish (key, value) pairs in order; what is known of each when all are settled, or time is up."""
        if self._fatal:
            self._replace()
        batch = _Batch(len(records))
        produce, topic, headers = self._producer.produce, self._topic, self._headers
        queued = 0
        try:
            for key, value in records:
                produce(topic, value, key, headers=headers, on_delivery=partial(batch.report, queued))
                queued += 1
        except BufferError:
            batch.deliveries[queued:] = [Delivery.QUEUE_FULL] * (len(records) - queued)
        except KafkaException as error:
            log.warning("kafka.produce_failed", error=type(error).__name__)
        return await batch.wait(queued, self._ack_timeout_s)

    async def check(self) -> None:
        """Ask for the topic's metadata.

        Raises:
            Transient: no answer, or no such topic.
        """
        try:
            metadata = await asyncio.to_thread(self._producer.list_topics, self._topic, HEALTH_TIMEOUT_S)
        except KafkaException as error:
            raise Transient("Kafka does not answer") from error
        if metadata.topics[self._topic].error is not None:
            raise Transient(f"Kafka has no usable topic {self._topic}")

    async def close(self) -> None:
        """Wait for what is on its way, at most for the acknowledgement time, and stop."""
        await asyncio.to_thread(self._producer.flush, self._ack_timeout_s)
        self._closing.set()
        await asyncio.to_thread(self._thread.join, 1.0)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(POLL_S)

    def _on_error(self, error: KafkaError) -> None:
        log.warning("kafka.error", code=error.name(), fatal=error.fatal())
        self._fatal = self._fatal or error.fatal()

    def _replace(self) -> None:
        """After a fatal error an idempotent producer is of no more use; what it held stays unacknowledged."""
        old, self._producer = self._producer, Producer(self._config)
        self._fatal = False
        old.purge()
        old.poll(0)
