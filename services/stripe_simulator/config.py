"""How one simulator behaves: every choice that Stripe leaves open is a field here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

IdentifierScope = Literal["account", "event_name"]
UnknownReference = Literal["sync", "report"]


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """Defaults are the strict side of what Stripe documents or was observed to do.

    identifier_window_hours   how long an identifier stays taken; None means for ever. Stripe says "at least
                              24 hours", so a resend after the window is accepted and counted again.
    identifier_scope          whether one identifier may serve two event names.
    unknown_customer, unknown_meter
                              "sync" answers 400; "report" answers 200 and records an asynchronous error.
    store_duplicate_refusals  whether the 400 for a repeated identifier is replayed for its Idempotency-Key.
    summary_lag_seconds       typical age of an event when summaries show it; each event waits 0.5 to 1.5
                              times as long, so a later event may show first.
    """

    host: str = "127.0.0.1"
    port: int = 12111
    data_path: Path | None = None
    identifier_window_hours: float | None = 24
    identifier_scope: IdentifierScope = "account"
    unknown_customer: UnknownReference = "sync"
    unknown_meter: UnknownReference = "sync"
    strict_positive_integer: bool = False
    store_duplicate_refusals: bool = True
    rate_per_second: float = 1000
    concurrency_limit_per_customer_meter: bool = True
    summary_lag_seconds: float = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if self.rate_per_second <= 0:
            raise ValueError("rate_per_second must be positive")
        if self.summary_lag_seconds < 0:
            raise ValueError("summary_lag_seconds must not be negative")
        if self.identifier_window_hours is not None and self.identifier_window_hours < 0:
            raise ValueError("identifier_window_hours must not be negative")
