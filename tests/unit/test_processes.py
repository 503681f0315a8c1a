"""Answers from processes of their own: at most so many, killed when nobody waits, ended with their parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.console import processes as console
from services.console.processes import Processes
from services.web.problems import RequestRefused
from services.wire.settings import Settings

ROOT = Path(__file__).parents[2]

ECHO = "import sys; print(sys.stdin.readline()[::-1].strip())"
BROKEN = "import sys; sys.stdin.readline(); sys.exit(70)"
SLOW = """
import os, pathlib, sys, time
pathlib.Path(sys.stdin.readline().strip()).write_text(str(os.getpid()))
time.sleep(60)
"""


class Client:
    """One who waits until it is told to go."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def gone(self) -> None:
        await self.left.wait()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where modules are found; its files are named after what they do."""
    for name, text in (("echo_back", ECHO), ("broken_off", BROKEN), ("slow_going", SLOW)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return tmp_path


async def pid_in(file: Path) -> int:
    for _ in range(500):
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text())
        await asyncio.sleep(0.02)
    raise AssertionError("it did not start")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ask(processes: Processes, module: str, asked: bytes, client: Client) -> Any:
    return processes.answer(module, asked, client.gone)


def refused(status: int, code: str) -> Any:
    return pytest.raises(RequestRefused, match=f"{status} {code}")


def test_a_line_goes_in_and_a_line_comes_out(modules: Path) -> None:
    async def run() -> bytes:
        return bytes(await ask(Processes(Settings()), "echo_back", b"abc", Client()))

    assert asyncio.run(run()) == b"cba"


def test_one_that_ends_without_an_answer_is_a_defect(modules: Path) -> None:
    async def run() -> None:
        processes = Processes(Settings())
        with refused(500, "internal_error"):
            await ask(processes, "broken_off", b"abc", Client())
        assert processes.running == 0

    asyncio.run(run())


def test_more_than_so_many_are_refused_until_one_has_ended(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "AT_ONCE_MAX", 1)

    async def run() -> None:
        processes, client = Processes(Settings()), Client()
        first = asyncio.create_task(ask(processes, "slow_going", b"pid", client))
        while not processes.running:
            await asyncio.sleep(0.01)
        with refused(429, "replay_busy"):
            await ask(processes, "echo_back", b"abc", Client())
        client.left.set()
        with refused(499, "client_gone"):
            await first
        assert await ask(processes, "echo_back", b"abc", Client()) == b"cba"

    asyncio.run(run())


def test_it_is_killed_when_its_client_goes_away_and_when_it_takes_too_long(modules: Path) -> None:
    async def run() -> None:
        client, file = Client(), modules / "first"
        task = asyncio.create_task(ask(Processes(Settings()), "slow_going", str(file).encode(), client))
        pid = await pid_in(file)
        client.left.set()
        with refused(499, "client_gone"):
            await task
        assert gone(pid)
        hurried = Processes(Settings(replay_dry_run_seconds=1))
        with refused(504, "replay_too_long"):
            await ask(hurried, "slow_going", str(modules / "second").encode(), Client())

    asyncio.run(run())


def explaining(directory: Path, dsn: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.replay.explaining"],
        env={**os.environ, "TIDEMETER_DATA_DIR": str(directory), "TIDEMETER_POSTGRES_DSN": dsn},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_request_that_is_none_gets_no_answer_and_is_not_repeated_in_the_log(modules: Path) -> None:
    process = explaining(modules, "postgresql://127.0.0.1:1/none")
    answer, said = process.communicate(b"no request\n", timeout=60)
    assert (process.returncode, answer) == (70, b"")
    assert said and b"no request" not in said


def test_a_server_that_is_away_is_named(modules: Path) -> None:
    process = explaining(modules, "postgresql://127.0.0.1:1/none")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b'{"customer": "c", "meter": "m", "hour": "now"}\n')
    process.stdin.flush()
    assert process.stdout.readline() == b'{"away":"PostgreSQL"}\n'
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_the_explaining_process_ends_when_its_standard_input_does(modules: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        process = explaining(modules, f"postgresql://127.0.0.1:{silent.getsockname()[1]}/none")
        assert process.stdin is not None
        process.stdin.write(b'{"customer": "c", "meter": "m", "hour": "now"}\n')
        process.stdin.flush()
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            assert process.poll() is None
            answer, _ = process.communicate(timeout=3)
        assert (process.returncode, answer) == (70, b"")
