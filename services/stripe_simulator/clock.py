"""The simulator's own time: real time plus an offset that tests move.

Windows of minutes, hours and days (identifiers, idempotency, timestamps, cancellation, summary lag, sessions,
error reports, webhook retries, secrets, billing) read this clock. Rates, stalls and slowness are about
sockets and stay on real time; so does the moment in a webhook's signature, which a real clock checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    def __init__(self, base: Callable[[], float] = time.time, offset_seconds: float = 0.0) -> None:
        self._base = base
        self.offset_seconds = offset_seconds

    def now(self) -> float:
        return self._base() + self.offset_seconds

    def advance(self, seconds: float) -> None:
        self.offset_seconds += seconds

    def set(self, epoch_seconds: float) -> None:
        self.offset_seconds = epoch_seconds - self._base()
