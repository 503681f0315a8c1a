"""Partitions that move under load, and a worker that was asleep while they did."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.fault.campaign import Campaign, some_seed
from tests.pipeline import SESSION_TIMEOUT_S, Pipeline, Worker, until

#: A worker of the tests here counts in small steps, so that something is always under way.
CHUNK = "50"


def partitions(worker: Worker) -> int:
    reason = str(worker.health()["checks"].get("stream", {}).get("reason", "")).partition(" ")[0]
    return int(reason) if reason.isdigit() else 0


def sleep_and_wake(campaign: Campaign, *, seed: int, rounds: int, events: int) -> None:
    """SIGSTOP one of two workers mid-work past its session; the other takes over; SIGCONT."""
    pipeline = campaign.pipeline
    sleeper = pipeline.worker("w1", CHUNK_RECORDS_MAX=CHUNK).start()
    other = pipeline.worker("w2", CHUNK_RECORDS_MAX=CHUNK).start()
    for worker in (sleeper, other):
        worker.await_healthy()
    with campaign.load(seed, events, seconds=rounds * SESSION_TIMEOUT_S * 2.0):
        for number in range(rounds):
            until(lambda: partitions(sleeper) > 0 and partitions(other) > 0, "partitions for both", 60)
            campaign.recover(pipeline.why_not_quiet, least=100)
            sleeper.send(signal.SIGSTOP)
            time.sleep(SESSION_TIMEOUT_S * 1.5)
            if number % 2:  # the others' work is all theirs before the sleeper wakes
                until(lambda: partitions(other) == 12, "all partitions with the other", 60, other.log)
            sleeper.send(signal.SIGCONT)
            campaign.kills += 1
    campaign.prove()
    assert sleeper.alive() and other.alive()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_worker_that_sleeps_and_wakes_ten_times_changes_nothing(campaign: Campaign) -> None:
    sleep_and_wake(campaign, seed=some_seed(), rounds=10, events=150_000)


def rebalance(campaign: Campaign, *, seed: int, rounds: int, events: int, static: bool) -> None:
    """From one worker to three and back, again and again: half of those that leave are killed."""
    chance = random.Random(seed)  # noqa: S311
    pipeline = campaign.pipeline
    steady = pipeline.worker("w1" if static else None, CHUNK_RECORDS_MAX=CHUNK).start().await_healthy()
    with campaign.load(seed, events, seconds=rounds * 8.0):
        for _ in range(rounds):
            guests = [guest(pipeline, name if static else None) for name in ("w2", "w3")]
            for one in guests:
                until(lambda one=one: partitions(one) > 0, "partitions for a guest", 60, one.log)
            time.sleep(chance.random() * 2)
            for one in guests:
                if chance.random() < 0.5:
                    one.kill()
                    campaign.kills += 1
                else:
                    assert one.stop() == 0
            until(lambda: partitions(steady) == 12, "all partitions again", 60, steady.log)
    campaign.more = {"rebalances": 4 * rounds}
    campaign.prove()
    assert steady.alive()


def guest(pipeline: Pipeline, name: str | None) -> Worker:
    """A worker that starts; a name that was here before is the same member again."""
    known = [worker for worker in pipeline.workers if worker.name == name]
    return (known[0] if known else pipeline.worker(name, CHUNK_RECORDS_MAX=CHUNK)).start()


@pytest.mark.timeout(180)
def test_workers_that_come_and_go_under_load_leave_every_counter_exact(campaign: Campaign) -> None:
    rebalance(campaign, seed=23, rounds=1, events=5_000, static=False)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_forty_rebalances_under_load_leave_every_counter_exact(campaign: Campaign, static: bool) -> None:
    rebalance(campaign, seed=some_seed(), rounds=10, events=100_000, static=static)
