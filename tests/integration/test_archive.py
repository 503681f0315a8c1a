"""The archiver against a real Kafka and PostgreSQL: what is in the files is what was on the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition

from services.archive.files import Archive, NotHeld
from services.archive.writing import GROUP, LOCK_ID, AnotherWorks, Archiver, Store, accept_holes
from services.streaming.chunks import Partition
from services.wire.settings import Settings, load_settings
from tests.archiving import assert_as_the_log, everything, log_of, send_any
from tests.pipeline import ROOT, USAGE, Pipeline, Worker, trim_topics, until

ARCHIVE = [sys.executable, "-m", "services.cli.main", "archive"]
PARTITIONS = [Partition(topic, number) for topic in USAGE for number in range(4)]
TP = Partition("usage.v3", 0)


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    try:
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "archive")


def settings_of(pipeline: Pipeline, url: str, **changes: Any) -> Settings:
    chosen = {"archive_url": url, "archive_file_seconds": 3600.0, **changes}
    return load_settings(kafka_bootstrap=pipeline.kafka, postgres_dsn=pipeline.dsn, **chosen)


def send(pipeline: Pipeline, number: int, seed: int = 1) -> None:
    """Records of all three topics."""
    send_any(pipeline.kafka, USAGE, number, seed)


def send_to(pipeline: Pipeline, tp: Partition, number: int) -> int:
    """Records of one partition; the log's end."""
    producer = Producer({"bootstrap.servers": pipeline.kafka})
    for one in range(number):
        producer.produce(tp.topic, f"{one}".encode(), partition=tp.partition)
    assert producer.flush(30) == 0
    return int(pipeline.log_bounds([tp.topic])[1][tuple(tp)])


def delete_before(pipeline: Pipeline, tp: Partition, offset: int) -> None:
    """As retention does."""
    [done] = pipeline.admin.delete_records([TopicPartition(*tp, offset)]).values()
    done.result()


def look(settings: Settings, **options: Any) -> Any:
    """One look at everything, by an archiver that has just started."""
    archiver = Archiver(settings)
    try:
        return archiver.look(everything=True, **options)
    finally:
        archiver.close()


def assert_whole(pipeline: Pipeline, url: str) -> None:
    """All three topics are in the archive, and nothing else is."""
    assert_as_the_log(pipeline.kafka, Store(url), PARTITIONS)


def group_offsets(pipeline: Pipeline) -> dict[tuple[str, int], int]:
    result = pipeline.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(GROUP)])[GROUP].result()
    return {(tp.topic, tp.partition): tp.offset for tp in result.topic_partitions}


def command(pipeline: Pipeline, url: str, *arguments: str, code: int = 0) -> tuple[str, str]:
    variables = {"KAFKA_BOOTSTRAP": pipeline.kafka, "POSTGRES_DSN": pipeline.dsn, "ARCHIVE_URL": url}
    done = subprocess.run(
        [*ARCHIVE, *arguments],
        env={**os.environ, **{f"TIDEMETER_{name}": text for name, text in variables.items()}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_all_three_topics_are_archived_byte_for_byte_and_a_restart_goes_on(
    pipeline: Pipeline, url: str
) -> None:
    settings = settings_of(pipeline, url, archive_file_records=70)
    assert look(settings).records == 0
    send(pipeline, 3000, seed=1)
    assert look(settings).records == 3000
    assert_whole(pipeline, url)
    send(pipeline, 500, seed=2)
    assert look(settings).records == 500
    assert look(settings).records == 0
    assert_whole(pipeline, url)
    assert max(file.last - file.first for tp in PARTITIONS for file in Archive(url).files(tp)) == 69
    assert group_offsets(pipeline) == pipeline.log_bounds()[1]


def test_a_storage_that_is_no_directory_holds_the_same(pipeline: Pipeline) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    send(pipeline, 1000)
    assert look(settings_of(pipeline, url, archive_file_records=50)).records == 1000
    assert_whole(pipeline, url)


def test_a_file_is_cut_when_it_is_full_or_its_oldest_record_is_old_enough(
    pipeline: Pipeline, url: str
) -> None:
    settings = settings_of(pipeline, url, archive_file_records=100, archive_file_seconds=60)
    skew_s = 0.0
    archiver = Archiver(settings, clock=lambda: time.time() + skew_s)
    end = send_to(pipeline, TP, 250)
    assert archiver.look().records == 200
    assert Archive(url).held(TP) == [(end - 250, end - 50)]
    assert archiver.look().records == 0
    skew_s = 61.0
    assert archiver.look().records == 50
    assert archiver.look().records == 0
    archiver.close()
    assert_whole(pipeline, url)


def test_large_records_cut_a_file_before_it_is_full(
    pipeline: Pipeline, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.archive.writing.FILE_BYTES", 1000)
    pipeline.send_raw([("usage.v3", b"same key", b"x" * 400, [], None) for _ in range(9)])
    assert look(settings_of(pipeline, url)).files == 3
    assert_whole(pipeline, url)


def test_offsets_that_never_had_a_record_are_no_hole(pipeline: Pipeline, url: str) -> None:
    """Markers of transactions, in front of records, between them and at the end."""
    settings = settings_of(pipeline, url, archive_file_records=4)
    producer = Producer({"bootstrap.servers": pipeline.kafka, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(30)
    start = pipeline.log_bounds()[1][tuple(TP)]
    for number in range(6):
        producer.begin_transaction()
        for one in range(number % 3 + 1):
            producer.produce(TP.topic, f"{number} {one}".encode(), partition=TP.partition)
        assert producer.flush(30) == 0
        (producer.abort_transaction if number == 3 else producer.commit_transaction)(30)
        if number % 2:
            assert not look(settings).halted
    archive, end = Archive(url), pipeline.log_bounds()[1][tuple(TP)]
    assert archive.held(TP) == [(start, end)]
    found = everything(archive, TP)
    assert [one.value for one in found] == [
        f"{number} {one}".encode() for number in range(6) for one in range(number % 3 + 1)
    ]
    assert end - start == len(found) + 6
    assert not any(end - offset for tp, offset in group_offsets(pipeline).items() if tp == tuple(TP))


def test_records_that_were_deleted_before_they_were_archived_stop_their_partition_alone(
    pipeline: Pipeline, url: str
) -> None:
    settings = settings_of(pipeline, url)
    end = send_to(pipeline, TP, 10)
    look(settings)
    send_to(pipeline, TP, 30)
    delete_before(pipeline, TP, end + 20)
    other = Partition("usage.v1", 1)
    send_to(pipeline, other, 5)
    reason = f"offsets {end} to {end + 19} were deleted before they were archived"
    for _ in range(2):
        summary = look(settings)
        assert {tp: str(halt) for tp, halt in summary.halted.items()} == {TP: reason}
    assert everything(Archive(url), other) == log_of(pipeline.kafka, other)
    assert Archive(url).held(TP) == [(end - 10, end)]
    assert pipeline.query("SELECT producer, count(*) FROM outbox GROUP BY 1") == [(GROUP, 1)]
    _, said = command(pipeline, url, "--once", code=1)
    assert f"usage.v3/0 stopped: {reason}" in said
    [told] = pipeline.ops("archive_halted")
    assert told["subject_id"] == f"usage.v3/0/{end}"
    assert told["attributes"] == {
        "reason": "offset_gap",
        "first_offset": str(end),
        "log_offset": str(end + 20),
    }
    worker = archiver_process(pipeline, url)
    worker.start()
    until(lambda: reason in str(worker.health()), "health names the offsets", 60, worker.log)
    assert worker.health()["status"] == "degraded"
    delete_before(pipeline, TP, end + 25)  # until somebody looks, the hole grows
    assert json.loads(command(pipeline, url, "--accept-hole", "--json")[0]) == [
        {"topic": "usage.v3", "partition": 0, "first": end, "next": end + 25}
    ]
    worker.await_healthy()
    until(lambda: Archive(url).held(TP)[1:] == [(end + 25, end + 30)], "it goes on", 30, worker.log)
    assert (
        worker.metrics()['tidemeter_archive_halted{partition="0",reason="offset_gap",topic="usage.v3"}'] == 0
    )
    assert worker.stop() == 0
    archive = Archive(url)
    assert archive.held(TP) == [(end - 10, end), (end + 25, end + 30)]
    assert everything(archive, TP, [(end + 25, end + 30)]) == log_of(pipeline.kafka, TP)
    with pytest.raises(NotHeld, match=f"offsets {end} to {end + 24} are not"):
        archive.read(TP, end - 10, end + 30)
    assert len(pipeline.ops("archive_halted")) == 1
    assert command(pipeline, url, "--accept-hole")[0] == "no partition stopped at a hole\n"
    [(actor,)] = pipeline.query("SELECT actor FROM audit_log WHERE action = 'archive_hole_accepted'")
    assert actor.startswith("cli:")


def test_a_log_that_ends_below_the_archive_is_another_log_and_cannot_be_accepted(
    pipeline: Pipeline, url: str
) -> None:
    settings = settings_of(pipeline, url)
    end = send_to(pipeline, TP, 3)
    [file] = [Store(url).files(TP) for _ in [look(settings)]][0]
    Path(file.path).rename(Path(file.path).with_name(f"{end:020}-{end + 9:020}.avro"))
    [halt] = look(settings).halted.values()
    assert str(halt) == f"the log ends at offset {end}, the archive at {end + 10}: it is another log"
    with pipeline.database() as db:
        assert accept_holes(settings, db, "a test") == []


def archiver_process(pipeline: Pipeline, url: str, name: str = "archive", **extra: str) -> Worker:
    chosen = {"ARCHIVE_URL": url, "ARCHIVE_FILE_RECORDS": "50", "ARCHIVE_FILE_SECONDS": "1", **extra}
    return pipeline.worker(name, ARCHIVE, **chosen)


def test_of_two_archivers_one_works_and_the_other_says_that_it_waits_and_takes_over(
    pipeline: Pipeline, url: str
) -> None:
    first = archiver_process(pipeline, url, "first").start().await_healthy()
    second = archiver_process(pipeline, url, "second").start()
    send(pipeline, 500, seed=1)
    until(lambda: "another archiver" in str(second.health()), "the second waits", 60, second.log)
    assert second.health()["status"] == "degraded"
    until(lambda: group_offsets(pipeline) == pipeline.log_bounds()[1], "lag 0", 30, first.log)
    assert first.metrics()["tidemeter_archive_oldest_seconds"] == 0
    first.kill()
    send(pipeline, 500, seed=2)
    second.await_healthy()
    until(lambda: group_offsets(pipeline) == pipeline.log_bounds()[1], "lag 0", 30, second.log)
    assert_whole(pipeline, url)
    written = [line for line in f"{first.log()}\n{second.log()}".splitlines() if '"archived"' in line]
    assert sum(json.loads(line)["records"] for line in written) == 1000
    assert second.stop() == 0


def test_an_archiver_that_lost_its_session_writes_nothing_more_until_it_has_the_lock_again(
    pipeline: Pipeline, url: str
) -> None:
    settings = settings_of(pipeline, url)
    one, two = Archiver(settings), Archiver(settings)
    send(pipeline, 100, seed=1)
    assert one.look(everything=True).records == 100
    with pytest.raises(AnotherWorks):
        two.look(everything=True)
    pipeline.query(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' "
        "AND (classid::bigint << 32 | objid::bigint) = %s AND granted",
        LOCK_ID,
    )
    send(pipeline, 100, seed=2)
    assert two.look(everything=True).records == 100
    with pytest.raises(psycopg.OperationalError):
        one.look(everything=True)
    with pytest.raises(AnotherWorks):
        one.look(everything=True)
    two.close()
    send(pipeline, 100, seed=3)
    until(lambda: _looks(one) is not None, "the lock is let go of", 10)
    one.close()
    assert_whole(pipeline, url)


def _looks(archiver: Archiver) -> Any:
    try:
        return archiver.look(everything=True)
    except AnotherWorks:
        return None


def test_a_storage_that_is_away_is_waited_for_and_nothing_is_lost(pipeline: Pipeline, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    place.write_text("where a directory has to be")
    stop = threading.Event()
    archiver = Archiver(settings_of(pipeline, str(place), archive_file_seconds=1), stop=stop)
    thread = threading.Thread(target=archiver.run)
    thread.start()
    try:
        send(pipeline, 300)
        until(lambda: "waits for the archive's storage" in archiver.check()[1], "health says so", 30)
        assert archiver.check()[0] == "unhealthy"
        place.unlink()
        until(lambda: archiver.check()[0] == "healthy", "it works", 60, lambda: str(archiver.check()))
        until(lambda: group_offsets(pipeline) == pipeline.log_bounds()[1], "lag 0", 30)
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert_whole(pipeline, str(place))


def test_what_is_held_is_listed_with_its_arrivals(pipeline: Pipeline, url: str) -> None:
    end = send_to(pipeline, TP, 25)
    out, progress = command(pipeline, url, "--once", "--json")
    assert json.loads(out) == {"records": 25, "files": 1, "stopped": {}}
    assert f"usage.v3/0: offsets {end - 25} to {end - 1}" in progress
    [row] = json.loads(command(pipeline, url, "--list", "--json")[0])
    assert (row["topic"], row["partition"], row["first_offset"], row["next_offset"]) == (
        "usage.v3",
        0,
        end - 25,
        end,
    )
    assert (row["records"], row["files"]) == (25, 1)
    assert row["bytes"] == Archive(url).files(TP)[0].size
    assert row["first_arrival"][:4] == row["last_arrival"][:4] == time.strftime("%Y", time.gmtime())
    assert "usage.v3" in command(pipeline, url, "--list")[0]
    Path(Archive(url).files(TP)[0].path).write_bytes(b"no file of ours")
    assert "cannot be read" in command(pipeline, url, "--list", code=1)[1]


@pytest.mark.parametrize("arguments", [("--once", "--list"), ("--json",), ("--list", "--accept-hole")])
def test_options_that_do_not_go_together_are_refused(pipeline: Pipeline, url: str, arguments: Any) -> None:
    assert "error: --" in command(pipeline, url, *arguments, code=2)[1]


def test_without_a_place_nothing_starts(pipeline: Pipeline) -> None:
    worker = pipeline.worker("archive", ARCHIVE).start()
    assert worker.ended() == 2
    assert "TIDEMETER_ARCHIVE_URL" in worker.log()
