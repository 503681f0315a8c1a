"""What ``/health/live`` and ``/health/ready`` answer."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Health = Literal["healthy", "degraded", "unhealthy"]
SEVERITY: tuple[Health, ...] = ("healthy", "degraded", "unhealthy")


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing the API depends on."""

    status: Health
    reason: Annotated[str | None, msgspec.Meta(description="What is wrong and what it means.")] = None


class Readiness(msgspec.Struct, frozen=True):
    """The worst of the checks, and each of them."""

    status: Health
    checks: dict[str, Check]


class Live(msgspec.Struct, frozen=True):
    """The process answers."""

    status: Literal["alive"] = "alive"
