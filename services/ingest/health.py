"""Is the API able to take usage now, and if not, why not?"""

from __future__ import annotations

from typing import Protocol

from services.web.health import Check, Checks
from services.web.keys import OUTAGE_S
from services.wire.errors import Transient


class Publisher(Protocol):
    """What of Kafka is asked here."""

    async def check(self) -> None: ...


class Keys(Protocol):
    """What of PostgreSQL is asked here."""

    async def check(self) -> None: ...
    def away_s(self) -> float: ...


def checks(publisher: Publisher, keys: Keys) -> Checks:
    """Unhealthy without Kafka; without PostgreSQL degraded, and unhealthy once no cached key holds."""

    async def kafka() -> Check:
        try:
            await publisher.check()
        except Transient as error:
            return Check("unhealthy", f"{error}; no event can be accepted")
        return Check("healthy")

    async def postgres() -> Check:
        try:
            await keys.check()
        except Transient as error:
            if keys.away_s() <= OUTAGE_S:
                return Check("degraded", f"{error}; only keys verified in the last five minutes work")
            return Check("unhealthy", f"{error}; no key can be verified")
        return Check("healthy")

    return Checks({"kafka": kafka, "postgres": postgres})
