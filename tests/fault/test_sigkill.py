"""SIGKILL and SIGTERM at random instants: counters stay exact, and all that is left is known to be left."""

from __future__ import annotations

import random
import time

import pytest

from tests.fault.campaign import Campaign, quantile, some_seed
from tests.pipeline import Worker, until

STOP_S = 10


@pytest.mark.timeout(120)
def test_five_sigkills_at_random_instants_under_load_leave_every_counter_exact(campaign: Campaign) -> None:
    end_at_random(campaign, seed=20_260_101, events=10_000, ends=5, chunk="100")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_fifty_sigkills_at_random_instants_under_load_leave_every_counter_exact(campaign: Campaign) -> None:
    end_at_random(campaign, seed=some_seed(), events=200_000, ends=50, chunk="150")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_thirty_sigterms_under_load_each_end_in_ten_seconds_with_status_0(campaign: Campaign) -> None:
    end_at_random(campaign, seed=some_seed(), events=120_000, ends=30, chunk="150", politely=True)


def end_at_random(
    campaign: Campaign, *, seed: int, events: int, ends: int, chunk: str, politely: bool = False
) -> None:
    """Send while a worker is ended again and again; 1 % of the records at least between two ends."""
    chance = random.Random(seed)  # noqa: S311
    pipeline = campaign.pipeline
    worker = pipeline.worker(CHUNK_RECORDS_MAX=chunk)
    step = max(1, events // 100)
    stops: list[float] = []
    with campaign.load(seed, events):
        for _ in range(ends):
            worker.start()
            campaign.recover(worker.log)
            before = pipeline.processed()
            until(
                lambda before=before: pipeline.processed() >= before + step, "1 % of progress", 60, worker.log
            )
            pipeline.approve(2)
            pipeline.push()
            time.sleep(chance.random() * 0.3)
            assert worker.alive(), worker.log()[-3000:]
            if politely:
                stops.append(stop(worker))
            else:
                worker.kill()
            campaign.kills += 1
    assert pipeline.processed() < events, "the load ended before the kills did"
    if stops:
        campaign.more = {"stop_p50_s": quantile(stops, 0.5), "stop_max_s": max(stops)}
    worker.environment["CHUNK_RECORDS_MAX"] = "5000"
    worker.start()
    campaign.prove()


def stop(worker: Worker) -> float:
    began = time.monotonic()
    assert worker.stop(STOP_S) == 0, worker.log()[-3000:]
    return round(time.monotonic() - began, 2)
