"""Stripe's webhooks: events are stored, and each handler runs once for each, in order.

Reads    stripe_webhooks.v1, written by the bridge; Stripe, where an event does not say it all.
Writes   webhook_events, webhook_runs, webhook_subjects, and what handlers write; ops events and dead letters
         through its outbox.
Promises an event is handled once in effect, however often it is delivered; events of one object one after the
         other, oldest first; what is older than what was handled before changes nothing; a handler that fails
         is tried again for hours, then dead, visibly, until an operator replays it.
Fails    by waiting when PostgreSQL or Kafka is away; a failing, hanging or exiting handler of a user's stops
         only itself.

A user's handler is a :class:`UserHandler`; docs/webhooks.md has an example.
"""

from __future__ import annotations

from services.webhooks.handling import WebhookEvent
from services.webhooks.own import UserHandler

__all__ = ["UserHandler", "WebhookEvent"]
