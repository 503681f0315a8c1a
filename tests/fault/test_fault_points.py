"""SIGKILL at every named step of the protocol: each is reached, and the sums stay exact."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.fault.traffic import Record, traffic
from tests.pipeline import ROOT, Pipeline, Worker

RECORDS = 200


def fault_points() -> list[str]:
    """Every name in the sources, so that a new step is tested without anybody remembering to."""
    named = re.compile(r'fault_point\("([a-z_.]+)"\)')
    sources = [*ROOT.glob("services/streaming/*.py"), *ROOT.glob("services/counters/*.py")]
    return sorted({name for path in sources for name in named.findall(path.read_text(encoding="utf-8"))})


def die_at(pipeline: Pipeline, worker: Worker, point: str, count: int, records: Iterator[Record]) -> None:
    """Give the worker records, and see it die at the ``count``-th time it reaches ``point``."""
    pipeline.send_raw(islice(records, RECORDS))
    with pipeline.database() as db:  # as if all earlier deltas were reported, so that there is more to close
        db.execute("UPDATE item_periods SET open_deltas = 0")
    reached = pipeline.directory / "reached"
    reached.unlink(missing_ok=True)
    worker.start(FAULT_POINT=f"{point}:{count}", FAULT_LOG=str(reached))
    assert worker.ended(40) == -9, worker.log()[-3000:]
    assert reached.read_text(encoding="utf-8") == f"{point}\n"


def finish(pipeline: Pipeline, worker: Worker) -> None:
    worker.start()
    pipeline.await_quiet()
    pipeline.assert_exact()
    pipeline.settle_deltas()
    pipeline.assert_deltas_add_up()


def test_the_protocol_has_its_named_steps() -> None:
    assert {name.partition(".")[0] for name in fault_points()} == {"chunk", "close", "relay", "tx"}
    assert len(fault_points()) >= 13


@pytest.mark.timeout(300)
def test_a_worker_killed_at_every_step_in_turn_is_exact(pipeline: Pipeline, tmp_path: Path) -> None:
    points = fault_points()
    records = traffic(7, RECORDS * len(points), int(time.time()))
    worker = pipeline.worker(CHUNK_RECORDS_MAX="20")
    for number, point in enumerate(points):
        die_at(pipeline, worker, point, 1 + number % 3, records)
    finish(pipeline, worker)


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", fault_points())
def test_a_worker_killed_five_times_at_one_step_is_exact(pipeline: Pipeline, point: str) -> None:
    records = traffic(11, RECORDS * 5, int(time.time()))
    worker = pipeline.worker(CHUNK_RECORDS_MAX="20")
    for count in range(1, 6):
        die_at(pipeline, worker, point, count, records)
    finish(pipeline, worker)
