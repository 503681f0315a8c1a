"""SIGKILL of the archiver at every step of its own, and at random: each record is in the archive once."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from services.archive.files import Archive
from services.archive.writing import Store
from services.streaming.chunks import Partition
from tests.archiving import assert_as_the_log, send_any
from tests.fault.campaign import some_seed
from tests.fault.test_fault_points import fault_points
from tests.pipeline import USAGE, Pipeline, Worker, trim_topics, until

POINTS = ("archive.committed", "archive.read", "archive.stored", "archive.written")
PARTITIONS = [Partition(topic, number) for topic in USAGE for number in range(4)]
RECORDS = 400
KILLS = 15


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    try:
        yield pipeline
    finally:
        pipeline.close()


def archiver(pipeline: Pipeline) -> Worker:
    return pipeline.worker(
        "archive",
        [sys.executable, "-m", "services.cli.main", "archive"],
        ARCHIVE_URL=str(pipeline.directory / "archive"),
        ARCHIVE_FILE_RECORDS="7",
        ARCHIVE_FILE_SECONDS="0.4",
    )


def prove(pipeline: Pipeline, worker: Worker) -> None:
    """Left alone, it archives all; then the archive is the log."""
    worker.start()
    store = Store(worker.environment["ARCHIVE_URL"])

    def all_held() -> bool:
        starts, ends = pipeline.log_bounds()
        lacking = {tp for tp, end in ends.items() if end > starts[tp]}
        return all(store.held(Partition(*tp))[-1:] == [(starts[tp], ends[tp])] for tp in lacking)

    until(all_held, "everything archived", 60, worker.log)
    assert worker.stop() == 0
    assert_as_the_log(pipeline.kafka, store, PARTITIONS)


def test_these_are_all_the_steps_of_the_archiver() -> None:
    assert tuple(fault_points("archive.")) == POINTS


@pytest.mark.timeout(300)
def test_an_archiver_killed_at_every_step_leaves_nothing_out_and_writes_nothing_twice(
    pipeline: Pipeline,
) -> None:
    worker, log = archiver(pipeline), pipeline.directory / "reached"
    seeds = count()
    for point in POINTS:
        for number in (1, 3):
            log.unlink(missing_ok=True)
            send_any(pipeline.kafka, USAGE, RECORDS, next(seeds))
            worker.start(FAULT_POINT=f"{point}:{number}", FAULT_LOG=str(log))
            until(
                lambda: not worker.alive() or bool(send_any(pipeline.kafka, USAGE, 20, next(seeds))),
                f"it dies at {point}",
                60,
                worker.log,
            )
            assert worker.ended(1) == -9, worker.log()[-3000:]
            assert log.read_text(encoding="utf-8") == f"{point}\n"
            if point == "archive.written":
                leftovers = list((pipeline.directory / "archive").rglob("*.tmp"))
                assert len(leftovers) == 1, "the one that was not renamed; the others' are cleaned"
    prove(pipeline, worker)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_an_archiver_killed_at_random_leaves_nothing_out_and_writes_nothing_twice(pipeline: Pipeline) -> None:
    chance = random.Random(some_seed())  # noqa: S311
    worker = archiver(pipeline)
    for kill in range(KILLS):
        send_any(pipeline.kafka, USAGE, RECORDS, kill)
        worker.start()
        until(lambda: worker.health()["status"] != "down", "it answers", 60, worker.log)
        time.sleep(1.5 * chance.random())
        worker.kill()
    prove(pipeline, worker)
    assert any(Archive(worker.environment["ARCHIVE_URL"]).files(tp) for tp in PARTITIONS)
