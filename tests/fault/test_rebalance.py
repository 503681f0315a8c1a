"""Partitions that move under load, and a worker that was asleep while they did."""

from __future__ import annotations

import random
import signal
import threading
import time
from itertools import islice

import pytest

from tests.fault.traffic import traffic
from tests.pipeline import SESSION_TIMEOUT_S, Pipeline, Worker, until


def partitions(worker: Worker) -> int:
    reason = str(worker.health()["checks"].get("stream", {}).get("reason", "")).partition(" ")[0]
    return int(reason) if reason.isdigit() else 0


def sleep_and_wake(pipeline: Pipeline, rounds: int, events: int) -> None:
    """SIGSTOP one of two workers mid-work past its session; the other takes over; SIGCONT."""
    records = traffic(17, events, int(time.time()))
    sleeper = pipeline.worker("w1", CHUNK_RECORDS_MAX="50").start()
    other = pipeline.worker("w2", CHUNK_RECORDS_MAX="50").start()
    for worker in (sleeper, other):
        worker.await_healthy()
    for number in range(rounds):
        until(lambda: partitions(sleeper) > 0 and partitions(other) > 0, "partitions for both", 60)
        before = pipeline.processed()
        share = list(islice(records, events // rounds))
        sender = threading.Thread(target=pipeline.send_raw, args=(share,))
        sender.start()
        until(lambda before=before: pipeline.processed() > before + 100, "work under way", 60)
        sleeper.send(signal.SIGSTOP)
        sender.join()
        time.sleep(SESSION_TIMEOUT_S * 1.5)
        if number % 2:  # the others' work is all done before the sleeper wakes
            until(lambda: partitions(other) == 12, "all partitions with the other", 60, other.log)
            until(
                lambda: not any(pipeline.lag().values()), "everything taken over", 60, pipeline.why_not_quiet
            )
        sleeper.send(signal.SIGCONT)
        pipeline.await_quiet(90)
    assert sleeper.alive() and other.alive()
    pipeline.assert_exact()
    pipeline.settle_deltas()
    pipeline.assert_deltas_add_up()


@pytest.mark.timeout(240)
def test_a_worker_that_wakes_after_its_partitions_were_taken_over_changes_nothing(pipeline: Pipeline) -> None:
    sleep_and_wake(pipeline, rounds=1, events=8_000)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_worker_that_sleeps_and_wakes_ten_times_changes_nothing(pipeline: Pipeline) -> None:
    sleep_and_wake(pipeline, rounds=10, events=150_000)


def rebalance(pipeline: Pipeline, *, seed: int, rounds: int, events: int) -> None:
    """Workers join, leave politely and are killed, while records come in."""
    chance = random.Random(seed)  # noqa: S311
    records = list(traffic(seed, events, int(time.time())))
    sender = threading.Thread(target=send_slowly, args=(pipeline, records, rounds * 2.0))
    steady = pipeline.worker("w1", CHUNK_RECORDS_MAX="50").start().await_healthy()
    guests: list[Worker] = []
    try:
        sender.start()
        for number in range(rounds):
            # Every other guest has a name, and so comes back as the member it was.
            guest = pipeline.worker(None if number % 2 else f"w{2 + number % 4}", CHUNK_RECORDS_MAX="50")
            guests.append(guest.start())
            until(lambda guest=guest: partitions(guest) > 0, "partitions for a guest", 60, guest.log)
            time.sleep(chance.random() * 0.5)
            if chance.random() < 0.5:
                guest.kill()
            else:
                assert guest.stop() == 0
    finally:
        sender.join()
    assert steady.alive()
    pipeline.await_quiet(90)
    pipeline.assert_exact()
    pipeline.settle_deltas()
    pipeline.assert_deltas_add_up()


def send_slowly(pipeline: Pipeline, records: list[object], seconds: float) -> None:
    parts = 40
    for number in range(parts):
        pipeline.send_raw(records[number * len(records) // parts : (number + 1) * len(records) // parts])  # type: ignore[arg-type]
        time.sleep(seconds / parts)


@pytest.mark.timeout(180)
def test_workers_that_come_and_go_under_load_leave_every_counter_exact(pipeline: Pipeline) -> None:
    rebalance(pipeline, seed=23, rounds=2, events=6_000)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_thirty_rebalances_under_load_leave_every_counter_exact(pipeline: Pipeline) -> None:
    rebalance(pipeline, seed=time.time_ns() % 10**9, rounds=30, events=120_000)
