"""The ledger against a short model: whatever is sent, repeated and broken, it adds up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from tests.contract.stripe_calls import KEY, token
from tests.contract.stripe_calls import event as stripe_event

VALUES = ["1", "0.1", "-3", "2.000001", "99999999999.9999"]
REFUSING = [
    ("status", 429, False),
    ("status", 409, False),
    ("status", 503, False),
    ("reset_before_apply", 0, False),
]
EXECUTED = [("ok", 0, False), ("status", 502, True), ("reset_after_apply", 0, False), ("cut_body", 0, False)]
FAILING = [("status", 500, False), ("status", 500, True)]

Fault = tuple[str, int, bool]
Step = tuple[str, int, int, Fault]

V1, V2, STREAM = "/v1/billing/meter_events", "/v2/billing/meter_events", "/v2/billing/meter_event_stream"


def carried(way: str, event: int) -> list[int]:
    """Which events one request carries: the stream takes the next one along."""
    return [event, (event + 1) % len(VALUES)] if way == STREAM else [event]


@dataclass
class Model:
    """What should count: an event is applied by the first request that executes without a stored result.

    v1 stores failures too, v2 only successes; v2 refuses a repeated identifier and the stream passes it over.
    """

    applied: dict[int, Decimal] = field(default_factory=dict)
    kept_keys: set[tuple[str, str]] = field(default_factory=set)

    def step(self, way: str, event: int, key: str, fault: Fault) -> None:
        if fault in REFUSING or (way, key) in self.kept_keys:
            return
        failed = fault in FAILING or (way == V2 and event in self.applied)
        if way == V1 or not failed:
            self.kept_keys.add((way, key))
        if fault != ("status", 500, False):
            for one in carried(way, event):
                self.applied.setdefault(one, Decimal(VALUES[one]))


@pytest.fixture(scope="module")
def running() -> Iterator[SimulatorControl]:
    with running_simulator(
        SimulatorConfig(port=0, rate_per_second=100_000, stream_rate_per_second=100_000)
    ) as control:
        yield control


steps = st.lists(
    st.tuples(
        st.sampled_from([V1, V2, STREAM]),
        st.integers(0, len(VALUES) - 1),
        st.integers(0, 1),
        st.sampled_from([*REFUSING, *EXECUTED, *EXECUTED, *FAILING]),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_the_ledger_is_the_sum_of_the_distinct_events_that_were_executed(
    running: SimulatorControl, steps: list[Step]
) -> None:
    running.reset()
    running.seed(customers=["cus_1"], meters=["calls"])
    session = token(running)
    running.play(
        *({"fault": name, "status": status, "applied": applied} for *_, (name, status, applied) in steps)
    )
    model = Model()
    with httpx.Client(base_url=running.url) as client:
        for way, event, attempt, fault in steps:
            key = f"key-{event}-{attempt}"
            send(client, session, way, event, key)
            model.step(way, event, key, fault)
    assert Decimal(running.total()) == sum(model.applied.values(), Decimal(0))
    identifiers = [row["identifier"] for row in running.ledger()["rows"]]
    assert sorted(identifiers) == sorted(f"id-{event}" for event in model.applied)
    assert running.stats()["identifiers_with_two_values"] == 0


def send(client: httpx.Client, session: str, way: str, event: int, key: str) -> None:
    headers = {"Idempotency-Key": key, "Authorization": f"Bearer {session if way == STREAM else KEY}"}
    events = [stripe_event(f"id-{one}", value=VALUES[one]) for one in carried(way, event)]
    try:
        if way == V1:
            form = {
                "event_name": "calls",
                "identifier": f"id-{event}",
                "payload[stripe_customer_id]": "cus_1",
                "payload[value]": VALUES[event],
            }
            client.post(way, data=form, headers=headers)
        else:
            body = {"events": events} if way == STREAM else events[0]
            client.post(way, json=body, headers=headers)
    except (httpx.ReadError, httpx.RemoteProtocolError):
        return  # no answer, or half of one: the model knows what happened


def test_sums_stay_exact_where_doubles_would_not(running: SimulatorControl) -> None:
    running.reset()
    running.seed(customers=["cus_1"], meters=["calls"])
    headers = {"Authorization": "Bearer sk_test_x"}
    with httpx.Client(base_url=running.url, headers=headers) as client:
        for value in ["0.1"] * 10 + ["100000000000000"] * 9 + ["0." + "0" * 60 + "1"]:
            form = {"event_name": "calls", "payload[stripe_customer_id]": "cus_1", "payload[value]": value}
            assert client.post("/v1/billing/meter_events", data=form).status_code == 200
    assert Decimal(running.total()) == Decimal("900000000000001." + "0" * 60 + "1")
