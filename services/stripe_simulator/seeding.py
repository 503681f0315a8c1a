"""Customers and meters under ids of someone's choice, for tests and profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.stripe_simulator.forms import Params
from services.stripe_simulator.meters import Customer, new_id, read_customer, read_meter
from services.stripe_simulator.simulator import Simulator


def keep_customers(simulator: Simulator, given: Sequence[Mapping[str, Any]]) -> int:
    """As in POST /v1/customers plus `id`; an id that exists is replaced. Returns how many."""
    for one in given:
        fields = dict(one)
        customer = Customer(fields.pop("id", None) or new_id("cus"), int(simulator.clock.now()))
        simulator.registry.keep_customer(read_customer(Params(fields), customer))
    return len(given)


def keep_meters(simulator: Simulator, given: Sequence[Mapping[str, Any]]) -> int:
    """As in POST /v1/billing/meters plus `id` and `status`; sum is the default formula."""
    for one in given:
        fields = {"default_aggregation": {"formula": "sum"}, "display_name": one["event_name"], **one}
        meter_id, status = fields.pop("id", None) or new_id("mtr_test"), fields.pop("status", "active")
        now = int(simulator.clock.now())
        meter = read_meter(Params(fields), meter_id, now)
        simulator.registry.keep_meter(meter if status == "active" else replace(meter, deactivated_at=now))
    return len(given)
