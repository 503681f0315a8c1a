"""Apply ``schemas/postgres/*.sql`` in order, each once, under a lock, with yoyo-migrations."""

from __future__ import annotations

from typing import Any

import psycopg
import structlog
from yoyo import get_backend, read_migrations

from schemas.catalog import ROOT
from services.wire.errors import Transient

log = structlog.get_logger(__name__)


def apply_migrations(dsn: str) -> int:
    """Bring the database up to date and return the number of migrations applied.

    Two processes may call it at once; one waits.

    Raises:
        Transient: PostgreSQL does not answer.
    """
    try:
        backend: Any = get_backend(dsn.replace("postgresql://", "postgresql+psycopg://", 1))
    except psycopg.OperationalError as error:
        raise Transient("PostgreSQL does not answer") from error
    migrations = read_migrations(str(ROOT / "postgres"))
    try:
        with backend.lock():
            due = backend.to_apply(migrations)
            backend.apply_migrations(due)
    finally:
        backend.connection.close()
    log.info("migrations applied", applied=len(due), known=len(migrations))
    return len(due)
