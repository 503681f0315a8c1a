"""Usage by Stripe's v2 event stream, against a real PostgreSQL and the Stripe simulator.

The oracle is the simulator's ledger of applied events.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from services.pusher.agent import sink_of
from services.pusher.intents import Policy
from services.pusher.sender import SenderConfig
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.pusher.sinks.webhook import WebhookSink
from services.wire.errors import Misconfigured
from services.wire.settings import load_settings
from tests.integration.pushing import (
    GAUGE,
    KEY,
    World,
    delta,
    gauge,
    killed_at_the_end,
    settled,
    until,
)

STREAM = "POST /v2/billing/meter_event_stream"
SESSION = "POST /v2/billing/meter_event_session"
V1 = "POST /v1/billing/meter_events"


def stream(world: World, key: str = KEY, timeout: float = 2.0) -> StripeStreamSink:
    return StripeStreamSink(key, api_base=world.stripe.url, timeout_seconds=timeout, connections_max=4)


def push(world: World, timeout: float = 2.0) -> None:
    async def scenario() -> None:
        async with world.sending(stream(world, timeout=timeout), timeout=timeout):
            await until(lambda: settled(world))

    asyncio.run(scenario())


def test_many_meter_events_share_a_request_and_each_is_billed_once(world: World) -> None:
    world.close(*(delta(f"cus_{n}", f"{n}.25", hours_ago=h) for n in range(300) for h in range(4)))
    push(world)
    assert world.states() == {"reported": 1200}
    assert world.billed() == world.reported() == 4 * sum(Decimal(n) + Decimal("0.25") for n in range(300))
    assert world.open_buckets() == 0
    assert 12 <= world.requests(STREAM) <= 60
    assert world.requests(SESSION) == 1
    assert world.requests(V1) == 0


def test_times_dimensions_and_values_arrive_as_they_are(world: World) -> None:
    one = delta("cus_1", "123456.000000001", hours_ago=5, dimensions={"region": "eu"})
    world.close(one, gauge("3.5", customer="cus_2"))
    push(world)
    rows = {row["identifier"]: row for row in world.stripe.ledger()["rows"]}
    row = rows[one["identifier"]]
    assert (row["value"], row["dimensions"]) == ("123456.000000001", {"region": "eu"})
    assert row["timestamp"] == one["event_at"] // 1_000_000
    assert world.stripe.total(event_name=GAUGE) == "3.5"


def test_what_v2_refuses_goes_by_v1(world: World) -> None:
    """A correction is negative, and a value may be 0."""
    world.close(delta("cus_1", "5", hours_ago=1), delta("cus_1", "-2"), gauge("0"))
    push(world)
    assert world.states() == {"reported": 3}
    assert world.stripe.total(event_name="api_calls") == "3"
    assert (world.requests(STREAM), world.requests(V1)) == (1, 2)


def test_a_session_that_has_ended_is_renewed(world: World) -> None:
    async def scenario() -> None:
        async with world.sending(stream(world)):
            for n in range(3):
                world.close(delta("cus_1", "2", hours_ago=n))
                await until(lambda: settled(world))
                world.advance(timedelta(minutes=16))

    asyncio.run(scenario())
    assert world.states() == {"reported": 3}
    assert world.billed() == 6
    assert world.requests(SESSION) == 3
    assert world.requests(STREAM, 401) == 2


def test_a_request_that_one_event_spoils_holds_up_no_other(world: World) -> None:
    good = [delta(f"cus_{n}", "1") for n in range(50)]
    world.close(*good, delta("cus_77", "1", dimensions={"region": "x" * 101}))
    push(world)
    assert world.states() == {"reported": 50, "failed": 1}
    assert world.billed() == 50


FAULTS = [
    {"fault": "reset_before_apply"},
    {"fault": "reset_after_apply"},
    {"fault": "cut_body"},
    {"fault": "stall_body", "seconds": 1},
    {"fault": "stall_before_answer", "seconds": 1},
    *({"fault": "status", "status": status} for status in (409, 429, 500, 502, 503, 504)),
    *({"fault": "status", "status": status, "applied": True} for status in (500, 502, 503, 504)),
]


def test_no_fault_on_the_way_changes_what_is_billed(world: World) -> None:
    for path in ("*_stream", "*_session"):
        world.stripe.play(
            *({**fault, "match": {"path": path, "probability": 0.04}, "times": 6} for fault in FAULTS), seed=3
        )
    world.close(*(delta(f"cus_{n}", f"{n}.5", hours_ago=h) for n in range(150) for h in range(4)))
    push(world, timeout=0.5)
    assert world.states() == {"reported": 600}
    assert world.billed() == world.reported()
    assert len(world.stripe.stats()["faults"]) > 5
    assert world.open_buckets() == 0


def test_in_doubt_for_a_day_the_total_is_read_before_anything_is_sent(world: World) -> None:
    world.stripe.play({"fault": "reset_after_apply", "match": {"path": "*_stream"}})
    world.stripe.play({"fault": "reset_before_apply", "match": {"path": "*_stream"}, "times": 1000})
    world.close(delta("cus_1", "5"))

    async def scenario() -> None:
        policy = Policy(backoff_base_seconds=0.05, backoff_cap_seconds=0.1, look_every=1000)
        async with world.sending(stream(world), policy=policy):
            await until(lambda: world.states() == {"in_doubt": 1})
            world.advance(timedelta(hours=24, minutes=1))
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 1}
    assert world.billed() == 5


def test_a_key_that_is_not_accepted_pauses_everything_and_fails_nothing(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(200)))

    async def scenario() -> None:
        async with world.sending(stream(world, key="not-a-key")) as sender:
            await until(lambda: sender.health().paused_for == "unauthorised")
            await until(lambda: world.states() == {"pending": 200})

    asyncio.run(scenario())
    assert world.billed() == 0


@pytest.mark.parametrize("point", ["pusher.in_flight_committed", "pusher.answered", "pusher.settled"])
def test_a_sender_killed_at_any_step_bills_once(world: World, tmp_path: Path, point: str) -> None:
    world.close(*(delta(f"cus_{n}", "2") for n in range(40)))
    process = world.spawn(fault=f"{point}:1", log=tmp_path / "reached", sink="StripeStreamSink")
    with killed_at_the_end(process):
        assert process.wait(20) == -9
    assert (tmp_path / "reached").read_text().strip() == point
    world.advance(timedelta(minutes=2))  # past the lease of the dead
    push(world)
    assert world.states() == {"reported": 40}
    assert world.billed() == 80


def test_a_low_rate_sends_small_batches_in_time(world: World) -> None:
    """A hundred in one call would wait longer than a claim may."""
    world.close(*(delta(f"cus_{n}") for n in range(24)))

    async def scenario() -> None:
        async with world.sending(stream(world), rate=4):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 24}
    assert world.requests(STREAM) >= 6


def test_the_rate_is_kept_though_batches_leave_at_once(world: World) -> None:
    world.close(*(delta(f"cus_{n}") for n in range(240)))

    async def scenario() -> None:
        async with world.sending(stream(world), rate=80):
            await until(lambda: settled(world))

    asyncio.run(scenario())
    assert world.states() == {"reported": 240}
    received = sorted(row["received_at"] for row in world.stripe.ledger()["rows"])
    assert len(received) == 240
    busiest = max(sum(at <= other < at + 1 for other in received) for at in received)
    assert busiest <= 82  # the times are the simulator's


def test_the_setting_chooses_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", KEY)
    assert type(sink_of(load_settings())) is StripeSink
    monkeypatch.setenv("TIDEMETER_STRIPE_MODE", "stream")
    assert type(sink_of(load_settings())) is StripeStreamSink
    monkeypatch.setenv("TIDEMETER_SINK", "webhook")
    with pytest.raises(Misconfigured, match="TIDEMETER_SINK_WEBHOOK_URL"):
        sink_of(load_settings())
    monkeypatch.setenv("TIDEMETER_SINK_WEBHOOK_URL", "http://127.0.0.1:1/usage")
    monkeypatch.setenv("TIDEMETER_SINK_WEBHOOK_SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert type(sink_of(load_settings())) is WebhookSink


@pytest.mark.parametrize(
    ("rate", "concurrency", "batch_max", "room"),
    [(0.5, 16, 1, 1), (200, 16, 1, 200), (950, 32, 1, 950), (200, 16, 100, 200), (9_500, 16, 100, 3200)],
)
def test_no_more_is_claimed_than_a_second_or_two_can_send(
    rate: float, concurrency: int, batch_max: int, room: int
) -> None:
    assert SenderConfig(rate_per_second=rate, concurrency=concurrency).room(batch_max) == room
