"""Plan the demo's records: pure and seeded.

Three tenants, four meters, skewed customers; three schema versions; 2 % duplicates, 5 % late, some too late,
conflicts, unknown meters, corrupt bytes. A record that is judged against an earlier one (a duplicate, a
conflict, a too late event) goes to the same topic and key as that one, so their order is fixed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

HOUR_S = 3600
DAY_S = 24 * HOUR_S

Path = Literal["api", "producer", "v2", "v1", "raw"]
Kind = Literal["on_time", "late", "too_late", "duplicate", "conflict", "unknown_meter", "corrupt"]

TENANTS = {"acme": "Europe/Budapest", "globex": "America/Los_Angeles", "initech": "Asia/Kathmandu"}
#: slug → (aggregation, scale of the Stripe meter, decimal places of the quantities)
METERS = {
    "api_requests": ("sum", 0, 0),
    "gigabyte_hours": ("sum", 3, 3),
    "tokens": ("sum", 0, 0),
    "logins": ("count", 0, 0),
}
CUSTOMERS_PER_TENANT = 25


@dataclass(frozen=True, slots=True)
class Planned:
    """One record to send. ``occurred_s`` is whole seconds since 1970."""

    path: Path
    kind: Kind
    key: str
    tenant: str
    customer: str
    meter: str
    quantity: Decimal
    occurred_s: int
    properties: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""


def customers(tenant: str) -> list[str]:
    """The customer references of a tenant."""
    return [f"{tenant}-customer-{number:03d}" for number in range(CUSTOMERS_PER_TENANT)]


def plan(events: int, seed: int, now_s: int) -> list[Planned]:
    """``events`` records in sending order."""
    chance = random.Random(seed)  # noqa: S311
    planned: list[Planned] = []
    firsts: list[Planned] = []
    start_s = now_s - 5 * HOUR_S
    for number in range(events):
        progress = number / events
        draw = chance.random()
        base_s = start_s + int(progress * (5 * HOUR_S - 60))
        settled = [one for one in firsts[-400:-20] if one.path in ("api", "producer")] if number > 600 else []
        if settled and draw < 0.02:
            planned.append(_repeat(chance.choice(settled), "duplicate"))
        elif settled and draw < 0.023:
            planned.append(_repeat(chance.choice(settled), "conflict"))
        elif settled and draw < 0.028:
            planned.append(_too_late(chance, chance.choice(settled), seed, number))
        elif draw < 0.031:
            planned.append(_unknown_meter(chance, seed, number, base_s))
        elif draw < 0.033:
            planned.append(_corrupt(chance, seed, number))
        else:
            late = draw > 0.95
            one = _usage(
                chance, seed, number, base_s - chance.randrange(HOUR_S, 40 * HOUR_S) if late else base_s
            )
            one = _with_kind(one, "late" if late else "on_time")
            planned.append(one)
            firsts.append(one)
    return planned


def _usage(chance: random.Random, seed: int, number: int, occurred_s: int) -> Planned:
    tenant = chance.choice(list(TENANTS))
    customer = customers(tenant)[int(CUSTOMERS_PER_TENANT * chance.random() ** 2)]
    meter = chance.choice(list(METERS))
    places = METERS[meter][2]
    quantity = Decimal(chance.randrange(1, 5000)).scaleb(-places)
    properties = {"region": chance.choice(["eu-west", "us-east"])} if chance.random() < 0.3 else {}
    return Planned(
        path_of(tenant, customer),
        "on_time",
        f"demo-{seed}-{number}",
        tenant,
        customer,
        meter,
        quantity,
        occurred_s,
        properties,
    )


def path_of(tenant: str, customer: str) -> Path:
    """Each customer's producer runs one release, so all of its usage comes in one way: half by the API."""
    paths: tuple[Path, ...] = ("api", "producer", "api", "v2", "api", "v1", "api", "producer")
    return paths[(len(tenant) + int(customer[-3:])) % len(paths)]


def _with_kind(one: Planned, kind: Kind) -> Planned:
    return Planned(
        one.path,
        kind,
        one.key,
        one.tenant,
        one.customer,
        one.meter,
        one.quantity,
        one.occurred_s,
        one.properties,
    )


def _repeat(first: Planned, kind: Kind) -> Planned:
    quantity = first.quantity if kind == "duplicate" else first.quantity + 1
    return Planned(
        first.path,
        kind,
        first.key,
        first.tenant,
        first.customer,
        first.meter,
        quantity,
        first.occurred_s,
        first.properties,
    )


def _too_late(chance: random.Random, first: Planned, seed: int, number: int) -> Planned:
    occurred_s = first.occurred_s - chance.randrange(3 * DAY_S + 2 * DAY_S, 30 * DAY_S)
    return Planned(
        first.path,
        "too_late",
        f"demo-{seed}-{number}",
        first.tenant,
        first.customer,
        first.meter,
        first.quantity,
        occurred_s,
    )


def _unknown_meter(chance: random.Random, seed: int, number: int, occurred_s: int) -> Planned:
    tenant = chance.choice(list(TENANTS))
    customer = customers(tenant)[0]
    return Planned(
        "api",
        "unknown_meter",
        f"demo-{seed}-{number}",
        tenant,
        customer,
        "carrier_pigeons",
        Decimal(1),
        occurred_s,
    )


def _corrupt(chance: random.Random, seed: int, number: int) -> Planned:
    size = chance.randrange(0, 200)
    return Planned(
        "raw",
        "corrupt",
        f"demo-{seed}-{number}",
        "",
        "",
        "",
        Decimal(0),
        0,
        raw=b"\xc3\x01" + chance.randbytes(size),
    )
