"""The two forms of a delta, against plain ones: fastavro's bytes of the whole record, and its row by fields.

And packs, in which deltas wait: what goes in comes out.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.catalog import current, released
from services.counters.changed import ChangedHour, ChangedItem, ChangedPeriod
from services.counters.deltas import DeltaWriter, Invoices
from services.streaming.outbox import PACK_BYTES_MAX, packed, unpack
from services.wire.codec import Encoder
from services.wire.errors import Broken
from services.wire.periods import Calendar

HOUR, SECOND = 3_600_000_000, 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Anything that PostgreSQL's text can hold.
texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=40)
times = st.integers(-(2**55), 2**55)
amounts = st.integers(-(2**53) * 10**9, 2**53 * 10**9)
calendars = st.sampled_from(["1 month UTC", "1 day UTC 2026-03-01T09:55:00Z"]).map(Calendar.parse)
invoice_times = st.builds(Invoices, st.integers(0, 72 * HOUR), st.integers(0, 72 * HOUR))

items = st.builds(
    ChangedItem,
    item_id=st.binary(min_size=16, max_size=16),
    tenant_id=texts,
    customer_ref=texts,
    meter=texts,
    aggregation=st.sampled_from(["sum", "count", "max", "last", "unique"]),
    scale=st.integers(0, 9),
    allow_negative=st.booleans(),
    event_name=texts,
    customer_payload_key=texts,
    value_payload_key=texts,
    stripe_customer=texts,
    dimensions=st.dictionaries(texts, texts, max_size=5),
    calendar=calendars,
)
hours = st.builds(
    ChangedHour,
    start=st.integers(400_000, 600_000).map(lambda number: number * HOUR),
    total=amounts,
    closed=st.none() | amounts,
    pushed=amounts,
    sequence=st.integers(0, 2**31 - 2),
    last_event=st.integers(400_000 * HOUR, 600_000 * HOUR),
    open=st.booleans(),
    amount=amounts,
    sent=st.booleans(),
)
periods = st.builds(
    ChangedPeriod,
    items,
    start=st.integers(400_000 * HOUR, 600_000 * HOUR),
    end=times,
    hours=st.lists(hours, max_size=4).map(lambda some: {hour.start: hour for hour in some}),
)


def plain(period: ChangedPeriod, hour: ChangedHour, invoices: Invoices, now: int) -> dict[str, Any]:
    """The record of what an hour sends, field by field."""
    item, number = period.item, hour.sequence + 1
    text = f'["{uuid.UUID(bytes=item.item_id)}", {period.start}, {hour.start}, {number}]'
    digest = hashlib.blake2b(text.encode(), digest_size=20).digest()
    is_last = item.aggregation == "last"
    invoiced = item.calendar.anchored and not is_last
    return {
        "identifier": base64.b32encode(digest).decode().lower(),
        "item_id": item.item_id,
        "tenant_id": item.tenant_id,
        "customer_ref": item.customer_ref,
        "meter": item.meter,
        "stripe_customer": item.stripe_customer,
        "event_name": item.event_name,
        "customer_payload_key": item.customer_payload_key,
        "value_payload_key": item.value_payload_key,
        "period_start": period.start,
        "period_end": period.end,
        "hour_start": hour.start,
        "event_at": hour.last_event // SECOND * SECOND if is_last else max(hour.start, period.start),
        "sequence": number,
        "amount": hour.amount.to_bytes(16, "big", signed=True),
        "closed_at": now,
        "dimensions": item.dimensions,
        "formula": "last" if is_last else "sum",
        "push_before": period.end + max(0, invoices.grace_us - invoices.margin_us) if invoiced else None,
    }


def text_of(micros: int) -> str:
    return (EPOCH + timedelta(microseconds=micros)).isoformat()


@given(st.lists(periods, max_size=3), invoice_times, st.integers(400_000 * HOUR, 600_000 * HOUR))
@settings(max_examples=400, deadline=None)
def test_a_delta_is_byte_for_byte_what_fastavro_writes_and_its_row_says_the_same(
    several: list[ChangedPeriod], invoices: Invoices, now: int
) -> None:
    encoder = Encoder(current("usage_delta"))
    written = DeltaWriter(encoder).write(several, invoices, now)
    expected = [
        plain(period, hour, invoices, now)
        for period in several
        for hour in period.hours.values()
        if hour.sent
    ]
    assert [value for _, value in written.records] == [encoder.encode(record) for record in expected]
    assert [line.removesuffix("\n").split("\t") for line in written.lines] == [
        [
            record["identifier"],
            str(uuid.UUID(bytes=record["item_id"])),
            text_of(record["period_start"]),
            text_of(record["hour_start"]),
            str(record["sequence"]),
            f"{int.from_bytes(record['amount'], 'big', signed=True)}e-9",
            text_of(now),
        ]
        for record in expected
    ]


def test_a_schema_with_other_fields_is_refused_when_the_worker_starts() -> None:
    with pytest.raises(Broken, match="usage_delta has other fields"):
        DeltaWriter(Encoder(released()["usage_delta", 1]))


# -- Packs -----------------------------------------------------------------------------------------------

records = st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=2500)), min_size=1, max_size=30)


@given(records)
def test_packs_hold_every_record_in_its_order_and_only_a_large_one_makes_a_large_row(
    some: list[tuple[bytes, bytes]],
) -> None:
    packs = list(packed(some))
    opened = [list(unpack(pack)) for pack in packs]
    assert [record for pack in opened for record in pack] == some
    assert all(
        len(pack) <= PACK_BYTES_MAX or len(inside) == 1 for pack, inside in zip(packs, opened, strict=True)
    )


@given(records, st.data())
def test_a_pack_that_is_cut_is_refused(some: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    [pack, *_] = packed(some)
    whole = list(unpack(pack))
    cut = pack[: data.draw(st.integers(1, len(pack) - 1))]
    try:
        found = list(unpack(cut))
    except Broken:
        return
    assert found == whole[: len(found)], "cut between two records, which only its length can tell"
