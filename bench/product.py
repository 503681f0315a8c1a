"""Our own counters worker under test: ``python -m bench.product`` runs what ``tidemeter counters`` runs.

Names are all that differs: topics and group are the benchmark's own, because it must not join the group of a
product that runs on the same servers, nor write to its topics. The job comes as for every contestant, see
:mod:`bench.rivals`; every other setting comes from the environment.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg
from confluent_kafka.admin import AdminClient

from bench.processes import START_SECONDS_MAX, Contestant, Progress, started
from bench.rivals import Job, read_job, say_first
from bench.servers import Servers
from schemas.catalog import current
from services.wire import topics
from services.wire.settings import load_settings

Connection = psycopg.Connection[Any]

TITLE = "Tidemeter counters"


def topic_names(usage: str) -> dict[str, str]:
    """The benchmark's name for each topic of the product; ``usage`` is that of current usage events."""
    names = {
        name: f"{usage}-{name}"
        for constant, name in vars(topics).items()
        if constant.isupper() and isinstance(name, str)
    }
    return {**names, topics.USAGE_CURRENT: usage}


# -- On the outside --------------------------------------------------------------------------------------


@contextmanager
def own_topics(servers: Servers, *, partitions: int, outputs: bool = True) -> Iterator[str]:
    """Make a usage topic, with ``outputs`` also every topic that the worker writes to, and give its name.

    On given servers they are removed in the end. The consumer groups go with their topics: Kafka forgets a
    group that has neither members nor offsets.
    """
    name = f"tidemeter-bench-{secrets.token_hex(4)}"
    usage = f"{name}-usage"
    plans = topics.plan_for(
        load_settings(kafka_bootstrap=servers.bootstrap, topic_partitions=partitions, usage_retention_days=-1)
    )
    names = topic_names(usage) if outputs else {topics.USAGE_CURRENT: usage}
    try:
        topics.create_topics(
            servers.bootstrap,
            [replace(plan, name=names[plan.name]) for plan in plans if plan.name in names],
        )
        yield usage
    finally:
        if servers.given:
            _remove_topics(servers.bootstrap, name)


def _remove_topics(bootstrap: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    ours = [topic for topic in admin.list_topics(timeout=10).topics if name in topic]
    if ours:
        for future in admin.delete_topics(ours, operation_timeout=30).values():
            future.result(START_SECONDS_MAX)


@contextmanager
def worker(servers: Servers, usage: str, partitions: int, dsn: str) -> Iterator[Contestant]:
    """One counters worker on the given usage topic and database."""
    with tempfile.TemporaryDirectory(prefix="tidemeter-bench-") as directory:
        job = Job(servers.bootstrap, usage, partitions, f"{usage}-counters", directory, dsn)
        with started(TITLE, "bench.product", job) as contestant:
            yield contestant


class AwaitedDeltas:
    """Deltas that will be written, each named by item, hour and sequence; asked for on ``db`` alone.

    Cheap enough for every few milliseconds: what was found once is there for good, so each question goes on
    where the last one ended, with one look-up in an index for each delta on the way.
    """

    def __init__(self, db: Connection, places: Iterable[tuple[bytes, int]], sequence: int) -> None:
        self._db = db
        self._sequence = sequence
        self._found = 0
        db.execute("SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off")
        db.execute("DROP TABLE IF EXISTS awaited")
        db.execute("CREATE TEMP TABLE awaited (number int PRIMARY KEY, item_id uuid, hour_start timestamptz)")
        with db.cursor().copy("COPY awaited FROM STDIN") as copy:
            for number, (item_id, hour_us) in enumerate(places):
                at = datetime.fromtimestamp(hour_us / 1_000_000, UTC)
                copy.write(f"{number}\t{item_id.hex()}\t{at.isoformat()}\n")
                self.number = number + 1
        db.execute("ANALYZE awaited")

    def found(self) -> int:
        """How many are durable, in their order here, up to the first that was not when this was called."""
        row = self._db.execute(_FIRST_MISSING, (self._found, self._sequence), prepare=True).fetchone()
        self._found = self.number if row is None else row[0]
        return self._found

    def wait(self, contestant: Contestant, *, poll_s: float) -> float:
        """When the question was asked that found them all, by ``time.monotonic()``.

        Raises:
            ContestantFailed: ``contestant`` ended, or has written none of them for long.
        """
        progress = Progress(contestant, self.number, "deltas")
        while True:
            asked_s = time.monotonic()
            found = self.found()
            if found == self.number:
                return asked_s
            progress.at(found)
            time.sleep(poll_s)


_FIRST_MISSING = """
SELECT number FROM awaited a WHERE number >= %s AND NOT EXISTS (
    SELECT FROM deltas d WHERE (d.item_id, d.hour_start, d.sequence) = (a.item_id, a.hour_start, %s))
ORDER BY number LIMIT 1
"""


# -- In the worker's process -----------------------------------------------------------------------------


def redirect(job: Job) -> None:
    """Read the job's topic, and nothing else, as the job's group; write to topics of the job's own."""
    from services.counters import agent  # noqa: F401  (so that every module that knows a name is there)

    names = topic_names(job.topic)
    version = current("usage_event").version
    for table, entry in (
        (topics.USAGE_TOPICS, {version: job.topic}),
        (topics.USAGE_VERSIONS, {job.topic: version}),
    ):
        table.clear()
        table.update(entry)  # type: ignore[arg-type]
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("services."):
            continue
        for constant, value in list(vars(module).items()):
            if constant.isupper() and isinstance(value, str) and value in names:
                setattr(module, constant, names[value])
        if module_name.startswith("services.counters.") and hasattr(module, "GROUP"):
            vars(module)["GROUP"] = job.group


def say_first_chunk() -> None:
    """Make the handler report the first chunk it is given."""
    from services.counters import ledger
    from services.counters.prepare import Prepared
    from services.streaming.chunks import Chunk

    prepare = ledger.Counters.prepare

    def first(self: ledger.Counters, chunk: Chunk) -> Prepared:
        ledger.Counters.prepare = prepare  # type: ignore[method-assign]
        say_first()
        return prepare(self, chunk)

    ledger.Counters.prepare = first  # type: ignore[method-assign]


def count_until_killed(**settings: str) -> None:
    """Be the worker of the job on standard input; ``settings`` by their names in the environment."""
    job = read_job()
    os.environ.pop("TIDEMETER_WORKER_ID", None)
    os.environ.setdefault("TIDEMETER_LOG_LEVEL", "warning")
    os.environ.update(
        TIDEMETER_KAFKA_BOOTSTRAP=job.bootstrap,
        TIDEMETER_POSTGRES_DSN=job.dsn,
        TIDEMETER_OBSERVE_PORT="0",
        **settings,
    )
    from services.cli.main import app

    redirect(job)
    say_first_chunk()
    app(["counters"])


if __name__ == "__main__":
    count_until_killed()
