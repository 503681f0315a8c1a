"""What the demo's records must add up to. Short, and shares no code with the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from services.demo.traffic import METERS, Planned


@dataclass(slots=True)
class Expected:
    """Totals by (tenant, customer, meter) and by hour, and how often each kind of outcome."""

    totals: dict[tuple[str, str, str], Decimal] = field(default_factory=dict)
    hours: dict[tuple[str, str, str, int], Decimal] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> Decimal:
        """Everything that must be counted, over all meters."""
        return sum(self.totals.values(), Decimal(0))


_OUTCOME = {
    "duplicate": "duplicate",
    "conflict": "conflict",
    "too_late": "adjusted",
    "unknown_meter": "dead_lettered",
    "corrupt": "upcast_failed",
}


def expect(acknowledged: Iterable[Planned]) -> Expected:
    """Go through the acknowledged records once. On time and late together are ``counted_in_all``."""
    expected = Expected()
    counted: set[tuple[str, str]] = set()
    for one in acknowledged:
        if one.kind not in ("on_time", "late"):
            expected.outcomes[_OUTCOME[one.kind]] += 1
            continue
        if (one.tenant, one.key) in counted:
            raise AssertionError("the plan repeats a key")
        counted.add((one.tenant, one.key))
        expected.outcomes["counted_in_all"] += 1
        amount = one.quantity if METERS[one.meter][0] == "sum" else Decimal(1)
        item = (one.tenant, one.customer, one.meter)
        hour = (*item, one.occurred_s // 3600 * 3600)
        expected.totals[item] = expected.totals.get(item, Decimal(0)) + amount
        expected.hours[hour] = expected.hours.get(hour, Decimal(0)) + amount
    return expected
