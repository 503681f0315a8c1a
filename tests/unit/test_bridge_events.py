"""What is read out of a body, and which bodies are of no use."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bridge.events import StripeEvent, read_event
from services.web.problems import RequestRefused


def snapshot(**changes: Any) -> dict[str, Any]:
    event = {"id": "evt_1", "object": "event", "type": "invoice.paid", "data": {"object": {"id": "in_1"}}}
    return {**event, **changes}


def thin(**changes: Any) -> dict[str, Any]:
    event = {
        "id": "evt_2",
        "object": "v2.core.event",
        "type": "v1.billing.meter.error_report_triggered",
        "related_object": {"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
    }
    return {**event, **changes}


def read(event: object) -> StripeEvent:
    return read_event(json.dumps(event).encode())


def refused(body: bytes) -> str | None:
    with pytest.raises(RequestRefused) as caught:
        read_event(body)
    assert (caught.value.status, caught.value.problem.code) == (400, "event_malformed")
    return caught.value.problem.path


def test_a_snapshot_is_about_its_object() -> None:
    assert read(snapshot()) == StripeEvent("evt_1", "invoice.paid", "in_1")


def test_a_thin_event_is_about_its_related_object() -> None:
    assert read(thin()) == StripeEvent("evt_2", "v1.billing.meter.error_report_triggered", "mtr_1")


@pytest.mark.parametrize("related", [None, {}, {"id": None}, {"id": ""}, "mtr_1"])
def test_a_thin_event_about_nothing_stands_for_itself(related: object) -> None:
    assert read(thin(related_object=related)).object_id == "evt_2"
    assert read(thin(related_object=related, data={"object": {"id": "in_1"}})).object_id == "evt_2"


@pytest.mark.parametrize(
    ("about", "object_id"),
    [
        ({"object": "balance", "available": []}, "balance"),
        ({"object": "balance", "id": None}, "balance"),
        ({"object": "balance", "id": 7}, "balance"),
        ({}, "evt_1"),
        ("in_1", "evt_1"),
        (None, "evt_1"),
    ],
)
def test_an_object_without_an_id_stands_under_its_kind(about: object, object_id: str) -> None:
    assert read(snapshot(data={"object": about})).object_id == object_id
    assert read(snapshot(data=None)).object_id == "evt_1"


def test_an_event_of_a_connected_account_is_read_like_any_other() -> None:
    assert read(snapshot(account="acct_1")) == read(snapshot())
    assert read(thin(context="acct_1")) == read(thin())


@pytest.mark.parametrize("name", ["id", "type"])
@pytest.mark.parametrize(
    "value", [None, "", 7, ["evt_1"], {}, True, "x" * 256, "evt_\x00", "evt_\n", "evt_\ud800"]
)
def test_an_event_needs_an_id_and_a_type_that_can_be_kept(name: str, value: object) -> None:
    assert refused(json.dumps(snapshot(**{name: value})).encode()) == name
    assert refused(json.dumps(thin(**{name: value})).encode()) == name


@pytest.mark.parametrize("value", ["x" * 256, "in_\x00", "in_\udfff"])
def test_an_objects_id_must_be_one_that_can_be_kept(value: str) -> None:
    assert refused(json.dumps(snapshot(data={"object": {"id": value}})).encode()) == "object"
    assert refused(json.dumps(thin(related_object={"id": value})).encode()) == "object"


def test_identifiers_may_have_255_characters_of_any_script() -> None:
    longest = "\U0001f30a" * 255
    assert read(snapshot(id=longest, type=longest)) == StripeEvent(longest, longest, "in_1")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"evt_1"',
        b"7",
        b"{",
        b'{"id": "evt_1", "type": "x"} x',
        b'{"id": "evt_1", "type": "x", "n": NaN}',
        b'{"id": "evt_1", "type": "x", "n": -Infinity}',
        b'{"id": "evt_1", "type": "x", "n": "\xff"}',
        b'\xef\xbb\xbf{"id": "evt_1", "type": "x"}',
        json.dumps(snapshot()).encode("utf-16"),
        b'{"id": "evt_1", "type": "x", "n": ' + b"[" * 100_000,
        b'{"id": "evt_1", "type": "x", "n": ' + b"9" * 100_000 + b"}",
        b"\x1f\x8b\x08\x00",
    ],
    ids=range(16),
)
def test_what_is_no_event_in_json_is_refused_whole(body: bytes) -> None:
    assert refused(body) is None


def test_half_a_surrogate_pair_elsewhere_does_not_cost_the_event() -> None:
    assert read(snapshot(request={"note": "\ud83d"})).event_id == "evt_1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
EVENT_LIKE = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("evt_1") | JSON,
        "type": st.just("x") | JSON,
        "object": st.just("v2.core.event") | JSON,
        "data": st.fixed_dictionaries({}, optional={"object": JSON}) | JSON,
        "related_object": st.fixed_dictionaries({}, optional={"id": JSON}) | JSON,
    },
)


@given((EVENT_LIKE | JSON).map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_body_gives_identifiers_that_can_be_kept_or_is_refused(body: bytes) -> None:
    try:
        event = read_event(body)
    except RequestRefused as error:
        assert error.problem.code == "event_malformed"
        return
    for text in (event.event_id, event.event_type, event.object_id):
        assert 1 <= len(text) <= 255
        assert "\x00" not in text.encode().decode()
