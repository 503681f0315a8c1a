"""What ``/health/live`` and ``/health/ready`` answer, and the checks behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Literal

import msgspec

Health = Literal["healthy", "degraded", "unhealthy"]
#: An answer is reused for this long, so that probes cost the brokers and the database next to nothing.
REUSE_S = 1.0
SEVERITY: tuple[Health, ...] = ("healthy", "degraded", "unhealthy")


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing the API depends on."""

    status: Health
    reason: Annotated[str | None, msgspec.Meta(description="What is wrong and what it means.")] = None


class Readiness(msgspec.Struct, frozen=True):
    """The worst of the checks, and each of them."""

    status: Health
    checks: dict[str, Check]


class Checks:
    """Asks what a process depends on, by name, at most once a second."""

    def __init__(self, asked: Mapping[str, Callable[[], Awaitable[Check]]]) -> None:
        self._asked = asked
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._last = Readiness("unhealthy", {})

    async def readiness(self) -> Readiness:
        """Every check, and the worst of them."""
        async with self._asking:
            if time.monotonic() - self._asked_s > REUSE_S:
                checks = await asyncio.gather(*(ask() for ask in self._asked.values()))
                worst: Health = max((check.status for check in checks), key=SEVERITY.index)
                self._last = Readiness(worst, dict(zip(self._asked, checks, strict=True)))
                self._asked_s = time.monotonic()
            return self._last


class Live(msgspec.Struct, frozen=True):
    """The process answers."""

    status: Literal["alive"] = "alive"
