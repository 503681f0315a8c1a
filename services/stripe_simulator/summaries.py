"""Meter event summaries: what Stripe shows of a customer's usage, in buckets, newest first.

Pure. As documented (docs.stripe.com/api/billing/meter-event_summary/list): [start, end) by event timestamp
in UTC, minute-aligned, hour- or day-aligned when grouped; a pre-aggregated meter counts the most recently
received event of each window. Empty buckets are left out, as in the sample there; so is the single bucket
of an ungrouped query without usage, and the wording of alignment errors is ours: both are choices.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from services.stripe_simulator.errors import InvalidParameters, Json
from services.stripe_simulator.forms import Params
from services.stripe_simulator.ledger import Usage
from services.stripe_simulator.meters import Formula, Meter
from services.stripe_simulator.store import EXACT

SECONDS = {"hour": 3600, "day": 86400}
MINUTE_SECONDS = 60
INTEGER_MAX = 2**53


@dataclass(frozen=True, slots=True)
class SummaryQuery:
    customer: str
    start: int
    end: int
    width: int | None

    @classmethod
    def read(cls, params: Params) -> SummaryQuery:
        customer = params.required_text("customer")
        start, end = params.required_integer("start_time"), params.required_integer("end_time")
        window = params.choice("value_grouping_window", ("day", "hour"))
        params.finish()
        unit = SECONDS[window] if window else MINUTE_SECONDS
        for name, moment in (("start_time", start), ("end_time", end)):
            if moment % unit:
                message = f"Invalid {name}: {moment} must be aligned with {window or 'minute'} boundaries."
                raise InvalidParameters(message, param=name)
        if start >= end:
            raise InvalidParameters("Invalid end_time: it must be after start_time.", param="end_time")
        return cls(customer, start, end, unit if window else None)


def summarise(usage: Iterable[Usage], meter: Meter, query: SummaryQuery) -> list[Json]:
    buckets: defaultdict[int, list[Usage]] = defaultdict(list)
    for one in last_received(usage, meter):
        buckets[one.timestamp - one.timestamp % query.width if query.width else query.start].append(one)
    return [
        _summary(meter, query, start, aggregate(events, meter.formula))
        for start, events in sorted(buckets.items(), reverse=True)
    ]


def last_received(usage: Iterable[Usage], meter: Meter) -> list[Usage]:
    """For a pre-aggregated meter only the last received event of each window counts."""
    if meter.event_time_window is None:
        return list(usage)
    width = SECONDS[meter.event_time_window]
    return list({one.timestamp // width: one for one in sorted(usage, key=lambda one: one.sequence)}.values())


def aggregate(events: list[Usage], formula: Formula) -> Decimal:
    if formula == "count":
        return Decimal(len(events))
    if formula == "last":
        return max(events, key=lambda one: (one.timestamp, one.sequence)).value
    total = Decimal(0)
    for one in events:
        total = EXACT.add(total, one.value)
    return total


def as_double(value: Decimal) -> int | float:
    """Stripe answers a JSON number, a double; whole ones are written without a fraction."""
    double = float(value)
    return int(double) if double.is_integer() and abs(double) < INTEGER_MAX else double


def _summary(meter: Meter, query: SummaryQuery, start: int, value: Decimal) -> Json:
    end = start + query.width if query.width else query.end
    name = f"{meter.id} {query.customer} {start} {end}".encode()
    return {
        "id": f"mtrusg_test_{hashlib.blake2b(name, digest_size=12).hexdigest()}",
        "object": "billing.meter_event_summary",
        "aggregated_value": as_double(value),
        "end_time": end,
        "livemode": False,
        "meter": meter.id,
        "start_time": start,
    }
