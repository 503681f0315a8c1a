"""Hourly sums, exact and without duplicates: Tidemeter beside a Faust table and Quix Streams exactly-once.

One topic, filled once with seeded usage events of which two in a hundred are repeated. Each contestant
decodes Avro, drops what it has seen by idempotency key, and keeps the exact sum of each (customer, meter,
hour) so that it survives a SIGKILL. They run one after the other, in rounds, each time as a new process with
a new consumer group and nothing to recover. With embedded servers, all of it shares one machine.

The rate is events ÷ seconds, taken from outside and alike for all:

* the clock starts when the contestant says that it has its first event in hand, so starting, joining the
  group and recovering are free;
* it stops when the brokers show the whole topic as committed by its group. All three commit an offset only
  after what it stands for is durable: ours after PostgreSQL's commit, Faust after the changelog's
  acknowledgement, Quix in the transaction that holds the changelog. Whatever a contestant's commit interval
  adds at the end, it pays.

Then it is killed with SIGKILL, and what is left of it is compared with what was produced: ours in PostgreSQL,
theirs in their changelog topics, as a reader of committed records sees them. ``checked`` is that comparison.

A slow contestant may count the newest part of the topic instead of all of it: its group starts at later
offsets. The result names the number of events each counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from rich.table import Table

from bench.generator import METERS, TENANT, Load, produce
from bench.processes import START_SECONDS_MAX, ContestantFailed, Progress, started
from bench.processes import Contestant as Process
from bench.product import own_topics
from bench.results import versions
from bench.rivals import HOUR_PREFIX, HOUR_US, SUMS_TABLE, Job
from bench.servers import Servers, fresh_database
from services.streaming.chunks import Partition
from services.streaming.lag import log_ends
from services.wire.codec import Decoder
from services.wire.errors import Misconfigured

KEY = "counting"
EVENTS = 300_000
PARTITIONS = 4
DUPLICATES = 0.02
ROUNDS_MIN, ROUNDS_MAX = 2, 3
#: A third round is run when it is likely to end before this.
ROUNDS_SECONDS = 150.0
RUN_SECONDS_MAX = 600.0
POLL_SECONDS = 0.05
#: Names a Python with Quix Streams, which wants an older client for Kafka than we do.
QUIX_PYTHON = "TIDEMETER_BENCH_QUIX_PYTHON"

#: Sums in billionths by (customer, meter, start of the hour in microseconds).
Sums = dict[tuple[str, str, int], int]


@dataclass(frozen=True, slots=True)
class Field:
    """The topic, filled: what every contestant finds."""

    servers: Servers
    name: str
    topic: str
    ends: dict[Partition, int]
    load: Load
    admin: AdminClient  # one for all: what a client has under way dies, unanswered, together with it

    def starts(self, events: int) -> dict[Partition, int]:
        """Where to begin in order to count about ``events`` of the newest records."""
        share = -(-events // len(self.ends))
        return {tp: max(0, end - share) for tp, end in self.ends.items()}

    def expected(self, starts: dict[Partition, int]) -> Sums:
        """The sums of everything from ``starts`` on."""
        return dict(self.load.sums) if not any(starts.values()) else _sums_of_topic(self, starts)


@dataclass(frozen=True, slots=True)
class Contestant:
    """``name`` is the key of its result; ``events_max`` is for those that would take too long."""

    name: str
    title: str
    module: str
    events_max: int
    read_sums: Callable[[Field, Job], Sums]
    python: Callable[[], str] = lambda: sys.executable


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant, once."""

    contestant: str
    round: int
    events: int
    seconds: float
    checked: bool

    @property
    def rate(self) -> float:
        return self.events / self.seconds


# -- What was counted ------------------------------------------------------------------------------------


def _records(servers: Servers, starts: dict[Partition, int]) -> Iterator[Message]:
    """Every committed record from ``starts`` to the end of its partition."""
    consumer = Consumer(
        {
            "bootstrap.servers": servers.bootstrap,
            "group.id": "tidemeter-bench-reader",  # required, never joined
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
        }
    )
    try:
        consumer.assign([TopicPartition(tp.topic, tp.partition, start) for tp, start in starts.items()])
        unfinished = set(starts)
        deadline_s = time.monotonic() + RUN_SECONDS_MAX
        while unfinished:
            if time.monotonic() > deadline_s:
                raise ContestantFailed(f"{next(iter(unfinished)).topic} cannot be read to its end")
            for message in consumer.consume(10_000, timeout=0.5):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    unfinished.discard(Partition(message.topic() or "", message.partition() or 0))
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()


def _sums_of_topic(field: Field, starts: dict[Partition, int]) -> Sums:
    """The plain truth about a part of the topic: a set of keys and a dictionary."""
    decode = Decoder().decode
    seen: set[str] = set()
    sums: Sums = defaultdict(int)
    for message in _records(field.servers, starts):
        _, record = decode(message.value() or b"")
        if record["idempotency_key"] not in seen:
            seen.add(record["idempotency_key"])
            hour = record["occurred_at"] - record["occurred_at"] % HOUR_US
            quantity = int.from_bytes(record["quantity"], "big", signed=True)
            sums[record["customer_ref"], record["meter"], hour] += quantity
    return dict(sums)


def _newest(field: Field, topic: str) -> dict[bytes, bytes]:
    """The last value of each key of a changelog."""
    newest: dict[bytes, bytes] = {}
    starts = {Partition(topic, partition): 0 for partition in range(PARTITIONS)}
    for message in _records(field.servers, starts):
        newest[message.key() or b""] = message.value() or b""
    return newest


def _sums_in_postgres(field: Field, job: Job) -> Sums:
    with psycopg.connect(job.dsn) as db:
        rows = db.execute(
            "SELECT customer_ref, meter, (extract(epoch FROM hour_start) * 1000000)::bigint, "
            "sum(total) * 1000000000 FROM buckets JOIN items USING (item_id) "
            "WHERE tenant_id = %s GROUP BY 1, 2, 3",
            (TENANT,),
        ).fetchall()
    return {
        (customer, meter, hour): int(total) for customer, meter, hour, total in rows if total == int(total)
    }


def _sums_in_faust_changelog(field: Field, job: Job) -> Sums:
    """Key ``"customer|meter|hour"`` and value, both JSON."""
    sums: Sums = {}
    for key, value in _newest(field, f"{job.group}-{SUMS_TABLE}-changelog").items():
        customer, meter, hour = json.loads(key).split("|")
        sums[customer, meter, int(hour)] = json.loads(value)
    return sums


def _sums_in_quix_changelog(field: Field, job: Job) -> Sums:
    """Key ``<record key>|"hour:<start>"``, value JSON; the other keys are the events seen."""
    sums: Sums = {}
    for key, value in _newest(field, f"changelog__{job.group}--{job.topic}--default").items():
        item, separator, hour = key.rpartition(f'|"{HOUR_PREFIX}'.encode())
        if separator:
            _, customer, meter = json.loads(item)
            sums[customer, meter, int(hour.rstrip(b'"'))] = json.loads(value)
    return sums


def quix_python() -> str:
    """The interpreter that has Quix Streams: the one named, the one `make` set up, or our own."""
    set_up = Path(sys.prefix) / "quix" / "bin" / "python"
    return os.environ.get(QUIX_PYTHON) or str(set_up if set_up.exists() else sys.executable)


def quix_versions() -> dict[str, str]:
    """What the rival in its own environment runs with.

    Raises:
        Misconfigured: it cannot be imported there.
    """
    program = (
        "import fastavro, importlib.metadata as m, json, quixstreams\n"
        "print(json.dumps({n: m.version(n) for n in ('quixstreams', 'confluent-kafka', 'rocksdict')}))"
    )
    try:
        answer = subprocess.run([quix_python(), "-c", program], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise Misconfigured(f"{QUIX_PYTHON}: cannot run {quix_python()}: {error.strerror}") from error
    if answer.returncode != 0:
        raise Misconfigured(
            f"{quix_python()} cannot import Quix Streams: run `make bench`, or install "
            f"bench/rivals/quix.lock into an environment of its own and set {QUIX_PYTHON} to its python"
        )
    found: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    return {"quixstreams": found.pop("quixstreams"), **{f"quixstreams/{n}": v for n, v in found.items()}}


CONTESTANTS = (
    Contestant(
        "tidemeter",
        "Tidemeter counters (PostgreSQL)",
        "bench.rivals.tidemeter_counters",
        sys.maxsize,
        _sums_in_postgres,
    ),
    Contestant(
        "faust_tables",
        "Faust tables (memory, changelog)",
        "bench.rivals.faust_tables",
        30_000,
        _sums_in_faust_changelog,
    ),
    Contestant(
        "quix_exactly_once",
        "Quix Streams exactly-once (RocksDB, changelog)",
        "bench.rivals.quix_exactly_once",
        sys.maxsize,
        _sums_in_quix_changelog,
        python=quix_python,
    ),
)


# -- The field -------------------------------------------------------------------------------------------


@contextmanager
def laid_out(servers: Servers, *, events: int, seed: int) -> Iterator[Field]:
    """A new topic with ``events`` events in it. On given servers all topics with its name go in the end."""
    with own_topics(servers, partitions=PARTITIONS, outputs=False) as topic:
        load = produce(servers.bootstrap, topic, events=events, seed=seed, duplicates=DUPLICATES)
        admin = AdminClient({"bootstrap.servers": servers.bootstrap, "log_level": 0})
        ends = log_ends(admin, [Partition(topic, partition) for partition in range(PARTITIONS)])
        if sum(ends.values()) != events:
            raise ContestantFailed(f"{events} events were sent, the topic holds {sum(ends.values())}")
        yield Field(servers, topic.removesuffix("-usage"), topic, ends, load, admin)


def _configure_meters(dsn: str) -> None:
    with psycopg.connect(dsn) as db:
        db.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (TENANT,))
        db.cursor().executemany(
            "INSERT INTO meters (tenant_id, meter, aggregation, scale, event_name) "
            "VALUES (%s, %s, 'sum', 3, %s)",
            [(TENANT, meter, meter) for meter in METERS],
        )


# -- One run ---------------------------------------------------------------------------------------------


def race(field: Field, contestant: Contestant, round_: int, expected: Sums | None = None) -> Run:
    """Run one contestant to the end of the topic, kill it, and compare what it left.

    Raises:
        ContestantFailed: it ended, or stood still.
    """
    starts = field.starts(contestant.events_max)
    expected = field.expected(starts) if expected is None else expected
    group = f"{field.name}-{contestant.name.replace('_', '-')}-{round_}"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemeter-bench-"))
        dsn = ""
        if contestant.read_sums is _sums_in_postgres:
            dsn = stack.enter_context(fresh_database(field.servers.dsn))
            _configure_meters(dsn)
        job = Job(field.servers.bootstrap, field.topic, PARTITIONS, group, directory, dsn)
        if any(starts.values()):
            _start_group_at(field, group, starts)
        seconds = _timed(field, contestant, job)
        events = sum(field.ends.values()) - sum(starts.values())
        return Run(contestant.name, round_, events, seconds, contestant.read_sums(field, job) == expected)


def _start_group_at(field: Field, group: str, starts: dict[Partition, int]) -> None:
    offsets = [TopicPartition(tp.topic, tp.partition, start) for tp, start in starts.items()]
    deadline_s = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            request = ConsumerGroupTopicPartitions(group, offsets)
            for future in field.admin.alter_consumer_group_offsets([request]).values():
                future.result(START_SECONDS_MAX)
            return
        except KafkaException as error:  # the first group of new brokers waits for its coordinator
            if not error.args[0].retriable() or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def _timed(field: Field, contestant: Contestant, job: Job) -> float:
    """Seconds from the first event in hand to everything committed; the process is gone afterwards."""
    with started(contestant.title, contestant.module, job, contestant.python()) as process:
        started_s = process.await_first()
        return _await_all(field, job, process) - started_s


def _await_all(field: Field, job: Job, process: Process) -> float:
    """Poll the group's committed offsets until they reach the end of the topic; when that was seen."""
    progress = Progress(process, sum(field.ends.values()), "offsets")
    while True:
        committed = _committed(field.admin, job)
        now_s = time.monotonic()
        if committed == field.ends:
            return now_s
        progress.at(sum(committed.values()))
        time.sleep(POLL_SECONDS)


def _committed(admin: AdminClient, job: Job) -> dict[Partition, int]:
    """What the group has committed; offsets of a transaction under way are waited for."""
    try:
        future = admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(job.group)], require_stable=True, request_timeout=10
        )[job.group]
        found = future.result(START_SECONDS_MAX).topic_partitions
    except KafkaException as error:
        if error.args[0].retriable():
            return {}
        raise
    return {
        Partition(tp.topic, tp.partition): tp.offset
        for tp in found
        if tp.topic == job.topic and tp.offset >= 0
    }


# -- The benchmark ---------------------------------------------------------------------------------------


def run(
    servers: Servers,
    *,
    events: int | None = None,
    seed: int = 1,
    rounds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All contestants in interleaved rounds: two, and a third if there is time, unless ``rounds`` says.

    Raises:
        Misconfigured: Quix Streams cannot be imported.
        ContestantFailed: a contestant ended, or stood still.
    """
    quix = quix_versions()
    events = EVENTS if events is None else events
    say(f"filling a topic with {events:,} events")
    with laid_out(servers, events=events, seed=seed) as field:
        truth = {one.name: field.expected(field.starts(one.events_max)) for one in CONTESTANTS}
        runs: list[Run] = []
        began_s = time.monotonic()
        for round_ in range(1, (rounds or ROUNDS_MAX) + 1):
            taken_s = time.monotonic() - began_s
            if rounds is None and round_ > ROUNDS_MIN and taken_s * round_ / (round_ - 1) > ROUNDS_SECONDS:
                break
            for contestant in CONTESTANTS:
                one = race(field, contestant, round_, truth[contestant.name])
                runs.append(one)
                say(
                    f"round {round_}, {contestant.title}: {one.rate:,.0f} events/s "
                    f"({one.events:,} events, {'exact' if one.checked else 'NOT EXACT'})"
                )
    result = summary(runs, events=events, embedded=not servers.given)
    return {**result, "versions": {**result["versions"], **quix}}


def summary(runs: Sequence[Run], *, events: int, embedded: bool) -> dict[str, Any]:
    """Medians, ratios, and every single run."""
    rates = {
        one.name: statistics.median(run.rate for run in runs if run.contestant == one.name)
        for one in CONTESTANTS
    }
    return {
        **{name: round(rate) for name, rate in rates.items()},
        "checked": all(run.checked for run in runs),
        "ratio_faust": round(rates["tidemeter"] / rates["faust_tables"], 2),
        "ratio_quix": round(rates["tidemeter"] / rates["quix_exactly_once"], 2),
        "events": events,
        "events_counted": {run.contestant: run.events for run in runs},
        "duplicates": DUPLICATES,
        "partitions": PARTITIONS,
        "rounds": max(run.round for run in runs),
        "runs": [
            {
                "contestant": run.contestant,
                "round": run.round,
                "events": run.events,
                "seconds": round(run.seconds, 3),
                "rate": round(run.rate),
                "checked": run.checked,
            }
            for run in runs
        ],
        "embedded": embedded,
        "versions": versions(),
        "cpu": os.cpu_count(),
    }


def render(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(
        "",
        "events/s",
        "events",
        "sums",
        "Tidemeter is",
        title=f"Counting, median of {result['rounds']} rounds",
    )
    for name in ("events/s", "events", "Tidemeter is"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for one in CONTESTANTS:
        exact = all(run["checked"] for run in result["runs"] if run["contestant"] == one.name)
        ratio = result["tidemeter"] / result[one.name]
        table.add_row(
            one.title,
            f"{result[one.name]:,}",
            f"{result['events_counted'][one.name]:,}",
            "exact" if exact else "NOT EXACT",
            "" if one.name == "tidemeter" else f"{ratio:.1f}× as fast",
        )
    return table
