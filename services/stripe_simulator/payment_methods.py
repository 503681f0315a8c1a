"""Cards of customers: attached, changed, changed by the card's network, detached. By the control API only.

As documented (docs.stripe.com/api/payment_methods, docs.stripe.com/api/events/types): a detached card belongs
to nobody, and its event names the former customer in `previous_attributes`;
`payment_method.automatically_updated` tells of a card that its network renewed.
"""

from __future__ import annotations

from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.meters import Registry, new_id
from services.stripe_simulator.resources import Resources

CARD_FIELDS = ("brand", "exp_month", "exp_year", "last4")
DEFAULT_CARD: Json = {"brand": "visa", "exp_month": 12, "exp_year": 2034, "last4": "4242"}


class PaymentMethods:
    def __init__(self, resources: Resources, registry: Registry) -> None:
        self._resources = resources
        self._registry = registry

    def attach(self, given: Json, when: Occasion) -> Json:
        """A new card of `customer`, with some of CARD_FIELDS; or a kept one, by its `id`."""
        customer = self._registry.customer(str(given["customer"]))
        known = self._resources.read(given["id"]) if "id" in given else None
        body = known or _card(str(given.get("id", new_id("pm"))), int(when.at))
        if body["customer"] is not None:
            raise ApiError(f"The payment method {body['id']} is attached to a customer already.")
        attached = _with_card(body, given) | {"customer": customer.id}
        self._resources.keep(attached)
        self._resources.tell("payment_method.attached", attached, when)
        return attached

    def update(self, method_id: str, given: Json, when: Occasion) -> Json:
        """Some of CARD_FIELDS; `automatic` says that the card's network did it."""
        before = self._resources.find("payment_method", method_id)
        changed = _with_card(before, given)
        if changed != before:
            event = "automatically_updated" if given.get("automatic") else "updated"
            self._resources.keep(changed)
            self._resources.tell(f"payment_method.{event}", changed, when, before)
        return changed

    def detach(self, method_id: str, when: Occasion) -> Json:
        before = self._resources.find("payment_method", method_id)
        if before["customer"] is None:
            raise ApiError(f"The payment method {method_id} is not attached to a customer.")
        detached = before | {"customer": None}
        self._resources.keep(detached)
        self._resources.tell("payment_method.detached", detached, when, before)
        return detached


def _with_card(body: Json, given: Json) -> Json:
    changes = {name: given[name] for name in CARD_FIELDS if name in given}
    if not 1 <= int(changes.get("exp_month", 1)) <= 12:
        raise ValueError("exp_month must lie between 1 and 12")
    return body | {"card": body["card"] | changes}


def _card(method_id: str, now: int) -> Json:
    nobody = {"address": None, "email": None, "name": None, "phone": None, "tax_id": None}
    return {
        "id": method_id,
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": nobody,
        "card": {**DEFAULT_CARD, "country": "US", "fingerprint": method_id[-16:], "funding": "credit"},
        "created": now,
        "customer": None,
        "livemode": False,
        "metadata": {},
        "type": "card",
    }
