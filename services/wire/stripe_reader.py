"""Reading Stripe, by its own library: what an object is now, or that Stripe cannot say.

Only Stripe's own words say that something does not exist. Everything else that is not an answer, whatever its
type, is :class:`Away`: the question stays open and nothing is concluded from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import stripe
from aiolimiter import AsyncLimiter

from services.wire import metrics
from services.wire.errors import Transient
from services.wire.settings import Settings

T = TypeVar("T")

HOUR_S = 3600
#: Both lists are read in pages of the most that Stripe gives.
PAGE = 100
METERS_MAX = 10_000

#: The second: what a parameter names. The third: a connected account that left, or never was ours.
_NOT_THERE = ((404, "resource_missing"), (400, "resource_missing"), (403, "account_invalid"))


class Away(Transient):
    """Stripe gave no answer to go by. ``reason`` is a code or a class name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Missing(Exception):
    """Stripe says that there is no such object, for this key and account."""


@dataclass(frozen=True, slots=True)
class MeterAtStripe:
    """A billing meter. ``has_window``: Stripe keeps one event of each window only."""

    meter_id: str
    event_name: str
    formula: str
    is_active: bool
    has_window: bool
    customer_payload_key: str | None
    value_payload_key: str | None


class StripeReader:
    """One Stripe account and those connected to it. Must be used from one event loop."""

    def __init__(
        self,
        api_key: str,
        *,
        api_base: str | None,
        timeout_seconds: float,
        per_second: float | None = None,
    ) -> None:
        stripe.enable_telemetry = False
        self._key = api_key
        self._base = api_base
        self._timeout_seconds = timeout_seconds
        self._pace = None if per_second is None else AsyncLimiter(per_second, 1)
        self._client: stripe.StripeClient | None = None

    @classmethod
    def from_settings(cls, settings: Settings, *, per_second: float | None = None) -> StripeReader:
        """The account that the operator configured. ``per_second``: calls, at most.

        Raises:
            Misconfigured: no key, or a live key that was not allowed.
        """
        return cls(
            settings.stripe_key(),
            api_base=settings.stripe_api_base,
            timeout_seconds=settings.stripe_timeout_seconds,
            per_second=per_second,
        )

    async def charge(self, charge_id: str, account: str) -> stripe.Charge:
        """GET /v1/charges/{id}

        Raises:
            Away: no answer to go by.
            Missing: there is none.
        """
        return await self._read(
            lambda client: client.v1.charges.retrieve_async(charge_id, None, _options(account))
        )

    async def refund(self, refund_id: str, account: str) -> stripe.Refund:
        """GET /v1/refunds/{id}; raises as :meth:`charge`."""
        return await self._read(
            lambda client: client.v1.refunds.retrieve_async(refund_id, None, _options(account))
        )

    async def balance_transaction(self, balance_id: str, account: str) -> stripe.BalanceTransaction:
        """GET /v1/balance_transactions/{id}; raises as :meth:`charge`."""
        return await self._read(
            lambda client: client.v1.balance_transactions.retrieve_async(balance_id, None, _options(account))
        )

    async def subscription(self, subscription_id: str, account: str) -> stripe.Subscription:
        """GET /v1/subscriptions/{id}; raises as :meth:`charge`."""
        return await self._read(
            lambda client: client.v1.subscriptions.retrieve_async(subscription_id, None, _options(account))
        )

    async def meters(self) -> list[MeterAtStripe]:
        """Every billing meter, archived ones too: GET /v1/billing/meters, all pages; raises :class:`Away`."""
        found: list[Any] = []
        page = await self._meter_page({})
        while True:
            found += page.data
            if not page.has_more:
                return [_meter(one) for one in found]
            if not page.data or len(found) > METERS_MAX:
                raise Away("unreadable")
            page = await self._meter_page({"starting_after": found[-1].id})

    async def used(self, meter_id: str, customer: str, start_s: int, end_s: int) -> Decimal:
        """What Stripe shows for [start, end), seconds since 1970 on full minutes, as one summary; none is 0.

        GET /v1/billing/meters/{id}/event_summaries; raises as :meth:`charge`.
        """
        summaries = await self._summaries(meter_id, customer, start_s, end_s, None)
        if len(summaries) > 1:
            raise Away("unreadable")
        return next(iter(summaries.values()), Decimal(0))

    async def used_by_hour(
        self, meter_id: str, customer: str, start_s: int, end_s: int
    ) -> Mapping[int, Decimal]:
        """The same for every hour by its start: Stripe leaves out hours without usage. Full hours only.

        Either all pages were read, or it raises.
        """
        return await self._summaries(meter_id, customer, start_s, end_s, HOUR_S)

    async def _summaries(
        self, meter_id: str, customer: str, start_s: int, end_s: int, width_s: int | None
    ) -> dict[int, Decimal]:
        wanted: dict[str, Any] = {
            "customer": customer, "start_time": start_s, "end_time": end_s, "limit": PAGE,
            **({} if width_s is None else {"value_grouping_window": "hour"}),
        }  # fmt: skip
        found: dict[int, Decimal] = {}
        while True:
            page = await self._summary_page(meter_id, wanted)
            for one in page.data:
                start, value = _summary(one, start_s, end_s, width_s)
                if start in found:
                    raise Away("unreadable")
                found[start] = value
            if not page.has_more:
                return found
            if not page.data:
                raise Away("unreadable")
            wanted = {**wanted, "starting_after": page.data[-1].id}

    async def _meter_page(self, after: dict[str, str]) -> Any:
        wanted: Any = {"limit": PAGE, **after}
        return await self._read(lambda client: client.v1.billing.meters.list_async(wanted))

    async def _summary_page(self, meter_id: str, wanted: Any) -> Any:
        return await self._read(
            lambda client: client.v1.billing.meters.event_summaries.list_async(meter_id, wanted)
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client = None
            await self._transport.close_async()

    async def _read(self, call: Callable[[stripe.StripeClient], Awaitable[T]]) -> T:
        if self._pace is not None:
            await self._pace.acquire()
        with metrics.STRIPE_SECONDS.time():
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    found = await call(self._connected())
            except Exception as error:
                failure = failure_of(error)
                metrics.STRIPE_CALLS.labels(_label(failure)).inc()
                raise failure from error
        metrics.STRIPE_CALLS.labels("read").inc()
        return found

    def _connected(self) -> stripe.StripeClient:
        if self._client is None:
            self._transport: Any = stripe.HTTPXClient(timeout=self._timeout_seconds)
            self._client = stripe.StripeClient(
                self._key,
                base_addresses={} if self._base is None else {"api": self._base.rstrip("/")},
                http_client=self._transport,
                max_network_retries=0,
            )
        return self._client


def _meter(one: Any) -> MeterAtStripe:
    try:
        return MeterAtStripe(
            meter_id=one.id,
            event_name=one.event_name,
            formula=one.default_aggregation.formula,
            is_active=one.status == "active",
            has_window=one.event_time_window is not None,
            customer_payload_key=getattr(one.customer_mapping, "event_payload_key", None),
            value_payload_key=getattr(one.value_settings, "event_payload_key", None),
        )
    except (AttributeError, KeyError):
        raise Away("unreadable") from None


def _summary(one: Any, start_s: int, end_s: int, width_s: int | None) -> tuple[int, Decimal]:
    """Start and value, if they can be what was asked for. Of a double its shortest text is meant."""
    try:
        start, end, value = int(one.start_time), int(one.end_time), Decimal(repr(one.aggregated_value))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        raise Away("unreadable") from None
    expected = (start, end) == (start_s, end_s) if width_s is None else end - start == width_s
    if not (expected and start_s <= start < end_s and value.is_finite()):
        raise Away("unreadable")
    return start, value


for _result in ("read", "missing", "unauthorised", "unknown"):
    metrics.STRIPE_CALLS.labels(_result)  # from 0 on, so that the first one is an increase


def failure_of(error: Exception) -> Away | Missing:
    """What an exception out of the library, or out of the transport beneath it, meant."""
    if isinstance(error, stripe.StripeError):
        status = error.http_status
        detail: Any = error.error
        code = getattr(detail, "code", None)
        if (status, code) in _NOT_THERE:
            return Missing(code)
        if status is not None:
            return Away(f"http_{status}")
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return Away(type(error).__name__)


def _label(failure: Away | Missing) -> str:
    if isinstance(failure, Missing):
        return "missing"
    return "unauthorised" if failure.reason in ("http_401", "http_403") else "unknown"


def _options(account: str) -> stripe.RequestOptions:
    return {"stripe_account": account} if account else {}
