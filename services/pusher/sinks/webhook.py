"""Deltas to any HTTP endpoint that honours an Idempotency-Key. The operator configures address and secret.

Signed by the Standard Webhooks specification (github.com/standard-webhooks/standard-webhooks, version 1), so
that stock libraries verify it. It has no totals to ask for, so an intent in doubt for a day stays there until
an operator decides (``tidemeter meter-events settle``).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence

import aiohttp

from services.pusher.intents import Answer, Intent, Meaning, Shown
from services.pusher.sinks import Call
from services.wire.decimals import plain
from services.wire.errors import Misconfigured

SECRET_PREFIX = "whsec_"  # noqa: S105  a mark of the format
SECRET_BYTES = range(24, 65)

_MEANINGS = {
    401: Meaning.UNAUTHORISED,
    403: Meaning.UNAUTHORISED,
    408: Meaning.UNKNOWN,
    409: Meaning.UNKNOWN,
    425: Meaning.THROTTLED,
    429: Meaning.THROTTLED,
}


class WebhookSink:
    """POSTs one signed JSON object for each intent. Redirects are not followed."""

    batch_max = 1

    def __init__(
        self, url: str, *, secret: str, timeout_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._url = url
        self._secret = _secret_bytes(secret)
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._clock = clock
        self._http: aiohttp.ClientSession | None = None

    async def send(self, calls: Sequence[Call]) -> list[Answer]:
        """One POST; any 2xx is an acknowledgement."""
        return [await self._send(call.intent, call.idempotency_key) for call in calls]

    async def _send(self, intent: Intent, idempotency_key: str) -> Answer:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar())
        body = json.dumps(
            {
                "identifier": intent.identifier,
                "event_name": intent.event_name,
                "customer": intent.stripe_customer,
                "value": plain(intent.amount),
                "formula": intent.formula,
                "dimensions": dict(intent.dimensions),
                "occurred_at": intent.event_at.isoformat(),
            }
        ).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        try:
            async with self._http.post(
                self._url,
                data=body,
                headers=headers | self._signature(intent.identifier, body),
                allow_redirects=False,
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

    async def takes(self, event_name: str) -> bool:
        """Always: it never says that a meter is away."""
        return True

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _signature(self, message_id: str, body: bytes) -> dict[str, str]:
        at = str(int(self._clock()))
        signed = b".".join((message_id.encode(), at.encode(), body))
        digest = hmac.new(self._secret, signed, hashlib.sha256).digest()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": at,
            "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        }


def _secret_bytes(secret: str) -> bytes:
    try:
        found = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if len(found) not in SECRET_BYTES:
        raise Misconfigured(
            "TIDEMETER_SINK_WEBHOOK_SECRET must be `whsec_` and the base64 of 24 to 64 random bytes: "
            f"echo {SECRET_PREFIX}$(openssl rand -base64 32)"
        )
    return found
