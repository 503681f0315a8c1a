"""One record in two hundred is poison, of every kind: each is parked once, whole, and all others count."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from decimal import Decimal

import pytest

from services.wire.codec import SCHEMA_HEADER
from tests.fault.campaign import Campaign, some_seed
from tests.fault.traffic import Record
from tests.oracle import Usage
from tests.pipeline import until
from tests.records import encoded, v3

NOW_S = int(time.time())
GOOD = encoded(v3(idempotency_key="never counted", properties={"a": "b"}))
OLDER = Usage("acme", "cus_1", "requests", Decimal(1), "older", NOW_S, version=2).value()
PREFIX, BODY = GOOD[:10], GOOD[10:]


def poisons(chance: random.Random) -> Iterator[tuple[bytes, list[tuple[str, bytes]], str]]:
    """(value, headers, reason) for ever, each kind in turn."""
    while True:
        yield b"\xff" + chance.randbytes(chance.randrange(200)), [], "undecodable"
        yield b"", [], "undecodable"
        yield GOOD[: chance.randrange(10, len(GOOD))], [], "undecodable"
        yield GOOD + chance.randbytes(1 + chance.randrange(9)), [], "undecodable"
        yield b"\xc3\x01" + chance.randbytes(8) + BODY, [], "unknown_schema"
        yield GOOD, [(SCHEMA_HEADER, b"usage_event/4")], "unknown_schema"
        yield OLDER, [], "unknown_schema"  # of another version than its topic's
        yield PREFIX + b"\x04\xff\xfe" + BODY[3:], [], "undecodable"  # no UTF-8 in the first string
        yield PREFIX + b"\xfe\xff\xff\xff\x0f" + BODY, [], "undecodable"  # a string of 2 GB, as it claims
        yield PREFIX + b"\xff" * 11 + BODY, [], "undecodable"  # a number that never ends
        yield b"\x00" + chance.randbytes(4) + BODY, [], "unknown_schema"  # Confluent's framing, no registry
        yield b"\xc3\x01" + b"x" * 70_000, [], "undecodable"


def load(seed: int, good: int) -> Iterator[tuple[Record, str | None]]:
    """Good usage with a poisonous record every 211; what it is refused for, or None.

    Partitions do not get the same share, and more than one in a hundred would halt one.
    """
    chance = random.Random(seed)  # noqa: S311
    kinds = poisons(chance)
    for number in range(good):
        customer = f"cus_{chance.randrange(40)}"
        at_s = NOW_S - chance.randrange(40 * 3600)
        usage = Usage("acme", customer, "requests", Decimal(chance.randrange(1, 9)), f"g-{number}", at_s)
        yield (usage.topic, usage.record_key(), usage.value(), [], usage), None
        if number % 211 == 0:
            value, headers, reason = next(kinds)
            yield ("usage.v3", usage.record_key(), value, headers, None), reason


def survive(campaign: Campaign, good: int, seed: int) -> None:
    campaign.seed = seed
    pipeline = campaign.pipeline
    worker = pipeline.worker().start()
    records = list(load(seed, good))
    places = pipeline.send_raw([record for record, _ in records])
    until(lambda: pipeline.processed() == len(records), "every record", 300, worker.log)
    campaign.prove()
    wanted = {
        json.dumps(list(place), separators=(",", ":")).encode(): (record[2] or b"", reason)
        for place, (record, reason) in zip(places, records, strict=True)
        if reason is not None
    }
    found: dict[bytes, tuple[bytes, str]] = {}
    for one in pipeline.read("upcast_failures.v1"):
        headers = {name: (text or b"").decode() for name, text in one.headers.items()}
        place = json.loads(one.key or b"")
        assert headers["__connect.errors.topic"] == place[0]
        assert [headers["__connect.errors.partition"], headers["__connect.errors.offset"]] == [
            str(place[1]),
            str(place[2]),
        ]
        assert one.key is not None and one.key not in found, "parked twice"
        found[one.key] = (one.value or b"", headers["tidemeter-error-reason"])
    assert found == wanted
    rows = pipeline.query('SELECT topic, partition, "offset", value, reason, state FROM parked_records')
    assert {
        json.dumps(list(row[:3]), separators=(",", ":")).encode(): (bytes(row[3]), row[4]) for row in rows
    } == wanted
    assert len(pipeline.ops("events_upcast_failed")) == len(wanted)
    assert worker.alive(), "it was never restarted"


def test_poison_of_every_kind_is_parked_once_whole_and_named_and_all_else_counts(campaign: Campaign) -> None:
    survive(campaign, 3_000, 5)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_hundred_thousand_records_with_poison_among_them_are_exact(campaign: Campaign) -> None:
    survive(campaign, 100_000, some_seed())
