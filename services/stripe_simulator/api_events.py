"""The endpoints about events: retrieving them, and saying where they are to be sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlencode

from services.stripe_simulator.destinations import (
    Destinations,
    change_destination,
    change_endpoint,
    read_destination,
    read_endpoint,
)
from services.stripe_simulator.errors import InvalidParameters, Json
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.forms import Params
from services.stripe_simulator.gateway import DEFAULT_ACCOUNT, Call, Endpoint
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.paging import LIMIT_MAX, Page
from services.stripe_simulator.reading import within

ENDPOINTS = "/v1/webhook_endpoints"
DESTINATIONS = "/v2/core/event_destinations"
EVENTS_V2 = "/v2/core/events"
PING = "v2.core.event_destination.ping"
LIMIT_DEFAULT_V2 = 20


class EventsApi:
    def __init__(self, destinations: Destinations, log: EventLog, catch_up: Callable[[], None]) -> None:
        self._destinations = destinations
        self._log = log
        self._catch_up = catch_up

    def endpoints(self) -> dict[tuple[str, str], Endpoint]:
        return {
            ("GET", "/v1/events"): Endpoint(self._list_events),
            ("GET", "/v1/events/{id}"): Endpoint(self._get_event),
            ("GET", EVENTS_V2): Endpoint(self._list_events_v2),
            ("GET", f"{EVENTS_V2}/{{id}}"): Endpoint(self._get_event_v2),
            ("POST", ENDPOINTS): Endpoint(self._create_endpoint),
            ("GET", ENDPOINTS): Endpoint(self._list_endpoints),
            ("GET", f"{ENDPOINTS}/{{id}}"): Endpoint(self._get_endpoint),
            ("POST", f"{ENDPOINTS}/{{id}}"): Endpoint(self._update_endpoint),
            ("DELETE", f"{ENDPOINTS}/{{id}}"): Endpoint(self._delete_endpoint),
            ("POST", DESTINATIONS): Endpoint(self._create_destination),
            ("GET", DESTINATIONS): Endpoint(self._list_destinations),
            ("GET", f"{DESTINATIONS}/{{id}}"): Endpoint(self._get_destination),
            ("POST", f"{DESTINATIONS}/{{id}}"): Endpoint(self._update_destination),
            ("DELETE", f"{DESTINATIONS}/{{id}}"): Endpoint(self._delete_destination),
            ("POST", f"{DESTINATIONS}/{{id}}/disable"): Endpoint(self._disable_destination),
            ("POST", f"{DESTINATIONS}/{{id}}/enable"): Endpoint(self._enable_destination),
            ("POST", f"{DESTINATIONS}/{{id}}/ping"): Endpoint(self._ping_destination),
        }

    # Events

    def _list_events(self, call: Call, params: Params, origin: Origin) -> Json:
        page, one_type, types = Page.read(params), params.text("type"), params.texts("types")
        bounds = params.bounds("created")
        params.finish()
        self._catch_up()
        wanted = [*types, one_type] if one_type is not None else types
        kept = self._log.newest_first("snapshot", wanted, origin.received_at, _connected(call))
        listed = [one.body for one in kept if within(one.body["created"], bounds)]
        return page.of(listed, call.path, "event")

    def _get_event(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        self._catch_up()
        return self._log.find("snapshot", call.parts["id"], origin.received_at, _connected(call))

    def _list_events_v2(self, call: Call, params: Params, origin: Origin) -> Json:
        types, object_id = params.texts("types"), params.text("object_id")
        limit, before = params.integer("limit"), params.integer("page")
        params.finish()
        if limit is None:
            limit = LIMIT_DEFAULT_V2
        if not 1 <= limit <= LIMIT_MAX:
            raise InvalidParameters(f"Invalid limit: must be between 1 and {LIMIT_MAX}", param="limit")
        self._catch_up()
        kept = [
            one
            for one in self._log.newest_first("thin", types, origin.received_at)
            if (before is None or one.sequence < before)
            and (object_id is None or one.body.get("related_object", {}).get("id") == object_id)
        ]
        shown, more = kept[:limit], len(kept) > limit
        query: list[tuple[str, object]] = [("limit", limit), *(("types[]", one) for one in types)]
        query += [] if object_id is None else [("object_id", object_id)]
        query += [("page", shown[-1].sequence)] if more else []
        return {
            "data": [one.body for one in shown],
            "next_page_url": f"{EVENTS_V2}?{urlencode(query)}" if more else None,
            "previous_page_url": None,
        }

    def _get_event_v2(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        self._catch_up()
        return self._log.find("thin", call.parts["id"], origin.received_at)

    # Webhook endpoints of v1

    def _create_endpoint(self, call: Call, params: Params, origin: Origin) -> Json:
        endpoint = read_endpoint(params, origin.received_at)
        self._destinations.keep(endpoint)
        return endpoint.to_v1(with_secret=True)

    def _list_endpoints(self, call: Call, params: Params, origin: Origin) -> Json:
        page = Page.read(params)
        params.finish()
        newest_first = reversed(self._destinations.known.values())
        return page.of([one.to_v1() for one in newest_first], ENDPOINTS, "webhook endpoint")

    def _get_endpoint(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        return self._destinations.find(call.parts["id"]).to_v1()

    def _update_endpoint(self, call: Call, params: Params, origin: Origin) -> Json:
        endpoint = change_endpoint(params, self._destinations.find(call.parts["id"]))
        self._destinations.keep(endpoint)
        return endpoint.to_v1()

    def _delete_endpoint(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        self._destinations.remove(call.parts["id"])
        return {"id": call.parts["id"], "object": "webhook_endpoint", "deleted": True}

    # Event destinations of v2

    def _create_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        destination, include = read_destination(params, origin.received_at)
        self._destinations.keep(destination)
        return destination.to_v2(include)

    def _list_destinations(self, call: Call, params: Params, origin: Origin) -> Json:
        include = params.texts("include")
        params.integer("limit")
        params.finish()
        newest_first = [one.to_v2(include) for one in reversed(self._destinations.known.values())]
        return {"data": newest_first, "next_page_url": None, "previous_page_url": None}

    def _get_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        include = params.texts("include")
        params.finish()
        return self._destinations.find(call.parts["id"]).to_v2(include)

    def _update_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        destination, include = change_destination(params, self._destinations.find(call.parts["id"]))
        self._destinations.keep(destination)
        return destination.to_v2(include)

    def _delete_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        self._destinations.remove(call.parts["id"])
        return {"id": call.parts["id"], "object": "v2.core.event_destination", "deleted": True}

    def _disable_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._switched(call, params, on=False)

    def _enable_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._switched(call, params, on=True)

    def _switched(self, call: Call, params: Params, *, on: bool) -> Json:
        params.finish()
        switched = replace(self._destinations.find(call.parts["id"]), enabled=on)
        self._destinations.keep(switched)
        return switched.to_v2([])

    def _ping_destination(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        found = self._destinations.find(call.parts["id"])
        url = f"{DESTINATIONS}/{found.id}"
        related = {"id": found.id, "type": "v2.core.event_destination", "url": url}
        now = origin.received_at
        return self._log.find("thin", self._log.thin(PING, None, related, now, now), now)


def _connected(call: Call) -> str | None:
    """The connected account whose events are asked for; None for the platform's own."""
    return None if call.account == DEFAULT_ACCOUNT else call.account
