"""usage_event v2 → v3: new names, billionths instead of millionths, and a source."""

from __future__ import annotations

from decimal import Decimal

from upcasters.values import WIDE, Record, fixed_decimal

SUBJECT, FROM, TO = "usage_event", 2, 3


def upcast(record: Record) -> Record:
    """A v2 record as v3.

    Raises:
        Rejected: the quantity does not fit at nine places.
    """
    quantity = Decimal(int.from_bytes(record["quantity"], "big", signed=True)).scaleb(-6, WIDE)
    return {
        "idempotency_key": record["event_id"],
        "tenant_id": record["tenant"],
        "customer_ref": record["customer"],
        "meter": record["metric"],
        "quantity": fixed_decimal(quantity, scale=9),
        "occurred_at": record["used_at"],
        "properties": record["attributes"],
        "source": "upcast/2",
    }
