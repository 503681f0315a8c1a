"""Every route of the console."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.types import ControllerRouterHandler

from services.console.adjustment_routes import approve_adjustment, list_adjustments, reject_adjustment
from services.console.webhook_routes import list_webhooks, prune_webhooks, replay_webhooks, show_webhook

ROUTES: Sequence[ControllerRouterHandler] = (
    list_adjustments,
    approve_adjustment,
    reject_adjustment,
    list_webhooks,
    show_webhook,
    replay_webhooks,
    prune_webhooks,
)
