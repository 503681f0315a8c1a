"""What Kafka and PostgreSQL share as child processes: spawn, find again, stop; ports, locks, log tails.

Promises: a server never outlives its owner (Linux: the kernel sees to it; elsewhere: the next start does);
nothing is ever stopped by name, only by a pid whose birth and command line were recorded; waits are bounded.

A Ctrl-C in the terminal reaches the owner only, because each server leads a session of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

try:
    import psutil
except ImportError as missing:
    raise ImportError("the embedded runtime needs: pip install 'tidemeter[embedded]'") from missing

from .errors import AlreadyRunning, EmbeddedError, StartFailed

LOOPBACK = "127.0.0.1"
# Below the range kernels hand out to outgoing connections, so that a remembered port stays ours.
PORT_FIRST, PORT_LAST = 20_000, 29_999
PORT_ATTEMPTS = 200
LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_TAIL_LINES = 20
KILL_TIMEOUT_S = 10.0
POLL_S = 0.05
BIRTH_TOLERANCE_S = 60.0  # clocks are set; pid and command line must match anyway
FORK_TIMEOUT_S = 30.0
ELSEWHERE = "TIDEMETER_DATA_DIR names another directory."

_LAUNCH = Path(__file__).with_name("launch.py")


@dataclass(frozen=True, slots=True)
class ServiceUser:
    """The ordinary user a server becomes when we are root."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One server to start. `marker` is a part of its command line that no other process would have."""

    command: Sequence[str]
    marker: str
    directory: Path
    name: str
    environment: Mapping[str, str]
    user: ServiceUser | None = None
    needs: Sequence[Path] = field(default=())

    @property
    def log(self) -> Path:
        """Where standard output and error go."""
        return self.directory / f"{self.name}.out"

    @property
    def pid_file(self) -> Path:
        """Remembers the process across a crash of the owner."""
        return self.directory / f"{self.name}.pid"


class Spawner:
    """The one thread that forks servers, alive as long as the process.

    The kernel's parent-death signal follows the *thread* that forked, not the process: a server started
    from a short-lived worker thread would be killed when that thread returns. So all are started from here.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._work: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="tidemeter-spawner", daemon=True).start()

    def _serve(self) -> None:
        while True:
            call, result = self._work.get()
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)

    def popen(self, arguments: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """subprocess.Popen, on the long-lived thread. Raises OSError like it."""
        result: Future[object] = Future()
        self._work.put((lambda: subprocess.Popen(arguments, **options), result))  # type: ignore[call-overload]  # noqa: S603
        child = result.result(timeout=FORK_TIMEOUT_S)
        if not isinstance(child, subprocess.Popen):
            raise EmbeddedError("the spawner returned no process")
        return child


_spawner: Spawner | None = None
_spawner_lock = threading.Lock()


def spawner() -> Spawner:
    """The spawner of this process (a fork has none of its parent's threads, so it gets a new one)."""
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner.pid != os.getpid():
            _spawner = Spawner()
        return _spawner


def spawn(launch: Launch) -> subprocess.Popen[bytes]:
    """Start a server, bound to our life, in its own session, logging to `launch.log`; record its pid.

    Raises EmbeddedError if it cannot even be forked.
    """
    rotate(launch.log)
    user = launch.user
    prefix = [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid())]
    prefix += [str(user.uid), str(user.gid)] if user else ["-", "-"]
    prefix += [os.pathsep.join(str(path) for path in launch.needs)]
    with launch.log.open("ab") as log:
        try:
            child = spawner().popen(
                [*prefix, *launch.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=launch.directory,
                env=dict(launch.environment),
                start_new_session=True,
            )
        except OSError as error:
            raise EmbeddedError(f"cannot start {launch.name}: {error}") from error
    with contextlib.suppress(psutil.NoSuchProcess):
        born_s = psutil.Process(child.pid).create_time()
        record = {"pid": child.pid, "born_s": born_s, "marker": launch.marker}
        write_text(launch.pid_file, json.dumps(record))
    return child


def run_to_completion(launch: Launch, *, timeout_s: float, cancelled: threading.Event) -> None:
    """Run a short command the way a server is run, and wait.

    Raises StartFailed, with its output, if it fails, takes longer than `timeout_s` seconds, or if `cancelled`
    is set.
    """
    child = spawn(launch)
    deadline_s = time.monotonic() + timeout_s
    try:
        while child.poll() is None and time.monotonic() < deadline_s:
            if cancelled.wait(POLL_S):
                raise StartFailed(f"{launch.name} was cancelled")
    finally:
        if child.poll() is None:
            kill(child)
        launch.pid_file.unlink(missing_ok=True)
    if child.returncode != 0:
        raise StartFailed(f"{launch.name} failed (exit {child.returncode}).\n{tail(launch.log)}")


def await_ready(
    launch: Launch,
    child: subprocess.Popen[bytes],
    ready: Callable[[], bool],
    *,
    logs: Sequence[Path],
    timeout_s: float,
    cancelled: threading.Event,
) -> None:
    """Poll until `ready()`.

    Raises StartFailed with the last log lines if the process ends first, if `timeout_s` seconds pass, or if
    `cancelled` is set.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = child.poll()
        if status is not None:
            raise StartFailed(f"{launch.name} ended with {status} while starting.\n{tails(logs)}")
        if ready():
            return
        if cancelled.wait(POLL_S):
            raise StartFailed(f"the start of {launch.name} was cancelled")
    raise StartFailed(f"{launch.name} was not ready within {timeout_s:.0f} s.\n{tails(logs)}")


def listens(port: int) -> bool:
    """Does anything accept connections on this loopback port?"""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def stop(child: subprocess.Popen[bytes], signal_number: int, grace_s: float) -> int:
    """Signal, wait up to `grace_s` seconds, then kill it with all descendants; its exit status.

    Returns only when the process is gone and reaped. Raises EmbeddedError if even SIGKILL did not end it.
    """
    family = family_of(child.pid)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=grace_s)
    end([*family, *family_of(child.pid)])
    return _reap(child)


def kill(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process, then all its descendants, as a crash would; wait for the end of all of them.

    The pid file stays, as after a real crash. Raises EmbeddedError if one survives.
    """
    end(family_of(child.pid))
    _reap(child)


def stop_stale(pid_file: Path, grace_s: float) -> int | None:
    """Stop the server that an earlier, crashed owner left behind; its pid, or None if there was none.

    Call it only while holding the directory's lock: then no live owner exists. A process is taken for ours
    only if pid, time of birth and command line all match the record, so a recycled pid is left alone.
    """
    found = None
    try:
        record = json.loads(pid_file.read_text())
        process = psutil.Process(int(record["pid"]))
        same_birth = abs(process.create_time() - float(record["born_s"])) <= BIRTH_TOLERANCE_S
        if same_birth and record["marker"] in " ".join(process.cmdline()):
            found = process.pid
            family = family_of(found)
            if grace_s > 0:
                process.terminate()
                _await_end([process], grace_s)
            end(family)
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        pass  # no file, a torn file, or the process is gone: nothing to stop
    pid_file.unlink(missing_ok=True)
    return found


def family_of(pid: int) -> list[psutil.Process]:
    """The process and all its descendants, parents first; empty if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(victims: Sequence[psutil.Process]) -> None:
    """SIGKILL each, in this order, and wait for all. Raises EmbeddedError if one survives for 10 seconds."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    alive = _await_end(victims, KILL_TIMEOUT_S)
    if alive:
        raise EmbeddedError(f"processes {alive} survived SIGKILL for {KILL_TIMEOUT_S:.0f} s")


def _await_end(processes: Sequence[psutil.Process], timeout_s: float) -> list[int]:
    """Pids still running after `timeout_s` seconds."""
    deadline_s = time.monotonic() + timeout_s
    while alive := [process.pid for process in processes if runs(process)]:
        if time.monotonic() > deadline_s:
            return alive
        time.sleep(POLL_S)
    return []


def runs(process: psutil.Process) -> bool:
    """Is it alive? A zombie is not: it can do nothing any more, and whoever must reap it may never do so."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _reap(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(timeout=KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"process {child.pid} survived SIGKILL for {KILL_TIMEOUT_S:.0f} s") from error


def choose_port(given: int | None, remembered_in: Path, taken: Sequence[int] = ()) -> int:
    """The given port, else the remembered one, else a free one; and remember it.

    A remembered port that somebody else took meanwhile is replaced. Raises EmbeddedError if the given one is
    busy or no free one was found.
    """
    if given is not None:
        if not is_free(given):
            raise EmbeddedError(f"port {given} on {LOOPBACK} is in use; choose another one")
        port = given
    else:
        port = next(port for port in _port_candidates(remembered_in) if port not in taken and is_free(port))
    write_text(remembered_in, f"{port}\n")
    return port


def _port_candidates(remembered_in: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        yield int(remembered_in.read_text())
    for _ in range(PORT_ATTEMPTS):
        yield random.randint(PORT_FIRST, PORT_LAST)  # noqa: S311 - spreads, guards nothing
    raise EmbeddedError(f"no free port between {PORT_FIRST} and {PORT_LAST} on {LOOPBACK}")


def is_free(port: int) -> bool:
    """Can a server bind this loopback port now?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class DirectoryLock:
    """Exclusive ownership of a directory while held; freed by the kernel when the owner dies."""

    def __init__(self, directory: Path, what: str) -> None:
        self.directory = directory
        self.what = what
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Is it ours?"""
        return self._file is not None

    def acquire(self, mode: int = 0o700) -> None:
        """Create the directory with `mode` if it is missing, and take it, at once.

        Raises AlreadyRunning, naming the pid of the owner, or EmbeddedError if it cannot be written.
        """
        import fcntl  # not on Windows, where this package can still be imported

        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=mode)
            file = os.open(self.directory / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EmbeddedError(f"{self.what} cannot use {self.directory}: {error}. {ELSEWHERE}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise AlreadyRunning(
                f"{self.what} at {self.directory} is already running as process {owner or 'unknown'}. "
                f"Stop that one, or use its addresses. {ELSEWHERE}",
                pid=int(owner) if owner.isdigit() else None,
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Give it up; harmless if not held. The file stays: removing it would race with the next owner."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def rotate(log: Path) -> None:
    """Keep one older log once the current one exceeds 8 MiB."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_name(log.name + ".1"))


def tail(log: Path, lines_max: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, headed by its path; says so if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            lines = file.read().decode(errors="replace").splitlines()[-lines_max:]
    except OSError:
        return f"({log}: no log)"
    return "\n".join([f"{log}:", *(f"  {line}" for line in lines)] if lines else [f"({log}: empty)"])


def tails(logs: Sequence[Path]) -> str:
    """Several tails, one after the other."""
    return "\n".join(tail(log) for log in logs)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a small file so that a crash leaves the old or the new one, never half."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
