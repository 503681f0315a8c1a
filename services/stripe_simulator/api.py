"""The endpoints of metering: each reads its parameters, does one thing, and returns Stripe's shape of it."""

from __future__ import annotations

from dataclasses import replace

from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.events import MeterEvents
from services.stripe_simulator.forms import Params
from services.stripe_simulator.freshness import Freshness
from services.stripe_simulator.gateway import Call, Endpoint
from services.stripe_simulator.ledger import Ledger, Origin
from services.stripe_simulator.meters import (
    METADATA_LENGTH_MAX,
    Meter,
    Registry,
    new_id,
    read_meter,
)
from services.stripe_simulator.paging import Page
from services.stripe_simulator.sessions import Sessions
from services.stripe_simulator.stream import EventStream, events_in
from services.stripe_simulator.summaries import SummaryQuery, summarise

METERS = "/v1/billing/meters"
BILLING_V2 = "/v2/billing"


class Api:
    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        events: MeterEvents,
        sessions: Sessions,
        stream: EventStream,
        freshness: Freshness,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._events = events
        self._sessions = sessions
        self._stream = stream
        self._freshness = freshness

    def endpoints(self) -> dict[tuple[str, str], Endpoint]:
        """(method, route) → endpoint."""
        return {
            ("POST", "/v1/billing/meter_events"): Endpoint(
                self._create_event, self._events.subject, rate="events"
            ),
            ("POST", "/v1/billing/meter_event_adjustments"): Endpoint(self._cancel_event),
            ("POST", f"{BILLING_V2}/meter_events"): Endpoint(
                self._create_event_v2, self._events.subject, rate="events"
            ),
            ("POST", f"{BILLING_V2}/meter_event_adjustments"): Endpoint(self._cancel_event_v2),
            ("POST", f"{BILLING_V2}/meter_event_session"): Endpoint(self._create_session),
            ("POST", f"{BILLING_V2}/meter_event_stream"): Endpoint(
                self._take_stream, self._stream.arrived, rate="stream", events_in=events_in
            ),
            ("POST", METERS): Endpoint(self._create_meter),
            ("GET", METERS): Endpoint(self._list_meters),
            ("GET", f"{METERS}/{{id}}"): Endpoint(self._get_meter),
            ("POST", f"{METERS}/{{id}}"): Endpoint(self._update_meter),
            ("POST", f"{METERS}/{{id}}/deactivate"): Endpoint(self._deactivate_meter),
            ("POST", f"{METERS}/{{id}}/reactivate"): Endpoint(self._reactivate_meter),
            ("GET", f"{METERS}/{{id}}/event_summaries"): Endpoint(self._list_summaries),
        }

    def _create_event(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._events.create(params, origin)

    def _cancel_event(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._events.cancel(params, origin)

    def _create_event_v2(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._events.create_v2(params, origin)

    def _cancel_event_v2(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._events.cancel_v2(params, origin)

    def _create_session(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._sessions.create(params, origin, call.account)

    def _take_stream(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._stream.take(params.everything(), origin)

    # Meters. `metadata` is an addition of the simulator: Stripe's meters have none.

    def _create_meter(self, call: Call, params: Params, origin: Origin) -> Json:
        return self._kept(read_meter(params, new_id("mtr_test"), int(origin.received_at)))

    def _list_meters(self, call: Call, params: Params, origin: Origin) -> Json:
        page = Page.read(params)
        status = params.choice("status", ("active", "inactive"))
        params.finish()
        newest_first = reversed([meter.to_json() for meter in self._registry.meters.values()])
        chosen = [meter for meter in newest_first if status in (None, meter["status"])]
        return page.of(chosen, METERS, "billing meter")

    def _get_meter(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        return self._registry.meter(call.parts["id"]).to_json()

    def _update_meter(self, call: Call, params: Params, origin: Origin) -> Json:
        meter = self._registry.meter(call.parts["id"])
        display_name = params.text("display_name", length_max=250) or meter.display_name
        metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX) or {}
        params.finish()
        changed = replace(meter, display_name=display_name, metadata=meter.metadata | metadata)
        return self._kept(replace(changed, updated=int(origin.received_at)))

    def _deactivate_meter(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        now = int(origin.received_at)
        return self._kept(replace(self._registry.meter(call.parts["id"]), deactivated_at=now, updated=now))

    def _reactivate_meter(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        now = int(origin.received_at)
        return self._kept(replace(self._registry.meter(call.parts["id"]), deactivated_at=None, updated=now))

    def _kept(self, meter: Meter) -> Json:
        self._registry.keep_meter(meter)
        return meter.to_json()

    def _list_summaries(self, call: Call, params: Params, origin: Origin) -> Json:
        meter = self._registry.meter(call.parts["id"])
        page = Page.read(params)
        query = SummaryQuery.read(params)
        if query.customer not in self._registry.customers:
            raise missing_object("customer", query.customer, param="customer", status=400)
        seen_at = self._freshness.seen_at(origin.received_at)
        usage = self._ledger.usage(meter.id, query.customer, query.start, query.end, seen_at)
        return page.of(summarise(usage, meter, query), call.path, "meter event summary")
