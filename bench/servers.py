"""Where a benchmark runs: on the servers named in the environment, or on embedded ones of its own."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from services.embedded import EmbeddedRuntime
from services.wire.errors import Misconfigured
from services.wire.migrations import apply_migrations
from services.wire.settings import load_settings

KAFKA_VARIABLES = ("TIDEMETER_KAFKA_BOOTSTRAP", "TIDEMETER_KAFKA_BOOTSTRAP_FILE")
POSTGRES_VARIABLES = ("TIDEMETER_POSTGRES_DSN", "TIDEMETER_POSTGRES_DSN_FILE")


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses. ``given`` servers outlive the benchmark and must be left as they were found."""

    bootstrap: str
    dsn: str
    given: bool


@contextmanager
def servers() -> Iterator[Servers]:
    """The given servers; or new ones, which end, with their data, together with the block.

    Raises:
        Misconfigured: only one of the two is named.
    """
    named = [any(os.environ.get(name) for name in pair) for pair in (KAFKA_VARIABLES, POSTGRES_VARIABLES)]
    if all(named):
        settings = load_settings()
        yield Servers(settings.kafka(), settings.postgres(), given=True)
        return
    if any(named):
        raise Misconfigured(f"set both {KAFKA_VARIABLES[0]} and {POSTGRES_VARIABLES[0]}, or neither")
    with (
        tempfile.TemporaryDirectory(prefix="tidemeter-bench-") as directory,
        EmbeddedRuntime(Path(directory)) as runtime,
    ):
        yield Servers(runtime.kafka_bootstrap, runtime.postgres_dsn, given=False)


@contextmanager
def fresh_database(dsn: str) -> Iterator[str]:
    """A new, migrated database beside that of ``dsn``; dropped in the end, whoever is still connected.

    Raises:
        Misconfigured: the role may not create databases.
    """
    name = f"tidemeter_bench_{secrets.token_hex(4)}"
    with psycopg.connect(dsn, autocommit=True) as db:
        try:
            db.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except psycopg.errors.InsufficientPrivilege:
            raise Misconfigured(
                "the benchmark needs a PostgreSQL role that may create databases: ALTER ROLE … CREATEDB"
            ) from None
        try:
            fresh = _with_database(dsn, name)
            apply_migrations(fresh)
            yield fresh
        finally:
            db.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _with_database(dsn: str, name: str) -> str:
    """``dsn`` as a URL (the migrations take no other form), with another database."""
    parts = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    parts.pop("dbname", None)
    user, password = parts.pop("user", ""), parts.pop("password", "")
    login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    host, port = parts.pop("host", ""), parts.pop("port", "5432")
    if host.startswith("/"):
        parts["host"], host = host, ""
    return f"postgresql://{login}{'@' if login else ''}{host}:{port}/{name}" + (
        f"?{urlencode(parts)}" if parts else ""
    )
