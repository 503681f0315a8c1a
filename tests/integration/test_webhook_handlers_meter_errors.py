"""Error reports of meters, end to end: usage on the stream, rejected afterwards, told in a thin event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import stripe
from hypothesis import HealthCheck, given, settings

from services.pusher.failures import fail_reported
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.stripe_simulator import SimulatorConfig
from services.webhooks.handlers import product_handlers
from services.webhooks.handling import Refused, Unfinished, WebhookEvent
from services.wire.ops import DISPATCHER
from tests.integration.pushing import KEY, World, delta, open_world, settled, until
from tests.integration.test_webhook_handlers import damaged
from tests.oracle import unframe

REPORT, NO_METER = "v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"
NOW = datetime(2026, 6, 1, tzinfo=UTC)
HANDLER, *_ = product_handlers(fail_reported)


#: The stream names usage by identifier. By v1 older reports name the request, whose key is ours.
SHAPES = {"stream": "identifier", "v1": "id_and_key", "stream_by_key": "id_and_key"}


@pytest.fixture(params=["stream", "v1"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reporting(postgres_dsn: str, way: str) -> Iterator[World]:
    """A Stripe that takes everything, reports errors later and names two samples of each code."""
    config = SimulatorConfig(
        port=0,
        rate_per_second=100_000,
        report_samples_max=2,
        unknown_customer="report",
        unknown_meter="report",
        report_names_request_by=SHAPES[way],
    )
    with open_world(postgres_dsn, config) as opened:
        yield opened


def sink_of(world: World, way: str) -> StripeSink:
    return world.sink() if way == "v1" else stream(world)


def client_of(world: World) -> stripe.StripeClient:
    return stripe.StripeClient(KEY, base_addresses={"api": world.stripe.url}, max_network_retries=0)


def thin(event_id: str, event_type: str = REPORT, account: str = "") -> WebhookEvent:
    return WebhookEvent(event_id, "main", account, event_type, "", True, False, NOW, {}, {})


def push(world: World, sink: StripeSink) -> None:
    async def scenario() -> None:
        async with world.sending(sink):
            await until(lambda: settled(world))

    asyncio.run(scenario())


def stream(world: World) -> StripeStreamSink:
    return StripeStreamSink(KEY, api_base=world.stripe.url, timeout_seconds=2.0, connections_max=4)


def reports(world: World, event_type: str) -> list[str]:
    """Ids of the reports that Stripe has made, once their windows have closed."""
    world.stripe.advance(30)
    world.stripe.deliver()
    found = client_of(world).v2.core.events.list({"limit": 20})
    return [event.id for event in found.data if event.type == event_type]


def handle(world: World, event: WebhookEvent, times: int = 1) -> None:
    """Play the engine, in transactions of their own."""
    for _ in range(times):
        fetched = HANDLER.fetch(event, client_of(world))
        with psycopg.connect(world.dsn) as db:
            assert HANDLER.apply(db, event, fetched, NOW) == []


def ops(world: World) -> list[dict[str, Any]]:
    rows = world.sql("SELECT value FROM outbox WHERE producer = %s ORDER BY outbox_id", (DISPATCHER,))
    return [unframe("ops_event", 1, bytes(row[0])) for row in rows]


def failed(world: World) -> list[tuple[str, str]]:
    return world.sql("SELECT identifier, error_code FROM meter_events WHERE state = 'failed' ORDER BY 1")


def test_exactly_the_sampled_intents_fail_once_each_with_one_ops_event(reporting: World, way: str) -> None:
    """Given three customers that Stripe does not know, of whom a report names two, and one that it knows."""
    reporting.close(*(delta(f"cus_gone_{n}", hours_ago=n) for n in range(3)), delta("cus_1", "4"))
    push(reporting, sink_of(reporting, way))
    assert reporting.states() == {"reported": 4}
    [report] = reports(reporting, REPORT)
    handle(reporting, thin(report), times=2)
    assert reporting.states() == {"failed": 2, "reported": 2}
    names = [identifier for identifier, _ in failed(reporting)]
    assert {code for _, code in failed(reporting)} == {"meter_event_customer_not_found"}
    told = ops(reporting)
    assert sorted(one["subject_id"] for one in told) == names
    assert {(one["name"], one["source"]) for one in told} == {("meter_reporting_failed", "webhook")}
    assert delta("cus_1")["identifier"] not in names


def test_usage_of_a_meter_that_is_gone_fails_and_pauses_the_meter(reporting: World, way: str) -> None:
    reporting.close(delta("cus_1", event_name="vanished"), delta("cus_1"))
    push(reporting, sink_of(reporting, way))
    [report] = reports(reporting, NO_METER)
    handle(reporting, thin(report, NO_METER), times=2)
    assert failed(reporting) == [(delta("cus_1", event_name="vanished")["identifier"], "no_meter")]
    assert reporting.sql("SELECT event_name, reason, source FROM paused_meters") == [
        ("vanished", "no_meter", "webhook")
    ]
    assert sorted(one["name"] for one in ops(reporting)) == ["meter_paused", "meter_reporting_failed"]


@pytest.mark.parametrize("way", ["stream_by_key"], indirect=True)
def test_a_key_of_a_whole_batch_names_no_intent(reporting: World, way: str) -> None:
    reporting.close(delta("cus_gone_1"), delta("cus_gone_2"))
    push(reporting, sink_of(reporting, way))
    [report] = reports(reporting, REPORT)
    handle(reporting, thin(report))
    assert (reporting.states(), ops(reporting)) == ({"reported": 2}, [])


def test_a_run_that_was_rolled_back_fails_its_intents_when_it_is_repeated(world: World) -> None:
    world.close(delta("cus_gone"))
    push(world, stream(world))
    [report] = reports(world, REPORT)
    event = thin(report)
    fetched = HANDLER.fetch(event, client_of(world))
    with psycopg.connect(world.dsn, autocommit=True) as db, db.transaction(force_rollback=True):
        HANDLER.apply(db, event, fetched, NOW)
    assert (world.states(), ops(world)) == ({"reported": 1}, [])
    handle(world, event)
    assert (world.states(), len(ops(world))) == ({"failed": 1}, 1)


def report_of(world: World, *samples: Mapping[str, Any], code: str = "no_meter") -> str:
    kind = {"code": code, "error_count": 900, "sample_errors": list(samples)}
    data = {
        "developer_message_summary": "There are 900 invalid events",
        "reason": {"error_count": 900, "error_types": [kind]},
        "validation_start": "2026-06-01T00:00:00.000Z",
        "validation_end": "2026-06-01T00:00:10.000Z",
    }
    return world.stripe.emit_thin(REPORT, data)


def sample(**request: Any) -> dict[str, Any]:
    return {"error_message": "ada@lovelace.example is wrong", "request": request}


def test_an_idempotency_key_of_ours_leads_back_to_its_intent(world: World) -> None:
    world.close(delta("cus_1"), delta("cus_2"), delta("cus_3"))
    push(world, world.sink())
    one, two = (delta(f"cus_{n}")["identifier"] for n in (1, 2))
    report = report_of(
        world,
        sample(id="req_1", idempotency_key=f"{one}-2"),
        sample(identifier=two),
        code="Meter event: Value!",
    )
    handle(world, thin(report))
    assert failed(world) == sorted((name, "meter_event__value_") for name in (one, two))
    assert world.sql("SELECT * FROM paused_meters") == []


def test_what_is_not_ours_or_cannot_be_kept_is_left_alone(world: World) -> None:
    world.close(delta("cus_1"))
    push(world, world.sink())
    mine = delta("cus_1")["identifier"]
    foreign = [sample(identifier="someone-elses/1"), sample(identifier="x" * 300), sample(), {"request": 7}]
    handle(world, thin(report_of(world, *foreign)))
    handle(world, thin(report_of(world, sample(identifier=mine), code="x" * 101)))
    handle(world, thin(report_of(world, sample(identifier=mine)), account="acct_1"))
    assert (world.states(), ops(world)) == ({"reported": 1}, [])


def test_a_report_that_stripe_does_not_have_or_that_is_another_is_refused(world: World) -> None:
    with pytest.raises(Refused, match="event_not_found"):
        handle(world, thin("evt_65NoneSuch"))
    with pytest.raises(Refused, match="shape_event"):
        handle(world, thin(report_of(world), NO_METER))
    with pytest.raises(Refused, match="shape_reason_error_types"):
        handle(world, thin(world.stripe.emit_thin(REPORT, {"reason": None})))


def test_whatever_a_report_holds_it_is_handled(world: World) -> None:
    whole = {"reason": {"error_count": 1, "error_types": [{"code": "a", "sample_errors": [sample()] * 2}]}}
    with psycopg.connect(world.dsn, autocommit=True) as db:

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        @given(data=damaged(whole))
        def handled(data: Any) -> None:
            with db.transaction(force_rollback=True):
                assert HANDLER.apply(db, thin("evt_1"), data, NOW) == []

        handled()


def test_a_stripe_that_cannot_be_read_is_tried_again_later(world: World) -> None:
    report = report_of(world, sample(identifier="x"))
    world.stripe.play(
        {"match": {"path": "/v2/core/events/*", "method": "GET"}, "fault": "status", "status": 503}
    )
    with pytest.raises(stripe.StripeError):
        HANDLER.fetch(thin(report), client_of(world))
    assert HANDLER.fetch(thin(report), client_of(world)) is not None


@pytest.mark.parametrize("state", ["in_flight", "in_doubt"])
def test_a_report_waits_for_the_intents_that_are_still_under_way(world: World, state: str) -> None:
    """Given a report of two intents, of which one has no answer in the journal yet."""
    world.close(delta("cus_1"), delta("cus_2"))
    push(world, world.sink())
    one, two = (delta(f"cus_{n}")["identifier"] for n in (1, 2))
    report = thin(report_of(world, sample(identifier=one), sample(identifier=two)))
    journal = "UPDATE meter_events SET state = %s, settled_at = %s WHERE identifier = %s RETURNING 1"
    with psycopg.connect(world.dsn, autocommit=True) as db:
        db.execute("ALTER TABLE meter_events DISABLE TRIGGER USER")
        assert db.execute(journal, (state, None, two)).fetchall()
        with db.transaction(), pytest.raises(Unfinished, match="intent_under_way"):
            HANDLER.apply(db, report, HANDLER.fetch(report, client_of(world)), NOW)
        assert [name for name, _ in failed(world)] == [one]
        assert db.execute(journal, ("reported", NOW, two)).fetchall()
        db.execute("ALTER TABLE meter_events ENABLE TRIGGER USER")
    handle(world, report)
    assert [name for name, _ in failed(world)] == sorted((one, two))
    assert len(ops(world)) == len(world.sql("SELECT 1 FROM paused_meters")) + 2
