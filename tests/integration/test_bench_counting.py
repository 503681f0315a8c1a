"""The benchmarks at a small size: that they count right and say so. How fast they are is not asserted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import typer
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from bench import counting, late_events
from bench.results import merge
from bench.rivals import Job
from bench.servers import Servers, fresh_database, servers
from services.cli.bench import bench
from services.embedded import EmbeddedRuntime
from services.wire.errors import Misconfigured

EVENTS = 2_000


def quix_is_there() -> bool:
    try:
        return bool(counting.quix_versions())
    except Misconfigured:
        return False


needs_quix = pytest.mark.skipif(
    not quix_is_there(), reason=f"{counting.QUIX_PYTHON} names no Python with Quix Streams"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with EmbeddedRuntime(tmp_path_factory.mktemp("bench")) as runtime:
        yield Servers(runtime.kafka_bootstrap, runtime.postgres_dsn, given=True)


def belongings(here: Servers) -> tuple[set[str], set[str]]:
    """Topics (but Kafka's own) and databases."""
    topics = AdminClient({"bootstrap.servers": here.bootstrap}).list_topics(timeout=10).topics
    with psycopg.connect(here.dsn) as db:
        databases = {row[0] for row in db.execute("SELECT datname FROM pg_database").fetchall()}
    return {topic for topic in topics if not topic.startswith("__")}, databases


def children() -> list[str]:
    """Contestants that still run."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found.append(" ".join(child.cmdline()))
    return [words for words in found if "-m bench." in words]


@pytest.fixture(scope="module")
def counted(here: Servers) -> dict[str, Any]:
    before = belongings(here)
    result = counting.run(here, events=EVENTS, seed=7, rounds=1)
    assert belongings(here) == before
    return result


@needs_quix
def test_every_contestant_counts_exactly_and_leaves_the_servers_as_they_were(counted: dict[str, Any]) -> None:
    assert [(run["contestant"], run["events"], run["checked"]) for run in counted["runs"]] == [
        ("tidemeter", EVENTS, True),
        ("faust_tables", EVENTS, True),
        ("quix_exactly_once", EVENTS, True),
    ]
    assert counted["checked"] is True
    assert children() == []


@needs_quix
def test_a_result_says_what_was_compared_with_what(counted: dict[str, Any]) -> None:
    for name in ("tidemeter", "faust_tables", "quix_exactly_once"):
        assert isinstance(counted[name], int)
        assert counted[name] > 0
    assert counted["ratio_faust"] == pytest.approx(counted["tidemeter"] / counted["faust_tables"], abs=0.02)
    assert counted["ratio_quix"] == pytest.approx(
        counted["tidemeter"] / counted["quix_exactly_once"], abs=0.02
    )
    assert (counted["events"], counted["rounds"]) == (EVENTS, 1)
    assert {"python", "faust-streaming", "quixstreams", "confluent-kafka"} <= counted["versions"].keys()
    assert counted["cpu"] == os.cpu_count()
    assert json.loads(json.dumps(counted)) == counted
    assert counting.render(counted).row_count == 3


def test_ours_counts_exactly(here: Servers) -> None:
    with counting.laid_out(here, events=EVENTS, seed=8) as field:
        run = counting.race(field, counting.CONTESTANTS[0], 1)
    assert (run.events, run.checked) == (EVENTS, True)


@pytest.mark.parametrize(
    "contestant",
    [counting.CONTESTANTS[1], pytest.param(counting.CONTESTANTS[2], marks=needs_quix)],
    ids=lambda one: one.name,
)
def test_a_slow_contestant_counts_the_newest_part_of_the_same_topic(
    here: Servers, contestant: counting.Contestant
) -> None:
    with counting.laid_out(here, events=EVENTS, seed=8) as field:
        run = counting.race(field, replace(contestant, events_max=400), 1)
    assert 0 < run.events <= 400
    assert run.checked


def test_a_python_without_quix_streams_is_refused_before_anything_starts(
    here: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = belongings(here)
    for python, complaint in ((tmp_path / "none", "cannot run"), (Path("/bin/false"), "cannot import")):
        monkeypatch.setenv(counting.QUIX_PYTHON, str(python))
        with pytest.raises(Misconfigured, match=complaint):
            counting.run(here, events=EVENTS)
    assert belongings(here) == before


def test_a_sum_that_differs_is_reported_and_not_hidden(here: Servers) -> None:
    ours = counting.CONTESTANTS[0]
    with counting.laid_out(here, events=200, seed=9) as field:
        wrong = dict(field.load.sums)
        wrong[next(iter(wrong))] += 1
        run = counting.race(field, ours, 1, wrong)
    assert not run.checked
    others = [replace(run, contestant=one.name, checked=True) for one in counting.CONTESTANTS[1:]]
    result = counting.summary([run, *others], events=200, embedded=False)
    assert result["checked"] is False


def test_the_plain_truth_read_from_the_topic_is_what_the_generator_says(here: Servers) -> None:
    with counting.laid_out(here, events=1_000, seed=10) as field:
        assert counting._sums_of_topic(field, dict.fromkeys(field.ends, 0)) == dict(field.load.sums)
        assert field.load.distinct < 1_000, "the generator made no duplicate"


def test_a_contestant_that_dies_is_named_with_its_last_words(here: Servers) -> None:
    dead = replace(counting.CONTESTANTS[1], title="the dead one", module="bench.rivals.nobody")
    before = belongings(here)
    with (
        pytest.raises(
            counting.ContestantFailed, match=r"(?s)the dead one.*exit status 1.*bench\.rivals\.nobody"
        ),
        counting.laid_out(here, events=100, seed=11) as field,
    ):
        counting.race(field, dead, 1)
    assert belongings(here) == before
    assert children() == []


def test_a_database_is_dropped_although_somebody_is_connected_and_the_work_failed(here: Servers) -> None:
    before = belongings(here)
    with pytest.raises(ZeroDivisionError), fresh_database(here.dsn) as dsn:
        left_open = psycopg.connect(dsn)
        raise ZeroDivisionError
    assert belongings(here) == before
    left_open.close()


def test_a_result_leaves_the_other_keys_of_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"ingest": {"p99": 3}, "counting": {"tidemeter": 1, "old": True}}))
    merge(path, {"counting": {"tidemeter": 2}})
    assert json.loads(path.read_text()) == {"ingest": {"p99": 3}, "counting": {"tidemeter": 2}}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_result_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="no JSON object"):
        merge(path, {"counting": {}})
    assert path.read_text() == "[1, 2]"


def test_one_address_without_the_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEMETER_POSTGRES_DSN", raising=False)
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    with pytest.raises(Misconfigured, match="TIDEMETER_POSTGRES_DSN"), servers():
        pass


# -- The command -----------------------------------------------------------------------------------------


@pytest.fixture
def command(here: Servers, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", here.bootstrap)
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", here.dsn)
    app = typer.Typer()
    app.command()(bench)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_one_line_of_json_and_keeps_it(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"other": 1}')
    answer = command("late", "--events", 100, "--rounds", 1, "--seed", 5, "--json", "--out", path)
    assert answer.exit_code == 0, answer.output
    (line,) = answer.stdout.splitlines()
    printed = json.loads(line)
    assert printed.pop("bench") == "late"
    assert printed["events"] == 100
    assert printed["seconds"] > 0
    assert json.loads(path.read_text()) == {"other": 1, "late_events": printed}


def test_an_unknown_name_is_refused_with_the_names_there_are(command: Callable[..., Any]) -> None:
    answer = command("conuting")
    assert answer.exit_code == 2
    assert "conuting" in answer.stderr
    assert "counting" in answer.stderr
    assert "late" in answer.stderr
    assert "growth" in answer.stderr


def test_an_option_of_another_benchmark_is_refused(command: Callable[..., Any]) -> None:
    answer = command("late", "--seen", 5)
    assert answer.exit_code == 2
    assert "late takes no --seen" in answer.stderr


def test_a_sum_that_is_wrong_ends_the_command_with_1(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(late_events, "_is_exact", lambda *_: False)
    path = tmp_path / "results.json"
    answer = command("late", "--events", 100, "--rounds", 1, "--out", path)
    assert answer.exit_code == 1
    assert "NOT EXACT" in answer.stdout
    assert json.loads(path.read_text())["late_events"]["checked"] is False


@needs_quix
def test_a_command_that_is_told_to_stop_takes_everything_with_it(here: Servers, tmp_path: Path) -> None:
    """Given a contestant at work, when SIGTERM arrives, then nothing is left of the benchmark."""
    before = belongings(here)
    command = subprocess.Popen(
        [sys.executable, "-c", "import typer; from services.cli.bench import bench; typer.run(bench)"]
        + ["counting", "--events", "20000", "--out", str(tmp_path / "results.json")],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "TIDEMETER_KAFKA_BOOTSTRAP": here.bootstrap,
            "TIDEMETER_POSTGRES_DSN": here.dsn,
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 60
        while not children():
            assert command.poll() is None
            assert time.monotonic() < deadline_s, "no contestant was started"
            time.sleep(0.05)
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 130
    finally:
        command.kill()
        command.wait()
    assert children() == []
    assert belongings(here) == before
    assert list(tmp_path.iterdir()) == []


def test_a_contestant_ends_with_its_owner(tmp_path: Path) -> None:
    """Given a benchmark that is killed, its contestant is gone seconds later."""
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE, text=True)\n"
        "child.stdin.write(sys.argv[2]); child.stdin.close(); print(child.pid, flush=True); child.wait()\n"
    )
    contestant = (
        "from bench.rivals import read_job; read_job(); import time; print('up', flush=True); time.sleep(60)"
    )
    job = Job("127.0.0.1:1", "topic", 1, "group", str(tmp_path), "")
    owner = subprocess.Popen(
        [sys.executable, "-c", program, contestant, job.line()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    with owner.stdout:
        child = psutil.Process(int(owner.stdout.readline()))
        assert owner.stdout.readline() == "up\n"
        owner.kill()
        owner.wait()
    assert psutil.wait_procs([child], timeout=10)[1] == []
