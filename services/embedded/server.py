"""What it means to be an embedded server: one life cycle, written once for Kafka and PostgreSQL.

    start   prerequisites → lock → stop what a crashed owner left → configure → spawn → ready
    stop    signal, bounded wait, SIGKILL → unlock
    kill    SIGKILL, as a crash would → unlock; `start()` works again

Promises: when `start()` raises, nothing runs and nothing is locked.
"""

from __future__ import annotations

import subprocess
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from . import processes
from .errors import EmbeddedError
from .processes import ELSEWHERE, DirectoryLock, Launch


class EmbeddedServer(ABC):
    """A server process whose life is bound to this one, and the directory that is its memory."""

    title: ClassVar[str]
    stop_signal: ClassVar[int]
    start_timeout_s: ClassVar[float]
    stop_grace_s: ClassVar[float]
    stale_grace_s: ClassVar[float]

    def __init__(self, directory: Path) -> None:
        self.directory = directory.expanduser().absolute()
        self._lock = DirectoryLock(self.directory, self.title)
        self._child: subprocess.Popen[bytes] | None = None
        self._cancelled = threading.Event()

    @property
    def pid(self) -> int | None:
        """Pid of the server while it runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    @abstractmethod
    def logs(self) -> list[Path]:
        """Where to read what went wrong."""

    def start(self) -> None:
        """Start and wait until clients are served; does nothing if it runs already.

        Raises ToolMissing, DownloadFailed, AlreadyRunning, or StartFailed with the last log lines.
        """
        if self.pid is not None:
            return
        self.stop()  # it may have died by itself
        self._cancelled.clear()
        self.require_tools()
        self._lock.acquire()
        try:
            processes.stop_stale(self._pid_file, self.stale_grace_s)
            launch = self._configure()
            self._child = processes.spawn(launch)
            processes.await_ready(
                launch,
                self._child,
                self._answers,
                logs=self.logs,
                timeout_s=self.start_timeout_s,
                cancelled=self._cancelled,
            )
            self._complete()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise EmbeddedError(
                    f"{self.title} cannot use {self.directory}: {error}. {ELSEWHERE}"
                ) from error
            raise

    def cancel(self) -> None:
        """Make a `start()` that waits in another thread give up (it raises StartFailed there).

        A `stop()` still stops, but does nothing more for the sake of the next start.
        """
        self._cancelled.set()

    def stop(self) -> None:
        """Stop it in order, or by SIGKILL once its grace is over; data stay. Harmless if it does not run."""
        try:
            if self._child is not None:
                status = processes.stop(self._child, self.stop_signal, self.stop_grace_s)
                self._child = None
                self._pid_file.unlink(missing_ok=True)
                self._stopped(status)
        finally:
            if self._child is None:
                self._lock.release()

    def kill(self) -> None:
        """SIGKILL it and all its children, as a crash would. Raises EmbeddedError if it does not run."""
        if self.pid is None or self._child is None:
            raise EmbeddedError(f"{self.title} is not running")
        processes.kill(self._child)
        self._child = None
        self._lock.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def require_tools(self) -> None:
        """Find or fetch the programs. Raises ToolMissing or DownloadFailed."""

    @abstractmethod
    def _configure(self) -> Launch:
        """Prepare the directory; what to run."""

    @abstractmethod
    def _answers(self) -> bool:
        """Does a client get served?"""

    @abstractmethod
    def _complete(self) -> None:
        """What remains to be done once clients are served."""

    def _stopped(self, status: int) -> None:
        """What remains to be done after a stop; `status` is the exit status, or minus the signal."""
        return

    def _run(self, launch: Launch, timeout_s: float) -> None:
        """Run a helper to its end. Raises StartFailed if it fails, is cancelled or takes too long."""
        processes.run_to_completion(launch, timeout_s=timeout_s, cancelled=self._cancelled)

    @property
    def _pid_file(self) -> Path:
        return self.directory / f"{self.title.lower()}.pid"
