"""The operational catalogue: every ops event there is, once for each durable transition.

What each means and the first action stand in ``deploy/ALERTS.md`` and ``docs/operations/``; tests hold the
pages against these names.
"""

from __future__ import annotations

from typing import Final

#: Header of a record on the ops topic, so that a reader or a relay knows its name without decoding.
NAME_HEADER: Final = "tidemeter-ops-name"

#: Whose outbox holds what is told of webhooks: the process that handles them relays it.
DISPATCHER: Final = "tidemeter-dispatcher"

NAMES: Final = frozenset(
    {
        # counters
        "events_upcast_failed",
        "usage_dead_lettered",
        "usage_conflict",
        "usage_carried_forward",
        "billing_periods_changed",
        "parked_redriven",
        "parked_discarded",
        "redrive_paused",
        "replay_applied",
        "replay_failed",
        # every consumer
        "partition_halted",
        "records_lost",
        # pusher
        "delta_dead_lettered",
        "meter_paused",
        "meter_resumed",
        "meter_reporting_failed",
        # reconciler
        "reconciliation_drift",
        "reconciliation_resolved",
        # archive
        "archive_halted",
        # webhooks
        "webhook_dead_lettered",
        "webhook_dlq.dead_lettered",
        "webhook_dlq.replay",
        "webhook_dlq.prune",
        "revenue_loss",
        "dunning_exhaustion",
        "incomplete_expired",
        "charge_failed",
        "charge_disputed",
        "charge_fee_mismatch",
        "card_expiring",
        "connect_account_deauthorized",
        "connect_payout_failed",
        "payout_failed",
        "stripe_customer_deleted",
        "billing_period_unclear",
        "notification_dead",
    }
)
