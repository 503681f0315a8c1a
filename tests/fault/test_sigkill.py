"""SIGKILL at random instants: the counters stay exact, and everything left is known to be left."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from typing import Any

import pytest

from tests.fault.traffic import traffic
from tests.pipeline import Pipeline, until


@pytest.mark.timeout(120)
def test_five_sigkills_at_random_instants_under_load_leave_every_counter_exact(pipeline: Pipeline) -> None:
    kill_at_random(pipeline, seed=20_260_101, events=15_000, kills=5, chunk="100")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_fifty_sigkills_at_random_instants_under_load_leave_every_counter_exact(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    report = kill_at_random(pipeline, seed=time.time_ns() % 10**9, events=200_000, kills=50, chunk="150")
    with capsys.disabled():
        print("\n" + json.dumps(report))


def kill_at_random(pipeline: Pipeline, *, seed: int, events: int, kills: int, chunk: str) -> dict[str, Any]:
    """Send while a worker is killed again and again; 1 % of the records at least between two kills."""
    chance = random.Random(seed)  # noqa: S311
    records = list(traffic(seed, events, int(time.time())))
    half = len(records) // 2
    pipeline.send_raw(records[:half])
    sender = threading.Thread(target=pipeline.send_raw, args=(records[half:],))
    worker = pipeline.worker(CHUNK_RECORDS_MAX=chunk)
    recoveries: list[float] = []
    at_kills: list[int] = []
    step = max(1, events // 100)
    try:
        sender.start()
        for _ in range(kills):
            before = pipeline.processed()
            began = time.monotonic()
            worker.start()
            until(
                lambda before=before: pipeline.processed() > before, f"progress, seed {seed}", 60, worker.log
            )
            recoveries.append(time.monotonic() - began)
            until(
                lambda before=before: pipeline.processed() >= before + step, "1 % of progress", 60, worker.log
            )
            time.sleep(chance.random() * 0.3)
            assert worker.alive(), worker.log()[-3000:]
            worker.kill()
            at_kills.append(pipeline.processed())
    finally:
        sender.join()
    assert all(later - earlier >= step for earlier, later in zip(at_kills, at_kills[1:], strict=False))
    assert at_kills[-1] < events, "the load ended before the kills did"
    worker.start()
    pipeline.await_quiet(120)
    expected = pipeline.assert_exact()
    pipeline.settle_deltas()
    pipeline.assert_deltas_add_up()
    difference = pipeline.processed() - sum(expected.outcomes.values())
    return {
        "seed": seed,
        "kills": kills,
        "events": events,
        "lost": max(0, -difference),
        "duplicated": max(0, difference),
        "recovery_p50_s": round(statistics.median(recoveries), 2),
        "recovery_p99_s": round(sorted(recoveries)[int(0.99 * (len(recoveries) - 1))], 2),
        "outcomes": dict(expected.outcomes),
    }
