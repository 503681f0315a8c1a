"""What is wrong with one meter event, if anything: pure, and the same for every way in.

Facts from docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api and .../meters/configure:
timestamps from 35 days back to 5 minutes ahead, decimal values of at most 15 digits (changelog 2026-04-22),
negative values correct earlier ones. Choices, where Stripe is silent: digits are counted without leading
zeros, trailing zeros included; exponents are refused; the meter is looked at first, then the timestamp, the
customer and the value, and only the first problem is told.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from services.stripe_simulator.codes import (
    ARCHIVED_METER,
    BAD_VALUE,
    CUSTOMER_NOT_FOUND,
    IN_FUTURE,
    IN_PAST,
    NO_CUSTOMER,
    NO_METER,
    NO_VALUE,
    TOO_MANY_DIGITS,
)
from services.stripe_simulator.errors import ApiError, InvalidParameters, Json
from services.stripe_simulator.forms import Params
from services.stripe_simulator.ledger import text
from services.stripe_simulator.meters import Meter, new_id
from services.stripe_simulator.moments import read_rfc3339

PAST_SECONDS_MAX = 35 * 24 * 3600
FUTURE_SECONDS_MAX = 5 * 60
DIGITS_MAX = 15
EXACT_DIGITS_MAX = 28  # what the default decimal context carries
NAME_LENGTH_MAX = 100
PAYLOAD_LENGTH_MAX = 100
DEFAULT_KEYS = ("stripe_customer_id", "value")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_POSITIVE_INTEGER = re.compile(r"[0-9]*[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class EventRequest:
    """One meter event as sent, whatever the way."""

    event_name: str
    identifier: str
    timestamp: int
    payload: Mapping[str, str]

    @classmethod
    def read(cls, params: Params, now: int) -> EventRequest:
        """The parameters of v1."""
        event_name = params.required_text("event_name", length_max=NAME_LENGTH_MAX)
        payload = params.text_map("payload", length_max=PAYLOAD_LENGTH_MAX)
        if payload is None:
            raise params.missing("payload")
        identifier = params.text("identifier", length_max=NAME_LENGTH_MAX)
        timestamp = params.integer("timestamp")
        params.finish()
        return cls(event_name, identifier or new_id("evt"), now if timestamp is None else timestamp, payload)

    @classmethod
    def read_v2(cls, params: Params, now: int) -> EventRequest:
        """The parameters of v2: the same, but for a timestamp in RFC 3339."""
        written = params.text("timestamp")
        try:
            timestamp = now if written is None else read_rfc3339(written)
        except ValueError as error:
            message = f"Invalid timestamp: {written} is not an RFC 3339 date and time."
            raise InvalidParameters(message, code="invalid_fields", param="timestamp") from error
        return replace(cls.read(params, now), timestamp=timestamp)

    def to_json(self, created: int) -> Json:
        return {
            "object": "billing.meter_event",
            "created": created,
            "event_name": self.event_name,
            "identifier": self.identifier,
            "livemode": False,
            "payload": dict(self.payload),
            "timestamp": self.timestamp,
        }


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an event does not count. `code` is the one of Stripe's asynchronous error reports."""

    code: str
    message: str
    param: str

    def refusal(self, codes: Mapping[str, str]) -> ApiError:
        return ApiError(self.message, code=codes.get(self.code), param=self.param)


def keys_of(meter: Meter | None) -> tuple[str, str]:
    """Under which keys the payload names customer and value."""
    return DEFAULT_KEYS if meter is None else (meter.customer_key, meter.value_key)


def examine(
    request: EventRequest, meter: Meter | None, customers: Container[str], now: int, *, positive_integer: bool
) -> Decimal | Problem:
    """The exact value that counts, or the first problem."""
    if meter is None:
        message = f"No active meter found for event name '{request.event_name}'."
        return Problem(NO_METER, message, "event_name")
    if not meter.active:
        message = f"The meter for event name '{request.event_name}' is not active."
        return Problem(ARCHIVED_METER, message, "event_name")
    problem = _timestamp_problem(request.timestamp, now) or _customer_problem(request, meter, customers)
    return problem or _value(request, meter, positive_integer=positive_integer)


def _timestamp_problem(timestamp: int, now: int) -> Problem | None:
    earliest, latest = now - PAST_SECONDS_MAX, now + FUTURE_SECONDS_MAX
    if timestamp < earliest:
        message = (
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {earliest}."
        )
        return Problem(IN_PAST, message, "timestamp")
    if timestamp > latest:
        message = (
            "The event timestamp cannot be more than 5 minutes in the future. "
            f"Expected a timestamp less than or equal to {latest}."
        )
        return Problem(IN_FUTURE, message, "timestamp")
    return None


def _customer_problem(request: EventRequest, meter: Meter, customers: Container[str]) -> Problem | None:
    customer = request.payload.get(meter.customer_key)
    if not customer:
        message = f"The event payload has no customer under the key '{meter.customer_key}'."
        return Problem(NO_CUSTOMER, message, "payload")
    if customer not in customers:
        return Problem(CUSTOMER_NOT_FOUND, f"No such customer: '{customer}'", "payload")
    return None


def _value(request: EventRequest, meter: Meter, *, positive_integer: bool) -> Decimal | Problem:
    value, param = request.payload.get(meter.value_key), f"payload[{meter.value_key}]"
    if value is None:
        if meter.formula == "count":
            return Decimal(1)
        message = f"The event payload has no value under the key '{meter.value_key}'."
        return Problem(NO_VALUE, message, param)
    if positive_integer and not _POSITIVE_INTEGER.fullmatch(value):
        return Problem(BAD_VALUE, f"The value must be a positive integer. Received {value}.", param)
    if not _DECIMAL.fullmatch(value):
        message = f"The value in the event payload must be a decimal number. Received {value}."
        return Problem(BAD_VALUE, message, param)
    if len(value) > DIGITS_MAX and len(value.lstrip("-").replace(".", "").lstrip("0")) > DIGITS_MAX:
        message = f"The value in the event payload can have at most {DIGITS_MAX} digits. Received {value}."
        return Problem(TOO_MANY_DIGITS, message, param)
    return Decimal(value)


def same_number(value: str) -> str:
    """`5` for `5.0` and `05`: two spellings of one value are no conflict. Anything else stays as it is."""
    if value.isdecimal() and value.isascii() and not value.startswith("0"):
        return value
    if len(value) > EXACT_DIGITS_MAX or not _DECIMAL.fullmatch(value):
        return value
    return text(Decimal(value).normalize())
