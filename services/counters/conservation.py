"""The first promise as numbers: every record below a stored position has exactly one outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from services.counters.prepare import OUTCOMES
from services.wire.groups import COUNTERS as GROUP


@dataclass(frozen=True, slots=True)
class Conservation:
    """Records the counters went past, and what became of them. ``gap`` must be 0 at every moment."""

    records: int
    outcomes: Mapping[str, int]

    @property
    def gap(self) -> int:
        """Records without an outcome; negative: outcomes without a record."""
        return self.records - sum(self.outcomes.values())


def conservation(db: psycopg.Connection[Any]) -> Conservation:
    """Positions against outcomes, in one snapshot. The log itself is the other side: see the lag."""
    columns = ", ".join(f"coalesce(sum({outcome}), 0)::bigint" for outcome in OUTCOMES)
    row = db.execute(
        f"SELECT (SELECT coalesce(sum(next_offset - start_offset), 0)::bigint FROM partition_offsets "  # noqa: S608
        f"WHERE consumer = %s), {columns} FROM partition_accounts",
        (GROUP,),
    ).fetchone()
    numbers = row or (0,) * (1 + len(OUTCOMES))
    return Conservation(numbers[0], dict(zip(OUTCOMES, numbers[1:], strict=True)))


def outcomes_by_meter(db: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    """Received and outcomes of each (tenant, meter); the empty names hold what could not be read."""
    columns = ", ".join(f"sum({name})::bigint" for name in ("received", *OUTCOMES))
    rows = db.execute(
        f"SELECT tenant_id, meter, {columns} FROM partition_accounts "  # noqa: S608
        "GROUP BY tenant_id, meter ORDER BY tenant_id, meter"
    ).fetchall()
    return [dict(zip(("tenant", "meter", "received", *OUTCOMES), row, strict=True)) for row in rows]
