"""A real counters pipeline for tests: topics, a database, worker processes, and the questions tests ask.

Every worker is a process of its own, is killed by its pid whatever happens, and leaves its log behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from tests.oracle import HOUR_S, Item, Logged, Meter, Truth, Usage, truth, unframe

GROUP = "tidemeter-counters"
USAGE = ("usage.v1", "usage.v2", "usage.v3")
PARKED = ("dead_letters.v1", "upcast_failures.v1")
TOPICS = (*USAGE, *PARKED, "conflicts.v1", "adjustments.v1", "deltas.v1", "ops.v1")
OUTCOMES = ("counted", "duplicate", "conflict", "late_counted", "adjusted", "dead_lettered", "upcast_failed")
ROOT = Path(__file__).parent.parent
SESSION_TIMEOUT_S = 3

Coordinates = tuple[str, int, int]


@dataclass(frozen=True)
class Read:
    """A record as a plain consumer sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    headers: dict[str, bytes | None]


@dataclass
class Worker:
    """One counters process. ``start`` may be called again after it ended."""

    name: str
    environment: dict[str, str]
    log_file: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, **extra: str) -> Worker:
        assert self.process is None or self.process.poll() is not None, f"{self.name} still runs"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        variables = {**self.environment, "OBSERVE_PORT": str(self.port), **extra}
        named = {f"TIDEMETER_{name}": text for name, text in variables.items()}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **named}, cwd=ROOT, stdout=log, stderr=log
            )
        return self

    def send(self, number: signal.Signals) -> None:
        """Signal this very process, if it still lives."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait(10)

    def stop(self, timeout_s: float = 20) -> int:
        """SIGTERM, and the exit status."""
        self.send(signal.SIGTERM)
        return self.ended(timeout_s)

    def ended(self, timeout_s: float = 30) -> int:
        """Wait until it ends by itself; the exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs\n{self.log()[-3000:]}") from None

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """What it wrote, but for what librdkafka says about connections."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line for line in lines if line[:1] != "%")

    def health(self) -> dict[str, Any]:
        """What /health/ready says; the status is ``down`` when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=3) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))
        except OSError:
            return {"status": "down", "checks": {}}

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics by its text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=3) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def await_healthy(self, timeout_s: float = 60) -> Worker:
        def healthy() -> bool:
            assert self.alive(), f"{self.name} ended\n{self.log()[-3000:]}"
            return bool(self.health()["status"] == "healthy")

        until(healthy, f"{self.name} healthy", timeout_s, lambda: f"{self.health()}\n{self.log()[-3000:]}")
        return self


@dataclass
class Pipeline:
    """Topics, one database, and the workers of one test."""

    kafka: str
    dsn: str
    directory: Path
    meters: dict[tuple[str, str], Meter] = field(default_factory=dict)
    log: list[Logged] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    # -- Set-up --------------------------------------------------------------------------------------

    def tenant(self, tenant: str, timezone: str = "UTC") -> None:
        with self.database() as db:
            db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s)", (tenant, timezone))

    def meter(self, tenant: str, slug: str, aggregation: str = "sum", lateness_s: int = 172_800) -> None:
        with self.database() as db:
            db.execute(
                "INSERT INTO meters (tenant_id, meter, aggregation, lateness_seconds, event_name) "
                "VALUES (%s, %s, %s, %s, %s)",
                (tenant, slug, aggregation, lateness_s, f"{tenant}.{slug}"),
            )
        self.meters[tenant, slug] = Meter(aggregation, lateness_s)

    def worker(self, name: str | None = "w1", command: Sequence[str] | None = None, **extra: str) -> Worker:
        """A worker, not yet started. Without a name it is a dynamic member of its group."""
        environment = {
            "KAFKA_BOOTSTRAP": self.kafka,
            "POSTGRES_DSN": self.dsn,
            "DATA_DIR": str(self.directory),
            "LOG_FORMAT": "json",
            "SESSION_TIMEOUT_SECONDS": str(SESSION_TIMEOUT_S),
            "DELTA_INTERVAL_SECONDS": "0.2",
            **({"WORKER_ID": name} if name else {}),
            **extra,
        }
        name = name or f"dynamic-{len(self.workers)}"
        command = list(command or [sys.executable, "-m", "services.cli.main", "counters"])
        worker = Worker(name, environment, self.directory / f"{name}.log", command)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        """End every worker: politely, so that dynamic members leave their group; then by SIGKILL."""
        for worker in self.workers:
            if worker.alive():
                worker.send(signal.SIGCONT)
                worker.send(signal.SIGTERM)
        deadline = time.monotonic() + 8
        for worker in self.workers:
            if worker.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.1, deadline - time.monotonic()))
                worker.kill()

    # -- Sending -------------------------------------------------------------------------------------

    def send(self, *usages: Usage) -> list[Coordinates]:
        """Produce in order, wait for every acknowledgement, and remember what the log now holds."""
        return self.send_raw([(one.topic, one.record_key(), one.value(), [], one) for one in usages])

    def send_raw(
        self, records: Iterable[tuple[str, bytes | None, bytes | None, Sequence[Any], Usage | None]]
    ) -> list[Coordinates]:
        """Like ``send``, for (topic, key, value, headers, usage it stands for)."""
        producer = Producer(
            {"bootstrap.servers": self.kafka, "enable.idempotence": True, "partitioner": "murmur2_random"}
            | {"linger.ms": 5, "message.max.bytes": 20_000_000, "compression.type": "lz4"}
        )
        written: list[Logged | None] = []

        def note(place: int, usage: Usage | None) -> Callable[[Any, Any], None]:
            def delivered(error: Any, message: Any) -> None:
                assert error is None, error
                written[place] = Logged(message.topic(), message.partition(), message.offset(), usage)

            return delivered

        for topic, key, value, headers, usage in records:
            while True:
                try:
                    written.append(None)
                    producer.produce(
                        topic,
                        key=key,
                        value=value,
                        headers=list(headers),
                        on_delivery=note(len(written) - 1, usage),
                    )
                    break
                except BufferError:
                    written.pop()
                    producer.poll(0.1)
        assert producer.flush(60) == 0, "Kafka did not acknowledge"
        done = [one for one in written if one is not None]
        assert len(done) == len(written), "Kafka did not acknowledge"
        self.log += done
        return [(one.topic, one.partition, one.offset) for one in done]

    # -- Kafka's own numbers -------------------------------------------------------------------------

    @cached_property
    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.kafka})

    def log_bounds(self, topics: Sequence[str] = USAGE) -> tuple[dict[Any, int], dict[Any, int]]:
        """First and next offset by (topic, partition), as the broker says."""
        return log_bounds(self.admin, topics)

    def committed(self) -> dict[tuple[str, int], int]:
        """What the group has committed, as the broker says."""
        return committed(self.admin)

    def lag(self) -> dict[tuple[str, int], int]:
        """Records between the group's committed offset and the end of each usage partition."""
        starts, ends = self.log_bounds()
        stands = self.committed()
        return {tp: end - max(stands.get(tp, 0), starts[tp]) for tp, end in ends.items()}

    def read(self, topic: str) -> list[Read]:
        """Every record of a topic."""
        starts, ends = self.log_bounds([topic])
        consumer = Consumer(
            {"bootstrap.servers": self.kafka, "group.id": "tests-reader", "enable.auto.commit": False}
        )
        try:
            wanted = {tp: end for tp, end in ends.items() if end > starts[tp]}
            consumer.assign([TopicPartition(*tp, starts[tp]) for tp in wanted])
            found: list[Read] = []
            deadline = time.monotonic() + 30
            while wanted and time.monotonic() < deadline:
                for message in consumer.consume(1000, 0.2):
                    assert message.error() is None, message.error()
                    tp = (message.topic(), message.partition())
                    found.append(
                        Read(
                            *tp,
                            message.offset(),
                            message.key(),
                            message.value() or b"",
                            dict(message.headers() or []),
                        )
                    )
                    if tp in wanted and message.offset() + 1 >= wanted[tp]:
                        del wanted[tp]
            assert not wanted, f"could not read {wanted}"
            return found
        finally:
            consumer.close()

    def ops(self, name: str) -> list[dict[str, Any]]:
        """Ops events of one name, each id once."""
        found = [unframe("ops_event", 1, one.value) for one in self.read("ops.v1")]
        return list({one["ops_event_id"]: one for one in found if one["name"] == name}.values())

    # -- PostgreSQL ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def database(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.dsn, autocommit=True) as db:
            yield db

    def query(self, text: str, *arguments: Any) -> list[Any]:
        with self.database() as db:
            return db.execute(text, arguments).fetchall()

    def processed(self) -> int:
        """Records that the counters went past."""
        return int(
            self.query(
                "SELECT coalesce(sum(next_offset - start_offset), 0) FROM partition_offsets "
                "WHERE consumer = %s",
                GROUP,
            )[0][0]
        )

    def hours(self) -> dict[tuple[Item, int], Decimal]:
        """Counters by item and hour, as stored."""
        return {
            ((row[0], row[1], row[2]), int(row[3])): row[4]
            for row in self.query(
                "SELECT i.tenant_id, i.customer_ref, i.meter, extract(epoch FROM b.hour_start), sum(b.total) "
                "FROM buckets b JOIN items i USING (item_id) GROUP BY 1, 2, 3, 4"
            )
        }

    def total(self, item: Item) -> Decimal:
        """An item's counter; 0 when it has none."""
        return sum((total for (name, _), total in self.hours().items() if name == item), Decimal(0))

    def outcomes(self, tenant: str | None = None) -> Counter[str]:
        columns = ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in OUTCOMES)
        row = self.query(
            f"SELECT {columns} FROM partition_accounts WHERE %s::text IS NULL OR tenant_id = %s",
            tenant,
            tenant,
        )[0]
        return Counter({name: number for name, number in zip(OUTCOMES, row, strict=True) if number})

    # -- Waiting and proving -------------------------------------------------------------------------

    def await_quiet(self, timeout_s: float = 60) -> None:
        """Wait until the group has committed every usage record and nothing waits to leave."""

        def quiet() -> bool:
            for worker in self.workers:
                if worker.process is not None and worker.process.poll() not in (None, 0, -9, -15):
                    raise AssertionError(f"{worker.name} ended by itself\n{worker.log()[-3000:]}")
            try:
                return not any(self.lag().values()) and not self.query("SELECT 1 FROM outbox LIMIT 1")
            except (KafkaException, psycopg.OperationalError):  # a server that has just come back
                self.__dict__.pop("admin", None)  # librdkafka keeps asking the coordinator it lost
                return False

        until(quiet, "lag 0 and an empty outbox", timeout_s, self.why_not_quiet)

    def why_not_quiet(self) -> str:
        lag = {tp: number for tp, number in self.lag().items() if number}
        positions = self.query("SELECT topic, partition, next_offset, halted FROM partition_offsets")
        logs = "\n".join(
            f"{worker.name} {worker.health()}\n{worker.log()[-2000:]}" for worker in self.workers
        )
        outbox = self.query("SELECT count(*) FROM outbox")[0][0]
        return f"lag {lag}\npositions {positions}\noutbox {outbox}\n{logs}"

    def settle_deltas(self, timeout_s: float = 30) -> None:
        """Stand in for the pusher until every counter is in deltas: what is open was reported."""

        def settled() -> bool:
            with self.database() as db:
                db.execute("UPDATE item_periods SET open_deltas = 0 WHERE open_deltas > 0")
            return not self.query("SELECT 1 FROM items WHERE dirty_from IS NOT NULL LIMIT 1")

        until(settled, "every difference closed", timeout_s)
        self.await_quiet(timeout_s)

    def assert_exact(self) -> Truth:
        """Counters, outcomes, positions and group offsets are what the log says, exactly."""
        expected = truth(self.log, self.meters)
        assert differences(self.hours(), expected.hours) == {}
        assert self.outcomes() == expected.outcomes
        assert self.processed() == len(self.log) == sum(expected.outcomes.values())
        assert not any(self.lag().values())
        positions = {
            (row[0], row[1]): row[2]
            for row in self.query("SELECT topic, partition, next_offset FROM partition_offsets")
        }
        assert positions == self.log_bounds()[1]
        watermarks = {
            (row[0], row[1], row[2]): int(row[3])
            for row in self.query(
                "SELECT tenant_id, customer_ref, meter, extract(epoch FROM watermark) FROM items"
            )
        }
        assert watermarks == expected.watermarks
        self._assert_parked(expected)
        return expected

    def _assert_parked(self, expected: Truth) -> None:
        """Each parked record, conflict and adjustment is on its topic, once by its identity."""
        parked = {topic: {one.key for one in self.read(topic)} for topic in PARKED}
        wanted: dict[str, set[bytes]] = {topic: set() for topic in PARKED}
        for one in self.log:
            place = json.dumps([one.topic, one.partition, one.offset], separators=(",", ":")).encode()
            if one.sent is None:
                wanted["upcast_failures.v1"].add(place)
            elif (one.sent.tenant, one.sent.meter) not in self.meters:
                wanted["dead_letters.v1"].add(place)
        assert parked == wanted
        conflicts = {
            (one["second_topic"], one["second_partition"], one["second_offset"])
            for one in (unframe("conflict", 1, one.value) for one in self.read("conflicts.v1"))
        }
        assert len(conflicts) == expected.outcomes["conflict"]
        adjustments = {
            one["adjustment_id"]: one
            for one in (unframe("adjustment", 1, one.value) for one in self.read("adjustments.v1"))
        }
        by_item: dict[Item, Decimal] = {}
        for one in adjustments.values():
            item = (one["tenant_id"], one["customer_ref"], one["meter"])
            by_item[item] = by_item.get(item, Decimal(0)) + one["quantity"]
        assert by_item == expected.adjustments
        assert len(adjustments) == expected.outcomes["adjusted"]

    def assert_deltas_add_up(self) -> None:
        """After ``settle_deltas``: deltas, in the table and on the topic, sum to the counters."""
        stored = {row[0]: row[1] for row in self.query("SELECT identifier, amount FROM deltas")}
        by_hour: dict[tuple[Item, int], Decimal] = {}
        on_topic: dict[str, Decimal] = {}
        for one in self.read("deltas.v1"):
            delta = unframe("usage_delta", 1, one.value)
            assert on_topic.setdefault(delta["identifier"], delta["amount"]) == delta["amount"]
        assert on_topic == stored
        for row in self.query(
            "SELECT i.tenant_id, i.customer_ref, i.meter, extract(epoch FROM d.hour_start), sum(d.amount) "
            "FROM deltas d JOIN items i USING (item_id) GROUP BY 1, 2, 3, 4"
        ):
            by_hour[(row[0], row[1], row[2]), int(row[3])] = row[4]
        assert differences(by_hour, self.hours()) == {}


def differences(left: Mapping[Any, Decimal], right: Mapping[Any, Decimal]) -> dict[Any, tuple[Any, Any]]:
    """Keys whose values differ, with both; a missing one is 0."""
    zero = Decimal(0)
    return {
        key: (left.get(key, zero), right.get(key, zero))
        for key in left.keys() | right.keys()
        if left.get(key, zero) != right.get(key, zero)
    }


def until(
    true: Callable[[], bool], what: str, timeout_s: float = 30, explain: Callable[[], str] = str
) -> float:
    """Poll until ``true``; seconds that it took."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"waited {timeout_s:.0f} s for: {what}\n{explain()[-6000:]}")
        time.sleep(0.05)
    return time.monotonic() - began


def log_bounds(admin: AdminClient, topics: Sequence[str]) -> tuple[dict[Any, int], dict[Any, int]]:
    """First and next offset of every partition of ``topics``."""
    known = admin.list_topics(timeout=10).topics
    parts = [(topic, number) for topic in topics for number in known[topic].partitions]

    def offsets(spec: Any) -> dict[Any, int]:
        asked = admin.list_offsets({TopicPartition(*tp): spec for tp in parts}, request_timeout=10)
        return {(tp.topic, tp.partition): future.result().offset for tp, future in asked.items()}

    return offsets(OffsetSpec.earliest()), offsets(OffsetSpec.latest())


def committed(admin: AdminClient) -> dict[tuple[str, int], int]:
    """Committed offsets of the counters group."""
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(GROUP)])
    result = asked[GROUP].result()
    return {(tp.topic, tp.partition): tp.offset for tp in result.topic_partitions if tp.offset >= 0}


def commit_for_group(admin: AdminClient, offsets: Mapping[tuple[str, int], int]) -> None:
    """Set the group's committed offsets, as an operator would. The group must have no members."""
    parts = [TopicPartition(*tp, offset) for tp, offset in offsets.items()]
    asked = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(GROUP, parts)])
    assert all(tp.error is None for tp in asked[GROUP].result().topic_partitions)


def await_no_members(admin: AdminClient, timeout_s: float = 30, but: str = "") -> None:
    """Wait until the group's last dead member has run out of its session; ``but`` may stay."""

    def empty() -> bool:
        try:
            members = admin.describe_consumer_groups([GROUP])[GROUP].result().members
        except KafkaException:
            return True
        return all(member.group_instance_id == f"{GROUP}-{but}" for member in members)

    until(empty, "a group without members", timeout_s)


def trim_topics(kafka: str) -> None:
    """Drop every record of the product's topics, so that a log begins where the last test ended."""
    admin = AdminClient({"bootstrap.servers": kafka})
    await_no_members(admin, but="w1")
    starts, ends = log_bounds(admin, TOPICS)
    full = [TopicPartition(*tp, end) for tp, end in ends.items() if end > starts[tp]]
    for future in admin.delete_records(full).values() if full else ():
        future.result()


def hour_of(occurred_s: int) -> int:
    """Start of the hour."""
    return occurred_s // HOUR_S * HOUR_S
