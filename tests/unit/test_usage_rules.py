"""The rules of one event: what is refused, for which reason, at which field."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from services.wire.codec import Decoder
from services.wire.errors import Invalid
from services.wire.usage import (
    FUTURE_TOLERANCE_US,
    QUANTITY_MAX,
    QUANTITY_UNIT,
    UsageEvent,
    content_digest,
    encode_usage,
    event_id_hash,
    item_id_hash,
    parse_quantity,
    parse_timestamp,
    record_key,
    to_record,
    usage_encoder,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW_US = 1_772_366_400_000_000
MICROSECOND = timedelta(microseconds=1)


def event(**changes: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "customer_ref": "cust 42 ü",
        "meter": "api.requests",
        "quantity": "12.5",
        "idempotency_key": "k1",
        "occurred_at": NOW,
        "properties": {"region": "eu"},
    }
    return UsageEvent(**{**fields, **changes})


def record(**changes: Any) -> dict[str, Any]:
    return to_record(event(**changes), source="test", now_us=NOW_US)


def refusal(**changes: Any) -> tuple[str, str]:
    with pytest.raises(Invalid) as caught:
        record(**changes)
    return caught.value.reason, caught.value.path


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "quantity_missing"),
        ("", "quantity_missing"),
        ("  ", "quantity_missing"),
        ("NaN", "quantity_not_finite"),
        ("-Infinity", "quantity_not_finite"),
        ("inf", "quantity_not_finite"),
        (Decimal("NaN"), "quantity_not_finite"),
        (Decimal("sNaN"), "quantity_not_finite"),
        (Decimal("-Infinity"), "quantity_not_finite"),
        ("-0", "quantity_negative_zero"),
        ("-0.000", "quantity_negative_zero"),
        ("-0e9", "quantity_negative_zero"),
        (Decimal("-0"), "quantity_negative_zero"),
        ("1e400", "quantity_out_of_range"),
        ("1e999999999", "quantity_out_of_range"),
        ("1e" + "9" * 40, "quantity_out_of_range"),
        (Decimal("1e999999999"), "quantity_out_of_range"),
        ("9" * 40, "quantity_out_of_range"),
        (10**4000, "quantity_out_of_range"),
        (QUANTITY_MAX + 1, "quantity_out_of_range"),
        (f"-{QUANTITY_MAX}.000000001", "quantity_out_of_range"),
        ("0." + "1234567890" * 4, "quantity_too_precise"),
        ("0.0000000001", "quantity_too_precise"),
        (Decimal("1e-999999999"), "quantity_too_precise"),
        ("1e-" + "9" * 40, "quantity_too_precise"),
        (True, "quantity_not_a_number"),
        (1.5, "quantity_not_a_number"),
        ([1], "quantity_not_a_number"),
        ("twelve", "quantity_not_a_number"),
        ("1_000", "quantity_not_a_number"),
        ("1,5", "quantity_not_a_number"),
        ("0x10", "quantity_not_a_number"),
        ("١٢", "quantity_not_a_number"),
        ("−1", "quantity_not_a_number"),
        ("1\n", "quantity_not_a_number"),
        ("\ud800", "quantity_not_a_number"),
        ("1\0", "quantity_not_a_number"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_quantity_that_is_no_exact_bounded_number_is_refused_by_its_reason(value: Any, reason: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_quantity(value)
    assert (caught.value.reason, caught.value.path) == (reason, "quantity")


@pytest.mark.parametrize(
    ("value", "billionths"),
    [
        ("0", 0),
        ("0e" + "9" * 40, 0),
        ("007.50", 7_500_000_000),
        ("1." + "0" * 100_000, QUANTITY_UNIT),
        ("-1.5e3", -1500 * QUANTITY_UNIT),
        ("0.000000001", 1),
        (Decimal("0.1"), 100_000_000),
        (str(QUANTITY_MAX), QUANTITY_MAX * QUANTITY_UNIT),
        (-QUANTITY_MAX, -QUANTITY_MAX * QUANTITY_UNIT),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_quantity_is_kept_exactly_in_billionths(value: Any, billionths: int) -> None:
    assert parse_quantity(value) == billionths


@pytest.mark.parametrize("field", ["tenant_id", "customer_ref", "meter", "idempotency_key"])
def test_a_missing_or_wrong_text_is_named_with_its_field(field: str) -> None:
    assert refusal(**{field: None}) == (f"{field}_missing", field)
    assert refusal(**{field: ""}) == (f"{field}_missing", field)
    assert refusal(**{field: 7}) == (f"{field}_invalid", field)
    assert refusal(**{field: "a" * 256}) == (f"{field}_too_long", field)
    assert refusal(**{field: "a\0b"}) == ("control_character", field)
    assert refusal(**{field: "a\x1fb"}) == ("control_character", field)
    assert refusal(**{field: "a\ud800b"}) == ("lone_surrogate", field)


@pytest.mark.parametrize("tenant", ["Acme", "-acme", "a b", "acme/1", "a" * 65, "acme\n"])
def test_a_tenant_is_a_slug(tenant: str) -> None:
    assert refusal(tenant_id=tenant)[1] == "tenant_id"


@pytest.mark.parametrize("meter", ["API", ".api", "api requests", "a" * 101, "api\u2028"])
def test_a_meter_is_a_slug(meter: str) -> None:
    assert refusal(meter=meter)[1] == "meter"


def test_customers_and_keys_may_hold_any_printable_language_and_all_their_length() -> None:
    kept = record(customer_ref="客户\u2028\u00a0" + "é" * 251, idempotency_key="🔑" * 255)
    assert len(kept["customer_ref"]) == len(kept["idempotency_key"]) == 255


def test_a_time_more_than_five_minutes_ahead_is_refused_and_no_time_less() -> None:
    limit = NOW + timedelta(microseconds=FUTURE_TOLERANCE_US)
    assert record(occurred_at=limit)["occurred_at"] == NOW_US + FUTURE_TOLERANCE_US
    assert refusal(occurred_at=limit + MICROSECOND) == ("timestamp_in_future", "occurred_at")


def test_a_time_without_an_offset_or_before_2000_or_of_no_time_type_is_refused() -> None:
    assert refusal(occurred_at=NOW.replace(tzinfo=None)) == ("timestamp_naive", "occurred_at")
    assert (
        refusal(occurred_at=datetime(1999, 12, 31, 23, 59, 59, 999_999, UTC))[0] == "timestamp_out_of_range"
    )
    assert refusal(occurred_at=datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))[0] == (
        "timestamp_out_of_range"
    )
    assert refusal(occurred_at=datetime.max.replace(tzinfo=timezone(-timedelta(hours=14))))[0] == (
        "timestamp_in_future"
    )
    assert refusal(occurred_at="2026-03-01") == ("timestamp_invalid", "occurred_at")


def test_an_old_time_is_accepted_for_the_counters_to_decide() -> None:
    assert record(occurred_at=datetime(2000, 1, 1, tzinfo=UTC))["occurred_at"] == 946_684_800_000_000


def test_an_event_without_a_time_is_recorded_without_one() -> None:
    assert record(occurred_at=None)["occurred_at"] is None


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("2026-03-01T12:00:00Z", 0),
        ("2026-03-01t12:00:00z", 0),
        ("2026-03-01 12:00:00+00:00", 0),
        ("2026-03-01T13:00:00+01:00", 0),
        ("2026-03-01T12:00:00.5-00:00", 500_000),
        ("2026-03-01T12:00:00.123456999Z", 123_456),
    ],
)
def test_rfc_3339_is_read_with_its_offset_and_cut_to_microseconds(text: str, micros: int) -> None:
    assert parse_timestamp(text) == NOW + micros * MICROSECOND


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2026-03-01T12:00:00", "timestamp_naive"),
        ("2026-03-01", "timestamp_invalid"),
        ("20260301T120000Z", "timestamp_invalid"),
        ("2026-W09-7T12:00:00Z", "timestamp_invalid"),
        ("1772366400", "timestamp_invalid"),
        ("", "timestamp_invalid"),
        ("2026-02-29T12:00:00Z", "timestamp_invalid"),
        ("2026-03-01T24:00:00Z", "timestamp_invalid"),
        ("2026-03-01T12:00:60Z", "timestamp_invalid"),
        ("2026-03-01T12:00:00+25:00", "timestamp_invalid"),
        ("2026-03-01T12:00:00Z\n", "timestamp_invalid"),
        ("٢٠٢٦-03-01T12:00:00Z", "timestamp_invalid"),
    ],
)
def test_what_is_not_rfc_3339_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_timestamp(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({str(number): "" for number in range(10_000)}, "properties_too_many"),
        ({"blob": "x" * 10_000_000}, "property_value_too_long"),
        ({"k" * 101: ""}, "property_key_invalid"),
        ({"": ""}, "property_key_invalid"),
        ({"k": 1}, "property_value_invalid"),
        ({"k": "\0"}, "control_character"),
        ({"k\x01": ""}, "control_character"),
        ({"k": "\udfff"}, "lone_surrogate"),
        (["k"], "properties_invalid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_properties_are_bounded_text(properties: Mapping[str, str], reason: str) -> None:
    assert refusal(properties=properties) == (reason, "properties")


def test_an_event_that_readers_would_find_too_large_is_refused_by_its_size() -> None:
    bulky = record(properties={f"{number}": "\N{GRINNING FACE}" * 500 for number in range(50)})
    with pytest.raises(Invalid) as caught:
        encode_usage(usage_encoder(), bulky)
    assert caught.value.reason == "event_too_large"


def test_no_refusal_repeats_what_was_sent() -> None:
    planted = "s3cret-value"
    for field in ("tenant_id", "customer_ref", "meter", "idempotency_key", "quantity"):
        with pytest.raises(Invalid) as caught:
            record(**{field: planted + "\0"})
        assert planted not in str(caught.value)


def test_a_record_is_what_its_schema_says_and_reads_back_the_same() -> None:
    written = record()
    schema, back = Decoder().decode(encode_usage(usage_encoder(), written))
    assert (schema.name, back) == ("usage_event/3", written)
    assert int.from_bytes(back["quantity"], "big", signed=True) == 12_500_000_000
    assert usage_encoder(7).encode(written)[:5] == b"\x00\x00\x00\x00\x07"


def test_the_content_digest_covers_what_was_sent_and_nothing_else() -> None:
    digest = content_digest(record())
    same: list[dict[str, Any]] = [
        {"quantity": "12.500"},
        {"quantity": Decimal("1.25e1")},
        {"idempotency_key": "other"},
        {"tenant_id": "other"},
        {"occurred_at": NOW.astimezone(timezone(timedelta(hours=5, minutes=45)))},
    ]
    other: list[dict[str, Any]] = [
        {"quantity": "12.500000001"},
        {"quantity": "-12.5"},
        {"customer_ref": "cust 43"},
        {"meter": "api.request"},
        {"occurred_at": NOW + MICROSECOND},
        {"occurred_at": None},
        {"properties": {}},
        {"properties": {"region": "us"}},
        {"properties": {"region": "eu", "tier": "1"}},
    ]
    assert {content_digest(record(**changes)) for changes in same} == {digest}
    digests = [content_digest(record(**changes)) for changes in other]
    assert len({digest, *digests}) == len(other) + 1
    assert content_digest({**record(), "source": "elsewhere"}) == digest
    assert -(2**63) <= digest < 2**63


def test_the_order_of_properties_is_not_content() -> None:
    assert content_digest(record(properties={"a": "1", "b": "2"})) == content_digest(
        record(properties={"b": "2", "a": "1"})
    )


def test_parts_cannot_be_shifted_between_the_fields_of_a_hash() -> None:
    assert content_digest(record(properties={"a": "b"})) != content_digest(record(properties={"ab": ""}))
    assert content_digest(record(properties={"a": "1:bc"})) != content_digest(
        record(properties={"a": "", "b": "c"})
    )
    assert event_id_hash("a", "bc") != event_id_hash("ab", "c")
    assert item_id_hash("a", "b", "cd") != item_id_hash("a", "bc", "d") != item_id_hash("ab", "c", "d")
    assert record_key("a", 'b","c', "d") != record_key("a", "b", 'c","d')


def test_hashes_of_the_same_thing_never_change_between_releases() -> None:
    assert event_id_hash("acme", "k1").hex() == "9258f7bc31b4e578a4ee198696fc1ce0"
    assert item_id_hash("acme", "cust_42", "api.requests").hex() == "1f282dca645dea779f9ea89361b4f604"
    assert content_digest(record()) == -2955924809630273974
    assert record_key("acme", "cust_42", "api.requests") == b'["acme","cust_42","api.requests"]'
