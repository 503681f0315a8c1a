"""PostgreSQL: whether what it confirms stays, whether it has our tables, and whether it has room. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from services.doctor.facts import OwnSettings, Postgres
from services.doctor.findings import Finding

VERSION_MIN = 150_000
#: Connections of one process of each kind, at most; the dispatcher has one more for each handler at work.
CONNECTIONS = {
    "ingest": 8,
    "counters": 6,
    "pusher": 7,
    "dispatcher": 6,
    "upkeep": 8,
    "replayer": 3,
    "reconciler": 3,
    "archive": 3,
}


def judge_postgres(postgres: Postgres, own: OwnSettings) -> Iterator[Finding]:
    """The server by itself."""
    if postgres.version < VERSION_MIN:
        yield Finding(
            "postgres_too_old",
            "PostgreSQL",
            f"PostgreSQL has version {postgres.version // 10_000}, and {VERSION_MIN // 10_000} is the oldest "
            "that we use.",
            "Upgrade the server.",
        )
    if postgres.is_standby:
        yield Finding(
            "postgres_standby",
            "PostgreSQL",
            "The DSN leads to a standby, which takes no writes.",
            "Add `target_session_attrs=read-write` to TIDEMETER_POSTGRES_DSN, or name the primary.",
        )
    yield from _durable(postgres)
    yield from _migrations(postgres)
    yield from _connections(postgres, own)


def _durable(postgres: Postgres) -> Iterator[Finding]:
    if postgres.settings.get("fsync") == "off":
        yield Finding(
            "fsync_off",
            "PostgreSQL",
            "fsync is off: a crash of the machine can damage every table.",
            "`ALTER SYSTEM SET fsync = on`, then reload the configuration.",
        )
    if postgres.settings.get("full_page_writes") == "off":
        yield Finding(
            "full_page_writes_off",
            "PostgreSQL",
            "full_page_writes is off: a power cut can leave pages that are half written.",
            "`ALTER SYSTEM SET full_page_writes = on`, then reload the configuration.",
        )
    if postgres.settings.get("synchronous_commit") == "off":
        yield Finding(
            "synchronous_commit_off",
            "PostgreSQL",
            "synchronous_commit is off for our user: a crash can lose meter events that were sent to Stripe "
            "already, and they would be sent again under other identifiers.",
            "`ALTER SYSTEM SET synchronous_commit = on`; look at `ALTER ROLE` and `ALTER DATABASE` settings "
            "too.",
        )


def _migrations(postgres: Postgres) -> Iterator[Finding]:
    known, applied = set(postgres.migrations_known), set(postgres.migrations_applied)
    if missing := sorted(known - applied):
        yield Finding(
            "schema_behind",
            "PostgreSQL",
            f"{len(missing)} of {len(known)} migrations of this release are not applied; the first is "
            f"{missing[0]}.",
            "Run `tidemeter migrate`.",
        )
    if foreign := sorted(applied - known):
        yield Finding(
            "schema_ahead",
            "PostgreSQL",
            f"{len(foreign)} migrations are applied that this release does not know; the first is "
            f"{foreign[0]}.",
            "Finish the rollout: a newer release was here.",
        )


def connections_needed(own: OwnSettings) -> int:
    """Connections of one process of each kind."""
    kinds = {name: number for name, number in CONNECTIONS.items() if own.archived or name != "archive"}
    return sum(kinds.values()) + own.webhook_concurrency


def _connections(postgres: Postgres, own: OwnSettings) -> Iterator[Finding]:
    allowed = int(postgres.settings.get("max_connections", "0"))
    reserved = sum(
        int(postgres.settings.get(name, "0"))
        for name in ("superuser_reserved_connections", "reserved_connections")
    )
    left = allowed - reserved - postgres.connections_foreign
    needed = connections_needed(own)
    if left < needed:
        yield Finding(
            "connections_too_few",
            "PostgreSQL",
            f"max_connections={allowed} leaves {left} for us, besides {reserved} reserved and "
            f"{postgres.connections_foreign} of other programs; one process of each kind takes up to "
            f"{needed}.",
            f"`ALTER SYSTEM SET max_connections = {allowed - left + 2 * needed}`, then restart the server.",
        )
