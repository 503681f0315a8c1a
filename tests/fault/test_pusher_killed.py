"""SIGKILL of the pusher at every step of its own and at random: what Stripe holds is what was counted."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from decimal import Decimal

import pytest

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.fault.campaign import Campaign, exact, some_seed
from tests.fault.test_fault_points import fault_points
from tests.fault.traffic import CUSTOMERS, METERS, TENANTS
from tests.pipeline import Pipeline, Worker, until

pytestmark = pytest.mark.faults

#: What a network, and Stripe, may do to a call: with and without effect.
FAULTS = (
    {"fault": "reset_after_apply"},
    {"fault": "reset_before_apply"},
    {"fault": "cut_body"},
    {"fault": "status", "status": 429},
    {"fault": "status", "status": 503, "applied": True},
    {"fault": "status", "status": 503},
    {"fault": "slow", "seconds": 0.3},
)


@pytest.fixture
def stripe() -> Iterator[SimulatorControl]:
    with running_simulator(SimulatorConfig(port=0, rate_per_second=10_000)) as stripe:
        stripe.seed(
            customers=[f"cus_{number:03d}" for number in range(CUSTOMERS)],
            meters=[f"{tenant}.{slug}" for tenant in TENANTS for slug in METERS],
        )
        stripe.play(
            *({**fault, "match": {"path": "*/meter_events", "probability": 0.02}} for fault in FAULTS), seed=5
        )
        yield stripe


@pytest.mark.timeout(900)
def test_a_pusher_killed_at_every_step_and_at_random_bills_everything_once(
    campaign: Campaign, stripe: SimulatorControl
) -> None:
    chance = random.Random(seed := some_seed())  # noqa: S311
    pipeline = campaign.pipeline
    pipeline.worker("w1").start()
    pusher = pipeline.worker(
        "pusher",
        [sys.executable, "-m", "services.cli.main", "pusher"],
        STRIPE_API_KEY="sk_test_faults",
        STRIPE_API_BASE=stripe.url,
        STRIPE_RATE_PER_SECOND="200",
        STRIPE_TIMEOUT_SECONDS="2",
    )
    reached = pipeline.directory / "reached"
    points = fault_points("pusher.") * 5
    with campaign.load(seed, 15_000, seconds=6.0 * len(points)):
        for number, point in enumerate(points):
            reached.unlink(missing_ok=True)
            pusher.start(FAULT_POINT=f"{point}:{1 + number % 7}", FAULT_LOG=str(reached))
            assert pusher.ended(60) == -9, pusher.log()[-3000:]
            assert reached.read_text(encoding="utf-8") == f"{point}\n"
            pusher.start()
            time.sleep(1 + 2 * chance.random())
            pusher.kill()
            campaign.kills += 2
    pusher.start()
    until(
        lambda: everything_is_reported(pipeline),
        "all of it with Stripe",
        120,
        lambda: waiting(pipeline, pusher),
    )
    pipeline.await_quiet()
    exact(pipeline)
    billed = {
        (one["customer"], one["event_name"]): Decimal(one["value"]) for one in stripe.totals()["totals"]
    }
    deltas = {
        (row[0], row[1]): row[2]
        for row in pipeline.query(
            "SELECT i.customer_ref, i.tenant_id || '.' || i.meter, sum(d.amount) "
            "FROM deltas d JOIN items i USING (item_id) GROUP BY 1, 2"
        )
    }
    assert billed == deltas
    [(number,)] = pipeline.query("SELECT count(*) FROM deltas")
    events = [one["events"] for one in stripe.totals()["totals"]]
    campaign.leave_line(deltas=number, billed=sum(events), difference=0)
    assert sum(events) == number, "a delta was billed twice, or not at all"


def everything_is_reported(pipeline: Pipeline) -> bool:
    return not pipeline.query(
        "SELECT FROM meter_events WHERE state IN ('pending', 'in_flight', 'in_doubt') "
        "UNION ALL SELECT FROM buckets WHERE open OR closed IS DISTINCT FROM total LIMIT 1"
    )


def waiting(pipeline: Pipeline, pusher: Worker) -> str:
    states = pipeline.query("SELECT state, error_code, count(*) FROM meter_events GROUP BY 1, 2")
    buckets = pipeline.query("SELECT count(*) FROM buckets WHERE open OR closed IS DISTINCT FROM total")
    return f"{states}\n{buckets}\n{pusher.log()[-3000:]}"
