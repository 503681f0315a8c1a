"""The producer client on real Kafka: receipts, back-pressure, and honesty about what is not acknowledged."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest

from services.producer import (
    Backpressure,
    Invalid,
    NotAcknowledged,
    Receipt,
    ReceiptState,
    UsageEvent,
    UsageProducer,
)
from tests.integration.ingest_serving import records_of
from tests.proxy import KafkaProxy

QUICK = {"delivery.timeout.ms": 1500, "socket.timeout.ms": 1000, "reconnect.backoff.max.ms": 200}


@pytest.fixture
def tenant() -> str:
    return f"t-{secrets.token_hex(6)}"


@pytest.fixture
def proxy(kafka_bootstrap: str) -> Iterator[KafkaProxy]:
    with KafkaProxy(kafka_bootstrap) as proxy:
        yield proxy


def event(tenant: str, key: str = "k1", **changes: Any) -> UsageEvent:
    fields: dict[str, Any] = {"customer_ref": "cust_42", "meter": "requests", "quantity": 1}
    return UsageEvent(tenant_id=tenant, idempotency_key=key, **{**fields, **changes})


def test_leaving_the_block_means_that_everything_is_acknowledged(kafka_bootstrap: str, tenant: str) -> None:
    delivered: list[Receipt] = []
    with UsageProducer(kafka_bootstrap, on_delivery=delivered.append) as producer:
        receipts = [producer.send(event(tenant, f"k{number}")) for number in range(2500)]
    assert (producer.sent, producer.acknowledged, producer.pending) == (2500, 2500, 0)
    assert all(receipt.state is ReceiptState.ACKNOWLEDGED for receipt in receipts)
    assert all(receipt.partition is not None and receipt.offset is not None for receipt in receipts)
    assert {receipt.idempotency_key for receipt in delivered} == {f"k{number}" for number in range(2500)}
    stored = records_of(kafka_bootstrap, tenant, at_least=2500)
    assert len(stored) == 2500
    assert stored[0]["source"] == "producer"


def test_events_of_one_item_stay_in_order_on_one_partition(kafka_bootstrap: str, tenant: str) -> None:
    with UsageProducer(kafka_bootstrap) as producer:
        receipts = [producer.send(event(tenant, f"k{number}")) for number in range(50)]
    assert len({receipt.partition for receipt in receipts}) == 1
    offsets = [receipt.offset for receipt in receipts]
    assert offsets == sorted(offsets)  # type: ignore[type-var]


def test_an_invalid_event_is_refused_before_it_is_queued(kafka_bootstrap: str, tenant: str) -> None:
    with UsageProducer(kafka_bootstrap) as producer:
        for quantity in (Decimal("NaN"), "1e400", "-0", "", 0.1, None):
            with pytest.raises(Invalid):
                producer.send(event(tenant, quantity=quantity))
        assert (producer.sent, producer.pending) == (0, 0)


def test_flush_names_what_is_not_acknowledged_and_sending_it_again_is_enough(
    proxy: KafkaProxy, kafka_bootstrap: str, tenant: str
) -> None:
    with UsageProducer(proxy.bootstrap, kafka=QUICK) as producer:
        producer.send(event(tenant, "before"))
        producer.flush()
        proxy.cut()
        lost = [producer.send(event(tenant, key)) for key in ("a", "b", "c", "d")]
        with pytest.raises(NotAcknowledged, match="4 events not acknowledged: a, b, c, …") as caught:
            producer.flush(timeout_s=10)
        assert caught.value.idempotency_keys == ["a", "b", "c", "d"]
        assert {receipt.state for receipt in lost} == {ReceiptState.UNKNOWN}
        assert lost[0].error == "_MSG_TIMED_OUT"
        proxy.restore()
        for key in caught.value.idempotency_keys:
            _send_until_acknowledged(producer, event(tenant, key))
    stored = {record["idempotency_key"] for record in records_of(kafka_bootstrap, tenant, at_least=5)}
    assert stored == {"before", "a", "b", "c", "d"}


def _send_until_acknowledged(producer: UsageProducer, again: UsageEvent) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        producer.send(again)
        try:
            producer.flush(timeout_s=10)
            return
        except NotAcknowledged:
            assert time.monotonic() < deadline_s, "no retry succeeded"


def test_flush_returns_in_time_and_names_what_is_still_on_its_way(proxy: KafkaProxy, tenant: str) -> None:
    proxy.cut()
    producer = UsageProducer(proxy.bootstrap)
    receipt = producer.send(event(tenant, "slow"))
    started_s = time.monotonic()
    with pytest.raises(NotAcknowledged) as caught:
        producer.flush(timeout_s=0.3)
    assert time.monotonic() - started_s < 1
    assert (caught.value.idempotency_keys, receipt.state) == (["slow"], ReceiptState.PENDING)
    with pytest.raises(NotAcknowledged):
        producer.close(timeout_s=0)
    assert receipt.state is ReceiptState.UNKNOWN


def test_a_full_queue_blocks_for_a_while_and_then_says_so(proxy: KafkaProxy, tenant: str) -> None:
    proxy.cut()
    producer = UsageProducer(proxy.bootstrap, queue_events_max=3, block_s=0.3)
    for number in range(3):
        producer.send(event(tenant, f"k{number}"))
    started_s = time.monotonic()
    with pytest.raises(Backpressure):
        producer.send(event(tenant, "k3"))
    assert 0.25 < time.monotonic() - started_s < 2
    assert producer.pending == producer.sent == 3
    with pytest.raises(NotAcknowledged):
        producer.close(timeout_s=0)


def test_a_full_queue_goes_on_as_soon_as_there_is_room(kafka_bootstrap: str, tenant: str) -> None:
    with UsageProducer(kafka_bootstrap, queue_events_max=5) as producer:
        for number in range(200):
            producer.send(event(tenant, f"k{number}"))
            assert producer.pending <= 5
    assert producer.acknowledged == 200


def test_losses_that_nobody_asks_for_stop_the_sender_instead_of_piling_up(
    proxy: KafkaProxy, tenant: str
) -> None:
    proxy.cut()
    producer = UsageProducer(proxy.bootstrap, queue_events_max=2, kafka={**QUICK, "delivery.timeout.ms": 300})
    with pytest.raises(NotAcknowledged) as caught:
        for number in range(5):
            producer.send(event(tenant, f"k{number}"))
    assert caught.value.idempotency_keys[:2] == ["k0", "k1"]
    with suppress(NotAcknowledged):
        producer.close(timeout_s=0)


def test_a_failing_callback_loses_nothing(kafka_bootstrap: str, tenant: str) -> None:
    def broken(_: Receipt) -> None:
        raise RuntimeError("mine")

    with UsageProducer(kafka_bootstrap, on_delivery=broken) as producer:
        producer.send(event(tenant))
    assert producer.acknowledged == 1


def test_an_error_in_the_block_is_not_hidden_by_what_was_lost(proxy: KafkaProxy, tenant: str) -> None:
    proxy.cut()
    with pytest.raises(ZeroDivisionError) as caught, UsageProducer(proxy.bootstrap, kafka=QUICK) as producer:
        producer.send(event(tenant, "a"))
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["1 events not acknowledged: a"]
