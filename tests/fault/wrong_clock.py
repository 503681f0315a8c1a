"""A counters worker whose wall clock is wrong, run as a program: ``wrong_clock.py <after_s>:<shift_s> …``.

``0:3600`` is an hour ahead all the time; ``0:0 5:-600`` jumps back by ten minutes after five seconds. Only
what Python code reads is wrong: sockets and timeouts go by the monotonic clock, as with a real clock.
"""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

SHIFTS = [tuple(map(float, text.split(":"))) for text in sys.argv[1:]]
BEGAN = time.monotonic()
right_time, right_time_ns, Right = time.time, time.time_ns, datetime.datetime


def shift_s() -> float:
    """What the clock is ahead of the right one, now."""
    past = [shift for after, shift in SHIFTS if time.monotonic() - BEGAN >= after]
    return past[-1] if past else 0.0


class _Anything(type):
    """The instances of the right class are instances of the wrong one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Right)


class Wrong(Right, metaclass=_Anything):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        return Right.fromtimestamp(time.time(), tz)


time.time = lambda: right_time() + shift_s()
time.time_ns = lambda: right_time_ns() + int(shift_s() * 1e9)
datetime.datetime = Wrong  # type: ignore[misc]
sys.argv[1:] = ["counters"]

from services.cli.main import main  # noqa: E402  (the clock must be wrong before anything reads it)

main()
