"""The producer client; see the package for how to use it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.wire.errors import Transient
from services.wire.kafka import producer_config
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import UsageEvent, encode_usage, record_key, to_record, usage_encoder

POLL_S = 0.1
NAMED_KEYS_MAX = 3
QUEUE_KIB_MAX = 256 * 1024

log = structlog.get_logger(__name__)


class Backpressure(Transient):
    """The queue stayed full for as long as ``send`` may block. The event was not queued."""


class NotAcknowledged(Transient):
    """Kafka did not acknowledge these events: each may or may not be stored.

    Sending them again with the same idempotency keys is harmless and settles it.
    """

    def __init__(self, idempotency_keys: list[str]) -> None:
        named = ", ".join(idempotency_keys[:NAMED_KEYS_MAX])
        more = ", …" if len(idempotency_keys) > NAMED_KEYS_MAX else ""
        super().__init__(f"{len(idempotency_keys)} events not acknowledged: {named}{more}")
        self.idempotency_keys = idempotency_keys


class ReceiptState(StrEnum):
    """What is known of one event."""

    PENDING = "pending"
    ACKNOWLEDGED = "acknowledged"
    #: It may or may not be stored; `Receipt.error` names Kafka's reason.
    UNKNOWN = "unknown"


class Receipt:
    """One event's way: ``state`` changes once, from pending to acknowledged or unknown.

    ``partition`` and ``offset`` are set when it is acknowledged; ``error`` is Kafka's error name otherwise.
    """

    __slots__ = ("error", "idempotency_key", "offset", "partition", "state")

    def __init__(self, idempotency_key: str) -> None:
        self.idempotency_key = idempotency_key
        self.state = ReceiptState.PENDING
        self.partition: int | None = None
        self.offset: int | None = None
        self.error: str | None = None

    def __repr__(self) -> str:
        return (
            f"<Receipt {self.state.value} partition={self.partition} offset={self.offset} error={self.error}>"
        )


class UsageProducer:
    """Sends usage events; safe to share between threads, not between processes.

    Args:
        bootstrap: brokers, ``host:port[,host:port]``.
        source: what wrote the record; stored with it, not part of its content.
        on_delivery: called once for each event, in the polling thread, when its receipt is settled. It must
            be quick; what it raises is logged and dropped.
        queue_events_max: events on their way at most; beyond, ``send`` blocks.
        block_s: how long ``send`` may block before it raises Backpressure.
        confluent_id: id of the usage schema in a registry, if one is used.
        now_us: clock in microseconds since 1970.
        kafka: further librdkafka settings, such as security.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        source: str = "producer",
        on_delivery: Callable[[Receipt], None] | None = None,
        queue_events_max: int = 50_000,
        block_s: float = 10.0,
        confluent_id: int | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        kafka: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = source
        self._on_delivery = on_delivery
        self._queue_events_max = queue_events_max
        self._block_s = block_s
        self._now_us = now_us
        self._encoder = usage_encoder(confluent_id)
        self._headers: list[tuple[str, str | bytes | None]] = list(self._encoder.headers)
        self._config = producer_config(
            bootstrap,
            **{
                "client.id": f"tidemeter-{source}",
                "logger": logging.getLogger("librdkafka"),  # instead of its own lines on stderr
                "queue.buffering.max.messages": queue_events_max,
                "queue.buffering.max.kbytes": QUEUE_KIB_MAX,
                **(kafka or {}),
            },
        )
        self._producer = Producer(self._config)
        self._settled = threading.Condition()
        self._pending: dict[int, Receipt] = {}
        self._unknown: list[str] = []
        self._number = 0
        self._sent = 0
        self._acknowledged = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="tidemeter-producer-poll", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> int:
        """Events queued so far."""
        return self._sent

    @property
    def acknowledged(self) -> int:
        """Events acknowledged so far."""
        return self._acknowledged

    @property
    def pending(self) -> int:
        """Events on their way."""
        return len(self._pending)

    def send(self, event: UsageEvent) -> Receipt:
        """Check ``event`` and queue it; its receipt is settled later.

        Raises:
            Invalid: it breaks a rule; nothing was queued.
            Backpressure: the queue stayed full for ``block_s``; nothing was queued.
            NotAcknowledged: Kafka refused it at once; or nobody called ``flush`` and a whole queue of earlier
                events was given up, which it names: then this one was not queued.
        """
        record = to_record(event, source=self._source, now_us=self._now_us())
        value = encode_usage(self._encoder, record)
        key = record_key(event.tenant_id, event.customer_ref, event.meter)
        deadline_s = time.monotonic() + self._block_s
        while True:
            number, receipt = self._admit(event.idempotency_key, deadline_s)
            try:
                self._producer.produce(
                    USAGE_CURRENT,
                    value,
                    key,
                    headers=self._headers,
                    on_delivery=partial(self._report, number),
                )
                return receipt
            except BufferError:  # full by bytes, or reports are still to come
                self._withdraw(number)
                if time.monotonic() >= deadline_s:
                    raise Backpressure("the queue is full") from None
                time.sleep(POLL_S / 10)
            except KafkaException as error:
                self._withdraw(number)
                if error.args[0].fatal():
                    self._replace()
                raise NotAcknowledged([event.idempotency_key]) from error

    def flush(self, timeout_s: float = 35.0) -> None:
        """Wait until every event sent so far is acknowledged.

        The default is longer than the 30 s after which Kafka's client gives an event up.

        Raises:
            NotAcknowledged: some are not: given up since the last flush, or still on their way after
                ``timeout_s``. The latter stay queued and may still arrive.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._settled:
            while self._pending and (rest_s := deadline_s - time.monotonic()) > 0:
                self._settled.wait(rest_s)
            lost = self._unknown + [receipt.idempotency_key for receipt in self._pending.values()]
            self._unknown = []
        if lost:
            raise NotAcknowledged(lost)

    def close(self, timeout_s: float = 35.0) -> None:
        """Flush and stop; the producer cannot be used afterwards.

        Raises:
            NotAcknowledged: as ``flush``; what is still queued is then dropped.
        """
        try:
            self.flush(timeout_s)
        finally:
            self._producer.purge()
            self._producer.flush(POLL_S)
            self._closing.set()
            self._thread.join(2 * POLL_S)

    def __enter__(self) -> UsageProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except NotAcknowledged as lost:
            if error is None:
                raise
            error.add_note(str(lost))

    def _admit(self, idempotency_key: str, deadline_s: float) -> tuple[int, Receipt]:
        with self._settled:
            if len(self._unknown) >= self._queue_events_max:
                lost, self._unknown = self._unknown, []
                raise NotAcknowledged(lost)
            while len(self._pending) >= self._queue_events_max:
                rest_s = deadline_s - time.monotonic()
                if rest_s <= 0:
                    raise Backpressure(f"{len(self._pending)} events are on their way; the queue is full")
                self._settled.wait(rest_s)
            self._sent += 1
            self._number += 1
            receipt = self._pending[self._number] = Receipt(idempotency_key)
            return self._number, receipt

    def _withdraw(self, number: int) -> None:
        with self._settled:
            del self._pending[number]
            self._sent -= 1
            self._settled.notify_all()

    def _replace(self) -> None:
        """After a fatal error an idempotent producer is of no use; what it held is settled as unknown."""
        old, self._producer = self._producer, Producer(self._config)
        old.purge()
        old.flush(POLL_S)

    def _report(self, number: int, error: KafkaError | None, message: Message) -> None:
        with self._settled:
            receipt = self._pending.pop(number)
            if error is None:
                receipt.partition, receipt.offset = message.partition(), message.offset()
                receipt.state = ReceiptState.ACKNOWLEDGED
                self._acknowledged += 1
            else:
                receipt.error = error.name()
                receipt.state = ReceiptState.UNKNOWN
                self._unknown.append(receipt.idempotency_key)
            if not self._pending or len(self._pending) == self._queue_events_max - 1:
                self._settled.notify_all()
        if self._on_delivery is not None:
            try:
                self._on_delivery(receipt)
            except Exception as failure:
                log.error("producer.on_delivery_raised", error=type(failure).__name__)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(POLL_S)
