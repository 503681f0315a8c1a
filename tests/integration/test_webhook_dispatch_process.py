"""The dispatcher as a process, from Kafka to Kafka: what is stored, handled, parked and told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.integration.dispatching import TOPIC, envelope, snapshot
from tests.pipeline import Pipeline, Worker, trim_topics, until


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap, [TOPIC, "ops.v1", "dead_letters.v1"])
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    try:
        yield pipeline
    finally:
        pipeline.close()


def dispatcher(pipeline: Pipeline, **extra: str) -> Worker:
    command = [sys.executable, "-m", "services.cli.main", "dispatcher"]
    return pipeline.worker("dispatcher", command, STRIPE_API_KEY="sk_test_webhooks", **extra)


def deliver(pipeline: Pipeline, *values: bytes) -> None:
    producer = Producer({"bootstrap.servers": pipeline.kafka})
    for value in values:
        producer.produce(TOPIC, key=b"obj", value=value, partition=0)
    assert producer.flush(30) == 0


@pytest.mark.timeout(120)
def test_events_go_from_the_topic_to_handlers_and_what_fails_is_parked_and_told(pipeline: Pipeline) -> None:
    pipeline.query(
        "WITH e AS (INSERT INTO webhook_events VALUES ('evt_old', 'main', '', 't', 'o', false, false, now(), "
        "now(), 1, '', 't', 0, 0) RETURNING 1) INSERT INTO webhook_runs SELECT 'evt_old', 'tidemeter', 's', "
        "now(), 'succeeded', 1, now(), NULL, NULL, 0, now() - interval '15 days' FROM e RETURNING 1"
    )
    event = snapshot("evt_1", "planted.kind")
    deliver(pipeline, b"garbage", envelope(event), envelope(event))
    worker = dispatcher(
        pipeline,
        WEBHOOK_HANDLERS="tests.integration.planted_handlers:FAILS",
        WEBHOOK_ATTEMPTS_MAX="2",
        WEBHOOK_RETRY_SECONDS="0.1",
    ).start()

    def parked_and_told() -> bool:
        assert worker.alive(), worker.log()[-3000:]
        return len(pipeline.read("dead_letters.v1")) == 2 and len(pipeline.read("ops.v1")) == 3

    until(parked_and_told, "both parked, both told, and the pruning", 60, lambda: worker.log()[-3000:])
    states = pipeline.query("SELECT event_id, handler, state FROM webhook_runs ORDER BY handler")
    assert states == [("evt_1", "fails", "dead"), ("evt_1", "tidemeter", "succeeded")]
    assert pipeline.query("SELECT deliveries FROM webhook_events") == [(2,)]
    assert len(pipeline.ops("webhook_dead_lettered")) == 1
    [pruned] = pipeline.ops("webhook_dlq.prune")
    assert pruned["attributes"] == {"events": "1", "runs": "1", "subjects": "0"}
    [dead] = pipeline.ops("webhook_dlq.dead_lettered")
    assert (dead["attributes"]["handler"], dead["attributes"]["attempts"]) == ("fails", "2")
    parked = {one.headers["tidemeter-error-reason"]: one for one in pipeline.read("dead_letters.v1")}
    assert parked[b"undecodable"].value == b"garbage"
    assert json.loads(parked[b"attempts_exhausted"].value) == event
    assert (
        parked[b"attempts_exhausted"].key
        == json.dumps([TOPIC, 0, _offset(pipeline)], separators=(",", ":")).encode()
    )
    until(lambda: worker.health()["checks"]["webhooks"]["reason"] == "1 dead", "health that tells", 30)
    assert worker.health()["status"] == "degraded"
    series = worker.metrics()
    assert series['tidemeter_webhook_runs{state="dead"}'] == 1
    assert series['tidemeter_webhook_attempts_total{result="failed"}'] == 1
    assert series['tidemeter_webhook_attempts_total{result="dead"}'] == 1
    assert "secret" not in worker.log()
    assert worker.stop() == 0


def _offset(pipeline: Pipeline) -> int:
    return int(pipeline.query('SELECT "offset" FROM webhook_events')[0][0])


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({}, "Stripe key"),
        ({"STRIPE_API_KEY": "sk_live_x"}, "live one"),
        ({"STRIPE_API_KEY": "sk_test_x", "WEBHOOK_HANDLERS": "no_such_module:x"}, "cannot be imported"),
    ],
)
def test_what_is_set_up_wrongly_is_a_sentence_at_the_start(
    pipeline: Pipeline, extra: dict[str, str], sentence: str
) -> None:
    worker = dispatcher(pipeline)
    del worker.environment["STRIPE_API_KEY"]
    worker.start(**extra)
    assert worker.ended(30) == 2
    assert sentence in worker.log()
    assert "Traceback" not in worker.log()
