"""Kafka producers of the product: one configuration, and delivery that is counted, not hoped for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from services.wire.errors import Misconfigured, Transient


def producer_config(bootstrap: str, **overrides: Any) -> dict[str, Any]:
    """librdkafka settings: idempotent, acknowledged by all in-sync replicas, batched for a few milliseconds.

    ``murmur2_random`` puts a key on the partition the Java client would choose, so that every producer of any
    language sends one item to one partition.

    Raises:
        Misconfigured: ``overrides`` would make an acknowledgement mean less.
    """
    weaker = sorted(
        name for name in ("acks", "enable.idempotence", "request.required.acks") if name in overrides
    )
    if weaker:
        raise Misconfigured(f"{weaker[0]} cannot be overridden: an acknowledged record has to stay, once")
    return {
        "bootstrap.servers": bootstrap,
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "lz4",
        "linger.ms": 5,
        "batch.size": 256 * 1024,
        # The brokers judge sizes, after compression. A record that could be read can be parked.
        "message.max.bytes": 128 * 1024 * 1024,
        "partitioner": "murmur2_random",
        "delivery.timeout.ms": 30_000,
        "queue.buffering.max.messages": 100_000,
        **overrides,
    }


class AckedProducer:
    """Produces a batch and returns when the brokers have acknowledged every record of it."""

    def __init__(self, bootstrap: str, **overrides: Any) -> None:
        self._config = producer_config(bootstrap, **overrides)
        self._producer = Producer(self._config)

    def send_all(
        self, records: Iterable[tuple[str, bytes | None, bytes, Mapping[str, bytes]]], timeout_s: float = 35.0
    ) -> None:
        """Send (topic, key, value, headers) in order and wait for all acknowledgements.

        Raises:
            Transient: any record was not acknowledged; some of the others may have been written.
        """
        failures: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: object) -> None:
            if error is not None:
                failures.append(error)

        try:
            for topic, key, value, headers in records:
                while True:
                    try:
                        self._producer.produce(
                            topic, key=key, value=value, headers=dict(headers), on_delivery=delivered
                        )
                        break
                    except BufferError:
                        self._producer.poll(0.1)
            unsent = self._producer.flush(timeout_s)
        except KafkaException as error:
            self._replace()
            raise Transient("Kafka refused a record") from error
        if unsent or failures:
            self._replace()
            raise Transient(f"Kafka did not acknowledge {unsent or len(failures)} records")

    def _replace(self) -> None:
        """A failed producer may still hold records; a new one cannot send them behind our back."""
        self._producer.purge()
        self._producer = Producer(self._config)
