"""Faults of Faust itself that this product is built around, shown on a plain Faust app.

They do not test the product. When one of them fails, Faust has changed, and what the worker does about it
may be needless, or not enough: read the docstrings in ``services/streaming/worker.py`` and ``transport.py``
again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faust
import psutil
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.pipeline import ROOT, until

CHANGED = "upstream changed: re-read services/streaming/worker.py, "


@dataclass
class Canary:
    """One topic of one partition, and plain Faust apps on it."""

    kafka: str
    directory: Path
    name: str = field(default_factory=lambda: f"canary-{uuid.uuid4().hex[:8]}")
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admin = AdminClient({"bootstrap.servers": self.kafka, "log_level": 0})

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            "CANARY": self.name,
            "CANARY_KAFKA": self.kafka,
            "CANARY_DIRECTORY": str(self.directory),
        }
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/fault/plain_faust.py"), *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def said(self, what: str) -> list[int]:
        """The numbers that the app printed after ``what``, in order."""
        words = [line.split() for line in self.log().splitlines()]
        return [int(line[1]) for line in words if len(line) == 2 and line[0] == what]

    def send(self, count: int) -> None:
        producer = Producer({"bootstrap.servers": self.kafka})
        for number in range(count):
            producer.produce(self.name, str(number).encode())
            producer.poll(0)
        assert producer.flush(30) == 0

    def committed(self) -> int:
        asked = self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(self.name)])
        partitions = asked[self.name].result(10).topic_partitions
        return max((one.offset for one in partitions if one.topic == self.name), default=-1)


@pytest.fixture
def canary(kafka_bootstrap: str, tmp_path: Path) -> Iterator[Canary]:
    canary = Canary(kafka_bootstrap, tmp_path)
    admin = canary.admin
    admin.create_topics([NewTopic(canary.name, 1, 1)])[canary.name].result(10)
    try:
        yield canary
    finally:
        for process in canary.processes:
            process.kill()
            process.wait(10)
        mine = [name for name in admin.list_topics(timeout=10).topics if name.startswith(canary.name)]
        for future in admin.delete_topics(mine).values():
            future.result(10)


def listening(process: subprocess.Popen[bytes]) -> list[tuple[str, int]]:
    return [
        tuple(connection.laddr)
        for connection in psutil.Process(process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_faust_commits_a_record_whose_agent_raised(canary: Canary) -> None:
    """Why the body of our agent never raises, and why only PostgreSQL says what is committed."""
    canary.send(10)
    canary.start("raise")
    until(lambda: 9 in canary.said("saw"), "the last record", 60, canary.log)
    until(lambda: canary.committed() >= 0, "a commit", 20, canary.log)
    time.sleep(2)  # two more commits
    lost = canary.committed() == 10 and canary.said("saw").count(5) == 1
    assert lost, CHANGED + f"point 2: a raise led to commit {canary.committed()}, {canary.said('saw')} seen"


def test_faust_waits_sixty_seconds_for_a_killed_worker_and_serves_the_web_to_everybody() -> None:
    """Why the session timeout, the member's name and the web server are set explicitly."""
    conf = faust.App("canary").conf
    assert conf.broker_session_timeout == 60.0, CHANGED + "point 5"
    assert conf.consumer_group_instance_id in (None, ""), CHANGED + "point 5"
    assert (conf.web_enabled, conf.web_port, conf.web_bind) == (True, 6066, "0.0.0.0"), CHANGED + "point 6"  # noqa: S104


def test_fausts_command_line_opens_a_web_server_that_the_app_forbids_and_our_start_does_not(
    canary: Canary,
) -> None:
    """Why the worker is started by ``app.start()`` and never by Faust's command line."""
    ours = canary.start("idle")
    until(lambda: "started" in canary.log(), "the start", 60, canary.log)
    assert listening(ours) == []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    theirs = canary.start("worker", "--web-port", str(port))
    deadline = time.monotonic() + 30
    while not listening(theirs) and theirs.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert theirs.poll() is None, canary.log()
    addresses = {address for address, _ in listening(theirs)}
    assert addresses & {"0.0.0.0", "::"}, CHANGED + f"point 6: it listens on {listening(theirs)}"  # noqa: S104


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_faust_tables_count_twice_after_a_sigkill(canary: Canary) -> None:
    """Why counters are in PostgreSQL: a table's changelog runs ahead of the committed offset."""
    events = 30_000
    canary.send(events)
    for kill in range(4):
        process = canary.start("count")
        begun = len(canary.said("sum"))
        wanted = (kill + 1) * events // 8
        until(lambda b=begun, w=wanted: max(canary.said("sum")[b:], default=0) >= w, "work", 60, canary.log)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    canary.start("count")
    until(lambda: canary.committed() == events, "the end of the log", 120, canary.log)
    time.sleep(1)
    assert canary.said("sum")[-1] > events, CHANGED + "and whether tables can be trusted now"
