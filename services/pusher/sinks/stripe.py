"""Meter events to Stripe, by its own library.

What the library does not do, done here: it raises builtin and aiohttp exceptions for cut and stalled bodies,
hides most error codes in ``error.error``, makes up a new Idempotency-Key for each call, and sends telemetry.
The rule for answers: only a 2xx that names our identifier is delivered, only Stripe's own JSON error with a
4xx status is a refusal, and everything else, whatever its type, is unknown.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Self

import aiohttp
import stripe
import structlog

from services.pusher.intents import (
    HOUR,
    METER_AWAY_CODES,
    Answer,
    Formula,
    Intent,
    Meaning,
    Shown,
)
from services.pusher.sinks import Call
from services.wire.decimals import plain
from services.wire.settings import Settings

log = structlog.get_logger(__name__)

#: docs.stripe.com/changelog/dahlia/2026-04-22/billing-meter-event-values-validation
DIGITS_MAX = 15
METERS_MAX = 10_000
_REPEATED = re.compile(r"already exists with identifier (\S+?)\.?$")
_BUSY_CODES = frozenset({"too_many_concurrent_requests", "lock_timeout", "rate_limit"})
_CODE = re.compile(r"[a-z0-9_]{1,64}")
_NEVER_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class StripeSink:
    """One Stripe account. Must be used from one event loop."""

    batch_max = 1

    def __init__(
        self,
        api_key: str,
        *,
        api_base: str | None,
        stream_base: str | None = None,
        timeout_seconds: float,
        connections_max: int,
    ) -> None:
        stripe.enable_telemetry = False
        self._key = api_key
        self._bases: dict[str, str] = {}
        if api_base is not None:
            self._bases["api"] = api_base.rstrip("/")
        if (stream_base or api_base) is not None:
            self._bases["meter_events"] = (stream_base or api_base or "").rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._connections_max = connections_max
        self._http: aiohttp.ClientSession | None = None
        self._client: stripe.StripeClient | None = None
        self._meter_ids: dict[tuple[str, Formula], str] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The account and limits the operator configured.

        Raises:
            Misconfigured: no key, or a live key that was not allowed.
        """
        return cls(
            settings.stripe_key(),
            api_base=settings.stripe_api_base,
            stream_base=settings.stripe_stream_base,
            timeout_seconds=settings.stripe_timeout_seconds,
            connections_max=settings.stripe_concurrency,
        )

    async def send(self, calls: Sequence[Call]) -> list[Answer]:
        """POST /v1/billing/meter_events under each intent's identifier."""
        return [await self._send(call.intent, call.idempotency_key) for call in calls]

    async def _send(self, intent: Intent, idempotency_key: str) -> Answer:
        if (refused := refusal_before_call(intent)) is not None:
            return refused
        try:
            async with asyncio.timeout(self._timeout_seconds):
                event = await self._connected().v1.billing.meter_events.create_async(
                    event_fields(intent) | {"timestamp": int(intent.event_at.timestamp())},  # type: ignore[arg-type]
                    {"idempotency_key": idempotency_key, "max_network_retries": 0},
                )
            if event.identifier != intent.identifier:
                return Answer(Meaning.UNKNOWN, "foreign_answer", 200)
            return Answer(Meaning.DELIVERED, None, 200, _request_id(event.last_response))
        except Exception as error:
            return answer_of(error, intent.identifier)

    async def shown(self, intent: Intent) -> Shown | None:
        """The hour's meter event summary; Stripe leaves out hours without usage."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                meter_id = await self._meter_id(intent.event_name, intent.formula)
                if meter_id is None:
                    return None
                start = int(intent.hour_start.timestamp())
                page = await self._connected().v1.billing.meters.event_summaries.list_async(
                    meter_id,
                    {
                        "customer": intent.stripe_customer,
                        "start_time": start,
                        "end_time": start + int(HOUR.total_seconds()),
                        "value_grouping_window": "hour",
                    },
                )
                hours = [summary async for summary in page.auto_paging_iter()]
            values = [Decimal(repr(hour.aggregated_value)) for hour in hours]
            if not values:
                return Shown(None)
            if intent.formula is Formula.LAST and len(values) > 1:
                return None
            total = sum(values, Decimal(0))
            return Shown(total) if total.is_finite() else None
        except Exception as error:
            log.warning("summary not read", error=error)
            return None

    async def takes(self, event_name: str) -> bool:
        """Whether an active meter has this event name."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                page = await self._connected().v1.billing.meters.list_async(
                    {"limit": 100, "status": "active"}
                )
                async for meter in page.auto_paging_iter():
                    if meter.event_name == event_name:
                        self._meter_ids.clear()  # it may be another meter than before
                        return True
        except Exception as error:
            log.warning("meters not read", error=error)
        return False

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._http is not None:
            await self._http.close()
        self._http = self._client = None

    def _connected(self) -> stripe.StripeClient:
        if self._client is None:
            trust = ssl.create_default_context(cafile=stripe.ca_bundle_path)
            connector = aiohttp.TCPConnector(ssl=trust, limit=self._connections_max + 1)
            limits = aiohttp.ClientTimeout(total=self._timeout_seconds)
            self._http = aiohttp.ClientSession(
                connector=connector, timeout=limits, cookie_jar=aiohttp.DummyCookieJar()
            )
            self._client = stripe.StripeClient(
                self._key,
                base_addresses=self._bases,  # type: ignore[arg-type]
                max_network_retries=0,
                http_client=_ClosingClient(self._http),
            )
        return self._client

    async def _meter_id(self, event_name: str, formula: Formula) -> str | None:
        """Id of the meter, if its summaries aggregate what was sent, all of it, by this formula."""
        if (event_name, formula) not in self._meter_ids:
            page = await self._connected().v1.billing.meters.list_async({"limit": 100})
            seen, chosen = 0, None
            async for meter in page.auto_paging_iter():
                seen += 1
                if seen > METERS_MAX:
                    return None
                # One active meter has the name; archived ones may share it.
                if meter.event_name == event_name and (chosen is None or meter.status == "active"):
                    chosen = meter
            if (
                chosen is not None
                and chosen.default_aggregation.formula == formula
                and chosen.event_time_window is None
            ):
                self._meter_ids[event_name, formula] = chosen.id
        return self._meter_ids.get((event_name, formula))


class _ClosingClient(stripe.AIOHTTPClient):
    """The library's client leaves a response open whose body it could not read. Its connection is then taken
    for ever, and after as many as the pool holds nothing can be sent any more (stripe-python 16.1)."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session=session)
        self._http = session

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        try:
            response = await self._http.request(method, url, headers=headers, data=post_data)
        except Exception as error:
            raise stripe.APIConnectionError(type(error).__name__) from error  # type: ignore[no-untyped-call]
        async with response:
            return await response.read(), response.status, response.headers


def refusal_before_call(intent: Intent) -> Answer | None:
    """What Stripe would refuse for good, or count wrongly."""
    value = plain(intent.amount)
    if len(value.lstrip("-").replace(".", "").lstrip("0")) > DIGITS_MAX:
        return Answer(Meaning.REFUSED, "meter_event_value_too_many_digits")
    if intent.dimensions.keys() & {intent.customer_payload_key, intent.value_payload_key}:
        return Answer(Meaning.REFUSED, "dimension_is_payload_key")
    return None


def event_fields(intent: Intent) -> dict[str, Any]:
    """The parameters of a meter event that v1 and v2 share: all but the timestamp."""
    return {
        "event_name": intent.event_name,
        "identifier": intent.identifier,
        "payload": {
            **intent.dimensions,
            intent.customer_payload_key: intent.stripe_customer,
            intent.value_payload_key: plain(intent.amount),
        },
    }


def answer_of(error: Exception, identifier: str) -> Answer:
    """What an exception out of the library, or out of the transport beneath it, meant."""
    if not isinstance(error, stripe.StripeError):
        return Answer(Meaning.UNKNOWN, _class_code(error))
    if isinstance(error.__cause__, _NEVER_CONNECTED):
        return Answer(Meaning.NOT_SENT, "not_connected")
    detail = error.error
    status = error.http_status
    if status is None or detail is None:
        return Answer(Meaning.UNKNOWN, _class_code(error), status)
    code = getattr(detail, "code", None)
    code = code if isinstance(code, str) and _CODE.fullmatch(code) else None
    meaning, reason = _refusal(
        status, code, getattr(detail, "type", None), str(error.user_message), identifier
    )
    return Answer(meaning, reason, status, error.request_id)


def _refusal(
    status: int, code: str | None, kind: str | None, message: str, identifier: str
) -> tuple[Meaning, str | None]:
    """Meaning and code of Stripe's own error object."""
    if status >= 500 or status < 400 or status == 408:
        return Meaning.UNKNOWN, code or f"http_{status}"
    if status == 429 or code in _BUSY_CODES:
        return Meaning.THROTTLED, code or "http_429"
    if status == 409:
        return Meaning.UNKNOWN, code or "http_409"
    if status in (401, 403):
        return Meaning.UNAUTHORISED, code or f"http_{status}"
    if kind == "idempotency_error":
        return Meaning.REFUSED, "idempotency_mismatch"
    repeated = _REPEATED.search(message)
    if code == "duplicate_meter_event" or (repeated is not None and repeated[1] == identifier):
        return Meaning.ALREADY_DELIVERED, "already_exists"
    if repeated is not None:
        return Meaning.UNKNOWN, "foreign_answer"
    if status == 404 and message.startswith("Unrecognized request URL"):
        return Meaning.UNAUTHORISED, "unrecognized_url"
    if code is None or code == "resource_missing":
        code = _code_of(message) or code or "refused"
    return (Meaning.METER_AWAY if code in METER_AWAY_CODES else Meaning.REFUSED), code


#: Refusals without a telling code, by what their message says. The message itself is never kept. Stripe does
#: not document these texts; the ones for meters are those that clients have seen. What is none of them fails
#: one intent and pauses nothing.
_MESSAGES = (
    ("timestamp", "more than 35 days", "timestamp_too_far_in_past"),
    ("timestamp", "future", "timestamp_in_future"),
    ("value", "digits", "meter_event_value_too_many_digits"),
    ("value", "", "meter_event_invalid_value"),
    ("No such customer", "", "meter_event_customer_not_found"),
    ("No active meter", "", "no_meter"),
    ("No such meter", "", "no_meter"),
    ("No such billing meter", "", "no_meter"),
    ("meter", "not active", "archived_meter"),
    ("meter", "archived", "archived_meter"),
    ("meter", "deactivated", "archived_meter"),
)


def _code_of(message: str) -> str | None:
    for first, second, code in _MESSAGES:
        if first in message and second in message:
            return code
    return None


def _class_code(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, stripe.APIConnectionError) and error.__cause__ else error
    return type(cause).__name__


def _request_id(response: Any) -> str | None:
    found = getattr(response, "request_id", None)
    return found if isinstance(found, str) else None
