"""Upcasters take every record an older release can have written, and change nothing that is billed."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.catalog import current, released
from services.wire.codec import Decoder, Encoder
from tests.strategies import records_of
from upcasters.chain import InvalidAfterUpcast, UpcasterFailed, upcasters
from upcasters.values import Rejected

CHAIN = upcasters()
V3 = current("usage_event")

names = st.text(min_size=1, max_size=20)
seconds = st.integers(946_684_800, 4_102_444_800)
properties = st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=5)

#: What a v1 producer meant to write: any double up to 2**53, and a tenant in the customer string.
v1_records = st.fixed_dictionaries(
    {
        "event_id": names,
        "customer": st.tuples(names.filter(lambda text: "/" not in text), names).map("/".join),
        "metric": names,
        "value": st.floats(-(2**53), 2**53),
        "timestamp": seconds,
        "tags": st.lists(st.text(max_size=10), max_size=5),
    }
)
v2_records = st.fixed_dictionaries(
    {
        "event_id": names,
        "tenant": names,
        "customer": names,
        "metric": names,
        "quantity": st.integers(-(2**53) * 10**6, 2**53 * 10**6).map(
            lambda n: n.to_bytes(16, "big", signed=True)
        ),
        "used_at": seconds.map(lambda at: at * 1_000_000 + 123_456),
        "attributes": properties,
    }
)


def quantity_of(record: dict[str, Any]) -> Fraction:
    """What a v3 record says was used."""
    return Fraction(int.from_bytes(record["quantity"], "big", signed=True), 10**9)


@given(v1_records)
@settings(max_examples=300, deadline=None)
def test_a_v1_record_keeps_its_identity_and_its_quantity_to_the_nearest_millionth(
    record: dict[str, Any],
) -> None:
    latest = CHAIN.to_current("usage_event", 1, record)
    meant = Fraction(repr(record["value"]))

    assert quantity_of(latest) == Fraction(round(meant * 10**6), 10**6)
    assert latest["idempotency_key"] == record["event_id"]
    assert f"{latest['tenant_id']}/{latest['customer_ref']}" == record["customer"]
    assert latest["meter"] == record["metric"]
    assert latest["occurred_at"] == record["timestamp"] * 1_000_000
    assert latest["properties"].keys() == {tag.partition("=")[0] for tag in record["tags"]}


@given(v2_records)
@settings(max_examples=300, deadline=None)
def test_a_v2_record_keeps_its_identity_and_its_quantity_exactly(record: dict[str, Any]) -> None:
    latest = CHAIN.to_current("usage_event", 2, record)

    assert quantity_of(latest) == Fraction(int.from_bytes(record["quantity"], "big", signed=True), 10**6)
    assert (latest["idempotency_key"], latest["tenant_id"]) == (record["event_id"], record["tenant"])
    assert (latest["customer_ref"], latest["meter"]) == (record["customer"], record["metric"])
    assert latest["occurred_at"] == record["used_at"]
    assert latest["properties"] == record["attributes"]


@given(st.sampled_from([1, 2]).flatmap(lambda v: st.tuples(st.just(v), v1_records if v == 1 else v2_records)))
@settings(max_examples=200, deadline=None)
def test_upcasting_is_pure_and_its_output_can_be_written(versioned: tuple[int, dict[str, Any]]) -> None:
    version, record = versioned
    before = copy.deepcopy(record)
    once, twice = (CHAIN.to_current("usage_event", version, record) for _ in range(2))

    assert record == before
    assert once == twice
    assert Decoder().decode(Encoder(V3).encode(once)) == (V3, once)


@given(
    st.sampled_from([1, 2]).flatmap(lambda v: st.tuples(st.just(v), records_of(released()["usage_event", v])))
)
@settings(max_examples=500, deadline=None)
def test_whatever_the_schema_can_hold_comes_through_or_is_refused_by_name(
    versioned: tuple[int, dict[str, Any]],
) -> None:
    version, record = versioned
    try:
        latest = CHAIN.to_current("usage_event", version, record)
    except (Rejected, UpcasterFailed, InvalidAfterUpcast):
        return
    assert Decoder().decode(Encoder(V3).encode(latest)) == (V3, latest)
