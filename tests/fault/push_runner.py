"""Senders made to be killed: one process imports everything once, then forks a sender within milliseconds.

``python -m tests.fault.push_runner`` reads commands from stdin, a line of JSON each, and answers each with a
line: ``{"start": {…}}`` forks a sender, ``{"ended": pid}`` tells how one ended. No pid is used again before
its end was told, so nobody else is ever killed by mistake. When stdin ends, every sender is killed.

A sender is the product's, with its real sink; only its clock is what the campaign says.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil

from services.pusher.intents import Policy
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks import Sink
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.streaming import faults
from services.wire.log import configure_logging

ROOT = Path(__file__).parents[2]
KEY = "sk_test_campaign"


@dataclass(frozen=True)
class Orders:
    """How one sender shall run. The fields without a default are those of one test run."""

    dsn: str
    stripe: str
    clock: str  # path of a `SharedNumber`: how far this clock is ahead, in seconds
    state: str  # path of `calls_under_way` and `glances`
    log: str
    sink: str = "v1"
    seed: int = 1
    rate: float = 200.0
    concurrency: int = 16
    connections: int = 16
    timeout_s: float = 0.5
    claims_max: int = 200
    backoff_s: float = 0.05
    backoff_max_s: float = 0.2
    resend_for_h: float = 23.0
    ask_after_h: float = 24.0
    fault_point: str | None = None
    reached: str | None = None  # path of the log of fault points


class SharedNumber:
    """A number in a file, seen at once by every process that opened it."""

    def __init__(self, path: str | Path, index: int = 0) -> None:
        Path(path).touch()
        self._at = 8 * index
        with Path(path).open("r+b") as file:
            file.truncate(16)
            self._memory = mmap.mmap(file.fileno(), 16)

    @property
    def value(self) -> float:
        return float(struct.unpack_from("d", self._memory, self._at)[0])

    @value.setter
    def value(self, number: float) -> None:
        struct.pack_into("d", self._memory, self._at, number)


class SharedClock(SharedNumber):
    """Real time plus what the campaign let pass; all who opened it leap together."""

    def __call__(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.value)

    def seconds(self) -> float:
        return time.time() + self.value


def calls_under_way(orders: Orders) -> SharedNumber:
    """How many calls of its sink a sender is in."""
    return SharedNumber(orders.state, 0)


def glances(orders: Orders) -> SharedNumber:
    """How often a sender looked at its clock: it does for every round."""
    return SharedNumber(orders.state, 1)


# -- A sender ------------------------------------------------------------------------------------------


def stripe_sink(kind: type[StripeSink]) -> Callable[[Orders], Sink]:
    """By v1 calls, or by the stream."""
    return lambda orders: kind(
        KEY, api_base=orders.stripe, timeout_seconds=orders.timeout_s, connections_max=orders.connections
    )


#: By the name of ``Orders.sink``.
SINKS = {"v1": stripe_sink(StripeSink), "stream": stripe_sink(StripeStreamSink)}


class Counted:
    """Any sink, with a count of its calls under way that the campaign can see."""

    def __init__(self, sink: Sink, under_way: SharedNumber) -> None:
        self._sink = sink
        self._under_way = under_way

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sink, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def counted(*values: Any) -> Any:
            self._under_way.value += 1
            try:
                return await found(*values)
            finally:
                self._under_way.value -= 1

        return counted


async def send(orders: Orders) -> None:
    """Send until SIGTERM."""
    policy = Policy(
        resend_for=timedelta(hours=orders.resend_for_h),
        ask_after=timedelta(hours=orders.ask_after_h),
        backoff_base_seconds=orders.backoff_s,
        backoff_cap_seconds=orders.backoff_max_s,
    )
    config = SenderConfig(
        rate_per_second=orders.rate,
        concurrency=orders.concurrency,
        call_timeout_seconds=orders.timeout_s,
        claims_max=orders.claims_max,
        gather_seconds=0.005,
        poll_seconds=0.05,
        policy=policy,
    )
    sink: Any = Counted(SINKS[orders.sink](orders), calls_under_way(orders))
    clock, seen = SharedClock(orders.clock), glances(orders)

    def look() -> datetime:
        seen.value += 1
        return clock()

    dice = random.Random(orders.seed)  # noqa: S311
    sender = Sender(orders.dsn, sink, config, clock=look, chance=dice.random)
    running = asyncio.create_task(sender.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await sink.close()


def become_sender(orders: Orders) -> NoReturn:
    """Never comes back: the forked process ends here."""
    status = 1
    try:
        log = os.open(orders.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, file in enumerate((nothing, nothing, log)):
            os.dup2(file, number)
        for name in ("TIDEMETER_FAULT_POINT", "TIDEMETER_FAULT_LOG"):
            os.environ.pop(name, None)
        if orders.fault_point is not None:
            os.environ["TIDEMETER_FAULT_POINT"] = orders.fault_point
        if orders.reached is not None:
            os.environ["TIDEMETER_FAULT_LOG"] = orders.reached
        importlib.reload(faults)  # reads the environment, as at the start of a process
        configure_logging("error", "json")
        asyncio.run(send(orders))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# -- The process that forks ----------------------------------------------------------------------------


def serve() -> None:
    """Obey until stdin ends, then kill every sender."""
    alive: set[int] = set()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            answer: int | None = None
            if "start" in command:
                answer = os.fork()
                if answer == 0:
                    become_sender(Orders(**command["start"]))
                alive.add(answer)
            else:
                pid, status = os.waitpid(command["ended"], os.WNOHANG)
                if pid:
                    alive.discard(pid)
                    answer = os.waitstatus_to_exitcode(status)
            print(json.dumps(answer), flush=True)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)


# -- The other end -------------------------------------------------------------------------------------


class Running:
    """One sender, as the campaign sees it."""

    def __init__(self, runner: Runner, pid: int, orders: Orders) -> None:
        self._runner = runner
        self._stopped = False
        self.pid = pid
        self.orders = orders
        self.under_way = calls_under_way(orders)
        self.glances = glances(orders)
        self.status: int | None = None
        self.began = time.monotonic()
        self.ended = float("inf")

    def alive(self) -> bool:
        if self.status is None:
            self.status = self._runner.ask({"ended": self.pid})
            if self.status is not None:
                self.ended = time.monotonic()
        return self.status is None

    def kill(self) -> int:
        """SIGKILL, and wait; how it ended, which may have been earlier and by itself."""
        return self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM, and wait for the calls under way to be settled."""
        return self._end(signal.SIGTERM)

    def stop(self) -> None:
        """SIGSTOP, and wait until it is: alive, and doing nothing."""
        if self.alive():
            os.kill(self.pid, signal.SIGSTOP)
            self._stopped = True
            process = psutil.Process(self.pid)
            while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(0.0005)

    def go_on(self) -> None:
        """SIGCONT."""
        if self._stopped and self.alive():
            os.kill(self.pid, signal.SIGCONT)
        self._stopped = False

    def wait(self, seconds: float) -> bool:
        """Whether it ended in that time."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.alive()

    def _end(self, how: signal.Signals) -> int:
        if self.alive():
            os.kill(self.pid, how)
            self.go_on()
        if not self.wait(15):
            os.kill(self.pid, signal.SIGKILL)
            self.wait(15)
        assert self.status is not None, "a killed process did not end"
        return self.status


class Runner:
    """The forking process. Close it and all its senders are gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.push_runner"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, orders: Orders) -> Running:
        return Running(self, int(self.ask({"start": asdict(orders)})), orders)

    def ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(15)
        if self._process.stdout is not None:
            self._process.stdout.close()


if __name__ == "__main__":
    serve()
