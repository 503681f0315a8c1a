"""``tidemeter offsets`` and Kafka's own tool on a live group with real workers: what they move and refuse."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner, Result

from services.cli.common import ATTENTION, MISUSED
from services.cli.main import app
from services.cli.offsets import TOPICS
from services.counters.conservation import conservation
from services.embedded import kafka_tool
from services.streaming import groups
from services.streaming.chunks import Partition
from tests.fault.traffic import configure, traffic
from tests.pipeline import (
    GROUP,
    SESSION_TIMEOUT_S,
    USAGE,
    Pipeline,
    Worker,
    await_no_members,
    commit_for_group,
    trim_topics,
    until,
)

NOW_S = int(time.time())


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    """Logs that are empty, and do not begin at 0."""
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for topic in USAGE:
        for partition in range(4):
            producer.produce(topic, b"older", partition=partition)
    assert producer.flush(30) == 0
    trim_topics(kafka_bootstrap)
    await_no_members(AdminClient({"bootstrap.servers": kafka_bootstrap}))
    yield from opened(kafka_bootstrap, postgres_dsn, tmp_path)


def opened(kafka: str, dsn: str, directory: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(kafka, dsn, directory)
    configure(pipeline)
    try:
        yield pipeline
    finally:
        pipeline.close()


def feed(pipeline: Pipeline, seed: int, events: int = 600) -> None:
    pipeline.send_raw(traffic(seed, events, NOW_S))


@pytest.fixture
def between(pipeline: Pipeline) -> datetime:
    """A time between two batches of records; the first is there."""
    feed(pipeline, 1)
    time.sleep(0.1)
    return datetime.now(UTC)


@pytest.fixture
def counted(pipeline: Pipeline, between: datetime) -> Pipeline:
    """Two batches, and what a worker that went past them leaves behind: positions, and the same committed."""
    time.sleep(0.1)
    feed(pipeline, 2)
    starts, ends = pipeline.log_bounds()
    for (topic, partition), end in ends.items():
        stand(pipeline, topic, partition, starts[topic, partition], end)
    commit_for_group(pipeline.admin, ends)
    return pipeline


def stand(
    pipeline: Pipeline, topic: str, partition: int, start: int, position: int, group: str = GROUP
) -> None:
    pipeline.query(
        "INSERT INTO partition_offsets (consumer, topic, partition, start_offset, next_offset) "
        "VALUES (%s, %s, %s, %s, %s) RETURNING 1",
        *(group, topic, partition, start, position),
    )


@pytest.fixture
def worker(pipeline: Pipeline, between: datetime) -> Worker:
    """A worker that counted two batches and was stopped."""
    time.sleep(0.5)
    feed(pipeline, 2)
    worker = pipeline.worker(None).start()
    pipeline.await_quiet()
    pipeline.settle_deltas()
    assert worker.stop() == 0
    return worker


def tidemeter(pipeline: Pipeline, *arguments: str) -> Result:
    environment = {
        "TIDEMETER_KAFKA_BOOTSTRAP": pipeline.kafka,
        "TIDEMETER_POSTGRES_DSN": pipeline.dsn,
        "TIDEMETER_DATA_DIR": str(pipeline.directory),
    }
    return CliRunner().invoke(app, ["offsets", *arguments], env=environment)


def reset(pipeline: Pipeline, *arguments: str) -> Result:
    return tidemeter(pipeline, "reset", "--group", GROUP, *arguments)


def steps(result: Result) -> dict[tuple[str, int], dict[str, Any]]:
    """The plan of ``reset --json``."""
    assert result.stdout, result.stderr
    return {(one["topic"], one["partition"]): one for one in json.loads(result.stdout)["partitions"]}


def shown(pipeline: Pipeline) -> tuple[dict[str, Any], int]:
    """What ``show`` says of the counters, and its exit status."""
    result = tidemeter(pipeline, "show", "--group", GROUP, "--json")
    [group] = json.loads(result.stdout)["groups"]
    return group, result.exit_code


def stock_rows(pipeline: Pipeline) -> dict[tuple[str, int], list[str]]:
    """Committed offset, end of the log and lag, as Kafka's own tool shows them."""
    return {
        (row[1], int(row[2])): row[3:6]
        for row in (line.split() for line in stock(pipeline, "--describe").splitlines())
        if row[:1] == [GROUP]
    }


def stock(pipeline: Pipeline, *arguments: str) -> str:
    """Kafka's own tool, on the counters group."""
    command = kafka_tool(
        "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
        *("--bootstrap-server", pipeline.kafka, "--group", GROUP, *arguments),
    )
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def books(pipeline: Pipeline) -> dict[str, list[Any]]:
    """Everything that counting leaves in PostgreSQL, row by row."""
    tables = {
        "deltas": "to_jsonb(t)",
        "buckets": "to_jsonb(t)",
        "items": "to_jsonb(t)",
        "unique_values": "to_jsonb(t)",
        "partition_accounts": "to_jsonb(t)",
        "partition_offsets": "to_jsonb(t) - 'updated_at'",
        "parked_records": "to_jsonb(t)",
        "adjustments": "to_jsonb(t)",
        "seen_current": "to_jsonb(t)",
        "outbox": "to_jsonb(t)",
    }
    return {
        table: pipeline.query(f"SELECT ({columns})::text FROM {table} t ORDER BY 1")
        for table, columns in tables.items()
    }


def redelivered(worker: Worker) -> float:
    return worker.metrics().get("tidemeter_redelivered_records_total", 0.0)


def goes_on_unchanged(pipeline: Pipeline, worker: Worker, before: dict[str, list[Any]], again: int) -> None:
    """Start the worker: it reads ``again`` records again, and nothing changes."""
    worker.start().await_healthy()
    until(lambda: redelivered(worker) >= again, f"{again} records read again", 30, worker.log)
    assert redelivered(worker) == again
    pipeline.await_quiet()
    assert books(pipeline) == before
    with pipeline.database() as db:
        assert conservation(db).gap == 0
    pipeline.assert_exact()
    assert worker.stop() == 0


# Rewinding ----------------------------------------------------------------------------------------------


def test_rewinding_the_live_group_by_any_amount_changes_nothing(
    pipeline: Pipeline, worker: Worker, between: datetime
) -> None:
    before = books(pipeline)
    seen = []
    for target in (
        ["--to-earliest"],
        ["--to-datetime", between.isoformat()],
        ["--by-duration"],
        ["--shift-by", "-7"],
        ["--to-current"],
    ):
        if target == ["--by-duration"]:
            target.append(f"PT{(datetime.now(UTC) - between).total_seconds():.3f}S")
        result = reset(pipeline, *target, "--execute", "--json")
        plan = steps(result)
        moved = {tp: one["to"] for tp, one in plan.items() if one["to"] is not None}
        known = pipeline.committed()
        assert {tp: known.get(tp) for tp in moved} == moved
        again = sum(one["read_again"] for one in plan.values())
        seen.append(again)
        assert books(pipeline) == before
        goes_on_unchanged(pipeline, worker, before, again)
        assert shown(pipeline)[1] == 0
    assert seen[0] == len(pipeline.log)
    assert 0 < seen[1] == seen[2] < seen[0]
    assert 0 < seen[3] <= 12 * 7
    assert seen[4] == 0


def test_rewinding_with_kafkas_own_tool_changes_nothing(pipeline: Pipeline, worker: Worker) -> None:
    before = books(pipeline)
    topics = [word for topic in USAGE for word in ("--topic", topic)]
    _, ends = pipeline.log_bounds()
    for target in (("--to-earliest",), ("--by-duration", "PT1H"), ("--shift-by", "-7")):
        stock(pipeline, "--reset-offsets", *topics, *target, "--execute")
        stands = pipeline.committed()
        again = sum(end - stands[tp] for tp, end in ends.items() if tp in stands)
        assert again > 0
        goes_on_unchanged(pipeline, worker, before, again)


def test_rewinding_to_offset_0_reads_nothing_again_and_changes_nothing(
    empty_kafka: str, postgres_dsn: str, tmp_path: Path
) -> None:
    """Faust takes a committed offset of 0 for nothing, and a worker begins at its position; a plan knows."""
    for pipeline in opened(empty_kafka, postgres_dsn, tmp_path):
        feed(pipeline, 1)
        worker = pipeline.worker(None).start()
        pipeline.await_quiet()
        pipeline.settle_deltas()
        assert worker.stop() == 0
        before = books(pipeline)
        plan = steps(reset(pipeline, "--to-earliest", "--execute", "--json"))
        assert {one["to"] for one in plan.values()} == {0}
        assert set(pipeline.committed().values()) == {0}
        assert sum(one["read_again"] for one in plan.values()) == 0
        goes_on_unchanged(pipeline, worker, before, 0)


def test_kafkas_own_tool_shows_our_reset(counted: Pipeline) -> None:
    plan = steps(reset(counted, "--topic", "usage.v3:0,1", "--shift-by", "-5", "--execute", "--json"))
    assert [one["read_again"] for one in plan.values()] == [5, 5]
    rows = stock_rows(counted)
    for tp, one in plan.items():
        assert rows[tp] == [str(one["to"]), str(one["position"]), "5"]
    assert rows["usage.v3", 2][2] == "0"


# Records that are gone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["a new one", "the one that counted them"])
def test_a_group_offset_whose_records_are_gone_is_no_lag_for_ever(pipeline: Pipeline, database: str) -> None:
    """Nothing comes that could be committed past it: the position is told to the group at once."""
    worker = pipeline.worker(None)
    old, _ = pipeline.log_bounds()
    feed(pipeline, 1)
    if database != "a new one":
        worker.start()
        pipeline.await_quiet()
        assert worker.stop() == 0
    trim_topics(pipeline.kafka, USAGE)
    gone, ends = pipeline.log_bounds()
    assert gone == ends and all(old[tp] < start for tp, start in gone.items())
    commit_for_group(pipeline.admin, old)
    worker.start().await_healthy()
    until(lambda: pipeline.committed() == ends, "the positions committed", 30, worker.log)
    assert stock_rows(pipeline) == {tp: [str(end), str(end), "0"] for tp, end in ends.items()}
    assert shown(pipeline)[1] == 0
    if database == "a new one":
        pipeline.log.clear()
    feed(pipeline, 2)
    pipeline.await_quiet()
    pipeline.assert_exact()


def test_records_that_went_before_they_were_read_halt_also_when_none_follows(
    pipeline: Pipeline, worker: Worker
) -> None:
    before = pipeline.committed()
    feed(pipeline, 3)
    trim_topics(pipeline.kafka, USAGE)
    starts, _ = pipeline.log_bounds()
    worker.start()
    halted = "SELECT topic, partition, next_offset FROM partition_offsets WHERE halted = 'offset_gap'"
    lost = {(*tp, before[tp]) for tp, start in starts.items() if start > before[tp]}
    until(lambda: set(pipeline.query(halted)) == lost, "the halts", 30, worker.log)
    until(lambda: worker.health()["status"] == "degraded", "degraded", 30, worker.log)
    assert worker.stop() == 0
    assert pipeline.committed() == before


# Plans --------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing_and_leaves_no_trace(counted: Pipeline) -> None:
    before = counted.committed()
    result = reset(counted, "--to-earliest")
    assert result.exit_code == 0
    assert "nothing was changed; --execute does it" in result.stderr
    row = next(line.split() for line in result.stdout.splitlines() if "usage.v3/0" in line)
    start, end = (bounds["usage.v3", 0] for bounds in counted.log_bounds())
    assert row == ["usage.v3/0", str(end), str(start), str(end), str(end - start)]
    assert counted.committed() == before
    assert counted.query("SELECT * FROM audit_log") == []


def test_a_reset_that_was_done_is_one_row_of_the_audit_log(counted: Pipeline) -> None:
    assert reset(counted, "--topic", "usage.v3:1", "--shift-by", "-3", "--execute").exit_code == 0
    [[actor, action, subject, details]] = counted.query(
        "SELECT actor, action, subject, details FROM audit_log"
    )
    end = counted.log_bounds()[1]["usage.v3", 1]
    assert actor.startswith("cli:")
    assert (action, subject) == ("offsets.reset", GROUP)
    assert details == {
        "choice": "--shift-by -3",
        "partitions": [{"topic": "usage.v3", "partition": 1, "from": end, "to": end - 3}],
    }
    again = reset(counted, "--topic", "usage.v3:1", "--to-offset", str(end - 3), "--execute")
    assert "0 of 1 partitions to move" in again.stderr
    assert len(counted.query("SELECT 1 FROM audit_log")) == 1


def test_nothing_moves_above_the_position(counted: Pipeline) -> None:
    feed(counted, 3, 200)  # nobody counts them
    before = counted.committed()
    result = reset(counted, "--shift-by", "1", "--execute")
    assert result.exit_code == ATTENTION
    assert "a worker would move it back" in result.stdout
    assert counted.committed() == before
    assert counted.query("SELECT * FROM audit_log") == []


def test_a_time_after_the_last_record_is_said_and_changes_nothing(counted: Pipeline) -> None:
    before = counted.committed()
    later = datetime.now(UTC) + timedelta(hours=1)
    result = reset(counted, "--to-datetime", later.isoformat(), "--execute")
    assert result.exit_code == ATTENTION
    assert result.stdout.count(f"no record at or after {later:%Y-%m-%dT%H:%M}") == 12
    assert counted.committed() == before


def test_a_partition_without_a_record_since_then_stays_beside_those_that_move(counted: Pipeline) -> None:
    now = datetime.now(UTC)
    time.sleep(0.05)
    [(topic, number, offset)] = counted.send_raw([("usage.v3", b"k", b"no record", [], None)])
    counted.query(
        "UPDATE partition_offsets SET next_offset = %s WHERE (topic, partition) = (%s, %s) RETURNING 1",
        *(offset + 1, topic, number),
    )
    commit_for_group(counted.admin, {(topic, number): offset + 1})
    before = counted.committed()
    result = reset(counted, "--to-datetime", now.isoformat(), "--execute", "--json")
    assert result.exit_code == 0
    assert {tp for tp, one in steps(result).items() if one["left"] == "no_record"} == before.keys() - {
        (topic, number)
    }
    assert counted.committed() == before | {(topic, number): offset}


def test_a_time_before_the_log_is_said_with_the_earliest_and_changes_nothing(counted: Pipeline) -> None:
    before = counted.committed()
    result = reset(counted, "--to-datetime", "2020-02-29T12:00:00+01:00", "--execute")
    assert result.exit_code == ATTENTION
    [earliest, *_] = re.findall(r"the earliest record is of (\S+): --to-earliest", result.stdout)
    assert abs(datetime.fromisoformat(earliest) - datetime.now(UTC)) < timedelta(minutes=5)
    assert counted.committed() == before


# Who holds it -------------------------------------------------------------------------------------------


def test_a_group_with_a_live_worker_is_refused_with_the_member_that_holds_it(
    pipeline: Pipeline, worker: Worker
) -> None:
    worker.start().await_healthy()
    before = pipeline.committed()
    result = reset(pipeline, "--to-earliest", "--execute", "--wait", "0.6")
    assert result.exit_code == MISUSED
    assert "stop its workers first" in result.stderr
    assert re.search(r"faust\S* at 127\.0\.0\.1, with 12 partitions", result.stderr)
    assert result.stdout == ""
    planned = reset(pipeline, "--to-earliest")
    assert planned.exit_code == ATTENTION
    assert "12 of 12" in planned.stderr and "not yet: " in planned.stderr
    group, _ = shown(pipeline)
    assert group["state"] == "Stable"
    assert [member["partitions"] for member in group["members"]] == [12]
    # As when a worker comes back between the look and the act: Kafka itself refuses, partition by partition.
    moves = {Partition(*tp): 0 for tp in before}
    assert groups.commit(pipeline.admin, GROUP, moves) == dict.fromkeys(
        moves, "UNKNOWN_MEMBER_ID: the group has a member again"
    )
    assert pipeline.committed() == before
    assert pipeline.query("SELECT * FROM audit_log") == []


def test_waiting_outlasts_the_session_of_a_worker_that_was_killed(pipeline: Pipeline, worker: Worker) -> None:
    named = pipeline.worker("w1").start().await_healthy()
    named.kill()
    began = time.monotonic()
    refused = reset(pipeline, "--shift-by", "-2", "--execute")
    assert refused.exit_code == MISUSED
    assert f"{GROUP}-w1 at 127.0.0.1" in refused.stderr
    assert "until its session ends" in refused.stderr
    done = reset(pipeline, "--topic", "usage.v3:0", "--shift-by", "-2", "--execute", "--wait", "30")
    assert done.exit_code == 0
    assert f"waiting until {GROUP} is empty: {GROUP}-w1" in done.stderr
    assert "1 of 1 partitions moved" in done.stderr
    assert time.monotonic() - began < SESSION_TIMEOUT_S + 10
    assert shown(pipeline)[0]["state"] == "Empty"


# Failures and findings ----------------------------------------------------------------------------------


def test_a_partition_that_kafka_refuses_is_named_and_the_others_are_moved(counted: Pipeline) -> None:
    stand(counted, "usage.v3", 99, 0, 0)
    result = reset(counted, "--topic", "usage.v3:0,99", "--to-earliest", "--execute", "--json")
    assert result.exit_code == ATTENTION
    plan = steps(result)
    assert plan["usage.v3", 99]["error"] == "UNKNOWN_TOPIC_OR_PART"
    assert plan["usage.v3", 0]["error"] is None
    assert "error: usage.v3/99: UNKNOWN_TOPIC_OR_PART" in result.stderr
    assert "1 of 2 partitions moved" in result.stderr
    assert counted.committed()["usage.v3", 0] == counted.log_bounds()[0]["usage.v3", 0]
    asked, failed = counted.query("SELECT action, details->'partitions' FROM audit_log ORDER BY audit_id")
    assert (asked[0], len(asked[1])) == ("offsets.reset", 2)
    assert failed == (
        "offsets.reset.failed",
        [{"topic": "usage.v3", "partition": 99, "error": "UNKNOWN_TOPIC_OR_PART"}],
    )


def test_a_healthy_group_is_shown_with_its_positions_and_its_lag(counted: Pipeline) -> None:
    feed(counted, 3, 200)
    group, status = shown(counted)
    assert status == 0
    assert (group["group"], group["state"], group["members"]) == (GROUP, "Empty", [])
    starts, ends = counted.log_bounds()
    lag = counted.lag()
    for one in group["partitions"]:
        tp = one["topic"], one["partition"]
        assert (one["log_start"], one["log_end"], one["lag"]) == (starts[tp], ends[tp], lag[tp])
        assert one["committed"] == one["position"] == ends[tp] - lag[tp]
        assert (one["halted"], one["problems"]) == (None, [])
    assert sum(lag.values()) == 200
    table = tidemeter(counted, "show", "--group", GROUP)
    assert f"{GROUP}: Empty" in table.stdout and "usage.v1/3" in table.stdout


def test_what_does_not_fit_together_is_named_and_cured_by_a_reset_to_the_positions(
    pipeline: Pipeline, worker: Worker
) -> None:
    feed(pipeline, 3, 300)
    commit_for_group(pipeline.admin, pipeline.log_bounds()[1])
    group, status = shown(pipeline)
    assert status == ATTENTION
    assert {problem for one in group["partitions"] for problem in one["problems"]} == {
        "committed_above_position"
    }
    assert "committed_above_position: Kafka remembers more" in tidemeter(pipeline, "show").stderr
    assert reset(pipeline, "--to-current", "--execute").exit_code == 0
    assert shown(pipeline)[1] == 0
    worker.start()
    pipeline.await_quiet()
    pipeline.assert_exact()


def test_positions_outside_of_the_log_and_halts_are_named(counted: Pipeline) -> None:
    _, ends = counted.log_bounds()
    feed(counted, 3, 300)
    lost = TopicPartition("usage.v3", 0, ends["usage.v3", 0] + 1)
    counted.admin.delete_records([lost])[lost].result()
    counted.query("UPDATE partition_offsets SET next_offset = 9999999 WHERE partition = 1 RETURNING 1")
    counted.query("UPDATE partition_offsets SET halted = 'too_many_parked' WHERE partition = 2 RETURNING 1")
    group, status = shown(counted)
    assert status == ATTENTION
    found = {(one["topic"], one["partition"]): one for one in group["partitions"]}
    assert found["usage.v3", 0]["problems"] == ["position_below_log"]
    assert found["usage.v3", 1]["problems"] == ["position_above_log"]
    assert (found["usage.v3", 2]["halted"], found["usage.v3", 2]["problems"]) == ("too_many_parked", [])
    assert found["usage.v3", 3]["problems"] == []


@pytest.mark.parametrize("group", list(TOPICS))
def test_every_live_group_can_be_reset(pipeline: Pipeline, group: str) -> None:
    _, ends = pipeline.log_bounds(TOPICS[group])
    for (topic, partition), end in ends.items():
        stand(pipeline, topic, partition, 0, end, group)
    done = tidemeter(pipeline, "reset", "--group", group, "--to-current", "--execute")
    assert done.exit_code == 0
    known = groups.committed(pipeline.admin, group)
    assert {Partition(*tp): end for tp, end in ends.items()}.items() <= known.items()
    assert tidemeter(pipeline, "show", "--group", group).exit_code == 0


def test_a_group_that_kafka_does_not_know_is_dead_and_has_committed_nothing(pipeline: Pipeline) -> None:
    assert groups.describe(pipeline.admin, "nobody") == groups.Group("Dead")
    assert groups.committed(pipeline.admin, "nobody") == {}


def test_every_live_group_is_shown_also_one_that_never_ran(pipeline: Pipeline) -> None:
    shown = json.loads(tidemeter(pipeline, "show", "--json").stdout)["groups"]
    assert {one["group"]: {p["topic"] for p in one["partitions"]} for one in shown} == {
        GROUP: set(USAGE),
        "tidemeter-pusher": {"deltas.v1"},
        "tidemeter-dispatcher": {"stripe_webhooks.v1"},
        "tidemeter-notifier": {"ops.v1"},
    }
    assert {p["position"] for one in shown for p in one["partitions"]} == {None}
