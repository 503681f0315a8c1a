"""usage_delta v1 → v2: dimensions, the Stripe meter's formula, and the last safe moment for a push."""

from __future__ import annotations

from upcasters.values import Record

SUBJECT, FROM, TO = "usage_delta", 1, 2


def upcast(record: Record) -> Record:
    """A v1 record as v2: before it, items were not split, every meter added up, and no invoice was known."""
    return {**record, "dimensions": {}, "formula": "sum", "push_before": None}
