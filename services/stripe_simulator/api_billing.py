"""The endpoints of prices, subscriptions, invoices, payments, payouts and payment methods.

Most can only be read; prices and subscriptions can be made here, the rest is made by the control API.
"""

from __future__ import annotations

from collections.abc import Callable

from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.event_log import Occasion
from services.stripe_simulator.forms import Params
from services.stripe_simulator.gateway import DEFAULT_ACCOUNT, Call, Endpoint
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.meters import Registry
from services.stripe_simulator.prices import Prices
from services.stripe_simulator.reading import Kind, Reading, field_is, fields
from services.stripe_simulator.resources import Resources
from services.stripe_simulator.subscriptions import ENDED, Subscriptions

PRICES, SUBSCRIPTIONS = "/v1/prices", "/v1/subscriptions"
CUSTOMER_METHODS = "/v1/customers/{id}/payment_methods"
NOT_CANCELED = "not canceled"


def subscription_is(body: Json, status: str) -> bool:
    """What the filter `status` of subscriptions means, `all` and `ended` too."""
    if status == "ended":
        return body["status"] in ENDED
    if status == NOT_CANCELED:
        return bool(body["status"] != "canceled")
    return status in ("all", body["status"])


def has_price(body: Json, price: str) -> bool:
    return any(item["price"]["id"] == price for item in body["items"]["data"])


PRICE = Kind("price", PRICES, fields("active", "currency", "product", "type"))
SUBSCRIPTION = Kind(
    "subscription",
    SUBSCRIPTIONS,
    {**fields("customer", "collection_method"), "price": has_price, "status": subscription_is},
    defaults={"status": NOT_CANCELED},
)
INVOICE = Kind(
    "invoice",
    "/v1/invoices",
    {
        **fields("customer", "status", "collection_method"),
        "subscription": field_is("parent.subscription_details.subscription"),
    },
)
CHARGE = Kind("charge", "/v1/charges", fields("customer", "payment_intent"))
REFUND = Kind("refund", "/v1/refunds", fields("charge", "payment_intent"))
TRANSACTION = Kind("balance_transaction", "/v1/balance_transactions", fields("currency", "source", "type"))
DISPUTE = Kind("dispute", "/v1/disputes", fields("charge", "payment_intent"))
PAYOUT = Kind("payout", "/v1/payouts", fields("destination", "status"))
METHOD = Kind("payment_method", "/v1/payment_methods", fields("customer", "type"))


class BillingApi:
    def __init__(
        self,
        resources: Resources,
        registry: Registry,
        prices: Prices,
        subscriptions: Subscriptions,
        catch_up: Callable[[], None],
    ) -> None:
        self._resources = resources
        self._registry = registry
        self._prices = prices
        self._subscriptions = subscriptions
        self._catch_up = catch_up
        self._methods = self._reading(METHOD)
        self._payouts = self._reading(PAYOUT)
        self._transactions = self._reading(TRANSACTION)

    def endpoints(self) -> dict[tuple[str, str], Endpoint]:
        read: dict[tuple[str, str], Endpoint] = {}
        for kind in (PRICE, SUBSCRIPTION, INVOICE, CHARGE, REFUND, DISPUTE):
            read |= self._reading(kind).endpoints()
        for reading in (self._methods, self._payouts, self._transactions):
            read |= reading.endpoints()
        return read | {
            ("POST", PRICES): Endpoint(self._create_price),
            ("POST", f"{PRICES}/{{id}}"): Endpoint(self._update_price),
            ("POST", SUBSCRIPTIONS): Endpoint(self._create_subscription),
            ("POST", f"{SUBSCRIPTIONS}/{{id}}"): Endpoint(self._update_subscription),
            ("DELETE", f"{SUBSCRIPTIONS}/{{id}}"): Endpoint(self._cancel_subscription),
            ("GET", CUSTOMER_METHODS): Endpoint(self._list_methods_of_customer),
            ("GET", PAYOUT.url): Endpoint(self._list_payouts),
            ("GET", f"{PAYOUT.url}/{{id}}"): Endpoint(self._get_payout),
            ("GET", TRANSACTION.url): Endpoint(self._list_transactions),
        }

    def _reading(self, kind: Kind) -> Reading:
        return Reading(self._resources, kind, self._catch_up)

    def _create_price(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._prices.create(params, Occasion.of(origin))

    def _update_price(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._prices.update(call.parts["id"], params, Occasion.of(origin))

    def _create_subscription(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._subscriptions.create(params, Occasion.of(origin))

    def _update_subscription(self, call: Call, params: Params, origin: Origin) -> Json:
        self._catch_up()
        return self._subscriptions.update(call.parts["id"], params, Occasion.of(origin))

    def _cancel_subscription(self, call: Call, params: Params, origin: Origin) -> Json:
        self._catch_up()
        return self._subscriptions.cancel(call.parts["id"], params, Occasion.of(origin))

    def _list_methods_of_customer(self, call: Call, params: Params, origin: Origin) -> Json:
        customer = self._registry.customer(call.parts["id"])
        methods = self._resources.newest_first(METHOD.name)
        return self._methods.page(call, params, [one for one in methods if one["customer"] == customer.id])

    def _list_transactions(self, call: Call, params: Params, origin: Origin) -> Json:
        """`payout` is no field of a transaction: it lists what that payout paid out."""
        payout = params.text("payout")
        self._catch_up()
        kept = self._resources.newest_first(TRANSACTION.name, belongs_to=payout)
        return self._transactions.page(call, params, kept)

    # A connected account's payouts are seen with its `Stripe-Account` header, and with no other.

    def _list_payouts(self, call: Call, params: Params, origin: Origin) -> Json:
        self._catch_up()
        payouts = self._resources.newest_first(PAYOUT.name)
        return self._payouts.page(call, params, [one for one in payouts if self._sees(call, one["id"])])

    def _get_payout(self, call: Call, params: Params, origin: Origin) -> Json:
        if not self._sees(call, call.parts["id"]):
            raise missing_object(PAYOUT.name, call.parts["id"], param="id", status=404)
        return self._payouts.found(call, params, origin)

    def _sees(self, call: Call, payout: str) -> bool:
        return (self._resources.owner(payout) or DEFAULT_ACCOUNT) == call.account
