"""What the product itself does with Stripe's events."""

from __future__ import annotations

from collections.abc import Sequence

from services.webhooks.handling import FailReported, Handler


def product_handlers(fail_reported: FailReported) -> Sequence[Handler]:
    """Every handler of the product. ``fail_reported`` is the pusher's, which owns the intents."""
    return ()
