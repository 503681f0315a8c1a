"""PostgreSQL for the threads of a process that serves HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from services.wire.errors import Transient

CONNECTIONS_MAX = 4
WAIT_S = 2.0
SERVER_TIMEOUT_MS = 5000


class DatabasePool:
    """Connected at first use: a process that only takes usage has no such connection.

    Apart from the pool that keys are verified with, so that nobody's list makes usage wait.
    """

    def __init__(self, dsn: Callable[[], str]) -> None:
        self._dsn = dsn
        self._lock = Lock()
        self._pool: ConnectionPool[psycopg.Connection[TupleRow]] | None = None

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in autocommit mode.

        Raises:
            Transient: PostgreSQL does not answer within the time limit.
        """
        try:
            with self._opened().connection() as connection:
                yield connection
        except (psycopg.OperationalError, PoolTimeout, TooManyRequests, OSError) as error:
            raise Transient("PostgreSQL does not answer") from error

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            if self._pool is not None:
                self._pool.close(timeout=WAIT_S)
                self._pool = None

    def _opened(self) -> ConnectionPool[psycopg.Connection[TupleRow]]:
        with self._lock:
            if self._pool is None:
                self._pool = ConnectionPool(
                    self._dsn(),
                    kwargs={
                        "autocommit": True,
                        "connect_timeout": int(WAIT_S),
                        "options": f"-c statement_timeout={SERVER_TIMEOUT_MS}",
                        "application_name": "tidemeter-ingest",
                    },
                    min_size=0,
                    max_size=CONNECTIONS_MAX,
                    max_waiting=64,
                    timeout=WAIT_S,
                    reconnect_timeout=WAIT_S,
                    num_workers=1,
                    check=ConnectionPool.check_connection,
                    open=True,
                )
            return self._pool
