"""Where deltas go. Stripe is the first implementation; a plain webhook shows that it is not the only one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.pusher.intents import Answer, Intent, Shown


class Call(Protocol):
    """An intent to send, and the key of its request; a batch has a key of its own, made of theirs."""

    @property
    def intent(self) -> Intent:
        """What is sent."""

    @property
    def idempotency_key(self) -> str:
        """The same for every call that an earlier one may have had its effect under."""


class Sink(Protocol):
    """A billing system that takes amounts under an identifier: signed changes, or values (``Formula``)."""

    #: Intents that one call can carry, at most.
    batch_max: int

    async def send(self, calls: Sequence[Call]) -> Sequence[Answer]:
        """Make one call for up to ``batch_max`` intents, without retries of its own, and say for each in turn
        what it meant. No two of them are of one customer and event name.

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
