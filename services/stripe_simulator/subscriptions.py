"""Subscriptions: items with a period each, which roll over by the simulator's clock, and a status.

As documented (docs.stripe.com/api/subscriptions, docs.stripe.com/billing/subscriptions/overview): the period
is the item's (API 2025-03-31 and later); at its end an invoice of the metered items is drafted; `incomplete`
becomes `incomplete_expired` after 23 hours; a canceled subscription is found by its id and not listed unless
asked for; deleting a customer cancels its subscriptions. Choices: a new subscription is active at once, or
trialing, or incomplete with `payment_behavior=default_incomplete`; it has no first invoice; a trial's usage
is not invoiced; prorations are not made. Statuses that a payment provider decides are set by the control API.
"""

from __future__ import annotations

from services.stripe_simulator.errors import ApiError, InvalidParameters, Json, missing_object
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.forms import Params
from services.stripe_simulator.invoices import Invoices
from services.stripe_simulator.meters import Registry, new_id, read_metadata
from services.stripe_simulator.periods import DAY_SECONDS, boundary, period_at
from services.stripe_simulator.resources import Resources

STATUSES = (
    "incomplete",
    "incomplete_expired",
    "trialing",
    "active",
    "past_due",
    "canceled",
    "unpaid",
    "paused",
)
ENDED = ("canceled", "incomplete_expired")
INCOMPLETE_SECONDS = 23 * 3600
ITEMS_MAX = 20
NO_REASON: Json = {"comment": None, "feedback": None, "reason": None}
BEHAVIOURS = ("allow_incomplete", "default_incomplete", "error_if_incomplete", "pending_if_incomplete")
PRORATIONS = ("always_invoice", "create_prorations", "none")


class Subscriptions:
    def __init__(self, resources: Resources, registry: Registry, invoices: Invoices) -> None:
        self._resources = resources
        self._registry = registry
        self._invoices = invoices

    # The API

    def create(self, params: Params, when: Occasion) -> Json:
        """POST /v1/subscriptions"""
        now, customer = int(when.at), params.required_text("customer")
        if customer not in self._registry.customers:
            raise missing_object("customer", customer, param="customer", status=400)
        items = [_given_item(one) for one in params.objects("items")]
        anchor, trial_end = params.integer("billing_cycle_anchor"), params.integer("trial_end")
        trial_days = params.integer("trial_period_days")
        metadata, behaviour = read_metadata(params, {}), params.choice("payment_behavior", BEHAVIOURS)
        params.choice("proration_behavior", PRORATIONS)
        params.finish()
        if not items:
            raise params.missing("items")
        if trial_days:
            trial_end = now + trial_days * DAY_SECONDS
        if trial_end is not None and trial_end <= now:
            raise InvalidParameters("Invalid timestamp: must be in the future.", param="trial_end")
        prices = [self._price(price, "items[0][price]") for price, _ in items]
        if anchor is not None:
            _refuse_anchor(anchor, now, prices)
        status = "incomplete" if behaviour == "default_incomplete" else "active"
        body = _subscription(customer, prices[0]["currency"], now, anchor or trial_end or now)
        body |= {"metadata": metadata, "status": "trialing" if trial_end else status}
        body |= {"trial_start": now if trial_end else None, "trial_end": trial_end}
        placed = [
            _item(body, price, quantity, now) for price, (_, quantity) in zip(prices, items, strict=True)
        ]
        return self._begin(body | _items(body, placed), when)

    def update(self, subscription_id: str, params: Params, when: Occasion) -> Json:
        """POST /v1/subscriptions/{id}"""
        before = self._resources.find("subscription", subscription_id)
        now, changes = int(when.at), {"metadata": read_metadata(params, before["metadata"])}
        at_period_end = params.flag("cancel_at_period_end")
        anchor = params.choice("billing_cycle_anchor", ("now", "unchanged"))
        given = params.objects("items")
        params.choice("proration_behavior", PRORATIONS)
        items = self._changed_items(before, given, now)
        params.finish()
        if before["status"] in ENDED and (given or anchor or at_period_end is not None):
            raise ApiError("A canceled subscription can only update its metadata.")
        body = before | changes
        if at_period_end is not None:
            body |= _ending(body, now) if at_period_end else _going_on()
        if anchor == "now":
            body |= {"billing_cycle_anchor": now}
            items = [_placed(body, item, now) for item in items]
        return self._changed(before, body | _items(body, items), when)

    def cancel(self, subscription_id: str, params: Params, when: Occasion) -> Json:
        """DELETE /v1/subscriptions/{id}; one that has ended is not there any more."""
        before = self._resources.find("subscription", subscription_id)
        details = params.nested("cancellation_details")
        said = {"comment": details.text("comment"), "feedback": details.text("feedback")}
        details.finish()
        invoice_now = params.flag("invoice_now")
        params.flag("prorate")
        params.finish()
        if before["status"] in ENDED:
            raise missing_object("subscription", subscription_id, param="id", status=404)
        return self._end(before, "cancellation_requested", when, said, invoice_now=bool(invoice_now))

    def cancel_all_of(self, customer: str, when: Occasion) -> None:
        for one in self._resources.newest_first("subscription"):
            if one["customer"] == customer and one["status"] not in ENDED:
                self._end(one, "cancellation_requested", when)

    # The control API

    def place(self, given: Json, when: Occasion) -> Json:
        """One in any status, also under an id of the test's choice and with an anchor in the past."""
        now, customer = int(when.at), self._registry.customer(given["customer"])
        prices = [self._price(one, "prices") for one in given["prices"]]
        created = int(given.get("created", now))
        anchor = int(given.get("billing_cycle_anchor", created))
        body = _subscription(customer.id, prices[0]["currency"], created, anchor)
        body |= {"id": str(given.get("id", body["id"])), "metadata": dict(given.get("metadata", {}))}
        body |= {"status": _status(given.get("status", "active"))}
        items = [_item(body, price, None, now) for price in prices]
        return self._begin(body | _items(body, items), when)

    def set(self, subscription_id: str, given: Json, when: Occasion) -> Json:
        """Its status, `reason` of a cancellation, `latest_invoice` or `metadata` as they are given."""
        before = self._resources.find("subscription", subscription_id)
        body = before | {name: given[name] for name in ("latest_invoice", "metadata") if name in given}
        status = _status(given.get("status", before["status"]))
        if status == "canceled" != before["status"]:
            return self._end(body, str(given.get("reason", "cancellation_requested")), when)
        return self._changed(before, body | {"status": status}, when)

    # What happens by itself

    def step(self, subscription: Json, when: Occasion) -> None:
        """The end of a period, of a trial, or of the time for a first payment."""
        moment = int(when.at)
        due = [one for one in subscription["items"]["data"] if one["current_period_end"] <= moment]
        if subscription["status"] == "incomplete":
            self._changed(subscription, subscription | _ended("incomplete_expired", moment), when)
        elif due:
            self._roll(subscription, due, when)
        else:
            self._resources.keep(subscription, due_at=_due_at(subscription))

    def _roll(self, before: Json, due: list[Json], when: Occasion) -> None:
        moment, body = int(when.at), before
        if before["status"] == "trialing":
            body = body | {"status": "active"}
        else:
            body = self._invoiced(body, due, moment, when)
        if before["cancel_at_period_end"]:
            self._end(body, "cancellation_requested", when)
            return
        items = [_placed(body, item, moment) if item in due else item for item in before["items"]["data"]]
        self._changed(before, body | _items(body, items), when)

    def _invoiced(self, body: Json, items: list[Json], end: int, when: Occasion) -> Json:
        """With the draft of what its metered items used until ``end``."""
        metered = [one for one in items if one["price"]["recurring"]["usage_type"] == "metered"]
        if not metered:
            return body
        return body | {"latest_invoice": self._invoices.draft(body, metered, end, when)["id"]}

    # Steps they share

    def _price(self, price_id: str, param: str) -> Json:
        price = self._resources.find("price", price_id, param=param, status=400)
        if price["recurring"] is None:
            raise ApiError(
                "The price specified is set to `type=one_time` and recurring is needed.", param=param
            )
        return price

    def _begin(self, body: Json, when: Occasion) -> Json:
        self._resources.keep(body, due_at=_due_at(body))
        self._resources.tell("customer.subscription.created", body, when)
        return body

    def _changed(self, before: Json, body: Json, when: Occasion) -> Json:
        self._resources.keep(body, due_at=_due_at(body))
        if body != before:
            self._resources.tell("customer.subscription.updated", body, when, before)
        return body

    def _end(
        self,
        body: Json,
        reason: str,
        when: Occasion,
        said: Json | None = None,
        *,
        invoice_now: bool = False,
    ) -> Json:
        if invoice_now:
            body = self._invoiced(body, body["items"]["data"], int(when.at), when)
        details = body["cancellation_details"] | (said or {}) | {"reason": reason}
        ended = _ended("canceled", int(when.at)) | {"canceled_at": body["canceled_at"] or int(when.at)}
        body = body | ended | {"cancellation_details": details}
        self._resources.keep(body)
        self._resources.tell("customer.subscription.deleted", body, when)
        return body

    def _changed_items(self, before: Json, given: list[Params], now: int) -> list[Json]:
        items = {item["id"]: item for item in before["items"]["data"]}
        for one in given:
            item_id, price_id, deleted = one.text("id"), one.text("price"), one.flag("deleted")
            quantity = one.integer("quantity")
            one.finish()
            if item_id is not None and item_id not in items:
                raise missing_object("subscription item", item_id, param=one.name("id"), status=400)
            if item_id is not None and deleted:
                del items[item_id]
            elif price_id is not None:
                item = _item(before, self._price(price_id, one.name("price")), quantity, now)
                item_id = item_id or item["id"]
                items[item_id] = item | {"id": item_id}
        if not items:
            raise InvalidParameters("A subscription must have at least one item.", param="items")
        return list(items.values())


def _subscription(customer: str, currency: str, created: int, anchor: int) -> Json:
    subscription_id = new_id("sub")
    return {
        "id": subscription_id,
        "object": "subscription",
        "application": None,
        "billing_cycle_anchor": anchor,
        "billing_mode": {"flexible": None, "type": "flexible"},
        "cancel_at": None,
        "cancel_at_period_end": False,
        "canceled_at": None,
        "cancellation_details": NO_REASON,
        "collection_method": "charge_automatically",
        "created": created,
        "currency": currency,
        "customer": customer,
        "default_payment_method": None,
        "description": None,
        "ended_at": None,
        "items": {"object": "list", "data": [], "has_more": False},
        "latest_invoice": None,
        "livemode": False,
        "metadata": {},
        "pause_collection": None,
        "schedule": None,
        "start_date": created,
        "status": "active",
        "test_clock": None,
        "trial_end": None,
        "trial_start": None,
    }


def _item(subscription: Json, price: Json, quantity: int | None, now: int) -> Json:
    metered = price["recurring"]["usage_type"] == "metered"
    item: Json = {
        "id": new_id("si"),
        "object": "subscription_item",
        "created": now,
        "discounts": [],
        "metadata": {},
        "price": price,
        **({} if metered else {"quantity": 1 if quantity is None else quantity}),
        "subscription": subscription["id"],
        "tax_rates": [],
    }
    return _placed(subscription, item, now)


def _placed(subscription: Json, item: Json, moment: int) -> Json:
    """The item in the period that holds this moment."""
    recurring = item["price"]["recurring"]
    start, end = period_at(
        subscription["billing_cycle_anchor"],
        recurring["interval"],
        recurring["interval_count"],
        moment,
        subscription["start_date"],
    )
    return item | {"current_period_end": end, "current_period_start": start}


def _items(subscription: Json, items: list[Json]) -> Json:
    listed = {
        "object": "list",
        "data": [item | {"subscription": subscription["id"]} for item in items],
        "has_more": False,
        "total_count": len(items),
        "url": f"/v1/subscription_items?subscription={subscription['id']}",
    }
    return {"items": listed}


def _due_at(subscription: Json) -> float | None:
    status = subscription["status"]
    if status in ENDED or status == "paused":
        return None
    if status == "incomplete":
        return float(subscription["created"] + INCOMPLETE_SECONDS)
    return float(min(item["current_period_end"] for item in subscription["items"]["data"]))


def _ended(status: str, now: int) -> Json:
    return {"status": status, "canceled_at": now, "ended_at": now}


def _ending(subscription: Json, now: int) -> Json:
    """At the end of the period; what was asked for is told at once, the end when it comes."""
    details = subscription["cancellation_details"] | {"reason": "cancellation_requested"}
    ends = max(item["current_period_end"] for item in subscription["items"]["data"])
    changes = {"cancel_at": ends, "cancel_at_period_end": True, "canceled_at": now}
    return changes | {"cancellation_details": details}


def _going_on() -> Json:
    nothing = {"cancel_at": None, "cancel_at_period_end": False, "canceled_at": None}
    return nothing | {"cancellation_details": NO_REASON}


def _given_item(params: Params) -> tuple[str, int | None]:
    price, quantity = params.required_text("price"), params.integer("quantity")
    params.text_map("metadata", length_max=500)
    params.finish()
    return price, quantity


def _refuse_anchor(anchor: int, now: int, prices: list[Json]) -> None:
    """An anchor lies ahead, and no later than the first period would end without it."""
    first_ends = [
        boundary(now, price["recurring"]["interval"], price["recurring"]["interval_count"], 1)
        for price in prices
    ]
    if anchor < now or anchor > min(first_ends):
        message = (
            "Invalid billing_cycle_anchor: must be in the future and before the next natural billing date."
        )
        raise InvalidParameters(message, param="billing_cycle_anchor")


def _status(given: object) -> str:
    if given not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}")
    return str(given)
