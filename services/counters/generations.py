"""Expire idempotency keys by dropping a whole table, never by deleting rows.

Keys are written to ``seen_current`` and looked up there and in ``seen_previous``. Once the current
generation is as old as the retention, the previous one is dropped and the current one takes its place: a key
is known for at least the retention and at most twice that. Renaming takes an exclusive lock, so it waits for
the transactions under way, and those after it see the new tables.
"""

from __future__ import annotations

from typing import Any

import psycopg

_COLUMNS = """(
    event_id uuid PRIMARY KEY, digest bigint NOT NULL, source smallint NOT NULL, partition int NOT NULL,
    "offset" bigint NOT NULL
)"""


def rotate_generations(db: psycopg.Connection[Any], dedupe_days: int) -> bool:
    """Start a new generation when the current one is ``dedupe_days`` old; True when it did.

    Raises:
        psycopg.errors.LockNotAvailable: somebody reads the tables for long; try again later.
    """
    with db.transaction():
        # A long reader (a dump, an analyst) must not make every chunk queue behind this exclusive lock.
        db.execute("SET LOCAL lock_timeout = '2s'")
        due = db.execute(
            "SELECT FROM seen_generation WHERE started_at <= now() - make_interval(days => %s) "
            "FOR UPDATE SKIP LOCKED",
            (dedupe_days,),
        ).fetchone()
        if due is None:
            return False
        db.execute("DROP TABLE seen_previous")
        db.execute("ALTER TABLE seen_current RENAME TO seen_previous")
        db.execute("ALTER INDEX seen_current_pkey RENAME TO seen_generation_key_" + _suffix(db))
        db.execute("CREATE TABLE seen_current " + _COLUMNS)
        db.execute("UPDATE seen_generation SET started_at = now()")
        return True


def _suffix(db: psycopg.Connection[Any]) -> str:
    row = db.execute("SELECT extract(epoch FROM now())::bigint").fetchone()
    return str(int(row[0])) if row else "0"
