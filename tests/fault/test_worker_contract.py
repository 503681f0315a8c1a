"""The contract that keeps a worker exact, point by point, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import pytest
from confluent_kafka import TopicPartition

from services.streaming.transport import RawSchema
from services.streaming.worker import Worker as StreamWorker
from services.wire.settings import load_settings
from tests.fault.campaign import Campaign, prove, some_seed
from tests.oracle import Usage
from tests.pipeline import (
    ROOT,
    SESSION_TIMEOUT_S,
    USAGE,
    Pipeline,
    Worker,
    commit_for_group,
    until,
)
from tests.proxy import KafkaProxy, TcpProxy

NOW_S = int(time.time())
HERE = Path(__file__).parent


def usages(keys: Iterator[str] | list[str], customer: str = "cus_1", quantity: int = 1) -> list[Usage]:
    return [Usage("acme", customer, "requests", Decimal(quantity), key, NOW_S - 60) for key in keys]


def spread(prefix: str, customers: int = 24, each: int = 5) -> list[Usage]:
    """Records of many customers, so that every partition of the topic has some."""
    return [
        one
        for number in range(customers)
        for one in usages([f"{prefix}-{number}-{n}" for n in range(each)], f"cus_{number}")
    ]


def faulty(fault: str) -> list[str]:
    return [sys.executable, str(HERE / "faulty_worker.py"), fault]


# 1 -- one agent, raw bytes ------------------------------------------------------------------------------


def test_a_worker_has_one_agent_that_takes_raw_chunks_one_at_a_time(kafka_bootstrap: str) -> None:
    settings = load_settings(kafka_bootstrap=kafka_bootstrap, postgres_dsn="postgresql://127.0.0.1:1/none")

    class Nothing:
        def prepare(self, chunk: object) -> object:
            return chunk

        def apply(self, db: object, prepared: object) -> object:
            raise AssertionError

    app = StreamWorker(settings, group="g", topics=list(USAGE), handler=Nothing()).app  # type: ignore[arg-type]
    [agent] = app.agents.values()
    assert agent.concurrency == 1
    assert isinstance(agent.channel.schema, RawSchema)
    assert set(agent.channel.topics) == set(USAGE)
    assert app.conf.web_enabled is False
    assert app.conf.topic_allow_declare is False
    assert app.conf.processing_guarantee.value == "at_least_once"
    untouched = object()
    message = type("Message", (), {"value": untouched})()
    assert agent.channel.schema.loads_value(app, message) is untouched


def test_no_agent_uses_what_acknowledges_early() -> None:
    for path in [*ROOT.glob("services/streaming/*.py"), *ROOT.glob("services/counters/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert ".take(" not in text and ".noack(" not in text, path


# 2 -- the body never raises -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["raise_in_apply", pytest.param("raise_in_prepare", marks=pytest.mark.faults)]
)
def test_an_unknown_exception_ends_the_process_at_once_and_nothing_is_committed_past_it(
    pipeline: Pipeline, fault: str
) -> None:
    pipeline.send(*usages([f"good-{n}" for n in range(30)]))
    pipeline.worker().start()
    pipeline.await_quiet()
    pipeline.workers[0].kill()
    [(topic, partition, bomb)] = pipeline.send(*usages(["bomb"]))
    pipeline.send(*usages([f"after-{n}" for n in range(30)]))
    broken = pipeline.worker(command=faulty(fault)).start()
    assert broken.ended() == 70
    assert "RuntimeError" in broken.log()
    assert "nobody foresaw this" not in broken.log().replace("RuntimeError('nobody foresaw this')", "")
    assert pipeline.committed()[topic, partition] == bomb
    position = "SELECT next_offset FROM partition_offsets WHERE topic = %s AND partition = %s"
    assert pipeline.query(position, topic, partition) == [(bomb,)]
    pipeline.workers.remove(broken)
    pipeline.workers[0].start()
    prove(pipeline)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_unknown_exceptions_at_any_record_under_load_lose_nothing(campaign: Campaign) -> None:
    """At the first record that a process gets, at every thousandth, and at the last there is."""
    pipeline = campaign.pipeline
    worker = pipeline.worker(command=faulty("raise_at"), CHUNK_RECORDS_MAX="150")
    with campaign.load(some_seed(), 60_000, seconds=60):
        for number in (1, 1000, 2000, 3000, 4000, 5000):
            for step in ("prepare", "apply"):
                fail_at(campaign, worker, step, number)
    worker.start(RAISE_AT=str(sum(pipeline.lag().values())), RAISE_IN="apply")
    assert worker.ended(60) == 70, worker.log()[-3000:]
    pipeline.workers.remove(worker)
    pipeline.worker().start()
    campaign.prove()


def fail_at(campaign: Campaign, worker: Worker, step: str, number: int) -> None:
    """Start a worker that fails at its ``number``-th record; Kafka is never told more than PostgreSQL has."""
    pipeline = campaign.pipeline
    worker.start(RAISE_AT=str(number), RAISE_IN=step)
    assert worker.ended(60) == 70, worker.log()[-3000:]
    campaign.kills += 1
    stored = {
        (row[0], row[1]): row[2]
        for row in pipeline.query("SELECT topic, partition, next_offset FROM partition_offsets")
    }
    assert all(offset <= stored[tp] for tp, offset in pipeline.committed().items())


@pytest.fixture
def postgres_proxy(pipeline: Pipeline) -> Iterator[tuple[TcpProxy, str]]:
    parts = urlsplit(pipeline.dsn)
    with TcpProxy(f"{parts.hostname}:{parts.port}") as proxy:
        user = parts.netloc.rpartition("@")[0]
        yield proxy, urlunsplit(parts._replace(netloc=f"{user}@{proxy.bootstrap}"))


def test_postgresql_away_is_waited_for_with_its_name_in_the_health_and_without_loss(
    pipeline: Pipeline, postgres_proxy: tuple[TcpProxy, str]
) -> None:
    proxy, dsn = postgres_proxy
    proxy.cut()
    worker = pipeline.worker(POSTGRES_DSN=dsn).start()
    until(
        lambda: "PostgreSQL" in reason(worker, "stream"), "the wait for PostgreSQL at start", 30, worker.log
    )
    assert worker.health()["status"] == "unhealthy"
    proxy.restore()
    worker.await_healthy()
    pipeline.send(*spread("before"))
    pipeline.await_quiet()
    for number in range(2):
        proxy.cut()
        pipeline.send(*spread(f"during-{number}"))
        until(lambda: "PostgreSQL" in reason(worker, "stream"), "the wait for PostgreSQL", 30, worker.log)
        assert worker.health()["status"] == "unhealthy"
        time.sleep(SESSION_TIMEOUT_S * 1.3 if number else 0.2)
        proxy.restore()
        pipeline.await_quiet()
    worker.await_healthy()
    prove(pipeline)


@pytest.mark.faults
def test_a_broker_away_is_waited_for_with_its_name_in_the_health_and_without_loss(pipeline: Pipeline) -> None:
    with KafkaProxy(pipeline.kafka) as proxy:
        proxy.cut()
        worker = pipeline.worker(KAFKA_BOOTSTRAP=proxy.bootstrap).start()
        until(lambda: "Kafka" in reason(worker, "stream"), "the wait for Kafka at start", 30, worker.log)
        assert worker.health()["status"] == "unhealthy"
        proxy.restore()
        worker.await_healthy()
        pipeline.send(*spread("before"))
        pipeline.await_quiet()
        proxy.cut()
        pipeline.send(*spread("during"))
        until(lambda: "kafka" in unhealthy(worker), "the wait for Kafka", 30, worker.log)
        time.sleep(SESSION_TIMEOUT_S * 1.3)
        proxy.restore()
        pipeline.await_quiet()
        worker.await_healthy()
        prove(pipeline)
        worker.kill()


@pytest.mark.faults
def test_a_worker_stops_within_ten_seconds_whatever_is_away(
    pipeline: Pipeline, postgres_proxy: tuple[TcpProxy, str]
) -> None:
    postgres, dsn = postgres_proxy
    with KafkaProxy(pipeline.kafka) as kafka:
        for away in (None, postgres, kafka):
            worker = pipeline.worker(POSTGRES_DSN=dsn, KAFKA_BOOTSTRAP=kafka.bootstrap)
            worker.start().await_healthy()
            if away is not None:
                away.cut()
                pipeline.send(*spread(f"unread-{id(away)}"))
                until(lambda worker=worker: worker.health()["status"] == "unhealthy", "the cut seen", 30)
            began = time.monotonic()
            assert worker.stop() == 0
            assert time.monotonic() - began < 10
            if away is not None:
                away.restore()
    pipeline.worker().start()
    prove(pipeline)


def reason(worker: object, check: str) -> str:
    return str(worker.health()["checks"].get(check, {}).get("reason", ""))  # type: ignore[attr-defined]


def unhealthy(worker: object) -> list[str]:
    checks = worker.health()["checks"]  # type: ignore[attr-defined]
    return [name for name, check in checks.items() if check["status"] == "unhealthy"]


# 3 -- a gap stops its partition -------------------------------------------------------------------------

STOPPED = "SELECT topic, partition, next_offset FROM partition_offsets WHERE halted IS NOT NULL"


def test_a_gap_stops_its_partition_with_an_alarm_and_the_others_go_on(pipeline: Pipeline) -> None:
    coordinates = pipeline.send(*spread("first"))
    worker = pipeline.worker().start()
    pipeline.await_quiet()
    worker.kill()
    topic, number, _ = coordinates[0]
    before = pipeline.query(
        "SELECT next_offset FROM partition_offsets WHERE topic = %s AND partition = %s", topic, number
    )[0][0]
    missed = pipeline.send(*spread("missed"))
    lost = [offset for place, part, offset in missed if (place, part) == (topic, number)][:4]
    pipeline.admin.delete_records([TopicPartition(topic, number, lost[-1] + 1)])[
        TopicPartition(topic, number)
    ].result()
    worker.start()
    until(lambda: "offset_gap" in reason(worker, "stream"), "the halt", 30, worker.log)
    assert worker.health()["status"] == "degraded"
    assert f"{topic}/{number}" in reason(worker, "stream")
    others = {tp for tp in pipeline.lag() if tp != (topic, number)}
    until(lambda: not any(pipeline.lag()[tp] for tp in others), "the other partitions", 30, worker.log)
    halted = worker.metrics()
    assert (
        halted[f'tidemeter_partition_halted{{partition="{number}",reason="offset_gap",topic="{topic}"}}'] == 1
    )
    assert pipeline.query(STOPPED) == [(topic, number, before)]
    until(lambda: bool(pipeline.ops("partition_halted")), "the alarm", 30, worker.log)
    [alarm] = pipeline.ops("partition_halted")
    assert alarm["subject_id"].startswith(f"{topic}/{number}/")
    assert alarm["attributes"]["reason"] == "offset_gap"
    # Neither a restart nor an operator who says go on makes the worker pass over what is missing.
    worker.kill()
    worker.start()
    until(lambda: "offset_gap" in reason(worker, "stream"), "the halt after a restart", 30, worker.log)
    assert f"{topic}/{number} goes on" in tidemeter(pipeline, "resume", "--partition", f"{topic}/{number}")
    until(lambda: "partition resumed" in worker.log(), "the resumption", 30, worker.log)
    until(lambda: bool(pipeline.query(STOPPED)), "the halt after resuming", 30, worker.log)
    assert pipeline.query(STOPPED) == [(topic, number, before)]
    assert pipeline.committed()[topic, number] <= before


def test_a_log_that_ends_below_the_stored_position_stops_instead_of_passing_for_redelivered(
    pipeline: Pipeline,
) -> None:
    """As after a topic was created anew: its first offsets were all counted before, in another life."""
    [(topic, number, _), *_] = pipeline.send(*usages([f"before-{n}" for n in range(20)]))
    worker = pipeline.worker().start()
    pipeline.await_quiet()
    worker.kill()
    with pipeline.database() as db:
        db.execute(
            "UPDATE partition_offsets SET next_offset = next_offset + 999 "
            "WHERE topic = %s AND partition = %s",
            (topic, number),
        )
    pipeline.send(*usages([f"after-{n}" for n in range(20)]))
    worker.start()
    until(lambda: "log_truncated" in reason(worker, "stream"), "the halt", 30, worker.log)
    assert [row[:2] for row in pipeline.query(STOPPED)] == [(topic, number)]
    until(lambda: bool(pipeline.ops("partition_halted")), "the alarm", 30, worker.log)


# 4 -- the group's offset is never believed when it is ahead ---------------------------------------------


def test_a_group_offset_ahead_of_postgresql_is_moved_back_and_nothing_is_lost(pipeline: Pipeline) -> None:
    pipeline.send(*spread("first"))
    worker = pipeline.worker(None).start()
    pipeline.await_quiet()
    assert worker.stop() == 0
    pipeline.send(*spread("second"))
    commit_for_group(pipeline.admin, pipeline.log_bounds()[1])
    worker.start()
    until(lambda: pipeline.processed() == len(pipeline.log), "every record", 30, worker.log)
    prove(pipeline)


def test_rewinding_the_group_by_any_amount_changes_nothing(pipeline: Pipeline) -> None:
    pipeline.send(*spread("first", each=20))
    worker = pipeline.worker(None).start()
    pipeline.await_quiet()
    starts, ends = pipeline.log_bounds()
    before = pipeline.assert_exact()
    for share in (0.0, 0.83):
        assert worker.stop() == 0
        commit_for_group(
            pipeline.admin, {tp: starts[tp] + int(share * (end - starts[tp])) for tp, end in ends.items()}
        )
        worker.start()
        pipeline.await_quiet()
        assert pipeline.assert_exact() == before


# 5 -- a killed worker's partitions move in seconds ------------------------------------------------------


def test_the_successor_of_a_killed_static_member_goes_on_within_its_session(pipeline: Pipeline) -> None:
    session_s = 8
    worker = pipeline.worker("patient", SESSION_TIMEOUT_SECONDS=str(session_s)).start()
    pipeline.send(*spread("first"))
    pipeline.await_quiet()
    pipeline.send(*spread("second"))
    worker.kill()
    worker.start()
    until(lambda: worker.health()["status"] != "down", "the new process", 30)
    began = time.monotonic()
    pipeline.await_quiet()
    assert time.monotonic() - began < session_s, "the successor waited for the dead member's session"
    prove(pipeline)


@pytest.mark.faults
def test_the_partitions_of_a_killed_worker_move_to_the_other(pipeline: Pipeline) -> None:
    first, second = pipeline.worker("w1").start(), pipeline.worker("w2").start()
    for worker in (first, second):
        worker.await_healthy()
    until(lambda: partitions(first) == partitions(second) == 6, "half of the partitions each", 30)
    pipeline.send(*spread("first"))
    first.kill()
    pipeline.send(*spread("second"))
    pipeline.await_quiet()
    assert partitions(second) == 12
    prove(pipeline)


def partitions(worker: object) -> int:
    text = reason(worker, "stream").partition(" ")[0]
    return int(text) if text.isdigit() else 0


# 6 -- no other listener ---------------------------------------------------------------------------------


def test_a_worker_listens_on_its_observation_port_on_loopback_and_nowhere_else(pipeline: Pipeline) -> None:
    worker = pipeline.worker(WATCHDOG_SECONDS="1").start().await_healthy()
    processes = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    listening = [
        tuple(connection.laddr)
        for process in processes
        for connection in process.net_connections("all")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", worker.port)]
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", 6066), timeout=1):
        pass
    time.sleep(3)
    assert worker.alive(), "the watchdog ended an idle worker"


# 7 -- the watchdog --------------------------------------------------------------------------------------


def test_the_watchdog_ends_a_stuck_worker_and_its_successor_loses_nothing(pipeline: Pipeline) -> None:
    [(topic, partition, bomb)] = pipeline.send(*usages(["bomb"]))
    worker = pipeline.worker(command=faulty("block_in_apply"), WATCHDOG_SECONDS="3").start()
    assert worker.ended(40) == 75
    assert "no progress" in worker.log()
    assert pipeline.committed().get((topic, partition), bomb) == bomb
    pipeline.workers.remove(worker)
    pipeline.worker().start()
    prove(pipeline)


def tidemeter(pipeline: Pipeline, *arguments: str) -> str:
    """Run a ``tidemeter`` command against this pipeline."""
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "TIDEMETER_KAFKA_BOOTSTRAP": pipeline.kafka,
            "TIDEMETER_POSTGRES_DSN": pipeline.dsn,
            "TIDEMETER_DATA_DIR": str(pipeline.directory),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
