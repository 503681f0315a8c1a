"""Where deltas go. Stripe is the first implementation; a plain webhook shows that it is not the only one."""

from __future__ import annotations

from decimal import Decimal
from typing import Protocol

from services.pusher.intents import Answer, Intent


class Sink(Protocol):
    """A billing system that takes signed amounts under an identifier."""

    async def send(self, intent: Intent) -> Answer:
        """Make one call, without retries of its own, and say what it meant.

        Never raises for anything the outside does: whatever is not proof is ``Meaning.UNKNOWN``.
        """

    async def applied_total(self, intent: Intent) -> Decimal | None:
        """The sink's own sum for the intent's customer, meter and hour; None when it cannot be known.

        Never raises for anything the outside does. No usage is 0; no answer, half an answer, or a meter that
        does not add up is None.
        """

    async def close(self) -> None:
        """Release connections."""
