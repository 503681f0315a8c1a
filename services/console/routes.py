"""Every route of the console."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.types import ControllerRouterHandler

from services.console.adjustment_routes import approve_adjustment, list_adjustments, reject_adjustment

ROUTES: Sequence[ControllerRouterHandler] = (list_adjustments, approve_adjustment, reject_adjustment)
