"""Our own counters worker, under the rules of the rivals: the real process, on a topic and group of its own.

Topic and group are the only things changed, before the worker is imported: the benchmark must not join the
group of a product that runs on the same servers. Deltas are not closed meanwhile; no rival makes any.
"""

from __future__ import annotations

import asyncio

from bench.rivals import Job, read_job, say_first
from schemas.catalog import current
from services.counters import ledger
from services.counters.prepare import Prepared
from services.streaming.chunks import Chunk
from services.wire import topics
from services.wire.log import configure_logging
from services.wire.settings import load_settings

NO_DELTAS_SECONDS = 86_400.0


def redirect(job: Job) -> None:
    """Read the job's topic, and nothing else, as the job's group. Before the agent is imported."""
    version = current("usage_event").version
    for table, entry in (
        (topics.USAGE_TOPICS, {version: job.topic}),
        (topics.USAGE_VERSIONS, {job.topic: version}),
    ):
        table.clear()
        table.update(entry)  # type: ignore[arg-type]
    ledger.GROUP = job.group


def say_first_chunk() -> None:
    """Make the handler report the first chunk it is given."""
    prepare = ledger.Counters.prepare

    def first(self: ledger.Counters, chunk: Chunk) -> Prepared:
        ledger.Counters.prepare = prepare  # type: ignore[method-assign]
        say_first()
        return prepare(self, chunk)

    ledger.Counters.prepare = first  # type: ignore[method-assign]


def main() -> None:
    """Count until killed."""
    job = read_job()
    configure_logging("warning", "json")
    redirect(job)
    say_first_chunk()
    from services.counters import agent

    settings = load_settings(
        kafka_bootstrap=job.bootstrap,
        postgres_dsn=job.dsn,
        delta_interval_seconds=NO_DELTAS_SECONDS,
        observe_port=0,
    )
    asyncio.run(agent.run(settings))


if __name__ == "__main__":
    main()
