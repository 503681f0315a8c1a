"""How one simulator behaves: every choice that Stripe leaves open is a field here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.stripe_simulator.codes import (
    ARCHIVED_METER,
    CODES,
    CUSTOMER_NOT_FOUND,
    NO_CUSTOMER,
    NO_METER,
)

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
    reported_later            further codes of `codes.py` that v1 answers with 200 and reports afterwards.
    strict_positive_integer   refuse anything but a positive integer; `_v2` does so for v2 only, whose
                              description of payload_invalid_value says so.
    concurrency_refusal_status
                              what v1 answers a second call for one customer and meter: 429 with a reason is
                              our choice, 409 was observed by others. v2 answers 409.
    store_duplicate_refusals  whether the 400 for a repeated identifier is replayed for its Idempotency-Key.
    rate_per_second           calls per second, but those of the stream; stream_rate_per_second counts events.
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
    reported_later: frozenset[str] = frozenset()
    strict_positive_integer: bool = False
    strict_positive_integer_v2: bool = False
    store_duplicate_refusals: bool = True
    rate_per_second: float = 1000
    stream_rate_per_second: float = 10_000
    concurrency_limit_per_customer_meter: bool = True
    concurrency_refusal_status: Literal[409, 429] = 429
    summary_lag_seconds: float = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.rate_per_second, self.stream_rate_per_second) <= 0:
            raise ValueError("rate_per_second and stream_rate_per_second must be positive")
        if self.concurrency_refusal_status not in (409, 429):
            raise ValueError("concurrency_refusal_status must be 409 or 429")
        unknown = self.reported_later - CODES
        if unknown:
            raise ValueError(f"reported_later: unknown {sorted(unknown)}; known are {sorted(CODES)}")
        if self.summary_lag_seconds < 0:
            raise ValueError("summary_lag_seconds must not be negative")
        if self.identifier_window_hours is not None and self.identifier_window_hours < 0:
            raise ValueError("identifier_window_hours must not be negative")

    @property
    def late_codes(self) -> frozenset[str]:
        """The problems that v1 answers with 200 and reports afterwards."""
        customers = {NO_CUSTOMER, CUSTOMER_NOT_FOUND} if self.unknown_customer == "report" else set()
        meters = {NO_METER, ARCHIVED_METER} if self.unknown_meter == "report" else set()
        return self.reported_later | customers | meters
