"""Meters and tenants as the counters see them: an immutable snapshot with the version it was read at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg

#: Calendar of a customer without one: calendar months in the tenant's time zone.
TENANT_CALENDAR: LiteralString = "'1 month ' || t.timezone"


@dataclass(frozen=True, slots=True)
class Meter:
    """One meter. Times in microseconds; ``calendar`` is for customers without one of their own."""

    tenant_id: str
    meter: str
    aggregation: str
    lateness_us: int
    late_policy: str
    allow_negative: bool
    calendar: str
    value_property: str | None = None
    dimensions: tuple[str, ...] = ()


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
    """Read everything. The version is read first: the next chunk finds, and reads, a change in between."""
    with db.transaction():
        version = read_version(db)
        rows = db.execute(
            "SELECT m.tenant_id, m.meter, m.aggregation, m.lateness_seconds, m.late_policy, "  # noqa: S608
            f"m.allow_negative, {TENANT_CALENDAR}, m.value_property, m.dimensions "
            "FROM meters m JOIN tenants t USING (tenant_id)"
        ).fetchall()
    meters = {
        (tenant_id, slug): Meter(
            tenant_id=tenant_id,
            meter=slug,
            aggregation=aggregation,
            lateness_us=lateness_s * 1_000_000,
            late_policy=late_policy,
            allow_negative=allow_negative,
            calendar=calendar,
            value_property=value_property,
            dimensions=tuple(dimensions),
        )
        for (
            tenant_id,
            slug,
            aggregation,
            lateness_s,
            late_policy,
            allow_negative,
            calendar,
            value_property,
            dimensions,
        ) in rows
    }
    return Configuration(version, meters)
