"""Meter events one by one, v1 and v2, and their cancellation: what is accepted, refused, or reported later.

v1 answers 400 for a problem unless the configuration reports it later; v2 answers with the errors that
POST /v2/billing/meter_events declares and reports a customer that does not exist. Cancellation reaches back
24 hours from receipt (docs.stripe.com/billing/subscriptions/usage-based/meters/configure). Choices, where
Stripe is silent: the wording of v1 refusals that were not observed and of all adjustment errors; v1 and v2
share one set of identifiers; an identifier stays taken when its event was cancelled or failed later.
"""

from __future__ import annotations

from decimal import Decimal

from services.stripe_simulator.codes import CODES_V1, CODES_V2, CUSTOMER_NOT_FOUND
from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import ApiError, DuplicateIdentifier, Json
from services.stripe_simulator.forms import Form, Params
from services.stripe_simulator.freshness import Freshness
from services.stripe_simulator.ledger import Applied, AsyncError, Ledger, Origin
from services.stripe_simulator.meters import Meter, Registry, new_id
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.observations import Observations
from services.stripe_simulator.validation import (
    NAME_LENGTH_MAX,
    EventRequest,
    Problem,
    examine,
    keys_of,
    same_number,
)

CANCEL_SECONDS_MAX = 24 * 3600
LATE_V2 = frozenset({CUSTOMER_NOT_FOUND})


class MeterEvents:
    def __init__(
        self,
        config: SimulatorConfig,
        registry: Registry,
        ledger: Ledger,
        observations: Observations,
        freshness: Freshness,
    ) -> None:
        self._config = config
        self._registry = registry
        self._ledger = ledger
        self._observations = observations
        self._freshness = freshness

    def subject(self, form: Form) -> tuple[str, str] | None:
        """(customer, event name): Stripe allows one concurrent call for each (docs.stripe.com/rate-limits).

        Also remembers what the identifier was sent for: this is read from every request that arrives,
        before anything can refuse it.
        """
        event_name, identifier, payload = form.get("event_name"), form.get("identifier"), form.get("payload")
        if not isinstance(event_name, str) or not isinstance(payload, dict):
            return None
        customer_key, value_key = keys_of(self._registry.meter_for(event_name))
        customer, value = payload.get(customer_key, ""), payload.get(value_key, "")
        if not isinstance(customer, str) or not isinstance(value, str):
            return None
        if isinstance(identifier, str) and identifier:
            self._ledger.saw_identifier(identifier, event_name, customer, same_number(value))
        return customer, event_name

    def create(self, params: Params, origin: Origin) -> Json:
        """POST /v1/billing/meter_events, after idempotency."""
        now = int(origin.received_at)
        request = EventRequest.read(params, now)  # 1 parameter validation, the only part never stored
        if self.taken(request, origin):  # 2
            error = DuplicateIdentifier(request.identifier)
            error.stored = self._config.store_duplicate_refusals
            raise error
        self._take(request, origin, CODES_V1, self._config.late_codes)  # 3
        return request.to_json(now)

    def create_v2(self, params: Params, origin: Origin) -> Json:
        """POST /v2/billing/meter_events, after idempotency."""
        request = EventRequest.read_v2(params, int(origin.received_at))
        if self.taken(request, origin):
            message = "A meter event with a duplicate identifier has already been submitted."
            raise ApiError(message, code="duplicate_meter_event")
        self._take(request, origin, CODES_V2, LATE_V2)
        return {
            **request.to_json(0),
            "object": "v2.billing.meter_event",
            "created": rfc3339(origin.received_at),
            "timestamp": rfc3339(request.timestamp),
        }

    def cancel(self, params: Params, origin: Origin) -> Json:
        """POST /v1/billing/meter_event_adjustments: answered `pending`, shown by summaries after the lag.

        The ledger leaves the event out at once. Wording of the refusals is a choice; Stripe documents none.
        """
        if params.choice("type", ("cancel",)) is None:
            raise params.missing("type")
        event_name = params.required_text("event_name", length_max=NAME_LENGTH_MAX)
        which = params.nested("cancel")
        identifier = which.required_text("identifier", length_max=NAME_LENGTH_MAX)
        which.finish()
        params.finish()
        row = self._ledger.latest(identifier, event_name)
        if row is None:
            message = f"No meter event found with identifier {identifier}."
            raise ApiError(message, code="resource_missing", param="cancel[identifier]")
        if row.cancelled_at is not None:
            message = f"The meter event with identifier {identifier} was already cancelled."
            raise ApiError(message, param="cancel[identifier]")
        if origin.received_at - row.received_at > CANCEL_SECONDS_MAX:
            message = "You can only cancel meter events within 24 hours of Stripe receiving them."
            raise ApiError(message, param="cancel[identifier]")
        shown_at = self._freshness.cancelled_at(origin.received_at)
        self._ledger.cancel(row.sequence, origin.received_at, shown_at)
        return {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "event_name": event_name,
            "livemode": False,
            "status": "pending",
            "type": "cancel",
        }

    def cancel_v2(self, params: Params, origin: Origin) -> Json:
        """POST /v2/billing/meter_event_adjustments. Every refusal is the one that v2 documents."""
        try:
            adjustment = self.cancel(params, origin)
        except ApiError as refusal:
            if refusal.stored:  # not the shape of the request but what it asks for
                refusal.code, refusal.param = "invalid_cancel_configuration", None
            raise
        return {
            **adjustment,
            "object": "v2.billing.meter_event_adjustment",
            "id": new_id("mea_test"),
            "created": rfc3339(origin.received_at),
        }

    def examine(self, request: EventRequest, now: int, *, v2: bool) -> tuple[Meter | None, Decimal | Problem]:
        meter = self._registry.meter_for(request.event_name)
        strict = self._config.strict_positive_integer or (v2 and self._config.strict_positive_integer_v2)
        return meter, examine(request, meter, self._registry.customers, now, positive_integer=strict)

    def taken(self, request: EventRequest, origin: Origin) -> bool:
        """Whether an event with this identifier was accepted within the window."""
        scope = request.event_name if self._config.identifier_scope == "event_name" else None
        accepted_at = self._ledger.accepted_at(request.identifier, scope)
        if accepted_at is None:
            return False
        hours = self._config.identifier_window_hours
        if hours is not None and origin.received_at - accepted_at > hours * 3600:
            return False
        self._observations.happened("duplicates_refused")
        return True

    def applied(self, request: EventRequest, meter: Meter, value: Decimal, received_at: float) -> Applied:
        """The event as the ledger takes it."""
        customer_key, value_key = keys_of(meter)
        payload = request.payload
        return Applied(
            identifier=request.identifier,
            event_name=request.event_name,
            meter=meter.id,
            customer=payload[customer_key],
            value=value,
            timestamp=request.timestamp,
            visible_at=self._freshness.visible_at(received_at),
            dimensions={
                name: text for name, text in payload.items() if name != customer_key and name != value_key
            },
        )

    def failed(self, request: EventRequest, meter: Meter | None, problem: Problem) -> AsyncError:
        """The event as an error report names it."""
        customer = request.payload.get(keys_of(meter)[0])
        meter_id = None if meter is None else meter.id
        return AsyncError(
            problem.code, problem.message, request.identifier, request.event_name, customer, meter_id
        )

    def _take(
        self, request: EventRequest, origin: Origin, codes: dict[str, str], late: frozenset[str]
    ) -> None:
        """Count the event, refuse it, or accept it and report it later."""
        meter, outcome = self.examine(request, int(origin.received_at), v2=codes is CODES_V2)
        if isinstance(outcome, Problem):
            if outcome.code not in late:
                raise outcome.refusal(codes)
            self._ledger.report([self.failed(request, meter, outcome)], origin)
            self._observations.happened("reported")
        elif meter is not None:
            self._ledger.append([self.applied(request, meter, outcome, origin.received_at)], origin)
            self._observations.happened("applied")
