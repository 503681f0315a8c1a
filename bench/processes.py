"""Contestants as processes: started with their job, watched, and killed with SIGKILL in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.rivals import FIRST, Job

START_SECONDS_MAX = 90.0
STALL_SECONDS_MAX = 60.0


class ContestantFailed(Exception):
    """A contestant ended or stood still; the message has its last words."""


class Contestant:
    """A running contestant. Made by :func:`started`."""

    def __init__(self, title: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.title = title
        self._process = process
        self._errors = errors
        self._came = threading.Event()
        self._first_s: float | None = None
        threading.Thread(target=self._read, daemon=True, name="first").start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        """Read its standard output to the end, and note when ``first`` came."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if FIRST in line and self._first_s is None:
                self._first_s = time.monotonic()
                self._came.set()
        self._came.set()

    def await_first(self) -> float:
        """When it had its first event in hand, by ``time.monotonic()``.

        Raises:
            ContestantFailed: it ended, or took too long.
        """
        self._came.wait(START_SECONDS_MAX)
        if self._first_s is None:
            with suppress(subprocess.TimeoutExpired):  # what closed its output may not have ended yet
                self._process.wait(5)
            raise self.failed("never had an event in hand")
        return self._first_s

    def ended(self) -> bool:
        """Whether it ended by itself, which none of them should."""
        return self._process.poll() is not None

    def failed(self, what: str) -> ContestantFailed:
        """The exception to raise, with the contestant's state and its last words."""
        status = self._process.poll()
        state = "still running" if status is None else f"exit status {status}"
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        return ContestantFailed(f"{self.title} {what} ({state})" + "".join(f"\n    {line}" for line in lines))


class Progress:
    """Tells a contestant that is slow from one that will never be done."""

    def __init__(self, contestant: Contestant, goal: int, unit: str) -> None:
        self._contestant = contestant
        self._goal = goal
        self._unit = unit
        self._best, self._moved_s = 0, time.monotonic()

    def at(self, number: int) -> None:
        """Note how far it is.

        Raises:
            ContestantFailed: it ended, or has not moved for a minute.
        """
        if number > self._best:
            self._best, self._moved_s = number, time.monotonic()
        if self._contestant.ended() or time.monotonic() - self._moved_s > STALL_SECONDS_MAX:
            raise self._contestant.failed(f"stopped at {self._best} of {self._goal} {self._unit}")


@contextmanager
def started(title: str, module: str, job: Job, python: str = sys.executable) -> Iterator[Contestant]:
    """Run ``module`` on ``job``; it is gone when the block ends."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="tidemeter-bench-") as log:
        errors = Path(log) / "stderr"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=job.directory,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
            )
        try:
            contestant = Contestant(title, process, errors)
            with suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(job.line())
                process.stdin.close()
            yield contestant
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
