"""The replayer as operators run it: killed at any instruction, stopped, and with the world away."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from services.streaming import replays
from services.streaming.replays import ReplayRequest
from tests.fault.campaign import some_seed
from tests.integration.replaying import slowly
from tests.oracle import HOUR_S, Usage
from tests.pipeline import Pipeline, Worker, trim_topics, until

NOW_S = int(time.time())
REPLAYER = [sys.executable, "-m", "services.cli.main", "replayer"]
RECORDS = 6000
POINTS = (
    ("replay.before_flush", 4),
    ("replay.after_flush", 4),
    ("replay.locked", 1),
    ("replay.before_commit", 1),
    ("replay.after_commit", 1),
)


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    chance = random.Random(7)  # noqa: S311
    found = [
        Usage("acme", f"cus_{chance.randrange(9)}", "calls", Decimal(chance.randrange(1, 9)), f"k{number}",
              NOW_S - chance.randrange(60, 40 * HOUR_S))
        for number in range(RECORDS)
    ]  # fmt: skip
    return found + chance.sample(found, 200)


@pytest.fixture
def pipeline(
    kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path, usages: list[Usage]
) -> Iterator[Pipeline]:
    """Everything is counted, then damaged; the counters go on."""
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    pipeline.tenant("acme")
    pipeline.meter("acme", "calls")
    try:
        pipeline.worker().start().await_healthy()
        pipeline.send(*usages)
        pipeline.await_quiet()
        damage(pipeline)
        yield pipeline
    finally:
        pipeline.close()


def damage(pipeline: Pipeline) -> None:
    pipeline.query("UPDATE buckets SET total = total + 3, events = events + 1 WHERE total <> 3 RETURNING 1")


def ask(pipeline: Pipeline, **more: Any) -> int:
    """Ask for an apply; its id."""
    request, now = ReplayRequest(tenant_id="acme", since="-PT48H", mode="apply", **more), datetime.now(UTC)
    with pipeline.database() as db:
        return replays.request_apply(db, request, replays.resolve(db, request, now), by="cli:test", now=now)


def state(pipeline: Pipeline, replay_id: int) -> str:
    return str(pipeline.query("SELECT state FROM replays WHERE replay_id = %s", replay_id)[0][0])


def replayer(pipeline: Pipeline, name: str = "replayer", pause: float = 0.0, **extra: str) -> Worker:
    return pipeline.worker(name, slowly(pause, "replayer"), **extra)


def await_done(pipeline: Pipeline, replay_id: int, worker: Worker) -> None:
    until(lambda: state(pipeline, replay_id) == "done", "the replay done", 60, worker.log)


def assert_exact(pipeline: Pipeline, applied: int) -> None:
    pipeline.settle_deltas()
    pipeline.assert_exact()
    assert pipeline.query("SELECT count(*) FROM audit_log WHERE action = 'replay.apply'") == [(applied,)]
    assert len(pipeline.ops("replay_applied")) >= 1
    for table in ("replay_items", "replay_buckets", "replay_values"):
        assert pipeline.query(f"SELECT count(*) FROM {table}") == [(0,)]
    groups = pipeline.admin.list_consumer_groups().result().valid
    ended = {f"tidemeter-replay-{row[0]}" for row in pipeline.query("SELECT replay_id FROM replays")}
    assert not ended & {group.group_id for group in groups}


def test_killed_at_every_point_of_an_apply_another_process_ends_it_exactly(pipeline: Pipeline) -> None:
    for number, (point, count) in enumerate(POINTS):
        replay_id = ask(pipeline)
        log = pipeline.directory / f"reached-{number}"
        doomed = replayer(pipeline, f"doomed-{number}", FAULT_POINT=f"{point}:{count}", FAULT_LOG=str(log))
        doomed.start()
        assert doomed.ended(60) == -signal.SIGKILL
        assert log.read_text(encoding="utf-8") == f"{point}\n"
        assert state(pipeline, replay_id) == ("done" if point == "replay.after_commit" else "running")
        pipeline.send(
            *(
                Usage("acme", "cus_1", "calls", Decimal(1), f"meanwhile{number}-{one}", NOW_S)
                for one in range(50)
            )
        )
        other = replayer(pipeline, f"other-{number}").start().await_healthy()
        await_done(pipeline, replay_id, other)
        assert other.stop() == 0
        pipeline.await_quiet()
        assert pipeline.buckets() == pipeline.truth().buckets, point
        if number + 1 < len(POINTS):
            damage(pipeline)
    assert_exact(pipeline, len(POINTS))


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_killed_at_random_under_load_it_is_exact(pipeline: Pipeline) -> None:
    chance = random.Random(some_seed())  # noqa: S311
    worker = replayer(pipeline, pause=0.2)
    replay_id = ask(pipeline)
    for kill in range(20):
        pipeline.send(
            *(Usage("acme", "cus_1", "calls", Decimal(1), f"load{kill}-{one}", NOW_S) for one in range(50))
        )
        worker.start()
        time.sleep(chance.uniform(1.0, 4.0))
        worker.kill()
        if state(pipeline, replay_id) == "done":
            pipeline.await_quiet()
            damage(pipeline)
            replay_id = ask(pipeline)
    worker.start()
    await_done(pipeline, replay_id, worker)
    assert worker.stop() == 0
    pipeline.await_quiet()
    pipeline.settle_deltas()
    pipeline.assert_exact()


def test_told_to_stop_it_ends_within_seconds_and_the_next_one_goes_on_from_there(pipeline: Pipeline) -> None:
    worker = replayer(pipeline, pause=1.5).start().await_healthy()
    replay_id = ask(pipeline)

    def read() -> int:
        return int(pipeline.query("SELECT records_read FROM replays")[0][0])

    until(lambda: 0 < read() < RECORDS, "it reads", 30, worker.log)
    series = worker.metrics()
    assert 0 < series['tidemeter_replay_records{of="read"}'] <= series['tidemeter_replay_records{of="total"}']
    until(lambda: worker.metrics()['tidemeter_replays{state="running"}'] == 1, "it is shown", 10)
    assert worker.health()["checks"]["replays"]["reason"].startswith("read ")
    started = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - started < 5
    so_far = read()
    assert (state(pipeline, replay_id), 0 < so_far < RECORDS) == ("running", True)
    other = replayer(pipeline, "other").start().await_healthy()
    await_done(pipeline, replay_id, other)
    assert read() < RECORDS + 200 + 2000, "it went on, and did not begin again"
    assert other.stop() == 0
    assert_exact(pipeline, 1)


def test_told_to_stop_while_postgresql_is_at_work_it_gives_the_statement_up(pipeline: Pipeline) -> None:
    replay_id = ask(pipeline)
    with pipeline.database() as db:
        db.execute("SELECT pg_advisory_lock(hashtextextended('tidemeter/beside-the-log', 0))")
        worker = replayer(pipeline).start().await_healthy()
        until(lambda: state(pipeline, replay_id) == "running", "it waits", 20, worker.log)
        started = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - started < 12
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tidemeter-replay'"
        until(lambda: pipeline.query(waiting) == [(0,)], "its session ended", 5)
    assert state(pipeline, replay_id) == "running"


def test_of_two_one_works_and_the_other_takes_over(pipeline: Pipeline) -> None:
    first = replayer(pipeline, "first", pause=0.3).start().await_healthy()
    replay_id = ask(pipeline)
    until(lambda: first.metrics()['tidemeter_replay_records{of="read"}'] > 0, "the first reads", 20)
    second = replayer(pipeline, "second").start().await_healthy()
    time.sleep(2)
    assert second.metrics()['tidemeter_replay_records{of="read"}'] == 0
    first.kill()
    await_done(pipeline, replay_id, second)
    assert second.stop() == 0
    assert_exact(pipeline, 1)


def test_with_kafka_away_it_waits_and_says_so_and_the_replay_with_it(pipeline: Pipeline) -> None:
    replay_id = ask(pipeline)
    worker = pipeline.worker("lonely", REPLAYER, KAFKA_BOOTSTRAP="127.0.0.1:1").start()
    until(lambda: worker.health()["status"] == "unhealthy", "it says so", 60, worker.log)
    assert worker.health()["checks"]["replays"]["reason"] == "waiting for Kafka"
    assert state(pipeline, replay_id) == "running"
    assert worker.stop() == 0
    other = replayer(pipeline).start().await_healthy()
    await_done(pipeline, replay_id, other)
    assert other.stop() == 0
    assert_exact(pipeline, 1)


def test_a_replay_that_is_cancelled_while_it_runs_changes_nothing(pipeline: Pipeline) -> None:
    worker = replayer(pipeline, pause=0.3).start().await_healthy()
    before = pipeline.buckets()
    replay_id = ask(pipeline)
    until(lambda: worker.metrics()['tidemeter_replay_records{of="read"}'] > 0, "it reads", 20)
    with pipeline.database() as db:
        assert replays.cancel(db, replay_id, by="cli:test")
    next_one = ask(pipeline, metrics=("calls",), customer_ref="nobody")
    await_done(pipeline, next_one, worker)
    assert worker.stop() == 0
    assert (state(pipeline, replay_id), pipeline.buckets()) == ("cancelled", before)
