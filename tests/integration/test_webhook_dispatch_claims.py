"""Which run is next, against a model of all runs; and which ways lead from state to state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import psycopg
import pytest

from services.webhooks import store
from tests.integration.dispatching import QUICK, Desk

STATES = ("received", "processing", "succeeded", "failed", "dead", "stale")
OPEN = ("received", "processing", "failed")
#: The picture in services/webhooks/deciding.py, and a run that is taken over or claimed by nobody else.
WAYS = {
    ("received", "processing"),
    ("failed", "processing"),
    ("processing", "succeeded"),
    ("processing", "stale"),
    ("processing", "failed"),
    ("processing", "dead"),
    ("dead", "received"),
    ("failed", "received"),
    *((state, state) for state in STATES),
}


@dataclass(frozen=True)
class Run:
    event_id: str
    handler: str
    subject: str
    created: int
    state: str
    due: int
    attempts: int


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    Desk(postgres_dsn)
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


def insert(db: psycopg.Connection[Any], runs: list[Run], now: datetime) -> None:
    for event_id, created in sorted({(run.event_id, run.created) for run in runs}):
        db.execute(
            "INSERT INTO webhook_events "
            "VALUES (%s, 'e', '', 't', 'o', false, false, %s, %s, 1, '', 't', 0, 0)",
            (event_id, now + timedelta(seconds=created), now),
        )
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO webhook_runs VALUES (%s, %s, %s, %s, %s, %s, %s, NULL, NULL, 0, %s)",
            [
                (
                    *(run.event_id, run.handler, run.subject, now + timedelta(seconds=run.created)),
                    *(run.state, run.attempts, now + timedelta(seconds=run.due)),
                    None if run.state in OPEN else now,
                )
                for run in runs
            ],
        )


def next_of(runs: list[Run], handler: str) -> set[str]:
    """The model: what may be claimed; of it, what is due longest."""

    def free(run: Run) -> bool:
        others = [one for one in runs if (one.handler, one.subject) == (handler, run.subject) and one != run]
        earlier = [
            one
            for one in others
            if one.state in OPEN and (one.created, one.event_id) < (run.created, run.event_id)
        ]
        busy = [one for one in others if one.state == "processing" and one.due > 0]
        first = [
            one
            for one in runs
            if handler != "tidemeter" and one.handler == "tidemeter" and one.event_id == run.event_id
        ]
        return not earlier and not busy and all(one.state not in OPEN for one in first)

    able = [
        run for run in runs if run.handler == handler and run.state in OPEN and run.due <= 0 and free(run)
    ]
    oldest = min((run.due for run in able), default=0)
    return {run.event_id for run in able if run.due == oldest}


def some_runs(dice: random.Random) -> list[Run]:
    runs = []
    for number in range(dice.randint(1, 9)):
        event_id, created = f"evt_{dice.randint(0, 99):02d}_{number}", dice.randint(-3, 0)
        subject = f"s{dice.randint(0, 2)}"
        for handler in ("tidemeter", "own")[: dice.randint(1, 2)]:
            state = dice.choice(STATES)
            runs.append(
                Run(event_id, handler, subject, created, state, dice.randint(-3, 2), dice.randint(0, 4))
            )
    return runs


def test_the_next_run_is_the_one_that_the_model_names(db: psycopg.Connection[Any]) -> None:
    dice = random.Random(11)  # noqa: S311
    claims = 0
    for _ in range(400):
        now = datetime.now(UTC)
        runs = some_runs(dice)
        db.execute("TRUNCATE webhook_events CASCADE")
        insert(db, runs, now)
        for handler in ("tidemeter", "own"):
            able = next_of(runs, handler)
            claimed = store.claim(db, handler, now=now, policy=QUICK)
            assert (claimed is None) is (not able), (runs, handler)
            if claimed is None:
                continue
            claims += 1
            assert claimed.facts.event_id in able, (runs, handler)
            [was] = [one for one in runs if (one.event_id, one.handler) == (claimed.facts.event_id, handler)]
            spent = was.state == "processing" and was.attempts >= QUICK.attempts_max
            assert claimed.is_spent is spent
            assert claimed.attempts == was.attempts + (0 if spent else 1)
            assert claimed.lease_ends == now + QUICK.lease
            runs = [one for one in runs if one != was]
            runs.append(
                Run(was.event_id, handler, was.subject, was.created, "processing", 99, claimed.attempts)
            )
    assert claims > 200


@pytest.mark.parametrize(("old", "new"), list(product(STATES, STATES)))
def test_the_database_knows_the_ways_between_states(db: psycopg.Connection[Any], old: str, new: str) -> None:
    insert(db, [Run("evt_1", "tidemeter", "s", 0, old, 0, 0)], datetime.now(UTC))
    change = "UPDATE webhook_runs SET state = %s, settled_at = CASE WHEN %s THEN now() END"
    try:
        db.execute(change, (new, new not in OPEN))
        went = True
    except psycopg.errors.CheckViolation:
        went = False
    assert went is ((old, new) in WAYS)
