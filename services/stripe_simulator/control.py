"""`/_simulator/`: what tests ask and set. JSON, without a key, from the same machine only."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import structlog
from aiohttp import web

from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.faults import read_rule
from services.stripe_simulator.forms import Params
from services.stripe_simulator.ledger import ROWS_MAX
from services.stripe_simulator.meters import Customer, Meter, new_id, read_customer, read_meter
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.simulator import Simulator

log = structlog.get_logger()

Action = Callable[[Simulator, web.Request, Any], Json]


def show_ledger(simulator: Simulator, request: web.Request, _: Any) -> Json:
    """Rows in order of application; `total` covers every match, however many rows are shown."""
    customer, event_name = request.query.get("customer"), request.query.get("event_name")
    limit, after = int(request.query.get("limit", ROWS_MAX)), int(request.query.get("after", 0))
    rows = simulator.ledger.rows(customer, event_name, after, limit + 1)
    return {
        "rows": [row.to_json() for row in rows[:limit]],
        "has_more": len(rows) > limit,
        "total": simulator.ledger.total(customer, event_name),
    }


def show_totals(simulator: Simulator, request: web.Request, _: Any) -> Json:
    by_hour = request.query.get("by") == "hour"
    return {"totals": simulator.ledger.totals(by_hour=by_hour), "grand_total": simulator.ledger.total()}


def show_stats(simulator: Simulator, _: web.Request, __: Any) -> Json:
    return {
        **simulator.observations.to_json(),
        "ledger_rows": simulator.ledger.count(),
        "identifiers_with_two_values": simulator.ledger.ambiguous_identifiers(),
        "error_reports": simulator.ledger.reports(),
        "cancellations": simulator.ledger.cancellations(simulator.clock.now()),
    }


def seed_customers(simulator: Simulator, _: web.Request, given: Any) -> Json:
    """Customers under ids of the test's choice; an id that exists is replaced."""
    for one in given["customers"]:
        fields = dict(one)
        customer = Customer(fields.pop("id", None) or new_id("cus"), int(simulator.clock.now()))
        simulator.registry.keep_customer(read_customer(Params(fields), customer))
    return {"seeded": len(given["customers"])}


def seed_meters(simulator: Simulator, _: web.Request, given: Any) -> Json:
    """Meters in the shape of POST /v1/billing/meters plus `id` and `status`; sum is the default formula."""
    for one in given["meters"]:
        fields = {"default_aggregation": {"formula": "sum"}, "display_name": one["event_name"], **one}
        meter_id, status = fields.pop("id", None) or new_id("mtr_test"), fields.pop("status", "active")
        now = int(simulator.clock.now())
        meter: Meter = read_meter(Params(fields), meter_id, now)
        simulator.registry.keep_meter(meter if status == "active" else replace(meter, deactivated_at=now))
    return {"seeded": len(given["meters"])}


def show_clock(simulator: Simulator, _: web.Request, __: Any) -> Json:
    now = simulator.clock.now()
    return {"now": now, "iso": rfc3339(now), "offset_seconds": simulator.clock.offset_seconds}


def move_clock(simulator: Simulator, request: web.Request, given: Any) -> Json:
    if "set" in given:
        simulator.clock.set(float(given["set"]))
    else:
        simulator.clock.advance(float(given["advance_seconds"]))
    simulator.store.keep_setting("clock_offset_seconds", repr(simulator.clock.offset_seconds))
    return show_clock(simulator, request, given)


def show_faults(simulator: Simulator, _: web.Request, __: Any) -> Json:
    return {"faults": simulator.faults.to_json()}


def add_faults(simulator: Simulator, request: web.Request, given: Any) -> Json:
    """A list of rules, or {"seed": …, "faults": […]}; they follow what is on the tape."""
    listed = given if isinstance(given, list) else given["faults"]
    rules = [read_rule(one) for one in listed]
    if isinstance(given, dict) and "seed" in given:
        simulator.faults.reseed(int(given["seed"]))
    simulator.faults.extend(rules)
    return show_faults(simulator, request, given)


def clear_faults(simulator: Simulator, request: web.Request, given: Any) -> Json:
    simulator.faults.clear()
    return show_faults(simulator, request, given)


def reset(simulator: Simulator, _: web.Request, __: Any) -> Json:
    simulator.reset()
    return {"reset": True}


ACTIONS: dict[tuple[str, str], Action] = {
    ("GET", "ledger"): show_ledger,
    ("GET", "totals"): show_totals,
    ("GET", "stats"): show_stats,
    ("POST", "customers"): seed_customers,
    ("POST", "meters"): seed_meters,
    ("GET", "clock"): show_clock,
    ("POST", "clock"): move_clock,
    ("GET", "faults"): show_faults,
    ("POST", "faults"): add_faults,
    ("DELETE", "faults"): clear_faults,
    ("POST", "reset"): reset,
}


def add_control_routes(app: web.Application, simulator: Simulator) -> None:
    for (method, name), action in ACTIONS.items():
        app.router.add_route(method, f"/_simulator/{name}", _guarded(simulator, name, action))


def _guarded(
    simulator: Simulator, name: str, action: Action
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        if not ipaddress.ip_address(request.remote or "0.0.0.0").is_loopback:  # noqa: S104  compared, not bound
            return web.json_response({"error": {"message": "loopback only"}}, status=403)
        try:
            given = await request.json() if request.can_read_body else {}
            result = action(simulator, request, given)
        except ApiError as refusal:
            return _refused(refusal.message)
        except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            return _refused(f"{type(error).__name__}: {error}")
        await simulator.store.durable()
        if request.method != "GET":
            log.info("simulator_control", action=name, method=request.method)
        return web.json_response(result)

    return handle


def _refused(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)
