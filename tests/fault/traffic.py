"""Seeded traffic that has everything a real log has: duplicates, disorder, conflicts, records that park.

Each customer's producer runs one release, so that all records of an item are on one partition, in a known
order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import Pipeline

TENANTS = {"acme": "Europe/Budapest", "globex": "America/Los_Angeles"}
METERS = {"requests": "sum", "logins": "count"}
CUSTOMERS = 60


def configure(pipeline: Pipeline) -> None:
    """Tenants, meters, and no customers: a reference that is a Stripe id needs no mapping."""
    for tenant, timezone in TENANTS.items():
        pipeline.tenant(tenant, timezone)
        for slug, aggregation in METERS.items():
            pipeline.meter(tenant, slug, aggregation)


Record = tuple[str, bytes | None, bytes | None, list[Any], Usage | None]


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
            elif draw < 0.07:
                usage = _with(usage, occurred_s=now_s - chance.randrange(4 * DAY_S, 30 * DAY_S))
            elif draw < 0.15:
                usage = _with(usage, occurred_s=(usage.occurred_s or 0) - chance.randrange(40 * HOUR_S))
            recent.append(usage)
            if len(recent) > 3000:
                recent[chance.randrange(3000)] = recent.pop()
        yield (usage.topic, usage.record_key(), usage.value(), [], usage)


def _fresh(chance: random.Random, key: str, occurred_s: int) -> Usage:
    number = int(CUSTOMERS * chance.random() ** 2)
    tenant = chance.choice(list(TENANTS))
    return Usage(
        tenant=tenant,
        customer=f"cus_{number:03d}",
        meter=chance.choice(list(METERS)),
        quantity=Decimal(chance.randrange(1, 1000)),
        key=key,
        occurred_s=occurred_s,
        properties={"region": "eu"} if chance.random() < 0.2 else {},
        version=1 + number % 3,
    )


def _with(usage: Usage, **changes: Any) -> Usage:
    return Usage(**{**{name: getattr(usage, name) for name in Usage.__dataclass_fields__}, **changes})
