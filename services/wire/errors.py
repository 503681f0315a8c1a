"""TidemeterError
├── Poison          the record can never succeed as it is   → park it, go on
│   ├── UnknownSchema
│   ├── Undecodable
│   └── Invalid
├── Transient       the world is not ready                  → wait, same record again
├── Broken          our own invariant does not hold         → stop the process
│   └── OffsetGap
└── Misconfigured   an operator has to act                  → say what to do, exit
"""

from __future__ import annotations


class TidemeterError(Exception):
    """Base of every error the product raises on purpose."""


class Poison(TidemeterError):
    """The record can never succeed as it is. ``reason`` is the stable code it is parked under."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class UnknownSchema(Poison):
    """The framing names a schema that is not released here, or header, topic and framing disagree."""


class Undecodable(Poison):
    """The bytes are not a record of the schema they claim."""


class Invalid(Poison):
    """Decoded, but a field breaks a rule. ``path`` names the field."""

    def __init__(self, reason: str, path: str, message: str) -> None:
        super().__init__(reason, message)
        self.path = path


class Transient(TidemeterError):
    """A broker, a database or Stripe is away. Retry the same thing."""


class Broken(TidemeterError):
    """An invariant that guards money does not hold. Continuing could make it worse."""


class OffsetGap(Broken):
    """Records between the stored position and this chunk are missing."""


class Misconfigured(TidemeterError):
    """The set-up is wrong. The message says what to do."""


def require(condition: bool, message: str) -> None:
    """Like ``assert``, but kept under ``python -O``: for invariants that guard money.

    Raises:
        Broken: the condition is false.
    """
    if not condition:
        raise Broken(message)
