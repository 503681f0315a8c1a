"""Is the API able to take usage now, and if not, why not?"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from services.web.health import SEVERITY, Check, Health, Readiness
from services.web.keys import OUTAGE_S
from services.wire.errors import Transient

#: An answer is reused for this long, so that probes cost the brokers and the database next to nothing.
REUSE_S = 1.0


class Publisher(Protocol):
    """What of Kafka is asked here."""

    async def check(self) -> None: ...


class Keys(Protocol):
    """What of PostgreSQL is asked here."""

    async def check(self) -> None: ...
    def away_s(self) -> float: ...


class Checks:
    """Asks Kafka and PostgreSQL, at most once a second."""

    def __init__(self, publisher: Publisher, keys: Keys) -> None:
        self._publisher = publisher
        self._keys = keys
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._last = Readiness("unhealthy", {})

    async def readiness(self) -> Readiness:
        """Unhealthy without Kafka; without PostgreSQL degraded, and unhealthy once no cached key holds."""
        async with self._asking:
            if time.monotonic() - self._asked_s > REUSE_S:
                kafka, postgres = await asyncio.gather(self._kafka(), self._postgres())
                worst: Health = max((kafka.status, postgres.status), key=SEVERITY.index)
                self._last = Readiness(worst, {"kafka": kafka, "postgres": postgres})
                self._asked_s = time.monotonic()
            return self._last

    async def _kafka(self) -> Check:
        try:
            await self._publisher.check()
        except Transient as error:
            return Check("unhealthy", f"{error}; no event can be accepted")
        return Check("healthy")

    async def _postgres(self) -> Check:
        try:
            await self._keys.check()
        except Transient as error:
            if self._keys.away_s() <= OUTAGE_S:
                return Check("degraded", f"{error}; only keys verified in the last five minutes work")
            return Check("unhealthy", f"{error}; no key can be verified")
        return Check("healthy")
