"""Meters and tenants as the counters see them: an immutable snapshot with the version it was read at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from services.counters.periods import Calendar


@dataclass(frozen=True, slots=True)
class Meter:
    """One meter. Times in microseconds."""

    tenant_id: str
    meter: str
    aggregation: str
    lateness_us: int
    late_policy: str
    allow_negative: bool
    calendar: Calendar


@dataclass(frozen=True, slots=True)
class Configuration:
    """Every meter by (tenant, slug), as of ``version``."""

    version: int
    meters: Mapping[tuple[str, str], Meter]


def read_version(db: psycopg.Connection[Any]) -> int:
    """The version of the configuration that this transaction sees."""
    row = db.execute("SELECT version FROM config_version").fetchone()
    return int(row[0]) if row else 0


def load_configuration(db: psycopg.Connection[Any]) -> Configuration:
    """Read everything. The version is read first: a change in between is found, and read, by the next chunk.

    Raises:
        Misconfigured: a tenant has an unknown time zone.
    """
    with db.transaction():
        version = read_version(db)
        rows = db.execute(
            "SELECT m.tenant_id, m.meter, m.aggregation, m.lateness_seconds, m.late_policy, "
            "m.allow_negative, t.timezone FROM meters m JOIN tenants t USING (tenant_id)"
        ).fetchall()
    meters = {
        (row[0], row[1]): Meter(row[0], row[1], row[2], row[3] * 1_000_000, row[4], row[5], Calendar(row[6]))
        for row in rows
    }
    return Configuration(version, meters)
