"""Kafka cut off or silent: a bounded wait, an answer per event, and a retry that makes it whole."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError

from services.web.publishing import Delivery, KafkaPublisher
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import UsageEvent, to_record, usage_encoder
from tests.integration.ingest_serving import Serving, new_tenant, records_of, serving
from tests.proxy import KafkaProxy

ACK_TIMEOUT_S = 3.0


@pytest.fixture
def proxy(kafka_bootstrap: str) -> Iterator[KafkaProxy]:
    with KafkaProxy(kafka_bootstrap) as proxy:
        yield proxy


@pytest.fixture
def api(proxy: KafkaProxy, postgres_dsn: str) -> Iterator[Serving]:
    with serving(proxy.bootstrap, postgres_dsn, ack_timeout_s=ACK_TIMEOUT_S) as api:
        yield api


def send(api: Serving, tenant: str, keys: list[str]) -> tuple[int, list[str]]:
    events = [
        {"metric": "requests", "customerRef": "cust_42", "quantity": 1, "idempotencyKey": key} for key in keys
    ]
    answer = api.post({"events": events}, api.key(tenant))
    return answer.status_code, [result["status"] for result in answer.json()["results"]]


def send_until_accepted(api: Serving, tenant: str, keys: list[str]) -> None:
    deadline_s = time.monotonic() + 30
    while send(api, tenant, keys)[0] != 202:
        assert time.monotonic() < deadline_s, "no retry succeeded"


def test_without_kafka_every_event_is_unavailable_in_bounded_time_and_a_retry_succeeds(
    api: Serving, proxy: KafkaProxy, kafka_bootstrap: str
) -> None:
    tenant = new_tenant(api.dsn)
    send_until_accepted(api, tenant, ["before"])
    proxy.cut()
    started_s = time.monotonic()
    assert send(api, tenant, ["a", "b"]) == (503, ["unavailable"] * 2)
    assert time.monotonic() - started_s < ACK_TIMEOUT_S + 2
    assert api.get("/health/ready").status_code == 503
    proxy.restore()
    send_until_accepted(api, tenant, ["a", "b"])
    stored = records_of(kafka_bootstrap, tenant, at_least=3)
    assert {record["idempotency_key"] for record in stored} == {"before", "a", "b"}
    assert api.get("/health/ready").json()["status"] == "healthy"


def test_a_lost_acknowledgement_is_unavailable_although_stored_and_its_retry_is_the_same_event(
    api: Serving, proxy: KafkaProxy, kafka_bootstrap: str
) -> None:
    tenant = new_tenant(api.dsn)
    send_until_accepted(api, tenant, ["before"])
    proxy.mute()
    assert send(api, tenant, ["a"]) == (503, ["unavailable"])
    proxy.restore()
    send_until_accepted(api, tenant, ["a"])
    stored = records_of(kafka_bootstrap, tenant, at_least=2)
    again = [record for record in stored if record["idempotency_key"] == "a"]
    assert again
    assert all(record == again[0] for record in again)


def test_an_api_that_starts_without_kafka_is_unhealthy_and_recovers_by_itself(
    proxy: KafkaProxy, postgres_dsn: str
) -> None:
    proxy.cut()
    with serving(proxy.bootstrap, postgres_dsn, ack_timeout_s=ACK_TIMEOUT_S) as api:
        tenant = new_tenant(api.dsn)
        assert api.get("/health/live").status_code == 200
        assert api.get("/health/ready").json()["status"] == "unhealthy"
        assert send(api, tenant, ["a"])[0] == 503
        proxy.restore()
        send_until_accepted(api, tenant, ["a"])


def test_after_a_fatal_error_the_producer_is_replaced(kafka_bootstrap: str) -> None:
    async def story() -> list[Delivery]:
        encoder = usage_encoder()
        event = UsageEvent(f"t-{secrets.token_hex(6)}", "cust_42", "requests", 1, "k1")
        value = encoder.encode(to_record(event, source="test", now_us=0))
        publisher = KafkaPublisher(kafka_bootstrap, USAGE_CURRENT, encoder.headers, ack_timeout_s=10.0)
        publisher._on_error(KafkaError(KafkaError._FATAL, "sequence numbers are out of step", True))
        before = publisher._producer
        deliveries = await publisher.publish([(b"k", value)])
        assert publisher._producer is not before
        await publisher.close()
        return deliveries

    assert asyncio.run(story()) == [Delivery.ACKNOWLEDGED]


def test_a_full_local_queue_refuses_at_once_and_holds_no_more(proxy: KafkaProxy) -> None:
    async def story() -> tuple[list[Delivery], float]:
        publisher = KafkaPublisher(
            proxy.bootstrap,
            USAGE_CURRENT,
            usage_encoder().headers,
            ack_timeout_s=ACK_TIMEOUT_S,
            queue_messages_max=10,
        )
        first = asyncio.create_task(publisher.publish([(b"k", b"v")] * 10))
        await asyncio.sleep(0.1)
        started_s = time.monotonic()
        second = await publisher.publish([(b"k", b"v")] * 5)
        took_s = time.monotonic() - started_s
        assert await first == [Delivery.NOT_ACKNOWLEDGED] * 10
        await publisher.close()
        return second, took_s

    proxy.cut()
    second, took_s = asyncio.run(story())
    assert second == [Delivery.QUEUE_FULL] * 5
    assert took_s < 0.5
