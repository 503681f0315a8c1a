"""Clocks: ours beside those of PostgreSQL, Kafka and Stripe. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.doctor.facts import Clock
from services.doctor.findings import Finding

#: Nothing of ours asks for less.
WARNING_SECONDS = 2.0
#: Stripe refuses meter events five minutes ahead, the bridge webhooks as old, and closing stays as far from
#: an invoice. Beyond a fifth of that little is left.
ERROR_SECONDS = 60.0


def judge_clocks(clocks: Iterable[Clock]) -> Iterator[Finding]:
    """Each clock by itself, at its best: what the uncertainty may explain is no skew."""
    for clock in clocks:
        least = abs(clock.ahead_seconds) - clock.uncertainty_seconds
        if least <= WARNING_SECONDS:
            continue
        direction = "behind" if clock.ahead_seconds > 0 else "ahead of"
        yield Finding(
            "clock_skew_large" if least > ERROR_SECONDS else "clock_skew",
            clock.name,
            f"This machine's clock is {least:.1f} s {direction} that of {clock.name}, or more.",
            "Run NTP on this machine and on that server (`timedatectl set-ntp true`, or chrony).",
        )
