"""Meter events and their cancellation: what is accepted, what is refused, what reaches the ledger.

Facts from docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api and .../meters/configure:
timestamps from 35 days back to 5 minutes ahead, decimal values of at most 15 digits (changelog 2026-04-22),
negative values correct earlier ones, cancellation within 24 hours of receipt. Choices, where Stripe is
silent: which unknown reference fails at the call is a setting; refusals at the call carry no `code` unless
one was observed; digits are counted without leading zeros, trailing zeros included; exponents are refused;
an identifier stays taken when its event was cancelled or failed later.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal

from services.stripe_simulator.clock import Clock
from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import ApiError, DuplicateIdentifier, Json
from services.stripe_simulator.forms import Form, Params
from services.stripe_simulator.ledger import Applied, AsyncError, Ledger, Origin, text
from services.stripe_simulator.meters import Meter, Registry, new_id
from services.stripe_simulator.observations import Observations

PAST_SECONDS_MAX = 35 * 24 * 3600
FUTURE_SECONDS_MAX = 5 * 60
CANCEL_SECONDS_MAX = 24 * 3600
DIGITS_MAX = 15
EXACT_DIGITS_MAX = 28  # what the default decimal context carries
NAME_LENGTH_MAX = 100
PAYLOAD_LENGTH_MAX = 100
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_POSITIVE_INTEGER = re.compile(r"[0-9]*[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class EventRequest:
    """The parameters of one meter event, as sent."""

    event_name: str
    identifier: str
    timestamp: int
    payload: dict[str, str]

    @classmethod
    def read(cls, params: Params, now: int) -> EventRequest:
        event_name = params.required_text("event_name", length_max=NAME_LENGTH_MAX)
        payload = params.text_map("payload", length_max=PAYLOAD_LENGTH_MAX)
        if payload is None:
            raise params.missing("payload")
        identifier = params.text("identifier", length_max=NAME_LENGTH_MAX)
        timestamp = params.integer("timestamp")
        params.finish()
        return cls(event_name, identifier or new_id("evt"), now if timestamp is None else timestamp, payload)

    def to_json(self, created: int) -> Json:
        return {
            "object": "billing.meter_event",
            "created": created,
            "event_name": self.event_name,
            "identifier": self.identifier,
            "livemode": False,
            "payload": self.payload,
            "timestamp": self.timestamp,
        }


def check_timestamp(timestamp: int, now: int) -> None:
    earliest, latest = now - PAST_SECONDS_MAX, now + FUTURE_SECONDS_MAX
    if timestamp < earliest:
        raise ApiError(
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {earliest}.",
            param="timestamp",
        )
    if timestamp > latest:
        raise ApiError(
            "The event timestamp cannot be more than 5 minutes in the future. "
            f"Expected a timestamp less than or equal to {latest}.",
            param="timestamp",
        )


def read_value(value: str, param: str, *, strict_positive_integer: bool) -> Decimal:
    """The exact number; NaN, infinities, exponents and anything longer than 15 digits are refused."""
    if strict_positive_integer and not _POSITIVE_INTEGER.fullmatch(value):
        raise ApiError(f"The value must be a positive integer. Received {value}.", param=param)
    if not _DECIMAL.fullmatch(value):
        message = f"The value in the event payload must be a decimal number. Received {value}."
        raise ApiError(message, param=param)
    digits = value.lstrip("-").replace(".", "").lstrip("0")
    if len(digits) > DIGITS_MAX:
        message = f"The value in the event payload can have at most {DIGITS_MAX} digits. Received {value}."
        raise ApiError(message, param=param)
    return Decimal(value)


def same_number(value: str) -> str:
    """`5` for `5.0` and `05`: two spellings of one value are no conflict. Anything else stays as it is."""
    if len(value) > EXACT_DIGITS_MAX or not _DECIMAL.fullmatch(value):
        return value
    return text(Decimal(value).normalize())


class MeterEvents:
    def __init__(
        self,
        config: SimulatorConfig,
        clock: Clock,
        registry: Registry,
        ledger: Ledger,
        observations: Observations,
        dice: random.Random,
    ) -> None:
        self._config = config
        self._clock = clock
        self._registry = registry
        self._ledger = ledger
        self._observations = observations
        self._dice = dice

    def subject(self, form: Form) -> tuple[str, str] | None:
        """(customer, event name): Stripe allows one concurrent call for each (docs.stripe.com/rate-limits).

        Also remembers what the identifier was sent for: this is read from every request that arrives,
        before anything can refuse it.
        """
        event_name, identifier, payload = form.get("event_name"), form.get("identifier"), form.get("payload")
        if not isinstance(event_name, str) or not isinstance(payload, dict):
            return None
        customer_key, value_key = self._keys(self._registry.meter_for(event_name))
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
        self._refuse_taken(request, origin)  # 2
        check_timestamp(request.timestamp, now)  # 3
        meter = self._registry.meter_for(request.event_name)
        value = self._value(request, meter)  # 4
        problem = self._reference_problem(request, meter)  # 5
        if problem is not None:
            self._refuse_or_report(problem, origin)
        elif meter is not None:
            self._apply(request, meter, value, origin)  # 6
        return request.to_json(now)

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
        self._ledger.cancel(row.sequence, origin.received_at, self._visible_at(origin.received_at))
        return {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "event_name": event_name,
            "livemode": False,
            "status": "pending",
            "type": "cancel",
        }

    def _refuse_taken(self, request: EventRequest, origin: Origin) -> None:
        scope = request.event_name if self._config.identifier_scope == "event_name" else None
        accepted_at = self._ledger.accepted_at(request.identifier, scope)
        if accepted_at is None:
            return
        hours = self._config.identifier_window_hours
        if hours is None or origin.received_at - accepted_at <= hours * 3600:
            self._observations.happened("duplicates_refused")
            error = DuplicateIdentifier(request.identifier)
            error.stored = self._config.store_duplicate_refusals
            raise error

    def _keys(self, meter: Meter | None) -> tuple[str, str]:
        return ("stripe_customer_id", "value") if meter is None else (meter.customer_key, meter.value_key)

    def _value(self, request: EventRequest, meter: Meter | None) -> Decimal:
        _, value_key = self._keys(meter)
        param = f"payload[{value_key}]"
        value = request.payload.get(value_key)
        if value is None:
            if meter is not None and meter.formula == "count":
                return Decimal(1)
            raise ApiError(f"The event payload has no value under the key '{value_key}'.", param=param)
        return read_value(value, param, strict_positive_integer=self._config.strict_positive_integer)

    def _reference_problem(self, request: EventRequest, meter: Meter | None) -> AsyncError | None:
        """Why the event cannot be attributed; the codes are those of Stripe's asynchronous error reports."""
        customer_key, _ = self._keys(meter)
        customer = request.payload.get(customer_key)

        def problem(code: str, message: str) -> AsyncError:
            return AsyncError(code, message, request.identifier, request.event_name, customer)

        if not customer:
            message = f"The event payload has no customer under the key '{customer_key}'."
            return problem("meter_event_no_customer_defined", message)
        if customer not in self._registry.customers:
            return problem("meter_event_customer_not_found", f"No such customer: '{customer}'")
        if meter is None:
            return problem("no_meter", f"No active meter found for event name '{request.event_name}'.")
        if not meter.active:
            return problem(
                "archived_meter", f"The meter for event name '{request.event_name}' is not active."
            )
        return None

    def _refuse_or_report(self, problem: AsyncError, origin: Origin) -> None:
        about_meter = problem.code in ("no_meter", "archived_meter")
        when = self._config.unknown_meter if about_meter else self._config.unknown_customer
        if when == "sync":
            missing = problem.code in ("meter_event_customer_not_found", "no_meter")
            raise ApiError(
                problem.message,
                code="resource_missing" if missing else None,
                param="event_name" if about_meter else "payload",
            )
        self._ledger.report(problem, origin)
        self._observations.happened("reported")

    def _apply(self, request: EventRequest, meter: Meter, value: Decimal, origin: Origin) -> None:
        event = Applied(
            identifier=request.identifier,
            event_name=request.event_name,
            meter=meter.id,
            customer=request.payload[meter.customer_key],
            value=value,
            timestamp=request.timestamp,
            visible_at=self._visible_at(origin.received_at),
            dimensions={
                name: text
                for name, text in request.payload.items()
                if name not in (meter.customer_key, meter.value_key)
            },
        )
        self._ledger.append(event, origin)
        self._observations.happened("applied")

    def _visible_at(self, received_at: float) -> float:
        lag = self._config.summary_lag_seconds
        return received_at + (lag * self._dice.uniform(0.5, 1.5) if lag else 0.0)
