"""Preparing a chunk: every record becomes an event, a repeat, or a parked record with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.catalog import current, released
from services.counters.prepare import Parked, Prepared, Preparer, parked_rows
from services.wire.codec import SCHEMA_HEADER, Decoder, Encoder
from services.wire.topics import DEAD_LETTERS, OPS, UPCAST_FAILURES
from services.wire.usage import (
    FUTURE_TOLERANCE_US,
    QUANTITY_MAX,
    content_digest,
    event_id_hash,
    item_id_hash,
    value_hash,
)
from tests.records import ARRIVAL_US, UNIT, Raw, chunk_of, configuration, encoded, meter, v3
from upcasters.chain import Step, Upcasters, upcasters

PREPARER = Preparer(Decoder(), upcasters())

V1: dict[str, Any] = {
    "event_id": "evt-1",
    "customer": "acme/cust-1",
    "metric": "requests",
    "value": 12.5,
    "timestamp": ARRIVAL_US // 1_000_000,
    "tags": [],
}


def prepare(*values: bytes | None | Raw, version: int = 3, **changes: Any) -> Prepared:
    return PREPARER.prepare(chunk_of(values, version), configuration(meter(**changes)))


def only_parked(prepared: Prepared) -> Parked:
    """The one parked record of a chunk in which nothing else happened."""
    assert not prepared.events
    assert not prepared.repeats
    (parked,) = prepared.parked
    return parked


def test_a_good_event_is_identified_measured_and_put_to_its_item() -> None:
    prepared = prepare(encoded(v3()))
    ((index, event_id, digest, item, occurred, quantity, key),) = prepared.events

    assert (index, occurred, quantity, key) == (0, ARRIVAL_US, 5 * UNIT, "evt-1")
    assert event_id == event_id_hash("acme", "evt-1")
    assert digest == content_digest(v3())
    assert (item.meter.tenant_id, item.customer_ref, item.meter.meter) == ("acme", "cust-1", "requests")
    assert (item.item_id, item.dimensions) == (item_id_hash("acme", "cust-1", "requests"), ())
    assert not prepared.parked


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"meter": "pigeons"}, "unknown_meter"),
        ({"tenant_id": "globex"}, "unknown_meter"),
        ({"tenant_id": ""}, "invalid_tenant_id"),
        ({"tenant_id": "ac\x00me"}, "invalid_tenant_id"),
        ({"customer_ref": ""}, "invalid_customer_ref"),
        ({"customer_ref": "x" * 256}, "invalid_customer_ref"),
        ({"meter": "\x00"}, "invalid_meter"),
        ({"idempotency_key": ""}, "invalid_idempotency_key"),
        ({"idempotency_key": "a\x00b"}, "invalid_idempotency_key"),
        ({"idempotency_key": "x" * 256}, "invalid_idempotency_key"),
        ({"quantity": -1}, "quantity_negative"),
        ({"quantity": (QUANTITY_MAX * UNIT) + 1}, "quantity_out_of_range"),
        ({"quantity": -(2**127)}, "quantity_out_of_range"),
        ({"occurred_at": ARRIVAL_US + FUTURE_TOLERANCE_US + 1}, "timestamp_in_future"),
        ({"occurred_at": 2**63 - 1}, "timestamp_in_future"),
        ({"occurred_at": 946_684_799_999_999}, "timestamp_out_of_range"),
        ({"occurred_at": -(2**63)}, "timestamp_out_of_range"),
    ],
)
def test_a_record_that_cannot_be_counted_is_a_dead_letter_with_its_reason(
    changes: dict[str, Any], reason: str
) -> None:
    parked = only_parked(prepare(encoded(v3(**changes))))
    assert (parked.outcome, parked.stage, parked.reason) == ("dead_lettered", "validate", reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantity": 0},
        {"quantity": QUANTITY_MAX * UNIT},
        {"occurred_at": ARRIVAL_US + FUTURE_TOLERANCE_US},
        {"occurred_at": 946_684_800_000_000},
        {"customer_ref": "x" * 255},
        {"idempotency_key": "\N{SNOWMAN}" * 255},
    ],
    ids=["zero", "the most", "five minutes ahead", "the year 2000", "long customer", "long key"],
)
def test_what_lies_on_a_limit_is_counted(changes: dict[str, Any]) -> None:
    assert len(prepare(encoded(v3(**changes))).events) == 1


def test_a_meter_may_allow_negative_quantities() -> None:
    prepared = prepare(encoded(v3(quantity=-3)), allow_negative=True)
    assert [event[5] for event in prepared.events] == [-3]


def test_a_counting_meter_counts_events_whatever_their_quantity() -> None:
    prepared = prepare(encoded(v3(quantity=77)), aggregation="count")
    assert [event[5] for event in prepared.events] == [UNIT]


def of_property(text: str | None, aggregation: str = "sum", **changes: Any) -> Prepared:
    """One event of a meter that measures the property `size`; its quantity is 77."""
    record = v3(quantity=77 * UNIT, properties={} if text is None else {"size": text, "other": "8"})
    return prepare(encoded(record), aggregation=aggregation, value_property="size", **changes)


@pytest.mark.parametrize("aggregation", ["sum", "max", "last"])
@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("5", 5 * UNIT),
        ("0", 0),
        ("12.5", 12_500_000_000),
        ("0.000000001", 1),
        ("1e3", 1000 * UNIT),
        ("007", 7 * UNIT),
        (str(QUANTITY_MAX), QUANTITY_MAX * UNIT),
    ],
)
def test_a_meter_may_measure_a_property_instead_of_the_quantity(
    aggregation: str, text: str, amount: int
) -> None:
    assert [event[5] for event in of_property(text, aggregation).events] == [amount]


@pytest.mark.parametrize("aggregation", ["sum", "count", "max", "last"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "value_missing"),
        ("", "value_missing"),
        (" ", "value_missing"),
        ("many", "value_not_a_number"),
        ("1,5", "value_not_a_number"),
        ("0x10", "value_not_a_number"),
        ("5\x00", "value_not_a_number"),
        ("\N{ARABIC-INDIC DIGIT FIVE}", "value_not_a_number"),
        ("NaN", "value_not_finite"),
        ("-Infinity", "value_not_finite"),
        ("-0", "value_negative_zero"),
        ("-1", "value_negative"),
        (str(QUANTITY_MAX + 1), "value_out_of_range"),
        ("1e999999999", "value_out_of_range"),
        ("0.0000000001", "value_too_precise"),
    ],
)
def test_a_property_that_cannot_be_measured_is_a_dead_letter_with_its_reason(
    aggregation: str, text: str | None, reason: str
) -> None:
    parked = only_parked(of_property(text, aggregation))
    assert (parked.outcome, parked.stage, parked.reason) == ("dead_lettered", "validate", reason)


def test_a_property_may_be_negative_where_the_meter_allows_it() -> None:
    assert [event[5] for event in of_property("-2.5", allow_negative=True).events] == [-2_500_000_000]


def test_a_meter_that_counts_events_with_a_property_counts_each_as_one_whatever_it_says() -> None:
    assert [event[5] for event in of_property("12.5", "count").events] == [UNIT]


def test_a_quantity_that_no_meter_takes_is_refused_though_a_property_is_measured() -> None:
    record = v3(quantity=(QUANTITY_MAX * UNIT) + 1, properties={"size": "5"})
    assert only_parked(prepare(encoded(record), value_property="size")).reason == "quantity_out_of_range"


def test_a_meter_of_distinct_values_takes_any_text_and_knows_it_again() -> None:
    texts = ["ann", "Ann", "ann ", "0", "00", " ", "\N{SNOWMAN}", "\x00", "x" * 500]
    amounts = [of_property(text, "unique").events[0][5] for text in texts]
    assert amounts == [value_hash(text) for text in texts]
    assert len(set(amounts)) == len(texts)
    assert all(0 <= amount < 2**128 for amount in amounts)


@pytest.mark.parametrize("text", [None, ""])
def test_a_distinct_value_that_is_missing_is_a_dead_letter(text: str | None) -> None:
    assert only_parked(of_property(text, "unique")).reason == "value_missing"


def test_dimensions_split_an_item_by_their_values_in_the_order_of_the_meter() -> None:
    shapes = [
        {"region": "eu", "tier": "gold"},
        {"tier": "gold", "region": "eu", "other": "x"},
        {"region": "us", "tier": "gold"},
        {"region": "gold", "tier": "eu"},
    ]
    values = [
        encoded(v3(idempotency_key=f"evt-{number}", properties=properties))
        for number, properties in enumerate(shapes)
    ]
    prepared = prepare(*values, dimensions=("region", "tier"))
    items = [event[3] for event in prepared.events]

    assert [item.dimensions for item in items] == [
        ("eu", "gold"),
        ("eu", "gold"),
        ("us", "gold"),
        ("gold", "eu"),
    ]
    assert items[0] is items[1]
    assert len({item.item_id for item in items}) == 3
    assert items[0].item_id == item_id_hash("acme", "cust-1", "requests", "eu", "gold")
    assert {item.account for item in items} == {prepared.accounts["acme", "requests"]}


def test_values_of_dimensions_that_join_to_the_same_text_are_two_items() -> None:
    values = [
        encoded(v3(idempotency_key=f"evt-{number}", properties={"a": first, "b": second}))
        for number, (first, second) in enumerate([("x", "1:y"), ("x1", ":y"), ("x1:y", "z"), ("x", "yz")])
    ]
    prepared = prepare(*values, dimensions=("a", "b"))
    assert len({event[3].item_id for event in prepared.events}) == 4


@pytest.mark.parametrize(
    "properties",
    [{}, {"tier": "gold"}, {"region": "", "tier": "gold"}, {"region": "e\x00u", "tier": "gold"}],
    ids=["none", "one of two", "empty", "with a NUL"],
)
def test_an_event_without_a_value_for_each_dimension_is_a_dead_letter(properties: dict[str, str]) -> None:
    record = encoded(v3(properties=properties))
    assert only_parked(prepare(record, dimensions=("region", "tier"))).reason == "dimension_missing"


def test_a_dimension_may_be_the_property_that_is_measured() -> None:
    record = encoded(v3(properties={"size": "5"}))
    (event,) = prepare(record, dimensions=("size",), value_property="size").events
    assert (event[3].dimensions, event[5]) == (("5",), 5 * UNIT)


def test_an_event_without_a_time_has_its_arrival_time_and_the_same_content_when_retried_later() -> None:
    value = encoded(v3(occurred_at=None))
    first, retry = Raw(0, value, timestamp=1_772_366_400_000), Raw(1, value, timestamp=1_772_366_999_000)
    prepared = prepare(first, retry)

    assert [event[4] for event in prepared.events] == [1_772_366_400_000_000]
    assert [event[2] for event in prepared.repeats] == [event[2] for event in prepared.events]


def test_the_second_use_of_a_key_in_a_chunk_is_a_repeat_whatever_it_says() -> None:
    prepared = prepare(
        encoded(v3()), encoded(v3()), encoded(v3(quantity=9)), encoded(v3(idempotency_key="other"))
    )
    assert [event[0] for event in prepared.events] == [0, 3]
    assert [event[0] for event in prepared.repeats] == [1, 2]


def test_the_same_key_of_two_tenants_is_two_events() -> None:
    config = configuration(meter(), meter(tenant="globex"))
    chunk = chunk_of([encoded(v3()), encoded(v3(tenant_id="globex"))])
    assert len(PREPARER.prepare(chunk, config).events) == 2


@pytest.mark.parametrize(
    ("value", "reason", "error_class"),
    [
        (None, "undecodable", "Undecodable"),
        (b"", "undecodable", "Undecodable"),
        (b"{}", "undecodable", "Undecodable"),
        (encoded(v3()) + b"\x00", "undecodable", "Undecodable"),
        (encoded(v3())[:-1], "undecodable", "Undecodable"),
        (b"x" * 70_000, "undecodable", "Undecodable"),
        (b"\xc3\x01" + b"\x00" * 20, "unknown_schema", "UnknownSchema"),
        (b"\x00\x00\x00\x00\x07body", "unknown_schema", "UnknownSchema"),
        (encoded(V1, 1), "unknown_schema", "UnknownSchema"),
        (Encoder(current("ops_event")).prefix + b"\x00" * 7, "unknown_schema", "UnknownSchema"),
    ],
    ids=[
        "no value",
        "empty",
        "json",
        "a byte too many",
        "a byte too few",
        "too large",
        "unknown fingerprint",
        "confluent without registry",
        "v1 on the topic of v3",
        "another subject",
    ],
)
def test_a_record_that_cannot_be_read_is_an_upcast_failure_with_its_reason(
    value: bytes | None, reason: str, error_class: str
) -> None:
    parked = only_parked(prepare(value))
    assert (parked.outcome, parked.stage, parked.reason) == ("upcast_failed", "decode", reason)
    assert parked.error_class == error_class


def test_a_header_that_disagrees_with_the_framing_parks_the_record() -> None:
    right = Raw(0, encoded(v3()), headers=[(SCHEMA_HEADER, b"usage_event/3"), ("trace", b"1")])
    wrong = Raw(0, encoded(v3()), headers=[(SCHEMA_HEADER, b"usage_event/2")])
    assert len(prepare(right).events) == 1
    assert only_parked(prepare(wrong)).reason == "unknown_schema"


def test_a_v1_record_on_its_own_topic_is_upcast_and_counted() -> None:
    prepared = prepare(encoded(V1, 1), version=1)
    assert [event[5] for event in prepared.events] == [12_500_000_000]


def test_a_v1_quantity_that_is_no_number_is_a_dead_letter() -> None:
    parked = only_parked(prepare(encoded({**V1, "value": float("nan")}, 1), version=1))
    assert (parked.outcome, parked.reason) == ("dead_lettered", "non_finite_quantity")


def test_an_upcaster_that_raises_parks_the_record_with_the_class_of_the_cause() -> None:
    parked = only_parked(prepare(encoded({**V1, "customer": "no tenant"}, 1), version=1))
    assert (parked.outcome, parked.stage, parked.reason) == ("upcast_failed", "upcast", "upcaster_error")
    assert parked.error_class == "ValueError"


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Upcasters([], {}), "missing_upcaster"),
        (
            Upcasters([Step("usage_event", 1, 2, lambda record: record)], {"usage_event": 2}),
            "invalid_after_upcast",
        ),
    ],
)
def test_a_chain_that_does_not_lead_to_the_current_version_parks_the_record(
    chain: Upcasters, reason: str
) -> None:
    preparer = Preparer(Decoder(), chain)
    prepared = preparer.prepare(chunk_of([encoded(V1, 1)], 1), configuration())
    parked = only_parked(prepared)
    assert (parked.outcome, parked.stage, parked.reason) == ("upcast_failed", "upcast", reason)


def mixed() -> list[bytes | None]:
    """One of everything."""
    return [
        encoded(v3()),
        encoded(v3()),
        b"noise",
        encoded(v3(meter="pigeons")),
        encoded(v3(idempotency_key="evt-2", quantity=-1)),
        None,
        encoded(v3(idempotency_key="evt-3", customer_ref="cust-2")),
    ]


def test_every_record_of_a_chunk_lands_in_exactly_one_place() -> None:
    prepared = prepare(*mixed())
    indexes = [event[0] for event in (*prepared.events, *prepared.repeats)]
    indexes += [parked.index for parked in prepared.parked]
    assert sorted(indexes) == list(range(len(mixed())))


def test_preparing_is_pure() -> None:
    def shape(prepared: Prepared) -> Any:
        return (
            [(event[:3], event[3].item_id, event[4:]) for event in (*prepared.events, *prepared.repeats)],
            prepared.parked,
        )

    assert shape(prepare(*mixed())) == shape(prepare(*mixed()))


def test_the_key_of_an_event_is_kept_as_it_was_sent_by_any_release() -> None:
    assert [event[6] for event in prepare(encoded(v3(idempotency_key="evt-\N{SNOWMAN}"))).events] == [
        "evt-\N{SNOWMAN}"
    ]
    assert [event[6] for event in prepare(encoded(V1, 1), version=1).events] == ["evt-1"]


def test_a_parked_record_keeps_its_bytes_and_says_where_it_came_from() -> None:
    raw = Raw(41, encoded(v3(meter="pigeons")), headers=[("trace", b"abc")])
    chunk = chunk_of([raw])
    prepared = PREPARER.prepare(chunk, configuration())
    record, ops = parked_rows(chunk, prepared.parked, at_us=ARRIVAL_US)

    assert (record.topic, record.value, record.key) == (DEAD_LETTERS, raw.value, b'["usage.v3",0,41]')
    assert record.headers == {
        "trace": "abc",
        "tidemeter-error-reason": "unknown_meter",
        "__connect.errors.stage": "validate",
        "__connect.errors.exception.class.name": "",
        "__connect.errors.topic": "usage.v3",
        "__connect.errors.partition": "0",
        "__connect.errors.offset": "41",
        "tidemeter-error-timestamp": "1772366400000",
        "tidemeter-error-service": "tidemeter-counters",
        "tidemeter-error-event-id": "evt-1",
        "tidemeter-error-tenant": "acme",
        "tidemeter-error-meter": "pigeons",
    }
    _, event = Decoder().decode(ops.value)
    assert (ops.topic, event["name"], event["subject_id"]) == (OPS, "usage_dead_lettered", "usage.v3/0/41")


def test_a_failed_upcast_makes_one_ops_event_that_is_the_same_when_written_again() -> None:
    chunk = chunk_of([b"noise"])
    prepared = PREPARER.prepare(chunk, configuration())
    first, second = (parked_rows(chunk, prepared.parked, at_us=at) for at in (1, 2))

    assert first[0].topic == UPCAST_FAILURES
    events = [Decoder().decode(rows[1].value)[1] for rows in (first, second)]
    assert events[0]["name"] == "events_upcast_failed"
    assert events[0]["ops_event_id"] == events[1]["ops_event_id"]
    assert events[0]["attributes"] == {"reason": "undecodable", "schema_version": "3"}


def test_identifiers_of_a_parked_record_are_capped_and_safe_as_header_text() -> None:
    parked = only_parked(prepare(encoded(v3(tenant_id="a\x00b", idempotency_key="k" * 300))))
    assert parked.identifiers == {"event_id": "k" * 255, "tenant": "a\\0b", "meter": "requests"}


def test_the_schema_of_every_usage_topic_can_be_prepared() -> None:
    for version in (1, 2, 3):
        assert released()["usage_event", version]
        assert only_parked(prepare(b"", version=version)).reason == "undecodable"
