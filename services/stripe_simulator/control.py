"""`/_simulator/`: what tests ask and set. JSON, without a key, from the same machine only."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from services.stripe_simulator.control_billing import BILLING_ACTIONS, Action
from services.stripe_simulator.deliveries import read_webhook_rule
from services.stripe_simulator.destinations import ROLL_SECONDS_MAX
from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.faults import read_rule
from services.stripe_simulator.ledger import ROWS_MAX
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.seeding import customer_from, meter_from
from services.stripe_simulator.simulator import Simulator

log = structlog.get_logger()


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
    now = int(simulator.clock.now())
    for one in given["customers"]:
        simulator.registry.keep_customer(customer_from(one, now))
    return {"seeded": len(given["customers"])}


def seed_meters(simulator: Simulator, _: web.Request, given: Any) -> Json:
    now = int(simulator.clock.now())
    for one in given["meters"]:
        simulator.registry.keep_meter(meter_from(one, now))
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
    simulator.background.catch_up()
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


def show_webhook_faults(simulator: Simulator, _: web.Request, __: Any) -> Json:
    return {"faults": simulator.webhook_faults.to_json()}


def add_webhook_faults(simulator: Simulator, request: web.Request, given: Any) -> Json:
    """As `faults`, with the rules of deliveries."""
    listed = given if isinstance(given, list) else given["faults"]
    rules = [read_webhook_rule(one) for one in listed]
    if isinstance(given, dict) and "seed" in given:
        simulator.webhook_faults.reseed(int(given["seed"]))
    simulator.webhook_faults.extend(rules)
    return show_webhook_faults(simulator, request, given)


def clear_webhook_faults(simulator: Simulator, request: web.Request, given: Any) -> Json:
    simulator.webhook_faults.clear()
    return show_webhook_faults(simulator, request, given)


def emit_event(simulator: Simulator, _: web.Request, given: Any) -> Json:
    """Any event: a snapshot of `object`, or with `payload` thin one with `data` and `related_object`."""
    now, event_type, log = simulator.clock.now(), str(given["type"]), simulator.event_log
    if given.get("payload", "snapshot") == "thin":
        return {"id": log.thin(event_type, given.get("data"), given.get("related_object"), now, now)}
    previous, account = given.get("previous_attributes"), str(given.get("account", ""))
    about = dict(given["object"])
    return {"id": log.snapshot(event_type, about, Occasion(now, now), previous=previous, account=account)}


def resend_event(simulator: Simulator, _: web.Request, given: Any) -> Json:
    simulator.event_log.resend(str(given["event"]), simulator.clock.now())
    return {"resent": given["event"]}


def show_deliveries(simulator: Simulator, _: web.Request, __: Any) -> Json:
    return simulator.deliveries.to_json()


async def run_deliveries(simulator: Simulator, _: web.Request, __: Any) -> Json:
    """Try everything that is due by the clock, and answer when that is done."""
    tries = await simulator.background.deliver_due()
    return {"tries": tries, **simulator.deliveries.to_json()}


def roll_secret(simulator: Simulator, _: web.Request, given: Any) -> Json:
    """A new secret; the old one signs too for `keep_old_seconds`, 24 hours unless said otherwise."""
    keep = float(given.get("keep_old_seconds", ROLL_SECONDS_MAX))
    rolled = simulator.destinations.roll(str(given["destination"]), simulator.clock.now(), keep)
    return {"secret": rolled.secret}


def stick_summaries(simulator: Simulator, _: web.Request, given: Any) -> Json:
    simulator.freshness.stick(simulator.clock.now(), float(given["stuck_seconds"]))
    return {"stuck_seconds": given["stuck_seconds"]}


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
    ("GET", "webhook_faults"): show_webhook_faults,
    ("POST", "webhook_faults"): add_webhook_faults,
    ("DELETE", "webhook_faults"): clear_webhook_faults,
    ("POST", "events"): emit_event,
    ("POST", "resend"): resend_event,
    ("GET", "deliveries"): show_deliveries,
    ("POST", "deliveries"): run_deliveries,
    ("POST", "roll_secret"): roll_secret,
    ("POST", "summaries"): stick_summaries,
    ("POST", "reset"): reset,
    **BILLING_ACTIONS,
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
            if not isinstance(result, dict):
                result = await result
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
