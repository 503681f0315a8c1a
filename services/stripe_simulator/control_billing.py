"""The part of `/_simulator/` that is about billing: what a payment provider does and an API cannot ask for.

Before anything is done, what was due by the clock has happened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from services.stripe_simulator.billing import Billing
from services.stripe_simulator.errors import Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.simulator import Simulator

Action = Callable[[Simulator, web.Request, Any], "Json | Awaitable[Json]"]
Deed = Callable[[Billing, str, Json, Occasion], Json]


def _now(deed: Deed) -> Action:
    """``deed`` at this moment of the simulator's clock, about the object that the path names, if it does."""

    def act(simulator: Simulator, request: web.Request, given: Any) -> Json:
        if not isinstance(given, dict):
            raise TypeError("an object is expected")
        simulator.background.catch_up()
        now = simulator.clock.now()
        return deed(simulator.billing, request.match_info.get("id", ""), given, Occasion(now, now))

    return act


DEEDS: dict[str, Deed] = {
    "subscriptions": lambda billing, _, given, when: billing.subscriptions.place(given, when),
    "subscriptions/{id}": lambda billing, one, given, when: billing.subscriptions.set(one, given, when),
    "invoices": lambda billing, _, given, when: billing.invoices.schedule(given),
    "invoices/{id}": lambda billing, one, given, when: billing.invoices.act(
        one, given["action"], given, when
    ),
    "charges": lambda billing, _, given, when: billing.payments.charge(given, when),
    "refunds": lambda billing, _, given, when: billing.payments.refund(given, when),
    "disputes": lambda billing, _, given, when: billing.payments.dispute(given, when),
    "disputes/{id}/close": lambda billing, one, given, when: billing.payments.close_dispute(one, given, when),
    "payouts": lambda billing, _, given, when: billing.payouts.create(given, when),
    "accounts/{id}/deauthorize": lambda billing, one, given, when: billing.payouts.deauthorize(one, when),
    "payment_methods": lambda billing, _, given, when: billing.payment_methods.attach(given, when),
    "payment_methods/{id}": lambda billing, one, given, when: billing.payment_methods.update(
        one, given, when
    ),
    "payment_methods/{id}/detach": lambda billing, one, given, when: billing.payment_methods.detach(
        one, when
    ),
}
BILLING_ACTIONS: dict[tuple[str, str], Action] = {("POST", name): _now(deed) for name, deed in DEEDS.items()}
