"""Where deltas go. Stripe is the first implementation; a plain webhook shows that it is not the only one."""

from __future__ import annotations

from typing import Protocol

from services.pusher.intents import Answer, Intent, Shown


class Sink(Protocol):
    """A billing system that takes amounts under an identifier: signed changes, or values (``Formula``)."""

    async def send(self, intent: Intent, idempotency_key: str) -> Answer:
        """Make one call, without retries of its own, and say what it meant.

        Never raises for anything the outside does: whatever is not proof is ``Meaning.UNKNOWN``.
        """

    async def shown(self, intent: Intent) -> Shown | None:
        """The sink's own aggregate of the intent's customer, meter and hour; None when it cannot be known.

        Never raises for anything the outside does. No answer, half an answer, or a meter of another formula
        than the intent's is None.
        """

    async def takes(self, event_name: str) -> bool:
        """Whether usage for this event name is taken; False when it is not, or cannot be known.

        Asked about a paused meter, by reading. Never raises for anything the outside does.
        """

    async def close(self) -> None:
        """Release connections."""
