"""Handlers that `TIDEMETER_WEBHOOK_HANDLERS` names in tests."""

from __future__ import annotations

from services.webhooks import UserHandler, WebhookEvent


def refuse(event: WebhookEvent) -> None:
    """Never content."""
    raise ValueError("secret")


FAILS = UserHandler("fails", ("planted.*",), refuse)
