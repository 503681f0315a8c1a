"""What Tidemeter itself does with Stripe's webhooks: one module for each family of events.

What each type changes, and which ops event it causes, is in ``docs/webhooks.md``. None of them loses usage
if it never comes: an error that no report names, an invoice that nobody told of and a period that nobody
knows are left to defaults and to reconciliation.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.webhooks.handlers import (
    cards,
    charges,
    connect,
    customers,
    invoices,
    meter_errors,
    subscriptions,
)
from services.webhooks.handling import FailReported, Handler


def product_handlers(fail_reported: FailReported) -> Sequence[Handler]:
    """Every handler of the product; no two have a type in common."""
    return (
        *meter_errors.handlers(fail_reported),
        *customers.handlers(),
        *subscriptions.handlers(),
        *invoices.handlers(),
        *charges.handlers(),
        *connect.handlers(),
        *cards.handlers(),
    )
