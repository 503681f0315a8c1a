"""Bounds of a request: its body, its events, and events per second and key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.web.bodies import BodyLimits
from services.web.problems import RETRY_AFTER_S, RequestRefused


@dataclass(frozen=True, slots=True)
class Limits(BodyLimits):
    """Of one request, and of one key over time."""

    events_max: int = 1000
    ack_timeout_s: float = 10.0
    events_per_second: float = 50_000.0
    burst_events: float = 100_000.0


class RateLimit:
    """A token bucket per key: ``burst_events`` at once, ``events_per_second`` over time.

    Buckets of the ``keys_max`` most recently used keys are kept; one that is forgotten is full again.
    """

    def __init__(self, limits: Limits, now_s: Callable[[], float], keys_max: int = 10_000) -> None:
        self._limits = limits
        self._now_s = now_s
        self._keys_max = keys_max
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, key_id: str, events: int) -> None:
        """Take ``events`` tokens.

        Raises:
            RequestRefused: 429 when the bucket holds fewer; then none is taken.
        """
        now = self._now_s()
        tokens, since = self._buckets.pop(key_id, (self._limits.burst_events, now))
        tokens = min(self._limits.burst_events, tokens + (now - since) * self._limits.events_per_second)
        enough = tokens >= events
        self._buckets[key_id] = (tokens - events if enough else tokens, now)
        if len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
        if not enough:
            raise RequestRefused(
                429,
                "rate_limited",
                f"this key may send {self._limits.events_per_second:.0f} events per second",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
