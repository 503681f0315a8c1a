"""SIGKILL of Kafka and of PostgreSQL themselves, under load."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.embedded import EmbeddedRuntime
from services.wire.migrations import apply_migrations
from services.wire.topics import create_topics, plan_topics
from tests.fault.traffic import configure, traffic
from tests.pipeline import Pipeline, until


@pytest.fixture
def runtime() -> Iterator[EmbeddedRuntime]:
    """Servers of this test's own, because it kills them."""
    with tempfile.TemporaryDirectory(prefix="tidemeter-tests-") as directory:
        root = Path(directory)
        root.chmod(0o711)
        with EmbeddedRuntime(root) as runtime:
            yield runtime


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_servers_that_are_killed_under_load_are_waited_for_and_every_counter_is_exact(
    runtime: EmbeddedRuntime, tmp_path: Path
) -> None:
    plans = plan_topics(partitions=4, replication=1, min_insync_replicas=1, usage_retention_days=90)
    create_topics(runtime.kafka_bootstrap, plans)
    apply_migrations(runtime.postgres_dsn)
    pipeline = Pipeline(runtime.kafka_bootstrap, runtime.postgres_dsn, tmp_path)
    configure(pipeline)
    seed = time.time_ns() % 10**9
    chance = random.Random(seed)  # noqa: S311
    records = list(traffic(seed, 60_000, int(time.time())))
    worker = pipeline.worker(CHUNK_RECORDS_MAX="100").start().await_healthy()
    pid = worker.pid
    try:
        for number, server in enumerate([runtime.postgres, runtime.kafka] * 3):
            share = records[number * 10_000 : (number + 1) * 10_000]
            before = pipeline.processed()
            sender = threading.Thread(target=pipeline.send_raw, args=(share,))
            sender.start()
            until(lambda before=before: pipeline.processed() > before, f"work under way, seed {seed}", 60)
            time.sleep(chance.random())
            server.kill()
            time.sleep(chance.random() * 3)
            server.start()
            sender.join()
            pipeline.await_quiet(90)
        assert worker.await_healthy().pid == pid
        pipeline.assert_exact()
        pipeline.settle_deltas()
        pipeline.assert_deltas_add_up()
    finally:
        pipeline.close()
