"""One SQLite database, written as requests run and committed in groups.

Every change of one request happens between two awaits, so it lies in one transaction. The commit follows
in the same turn of the event loop and covers all requests of that turn; `durable()` waits for it. An
answer sent after `durable()` survives a SIGKILL of this process (WAL, synchronous=NORMAL: a power cut may
lose the last moments). Without a path the database lives in memory, in one transaction that never ends.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, Inexact
from pathlib import Path
from typing import Any

import structlog

Values = Sequence[Any] | Mapping[str, Any]

log = structlog.get_logger()

# Values have at most 15 digits and 100 characters; 400 digits hold any sum of them, and more would raise.
EXACT = Context(prec=400, traps=[Inexact])

BUSY_SECONDS = 1.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS customers (id TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS meters (id TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (
    sequence INTEGER PRIMARY KEY, identifier TEXT NOT NULL, event_name TEXT NOT NULL, meter TEXT NOT NULL,
    customer TEXT NOT NULL, value TEXT NOT NULL, timestamp INTEGER NOT NULL, received_at REAL NOT NULL,
    visible_at REAL NOT NULL, idempotency_key TEXT, request_id TEXT NOT NULL,
    cancelled_at REAL, cancel_visible_at REAL
);
CREATE INDEX IF NOT EXISTS ledger_by_identifier ON ledger (identifier);
CREATE INDEX IF NOT EXISTS ledger_by_usage ON ledger (meter, customer, timestamp);
CREATE TABLE IF NOT EXISTS ledger_dimensions (sequence INTEGER PRIMARY KEY, dimensions TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS error_reports (
    sequence INTEGER PRIMARY KEY, code TEXT NOT NULL, message TEXT NOT NULL, identifier TEXT NOT NULL,
    event_name TEXT NOT NULL, customer TEXT, received_at REAL NOT NULL, request_id TEXT NOT NULL, meter TEXT,
    idempotency_key TEXT, reported INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS error_reports_by_identifier ON error_reports (identifier);
CREATE VIEW IF NOT EXISTS ledger_rows AS
    SELECT sequence, identifier, event_name, customer, value, timestamp, received_at, idempotency_key,
        request_id, cancelled_at
    FROM ledger;
CREATE VIEW IF NOT EXISTS accepted AS
    SELECT identifier, event_name, received_at FROM ledger
    UNION ALL SELECT identifier, event_name, received_at FROM error_reports;
CREATE TABLE IF NOT EXISTS identifier_uses (
    identifier TEXT PRIMARY KEY, event_name TEXT NOT NULL, customer TEXT NOT NULL, value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS identifier_conflicts (
    identifier TEXT NOT NULL, event_name TEXT NOT NULL, customer TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (identifier, event_name, customer, value)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS idempotency (
    account TEXT NOT NULL, key TEXT NOT NULL, fingerprint BLOB NOT NULL, status INTEGER NOT NULL,
    headers TEXT NOT NULL, body BLOB NOT NULL, request_id TEXT NOT NULL, created_at REAL NOT NULL,
    PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS idempotency_v2 (
    account TEXT NOT NULL, key TEXT NOT NULL, fingerprint BLOB NOT NULL, status INTEGER NOT NULL,
    headers TEXT NOT NULL, body BLOB NOT NULL, request_id TEXT NOT NULL, created_at REAL NOT NULL,
    PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (
    token TEXT PRIMARY KEY, account TEXT NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS destinations (id TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, type TEXT NOT NULL,
    created REAL NOT NULL, body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS deliveries (
    sequence INTEGER PRIMARY KEY, destination TEXT NOT NULL, event TEXT NOT NULL, type TEXT NOT NULL,
    body BLOB NOT NULL, due_at REAL NOT NULL, retries INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'pending', statuses TEXT NOT NULL DEFAULT '[]', fault TEXT,
    fault_seconds REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (due_at, sequence) WHERE state = 'pending';
CREATE TABLE IF NOT EXISTS resources (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, created INTEGER NOT NULL, due_at REAL, belongs_to TEXT,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS resources_by_kind ON resources (kind, created);
CREATE INDEX IF NOT EXISTS resources_due ON resources (due_at) WHERE due_at IS NOT NULL;
"""

# Columns that files of an earlier version lack: (table, column, declaration).
LATER_COLUMNS = (
    ("error_reports", "meter", "TEXT"),
    ("error_reports", "idempotency_key", "TEXT"),
    ("error_reports", "reported", "INTEGER NOT NULL DEFAULT 0"),
)
LATER_INDEXES = """
CREATE INDEX IF NOT EXISTS error_reports_open ON error_reports (received_at) WHERE reported = 0;
"""

TABLES = (
    "settings",
    "customers",
    "meters",
    "ledger",
    "ledger_dimensions",
    "error_reports",
    "identifier_uses",
    "identifier_conflicts",
    "idempotency",
    "idempotency_v2",
    "sessions",
    "destinations",
    "events",
    "deliveries",
    "resources",
)


class DecimalSum:
    """SQL aggregate `decimal_sum`: exact, over values kept as text."""

    def __init__(self) -> None:
        self.total = Decimal(0)

    def step(self, value: str) -> None:
        self.total = EXACT.add(self.total, Decimal(value))

    def finalize(self) -> str:
        return f"{self.total:f}"


class Store:
    """The database and its group commit. Used from one event loop only."""

    def __init__(self, path: Path | None) -> None:
        self._in_memory = path is None
        # Requests run on the loop's thread; the application may have been built on another one.
        self._db = sqlite3.connect(
            path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._db.create_aggregate("decimal_sum", 1, DecimalSum)  # type: ignore[arg-type]  # stubs know int only
        self._db.execute(
            "PRAGMA locking_mode = EXCLUSIVE"
        )  # a second simulator on the same file fails at start
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(SCHEMA)
        self._add_later_columns()
        self._db.executescript(LATER_INDEXES)
        self._commit: asyncio.Future[None] | None = None
        self.failure: Exception | None = None

    def read(self, sql: str, values: Values = ()) -> list[Any]:
        return self._db.execute(sql, values).fetchall()

    def read_one(self, sql: str, values: Values = ()) -> Any:
        return self._db.execute(sql, values).fetchone()

    def read_named(self, sql: str, values: Values = ()) -> list[dict[str, Any]]:
        cursor = self._db.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def write(self, sql: str, values: Values = ()) -> int:
        """Change rows in the open transaction; returns how many changed."""
        self._begin()
        return self._db.execute(sql, values).rowcount

    def write_many(self, sql: str, rows: Sequence[Values]) -> int:
        """The same statement for each row; returns how many rows changed in all."""
        if not rows:
            return 0
        self._begin()
        return self._db.executemany(sql, rows).rowcount

    def _begin(self) -> None:
        if self.failure is not None:
            raise RuntimeError("the simulator's database failed earlier") from self.failure
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        if self._commit is None and not self._in_memory:
            self._schedule_commit()

    async def durable(self) -> None:
        """Return when everything written so far would survive the death of this process."""
        if self._commit is not None:
            await asyncio.shield(self._commit)

    def clear(self) -> None:
        for table in TABLES:
            self.write(f"DELETE FROM {table}")  # noqa: S608  names come from the tuple above

    def setting(self, name: str, default: str) -> str:
        row = self.read_one("SELECT value FROM settings WHERE name = ?", (name,))
        return default if row is None else str(row[0])

    def keep_setting(self, name: str, value: str) -> None:
        self.write("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def close(self) -> None:
        if self._db.in_transaction and self.failure is None:
            self._db.execute("COMMIT")
        self._db.close()

    def _add_later_columns(self) -> None:
        for table, column, declaration in LATER_COLUMNS:
            known = [row[1] for row in self.read(f"PRAGMA table_info({table})")]
            if column not in known:
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {declaration}")

    def _schedule_commit(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop yet: `close` or the next write inside a loop commits
            return
        self._commit = loop.create_future()
        loop.call_soon(self._commit_group, self._commit)

    def _commit_group(self, done: asyncio.Future[None]) -> None:
        self._commit = None
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self.failure = error
            log.error("simulator_commit_failed", error=type(error).__name__)
            done.set_exception(error)
            done.exception()  # taken here too, so that a group nobody waits for is not reported as forgotten
            return
        done.set_result(None)
