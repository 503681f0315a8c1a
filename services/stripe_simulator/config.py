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

POSITIVE = (
    "rate_per_second",
    "basic_rate_per_second",
    "stream_rate_per_second",
    "report_window_seconds",
    "webhook_timeout_seconds",
)
NOT_NEGATIVE = (
    "identifier_window_hours",
    "summary_lag_seconds",
    "summary_stuck_seconds",
    "adjustment_lag_seconds",
    "report_delay_seconds",
    "report_samples_max",
    "invoice_grace_seconds",
)


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
    rate_per_second           calls per second of meter events, and of everything else unless
                              basic_rate_per_second is set; stream_rate_per_second counts events. Documented:
                              1,000 for meter events and 100 for the rest in live mode, 25 together in a
                              sandbox, 10,000 for the stream.
    summary_lag_seconds       typical age of an event when summaries show it; each event waits 0.5 to 1.5
                              times as long, so a later event may show first.
    summary_stuck_chance      share of events that wait about summary_stuck_seconds more.
    adjustment_lag_seconds    how long a cancellation stays pending; None is as long as summary_lag_seconds.
    report_*                  error reports: the window they cover, how long after its end they are made, how
                              many errors of each code they name, and which form of naming a request.
    webhook_retries           "sandbox": three tries over some hours; "live": for 3 days.
    invoice_grace_seconds     from the end of a period until its invoice is final.
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
    basic_rate_per_second: float | None = None
    stream_rate_per_second: float = 10_000
    concurrency_limit_per_customer_meter: bool = True
    concurrency_refusal_status: Literal[409, 429] = 429
    summary_lag_seconds: float = 0
    summary_stuck_chance: float = 0
    summary_stuck_seconds: float = 4 * 3600
    adjustment_lag_seconds: float | None = None
    report_window_seconds: float = 10
    report_delay_seconds: float = 2
    report_samples_max: int = 5
    report_names_request_by: Literal["identifier", "id_and_key"] = "identifier"
    webhook_retries: Literal["sandbox", "live"] = "sandbox"
    webhook_timeout_seconds: float = 10
    invoice_grace_seconds: float = 3600
    seed: int = 1

    def __post_init__(self) -> None:
        for name in POSITIVE:
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive")
        for name in NOT_NEGATIVE:
            given = getattr(self, name)
            if given is not None and given < 0:
                raise ValueError(f"{name} must not be negative")
        if not 0 <= self.summary_stuck_chance <= 1:
            raise ValueError("summary_stuck_chance must lie between 0 and 1")
        unknown = self.reported_later - CODES
        if unknown:
            raise ValueError(f"reported_later: unknown {sorted(unknown)}; known are {sorted(CODES)}")

    @property
    def late_codes(self) -> frozenset[str]:
        """The problems that v1 answers with 200 and reports afterwards."""
        customers = {NO_CUSTOMER, CUSTOMER_NOT_FOUND} if self.unknown_customer == "report" else set()
        meters = {NO_METER, ARCHIVED_METER} if self.unknown_meter == "report" else set()
        return self.reported_later | customers | meters
