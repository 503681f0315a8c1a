"""When summaries show what was accepted: after a lag, out of order, or not for hours.

Stripe says only that summaries are "eventually consistent" and gives no bound
(docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api), so all of this is a choice. The
ledger is never late.
"""

from __future__ import annotations

import random

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.store import Store


class Freshness:
    def __init__(self, config: SimulatorConfig, store: Store, dice: random.Random) -> None:
        self._config = config
        self._store = store
        self._dice = dice
        self.load()

    def load(self) -> None:
        self._stuck_at = float(self._store.setting("summaries_stuck_at", "0"))
        self._stuck_until = float(self._store.setting("summaries_stuck_until", "0"))

    def visible_at(self, received_at: float) -> float:
        """When summaries show an event received now: each waits its own time, so order is not kept."""
        wait = self._jittered(self._config.summary_lag_seconds)
        chance = self._config.summary_stuck_chance
        if chance and self._dice.random() < chance:
            wait += self._jittered(self._config.summary_stuck_seconds)
        return received_at + wait

    def cancelled_at(self, received_at: float) -> float:
        """When a cancellation leaves `pending`."""
        lag = self._config.adjustment_lag_seconds
        return received_at + self._jittered(self._config.summary_lag_seconds if lag is None else lag)

    def stick(self, now: float, seconds: float) -> None:
        """Summaries show the state of now until `seconds` have passed; 0 lets them go."""
        self._stuck_at, self._stuck_until = now, now + seconds
        self._store.keep_setting("summaries_stuck_at", repr(self._stuck_at))
        self._store.keep_setting("summaries_stuck_until", repr(self._stuck_until))

    def seen_at(self, now: float) -> float:
        """The moment whose state summaries show."""
        return min(now, self._stuck_at) if now < self._stuck_until else now

    def _jittered(self, seconds: float) -> float:
        return seconds * self._dice.uniform(0.5, 1.5) if seconds else 0.0
