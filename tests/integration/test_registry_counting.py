"""Records of Confluent's framing through a real worker, while their registry comes, goes and errs."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from schemas.catalog import ROOT, current
from services.ingest.app import create_app
from services.wire.errors import Transient
from services.wire.registry import encoder_for
from services.wire.settings import load_settings
from services.wire.usage import UsageEvent, encode_usage, to_record
from tests.oracle import Usage
from tests.pipeline import Pipeline, Worker, trim_topics, until
from tests.registry_server import RegistryServer

TEXT = (ROOT / "usage_event/v3.avsc").read_text(encoding="utf-8")
VALUE = SerializationContext("usage.v3", MessageField.VALUE)
CREDENTIALS = "meter:planted-pa55"
NOW_S = int(time.time())


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    with RegistryServer(credentials=CREDENTIALS) as running:
        yield running


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    pipeline.tenant("acme")
    pipeline.meter("acme", "requests")
    yield pipeline
    pipeline.close()


def address(registry: RegistryServer) -> str:
    return registry.url.replace("://", f"://{CREDENTIALS}@")


def worker_of(pipeline: Pipeline, registry: RegistryServer) -> Worker:
    return pipeline.worker("w1", SCHEMA_REGISTRY_URL=address(registry)).start().await_healthy()


def usage(key: str, quantity: int) -> Usage:
    return Usage("acme", "cus_1", "requests", Decimal(quantity), key, NOW_S)


def send(pipeline: Pipeline, one: Usage, value: bytes) -> None:
    pipeline.send_raw([(one.topic, one.record_key(), value, [], one)])


def by_confluent(registry: RegistryServer, one: Usage, text: str = TEXT) -> bytes:
    """The value that Confluent's serializer makes of it; it registers its schema by itself."""
    client = SchemaRegistryClient({"url": address(registry)})
    value = AvroSerializer(client, text)(one._fields(), VALUE)
    assert value[:1] == b"\x00"
    return bytes(value)


def parked_reasons(pipeline: Pipeline) -> list[str]:
    return [
        (one.headers["tidemeter-error-reason"] or b"").decode() for one in pipeline.read("upcast_failures.v1")
    ]


def total(pipeline: Pipeline) -> Decimal:
    return pipeline.total(("acme", "cus_1", "requests"))


def waits_for_the_registry(worker: Worker) -> bool:
    return "the schema registry" in json.dumps(worker.health())


def test_what_confluents_serializer_writes_is_counted_beside_our_own_framing(
    pipeline: Pipeline, registry: RegistryServer
) -> None:
    worker = worker_of(pipeline, registry)
    send(pipeline, usage("a", 100), by_confluent(registry, usage("a", 100)))
    pipeline.send(usage("b", 250), usage("a", 100))
    pipeline.await_quiet()
    assert total(pipeline) == 350
    assert pipeline.outcomes() == {"counted": 2, "duplicate": 1}
    assert sum(one.startswith("GET /schemas/ids/") for one in registry.asked) == 1
    assert "planted" not in worker.log()


def test_what_we_write_is_counted_and_read_by_confluents_deserializer(
    pipeline: Pipeline, registry: RegistryServer
) -> None:
    settings = load_settings(schema_registry_url=address(registry))
    encoder = encoder_for(settings, current("usage_event"), "usage.v3")
    event = UsageEvent("acme", "cus_1", "requests", Decimal("0.5"), "a")
    value = encode_usage(encoder, to_record(event, source="test", now_us=NOW_S * 1_000_000))
    headers = encoder.headers
    pipeline.send_raw([("usage.v3", usage("a", 1).record_key(), value, headers, None)])
    worker_of(pipeline, registry)
    pipeline.await_quiet()
    assert total(pipeline) == Decimal("0.5")

    client = SchemaRegistryClient({"url": address(registry)})
    [record] = pipeline.read("usage.v3")
    read = AvroDeserializer(client)(record.value, VALUE)
    assert (read["quantity"], read["idempotency_key"]) == (Decimal("0.5"), "a")


def test_while_the_registry_is_away_nothing_is_parked_and_nothing_lost(
    pipeline: Pipeline, registry: RegistryServer
) -> None:
    first, second = usage("a", 1), usage("b", 10)
    one, two = by_confluent(registry, first), by_confluent(registry, second)
    renamed = json.loads(TEXT) | {"doc": "The same schema under another id."}
    later = b"\x00" + registry.register("elsewhere", renamed).to_bytes(4, "big") + one[5:]
    registry.stop()

    worker = worker_of(pipeline, registry)  # a start needs no registry
    send(pipeline, first, one)
    until(lambda: waits_for_the_registry(worker), "a worker that waits for the registry")
    assert parked_reasons(pipeline) == [] and total(pipeline) == 0
    registry.start()
    pipeline.await_quiet()
    assert total(pipeline) == 1

    registry.stop()
    send(pipeline, second, two)  # its id is known
    pipeline.await_quiet()
    assert total(pipeline) == 11
    send(pipeline, first, later)  # this one is not
    until(lambda: waits_for_the_registry(worker), "a worker that waits for the registry again")
    registry.start()
    for answer in (
        (500, b'{"error_code": 50001, "message": ""}'),
        (200, b"<html>"),
        (200, b"{}"),
        (404, b"x"),
    ):
        registry.answer_with = answer
        asked = len(registry.asked)
        until(lambda asked=asked: len(registry.asked) >= asked + 2, f"questions answered by {answer}")  # type: ignore[misc]
        assert waits_for_the_registry(worker)
    registry.answer_with = None
    pipeline.await_quiet()
    assert pipeline.outcomes() == {"counted": 2, "duplicate": 1}
    assert parked_reasons(pipeline) == []
    assert worker.alive() and "planted" not in worker.log()


def test_an_id_that_is_unknown_or_of_a_foreign_schema_is_parked_and_the_rest_counted(
    pipeline: Pipeline, registry: RegistryServer
) -> None:
    worker_of(pipeline, registry)
    good = by_confluent(registry, usage("a", 5))
    millis = TEXT.replace("timestamp-micros", "timestamp-millis")
    foreign: list[Any] = [
        registry.register("elsewhere", millis),
        registry.register("elsewhere", {"type": "record", "name": "other", "fields": []}),
        99,
    ]
    for number in foreign:
        send(pipeline, usage("x", 1), b"\x00" + number.to_bytes(4, "big") + good[5:])
    send(pipeline, usage("a", 5), good)
    pipeline.await_quiet()
    assert parked_reasons(pipeline) == ["unknown_schema"] * 3
    assert total(pipeline) == 5


def test_an_api_without_its_registry_does_not_start_and_says_no_secret(registry: RegistryServer) -> None:
    settings = load_settings(
        schema_registry_url=address(registry), kafka_bootstrap="127.0.0.1:9", postgres_dsn="postgresql://"
    )
    registry.stop()

    async def start() -> None:
        async with create_app(settings).lifespan():
            pass

    away = pytest.RaisesExc(Transient, match="the schema registry does not answer")
    with pytest.RaisesGroup(away, flatten_subgroups=True) as caught:
        asyncio.run(start())
    assert "planted" not in "".join(traceback.format_exception(caught.value))
