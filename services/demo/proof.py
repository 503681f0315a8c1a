"""Compare three independent accounts: what was acknowledged, what PostgreSQL counted, what Stripe applied."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg

from services.counters.conservation import conservation
from services.demo.oracle import Expected
from services.wire.settings import Settings


@dataclass(slots=True)
class Proof:
    """Every figure of the proof. ``holds`` is the exit status."""

    events_sent: int
    acknowledged: int
    records: int
    outcomes: dict[str, int]
    conservation_gap: int
    local_total: Decimal
    stripe_total: Decimal
    expected_total: Decimal
    wrong_buckets: int
    wrong_items_at_stripe: int
    expected_outcomes: dict[str, int]
    kills: int = 0
    seconds: float = 0.0
    stages: list[tuple[str, int, float, float]] = field(default_factory=list)

    @property
    def stripe_difference(self) -> Decimal:
        """Counted here minus applied at Stripe."""
        return self.local_total - self.stripe_total

    @property
    def failures(self) -> list[str]:
        """What does not agree, in words; empty when the proof holds."""
        counted = self.outcomes["counted"] + self.outcomes["late_counted"]
        actual = {**self.outcomes, "counted_in_all": counted}
        checks = {
            "every acknowledged record is on the log once": self.records == self.acknowledged,
            "every record has exactly one outcome": self.conservation_gap == 0,
            "the counters agree with the oracle": self.local_total == self.expected_total,
            "every hour of every item agrees with the oracle": self.wrong_buckets == 0,
            "Stripe's total agrees with the counters": self.stripe_difference == 0,
            "every item's total agrees at Stripe": self.wrong_items_at_stripe == 0,
        }
        checks |= {
            f"{name}: {actual[name]}, expected {number}": actual[name] == number
            for name, number in self.expected_outcomes.items()
        }
        return [sentence for sentence, true in checks.items() if not true]

    @property
    def holds(self) -> bool:
        """Does everything agree?"""
        return not self.failures

    def document(self) -> dict[str, Any]:
        """The proof as JSON: totals are numbers where they are whole, else exact text."""
        rates = {name: rate for name, _, _, rate in self.stages}
        return {
            "events_sent": self.events_sent,
            "acknowledged": self.acknowledged,
            "outcomes": self.outcomes,
            "conservation_gap": self.conservation_gap,
            "local_total": _number(self.local_total),
            "stripe_total": _number(self.stripe_total),
            "stripe_difference": _number(self.stripe_difference),
            "expected_total": _number(self.expected_total),
            "counters_events_per_second": round(rates.get("count", 0.0), 1),
            "seconds": round(self.seconds, 2),
            "kills": self.kills,
            "stages": [
                {"stage": name, "items": items, "seconds": round(seconds, 2), "per_second": round(rate, 1)}
                for name, items, seconds, rate in self.stages
            ],
            "wrong_buckets": self.wrong_buckets,
            "wrong_items_at_stripe": self.wrong_items_at_stripe,
            "failures": self.failures,
            "holds": self.holds,
        }


def _number(value: Decimal) -> int | float:
    """Exact as JSON: three decimal places at most, and far below 2**53."""
    return int(value) if value == value.to_integral_value() else float(value)


def prove(settings: Settings, sent: int, expected: Expected, acknowledged: int) -> Proof:
    """Read PostgreSQL and the simulator's own ledger, and compare with the oracle."""
    with psycopg.connect(settings.postgres()) as db:
        kept = conservation(db)
        hours = {
            (row[0], row[1], row[2], int(row[3])): row[4]
            for row in db.execute(
                "SELECT i.tenant_id, i.customer_ref, i.meter, extract(epoch FROM b.hour_start), sum(b.total) "
                "FROM buckets b JOIN items i USING (item_id) GROUP BY 1, 2, 3, 4"
            )
        }
        mapping = {
            (row[0], row[1]): (row[2], row[3], row[4])
            for row in db.execute(
                "SELECT c.stripe_customer, m.event_name, m.tenant_id, c.customer_ref, m.meter "
                "FROM customers c JOIN meters m USING (tenant_id)"
            )
        }
    at_stripe: dict[tuple[str, str, str] | str, Decimal] = defaultdict(Decimal)
    for customer, event_name, value in _stripe_totals(settings):
        at_stripe[mapping.get((customer, event_name), customer)] += value
    local: dict[tuple[str, str, str], Decimal] = defaultdict(Decimal)
    for (tenant, customer_ref, meter, _), total in hours.items():
        local[tenant, customer_ref, meter] += total
    return Proof(
        events_sent=sent,
        acknowledged=acknowledged,
        records=kept.records,
        outcomes=dict(kept.outcomes),
        conservation_gap=kept.gap,
        local_total=sum(local.values(), Decimal(0)),
        stripe_total=sum(at_stripe.values(), Decimal(0)),
        expected_total=expected.total,
        wrong_buckets=_differences(hours, expected.hours),
        wrong_items_at_stripe=_differences(dict(at_stripe), dict(local)),
        expected_outcomes=dict(expected.outcomes),
    )


def _differences(left: dict[Any, Decimal], right: dict[Any, Decimal]) -> int:
    return sum(
        1 for key in left.keys() | right.keys() if left.get(key, Decimal(0)) != right.get(key, Decimal(0))
    )


def _stripe_totals(settings: Settings) -> list[tuple[str, str, Decimal]]:
    url = f"{settings.stripe_api_base}/_simulator/totals"
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310
        document = json.load(answer)
    return [(row["customer"], row["event_name"], Decimal(row["value"])) for row in document["totals"]]
