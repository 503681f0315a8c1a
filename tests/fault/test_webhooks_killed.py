"""SIGKILL of the dispatcher at every step of its own: each event's effect happens exactly once, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.fault.test_fault_points import fault_points
from tests.integration.dispatching import EFFECTS, TOPIC, envelope, snapshot
from tests.oracle import unframe
from tests.pipeline import Pipeline, Worker, trim_topics, until

pytestmark = pytest.mark.faults

OBJECTS = 12
EVENTS = 24
ROUNDS = 5


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap, [TOPIC, "ops.v1", "dead_letters.v1"])
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    with pipeline.database() as db:
        db.execute(EFFECTS)
    try:
        yield pipeline
    finally:
        pipeline.close()


def dispatcher(pipeline: Pipeline, name: str) -> Worker:
    return pipeline.worker(
        name,
        [sys.executable, "-m", "tests.fault.webhook_runner"],
        STRIPE_API_KEY="sk_test_faults",
        STRIPE_API_BASE="http://127.0.0.1:1",
        WEBHOOK_HANDLERS="tests.fault.webhook_runner:OWN",
        WEBHOOK_TIMEOUT_SECONDS="0.5",  # how long a killed process's runs wait
        OWN_LINES=str(pipeline.directory / "lines"),
    )


def deliver(pipeline: Pipeline, numbers: Any, events: int = EVENTS) -> None:
    """New events of a few objects, each delivered twice; those of one object in the order of their times."""
    producer = Producer({"bootstrap.servers": pipeline.kafka, "enable.idempotence": True})
    for _ in range(events):
        number = next(numbers)
        body = envelope(snapshot(f"evt_{number:05d}", object_id=f"obj_{number % OBJECTS}", at=number))
        for _ in range(2):
            producer.produce(TOPIC, key=f"obj_{number % OBJECTS}", value=body)
    assert producer.flush(30) == 0


@pytest.mark.timeout(900)
def test_a_dispatcher_killed_at_every_step_handles_every_event_once(pipeline: Pipeline) -> None:
    points = fault_points("webhooks.")
    assert len(points) == 4
    numbers = count()
    worker = dispatcher(pipeline, "dispatcher")
    reached = pipeline.directory / "reached"
    for number, point in enumerate(points * ROUNDS):
        reached.unlink(missing_ok=True)
        deliver(pipeline, numbers)
        worker.start(FAULT_POINT=f"{point}:{1 + number * 5 % 17}", FAULT_LOG=str(reached))
        assert worker.ended(60) == -9, worker.log()[-3000:]
        assert reached.read_text(encoding="utf-8") == f"{point}\n"
    deliver(pipeline, numbers)
    assert_all_done(pipeline, [worker.start()], next(numbers))


@pytest.mark.timeout(300)
def test_two_dispatchers_one_of_which_is_killed_again_and_again_handle_every_event_once(
    pipeline: Pipeline,
) -> None:
    numbers = count()
    survivor, victim = dispatcher(pipeline, "survivor"), dispatcher(pipeline, "victim")
    survivor.start()
    for _ in range(4):
        victim.start()
        deliver(pipeline, numbers, 150)
        until(lambda: victim.health()["status"] in ("healthy", "degraded"), "the victim at work", 60)
        deliver(pipeline, numbers, 150)
        victim.kill()
    assert_all_done(pipeline, [survivor], next(numbers))


def assert_all_done(pipeline: Pipeline, workers: list[Worker], events: int) -> None:
    """Every event's effect exactly once, in the order of its object; what it told left once by its identity;
    the user's handler got it at least once."""

    def done() -> bool:
        [(settled,)] = pipeline.query("SELECT count(*) FROM webhook_runs WHERE settled_at IS NOT NULL")
        return settled == 2 * events and pipeline.query("SELECT count(*) FROM outbox") == [(0,)]

    def why() -> str:
        states = pipeline.query("SELECT handler, state, count(*) FROM webhook_runs GROUP BY 1, 2")
        return f"{events} events, {states}\n" + "\n".join(worker.log()[-3000:] for worker in workers)

    until(done, "every run settled", 120, why)
    rows = [row[0] for row in pipeline.query("SELECT event_id FROM effects ORDER BY n")]
    assert sorted(rows) == [f"evt_{number:05d}" for number in range(events)]
    for one in range(OBJECTS):
        mine = [name for name in rows if int(name[4:]) % OBJECTS == one]
        assert mine == sorted(mine)
    states = pipeline.query("SELECT DISTINCT state FROM webhook_runs")
    assert states == [("succeeded",)]
    told = [unframe("ops_event", 1, one.value)["subject_id"] for one in pipeline.read("ops.v1")]
    assert set(told) == set(rows)
    lines = (pipeline.directory / "lines").read_text(encoding="utf-8").split()
    assert set(lines) == set(rows)
    deliveries = pipeline.query("SELECT DISTINCT deliveries FROM webhook_events")
    assert deliveries == [(2,)], "each was delivered twice, and a chunk that came again does not count"
