"""What becomes of a run: when it is tried again, and when no more. Pure.

::

    received ──► processing ──► succeeded
       ▲             │  ▲  ├──► stale      older than what was handled of its object before
       │             ▼  │  └──► dead ──┐   out of attempts, or refused
       │           failed              │
       └────────── a replay ◄──────────┘
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import psycopg
import stripe

from services.webhooks.handling import Refused, Unfinished
from services.wire.settings import Settings
from services.wire.waits import full_jitter

#: How long after its time limit a run may be taken over: who works on it shall find out first.
GRACE_SECONDS = 1.0
TIMED_OUT = "timed_out"

_CODE = re.compile(r"[A-Za-z0-9_.]{1,64}")


@dataclass(frozen=True, slots=True)
class Policy:
    """How often, how soon, and how long."""

    attempts_max: int = 25
    retry_seconds: float = 1.0
    retry_max_seconds: float = 3600.0
    timeout_seconds: float = 60.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Policy:
        """What the operator chose."""
        return cls(
            attempts_max=settings.webhook_attempts_max,
            retry_seconds=settings.webhook_retry_seconds,
            retry_max_seconds=settings.webhook_retry_max_seconds,
            timeout_seconds=settings.webhook_timeout_seconds,
        )

    @property
    def lease(self) -> timedelta:
        """From its claim on a run is its claimer's for so long; a killed process's is free after it."""
        return timedelta(seconds=self.timeout_seconds + GRACE_SECONDS)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed: names of classes and codes, never a message."""

    error_class: str
    error_code: str | None
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class Next:
    """What follows a failure; ``at`` is when it is tried again, or when it ended."""

    state: Literal["failed", "dead"]
    at: datetime


def next_after(failure: Failure, attempts: int, *, now: datetime, chance: float, policy: Policy) -> Next:
    """``attempts`` counts this one; ``chance`` is uniform in [0, 1)."""
    if failure.is_final or attempts >= policy.attempts_max:
        return Next("dead", now)
    wait = full_jitter(
        attempts, chance, base_seconds=policy.retry_seconds, cap_seconds=policy.retry_max_seconds
    )
    return Next("failed", now + timedelta(seconds=wait))


def is_stale(created_at: datetime, newest_at: datetime | None) -> bool:
    """Whether something newer of the object was handled. Stripe tells seconds: within one, nothing is."""
    return newest_at is not None and created_at < newest_at


def failure_of(error: BaseException) -> Failure:
    """What may be told of an exception."""
    if isinstance(error, Refused):
        return Failure("Refused", code_text(error.code), is_final=True)
    if isinstance(error, Unfinished):
        return Failure("Unfinished", code_text(error.code))
    code: object = None
    if isinstance(error, stripe.StripeError):
        code = error.code or (f"http_{error.http_status}" if error.http_status else None)
    elif isinstance(error, psycopg.Error):
        code = error.sqlstate
    elif isinstance(error, TimeoutError):
        code = TIMED_OUT
    return Failure(type(error).__name__[:64], code_text(code))


def code_text(code: object) -> str | None:
    """``code``, if it is one."""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None
