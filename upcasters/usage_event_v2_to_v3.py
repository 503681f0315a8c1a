"""usage_event v2 → v3: new names, billionths instead of millionths, and a source."""

from __future__ import annotations

from upcasters.values import Record

SUBJECT, FROM, TO = "usage_event", 2, 3


def upcast(record: Record) -> Record:
    """A v2 record as v3.

    Raises:
        OverflowError: the quantity does not fit 16 bytes at nine places.
    """
    millionths = int.from_bytes(record["quantity"], "big", signed=True)
    return {
        "idempotency_key": record["event_id"],
        "tenant_id": record["tenant"],
        "customer_ref": record["customer"],
        "meter": record["metric"],
        "quantity": (millionths * 1000).to_bytes(16, "big", signed=True),
        "occurred_at": record["used_at"],
        "properties": record["attributes"],
        "source": "upcast/2",
    }
