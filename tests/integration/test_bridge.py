"""The bridge on a real Kafka, signed by Stripe's library and by the simulated Stripe."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe
from confluent_kafka import Consumer, TopicPartition

from services.bridge.app import create_app
from services.bridge.endpoints import Endpoints
from services.stripe_simulator import SimulatorControl, running_simulator
from services.wire.codec import Decoder, Record
from services.wire.errors import Poison
from services.wire.settings import Settings
from services.wire.topics import STRIPE_WEBHOOKS
from tests.integration.ingest_serving import served
from tests.proxy import KafkaProxy

SECRET = "whsec_first"
ACK_TIMEOUT_S = 3.0
HOUR = 3600


@dataclass
class Bridge:
    """A running bridge with an endpoint that no other test uses, and the records it wrote."""

    url: str
    kafka: str
    endpoint: str
    path: Path

    @property
    def address(self) -> str:
        return f"{self.url}/v1/webhooks/{self.endpoint}"

    def post(self, body: bytes, secret: str = SECRET, **headers: str) -> httpx.Response:
        signature = stripe.WebhookSignature.generate_signature_header(body.decode(), secret)
        fields = {"Stripe-Signature": signature, "Content-Type": "application/json"} | headers
        return httpx.post(self.address, content=body, headers=fields, timeout=30)

    def configure(self, *secrets_: str) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(f"{self.endpoint}={','.join(secrets_)}\n")
        draft.replace(self.path)

    def records(self) -> list[tuple[bytes, Record]]:
        """Keys and values that are on the topic by now."""
        consumer = Consumer({"bootstrap.servers": self.kafka, "group.id": f"g-{self.endpoint}"})
        found, left = [], {}
        try:
            for number in (
                consumer.list_topics(STRIPE_WEBHOOKS, timeout=10).topics[STRIPE_WEBHOOKS].partitions
            ):
                low, end = consumer.get_watermark_offsets(TopicPartition(STRIPE_WEBHOOKS, number), timeout=10)
                if end > low:
                    left[number] = (low, end)
            consumer.assign(
                [TopicPartition(STRIPE_WEBHOOKS, number, low) for number, (low, _) in left.items()]
            )
            deadline_s = time.monotonic() + 20
            while left:
                assert time.monotonic() < deadline_s, "the topic cannot be read to its end"
                for message in consumer.consume(1000, timeout=0.5):
                    assert message.error() is None
                    record = read(message.value() or b"")
                    if record.get("endpoint") == self.endpoint:
                        assert ("tidemeter-schema", b"stripe_webhook/1") in message.headers()
                        found.append((message.key(), record))
                    if message.offset() + 1 >= left.get(message.partition(), (0, -1))[1]:
                        left.pop(message.partition(), None)
        finally:
            consumer.close()
        return found

    def bodies(self) -> list[bytes]:
        return sorted(record["body"] for _, record in self.records())


def read(value: bytes) -> Record:
    try:
        return Decoder().decode(value)[1]
    except Poison:  # left by a test of what cannot be read
        return {}


@contextmanager
def bridging(kafka: str, directory: Path, *, brokers: str | None = None) -> Iterator[Bridge]:
    endpoint = f"t{secrets.token_hex(6)}"
    bridge = Bridge("", brokers or kafka, endpoint, directory / "secrets")
    bridge.configure(SECRET)
    app = create_app(
        Settings(kafka_bootstrap=kafka), endpoints=Endpoints(path=bridge.path), ack_timeout_s=ACK_TIMEOUT_S
    )
    with served(app) as bridge.url:
        yield bridge


@pytest.fixture
def bridge(kafka_bootstrap: str, tmp_path: Path) -> Iterator[Bridge]:
    with bridging(kafka_bootstrap, tmp_path) as bridge:
        yield bridge


def event(event_id: str = "evt_1", object_id: str = "in_1", **more: Any) -> bytes:
    document = {
        "id": event_id,
        "object": "event",
        "type": "invoice.paid",
        "data": {"object": {"id": object_id}},
    }
    return json.dumps({**document, **more}).encode()


def until(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


ODD_BODIES = {
    "whitespace": b' \r\n\t{ "id":"evt_1" ,\n"type" : "x", "data":{"object":{"id":"in_1"}} }\n\n',
    "unicode": event(name="Käse 🌊 \u2028 e\u0301"),
    "raw unicode": '{"id": "evt_1", "type": "x", "n": "Käse 🌊 \u2028 e\u0301 \ufeff"}'.encode(),
    "escapes": rb'{"id": "evt\u005f1", "type": "x", "n": "\ud83c\udf0a\/\u0000\ud83c"}',
    "numbers": b'{"id": "evt_1", "type": "x", "n": [1.0, 1e400, 123456789012345678901234567890, -0.0]}',
    "keys twice": b'{"id": "evt_0", "id": "evt_1", "type": "x", "n": 1, "n": 2}',
    "200 KB": event(filler="\u00e4" * 30_000 + "x" * 20_000),
    "256 KiB": event() + b" " * (256 * 1024 - len(event())),
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES)
def test_a_body_is_on_the_topic_byte_for_byte(bridge: Bridge, body: bytes) -> None:
    before_us = time.time_ns() // 1000
    assert bridge.post(body).json() == {"received": True}
    ((_, record),) = bridge.records()
    assert record["body"] == body
    assert record["event_id"] == "evt_1"
    assert before_us <= record["received_at"] <= time.time_ns() // 1000


def test_events_of_one_object_share_a_key_and_a_delivery_that_comes_twice_is_kept_twice(
    bridge: Bridge,
) -> None:
    for body in (event("evt_1"), event("evt_2"), event("evt_2"), event("evt_3", "in_2")):
        assert bridge.post(body).status_code == 200
    found = [(key, record["event_id"]) for key, record in bridge.records()]
    assert sorted(found) == [(b"in_1", "evt_1"), (b"in_1", "evt_2"), (b"in_1", "evt_2"), (b"in_2", "evt_3")]
    assert [one for one in found if one[0] == b"in_1"] == sorted(one for one in found if one[0] == b"in_1")


def test_a_chunked_upload_is_stopped_at_the_limit(bridge: Bridge) -> None:
    host, port = bridge.url.removeprefix("http://").split(":")
    signature = stripe.WebhookSignature.generate_signature_header("", SECRET).encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/webhooks/" + bridge.endpoint.encode() + b" HTTP/1.1\r\nHost: x\r\n"
            b"Transfer-Encoding: chunked\r\nStripe-Signature: " + signature + b"\r\n\r\n"
        )
        for _ in range(5):
            connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert bridge.records() == []


def test_a_secret_is_rolled_by_writing_the_file(bridge: Bridge) -> None:
    bridge.configure(SECRET, "whsec_second")
    until(lambda: bridge.post(event("evt_1"), "whsec_second").status_code == 200, "the new secret never held")
    assert bridge.post(event("evt_2"), SECRET).status_code == 200
    bridge.path.write_text("broken")
    until(
        lambda: httpx.get(bridge.url + "/health/ready").json()["status"] == "degraded",
        "nobody noticed the broken file",
    )
    assert bridge.post(event("evt_3"), SECRET).status_code == 200
    bridge.configure("whsec_second")
    until(lambda: bridge.post(event("evt_4"), SECRET).status_code == 400, "the old secret still holds")
    until(  # an answer about health is used for a second
        lambda: httpx.get(bridge.url + "/health/ready").json()["checks"]["secrets"] == {"status": "healthy"},
        "nobody noticed the mended file",
    )


def test_without_kafka_nothing_is_claimed_and_a_retry_is_kept(kafka_bootstrap: str, tmp_path: Path) -> None:
    with (
        KafkaProxy(kafka_bootstrap) as proxy,
        bridging(proxy.bootstrap, tmp_path, brokers=kafka_bootstrap) as bridge,
    ):
        until(lambda: bridge.post(event("evt_0")).status_code == 200, "Kafka never came")
        proxy.cut()
        began_s = time.monotonic()
        refused = bridge.post(event("evt_1"))
        assert (refused.status_code, refused.json()["code"]) == (503, "not_acknowledged")
        assert int(refused.headers["Retry-After"]) > 0
        assert time.monotonic() - began_s < ACK_TIMEOUT_S + 2
        assert httpx.get(bridge.url + "/health/ready").status_code == 503
        assert "evt_1" not in {record["event_id"] for _, record in bridge.records()}
        proxy.restore()
        until(lambda: bridge.post(event("evt_1")).status_code == 200, "Kafka never came back")
        assert "evt_1" in {record["event_id"] for _, record in bridge.records()}
        proxy.mute()
        assert bridge.post(event("evt_2")).status_code == 503
        proxy.restore()
        until(lambda: bridge.post(event("evt_2")).status_code == 200, "Kafka never came back")
        assert "evt_2" in {record["event_id"] for _, record in bridge.records()}


# By the simulated Stripe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator() -> Iterator[SimulatorControl]:
    with running_simulator() as control:
        yield control


@pytest.fixture
def sim(simulator: SimulatorControl) -> SimulatorControl:
    simulator.reset()
    simulator.seed(customers=["cus_1"], meters=["calls"])
    return simulator


def client(sim: SimulatorControl) -> Any:
    return stripe.StripeClient(
        "sk_test_bridge", base_addresses={"api": sim.url, "meter_events": sim.url}, max_network_retries=0
    )


def register(sim: SimulatorControl, bridge: Bridge) -> tuple[str, str]:
    """Tell the simulated Stripe of the bridge, and the bridge of the secret; the endpoint's id and secret."""
    made = client(sim).v1.webhook_endpoints.create({"url": bridge.address, "enabled_events": ["*"]})
    holds(bridge, made.secret)
    return made.id, made.secret


def holds(bridge: Bridge, *given: str) -> None:
    """Write the file and wait until it is in force."""
    marker = f"whsec_{secrets.token_hex(8)}"
    bridge.configure(*given, marker)
    until(lambda: bridge.post(b"{}", marker).json()["code"] == "event_malformed", "the file was not read")


def statuses(sim: SimulatorControl) -> list[list[int]]:
    return [one["statuses"] for one in sim.deliveries()["deliveries"]]


def kept(bridge: Bridge) -> list[str]:
    return sorted(record["event_id"] for _, record in bridge.records())


def test_snapshot_and_thin_events_of_the_simulated_stripe_are_kept(
    sim: SimulatorControl, bridge: Bridge
) -> None:
    _, snapshots = register(sim, bridge)
    thin = client(sim).v2.core.event_destinations.create(
        {
            "name": "tests",
            "type": "webhook_endpoint",
            "event_payload": "thin",
            "enabled_events": ["*"],
            "webhook_endpoint": {"url": bridge.address},
            "include": ["webhook_endpoint.signing_secret"],
        }
    )
    holds(bridge, snapshots, thin.webhook_endpoint.signing_secret)
    wanted = [
        sim.emit("invoice.paid", {"id": "in_1", "object": "invoice"}),
        sim.emit_thin("v1.billing.meter.error_report_triggered"),
        sim.emit_thin("v1.billing.meter.no_meter_found"),
    ]
    sim.deliver()
    assert statuses(sim) == [[200]] * 3
    assert kept(bridge) == sorted(wanted)
    by_type = {record["event_type"]: (key, record) for key, record in bridge.records()}
    assert by_type["invoice.paid"][0] == b"in_1"
    for key, record in by_type.values():
        document = json.loads(record["body"])
        if document["object"] == "v2.core.event":
            related = document.get("related_object")
            assert key == (related["id"] if related else record["event_id"]).encode()


@pytest.mark.parametrize("fault", ["wrong_secret", "old_timestamp", "truncated_body"])
def test_fault_a_delivery_that_is_not_to_be_believed_is_not_kept_and_its_retry_is(
    sim: SimulatorControl, bridge: Bridge, fault: str
) -> None:
    register(sim, bridge)
    sim.play_webhooks({"fault": fault})
    wanted = sim.emit("invoice.paid", {"id": "in_1", "object": "invoice"})
    sim.deliver()
    assert statuses(sim) == [[400]]
    assert kept(bridge) == []
    sim.advance(HOUR)
    sim.deliver()
    assert statuses(sim) == [[400, 200]]
    assert kept(bridge) == [wanted]


def test_fault_duplicates_are_all_kept(sim: SimulatorControl, bridge: Bridge) -> None:
    register(sim, bridge)
    sim.play_webhooks({"fault": "duplicate", "copies": 2})
    wanted = sim.emit("invoice.paid", {"id": "in_1", "object": "invoice"})
    sim.deliver()
    assert kept(bridge) == [wanted] * 3
    assert len(set(bridge.bodies())) == 1


def test_fault_an_event_of_another_account_is_rightly_signed_and_kept(
    sim: SimulatorControl, bridge: Bridge
) -> None:
    register(sim, bridge)
    sim.play_webhooks({"fault": "other_account"})
    sim.emit("invoice.paid", {"id": "in_1", "object": "invoice"})
    sim.deliver()
    accounts = [json.loads(body).get("account") for body in bridge.bodies()]
    assert sorted(accounts, key=str) == [None, "acct_other"]


def test_a_roll_at_stripe_loses_nothing_step_by_step(sim: SimulatorControl, bridge: Bridge) -> None:
    endpoint, old = register(sim, bridge)
    wanted = []

    def deliver() -> None:
        wanted.append(sim.emit("invoice.paid", {"id": "in_1", "object": "invoice"}))
        sim.deliver()

    deliver()
    new = sim.roll_secret(endpoint)
    deliver()  # signed with both, and only the old one is known here
    holds(bridge, old, new)
    deliver()
    sim.advance(25 * HOUR)
    deliver()  # signed with the new one
    holds(bridge, new)
    deliver()
    assert statuses(sim) == [[200]] * 5
    assert kept(bridge) == sorted(wanted)
