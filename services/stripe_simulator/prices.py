"""Prices: what a subscription's item costs, and which meter counts its usage.

As documented (docs.stripe.com/api/prices, changelog 2025-03-31): a metered price names a meter. Products are
not simulated, so any product id is taken (a choice), and there are no tiers.
"""

from __future__ import annotations

import re
from decimal import Decimal

from services.stripe_simulator.errors import InvalidParameters, Json
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.forms import Params
from services.stripe_simulator.meters import Registry, new_id, read_metadata
from services.stripe_simulator.periods import INTERVALS
from services.stripe_simulator.resources import Resources

_AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


class Prices:
    def __init__(self, resources: Resources, registry: Registry) -> None:
        self._resources = resources
        self._registry = registry

    def create(self, params: Params, when: Occasion) -> Json:
        """POST /v1/prices"""
        currency = params.required_text("currency", length_max=3).lower()
        amount = _unit_amount(params)
        recurring = self._recurring(params)
        body: Json = {
            "id": new_id("price"),
            "object": "price",
            "active": params.flag("active") is not False,
            "billing_scheme": "per_unit",
            "created": int(when.at),
            "currency": currency,
            "livemode": False,
            "lookup_key": params.text("lookup_key", length_max=200),
            "metadata": read_metadata(params, {}),
            "nickname": params.text("nickname"),
            "product": _product(params),
            "recurring": recurring,
            "tax_behavior": "unspecified",
            "tiers_mode": None,
            "transform_quantity": None,
            "type": "one_time" if recurring is None else "recurring",
            "unit_amount": int(amount) if amount == amount.to_integral_value() else None,
            "unit_amount_decimal": f"{amount.normalize():f}",
        }
        params.finish()
        self._resources.keep(body)
        self._resources.tell("price.created", body, when)
        return body

    def update(self, price_id: str, params: Params, when: Occasion) -> Json:
        """POST /v1/prices/{id}: what a price costs never changes."""
        before = self._resources.find("price", price_id)
        active, nickname = params.flag("active"), params.text("nickname")
        changes: Json = {"metadata": read_metadata(params, before["metadata"])}
        changes |= {} if active is None else {"active": active}
        changes |= {} if nickname is None else {"nickname": nickname or None}
        params.finish()
        body = before | changes
        if body != before:
            self._resources.keep(body)
            self._resources.tell("price.updated", body, when, before)
        return body

    def _recurring(self, params: Params) -> Json | None:
        if not params.has("recurring"):
            return None
        recurring = params.nested("recurring")
        interval = recurring.choice("interval", INTERVALS)
        if interval is None:
            raise recurring.missing("interval")
        count, meter = recurring.integer("interval_count"), recurring.text("meter")
        usage_type = recurring.choice("usage_type", ("licensed", "metered")) or "licensed"
        recurring.finish()
        if count is not None and not 1 <= count <= 1095:
            message = "Invalid interval_count: at most three years"
            raise InvalidParameters(message, param="recurring[interval_count]")
        if (usage_type == "metered") != (meter is not None):
            message = "A price with usage_type=metered names a meter, and no other price does."
            raise InvalidParameters(message, param="recurring[meter]")
        if meter is not None:
            self._registry.meter(meter)
        return {
            "interval": interval,
            "interval_count": count or 1,
            "meter": meter,
            "trial_period_days": None,
            "usage_type": usage_type,
        }


def _unit_amount(params: Params) -> Decimal:
    whole, exact = params.integer("unit_amount"), params.text("unit_amount_decimal")
    if (whole is None) == (exact is None):
        message = "Give one of unit_amount and unit_amount_decimal."
        raise InvalidParameters(message, param="unit_amount")
    written = str(whole) if exact is None else exact
    if not _AMOUNT.fullmatch(written):
        message = "Invalid decimal: at most 12 digits on either side, and not below zero"
        raise InvalidParameters(message, param="unit_amount_decimal")
    return Decimal(written)


def _product(params: Params) -> str:
    if params.has("product_data"):
        data = params.nested("product_data")
        data.required_text("name")
        data.text_map("metadata", length_max=500)
        data.finish()
        return new_id("prod")
    return params.required_text("product")
