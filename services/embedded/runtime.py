"""Kafka and PostgreSQL together, under one directory, for one owner.

Promises both or neither: when `start()` returns, both serve; when it raises, neither runs. A second runtime
on the same directory is refused with the pid of the first. Creates no topics and applies no migrations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from .kafka import EmbeddedKafka
from .postgres import EmbeddedPostgres
from .processes import DirectoryLock

DATA_VARIABLE = "TIDEMETER_DATA_DIR"


def default_root() -> Path:
    """TIDEMETER_DATA_DIR, else ~/.local/share/tidemeter."""
    configured = os.environ.get(DATA_VARIABLE)
    if configured:
        return Path(configured).expanduser().absolute()
    return Path.home() / ".local" / "share" / "tidemeter"


class EmbeddedRuntime:
    """Both servers. `root` defaults to `default_root()`; ports are chosen and remembered if None."""

    def __init__(
        self, root: Path | None = None, *, kafka_port: int | None = None, postgres_port: int | None = None
    ) -> None:
        self.root = (root or default_root()).expanduser().absolute()
        self.kafka = EmbeddedKafka(self.root / "kafka", port=kafka_port)
        self.postgres = EmbeddedPostgres(self.root / "postgres", port=postgres_port)
        self._lock = DirectoryLock(self.root, "Tidemeter")

    @property
    def kafka_bootstrap(self) -> str:
        """``host:port`` of the broker. Raises EmbeddedError before the first start."""
        return self.kafka.bootstrap

    @property
    def postgres_dsn(self) -> str:
        """Connection string, password included. Raises EmbeddedError before the first start."""
        return self.postgres.dsn

    def start(self) -> None:
        """Start both at once and wait for both; starts only what does not run already.

        Raises the EmbeddedError of the one that failed, or KeyboardInterrupt, after stopping the other.
        """
        # In this thread, which is the one that a Ctrl-C during the download interrupts.
        self.postgres.require_tools()
        self.kafka.require_tools()
        if not self._lock.held:
            # Root's PostgreSQL runs as another user, who must be able to pass through.
            self._lock.acquire(mode=0o711 if os.geteuid() == 0 else 0o700)
        try:
            _both([self.postgres.start, self.kafka.start], interrupted=self._cancel)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop both at once, within 25 seconds; data stay. Harmless if nothing runs.

        At a terminal, the first stop may take some seconds more: see `EmbeddedKafka`.
        """
        try:
            _both([self.kafka.stop, self.postgres.stop], interrupted=self._cancel)
        finally:
            self._lock.release()

    def _cancel(self) -> None:
        self.kafka.cancel()
        self.postgres.cancel()

    def __enter__(self) -> EmbeddedRuntime:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _both(calls: Sequence[Callable[[], None]], interrupted: Callable[[], None]) -> None:
    """Run all in threads, wait for all, then raise the first error, if any.

    On a KeyboardInterrupt calls `interrupted`, still waits for all, then raises it.
    """
    pool = ThreadPoolExecutor(len(calls), thread_name_prefix="embedded")
    futures = [pool.submit(call) for call in calls]
    try:
        wait(futures)
    except BaseException:
        interrupted()
        wait(futures)
        raise
    finally:
        pool.shutdown(wait=False)
    for future in futures:
        future.result()
