"""The v2 meter event stream: batches of up to 100 events, answered at once and validated afterwards.

As documented (docs.stripe.com/api/v2/billing/meter-event-stream/create): an empty answer, events "processed
asynchronously, including validation". An identifier that is repeated within its window is not counted again
and nobody is told. Choice: a body that is not of the documented shape (JSON, at most 100 events, strings of
the documented lengths, RFC 3339 timestamps) is refused as a whole with 400, since it cannot be processed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import InvalidParameters, Json
from services.stripe_simulator.events import MeterEvents
from services.stripe_simulator.forms import Form
from services.stripe_simulator.ledger import Applied, AsyncError, IdentifierUse, Ledger, Origin
from services.stripe_simulator.meters import Registry, new_id
from services.stripe_simulator.moments import read_rfc3339
from services.stripe_simulator.observations import Observations
from services.stripe_simulator.validation import EventRequest, Problem, keys_of, same_number

EVENTS_MAX = 100

Name = Annotated[str, Meta(min_length=1, max_length=100)]
Value = Annotated[str, Meta(max_length=100)]


class StreamEvent(Struct, forbid_unknown_fields=True):
    event_name: Name
    payload: dict[str, Value]
    identifier: Name | None = None
    timestamp: str | None = None


class StreamBatch(Struct, forbid_unknown_fields=True):
    events: Annotated[list[StreamEvent], Meta(min_length=1, max_length=EVENTS_MAX)]


class EventStream:
    def __init__(
        self,
        config: SimulatorConfig,
        registry: Registry,
        ledger: Ledger,
        events: MeterEvents,
        observations: Observations,
    ) -> None:
        self._config = config
        self._registry = registry
        self._ledger = ledger
        self._events = events
        self._observations = observations

    def arrived(self, form: Form) -> None:
        """Remember what each identifier was sent for, before anything can refuse the batch.

        No subject: the stream is not held to one call per customer and meter.
        """
        uses: list[IdentifierUse] = []
        for one in _read(form).events:
            if one.identifier is not None:
                customer_key, value_key = keys_of(self._registry.meter_for(one.event_name))
                customer, value = one.payload.get(customer_key, ""), one.payload.get(value_key, "")
                uses.append((one.identifier, one.event_name, customer, same_number(value)))
        self._ledger.saw_identifiers(uses)

    def take(self, form: Form, origin: Origin) -> Json:
        """POST /v2/billing/meter_event_stream, after idempotency."""
        now = int(origin.received_at)
        requests = self._fresh([_request(one, now) for one in _read(form).events], origin.received_at)
        applied: list[Applied] = []
        failed: list[AsyncError] = []
        for request in requests:
            meter, outcome = self._events.examine(request, now, v2=True)
            if isinstance(outcome, Problem):
                failed.append(self._events.failed(request, meter, outcome))
            elif meter is not None:
                applied.append(self._events.applied(request, meter, outcome, origin.received_at))
        self._ledger.append(applied, origin)
        self._ledger.report(failed, origin)
        self._observations.happened("applied", len(applied))
        self._observations.happened("reported", len(failed))
        return {}

    def _fresh(self, requests: list[EventRequest], received_at: float) -> list[EventRequest]:
        """Those whose identifier is not taken, by an earlier event or earlier in the batch."""
        hours = self._config.identifier_window_hours
        since = None if hours is None else received_at - hours * 3600
        taken = self._ledger.accepted_since([one.identifier for one in requests], since)
        by_name = self._config.identifier_scope == "event_name"
        seen = taken if by_name else {(identifier, "") for identifier, _ in taken}
        fresh: list[EventRequest] = []
        for request in requests:
            name = (request.identifier, request.event_name if by_name else "")
            if name not in seen:
                seen.add(name)
                fresh.append(request)
        self._observations.happened("duplicates_ignored", len(requests) - len(fresh))
        return fresh


def events_in(form: Form) -> int:
    """How many events a body holds, before it is understood."""
    events = form.get("events")
    return len(events) if isinstance(events, list) else 1


def _read(form: Form) -> StreamBatch:
    try:
        return msgspec.convert(form, StreamBatch)
    except msgspec.ValidationError as error:
        raise InvalidParameters(f"Invalid request body: {error}", code="invalid_fields") from error


def _request(one: StreamEvent, now: int) -> EventRequest:
    timestamp = now
    if one.timestamp is not None:
        try:
            timestamp = read_rfc3339(one.timestamp)
        except ValueError as error:
            message = f"Invalid timestamp: {one.timestamp[:40]} is not an RFC 3339 date and time."
            raise InvalidParameters(message, code="invalid_fields", param="timestamp") from error
    return EventRequest(one.event_name, one.identifier or new_id("evt"), timestamp, one.payload)
