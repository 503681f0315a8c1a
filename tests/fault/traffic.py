"""Seeded traffic that has everything a real log has: duplicates, disorder, conflicts, records that park.

Meters of every aggregation; ties in time, repeated values, fractions, billing periods that end in between.
Each customer's producer runs one release, so that all records of an item are on one partition, in a known
order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import Pipeline

TENANTS = {"acme": "Europe/Budapest", "globex": "America/Los_Angeles"}
METERS: dict[str, dict[str, Any]] = {
    "requests": {"aggregation": "sum"},
    "logins": {"aggregation": "count"},
    "peak_gb": {"aggregation": "max", "value_property": "gb"},
    "seats": {"aggregation": "last"},
    "users": {"aggregation": "unique", "value_property": "user"},
    "egress": {"aggregation": "sum", "value_property": "gb", "dimensions": ("region",), "scale": 1},
}
CUSTOMERS = 60
#: Customers whose subscription began, and whose period changes, this long ago.
SUBSCRIBED = {
    "cus_001": (20 * HOUR_S, "1 month"),
    "cus_002": (HOUR_S // 2, "1 month"),
    "cus_003": (0, "1 day"),
}

Record = tuple[str, bytes | None, bytes | None, list[Any], Usage | None]


def configure(pipeline: Pipeline, *, subscribed: bool = True) -> None:
    """Tenants, meters, and customers only where they have billing periods of their own."""
    for tenant, timezone in TENANTS.items():
        pipeline.tenant(tenant, timezone)
        for slug, choices in METERS.items():
            pipeline.meter(tenant, slug, **choices)
        for customer, (ago_s, length) in SUBSCRIBED.items() if subscribed else ():
            anchor = datetime.fromtimestamp(int(time.time()) - ago_s - 1, UTC)
            pipeline.customer(tenant, customer, f"{length} {timezone} {anchor:%Y-%m-%dT%H:%M:%SZ}")


def traffic(seed: int, events: int, now_s: int) -> Iterator[Record]:
    """``events`` records in sending order, for :meth:`Pipeline.send_raw`."""
    chance = random.Random(seed)  # noqa: S311
    recent: list[Usage] = []
    for number in range(events):
        draw = chance.random()
        if draw < 0.001:
            yield ("usage.v3", None, b"\xc3\x01" + chance.randbytes(chance.randrange(60)), [], None)
            continue
        if recent and draw < 0.06:
            usage = chance.choice(recent)
            if draw < 0.01:  # the same key with other content
                usage = _with(usage, quantity=usage.quantity + 1)
        else:
            usage = _fresh(chance, f"{seed}-{number}", now_s - 5 * HOUR_S + number * 5 * HOUR_S // events)
            if draw < 0.062:
                usage = _with(usage, meter="pigeons")
            elif draw < 0.064:
                usage = _with(usage, properties={"gb": "many"})
            elif draw < 0.072:
                usage = _with(usage, occurred_s=now_s - chance.randrange(4 * DAY_S, 30 * DAY_S))
            elif draw < 0.15:
                usage = _with(usage, occurred_s=(usage.occurred_s or 0) - chance.randrange(40 * HOUR_S))
            recent.append(usage)
            if len(recent) > 3000:
                recent[chance.randrange(3000)] = recent.pop()
        yield (usage.topic, usage.record_key(), usage.value(), [], usage)


def _fresh(chance: random.Random, key: str, occurred_s: int) -> Usage:
    number = int(CUSTOMERS * chance.random() ** 2)
    meter = chance.choice(list(METERS))
    properties = {"region": chance.choice(["eu", "us"])} if chance.random() < 0.2 else {}
    match meter:
        case "peak_gb":
            properties["gb"] = f"{chance.randrange(1, 5000)}.{chance.randrange(100)}"
        case "egress":
            properties = {
                "gb": f"0.{chance.randrange(1, 1000):03}",
                "region": chance.choice(["eu", "us", "ap"]),
            }
        case "users":
            properties["user"] = f"user-{int(400 * chance.random() ** 3)}"
        case "seats":  # many at the same second, so that the key decides
            occurred_s -= occurred_s % 300
    return Usage(
        tenant=chance.choice(list(TENANTS)),
        customer=f"cus_{number:03d}",
        meter=meter,
        quantity=Decimal(chance.randrange(1, 1000)),
        key=key,
        occurred_s=occurred_s,
        properties=properties,
        version=1 + number % 3,
    )


def _with(usage: Usage, **changes: Any) -> Usage:
    return Usage(**{**{name: getattr(usage, name) for name in Usage.__dataclass_fields__}, **changes})
