"""What the API refuses, and in which words.

ApiError                 an answer with a status; stored for its Idempotency-Key once execution began
├── InvalidParameters    400 before execution: never stored (docs.stripe.com/api/idempotent_requests)
├── Unauthenticated      401 before everything else
│   └── SessionExpired   401: the stream's token is older than 15 minutes
├── Forbidden            403: a restricted key lacks a permission; never stored (a choice)
├── TooManyRequests      429 before, or instead of, execution: never stored (docs.stripe.com/rate-limits)
├── KeyInUse             409: the first request with this Idempotency-Key is still running
├── KeyMismatch          400: this Idempotency-Key belongs to other parameters
├── ServerFailure        500: indeterminate, stored and replayed (docs.stripe.com/error-low-level)
└── DuplicateIdentifier  400 without a code: this meter event was accepted before (observed)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response, before transport; what an Idempotency-Key replays."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    @classmethod
    def of(cls, body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        return cls(status, msgspec.json.encode(body), headers or {})


class ApiError(Exception):
    """A refusal in Stripe's shape. `stored` says whether an Idempotency-Key keeps it."""

    status = 400
    type = "invalid_request_error"
    type_v2: str | None = None  # where v2 uses a type of its own
    stored = True

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}
        if status is not None:
            self.status = status

    def answer(self, *, v2: bool = False) -> Answer:
        doc_url = f"https://stripe.com/docs/error-codes/{self.code.replace('_', '-')}" if self.code else None
        fields = {
            "code": self.code,
            "doc_url": doc_url,
            "message": self.message,
            "param": self.param,
            "type": self.type_v2 or self.type if v2 else self.type,
        }
        error = {name: value for name, value in fields.items() if value is not None}
        return Answer.of({"error": error}, self.status, self.headers)


class InvalidParameters(ApiError):
    stored = False


class Unauthenticated(ApiError):
    status = 401
    stored = False

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": 'Bearer realm="Stripe"'})


class Forbidden(ApiError):
    """403 for a restricted key; the message names the permission (observed)."""

    status = 403
    stored = False

    def __init__(self, permission: str) -> None:
        super().__init__(
            "The provided key 'rk_test_****' does not have the required permissions for this endpoint. "
            f"Having the '{permission}' permission would allow this request to continue."
        )


class SessionExpired(Unauthenticated):
    """The SDK raises TemporarySessionExpiredError for this type (docs.stripe.com/api/v2/billing)."""

    type = "temporary_session_expired"

    def __init__(self) -> None:
        super().__init__("The meter event session has expired. Create a new one.")
        self.code = "billing_meter_event_session_expired"


class TooManyRequests(ApiError):
    """429. `reason` becomes Stripe-Rate-Limited-Reason; a lock timeout has none and asks to be retried.

    No Retry-After: Stripe documents none, and its SDKs ignore it.
    """

    status = 429
    type_v2 = "rate_limit"
    stored = False

    def __init__(self, reason: str | None, *, lock_timeout: bool = False) -> None:
        headers = {} if reason is None else {"Stripe-Rate-Limited-Reason": reason}
        if lock_timeout:
            headers["Stripe-Should-Retry"] = "true"
            message = "This object cannot be accessed right now because another API request is accessing it."
        else:
            message = "Request rate limit exceeded."
        super().__init__(message, code="lock_timeout" if lock_timeout else "rate_limit", headers=headers)


class KeyInUse(ApiError):
    """409 with this code and message are documented; the `type` on the wire is our choice."""

    status = 409
    type = "idempotency_error"
    stored = False

    def __init__(self) -> None:
        message = (
            "There is currently another in-progress request using this Idempotent Key (that probably means "
            "you submitted twice, and the other request is still going through)"
        )
        super().__init__(message, code="idempotency_key_in_use")


class KeyMismatch(ApiError):
    type = "idempotency_error"
    stored = False

    def __init__(self, key: str) -> None:
        super().__init__(
            "Keys for idempotent requests can only be used with the same parameters they were first used "
            f"with. Try using a key other than '{key}' if you meant to execute a different request."
        )


class DuplicateIdentifier(ApiError):
    def __init__(self, identifier: str) -> None:
        message = f"An event already exists with identifier {identifier}."
        super().__init__(message, headers={"Stripe-Should-Retry": "false"})


class ServerFailure(ApiError):
    """500: the outcome is indeterminate. v1 stores it, so that a retry sees the same 500 for a day.

    v2 executes a failed request again, so only v1 says that retrying is of no use; both are choices.
    """

    status = 500
    type = "api_error"

    def __init__(self, *, v2: bool) -> None:
        message = "An unknown error occurred while processing your request."
        super().__init__(message, headers={} if v2 else {"Stripe-Should-Retry": "false"})


def too_many_concurrent_requests() -> ApiError:
    """409: v2 declares the code; the status is the one others observed."""
    message = "There are too many concurrent requests for this customer and meter."
    error = ApiError(message, code="too_many_concurrent_requests", status=409)
    error.stored = False
    return error


def missing_object(kind: str, object_id: str, *, param: str, status: int) -> ApiError:
    """404 when the URL names it, 400 when a parameter does."""
    return ApiError(f"No such {kind}: '{object_id}'", code="resource_missing", param=param, status=status)


def unrecognized_url(method: str, path: str) -> ApiError:
    message = (
        f"Unrecognized request URL ({method}: {path}). Please see https://stripe.com/docs or we can help at "
        "https://support.stripe.com/."
    )
    error = ApiError(message, status=404)
    error.stored = False
    return error
