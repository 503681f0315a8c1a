"""SIGKILL at every named step of the protocol: each is reached, and the sums stay exact."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice

import pytest

from services.console import parked
from services.streaming.parking import Choice
from tests.fault.campaign import Campaign, some_seed
from tests.fault.traffic import Record
from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import ROOT, Pipeline, Worker

RECORDS = 200
MOVED = ("acme", "cus_mover")
#: Points that a worker died at in this session.
reached: set[str] = set()


def fault_points(*prefixes: str) -> list[str]:
    """Every name in the sources, so that a new step is tested without anybody remembering to."""
    found = set()
    for path in ROOT.glob("services/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault_point":
                assert isinstance(node.args[0], ast.Constant), f"{path}: the name of a fault point is a text"
                found.add(str(node.args[0].value))
    return sorted(name for name in found if name.startswith(prefixes))


def counters_points() -> list[str]:
    """All but those of other processes, which ``test_*_killed`` die at."""
    return sorted(set(fault_points("")) - set(fault_points("archive.", "pusher.", "replay.", "webhooks.")))


def die_at(pipeline: Pipeline, worker: Worker, point: str, count: int, records: Iterator[Record]) -> None:
    """Give the worker all kinds of work, and see it die at the ``count``-th time it reaches ``point``."""
    pipeline.send_raw(islice(records, RECORDS))
    kind = point.partition(".")[0]
    if kind == "adjust":
        pipeline.send(*too_late(f"{point}-{len(pipeline.log)}"))
    log = pipeline.directory / "reached"
    log.unlink(missing_ok=True)
    worker.start(FAULT_POINT=f"{point}:{count}", FAULT_LOG=str(log))
    deadline = time.monotonic() + 60
    while worker.alive() and time.monotonic() < deadline:
        pipeline.push()  # as if all earlier deltas were reported, so that there is more to close
        name = f"{point}-{len(pipeline.log)}"  # a worker that has done it all reaches no step any more
        pipeline.send(Usage("acme", "cus_trickle", "requests", Decimal(1), name, int(time.time())))
        if kind == "adjust":
            pipeline.approve(1)
        elif kind == "calendar":
            move(pipeline)
        elif kind == "redrive":
            with pipeline.database() as db:  # of what no retry can read: it stays parked, so the sums stay
                choice = Choice(kinds=("upcast_failure",))
                parked.redrive(db, choice, by="a test", dry_run=False)
        elif point == "close.revised":
            pipeline.send(*late(len(pipeline.log)))
        time.sleep(0.1)
    assert worker.ended(1) == -9, worker.log()[-3000:]
    assert log.read_text(encoding="utf-8") == f"{point}\n"
    reached.add(point)


def too_late(prefix: str) -> list[Usage]:
    """One customer's usage of today, then some of last week, which waits to be approved."""
    now_s, name = int(time.time()), ("acme", "cus_late", "requests")
    return [Usage(*name, Decimal(1), f"{prefix}-{n}", now_s - (9 * DAY_S + n if n else 0)) for n in range(13)]


def late(number: int) -> list[Usage]:
    """One customer's usage of now, then of one of eight hours ago, in turn: by the time that an hour is
    revised, its delta is settled."""
    now_s, name = int(time.time()), ("acme", "cus_revised", "requests")
    return [
        Usage(*name, Decimal(1), f"revised-{number}-{hours}", now_s - hours * HOUR_S)
        for hours in (0, 1 + number // 2 % 8)
    ]


def move(pipeline: Pipeline) -> None:
    """Give a customer with usage other billing periods. Their edges are full hours: no bucket is cut."""
    if MOVED not in pipeline.calendars:
        now_s = int(time.time())
        pipeline.customer(*MOVED, "1 month UTC")
        pipeline.send(
            *[
                Usage(*MOVED, "users", Decimal(1), f"u{n}", now_s - n * 900, {"user": f"u{n % 7}"})
                for n in range(60)
            ],
            *[Usage(*MOVED, "requests", Decimal(3), f"r{n}", now_s - n * 900) for n in range(60)],
        )
    hours = len(pipeline.calendars_were) % 9
    anchor = datetime.fromtimestamp(int(time.time()) // HOUR_S * HOUR_S - hours * HOUR_S, UTC)
    if not pipeline.query("SELECT FROM calendar_changes WHERE done_at IS NULL"):
        pipeline.change_calendar(*MOVED, f"1 day UTC {anchor:%Y-%m-%dT%H:%M:%SZ}")


def test_the_protocol_has_its_named_steps() -> None:
    assert {name.partition(".")[0] for name in counters_points()} >= {"chunk", "close", "relay", "tx"}
    assert len(counters_points()) >= 13


@pytest.mark.timeout(300)
def test_a_worker_killed_at_every_third_step_in_turn_is_exact(campaign: Campaign) -> None:
    die_in_turn(campaign, [(point, 1) for point in counters_points()[1::3]], seed=7)


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", counters_points())
def test_a_worker_killed_five_times_at_one_step_is_exact(campaign: Campaign, point: str) -> None:
    die_in_turn(campaign, [(point, count) for count in range(1, 6)], seed=some_seed())


def die_in_turn(campaign: Campaign, steps: list[tuple[str, int]], seed: int) -> None:
    records = iter(campaign.records(seed, RECORDS * len(steps)))
    worker = campaign.pipeline.worker(CHUNK_RECORDS_MAX="20")
    for point, count in steps:
        die_at(campaign.pipeline, worker, point, count, records)
        campaign.kills += 1
    worker.start()
    campaign.prove()


@pytest.mark.faults
def test_every_step_that_the_sources_name_was_died_at() -> None:
    """Runs after the tests above, which collect what they reached."""
    assert sorted(reached) == counters_points()
