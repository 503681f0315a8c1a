"""Deltas to any HTTP endpoint that honours an Idempotency-Key. The operator configures the address.

It has no totals to ask for, so an intent in doubt for a day stays there until an operator decides.
"""

from __future__ import annotations

import aiohttp

from services.pusher.intents import Answer, Intent, Meaning, Shown, plain_decimal

_MEANINGS = {
    401: Meaning.UNAUTHORISED,
    403: Meaning.UNAUTHORISED,
    408: Meaning.UNKNOWN,
    409: Meaning.UNKNOWN,
    425: Meaning.THROTTLED,
    429: Meaning.THROTTLED,
}


class WebhookSink:
    """POSTs one JSON object for each intent. Redirects are not followed."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._http: aiohttp.ClientSession | None = None

    async def send(self, intent: Intent) -> Answer:
        """One POST; any 2xx is an acknowledgement."""
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar())
        body = {
            "identifier": intent.identifier,
            "event_name": intent.event_name,
            "customer": intent.stripe_customer,
            "value": plain_decimal(intent.amount),
            "formula": intent.formula,
            "dimensions": dict(intent.dimensions),
            "occurred_at": intent.event_at.isoformat(),
        }
        try:
            async with self._http.post(
                self._url, json=body, headers={"Idempotency-Key": intent.identifier}, allow_redirects=False
            ) as response:
                status = response.status
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Answer(Meaning.NOT_SENT, "not_connected")
        except Exception as error:
            return Answer(Meaning.UNKNOWN, type(error).__name__)
        if 200 <= status < 300:
            return Answer(Meaning.DELIVERED, None, status)
        default = Meaning.REFUSED if 400 <= status < 500 else Meaning.UNKNOWN
        return Answer(_MEANINGS.get(status, default), f"http_{status}", status)

    async def shown(self, intent: Intent) -> Shown | None:
        """Never known."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None
