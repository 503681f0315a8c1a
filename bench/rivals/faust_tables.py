"""Hourly sums with Faust, as its documentation shows it: an agent, an event at a time, and two tables.

The tables are in memory, each with a changelog topic: measured, that was faster than RocksDB (``rocksdict``).
Before Faust commits an offset it waits until the brokers have the changes of every event below it, so what is
committed survives a kill. What is *not* committed may be in the changelog too, and one table's change without
the other's: after a crash these sums can be wrong, which is Faust's promise, and not what is measured here.

Settings that differ from the defaults, all in Faust's favour: uvloop when it is there; ``producer_linger``,
without which each change is a request; a shorter ``broker_commit_interval`` (1 s, not 2.8), so that less time
is lost after the last event; the web server off.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from typing import Any

import mode.loop

if importlib.util.find_spec("uvloop") is not None:
    mode.loop.use("uvloop")  # before Faust is imported, as mode asks

import faust
from faust.serializers import codecs

from bench.rivals import HOUR_US, SUMS_TABLE, Job, Usage, read_job, usage_reader


class UsageCodec(codecs.Codec):  # type: ignore[misc]
    """Bytes to a usage event."""

    def __init__(self) -> None:
        super().__init__()
        self._read = usage_reader()

    def _loads(self, value: bytes) -> Any:
        return self._read(value)


def build(job: Job) -> faust.App:
    """The application; its id, and so its consumer group, is the job's group."""
    codecs.register("usage", UsageCodec())
    app = faust.App(
        job.group,
        broker=f"kafka://{job.bootstrap.replace(',', ';kafka://')}",
        store="memory://",
        datadir=job.directory,
        topic_partitions=job.partitions,
        topic_disable_leader=True,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=1.0,
        producer_linger=0.005,
        producer_max_batch_size=256 * 1024,
        web_enabled=False,
    )
    usage = app.topic(job.topic, value_serializer="usage", key_type=bytes)
    seen = app.Table("seen", default=bool, partitions=job.partitions)
    sums = app.Table(SUMS_TABLE, default=int, partitions=job.partitions)

    @app.agent(usage)  # type: ignore[untyped-decorator]
    async def count(events: AsyncIterator[Usage]) -> None:
        async for event in events:
            key = event["idempotency_key"]
            if key in seen:
                continue
            seen[key] = True
            occurred = event["occurred_at"]
            hour = occurred - occurred % HOUR_US
            sums[f"{event['customer_ref']}|{event['meter']}|{hour}"] += int.from_bytes(
                event["quantity"], "big", signed=True
            )

    return app


if __name__ == "__main__":
    faust.Worker(
        build(read_job()), loglevel="ERROR", quiet=True, redirect_stdouts=False
    ).execute_from_commandline()
