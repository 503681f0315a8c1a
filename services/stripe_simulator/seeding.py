"""Customers and meters under ids of someone's choice, for tests and profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.stripe_simulator.forms import Params
from services.stripe_simulator.meters import Customer, Meter, new_id, read_customer, read_meter

STATUSES = ("active", "inactive")


def customer_from(given: Any, now: int) -> Customer:
    """An id, or what POST /v1/customers takes plus `id`; ApiError or ValueError says what is wrong."""
    fields = {"id": given} if isinstance(given, str) else _mapping(given, "a customer is an id or an object")
    customer = Customer(_id(fields) or new_id("cus"), now)
    return read_customer(Params(fields), customer)


def meter_from(given: Any, now: int) -> Meter:
    """An event name, whose meter is `mtr_` and that name, or an object.

    The object is what POST /v1/billing/meters takes plus `id` and `status`; sum is the default formula.
    """
    if isinstance(given, str):
        given = {"id": f"mtr_{given}", "event_name": given}
    named = _mapping(given, "a meter is an event name or an object")
    fields = {
        "default_aggregation": {"formula": "sum"},
        "display_name": named.get("event_name", "meter"),
        **named,
    }
    meter_id, status = _id(fields) or new_id("mtr_test"), fields.pop("status", STATUSES[0])
    if status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}")
    meter = read_meter(Params(fields), meter_id, now)
    return meter if status == STATUSES[0] else replace(meter, deactivated_at=now)


def _mapping(given: Any, otherwise: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(otherwise)
    return dict(given)


def _id(fields: dict[str, Any]) -> str | None:
    given = fields.pop("id", None)
    if given is not None and (not isinstance(given, str) or not given):
        raise ValueError("id must be a string that is not empty")
    return given
