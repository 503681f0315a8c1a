"""Hundreds of seeds of all that goes wrong on the way to Stripe: what it holds in the end is what was due."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.conftest import NewDatabase
from tests.fault.campaign import LINES
from tests.fault.push_campaign import Judgement, Run, figures, judge
from tests.fault.push_runner import Runner

SEEDS, FEW, TRIES = 200, 6, 12
TOTALS: Counter[str] = Counter()


def seeds(last: int) -> list[Any]:
    """Each seed is a test of its own; FAULT_SEED names one."""
    given = os.environ.get("FAULT_SEED")
    chosen = [int(given)] if given else range(1, last + 1)
    return [pytest.param(seed, id=f"seed{seed:04}") for seed in chosen]


@pytest.fixture(scope="module", autouse=True)
def summary() -> Iterator[None]:
    """One more line at the end, of all runs. The simulator would have one about every fault it plays."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.configure(**before)
    if TOTALS:
        del TOTALS["kinds_of_faults"]
        LINES.append(json.dumps({"test": "push_campaign, all runs", **TOTALS}))


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def dsn(new_database: NewDatabase) -> Iterator[str]:
    """One database for all runs; each empties it first."""
    with new_database() as dsn:
        yield dsn


def play(run: Run) -> Judgement:
    began = time.monotonic()
    evidence = run.play()
    judgement = judge(evidence)
    found = figures(run, judgement, evidence, time.monotonic() - began)
    LINES.append(json.dumps({"test": "push_campaign", **found}))
    TOTALS.update({name: value for name, value in found.items() if name not in ("seed", "sink")})
    TOTALS.update(("runs", f"runs_by_{found['sink']}"))
    return judgement


def prove(run: Run) -> None:
    wrong = play(run).wrong
    again = f"FAULT_SEED={run.seed} .venv/bin/pytest tests/fault/test_push_campaign.py -k every_seed"
    assert not wrong, "\n".join([f"seed {run.seed}; to repeat it: {again}", *wrong[:20], run.tail_of_log()])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", seeds(FEW))
def test_a_few_seeds_are_billed_exactly(seed: int, dsn: str, runner: Runner, tmp_path: Path) -> None:
    prove(Run(seed, dsn, runner, tmp_path))


@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", seeds(SEEDS))
def test_every_seed_is_billed_exactly(seed: int, dsn: str, runner: Runner, tmp_path: Path) -> None:
    prove(Run(seed, dsn, runner, tmp_path))


#: What a sender may be told to do wrong, and what the oracle calls it.
CARELESS: dict[str, tuple[dict[str, Any], str]] = {
    "resends_for_two_days": ({"resend_for_h": 47.0, "ask_after_h": 48.0}, "sent again"),
    "asks_at_once": ({"resend_for_h": 0.0, "ask_after_h": 0.0}, "no summary was read before"),
    "is_faster_than_it_may": ({"rate": 3000.0, "concurrency": 32}, "calls in one second"),
}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("careless", CARELESS)
def test_a_careless_sender_is_caught(careless: str, dsn: str, runner: Runner, tmp_path: Path) -> None:
    """The campaign would notice: one of a few seeds finds what is wrong."""
    orders, verdict = CARELESS[careless]
    for seed in range(1, TRIES + 1):
        (directory := tmp_path / str(seed)).mkdir()
        judgement = judge(Run(seed, dsn, runner, directory, **orders).play())
        if any(verdict in one for one in judgement.wrong):
            return
    pytest.fail(f"a sender that {careless} went unnoticed for {TRIES} seeds")
