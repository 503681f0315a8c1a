"""What each error of the Stripe library, and of the transport beneath it, means for an intent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
import stripe

from services.pusher.intents import Meaning
from services.pusher.sinks.stripe import answer_of


def raised(
    status: int, error: dict[str, Any] | None, cls: type[stripe.StripeError] = stripe.APIError
) -> Exception:
    """As the library builds it; without ``error`` the body was not Stripe's."""
    body = None if error is None else {"error": error}
    arguments: dict[str, Any] = {
        "http_body": "<html>" if body is None else json.dumps(body),
        "http_status": status,
        "json_body": body,
        "headers": {"request-id": "req_1"},
    }
    message = (error or {}).get("message")
    if cls is stripe.InvalidRequestError:
        return cls(message, None, (error or {}).get("code"), **arguments)
    return cls(message, **arguments)


INVALID = {"type": "invalid_request_error"}
EXISTS = "An event already exists with identifier {}."
CASES: list[tuple[Exception, Meaning, str | None]] = [
    (raised(400, {**INVALID, "message": EXISTS.format("d1")}), Meaning.ALREADY_DELIVERED, "already_exists"),
    (raised(400, {**INVALID, "message": EXISTS.format("d11")}), Meaning.UNKNOWN, "foreign_answer"),
    (raised(400, {"type": "idempotency_error", "message": "Keys"}), Meaning.REFUSED, "idempotency_mismatch"),
    (raised(400, {**INVALID, "code": "rate_limit"}), Meaning.THROTTLED, "rate_limit"),
    (
        raised(400, {**INVALID, "code": "resource_missing"}, stripe.InvalidRequestError),
        Meaning.REFUSED,
        "resource_missing",
    ),
    (
        raised(400, {**INVALID, "message": "The event timestamp cannot be more than 35 days in past."}),
        Meaning.REFUSED,
        "timestamp_too_far_in_past",
    ),
    (
        raised(400, {**INVALID, "message": "The value in the event payload can have at most 15 digits."}),
        Meaning.REFUSED,
        "meter_event_value_too_many_digits",
    ),
    (raised(400, {**INVALID, "code": "Not a code: 5"}), Meaning.REFUSED, "refused"),
    (raised(401, INVALID, stripe.AuthenticationError), Meaning.UNAUTHORISED, "http_401"),
    (raised(403, INVALID, stripe.PermissionError), Meaning.UNAUTHORISED, "http_403"),
    (
        raised(404, {**INVALID, "message": "Unrecognized request URL (POST: /x)."}),
        Meaning.UNAUTHORISED,
        "unrecognized_url",
    ),
    (raised(408, INVALID), Meaning.UNKNOWN, "http_408"),
    (raised(409, {"code": "idempotency_key_in_use"}), Meaning.UNKNOWN, "idempotency_key_in_use"),
    (
        raised(409, {"code": "too_many_concurrent_requests"}),
        Meaning.THROTTLED,
        "too_many_concurrent_requests",
    ),
    (raised(429, {"code": "lock_timeout"}, stripe.RateLimitError), Meaning.THROTTLED, "lock_timeout"),
    (raised(429, INVALID, stripe.RateLimitError), Meaning.THROTTLED, "http_429"),
    *(
        (raised(status, {"type": "api_error"}), Meaning.UNKNOWN, f"http_{status}")
        for status in (500, 502, 503, 504)
    ),
    *((raised(status, None), Meaning.UNKNOWN, "APIError") for status in (200, 400, 401, 404, 429, 502)),
    (stripe.APIConnectionError("reset"), Meaning.UNKNOWN, "APIConnectionError"),
    (aiohttp.ClientPayloadError(), Meaning.UNKNOWN, "ClientPayloadError"),
    (TimeoutError(), Meaning.UNKNOWN, "TimeoutError"),
    (asyncio.IncompleteReadError(b"", 1), Meaning.UNKNOWN, "IncompleteReadError"),
    (ValueError("anything"), Meaning.UNKNOWN, "ValueError"),
]


@pytest.mark.parametrize(("error", "meaning", "code"), CASES)
def test_an_error_means_no_more_than_it_proves(error: Exception, meaning: Meaning, code: str | None) -> None:
    answer = answer_of(error, "d1")
    assert (answer.meaning, answer.code) == (meaning, code)


def test_a_connection_that_was_never_made_sent_nothing() -> None:
    error = stripe.APIConnectionError("refused")
    error.__cause__ = aiohttp.ConnectionTimeoutError()
    assert answer_of(error, "d1").meaning is Meaning.NOT_SENT
    error.__cause__ = aiohttp.ServerDisconnectedError()
    assert answer_of(error, "d1").meaning is Meaning.UNKNOWN


def test_the_request_id_is_kept_for_support() -> None:
    assert answer_of(raised(400, INVALID), "d1").request_id == "req_1"
