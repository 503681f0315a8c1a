"""Stripe never forgets what it answered: the simulator as a process, killed and started again."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.stripe_simulator import SimulatorConfig, SimulatorControl
from services.stripe_simulator.gateway import Call
from services.stripe_simulator.server import assemble
from services.stripe_simulator.store import Store

ROOT = Path(__file__).resolve().parents[2]
HEADERS = {"Authorization": "Bearer sk_test_x"}
PROGRAM = """
import sys
from pathlib import Path
from services.stripe_simulator import SimulatorConfig, run
run(SimulatorConfig(port=int(sys.argv[1]), data_path=Path(sys.argv[2])))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(data: Path) -> Iterator[tuple[SimulatorControl, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port), str(data)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603  our own program
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 15
        while not answers(url):
            assert started.poll() is None, "the simulator ended instead of starting"
            assert time.monotonic() < deadline, "the simulator did not start"
            time.sleep(0.05)
        yield SimulatorControl(url), started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(10)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def send(client: httpx.Client, number: int) -> httpx.Response:
    form = {
        "event_name": "calls",
        "identifier": f"id-{number}",
        "payload[stripe_customer_id]": "cus_1",
        "payload[value]": "0.1",
    }
    headers = HEADERS | {"Idempotency-Key": f"key-{number}"}
    return client.post("/v1/billing/meter_events", data=form, headers=headers)


def test_everything_answered_before_a_sigkill_is_there_after_the_restart(tmp_path: Path) -> None:
    data = tmp_path / "stripe.db"
    answered: list[int] = []

    def traffic(url: str) -> None:
        with httpx.Client(base_url=url) as client:
            try:
                for number in range(100_000):
                    if send(client, number).status_code == 200:
                        answered.append(number)
            except httpx.TransportError:
                return

    with process(data) as (sim, started):
        sim.seed(customers=["cus_1"], meters=["calls"])
        sim.advance(3600)
        sender = threading.Thread(target=traffic, args=(sim.url,))
        sender.start()
        while len(answered) < 50:
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
        started.wait(10)
        sender.join(10)

    with process(data) as (sim, _):
        identifiers = [row["identifier"] for row in sim.ledger()["rows"]]
        assert set(identifiers) >= {f"id-{number}" for number in answered}
        assert len(set(identifiers)) == len(identifiers) <= len(answered) + 1
        assert abs(sim.call("GET", "clock")["offset_seconds"] - 3600) < 1
        with httpx.Client(base_url=sim.url) as client:
            replayed = send(client, answered[-1])
        assert (replayed.status_code, replayed.headers["Idempotent-Replayed"]) == (200, "true")
        assert len(sim.ledger()["rows"]) == len(identifiers)


def test_sigterm_ends_the_process_cleanly_with_everything_flushed(tmp_path: Path) -> None:
    data = tmp_path / "stripe.db"
    with process(data) as (sim, started):
        sim.seed(customers=["cus_1"], meters=["calls"])
        with httpx.Client(base_url=sim.url) as client:
            assert send(client, 1).status_code == 200
            started.send_signal(signal.SIGTERM)
            assert started.wait(10) == 0
    assert not data.with_name("stripe.db-wal").exists(), "the write-ahead log was folded into the file"


def test_a_second_simulator_on_the_same_file_does_not_start(tmp_path: Path) -> None:
    first = Store(tmp_path / "stripe.db")
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        Store(tmp_path / "stripe.db")
    first.close()


def test_a_file_of_an_earlier_version_gets_the_columns_it_lacks(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "stripe.db")
    db.execute(
        "CREATE TABLE error_reports (sequence INTEGER PRIMARY KEY, code TEXT NOT NULL, message TEXT NOT NULL,"
        " identifier TEXT NOT NULL, event_name TEXT NOT NULL, customer TEXT, received_at REAL NOT NULL,"
        " request_id TEXT NOT NULL)"
    )
    db.execute("INSERT INTO error_reports VALUES (1, 'no_meter', 'm', 'id', 'calls', NULL, 1.0, 'req_1')")
    db.commit()
    db.close()
    store = Store(tmp_path / "stripe.db")
    (row,) = store.read_named("SELECT * FROM error_reports")
    assert (row["identifier"], row["meter"], row["reported"]) == ("id", None, 0)
    store.close()


class FullDisk:
    """A connection whose commits fail."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        if sql == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(sql, values)


def test_a_failed_commit_answers_nobody_and_nothing_is_written_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = assemble(SimulatorConfig(data_path=tmp_path / "stripe.db"))
    monkeypatch.setattr(simulator.store, "_db", FullDisk(simulator.store._db))
    route = ("POST", "/v1/customers")
    call = Call(*route, "name=Ada", False, "req_1", "Bearer sk_test_x", "acct_1", "key-1", {})

    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        asyncio.run(simulator.gateway.respond(call, simulator.endpoints[route]))
    assert simulator.store.failure is not None
    with pytest.raises(RuntimeError, match="failed earlier"):
        simulator.store.keep_setting("name", "value")
    simulator.store.close()
