"""Sends what is due to its destination, signed as Stripe signs.

The signature (docs.stripe.com/webhooks#verify-manually): HMAC-SHA256 of `{t}.{body}`, one `v1` for each
secret that is valid, `v0` as a test-mode decoy, a new `t` for each try. `t` is real time, for the receiver
compares it with a real clock. Destinations are served side by side, each in the order of what is due.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import defaultdict

import aiohttp
import structlog

from services.stripe_simulator.clock import Clock
from services.stripe_simulator.deliveries import Deliveries, Delivery
from services.stripe_simulator.destinations import Destination, Destinations
from services.stripe_simulator.store import Store

log = structlog.get_logger()

NO_ANSWER = 0


def signature(body: bytes, secret: str, timestamp: int) -> str:
    return hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


def signature_header(body: bytes, secrets: list[str], timestamp: int) -> str:
    signed = "".join(f",v1={signature(body, secret, timestamp)}" for secret in secrets)
    return f"t={timestamp}{signed},v0={signature(body, 'v0', timestamp)}"


class Courier:
    def __init__(
        self,
        store: Store,
        clock: Clock,
        destinations: Destinations,
        deliveries: Deliveries,
        timeout_seconds: float,
    ) -> None:
        self._store = store
        self._clock = clock
        self._destinations = destinations
        self._deliveries = deliveries
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._one_round = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def deliver_due(self) -> int:
        """Try everything that is due now, and what falls due meanwhile; returns how many tries that took."""
        tries = 0
        async with self._one_round:
            while due := self._deliveries.due(self._clock.now()):
                await self._store.durable()
                by_destination: defaultdict[str, list[Delivery]] = defaultdict(list)
                for delivery in due:
                    by_destination[delivery.destination].append(delivery)
                await asyncio.gather(*(self._serve(*one) for one in by_destination.items()))
                tries += len(due)
        return tries

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _serve(self, destination_id: str, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            destination = self._destinations.known.get(destination_id)
            if destination is None or not destination.enabled:
                self._deliveries.give_up(delivery)
                continue
            status = await self._try(destination, delivery)
            self._deliveries.settle(delivery, status, self._clock.now())
            log.info("simulator_webhook_tried", delivery=delivery.sequence, status=status)

    async def _try(self, destination: Destination, delivery: Delivery) -> int:
        body, secrets, timestamp = delivery.body, destination.secrets_at(self._clock.now()), int(time.time())
        fault = delivery.fault if delivery.attempts == 0 else None
        if fault == "wrong_secret":
            secrets = ["whsec_of_nobody"]
        if fault == "old_timestamp":
            timestamp -= int(delivery.fault_seconds)
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature_header(body, secrets, timestamp),
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
        }
        if fault == "truncated_body":
            body = body[: len(body) // 2]
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        try:
            async with self._session.post(
                destination.url, data=body, headers=headers, allow_redirects=False
            ) as response:
                return response.status
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: a host that cannot be resolved
            return NO_ANSWER
