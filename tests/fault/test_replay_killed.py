"""Replays that are killed, beside live traffic, of counters that are damaged all the while: exact at last."""

from __future__ import annotations

import random
import sys
import time
from datetime import UTC, datetime

import pytest

from services.streaming import replays
from services.streaming.replays import ReplayRequest
from tests.fault.campaign import Campaign, settle, some_seed
from tests.fault.test_fault_points import fault_points
from tests.fault.traffic import TENANTS
from tests.pipeline import Pipeline, Worker, until

POINTS = fault_points("replay.")
#: What a later push can take back: what a meter of greatest or distinct values was sent too much, it cannot.
DAMAGE = (
    "total = b.total * 3 + 1 WHERE m.aggregation IN ('sum', 'count')",
    "total = b.total - 2, events = b.events + 1 WHERE m.aggregation IN ('sum', 'count')",
    "total = 0 WHERE m.aggregation <> 'last'",
    "closed = b.closed + 1 WHERE m.aggregation IN ('sum', 'count')",
    "pushed = b.pushed - 3 WHERE m.aggregation IN ('sum', 'count')",
    "first_event = b.first_event - interval '1 minute' WHERE true",
    "total = b.total + 1 WHERE m.aggregation = 'last' AND b.total <> 0",
)


def damage(pipeline: Pipeline, chance: random.Random) -> int:
    """Change some rows by hand."""
    change, _, condition = chance.choice(DAMAGE).partition(" WHERE ")
    with pipeline.database() as db:
        return db.execute(
            "WITH held AS MATERIALIZED (SELECT * FROM items ORDER BY item_id FOR UPDATE) "  # as closing does
            f"UPDATE buckets b SET {change} FROM held i JOIN meters m USING (tenant_id, meter) "
            f"WHERE i.item_id = b.item_id AND {condition} "
            "AND hashtext(b.item_id::text || b.hour_start) %% 5 = %s",
            (chance.randrange(5),),
        ).rowcount


def ask(pipeline: Pipeline, tenant: str | None) -> int | None:
    """Ask for a replay of the last days of a tenant, or of everything, unless one is under way."""
    now = datetime.now(UTC)
    request = ReplayRequest(tenant_id=tenant, since="-PT960H", mode="apply", force=True)
    with pipeline.database() as db:
        try:
            scope = replays.resolve(db, request, now) if tenant else replays.everything()
            if tenant is None:
                request = ReplayRequest(mode="apply", force=True)
            return replays.request_apply(db, request, scope, by="cli:test", now=now)
        except replays.RefusedReplay as error:
            assert error.code == "replay_overlaps", error
            return None


def open_ones(pipeline: Pipeline) -> int:
    return int(pipeline.query("SELECT count(*) FROM replays WHERE finished_at IS NULL")[0][0])


def states(pipeline: Pipeline) -> dict[str, int]:
    return dict(pipeline.query("SELECT state, count(*) FROM replays GROUP BY 1"))


def runner(pipeline: Pipeline) -> Worker:
    return pipeline.worker("replayer", [sys.executable, "-m", "tests.fault.replay_runner"])


def survive(campaign: Campaign, seed: int, events: int, seconds: float, kills: int) -> None:
    pipeline, chance = campaign.pipeline, random.Random(seed)  # noqa: S311
    with pipeline.database() as db:
        db.execute("UPDATE meters SET allow_negative = true WHERE aggregation IN ('sum', 'count')")
    worker, replayer = pipeline.worker().start(), runner(pipeline)
    damaged = 0
    fault_log = pipeline.directory / "points"
    with campaign.load(seed, events, seconds):
        worker.await_healthy()
        for number in range(kills):
            pipeline.push()
            damaged += damage(pipeline, chance)
            ask(pipeline, chance.choice([*TENANTS, None]))
            if number < len(POINTS) or number % 3:
                point = POINTS[number % len(POINTS)]
                count = chance.randrange(1, 4) if point.endswith("flush") else 1
                replayer.start(FAULT_POINT=f"{point}:{count}", FAULT_LOG=str(fault_log))
                until(lambda: not replayer.alive() or not open_ones(pipeline), "the point", 60, replayer.log)
            else:
                replayer.start()
                time.sleep(chance.uniform(0.8, 2.5))
            campaign.kills += replayer.alive()
            replayer.kill()
    reached = fault_log.read_text().split() if fault_log.exists() else []
    campaign.kills += len(reached)
    assert damaged, "nothing was damaged"
    assert set(reached) == set(POINTS), "a step was never reached"
    replayer.start()
    until(lambda: not open_ones(pipeline), "every replay", 120, replayer.log)
    ask(pipeline, None)  # of what was damaged last
    until(lambda: not open_ones(pipeline), "one more", 60, replayer.log)
    settle(pipeline)
    damage(pipeline, chance)
    last = ask(pipeline, None)
    until(lambda: not open_ones(pipeline), "the last replay", 60, replayer.log)
    assert pipeline.query("SELECT state FROM replays WHERE replay_id = %s", last) == [("done",)], (
        replayer.log()
    )
    campaign.more = {"damaged_rows": damaged, "points_reached": len(reached), "replays": states(pipeline)}
    assert set(states(pipeline)) == {"done"}, pipeline.query("SELECT * FROM replays WHERE state <> 'done'")
    replayer.kill()
    campaign.prove()
    groups = pipeline.admin.list_consumer_groups().result().valid
    assert not [one.group_id for one in groups if one.group_id.startswith("tidemeter-replay")]


def test_replays_killed_at_each_step_beside_traffic_leave_damaged_counters_exact(campaign: Campaign) -> None:
    survive(campaign, 5, events=4000, seconds=15, kills=8)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_forty_kills_of_replays_beside_traffic_leave_damaged_counters_exact(campaign: Campaign) -> None:
    survive(campaign, some_seed(), events=60_000, seconds=120, kills=40)
