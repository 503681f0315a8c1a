"""A worker that is killed while it tries parked records again: each counts once, nothing is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from decimal import Decimal

import pytest

from services.console import parked
from services.streaming.parking import Choice
from tests.fault.campaign import Campaign, some_seed
from tests.oracle import Usage
from tests.pipeline import Pipeline, Worker, until

POINTS = ("redrive.before_commit", "redrive.after_commit")
NOW_S = int(time.time())


def some_usage(rng: random.Random, number: int) -> list[Usage]:
    """Of a meter that does not exist yet: disorder, duplicates, and keys that come again with other content.

    A customer has keys of its own: which of two partitions is first is a matter of chance.
    """
    found = []
    for _ in range(number):
        customer, at_s = rng.randrange(7), NOW_S - rng.randrange(40 * 3600)
        key = f"pigeon-{customer}-{rng.randrange(1 + number // 7)}"
        amount = Decimal(rng.randrange(1, 4))
        found.append(Usage("acme", f"cus_{customer}", "pigeons", amount, key, at_s))
    return found


def request(pipeline: Pipeline) -> None:
    with pipeline.database() as db:
        parked.redrive(db, Choice(reasons=("unknown_meter",)), by="a test", dry_run=False, force=True)


def open_ones(pipeline: Pipeline) -> int:
    return int(pipeline.query("SELECT count(*) FROM redrives WHERE finished_at IS NULL")[0][0])


def survive(campaign: Campaign, records: int, seed: int, kill: Callable[[Worker, int], bool]) -> None:
    """Park, declare the meter, re-drive; ``kill`` is called with the worker until it returns False."""
    campaign.seed = seed
    pipeline, rng = campaign.pipeline, random.Random(seed)  # noqa: S311
    pipeline.send(*some_usage(rng, records))
    worker = pipeline.worker().start()
    pipeline.await_quiet()
    assert pipeline.outcomes()["dead_lettered"] == records
    worker.stop()
    pipeline.meter("acme", "pigeons", lateness_s=30 * 86_400)
    request(pipeline)
    while kill(worker, campaign.kills):
        campaign.kills += 1
    worker.start()
    until(lambda: not open_ones(pipeline), "every re-drive ended", 60, worker.log)
    pipeline.await_quiet()
    expected, outcomes = pipeline.truth(), pipeline.outcomes()
    assert pipeline.buckets() == expected.buckets
    wanted = expected.outcomes
    assert outcomes["counted"] + outcomes["late_counted"] == wanted["counted"] + wanted["late_counted"]
    assert (outcomes["duplicate"], outcomes["conflict"]) == (wanted["duplicate"], wanted["conflict"])
    assert sum(outcomes.values()) == records == len(pipeline.log)
    assert pipeline.query("SELECT DISTINCT kind FROM parked_records WHERE state = 'parked'") == [
        ("conflict",)
    ]
    tried = pipeline.query("SELECT sum(tried), sum(selected) FROM redrives")[0]
    assert tried == (records, records)
    campaign.leave_line(events=records, lost=0, doubled=0, difference=0.0)


def at_points(points: list[tuple[str, int]]) -> Callable[[Worker, int], bool]:
    def kill(worker: Worker, number: int) -> bool:
        if number == len(points):
            return False
        point, count = points[number]
        log = worker.log_file.parent / "reached"
        log.unlink(missing_ok=True)
        worker.start(FAULT_POINT=f"{point}:{count}", FAULT_LOG=str(log))
        assert worker.ended(60) == -9
        assert log.read_text(encoding="utf-8") == f"{point}\n"
        return True

    return kill


def test_a_worker_killed_around_the_commit_of_a_re_drive_counts_each_record_once(campaign: Campaign) -> None:
    survive(campaign, 3000, 3, at_points([(point, 1) for point in POINTS]))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_worker_killed_again_and_again_while_it_re_drives_is_exact(campaign: Campaign) -> None:
    """Ten kills at the named points, then ten at random moments."""
    seed = some_seed()
    rng = random.Random(seed)  # noqa: S311
    named = at_points([(point, 1 + number % 2) for number in range(5) for point in POINTS])

    def kill(worker: Worker, number: int) -> bool:
        if number < 10 and named(worker, number):
            return True
        if number == 20:
            return False
        worker.start()
        time.sleep(rng.uniform(0.5, 4))
        worker.kill()
        return True

    survive(campaign, 30_000, seed, kill)
