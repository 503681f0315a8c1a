"""When to stop calling the sink altogether, and how to start again.

Pure. A refused key, or many calls in a row without effect, stops everything for a jittered while; then one
call at a time goes out until one has an effect. So a day of outage costs a few calls a minute, and does not
put the whole backlog in doubt.
"""

from __future__ import annotations

from services.pusher.intents import Meaning
from services.wire.waits import full_jitter

BAD_IN_A_ROW_MAX = 10
PAUSE_BASE_SECONDS = 1.0
PAUSE_CAP_SECONDS = 60.0

_GOOD = frozenset({Meaning.DELIVERED, Meaning.ALREADY_DELIVERED, Meaning.REFUSED, Meaning.METER_AWAY})


class Brake:
    """Fed with what each call meant; ``now`` is monotonic seconds."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._until = 0.0
        self._level = 0
        self._bad_in_a_row = 0

    def note(self, meaning: Meaning, *, now: float, chance: float) -> None:
        """Take in one answer."""
        if meaning in _GOOD:
            self.reason, self._level, self._bad_in_a_row = None, 0, 0
            return
        self._bad_in_a_row += 1
        must_pause = (
            meaning is Meaning.UNAUTHORISED or self._bad_in_a_row >= BAD_IN_A_ROW_MAX or self._level > 0
        )
        if must_pause and now >= self._until:
            self._level += 1
            self.reason = str(meaning)
            wait = full_jitter(
                self._level, chance, base_seconds=PAUSE_BASE_SECONDS, cap_seconds=PAUSE_CAP_SECONDS
            )
            self._until = now + max(PAUSE_BASE_SECONDS / 2, wait)

    def seconds_left(self, now: float) -> float:
        """How long nothing may be sent; 0 when sending is allowed."""
        return max(0.0, self._until - now) if self._level else 0.0

    @property
    def probing(self) -> bool:
        """True from the first pause until a call has an effect: one call at a time."""
        return self._level > 0
