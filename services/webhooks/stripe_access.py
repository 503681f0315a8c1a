"""Stripe's own library, for handlers that have to ask: one connection pool, a client for each account."""

from __future__ import annotations

import stripe

from services.webhooks.handling import WebhookEvent
from services.wire.settings import Settings


class StripeAccess:
    """Clients that act for the account of an event. Thread-safe.

    No retries of the library's own: a run is tried again with its state in PostgreSQL, not in a thread.
    """

    def __init__(self, api_key: str, *, api_base: str | None, timeout_seconds: float) -> None:
        stripe.enable_telemetry = False
        self._key = api_key
        #: Of the key; None when it does not say.
        self.livemode = True if "_live_" in api_key else False if "_test_" in api_key else None
        self._bases: stripe._base_address.BaseAddresses = {}
        if api_base is not None:
            self._bases = {"api": api_base.rstrip("/")}
        self._http = stripe.RequestsClient(timeout=timeout_seconds)  # a session for each thread

    @classmethod
    def from_settings(cls, settings: Settings) -> StripeAccess:
        """The account that the operator configured.

        Raises:
            Misconfigured: no key, or a live one that was not allowed.
        """
        return cls(
            settings.stripe_key(),
            api_base=settings.stripe_api_base,
            timeout_seconds=settings.stripe_timeout_seconds,
        )

    def client(self, event: WebhookEvent) -> stripe.StripeClient:
        """A client for the account that the event is of: a connected one's is named in every call."""
        account = event.account or None
        return stripe.StripeClient(
            self._key,
            stripe_account=None if event.is_thin else account,
            stripe_context=account if event.is_thin else None,
            base_addresses=self._bases,
            max_network_retries=0,
            http_client=self._http,
        )
