"""``/health/live``, ``/health/ready`` and ``/metrics`` of a worker process.

Ready answers ``healthy``, ``degraded`` (works, but an operator should look) or ``unhealthy`` (503), and the
reason of each check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder

Status = Literal["healthy", "degraded", "unhealthy"]
#: Reason of a worker that has not joined its group yet.
NO_PARTITIONS = "no partitions assigned"
_ORDER: tuple[Status, ...] = ("healthy", "degraded", "unhealthy")


@dataclass(slots=True)
class Health:
    """Named checks; each returns a status and its reason in a few words."""

    checks: dict[str, Callable[[], tuple[Status, str]]] = field(default_factory=dict)

    def report(self) -> tuple[Status, dict[str, dict[str, str]]]:
        """The worst status, and every check."""
        results = {name: check() for name, check in self.checks.items()}
        worst: Status = max((status for status, _ in results.values()), key=_ORDER.index, default="healthy")
        return worst, {
            name: {"status": status, "reason": reason} for name, (status, reason) in results.items()
        }


def observe_app(health: Health, registry: CollectorRegistry = REGISTRY) -> web.Application:
    """The three routes as an aiohttp application."""

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(_: web.Request) -> web.Response:
        status, checks = health.report()
        return web.json_response(
            {"status": status, "checks": checks}, status=503 if status == "unhealthy" else 200
        )

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    app = web.Application()
    app.router.add_get("/health/live", live)
    app.router.add_get("/health/ready", ready)
    app.router.add_get("/metrics", metrics)
    return app


async def serve_observation(health: Health, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Listen, and return the runner (to clean up) and the port taken."""
    runner = web.AppRunner(observe_app(health), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    bound: int = runner.addresses[0][1]
    return runner, bound
