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

from tests.oracle import HOUR_S, Bucket, Item, Logged, Meter, Truth, Usage, period_of, truth, unframe

GROUP = "tidemeter-counters"
USAGE = ("usage.v1", "usage.v2", "usage.v3")
PARKED = {"dead_lettered": "dead_letters.v1", "upcast_failed": "upcast_failures.v1"}
KINDS = {"dead_lettered": "dead_letter", "upcast_failed": "upcast_failure"}
TOPICS = (*USAGE, *PARKED.values(), "conflicts.v1", "adjustments.v1", "deltas.v1", "ops.v1")
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
    #: By (tenant,) or (tenant, customer).
    calendars: dict[tuple[str, ...], str] = field(default_factory=dict)
    #: Every calendar that a customer had, where it changed.
    calendars_were: list[tuple[tuple[str, str], str]] = field(default_factory=list)
    #: Adjustments that were approved, by (tenant, idempotency key).
    approved: set[tuple[str, str]] = field(default_factory=set)
    log: list[Logged] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    # -- Set-up --------------------------------------------------------------------------------------

    def tenant(self, tenant: str, timezone: str = "UTC") -> None:
        with self.database() as db:
            db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s)", (tenant, timezone))
        self.calendars[tenant,] = f"1 month {timezone}"

    def customer(self, tenant: str, customer: str, calendar: str) -> None:
        """A customer with billing periods of its own. Others need no row: their reference is a Stripe id."""
        with self.database() as db:
            db.execute(
                "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) "
                "VALUES (%s, %s, %s, %s)",
                (tenant, customer, customer, calendar),
            )
        self.calendars[tenant, customer] = calendar

    def change_calendar(self, tenant: str, customer: str, calendar: str) -> None:
        """Give a customer other periods, whose edges must not cut an hour that has usage."""
        self.query(
            "UPDATE customers SET calendar = %s WHERE (tenant_id, customer_ref) = (%s, %s) RETURNING 1",
            calendar,
            tenant,
            customer,
        )
        self.calendars_were.append(((tenant, customer), self.calendars[tenant, customer]))
        self.calendars[tenant, customer] = calendar

    def meter(
        self,
        tenant: str,
        slug: str,
        aggregation: str = "sum",
        lateness_s: int = 172_800,
        value_property: str | None = None,
        dimensions: Sequence[str] = (),
        scale: int = 0,
    ) -> None:
        with self.database() as db:
            db.execute(
                "INSERT INTO meters (tenant_id, meter, aggregation, lateness_seconds, event_name, "
                "value_property, dimensions, scale) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    *(tenant, slug, aggregation, lateness_s, f"{tenant}.{slug}"),
                    *(value_property, list(dimensions), scale),
                ),
            )
        self.meters[tenant, slug] = Meter(aggregation, lateness_s, value_property, tuple(dimensions), scale)

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
        """Records between the committed offset and the end of each usage partition, as any tool says."""
        starts, ends = self.log_bounds()
        stands = self.committed()
        return {tp: end - stands.get(tp, starts[tp]) for tp, end in ends.items()}

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

    def buckets(self) -> dict[Bucket, Decimal]:
        """Every bucket's total, as stored."""
        return {
            (_item(row), int(row[4]), int(row[5])): row[6]
            for row in self.query(
                f"SELECT {_ITEM}, extract(epoch FROM b.hour_start), extract(epoch FROM b.period_start), "
                "b.total FROM buckets b JOIN items i USING (item_id)"
            )
        }

    def hours(self) -> dict[tuple[Item, int], Decimal]:
        """Counters by item and hour, as stored."""
        hours: dict[tuple[Item, int], Decimal] = {}
        for (item, hour, _), total in self.buckets().items():
            hours[item, hour] = hours.get((item, hour), Decimal(0)) + total
        return hours

    def periods(self) -> dict[tuple[Item, int], Decimal]:
        """Every period's aggregate, from the stored hours alone."""
        hours: dict[tuple[Item, int], dict[int, Decimal]] = {}
        for (item, hour, period), total in self.buckets().items():
            hours.setdefault((item, period), {})[hour] = total
        found = {}
        for (item, period), totals in hours.items():
            match self.meters[item[0], item[2]].aggregation:
                case "max":
                    found[item, period] = max(totals.values())
                case "last":
                    found[item, period] = totals[max(totals)]
                case _:
                    found[item, period] = sum(totals.values(), Decimal(0))
        return found

    def total(self, item: Item) -> Decimal:
        """The sum of an item's hours; 0 when it has none."""
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

    def approve(self, most: int = 1000) -> None:
        """Approve adjustments that wait, as an operator would. Only for what is younger than 34 days."""
        rows = self.query(
            "UPDATE adjustments SET state = 'approved', decided_by = 'a test', decided_at = now() "
            "WHERE adjustment_id IN (SELECT adjustment_id FROM adjustments WHERE state = 'pending' "
            "ORDER BY adjustment_id LIMIT %s) RETURNING tenant_id, idempotency_key",
            most,
        )
        self.approved |= {(row[0], row[1]) for row in rows}

    def push(self) -> None:
        """Stand in for the pusher: what is open was reported, so that more can be closed."""
        with self.database() as db:
            db.execute("SET deadlock_timeout = '20s'")  # if two orders of locks meet, the worker retries
            db.execute(
                "INSERT INTO meter_events (identifier, item_id, tenant_id, meter, period_start, period_end, "
                "hour_start, event_name, stripe_customer, customer_payload_key, value_payload_key, amount, "
                "event_at, state, attempts, first_sent_at, settled_at, formula) "
                "SELECT d.identifier, d.item_id, i.tenant_id, i.meter, d.period_start, d.period_start, "
                "d.hour_start, m.event_name, coalesce(c.stripe_customer, i.customer_ref), "
                "m.customer_payload_key, m.value_payload_key, "
                "d.amount, d.hour_start, 'reported', 1, now(), now(), "
                "CASE aggregation WHEN 'last' THEN 'last' ELSE 'sum' END "
                "FROM deltas d JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter) "
                "LEFT JOIN customers c USING (tenant_id, customer_ref) "
                "WHERE NOT EXISTS (SELECT FROM meter_events e WHERE e.identifier = d.identifier)"
            )
            db.execute(
                "WITH held AS (SELECT item_id, hour_start, period_start FROM buckets b WHERE open "
                "AND NOT EXISTS (SELECT FROM deltas d LEFT JOIN meter_events e USING (identifier) "
                "WHERE (d.item_id, d.hour_start) = (b.item_id, b.hour_start) AND e.identifier IS NULL) "
                "ORDER BY item_id, hour_start, period_start FOR UPDATE) "
                "UPDATE buckets b SET open = false FROM held WHERE (b.item_id, b.hour_start, b.period_start) "
                "= (held.item_id, held.hour_start, held.period_start)"
            )

    def settle_deltas(self, timeout_s: float = 30) -> None:
        """Stand in for the pusher until every counter is in deltas."""

        def settled() -> bool:
            self.push()
            return not any(self._unsettled().values())

        until(settled, "every difference closed", timeout_s, lambda: f"{self._unsettled()}")
        self.await_quiet(timeout_s)

    def _unsettled(self) -> dict[str, int]:
        """What closing has yet to do."""
        names = ("open", "changed", "approved", "calendars")
        [row] = self.query(
            "SELECT (SELECT count(*) FROM buckets WHERE open), "
            "(SELECT count(*) FROM buckets WHERE closed IS DISTINCT FROM total), "
            "(SELECT count(*) FROM adjustments WHERE state = 'approved'), "
            "(SELECT count(*) FROM calendar_changes WHERE done_at IS NULL)"
        )
        return dict(zip(names, row, strict=True))

    def truth(self) -> Truth:
        """What the log says."""
        return truth(self.log, self.meters, self.calendars, self.approved)

    def assert_exact(self) -> Truth:
        """Counters, periods, outcomes, positions and group offsets are what the log says, exactly."""
        expected = self.truth()
        assert differences(self.buckets(), expected.buckets) == {}
        assert differences(self.periods(), expected.periods) == {}
        assert self.outcomes() == expected.outcomes
        assert self.processed() == len(self.log) == sum(expected.outcomes.values())
        assert not any(self.lag().values())
        positions = {
            (row[0], row[1]): row[2]
            for row in self.query(
                "SELECT topic, partition, next_offset FROM partition_offsets WHERE consumer = %s", GROUP
            )
        }
        assert positions == self.log_bounds()[1]
        watermarks = {
            _item(row): int(row[4])
            for row in self.query(
                f"SELECT {_ITEM}, extract(epoch FROM i.watermark) FROM items i "
                "WHERE isfinite(i.watermark)"  # not of an item whose every record was parked
            )
        }
        assert watermarks == expected.watermarks
        self._assert_parked(expected)
        return expected

    def _assert_parked(self, expected: Truth) -> None:
        """Each parked record, conflict and adjustment is on its topic, once by its identity."""
        for outcome, topic in PARKED.items():
            wanted = {json.dumps(one, separators=(",", ":")).encode() for one in expected.parked[outcome]}
            assert {one.key for one in self.read(topic)} == wanted
            kept = self.query(
                'SELECT topic, partition, "offset" FROM parked_records WHERE (kind, state) = (%s, %s)',
                KINDS[outcome],
                "parked",
            )
            assert {json.dumps(list(row), separators=(",", ":")).encode() for row in kept} == wanted
        conflicts = {
            (one["second_topic"], one["second_partition"], one["second_offset"])
            for one in (unframe("conflict", 1, one.value) for one in self.read("conflicts.v1"))
        }
        assert len(conflicts) == expected.outcomes["conflict"]
        assert conflicts == set(
            self.query("SELECT topic, partition, \"offset\" FROM parked_records WHERE kind = 'conflict'")
        )
        adjustments = {
            one["adjustment_id"]: one
            for one in (unframe("adjustment", 1, one.value) for one in self.read("adjustments.v1"))
        }
        on_topic: dict[Item, Decimal] = {}
        wanted_on_topic: dict[Item, Decimal] = {}
        for one in adjustments.values():
            name = (one["tenant_id"], one["customer_ref"], one["meter"])
            on_topic[name] = on_topic.get(name, Decimal(0)) + one["quantity"]
        for item, amount in expected.adjustments.items():
            wanted_on_topic[item[:3]] = wanted_on_topic.get(item[:3], Decimal(0)) + amount
        assert on_topic == wanted_on_topic
        assert len(adjustments) == expected.outcomes["adjusted"]

    def assert_deltas_add_up(self) -> None:
        """After ``settle_deltas``: deltas, in the table and on the topic, amount to the counters."""
        stored = {row[0]: row[1] for row in self.query("SELECT identifier, amount FROM deltas")}
        on_topic = {}
        for one in self.read("deltas.v1"):
            delta = unframe("usage_delta", 2, one.value)
            assert on_topic.setdefault(delta["identifier"], delta["amount"]) == delta["amount"]
            self._assert_delta(delta)
        assert on_topic == stored
        columns = "extract(epoch FROM d.hour_start), extract(epoch FROM d.period_start)"
        sums: dict[tuple[Item, int], Decimal] = {}
        newest: dict[Bucket, Decimal] = {}
        for row in self.query(
            f"SELECT {_ITEM}, {columns}, d.amount FROM deltas d JOIN items i USING (item_id) "
            "ORDER BY d.sequence"
        ):
            item, hour, period = _item(row), int(row[4]), int(row[5])
            if self.meters[item[0], item[2]].aggregation == "last":
                newest[item, hour, period] = row[6]
            else:
                sums[item, period] = sums.get((item, period), Decimal(0)) + row[6]
        self._add_carries(sums)
        periods, buckets = self.periods(), self.buckets()
        last = {item for item, _ in periods if self.meters[item[0], item[2]].aggregation == "last"}
        summed = {place: total for place, total in periods.items() if place[0] not in last}
        assert differences(self._by_item(sums), self._by_item(summed)) == {}
        wanted = {place: total for place, total in buckets.items() if place[0] in last}
        assert newest == wanted

    def _by_item(self, periods: dict[tuple[Item, int], Decimal]) -> dict[tuple[Item, int], Decimal]:
        """Where periods changed, deltas of earlier ones stay what they were: only the whole must agree."""
        changed = {name for name, _ in self.calendars_were}
        found: dict[tuple[Item, int], Decimal] = {}
        for (item, period), total in periods.items():
            place = item, 0 if item[:2] in changed else period
            found[place] = found.get(place, Decimal(0)) + total
        return found

    def _add_carries(self, sums: dict[tuple[Item, int], Decimal]) -> None:
        """What a period has not pushed: below its meter's scale, or pushed in another period."""
        signed = set(self.query("SELECT tenant_id, meter FROM meters WHERE allow_negative"))
        for row in self.query(
            f"SELECT {_ITEM}, extract(epoch FROM p.period_start), p.carry "
            "FROM item_periods p JOIN items i USING (item_id) WHERE p.carry <> 0"
        ):
            item, period, carry = _item(row), int(row[4]), row[5]
            unit = Decimal(1).scaleb(-self.meters[item[0], item[2]].scale)
            moved = item[:2] in {name for name, _ in self.calendars_were}
            least = -unit if (item[0], item[2]) in signed else 0
            assert least < carry < unit or moved, (item, period, carry)
            sums[item, period] = sums.get((item, period), Decimal(0)) + carry
        for row in self.query(
            f"SELECT {_ITEM}, extract(epoch FROM c.period_start), extract(epoch FROM c.to_period), c.amount "
            "FROM carry_forwards c JOIN items i USING (item_id)"
        ):
            item, period, target, amount = _item(row), int(row[4]), int(row[5]), row[6]
            sums[item, period] = sums.get((item, period), Decimal(0)) + amount
            sums[item, target] = sums.get((item, target), Decimal(0)) - amount

    def _assert_delta(self, delta: Mapping[str, Any]) -> None:
        """What a delta says besides its amount is true of its item and inside its hour and period."""
        name = (delta["tenant_id"], delta["customer_ref"], delta["meter"])
        meter = self.meters[name[0], name[2]]
        assert delta["formula"] == ("last" if meter.aggregation == "last" else "sum")
        assert set(delta["dimensions"]) == set(meter.dimensions)
        calendars = {self.calendars.get(name[:2]) or self.calendars[name[:1]]}
        calendars |= {calendar for changed, calendar in self.calendars_were if changed == name[:2]}
        start, end, hour, at = (
            delta[f].timestamp() for f in ("period_start", "period_end", "hour_start", "event_at")
        )
        assert (start, end) in {period_of(calendar, int(at)) for calendar in calendars}
        assert hour <= at < hour + HOUR_S


#: Columns that :func:`_item` reads first, from ``items i``.
_ITEM = "i.tenant_id, i.customer_ref, i.meter, i.dimensions"


def _item(row: Sequence[Any]) -> Item:
    return (row[0], row[1], row[2], *row[3])


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


def trim_topics(kafka: str, topics: Sequence[str] = TOPICS) -> None:
    """Drop every record of the product's topics, so that a log begins where the last test ended."""
    admin = AdminClient({"bootstrap.servers": kafka})
    await_no_members(admin, but="w1")
    starts, ends = log_bounds(admin, topics)
    full = [TopicPartition(*tp, end) for tp, end in ends.items() if end > starts[tp]]
    for future in admin.delete_records(full).values() if full else ():
        future.result()


def hour_of(occurred_s: int) -> int:
    """Start of the hour."""
    return occurred_s // HOUR_S * HOUR_S
