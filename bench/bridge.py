"""The webhook bridge: how many signed webhooks a second one core puts on Kafka, and how long an answer takes.

The bridge runs in a process of its own, kept on one core; this process sends, on the others, bodies of
3.5 KB, each signed for itself, over real HTTP to a real Kafka. The load is open loop, see
:mod:`bench.bridge_load`. Two variants run in turn: the product (``bridge``), which answers webhooks in front
of its framework, and the same by way of that framework, Litestar (``litestar``).

``per_second``            webhooks answered at the fixed rate, of which ``p50_ms`` and ``p99_ms``
``core``                  share of its core that the bridge used at that rate
``core_waited``           share of the time in which its threads could have run and others had the core:
                          above a few per cent, the times above are the machine's and not the bridge's
``per_core_second``       webhooks for each second of processor time, which a busy machine distorts least
``ceiling_per_second``    closed loop, 128 at a time: the most it can do
``generator_core``        share of a core that the sender used at the fixed rate
``bad_signatures``        p99 of good webhooks at a quarter of the rate, alone and with 10,000 bad ones beside
                          them, in turn; the medians of the rounds

``checked``: after that, every webhook that was answered with 200 is on the topic, byte for byte, none was
answered otherwise, and nothing is there that was not sent and signed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from confluent_kafka import Consumer, TopicPartition
from litestar import Litestar
from rich.table import Column, Table

from bench.bridge_load import Load, Outcome, Sender, body_of, event_id
from bench.processes import ContestantFailed
from bench.product import own_topics, topic_names
from bench.results import versions
from bench.servers import Servers
from schemas.catalog import current
from services.bridge.app import create_app
from services.bridge.endpoints import Endpoints
from services.web.publishing import KafkaPublisher
from services.wire.codec import Decoder, Encoder
from services.wire.log import configure_logging
from services.wire.settings import Settings
from services.wire.topics import STRIPE_WEBHOOKS

KEY = "bridge"
EVENTS = 40_000
RATE = 2_000.0
ROUNDS = 3
PARTITIONS = 4
VARIANTS = ("bridge", "litestar")
BAD_SIGNATURES = 10_000
WARM_UP = 5_000


@dataclass(slots=True)
class Numbers:
    """Numbers of webhooks that nobody used before."""

    next: int = 0

    def take(self, count: int) -> range:
        first, self.next = self.next, self.next + count
        return range(first, self.next)


def run(
    servers: Servers,
    *,
    events: int | None = None,
    rounds: int | None = None,
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Send ``events`` webhooks to each variant at the fixed rate, in ``rounds`` parts, and more beside."""
    del seed  # nothing is left to chance
    events, rounds = events or EVENTS, rounds or ROUNDS
    numbers, accepted, errors = Numbers(), set[int](), 0
    result: dict[str, Any] = {"events": events, "rate": RATE, "rounds": rounds}
    cores = sorted(os.sched_getaffinity(0))
    with own_topics(servers, partitions=PARTITIONS) as usage:
        topic = topic_names(usage)[STRIPE_WEBHOOKS]
        try:
            loads: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
            for _ in range(rounds):
                for variant in VARIANTS:
                    with _bridge(variant, servers.bootstrap, topic, cores) as running:
                        load, outcomes = _measure(running, numbers, max(events // rounds, 1))
                    loads[variant].append(load)
                    accepted.update(*(outcome.accepted for outcome in outcomes))
                    errors += sum(outcome.errors for outcome in outcomes)
                    say(f"{variant}: {json.dumps(load)}")
            for variant, measured in loads.items():
                names = measured[0]
                result[variant] = {
                    name: round(statistics.median(one[name] for one in measured), 2) for name in names
                }
            with _bridge("bridge", servers.bootstrap, topic, cores) as running:
                result["bad_signatures"], outcomes = _beside_bad_ones(running, numbers, rounds)
            accepted.update(*(outcome.accepted for outcome in outcomes))
            errors += sum(outcome.errors for outcome in outcomes)
        finally:
            os.sched_setaffinity(0, cores)
        on_topic = _on_topic(servers.bootstrap, topic, accepted, numbers.next)
    result |= {"answered_200": len(accepted), "errors": errors, **on_topic}
    checked = errors == 0 and not on_topic["missing"] and not on_topic["wrong"]
    return {**result, "checked": checked, "versions": versions(), "cpu": os.cpu_count()}


def render(result: dict[str, Any]) -> Table:
    """The result as a table."""
    table = Table(
        "bridge, one core",
        *(
            Column(name, justify="right")
            for name in (
                "webhooks/s",
                "p50 ms",
                "p99 ms",
                "core",
                "waited",
                "per core s",
                "ceiling/s",
                "generator",
            )
        ),
        box=None,
    )
    for variant in VARIANTS:
        one = result[variant]
        table.add_row(
            variant,
            f"{one['per_second']:,.0f}",
            f"{one['p50_ms']:.1f}",
            f"{one['p99_ms']:.1f}",
            f"{one['core']:.0%}",
            f"{one['core_waited']:.0%}",
            f"{one['per_core_second']:,.0f}",
            f"{one['ceiling_per_second']:,.0f}",
            f"{one['generator_core']:.0%}",
        )
    bad = result["bad_signatures"]
    table.caption = (
        f"good ones beside {bad['bad']:,} bad signatures: p99 {bad['p99_with_ms']:.1f} ms, without them "
        f"{bad['p99_without_ms']:.1f} ms\n"
        f"{result['answered_200']:,} answered 200, {result['errors']} errors; "
        f"{result['records']:,} on the topic, {result['missing']} missing, {result['wrong']} wrong"
    )
    return table


# -- Measuring -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """A bridge and who sends to it."""

    pid: int
    sender: Sender
    port: int

    def core_s(self) -> tuple[float, float]:
        """Seconds that its threads ran, and that they waited for the core."""
        ran_ns = waited_ns = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            ran, waited, _ = (task / "schedstat").read_text().split()
            ran_ns, waited_ns = ran_ns + int(ran), waited_ns + int(waited)
        return ran_ns / 1e9, waited_ns / 1e9


def _measure(running: Running, numbers: Numbers, events: int) -> tuple[dict[str, float], list[Outcome]]:
    async def drive() -> tuple[dict[str, float], list[Outcome]]:
        load = Load(running.sender, running.port)
        warm = await load.run(numbers.take(WARM_UP), 0)
        before = running.core_s()
        fixed = await load.run(numbers.take(events), RATE)
        ran_s, waited_s = (after - earlier for after, earlier in zip(running.core_s(), before, strict=True))
        ceiling = await load.run(numbers.take(events), 0)
        await load.close()
        measured = {
            "per_second": round(len(fixed.accepted) / fixed.seconds),
            "p50_ms": round(fixed.percentile_ms(0.5), 2),
            "p99_ms": round(fixed.percentile_ms(0.99), 2),
            "core": round(ran_s / fixed.seconds, 3),
            "core_waited": round(waited_s / fixed.seconds, 3),
            "per_core_second": round(len(fixed.accepted) / ran_s),
            "ceiling_per_second": round(len(ceiling.accepted) / ceiling.seconds),
            "generator_core": round(fixed.cpu_seconds / fixed.seconds, 3),
        }
        return measured, [warm, fixed, ceiling]

    return uvloop.run(drive())


def _beside_bad_ones(
    running: Running, numbers: Numbers, rounds: int
) -> tuple[dict[str, float], list[Outcome]]:
    good = BAD_SIGNATURES // rounds

    async def drive() -> tuple[dict[str, float], list[Outcome]]:
        load = Load(running.sender, running.port)
        outcomes = [await load.run(numbers.take(WARM_UP), 0)]
        p99s: dict[float, list[float]] = {0.0: [], 1.0: []}
        for _ in range(rounds):
            for bad_share, found in p99s.items():
                outcome = await load.run(numbers.take(good), RATE / 4, bad_share=bad_share)
                found.append(outcome.percentile_ms(0.99))
                outcomes.append(outcome)
        await load.close()
        without, beside = (statistics.median(found) for found in p99s.values())
        return {
            "bad": sum(outcome.refused for outcome in outcomes),
            "p99_without_ms": round(without, 2),
            "p99_with_ms": round(beside, 2),
            "raised": round(beside / without - 1, 3),
        }, outcomes

    return uvloop.run(drive())


def _on_topic(bootstrap: str, topic: str, accepted: set[int], sent: int) -> dict[str, int]:
    """What the topic holds, compared with what was answered: records, missing ones, wrong ones."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"{topic}-check", "log_level": 0})
    decode, seen, records, wrong = Decoder().decode, set[int](), 0, 0
    try:
        left = {}
        for partition in range(PARTITIONS):
            _, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)
            if end:
                left[partition] = end
        consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
        while left:
            messages = consumer.consume(2000, timeout=30)
            if not messages:
                raise ContestantFailed(f"{topic} cannot be read to its end")
            for message in messages:
                record = decode(message.value() or b"")[1]
                number = int(record["event_id"].removeprefix("evt_"))
                is_ours = number < sent and event_id(number) == record["event_id"]
                wrong += not (is_ours and record["body"] == body_of(number))
                records += 1
                seen.add(number)
                if message.offset() + 1 >= left.get(message.partition(), -1):
                    left.pop(message.partition(), None)
    finally:
        consumer.close()
    return {"records": records, "missing": len(accepted - seen), "wrong": wrong}


# -- The bridge in its process ---------------------------------------------------------------------------


@contextmanager
def _bridge(variant: str, bootstrap: str, topic: str, cores: Sequence[int]) -> Iterator[Running]:
    """The variant, on the first of our cores; this process moves to the others."""
    sender = Sender("127.0.0.1")
    job = {
        "variant": variant,
        "bootstrap": bootstrap,
        "topic": topic,
        "secret": sender.secret,
        "core": cores[0],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.bridge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        port = process.stdout.readline().strip()
        if not port:
            raise ContestantFailed(f"the {variant} did not start")
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        yield Running(process.pid, sender, int(port))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def _serve(job: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {job["core"]})
    configure_logging("warning")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    encoder = Encoder(current("stripe_webhook"))
    publisher = KafkaPublisher(job["bootstrap"], job["topic"], encoder.headers, ack_timeout_s=8.0)
    endpoints = Endpoints(f"bench={job['secret']}")
    app = create_app(Settings.model_construct(), publisher=publisher, endpoints=endpoints)

    async def lengthen(_: Litestar) -> None:
        app.shortcut = None

    if job["variant"] == "litestar":
        app.on_startup.append(lengthen)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print(self.servers[0].sockets[0].getsockname()[1], flush=True)

    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, server_header=False, lifespan="on"
    )
    Server(config).run()


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _serve(json.loads(sys.stdin.readline()))
