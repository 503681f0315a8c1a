"""The whole product on one machine: Kafka, PostgreSQL, the Stripe simulator, the API and the workers.

Starts     what no setting names an address for, then our own processes, each as ``tidemeter <service>``.
Writes     ``runtime.json`` (mode 0600) in the data directory, so that other commands find the addresses.
Promises   a process that ends is started again, with backoff; nothing outlives the owner.
Fails      with an error that names the process and shows the end of its log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import structlog

from services.embedded.errors import StartFailed
from services.embedded.processes import Launch, choose_port, spawn, tail
from services.embedded.runtime import EmbeddedRuntime
from services.embedded.webhooks import register_webhooks
from services.streaming.observe import NO_PARTITIONS
from services.wire.migrations import apply_migrations
from services.wire.settings import PREFIX, RUNTIME_FILE, Settings
from services.wire.topics import create_topics, plan_for

log = structlog.get_logger(__name__)

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
RESTART_PAUSE_S = 0.5
RESTART_PAUSE_MAX_S = 15.0
#: Not a secret: the simulator takes any test key.
SIMULATOR_KEY = "sk_test_simulator"


@dataclass(slots=True)
class Member:
    """One of our own processes."""

    name: str
    arguments: list[str]
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    pause_s: float = RESTART_PAUSE_S
    restarts: int = 0
    expected_down: bool = False

    @property
    def base_url(self) -> str:
        """Where its /health and /metrics are."""
        return f"http://127.0.0.1:{self.port}"


class Stack:
    """Everything, for one owner. ``settings`` may name servers that run elsewhere."""

    def __init__(
        self, root: Path, settings: Settings, *, http_port: int | None = None, counters: int = 1
    ) -> None:
        self.root = root
        self.settings = settings
        self.runtime = EmbeddedRuntime(root)
        self._http_port = http_port
        self._counters = counters
        self._members: dict[str, Member] = {}
        self.kafka_bootstrap = ""
        self.postgres_dsn = ""
        self.stripe_base: str | None = settings.stripe_api_base
        self._runtime_file: TextIO | None = None

    # -- Start and stop ------------------------------------------------------------------------------

    def start(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Start what is missing and wait until every process is ready.

        Raises:
            EmbeddedError: a server or a process did not start; everything started is stopped again.
        """
        try:
            self._start_servers(say)
            self._prepare(say)
            self._start_members(say)
            self._write_runtime_file()
        except BaseException:
            self.stop()
            raise

    def _start_servers(self, say: Callable[[str], None]) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
        given_kafka, given_postgres = self.settings.kafka_bootstrap, self.settings.postgres_dsn
        if given_kafka is None or given_postgres is None:
            say("starting Kafka and PostgreSQL")
            self.runtime.start()
        self.kafka_bootstrap = given_kafka or self.runtime.kafka_bootstrap
        self.postgres_dsn = given_postgres.get_secret_value() if given_postgres else self.runtime.postgres_dsn

    def _prepare(self, say: Callable[[str], None]) -> None:
        settings = self.settings.model_copy(update={"kafka_bootstrap": self.kafka_bootstrap})
        created = create_topics(self.kafka_bootstrap, plan_for(settings))
        applied = apply_migrations(self.postgres_dsn)
        say(f"{len(created)} topics created, {applied} migrations applied")

    def _start_members(self, say: Callable[[str], None]) -> None:
        if self.settings.stripe_api_key is None:
            port = self._port("simulator")
            ledger = str(self.root / "stripe-simulator.sqlite")
            self._add("simulator", ["stripe-simulator", "--port", str(port), "--data", ledger], port)
            self.stripe_base = f"http://127.0.0.1:{port}"
            self._await_ready("simulator")
            say(f"Stripe simulator at {self.stripe_base}")
        http_port = self._port("ingest", self._http_port)
        self._add("ingest", ["ingest", "--port", str(http_port)], http_port)
        for number in range(1, self._counters + 1):
            name = f"counters-{number}"
            self._add(name, ["counters"], self._port(name), worker_id=name)
        for name in ("pusher", "dispatcher", "upkeep", "replayer", "reconciler"):
            self._add(name, [name], self._port(name), worker_id=f"{name}-1")
        if self.settings.archive_url is not None:
            self._add("archive", ["archive"], self._port("archive"))
        self._add_bridge(say)
        for name in self._members:
            self._await_ready(name)
            say(f"{name} ready")

    def _add_bridge(self, say: Callable[[str], None]) -> None:
        """With secrets of its own it needs no set-up; those of the simulator are made here."""
        if self.settings.webhook_secrets is not None:
            port = self._port("bridge", self.settings.bridge_port)
            self._add("bridge", ["bridge", "--port", str(port)], port)
        elif self.settings.stripe_api_key is None and self.stripe_base is not None:
            port = self._port("bridge")
            secrets = register_webhooks(self.stripe_base, SIMULATOR_KEY, port, self.root / "processes")
            environment = {"WEBHOOK_SECRETS_FILE": str(secrets)}
            self._add("bridge", ["bridge", "--port", str(port)], port, environment=environment)
        else:
            say("no webhook endpoints: set TIDEMETER_WEBHOOK_SECRETS_FILE to start the bridge")

    def _port(self, name: str, given: int | None = None) -> int:
        """A free port, the same as last time where possible."""
        directory = self.root / "processes"
        directory.mkdir(exist_ok=True)
        taken = [member.port for member in self._members.values()]
        return choose_port(given, directory / f"{name}.port", taken)

    def _add(
        self,
        name: str,
        arguments: list[str],
        port: int,
        worker_id: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        own = {"OBSERVE_PORT": str(port), **(environment or {})}
        if worker_id is not None:
            own["WORKER_ID"] = worker_id
        member = Member(name, arguments, port, own)
        self._members[name] = member
        self._spawn(member)

    def environment(self) -> dict[str, str]:
        """The variables that point a ``tidemeter`` command at this stack."""
        variables = {
            "KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "POSTGRES_DSN": self.postgres_dsn,
            "DATA_DIR": str(self.root),
            "LOG_FORMAT": "json",
        }
        if self.stripe_base is not None:
            variables["STRIPE_API_BASE"] = self.stripe_base
        if self.settings.stripe_api_key is None:
            variables["STRIPE_API_KEY"] = SIMULATOR_KEY
        return {**os.environ, **{PREFIX + name: value for name, value in variables.items()}}

    def _spawn(self, member: Member, extra: Mapping[str, str] | None = None) -> None:
        variables = {PREFIX + name: value for name, value in member.environment.items()}
        launch = Launch(
            command=[sys.executable, "-m", "services.cli.main", *member.arguments],
            marker="services.cli.main",
            directory=self.root / "processes",
            name=member.name,
            environment={**self.environment(), **variables, **(extra or {})},
        )
        member.child = spawn(launch)
        member.started_at = time.monotonic()
        member.expected_down = False

    def _await_ready(self, name: str) -> None:
        member = self._members[name]
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if member.child is not None and member.child.poll() is not None:
                break
            if self.ready(name):
                return
            time.sleep(0.05)
        raise StartFailed(f"{name} did not become ready.\n{tail(self.log_file(name))}")

    def ready(self, name: str) -> bool:
        """Does the process work? What only an operator can cure (``degraded``) does not keep others down."""
        try:
            with urllib.request.urlopen(f"{self._members[name].base_url}/health/ready", timeout=2) as answer:  # noqa: S310
                report = json.load(answer)
                joined = report["checks"].get("stream", {}).get("reason") != NO_PARTITIONS
                return bool(report["status"] in ("healthy", "degraded") and joined)
        except (OSError, ValueError, KeyError, urllib.error.URLError):
            return False

    def log_file(self, name: str) -> Path:
        """Where the process writes its log."""
        return self.root / "processes" / f"{name}.out"

    def _write_runtime_file(self) -> None:
        document: dict[str, object] = {
            "pid": os.getpid(),
            "kafka_bootstrap": self.kafka_bootstrap,
            "postgres_dsn": self.postgres_dsn,
            "http_port": self._members["ingest"].port,
            "stripe_api_base": self.stripe_base,
            "processes": {name: member.base_url for name, member in self._members.items()},
        }
        if "bridge" in self._members:
            document["bridge_port"] = self._members["bridge"].port
        if self.settings.archive_url is not None:
            url = self.settings.archive_url
            document["archive_url"] = url if "://" in url else str(Path(url).absolute())
        if self.settings.stripe_api_key is None:
            document["stripe_api_key"] = SIMULATOR_KEY
        path = self.root / RUNTIME_FILE
        path.unlink(missing_ok=True)
        self._runtime_file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
        fcntl.flock(self._runtime_file, fcntl.LOCK_EX)  # held while we live: see settings.running_runtime
        json.dump(document, self._runtime_file, indent=2)
        self._runtime_file.flush()

    def stop(self) -> None:
        """Stop our processes in the order of the data, then the servers. Harmless if nothing runs."""
        (self.root / RUNTIME_FILE).unlink(missing_ok=True)
        if self._runtime_file is not None:
            self._runtime_file.close()
        for member in self._members.values():
            member.expected_down = True
            if member.child is not None and member.child.poll() is None:
                member.child.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for member in self._members.values():
            if member.child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    member.child.wait(max(0.1, deadline - time.monotonic()))
                if member.child.poll() is None:
                    member.child.kill()
                    member.child.wait()
        self.runtime.stop()

    # -- While it runs -------------------------------------------------------------------------------

    def supervise(self) -> None:
        """Start again what has ended. Call it often; it does not block."""
        for member in self._members.values():
            child = member.child
            if child is None or child.poll() is None or member.expected_down:
                continue
            if time.monotonic() - member.started_at > RESTART_PAUSE_MAX_S:
                member.pause_s = RESTART_PAUSE_S
            if time.monotonic() - member.started_at < member.pause_s:
                continue
            log.warning("process ended; starting it again", process=member.name, exit_code=child.returncode)
            member.pause_s = min(member.pause_s * 2, RESTART_PAUSE_MAX_S)
            member.restarts += 1
            self._spawn(member)

    def kill(self, name: str) -> None:
        """SIGKILL a process and leave it down; :meth:`revive` starts it again."""
        member = self._members[name]
        member.expected_down = True
        if member.child is not None:
            member.child.kill()
            member.child.wait()

    def revive(self, name: str, extra: Mapping[str, str] | None = None) -> None:
        """Start a process again, with ``extra`` environment variables."""
        self._spawn(self._members[name], extra)

    def member(self, name: str) -> Member:
        """The process called ``name``.

        Raises:
            KeyError: there is none.
        """
        return self._members[name]

    def members(self) -> Mapping[str, Member]:
        """Every process, by name."""
        return self._members

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
