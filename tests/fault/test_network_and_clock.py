"""A slow network, and a machine whose clock is wrong: slower or not, the same counters."""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.conftest import NewDatabase
from tests.fault.campaign import Campaign, some_seed
from tests.fault.traffic import configure
from tests.pipeline import ROOT, TOPICS, USAGE, Pipeline, trim_topics
from tests.proxy import KafkaProxy, TcpProxy

pytestmark = pytest.mark.faults


# The network --------------------------------------------------------------------------------------------


class Late:
    """One end of a connection, as a proxy sees it, that gets everything ``seconds`` later, in order."""

    seconds = 0.0

    def __init__(self, sink: socket.socket) -> None:
        self._sink = sink
        self._waiting: queue.SimpleQueue[tuple[float, bytes | None]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def sendall(self, data: bytes) -> None:
        self._waiting.put((time.monotonic() + self.seconds, data))

    def shutdown(self, how: int) -> None:
        self._waiting.put((time.monotonic() + self.seconds, None))

    def _deliver(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = self._waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if data is None:
                    self._sink.shutdown(socket.SHUT_RDWR)
                    return
                self._sink.sendall(data)


class LateKafka(KafkaProxy):
    def _pass(self, source: socket.socket, sink: Any, answers: bool) -> None:
        super()._pass(source, Late(sink), answers)  # type: ignore[arg-type]


class LatePostgres(TcpProxy):
    def _pass(self, source: socket.socket, sink: Any, answers: bool) -> None:
        super()._pass(source, Late(sink), answers)  # type: ignore[arg-type]


@pytest.mark.timeout(400)
def test_two_hundred_milliseconds_each_way_slow_a_worker_down_and_change_nothing(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = campaign.pipeline
    parts = urlsplit(pipeline.dsn)
    with LateKafka(pipeline.kafka) as kafka, LatePostgres(f"{parts.hostname}:{parts.port}") as postgres:
        user = parts.netloc.rpartition("@")[0]
        dsn = urlunsplit(parts._replace(netloc=f"{user}@{postgres.bootstrap}"))
        worker = pipeline.worker(KAFKA_BOOTSTRAP=kafka.bootstrap, POSTGRES_DSN=dsn).start().await_healthy()
        with campaign.load(some_seed(), 20_000, seconds=60):
            campaign.recover(worker.log)
            monkeypatch.setattr(Late, "seconds", 0.2)
            for _ in range(2):
                campaign.recover(worker.log, least=200, timeout_s=120)
            assert not worker.health()["checks"]["stream"]["reason"].startswith("waiting"), worker.log()
        monkeypatch.setattr(Late, "seconds", 0.0)
        campaign.prove()
        assert worker.stop() == 0


# The clock ----------------------------------------------------------------------------------------------

#: Everything that counting keeps and that does not say when it was written. Not the arrivals of a bucket:
#: they are bounds, those of whole chunks, and how records come in chunks is a matter of chance.
LEDGER = {
    "items": "item_id, dimensions, calendar, watermark",
    "buckets": "item_id, hour_start, period_start, total, events, late_events, first_event, last_event, "
    "last_key",
    "unique_values": "item_id, period_start, value, hour_start",
    "partition_offsets": "topic, partition, start_offset, next_offset, halted",
    "partition_accounts": "*",
    "adjustments": "adjustment_id, quantity, occurred_at, arrived_at, watermark, state, applied_hour",
    "parked_records": 'kind, reason, tenant_id, meter, event_id, topic, partition, "offset", value, state',
}
CLOCKS = {
    "right": ["0:0"],
    "an hour ahead": ["0:3600"],
    "an hour behind": ["0:-3600"],
    "back by ten minutes": ["0:0", "4:-600"],
    "on by ten minutes": ["0:-600", "4:0"],
}


def ledger(pipeline: Pipeline) -> dict[str, list[str]]:
    return {
        table: sorted(map(repr, pipeline.query(f"SELECT {columns} FROM {table}")))
        for table, columns in LEDGER.items()
    }


@pytest.mark.timeout(600)
def test_a_worker_with_a_wrong_clock_keeps_the_same_books(
    campaign: Campaign, new_database: NewDatabase
) -> None:
    """The same log, counted under five clocks: only events and their arrival may say what time it is."""
    sender = campaign.pipeline
    sender.send_raw(campaign.records(some_seed(), 12_000))
    books = {}
    for name, shifts in CLOCKS.items():
        with another(sender, new_database) as pipeline:
            campaign.pipeline, campaign.more = pipeline, {"clock": name}
            worker = pipeline.worker(
                command=[sys.executable, str(ROOT / "tests/fault/wrong_clock.py"), *shifts],
                CHUNK_RECORDS_MAX="100",
            )
            worker.start()
            campaign.prove()
            books[name] = ledger(pipeline)
            assert worker.stop() == 0
    for name in CLOCKS:
        assert books[name] == books["right"], f"another ledger under a clock that is {name}"


@contextlib.contextmanager
def another(first: Pipeline, new_database: NewDatabase) -> Iterator[Pipeline]:
    """The same log, an empty database; what the one before wrote to Kafka is gone."""
    trim_topics(first.kafka, [topic for topic in TOPICS if topic not in USAGE])
    with new_database() as dsn:
        pipeline = Pipeline(first.kafka, dsn, first.directory, log=first.log)
        configure(pipeline, subscribed=False)  # what closing does with invoices is a matter of the time
        try:
            yield pipeline
        finally:
            pipeline.close()
