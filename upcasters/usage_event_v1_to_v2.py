"""usage_event v1 → v2: a tenant field, exact millionths for floats, microseconds for seconds."""

from __future__ import annotations

from upcasters.values import Record, decimal_of_float, fixed_decimal

SUBJECT, FROM, TO = "usage_event", 1, 2


def upcast(record: Record) -> Record:
    """A v1 record as v2.

    Raises:
        ValueError: the customer string names no tenant.
        Rejected: the quantity is not finite or does not fit.
    """
    tenant, slash, customer = record["customer"].partition("/")
    if not (tenant and slash and customer):
        raise ValueError("customer is not '<tenant>/<customer>'")
    return {
        "event_id": record["event_id"],
        "tenant": tenant,
        "customer": customer,
        "metric": record["metric"],
        "quantity": fixed_decimal(decimal_of_float(record["value"]), scale=6),
        "used_at": record["timestamp"] * 1_000_000,
        "attributes": dict(_attribute(tag) for tag in record["tags"]),
    }


def _attribute(tag: str) -> tuple[str, str]:
    key, _, value = tag.partition("=")
    return key, value
