"""Bodies to events: shapes, aliases, CloudEvents, and errors that name one event and one field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest import parse
from services.ingest.parse import (
    CLOUDEVENT,
    CLOUDEVENT_BATCH,
    JSON,
    Caller,
    Refusal,
    cloudevent_key,
    read_batch,
)
from services.web.problems import RequestRefused
from services.wire.usage import content_digest

ACME = Caller("acme")
OPERATOR = Caller(None)
NOW_US = 1_772_366_400_000_000

GOOD = {"metric": "requests", "customerRef": "cust_42", "quantity": 1, "idempotencyKey": "k1"}


def checked(body: bytes | str, media_type: str = JSON, caller: Caller = ACME) -> list[Any]:
    raw = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    return read_batch(raw, media_type, caller, events_max=1000).check(source="api", now_us=NOW_US)


def native(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def only(body: object, **rest: Any) -> Any:
    (outcome,) = checked(json.dumps(body), **rest)
    return outcome


def code_and_path(outcome: Any) -> tuple[str, str]:
    assert isinstance(outcome, Refusal), outcome
    return outcome.code, outcome.path


def refused(body: bytes | str, media_type: str = JSON) -> tuple[int, str]:
    with pytest.raises(RequestRefused) as caught:
        checked(body, media_type)
    return caught.value.status, caught.value.problem.code


def test_an_object_with_events_a_bare_list_and_a_single_event_are_the_same() -> None:
    single = checked(json.dumps(GOOD))
    assert checked(json.dumps([GOOD])) == checked(json.dumps({"events": [GOOD]})) == single
    assert single[0]["tenant_id"] == "acme"
    assert single[0]["occurred_at"] is None


def test_paths_address_the_event_as_the_body_holds_it() -> None:
    bad = native(quantity="NaN")
    assert code_and_path(only(bad)) == ("quantity_not_finite", "quantity")
    assert code_and_path(checked(json.dumps([GOOD, bad]))[1])[1] == "[1].quantity"
    assert code_and_path(checked(json.dumps({"events": [GOOD, bad]}))[1])[1] == "events[1].quantity"


def test_metric_and_meter_meta_and_properties_are_aliases_but_not_together() -> None:
    meter = {**GOOD, "meter": GOOD["metric"], "properties": {"a": "b"}}
    assert code_and_path(only(meter)) == ("field_given_twice", "metric")
    del meter["metric"]
    assert only(meter) == only(native(meta={"a": "b"}))
    assert code_and_path(only(native(meta={}, properties={})))[0] == "field_given_twice"


def test_properties_keep_numbers_and_booleans_as_the_text_that_was_sent() -> None:
    body = json.dumps(GOOD)[:-1] + ', "meta": {"a": 1.10, "b": true, "c": "x", "d": -0, "e": 1e2}}'
    assert checked(body)[0]["properties"] == {"a": "1.10", "b": "true", "c": "x", "d": "-0", "e": "1e2"}


@pytest.mark.parametrize("value", [None, [], {}, ["x"], {"x": "y"}])
def test_properties_do_not_nest(value: Any) -> None:
    assert code_and_path(only(native(meta={"a": value}))) == ("property_value_invalid", "meta")


def test_quantities_are_read_exactly_never_through_a_float() -> None:
    texts = ["0.1", "9007199254740991.999999999", "1e-9", '"0.3"', "1E2"]
    members = [json.dumps(GOOD).replace('"quantity": 1', f'"quantity": {text}') for text in texts]
    body = f"[{','.join(members)}]"
    assert [int.from_bytes(record["quantity"], "big", signed=True) for record in checked(body)] == [
        100_000_000,
        9007199254740991_999999999,
        1,
        300_000_000,
        100_000_000_000,
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NaN", "quantity_not_finite"),
        ("Infinity", "quantity_not_finite"),
        ("-Infinity", "quantity_not_finite"),
        ('"NaN"', "quantity_not_finite"),
        ("1e400", "quantity_out_of_range"),
        ("1e99999999999999999999", "quantity_out_of_range"),
        ("9" * 5000, "quantity_out_of_range"),
        ("-0", "quantity_negative_zero"),
        ("-0.0", "quantity_negative_zero"),
        ('"-0"', "quantity_negative_zero"),
        ('""', "quantity_missing"),
        ("null", "quantity_missing"),
        ("0." + "123456789" * 5, "quantity_too_precise"),
        ("true", "quantity_not_a_number"),
        ("[]", "quantity_not_a_number"),
        ("{}", "quantity_not_a_number"),
        ('"\\ud800"', "quantity_not_a_number"),
        ('"1\\u0000"', "quantity_not_a_number"),
    ],
    ids=lambda text: text[:20],
)
def test_a_bad_quantity_costs_its_own_event_only(text: str, code: str) -> None:
    good, bad = (
        json.dumps(GOOD),
        json.dumps(native(idempotencyKey="k2")).replace('"quantity": 1', f'"quantity": {text}'),
    )
    first, second = checked(f'{{"events":[{good},{bad}]}}')
    assert first["idempotency_key"] == "k1"
    assert code_and_path(second) == (code, "events[1].quantity")
    assert second.idempotency_key == "k2"


@pytest.mark.parametrize(
    ("changes", "code", "path"),
    [
        ({"customerRef": "a\ud800"}, "lone_surrogate", "customerRef"),
        ({"customerRef": "a\0"}, "control_character", "customerRef"),
        ({"customerRef": 7}, "customer_ref_invalid", "customerRef"),
        ({"customerRef": None}, "customer_ref_missing", "customerRef"),
        ({"metric": ["m"]}, "meter_invalid", "metric"),
        ({"idempotencyKey": 7}, "idempotency_key_invalid", "idempotencyKey"),
        ({"idempotencyKey": ""}, "idempotency_key_missing", "idempotencyKey"),
        ({"ts": 1772366400}, "timestamp_invalid", "ts"),
        ({"ts": "2026-03-01T12:00:00"}, "timestamp_naive", "ts"),
        ({"ts": "2026-03-01T12:05:00.000001Z"}, "timestamp_in_future", "ts"),
        ({"meta": []}, "properties_invalid", "meta"),
        ({"meta": {str(number): 1 for number in range(10_000)}}, "properties_too_many", "meta"),
        ({"meta": {"k": "x" * 501}}, "property_value_too_long", "meta"),
        ({"meta": {"k": "\ud800"}}, "lone_surrogate", "meta"),
        ({"timestamp": "2026-03-01T12:00:00Z"}, "field_unknown", "timestamp"),
        ({"\ud800": 1}, "field_unknown", ""),
        ({"tenantId": "globex"}, "tenant_forbidden", "tenantId"),
        ({"tenantId": 7}, "tenant_forbidden", "tenantId"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_named_by_path_and_code(changes: dict[str, Any], code: str, path: str) -> None:
    assert code_and_path(only(native(**changes))) == (code, path)
    good, bad = checked(json.dumps({"events": [native(idempotencyKey="other"), native(**changes)]}))
    assert not isinstance(good, Refusal)
    assert code_and_path(bad) == (code, f"events[1].{path}".rstrip("."))


def test_an_operator_names_the_tenant_and_a_tenants_key_may() -> None:
    assert only(native(tenantId="acme"))["tenant_id"] == "acme"
    assert only(native(tenantId="globex"), caller=OPERATOR)["tenant_id"] == "globex"
    assert code_and_path(only(GOOD, caller=OPERATOR)) == ("tenant_id_missing", "tenantId")


def test_a_header_key_stands_in_for_a_single_event_only_and_never_over_its_own() -> None:
    keyless = {name: value for name, value in GOOD.items() if name != "idempotencyKey"}
    caller = Caller("acme", "from-header")
    assert only(keyless, caller=caller)["idempotency_key"] == "from-header"
    assert only({"events": [keyless]}, caller=caller)["idempotency_key"] == "from-header"
    assert only(GOOD, caller=caller)["idempotency_key"] == "k1"
    batch = checked(json.dumps({"events": [GOOD, keyless, native(idempotencyKey="k3")]}), caller=caller)
    assert code_and_path(batch[1]) == ("idempotency_key_missing", "events[1].idempotencyKey")
    assert [batch[0]["idempotency_key"], batch[2]["idempotency_key"]] == ["k1", "k3"]


@pytest.mark.parametrize(
    "body", ["", "{", "nonsense", '{"events": [}', b"\xff\xfe{}", "[" * 100_000, "\ufeff{}"]
)
def test_what_is_not_json_is_refused_whole(body: bytes | str) -> None:
    assert refused(body) == (400, "body_not_json")
    assert refused(body, CLOUDEVENT) == (400, "body_not_json")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ('"text"', (400, "body_invalid")),
        ("7", (400, "body_invalid")),
        ("null", (400, "body_invalid")),
        ('{"events": {}}', (400, "body_invalid")),
        ('{"events": null}', (400, "body_invalid")),
        ('{"events": [], "tenantId": "acme"}', (400, "body_invalid")),
        ('{"events": []}', (400, "no_events")),
        ("[]", (400, "no_events")),
        (json.dumps([GOOD] * 1001), (413, "too_many_events")),
        ("[" + ",".join(["7"] * 1001) + "]", (413, "too_many_events")),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_body_of_another_shape_or_length_is_refused_whole(body: str, answer: tuple[int, str]) -> None:
    assert refused(body) == answer


def test_members_that_are_no_objects_are_refused_singly() -> None:
    outcomes = checked(json.dumps({"events": [GOOD, 7, None, [GOOD]]}))
    assert [code_and_path(outcome) for outcome in outcomes[1:]] == [
        ("event_invalid", f"events[{index}]") for index in (1, 2, 3)
    ]


def test_one_body_means_the_same_to_both_readers() -> None:
    """A retry beside a bad event takes the other reader, and must still be a duplicate."""
    event = native(ts="2026-03-01T11:00:00Z", meta={"a": "é", "b": ""}, quantity="0.10")
    (alone,) = checked(json.dumps(event))
    beside_bad = checked(json.dumps([event, {"bad": 1}]))[0]
    assert content_digest(alone) == content_digest(beside_bad)


texts = st.one_of(
    st.none(), st.text(max_size=5), st.sampled_from(["acme", "requests", "2026-03-01T11:00:00Z"])
)
scalars = st.one_of(texts, st.integers(), st.floats(), st.booleans())
events = st.fixed_dictionaries(
    {},
    optional={
        "tenantId": texts,
        "metric": texts,
        "meter": texts,
        "customerRef": texts,
        "quantity": scalars,
        "ts": texts,
        "idempotencyKey": texts,
        "meta": st.one_of(st.none(), st.dictionaries(st.text(max_size=3), scalars, max_size=3)),
        "other": scalars,
    },
)


@given(
    st.one_of(
        events,
        st.lists(events, min_size=1, max_size=3),
        st.builds(lambda many: {"events": many}, st.lists(events, min_size=1)),
    )
)
def test_the_fast_reader_agrees_with_the_patient_one_or_declines(document: Any) -> None:
    body = json.dumps(document).encode()
    try:
        fast = parse._read_fast(body, ACME, 1000)
    except Exception:
        return
    if fast is not None:
        assert fast == parse._read_patiently(parse._load(body), JSON, ACME, 1000)


@given(st.binary(max_size=200), st.sampled_from(parse.MEDIA_TYPES))
def test_no_bytes_crash_the_readers(body: bytes, media_type: str) -> None:
    try:
        read_batch(body, media_type, ACME, events_max=10).check(source="api", now_us=NOW_US)
    except RequestRefused as error:
        assert error.status in (400, 413)


# CloudEvents ----------------------------------------------------------------------------------------


def cloudevent(**changes: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": "e-1",
        "source": "/gateway",
        "type": "usage",
        "subject": "cust_42",
        "time": "2026-03-01T11:00:00Z",
        "traceparent": "00-extension",
        "data": {"metric": "requests", "quantity": 1},
        **changes,
    }


def test_a_cloudevent_is_the_event_that_its_attributes_and_data_name() -> None:
    record = only(cloudevent(), media_type=CLOUDEVENT)
    plain = only(native(idempotencyKey="/gateway/e-1", ts="2026-03-01T11:00:00Z"))
    assert record == plain
    assert checked(json.dumps([cloudevent()]), CLOUDEVENT_BATCH) == [record]


def test_the_customer_in_the_data_goes_before_the_subject() -> None:
    data = {"metric": "requests", "quantity": 1, "customerRef": "other"}
    assert only(cloudevent(data=data), media_type=CLOUDEVENT)["customer_ref"] == "other"
    assert only(cloudevent(data=data, subject=None), media_type=CLOUDEVENT)["customer_ref"] == "other"


@pytest.mark.parametrize(
    ("changes", "code", "path"),
    [
        ({"specversion": "0.3"}, "specversion_invalid", "specversion"),
        ({"id": None}, "id_missing", "id"),
        ({"source": ""}, "source_missing", "source"),
        ({"type": 7}, "type_invalid", "type"),
        ({"id": "a\0"}, "control_character", "id"),
        ({"data": None}, "data_missing", "data"),
        ({"data": "{}"}, "data_invalid", "data"),
        ({"datacontenttype": "text/plain"}, "datacontenttype_invalid", "datacontenttype"),
        ({"time": "yesterday"}, "timestamp_invalid", "time"),
        ({"subject": None}, "customer_ref_missing", "data.customerRef"),
        ({"data": {"metric": "requests"}}, "quantity_missing", "data.quantity"),
        ({"data": {"metric": "M", "quantity": 1}}, "meter_invalid", "data.metric"),
        ({"data": {"metric": "m", "quantity": 1, "tokens": 5}}, "field_unknown", "data.tokens"),
        ({"data": {"metric": "m", "quantity": 1, "tenantId": "globex"}}, "tenant_forbidden", "data.tenantId"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_cloudevent_is_named_by_path_and_code(changes: dict[str, Any], code: str, path: str) -> None:
    assert code_and_path(only(cloudevent(**changes), media_type=CLOUDEVENT)) == (code, path)
    outcome = checked(json.dumps([cloudevent(), cloudevent(**changes)]), CLOUDEVENT_BATCH)[1]
    assert code_and_path(outcome) == (code, f"[1].{path}")


def test_a_native_body_is_no_cloudevent_and_a_batch_is_a_list() -> None:
    assert code_and_path(only(GOOD, media_type=CLOUDEVENT))[0] == "specversion_invalid"
    assert refused(json.dumps(cloudevent()), CLOUDEVENT_BATCH) == (400, "body_invalid")
    assert refused(json.dumps([cloudevent()]), CLOUDEVENT) == (400, "body_invalid")


@given(
    st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9), st.text(min_size=1), st.text(min_size=1)
)
def test_two_cloudevents_share_a_key_only_if_source_and_id_are_the_same(
    a: str, b: str, c: str, d: str
) -> None:
    if (a, b) != (c, d):
        assert cloudevent_key(a, b) != cloudevent_key(c, d)
    assert cloudevent_key(a, f"{b}/{c}") != cloudevent_key(f"{a}/{b}", c)


def test_a_cloudevent_key_is_readable_while_it_fits_and_hashed_beyond() -> None:
    assert cloudevent_key("/gw", "1") == "/gw/1"
    assert len(cloudevent_key("/gw", "x" * 250)) == 254
    assert cloudevent_key("/gw", "x" * 252).startswith("cloudevent:")
    assert cloudevent_key("/gw", "x" * 252) != cloudevent_key("/gw", "x" * 253)
