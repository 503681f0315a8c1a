"""Calls of the simulator's tests: raw HTTP where the wire matters, Stripe's own client where it does not."""

from __future__ import annotations

from typing import Any

import httpx
import stripe

from services.stripe_simulator import SimulatorControl

KEY = "sk_test_x"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
MINUTE, HOUR, DAY = 60, 3600, 86400

http = httpx.Client()  # one TLS context for all: making it costs more than a call


def sdk(sim: SimulatorControl, key: str = KEY, retries: int = 0) -> stripe.StripeClient:
    stripe.enable_telemetry = False
    addresses: Any = {"api": sim.url, "meter_events": sim.url}
    return stripe.StripeClient(key, base_addresses=addresses, max_network_retries=retries)


def event(identifier: str = "", value: str = "5", customer: str = "cus_1", **more: str) -> dict[str, Any]:
    """One meter event in the shape of v2, and of the SDK's v1."""
    named = {"identifier": identifier} if identifier else {}
    payload = {"stripe_customer_id": customer, "value": value}
    return {"event_name": "calls", **named, "payload": payload} | more


def token(sim: SimulatorControl) -> str:
    return sdk(sim).v2.billing.meter_event_session.create().authentication_token


def stream(sim: SimulatorControl, with_token: str, *events: dict[str, Any]) -> None:
    """One batch through the official client; it raises what the client raises."""
    batch: Any = {"events": list(events)}
    sdk(sim, with_token).v2.billing.meter_event_stream.create(batch)
