"""The endpoints of customers: created, changed, deleted, and told of in events."""

from __future__ import annotations

from dataclasses import replace

from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.event_log import EventLog, Occasion
from services.stripe_simulator.forms import Params
from services.stripe_simulator.gateway import Call, Endpoint
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.meters import Customer, Registry, new_id, read_customer
from services.stripe_simulator.paging import Page
from services.stripe_simulator.reading import within
from services.stripe_simulator.resources import difference
from services.stripe_simulator.subscriptions import Subscriptions

CUSTOMERS = "/v1/customers"


class CustomersApi:
    def __init__(self, registry: Registry, log: EventLog, subscriptions: Subscriptions) -> None:
        self._registry = registry
        self._log = log
        self._subscriptions = subscriptions

    def endpoints(self) -> dict[tuple[str, str], Endpoint]:
        return {
            ("POST", CUSTOMERS): Endpoint(self._create),
            ("GET", CUSTOMERS): Endpoint(self._list),
            ("GET", f"{CUSTOMERS}/{{id}}"): Endpoint(self._get),
            ("POST", f"{CUSTOMERS}/{{id}}"): Endpoint(self._update),
            ("DELETE", f"{CUSTOMERS}/{{id}}"): Endpoint(self._delete),
        }

    def _create(self, call: Call, params: Params, origin: Origin) -> Json:
        customer = read_customer(params, Customer(new_id("cus"), int(origin.received_at)))
        self._registry.keep_customer(customer)
        self._log.snapshot("customer.created", customer.to_json(), Occasion.of(origin))
        return customer.to_json()

    def _list(self, call: Call, params: Params, origin: Origin) -> Json:
        page, bounds, email = Page.read(params), params.bounds("created"), params.text("email")
        params.finish()
        customers = [
            one.to_json()
            for one in reversed(self._registry.customers.values())
            if email in (None, one.email) and within(one.created, bounds)
        ]
        return page.of(customers, CUSTOMERS, "customer")

    def _get(self, call: Call, params: Params, origin: Origin) -> Json:
        """A deleted customer is shown as one."""
        params.finish()
        deleted = self._registry.deleted.get(call.parts["id"])
        return (deleted or self._registry.customer(call.parts["id"])).to_json()

    def _update(self, call: Call, params: Params, origin: Origin) -> Json:
        """Tells what changed; nothing, if nothing did (a choice)."""
        before = self._registry.customer(call.parts["id"])
        customer = read_customer(params, before)
        if customer != before:
            self._registry.keep_customer(customer)
            previous = difference(before.to_json(), customer.to_json())
            when = Occasion.of(origin)
            self._log.snapshot("customer.updated", customer.to_json(), when, previous=previous)
        return customer.to_json()

    def _delete(self, call: Call, params: Params, origin: Origin) -> Json:
        """Its subscriptions are canceled first."""
        params.finish()
        customer, when = self._registry.customers.get(call.parts["id"]), Occasion.of(origin)
        if customer is None:
            raise missing_object("customer", call.parts["id"], param="id", status=404)
        self._subscriptions.cancel_all_of(customer.id, when)
        deleted = replace(customer, deleted=True)
        self._registry.keep_customer(deleted)
        self._log.snapshot("customer.deleted", customer.to_json(), when)
        return deleted.to_json()
