"""Kafka and PostgreSQL themselves: killed, shut down, disconnected and locked, under load."""

from __future__ import annotations

import contextlib
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from services.embedded import EmbeddedRuntime
from services.embedded.postgres import find_binaries
from services.streaming.chunks import Partition
from services.streaming.lag import log_ends
from services.wire.errors import Transient
from services.wire.migrations import apply_migrations
from services.wire.topics import create_topics, plan_topics
from tests.fault.campaign import Campaign, some_seed
from tests.fault.traffic import configure
from tests.pipeline import Pipeline

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

EVENTS, LOAD_S = 60_000, 60


@pytest.fixture
def runtime() -> Iterator[EmbeddedRuntime]:
    """Servers of this test's own, because it breaks them."""
    with tempfile.TemporaryDirectory(prefix="tidemeter-tests-") as directory:
        root = Path(directory)
        root.chmod(0o711)
        with EmbeddedRuntime(root) as runtime:
            yield runtime


@pytest.fixture
def pipeline(runtime: EmbeddedRuntime, tmp_path: Path) -> Iterator[Pipeline]:
    plans = plan_topics(partitions=4, replication=1, min_insync_replicas=1, usage_retention_days=90)
    create_topics(runtime.kafka_bootstrap, plans)
    apply_migrations(runtime.postgres_dsn)
    pipeline = Pipeline(runtime.kafka_bootstrap, runtime.postgres_dsn, tmp_path)
    configure(pipeline)
    try:
        yield pipeline
    finally:
        pipeline.close()


def test_a_broker_killed_under_load_is_waited_for(campaign: Campaign, runtime: EmbeddedRuntime) -> None:
    """Producer and worker lose it alike; what was acknowledged before is there afterwards."""
    chance = random.Random(seed := some_seed())  # noqa: S311
    pipeline = campaign.pipeline
    worker = pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    pid = worker.pid
    with campaign.load(seed, EVENTS, seconds=LOAD_S):
        for away_s in (0.0, 5.0, 15.0):
            campaign.recover(worker.log, least=500)
            runtime.kafka.kill()
            campaign.kills += 1
            time.sleep(away_s + chance.random())
            runtime.kafka.start()
            campaign.recover(worker.log)
    assert worker.await_healthy().pid == pid, "the worker did not live through it"
    campaign.prove()


def test_a_broker_that_dies_under_a_question_is_not_taken_for_one_with_an_empty_log(
    runtime: EmbeddedRuntime,
) -> None:
    """librdkafka answers such a question with an offset below 0 and no error."""
    topics = [Partition("usage.v3", number) for number in range(4)]
    create_topics(
        runtime.kafka_bootstrap,
        plan_topics(partitions=4, replication=1, min_insync_replicas=1, usage_retention_days=90),
    )
    answers: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        admin = AdminClient({"bootstrap.servers": runtime.kafka_bootstrap, "log_level": 0})
        while not stop.is_set():
            with contextlib.suppress(Transient):
                answers.extend(log_ends(admin, topics, 5.0).values())
            time.sleep(0.002)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for one in askers:
        one.start()
    for _ in range(3):
        time.sleep(1)
        runtime.kafka.kill()
        runtime.kafka.start()
    stop.set()
    for one in askers:
        one.join()
    assert answers and min(answers) >= 0


def test_a_postgresql_killed_under_load_is_waited_for(campaign: Campaign, runtime: EmbeddedRuntime) -> None:
    chance = random.Random(seed := some_seed())  # noqa: S311
    worker = campaign.pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    pid = worker.pid
    with campaign.load(seed, EVENTS, seconds=LOAD_S):
        for away_s in (0.0, 1.0, 5.0):
            campaign.recover(worker.log, least=500)
            runtime.postgres.kill()
            campaign.kills += 1
            time.sleep(away_s + chance.random())
            runtime.postgres.start()
            campaign.recover(worker.log)
    assert worker.await_healthy().pid == pid
    campaign.prove()


def test_a_postgresql_that_shuts_down_at_once_under_load_is_waited_for(
    campaign: Campaign, runtime: EmbeddedRuntime
) -> None:
    """``pg_ctl -m immediate stop``: no checkpoint, every backend quits, the log is replayed at the start."""
    chance = random.Random(seed := some_seed())  # noqa: S311
    worker = campaign.pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    with campaign.load(seed, EVENTS, seconds=LOAD_S):
        for _ in range(5):
            campaign.recover(worker.log, least=500)
            shut_down_at_once(runtime)
            campaign.kills += 1
            time.sleep(chance.random() * 2)
            runtime.postgres.start()
            campaign.recover(worker.log)
    campaign.prove()


def shut_down_at_once(runtime: EmbeddedRuntime) -> None:
    """As the user the server runs as, because pg_ctl refuses root."""
    data = runtime.postgres.directory / "data"
    owner = data.stat()
    command = [str(find_binaries() / "pg_ctl"), "stop", "-D", str(data), "-m", "immediate", "-W"]
    subprocess.run(command, check=True, capture_output=True, user=owner.st_uid, group=owner.st_gid, cwd=data)
    deadline = time.monotonic() + 20
    while runtime.postgres.pid is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert runtime.postgres.pid is None


def test_backends_terminated_every_two_seconds_are_reconnected(campaign: Campaign) -> None:
    pipeline = campaign.pipeline
    worker = pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    with campaign.load(some_seed(), EVENTS, seconds=LOAD_S):
        for _ in range(25):
            time.sleep(2)
            killed = pipeline.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE starts_with(application_name, 'tidemeter-')"
            )
            campaign.kills += len(killed)
            campaign.recover(worker.log)
    assert worker.alive()
    campaign.prove()


def test_a_lock_on_the_items_for_twenty_seconds_is_waited_for(campaign: Campaign) -> None:
    """Longer than the session and than the limit for idle transactions: the worker stays in its group."""
    pipeline = campaign.pipeline
    worker = pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    pid = worker.pid
    with campaign.load(some_seed(), EVENTS, seconds=40):
        campaign.recover(worker.log, least=500)
        with psycopg.connect(pipeline.dsn) as db:
            db.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            time.sleep(20)
            before = pipeline.processed()
            db.rollback()
        campaign.recover(worker.log)
        assert pipeline.processed() > before
    assert worker.await_healthy().pid == pid
    campaign.prove()


def test_kafka_and_postgresql_killed_in_turns_under_load_are_waited_for(
    campaign: Campaign, runtime: EmbeddedRuntime
) -> None:
    chance = random.Random(seed := some_seed())  # noqa: S311
    worker = campaign.pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    with campaign.load(seed, EVENTS, seconds=LOAD_S):
        for server in [runtime.postgres, runtime.kafka] * 3:
            campaign.recover(worker.log, least=200)
            server.kill()
            campaign.kills += 1
            time.sleep(chance.random() * 3)
            server.start()
            with contextlib.suppress(psycopg.OperationalError):
                campaign.recover(worker.log)
    assert worker.await_healthy()
    campaign.prove()


def test_both_servers_killed_at_once_under_load_are_waited_for(
    campaign: Campaign, runtime: EmbeddedRuntime
) -> None:
    """As when the machine they share goes down."""
    worker = campaign.pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    with campaign.load(some_seed(), EVENTS, seconds=LOAD_S):
        for _ in range(2):
            campaign.recover(worker.log, least=500)
            runtime.postgres.kill()
            runtime.kafka.kill()
            campaign.kills += 2
            back = [threading.Thread(target=server.start) for server in (runtime.kafka, runtime.postgres)]
            for one in back:
                one.start()
            for one in back:
                one.join()
            campaign.recover(worker.log)
    campaign.prove()
