"""One PostgreSQL connection of one thread, reopened after a failure."""

from __future__ import annotations

from typing import Any

import psycopg

from services.wire.errors import Transient

#: What a retry can cure: lost connections, restarts, deadlocks, full disks, time-outs.
TRANSIENT_ERRORS = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.IdleInTransactionSessionTimeout,  # how a worker that was stopped finds out
    Transient,
)


#: A worker that is stopped inside a transaction must not hold its locks for ever. Its statements look a few
#: thousand keys up in tables of any size; a plan that reads a whole table is good for a small one only, and
#: stays in use while that grows: statistics come minutes later.
WORKER_OPTIONS = " ".join(
    f"-c {setting}"
    for setting in (
        "idle_in_transaction_session_timeout=20000",
        "enable_seqscan=off",
        "enable_hashjoin=off",
        "enable_mergejoin=off",
        "jit=off",
    )
)

#: For statements that read whole tables.
BULK_OPTIONS = "-c jit=off -c work_mem=64MB -c idle_in_transaction_session_timeout=60000"


class Database:
    """Lazily connected; :meth:`connection` gives a working one or raises an ``OperationalError``."""

    def __init__(self, dsn: str, name: str, options: str = WORKER_OPTIONS) -> None:
        self._dsn = dsn
        self._name = name
        self._options = options
        self._connection: psycopg.Connection[Any] | None = None

    def connection(self) -> psycopg.Connection[Any]:
        """An open connection in autocommit mode; transactions are explicit."""
        if self._connection is None or self._connection.closed or self._connection.broken:
            self._connection = psycopg.connect(
                self._dsn,
                autocommit=True,
                application_name=f"tidemeter-{self._name}",
                connect_timeout=5,
                prepare_threshold=1,
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                options=self._options,
            )
        return self._connection

    def reset(self) -> None:
        """Forget the connection after a failure: its transaction state is unknown."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
