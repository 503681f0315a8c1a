"""Reading Stripe, by its own library: what an object is now, or that Stripe cannot say.

Only Stripe's own words say that something does not exist. Everything else that is not an answer, whatever its
type, is :class:`Away`: the question stays open and nothing is concluded from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import stripe

from services.wire import metrics
from services.wire.errors import Transient
from services.wire.settings import Settings

T = TypeVar("T")

#: The second: a connected account that left, or never was ours.
_NOT_THERE = ((404, "resource_missing"), (403, "account_invalid"))


class Away(Transient):
    """Stripe gave no answer to go by. ``reason`` is a code or a class name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Missing(Exception):
    """Stripe says that there is no such object, for this key and account."""


class StripeReader:
    """One Stripe account and those connected to it. Must be used from one event loop."""

    def __init__(self, api_key: str, *, api_base: str | None, timeout_seconds: float) -> None:
        stripe.enable_telemetry = False
        self._key = api_key
        self._base = api_base
        self._timeout_seconds = timeout_seconds
        self._client: stripe.StripeClient | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> StripeReader:
        """The account that the operator configured.

        Raises:
            Misconfigured: no key, or a live key that was not allowed.
        """
        return cls(
            settings.stripe_key(),
            api_base=settings.stripe_api_base,
            timeout_seconds=settings.stripe_timeout_seconds,
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

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client = None
            await self._transport.close_async()

    async def _read(self, call: Callable[[stripe.StripeClient], Awaitable[T]]) -> T:
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
