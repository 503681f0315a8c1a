"""PostgreSQL's settings, and what is declared in our tables. Reads only."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import psycopg

from schemas.catalog import ROOT
from services.doctor.facts import Alignment, Clock, Configuration, DeclaredMeter, Postgres
from services.webhooks.handlers.cycles import LIVE

Connection = psycopg.Connection[Any]

SETTINGS = (
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "max_connections",
    "superuser_reserved_connections",
    "reserved_connections",
)
#: Customers that Stripe is asked about, the newest ones.
SAMPLE_MAX = 10
ALIGNMENTS_MAX = 100_000


def gather_postgres(db: Connection) -> Postgres:
    """The server, as our user finds it."""
    rows = db.execute(
        "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(SETTINGS),)
    ).fetchall()
    version, standby, foreign, migrated = _row(
        db,
        "SELECT current_setting('server_version_num')::int, pg_is_in_recovery(), "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' "
        " AND application_name NOT LIKE 'tidemeter%'), to_regclass('_yoyo_migration') IS NOT NULL",
    )
    applied = db.execute("SELECT migration_id FROM _yoyo_migration").fetchall() if migrated else []
    return Postgres(
        version=version,
        settings=dict(rows),
        is_standby=standby,
        migrations_known=tuple(sorted(path.stem for path in (ROOT / "postgres").glob("*.sql"))),
        migrations_applied=tuple(sorted(row[0] for row in applied)),
        connections_foreign=foreign,
    )


def gather_postgres_clock(db: Connection) -> Clock:
    """PostgreSQL's clock beside ours."""
    before = time.time()
    (theirs,) = _row(db, "SELECT clock_timestamp()")
    after = time.time()
    return Clock("PostgreSQL", theirs.timestamp() - (before + after) / 2, (after - before) / 2)


def gather_configuration(db: Connection) -> Configuration:
    """Everything that was declared, and what webhooks said beside it.

    Raises:
        psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn: a migration is missing.
    """
    unmapped, deleted, live, test = _row(db, _COUNTS, {"since": datetime.now(UTC)})
    return Configuration(
        meters=_meters(db),
        zones={row[0]: row[1] for row in db.execute(_ZONES).fetchall()},
        calendars=tuple(
            row[0] for row in db.execute("SELECT DISTINCT calendar FROM customers WHERE calendar IS NOT NULL")
        ),
        alignments=tuple(
            Alignment(*row)
            for row in db.execute(_ALIGNMENTS, {"live": LIVE, "limit": ALIGNMENTS_MAX}).fetchall()
        ),
        customers_unmapped=unmapped,
        customers_deleted=deleted,
        livemode_events=live,
        testmode_events=test,
        sample=tuple((row[0], row[1]) for row in db.execute(_SAMPLE, (SAMPLE_MAX,)).fetchall()),
    )


def _meters(db: Connection) -> tuple[DeclaredMeter, ...]:
    rows = db.execute(
        "SELECT tenant_id, meter, CASE aggregation WHEN 'last' THEN 'last' ELSE 'sum' END, lateness_seconds, "
        "allow_negative, event_name, customer_payload_key, value_payload_key FROM meters ORDER BY 1, 2"
    ).fetchall()
    return tuple(DeclaredMeter(*row) for row in rows)


_COUNTS = """
SELECT (SELECT count(*) FROM (SELECT DISTINCT tenant_id, customer_ref FROM items) i
        LEFT JOIN customers c USING (tenant_id, customer_ref)
        WHERE c.stripe_customer IS NULL AND i.customer_ref !~ '^cus_[A-Za-z0-9_]+$'),
       (SELECT count(*) FROM customers c JOIN stripe_customers s USING (stripe_customer)
        WHERE s.deleted_at IS NOT NULL),
       (SELECT count(*) FROM webhook_events WHERE created_at > %(since)s - interval '7 days' AND livemode),
       (SELECT count(*) FROM webhook_events WHERE created_at > %(since)s - interval '7 days' AND NOT livemode)
"""

_ZONES = """
SELECT zone, count(*)::int FROM (
    SELECT timezone AS zone FROM tenants
    UNION ALL SELECT split_part(calendar, ' ', 3) FROM customers WHERE calendar IS NOT NULL
) uses GROUP BY zone
"""

#: The oldest live metered subscription decides, as for the handlers of webhooks.
_ALIGNMENTS = """
SELECT coalesce(c.calendar, '1 month ' || t.timezone), coalesce(k.timezone, 'UTC'), s.unit, s.count, s.anchor
FROM (SELECT DISTINCT ON (stripe_customer) stripe_customer, unit, count, anchor FROM stripe_subscriptions
      WHERE account = '' AND is_metered AND status = ANY(%(live)s) AND unit IS NOT NULL
      ORDER BY stripe_customer, created_at, subscription_id) s
JOIN customers c USING (stripe_customer)
JOIN tenants t USING (tenant_id)
LEFT JOIN stripe_customers k ON k.stripe_customer = s.stripe_customer AND k.account = ''
LIMIT %(limit)s
"""

_SAMPLE = """
SELECT DISTINCT ON (c.created_at, c.stripe_customer) c.stripe_customer, m.event_name
FROM customers c JOIN meters m USING (tenant_id)
ORDER BY c.created_at DESC, c.stripe_customer, m.meter LIMIT %s
"""


def _row(db: Connection, statement: str, parameters: Any = None) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = db.execute(statement, parameters).fetchone()
    if row is None:
        raise psycopg.DataError("PostgreSQL answered without a row")
    return row
