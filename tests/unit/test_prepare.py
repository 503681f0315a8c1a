"""Preparing a chunk: every record becomes an event, a repeat, or a parked record with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.catalog import current, released
from services.counters.prepare import Parked, Prepared, Preparer, parked_rows
from services.wire.codec import SCHEMA_HEADER, Decoder, Encoder
from services.wire.topics import DEAD_LETTERS, OPS, UPCAST_FAILURES
from services.wire.usage import FUTURE_TOLERANCE_US, QUANTITY_MAX, content_digest, event_id_hash
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
    ((index, event_id, digest, item, occurred, quantity),) = prepared.events

    assert (index, occurred, quantity) == (0, ARRIVAL_US, 5 * UNIT)
    assert event_id == event_id_hash("acme", "evt-1")
    assert digest == content_digest(v3())
    assert (item.meter.tenant_id, item.customer_ref, item.meter.meter) == ("acme", "cust-1", "requests")
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


def test_the_key_of_an_event_can_be_read_again() -> None:
    assert PREPARER.idempotency_key(chunk_of([encoded(v3(idempotency_key="evt-9"))]), 0) == "evt-9"
    assert PREPARER.idempotency_key(chunk_of([encoded(V1, 1)], 1), 0) == "evt-1"


def test_a_parked_record_keeps_its_bytes_and_says_where_it_came_from() -> None:
    raw = Raw(41, encoded(v3(meter="pigeons")), headers=[("trace", b"abc")])
    chunk = chunk_of([raw])
    prepared = PREPARER.prepare(chunk, configuration())
    record, ops = parked_rows(chunk, prepared.parked, at_us=ARRIVAL_US)

    assert (record.topic, record.value, record.key) == (DEAD_LETTERS, raw.value, b'["usage.v3",0,41]')
    assert record.headers == {
        "trace": "abc",
        "tidemeter-error-reason": "unknown_meter",
        "tidemeter-error-stage": "validate",
        "tidemeter-error-class": "",
        "tidemeter-error-topic": "usage.v3",
        "tidemeter-error-partition": "0",
        "tidemeter-error-offset": "41",
        "tidemeter-error-timestamp": "1772366400000",
        "tidemeter-error-service": "tidemeter-counters",
        "tidemeter-error-attempt": "1",
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
