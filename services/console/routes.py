"""Every route of the console."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.types import ControllerRouterHandler

from services.console import (
    adjustment_routes,
    explain_routes,
    parked_routes,
    reconciliation_routes,
    replay_routes,
    webhook_routes,
)

ROUTES: Sequence[ControllerRouterHandler] = (
    *adjustment_routes.ROUTES,
    *explain_routes.ROUTES,
    *parked_routes.ROUTES,
    *reconciliation_routes.ROUTES,
    *replay_routes.ROUTES,
    *webhook_routes.ROUTES,
)
