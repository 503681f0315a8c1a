"""Play the planned records against a stack of its own, kill a worker in the middle, and wait for quiet."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import structlog
from confluent_kafka import Producer

from schemas.catalog import released
from services.cli.apply import apply_document, create_in_stripe, parse_document
from services.cli.status import collect
from services.counters.conservation import conservation
from services.demo.oracle import expect
from services.demo.proof import Proof, prove
from services.demo.traffic import METERS, TENANTS, Planned, customers, plan
from services.embedded.stack import SIMULATOR_KEY, Stack
from services.producer import UsageProducer
from services.web.keys import generate_key
from services.wire.codec import Encoder
from services.wire.kafka import producer_config
from services.wire.settings import PREFIX, Settings, load_settings
from services.wire.topics import USAGE_TOPICS
from services.wire.usage import UsageEvent, record_key

log = structlog.get_logger(__name__)

BATCH = 1000
QUIET_TIMEOUT_S = 180.0
STRIPE_RATE = "900"
KEPT_VARIABLES = (f"{PREFIX}CACHE_DIR", f"{PREFIX}MAVEN_REPOSITORY")

Show = Callable[[str, dict[str, Any]], None]


@dataclass(slots=True)
class Sent:
    """What was sent, and which of it was acknowledged."""

    sent: int = 0
    acknowledged: list[Planned] = field(default_factory=list)
    retries: int = 0


@dataclass(slots=True)
class Stage:
    """Seconds and items of one stage."""

    name: str
    items: int
    seconds: float

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.items / self.seconds if self.seconds > 0 else 0.0


def run_demo(
    events: int, seed: int, show: Show, *, on_done: Callable[[Stack, Proof], None] | None = None
) -> Proof:
    """Run everything in a directory of its own, which is removed afterwards.

    Raises:
        EmbeddedError: a server did not start.
        TimeoutError: the pipeline did not become quiet.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tidemeter-demo-") as directory:
        root = Path(directory)
        _stand_alone(root)
        stack = Stack(root, load_settings())
        stack.start(lambda text: show("start", {"text": text}))
        try:
            ours = load_settings(
                kafka_bootstrap=stack.kafka_bootstrap,
                postgres_dsn=stack.postgres_dsn,
                stripe_api_base=stack.stripe_base,
                stripe_api_key=SIMULATOR_KEY,
            )
            key = _configure(ours)
            planned = plan(events, seed, int(time.time()))
            sent, stages = _play(stack, ours, key, planned, show)
            proof = prove(ours, sent.sent, expect(sent.acknowledged), len(sent.acknowledged))
            proof.seconds = time.monotonic() - started
            proof.stages = [(stage.name, stage.items, stage.seconds, stage.rate) for stage in stages]
            proof.kills = 1
            if on_done is not None:
                on_done(stack, proof)
            return proof
        finally:
            stack.stop()


def _stand_alone(root: Path) -> None:
    """Forget every address this process was given: the demo touches nothing but its own servers."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        if name not in KEPT_VARIABLES:
            del os.environ[name]
    os.environ[f"{PREFIX}DATA_DIR"] = str(root)
    os.environ[f"{PREFIX}STRIPE_RATE_PER_SECOND"] = STRIPE_RATE
    os.environ[f"{PREFIX}DELTA_INTERVAL_SECONDS"] = "2"


def _configure(settings: Settings) -> str:
    """Tenants, meters, customers (in Stripe too), and an operator's API key."""
    lines = ["tenants:"]
    for tenant, timezone in TENANTS.items():
        lines += [f"  - id: {tenant}", f"    timezone: {timezone}", "    meters:"]
        for slug, (aggregation, scale, _) in METERS.items():
            lines += [
                f"      - {{slug: {slug}, aggregation: {aggregation}, scale: {scale}, lateness: 48h,",
                f"         stripe: {{event_name: {tenant}.{slug}}}}}",
            ]
        lines += ["    customers:"] + [f"      - {{ref: {ref}}}" for ref in customers(tenant)]
    document = create_in_stripe(parse_document("\n".join(lines)), settings, {})
    key = generate_key()
    with psycopg.connect(settings.postgres(), autocommit=True) as db:
        apply_document(db, document)
        db.execute(
            "INSERT INTO api_keys (key_id, secret_sha256, scopes, label) VALUES (%s, %s, %s, 'demo')",
            (key.key_id, key.secret_sha256, ["admin", "ingest"]),
        )
    return key.text


def _play(
    stack: Stack, settings: Settings, key: str, planned: Sequence[Planned], show: Show
) -> tuple[Sent, list[Stage]]:
    sent = Sent()
    stop = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(stack, settings, sent, len(planned), stop, show), daemon=True
    )
    watcher.start()
    try:
        began = time.monotonic()
        half = len(planned) // 2
        _send(stack, settings, key, planned[:half], sent)
        _wait(settings, lambda now: now["records"] >= half // 3, "the first third counted")
        show("kill", {"text": "SIGKILL to the counters worker"})
        stack.kill("counters-1")
        _send(stack, settings, key, planned[half:], sent)
        send_seconds = time.monotonic() - began
        stack.revive("counters-1")
        drained = _drain(settings, len(sent.acknowledged))
        quiet = _wait(settings, _is_quiet, "every delta settled")
        stages = [
            Stage("send", len(sent.acknowledged), send_seconds),
            drained,
            Stage("push", collect(settings)["deltas"]["reported"]["count"], quiet - began),
        ]
        return sent, stages
    finally:
        stop.set()
        watcher.join(timeout=10)


def _drain(settings: Settings, records: int) -> Stage:
    """The backlog that built up while the worker was down: rate from its first chunk to its last.

    The first chunk itself is not in the rate: when it is seen, it is done.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    with psycopg.connect(settings.postgres(), autocommit=True) as db:
        before = start = conservation(db).records
        first = last = time.monotonic()
        while time.monotonic() < deadline:
            now = conservation(db).records
            if start == before and now > before:
                start, first = now, time.monotonic()
            if now >= records:
                last = time.monotonic()
                return Stage("count", records - start, max(last - first, 0.001))
            time.sleep(0.01)
    raise TimeoutError(f"waited {QUIET_TIMEOUT_S:.0f} s for every record to be counted")


def _is_quiet(now: dict[str, Any]) -> bool:
    deltas, waiting = now["deltas"], now["waiting"]
    open_states = sum(deltas[state]["count"] for state in ("pending", "in_flight", "in_doubt"))
    return (
        not any(now["lag"].values())
        and not open_states
        and not waiting["outbox"]
        and not waiting["deltas_without_intent"]
        and not waiting["items_to_close"]
    )


def _wait(settings: Settings, done: Callable[[dict[str, Any]], bool], what: str) -> float:
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while time.monotonic() < deadline:
        if done(collect(settings)):
            return time.monotonic()
        time.sleep(0.2)
    raise TimeoutError(f"waited {QUIET_TIMEOUT_S:.0f} s for: {what}")


def _watch(
    stack: Stack, settings: Settings, sent: Sent, planned: int, stop: threading.Event, show: Show
) -> None:
    while not stop.wait(1.0):
        stack.supervise()
        try:
            now = collect(settings)
        except Exception as error:
            log.warning("status not available", error=error)
            continue
        show(
            "progress", {**now, "planned": planned, "sent": sent.sent, "acknowledged": len(sent.acknowledged)}
        )


# -- Senders ---------------------------------------------------------------------------------------------


def _send(stack: Stack, settings: Settings, key: str, planned: Sequence[Planned], sent: Sent) -> None:
    """Send in order, in batches: each path in a way that users have."""
    with (
        httpx.Client(
            base_url=stack.member("ingest").base_url, headers={"Authorization": f"Bearer {key}"}, timeout=30
        ) as api,
        UsageProducer(settings.kafka()) as producer,
    ):
        old_releases = _OldReleases(settings.kafka())
        waiting = deque(planned)
        while waiting:
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            sent.sent += len(batch)
            _send_by_api(api, [one for one in batch if one.path == "api"], sent)
            direct = [(one, producer.send(_event(one))) for one in batch if one.path == "producer"]
            old_releases.send([one for one in batch if one.path in ("v1", "v2", "raw")])
            producer.flush()
            sent.acknowledged.extend(one for one, _ in direct)
            sent.acknowledged.extend(one for one in batch if one.path in ("v1", "v2", "raw"))


def _event(one: Planned) -> UsageEvent:
    return UsageEvent(
        tenant_id=one.tenant,
        customer_ref=one.customer,
        meter=one.meter,
        quantity=one.quantity,
        idempotency_key=one.key,
        occurred_at=datetime.fromtimestamp(one.occurred_s, UTC),
        properties=one.properties,
    )


def _send_by_api(api: httpx.Client, batch: list[Planned], sent: Sent) -> None:
    """POST, and repeat what was not acknowledged, as a client would."""
    while batch:
        body = {
            "events": [
                {
                    "tenantId": one.tenant,
                    "metric": one.meter,
                    "customerRef": one.customer,
                    "quantity": str(one.quantity),
                    "ts": datetime.fromtimestamp(one.occurred_s, UTC).isoformat(),
                    "idempotencyKey": one.key,
                    "meta": one.properties,
                }
                for one in batch
            ]
        }
        results = api.post("/v1/events/ingest", json=body).json().get("results", [])
        states = [result["status"] for result in results] or ["unavailable"] * len(batch)
        sent.acknowledged.extend(one for one, state in zip(batch, states, strict=True) if state == "accepted")
        batch = [one for one, state in zip(batch, states, strict=True) if state == "unavailable"]
        sent.retries += len(batch)


class _OldReleases:
    """Writes usage_event v1 and v2 as producers of those releases do, and what no release ever wrote."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = Producer(producer_config(bootstrap))
        self._encoders = {version: Encoder(released()["usage_event", version]) for version in (1, 2)}

    def send(self, batch: Iterable[Planned]) -> None:
        failures: list[Any] = []
        for one in batch:
            version, value = self._value(one)
            key = record_key(one.tenant, one.customer, one.meter) if one.tenant else None
            self._producer.produce(
                USAGE_TOPICS[version],
                key=key,
                value=value,
                on_delivery=lambda error, _: failures.append(error) if error else None,
            )
        left = self._producer.flush(30)
        if left or failures:
            raise TimeoutError(f"Kafka did not acknowledge {left or len(failures)} records of older releases")

    def _value(self, one: Planned) -> tuple[int, bytes]:
        if one.path == "raw":
            return 3, one.raw
        if one.path == "v2":
            millionths = int(one.quantity * 1_000_000)
            record: dict[str, Any] = {
                "event_id": one.key,
                "tenant": one.tenant,
                "customer": one.customer,
                "metric": one.meter,
                "quantity": millionths.to_bytes(16, "big", signed=True),
                "used_at": one.occurred_s * 1_000_000,
                "attributes": one.properties,
            }
            return 2, self._encoders[2].encode(record)
        record = {
            "event_id": one.key,
            "customer": f"{one.tenant}/{one.customer}",
            "metric": one.meter,
            "value": float(one.quantity),
            "timestamp": one.occurred_s,
            "tags": [f"{name}={text}" for name, text in one.properties.items()],
        }
        return 1, self._encoders[1].encode(record)
