"""Seeded usage events for the benchmarks, and the sums they must give. Shares no code with the counters."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field

from confluent_kafka import Producer

from schemas.catalog import current
from services.wire.codec import Encoder
from services.wire.kafka import producer_config
from services.wire.usage import record_key

HOUR_US = 3_600_000_000
TENANT = "bench"
METERS = ("api_requests", "gigabyte_hours", "tokens")


def start_of_day_before(now_us: int) -> int:
    """The full hour 24 hours before ``now_us``: events spread over the day after it."""
    return now_us - now_us % HOUR_US - 24 * HOUR_US


@dataclass(slots=True)
class Load:
    """What was produced: hourly sums in billionths by (customer, meter, hour start), over distinct keys."""

    events: int
    distinct: int
    sums: dict[tuple[str, str, int], int] = field(default_factory=lambda: defaultdict(int))


def produce(
    bootstrap: str,
    topic: str,
    *,
    events: int,
    seed: int,
    customers: int = 500,
    duplicates: float = 0.02,
    start_us: int | None = None,
) -> Load:
    """Write ``events`` current usage events to ``topic``: skewed customers, jitter, some duplicates."""
    chance = random.Random(seed)
    encoder = Encoder(current("usage_event"))
    headers: list[tuple[str, str | bytes | None]] = list(encoder.headers)
    producer = Producer(producer_config(bootstrap, **{"linger.ms": 50}))
    load = Load(events, 0)
    start_us = start_of_day_before(time.time_ns() // 1000) if start_us is None else start_us
    recent: list[tuple[bytes, bytes]] = []
    step_us = 24 * HOUR_US // events
    for number in range(events):
        if recent and chance.random() < duplicates:
            key, value = chance.choice(recent)
        else:
            customer = f"cus_{int(customers * chance.random() ** 2):06d}"
            meter = METERS[number % len(METERS)]
            quantity = chance.randrange(1, 1_000) * 1_000_000
            occurred = start_us + number * step_us + chance.randrange(60_000_000)
            value = encoder.encode(
                {
                    "idempotency_key": f"evt-{seed}-{number:010d}",
                    "tenant_id": TENANT,
                    "customer_ref": customer,
                    "meter": meter,
                    "quantity": quantity.to_bytes(16, "big", signed=True),
                    "occurred_at": occurred,
                    "properties": {"region": "eu-west"} if number % 4 == 0 else {},
                    "source": "bench",
                }
            )
            key = record_key(TENANT, customer, meter)
            load.sums[customer, meter, occurred - occurred % HOUR_US] += quantity
            load.distinct += 1
            recent.append((key, value))
            if len(recent) > 2000:
                del recent[:1000]
        while True:
            try:
                producer.produce(topic, key=key, value=value, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
        if number % 1000 == 0:
            producer.poll(0)
    producer.flush()
    return load
