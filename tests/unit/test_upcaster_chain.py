"""The chain proves itself when built, runs exactly the steps it needs, and names the step that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from schemas.catalog import CURRENT_VERSIONS
from upcasters.chain import (
    ChainError,
    InvalidAfterUpcast,
    MissingUpcaster,
    Step,
    UpcasterFailed,
    Upcasters,
    build_chain,
    check_chain,
    upcasters,
)
from upcasters.usage_event_v1_to_v2 import upcast as v1_to_v2
from upcasters.usage_event_v2_to_v3 import upcast as v2_to_v3
from upcasters.values import Record, Rejected

V1: Record = {
    "event_id": "evt-1",
    "customer": "acme/cust-1",
    "metric": "requests",
    "value": 12.5,
    "timestamp": 1_772_366_400,
    "tags": ["region=eu-west", "beta"],
}
V2: Record = {
    "event_id": "evt-1",
    "tenant": "acme",
    "customer": "cust-1",
    "metric": "requests",
    "quantity": (12_500_000).to_bytes(16, "big", signed=True),
    "used_at": 1_772_366_400_000_000,
    "attributes": {"region": "eu-west", "beta": ""},
}
V3: Record = {
    "idempotency_key": "evt-1",
    "tenant_id": "acme",
    "customer_ref": "cust-1",
    "meter": "requests",
    "quantity": (12_500_000_000).to_bytes(16, "big", signed=True),
    "occurred_at": 1_772_366_400_000_000,
    "properties": {"region": "eu-west", "beta": ""},
    "source": "upcast/2",
}


class Counting:
    """A step that notes that it ran."""

    def __init__(self, upcast: Callable[[Record], Record]) -> None:
        self._upcast = upcast
        self.runs = 0

    def __call__(self, record: Record) -> Record:
        self.runs += 1
        return self._upcast(record)


def step(
    source: int, target: int, upcast: Callable[[Record], Any] = dict, subject: str = "usage_event"
) -> Step:
    return Step(subject, source, target, upcast)


@pytest.mark.parametrize(
    ("version", "record", "runs"), [(1, V1, (1, 1)), (2, V2, (0, 1)), (3, V3, (0, 0))], ids=["v1", "v2", "v3"]
)
def test_v1_takes_exactly_two_steps_v2_one_and_v3_none(
    version: int, record: Record, runs: tuple[int, int]
) -> None:
    first, second = Counting(v1_to_v2), Counting(v2_to_v3)
    chain = Upcasters([step(1, 2, first), step(2, 3, second)], {"usage_event": 3})

    assert chain.to_current("usage_event", version, record) == V3
    assert (first.runs, second.runs) == runs


def test_the_steps_of_a_path_are_in_order() -> None:
    names = [one.name for one in upcasters().path("usage_event", 1)]
    assert names == ["usage_event v1→v2", "usage_event v2→v3"]


def test_every_subject_that_is_released_has_a_path_to_its_current_version() -> None:
    chain = upcasters()
    for subject, current in CURRENT_VERSIONS.items():
        for version in range(1, current + 1):
            assert len(chain.path(subject, version)) == current - version


def test_a_step_leaves_the_record_it_was_given_alone() -> None:
    before = {**V1, "tags": list(V1["tags"])}
    upcasters().to_current("usage_event", 1, V1)
    assert before == V1


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([step(2, 3)], "usage_event v1→v2"),
        ([step(1, 2)], "usage_event v2→v3"),
        ([step(1, 2), step(2, 1)], "usage_event v2→v1"),
        ([step(1, 1)], "usage_event v1→v1"),
        ([step(1, 3)], "usage_event v1→v3"),
        ([step(1, 2), step(2, 3), step(3, 4)], "usage_event v3→v4"),
        ([step(1, 2), step(1, 2), step(2, 3)], "usage_event v1→v2"),
        ([step(1, 2), step(2, 3), step(1, 2, subject="invoice")], "invoice v1→v2"),
    ],
    ids=["hole below", "hole above", "cycle", "loop", "jump", "above current", "two from one", "no subject"],
)
def test_a_chain_that_is_not_one_path_is_refused_by_the_name_of_the_step(
    steps: list[Step], named: str
) -> None:
    with pytest.raises(ChainError, match=named):
        build_chain(steps, {"usage_event": 3})


@pytest.mark.parametrize("version", [0, -1, 4, 2**31])
def test_a_version_that_no_release_wrote_has_no_path(version: int) -> None:
    with pytest.raises(MissingUpcaster, match=f"usage_event v{version}"):
        upcasters().path("usage_event", version)


def test_a_subject_that_nobody_knows_has_no_path() -> None:
    with pytest.raises(MissingUpcaster, match="invoice v1"):
        upcasters().path("invoice", 1)


def broken(_: Record) -> Record:
    raise ZeroDivisionError


def test_a_step_that_raises_is_named_and_keeps_its_cause() -> None:
    chain = Upcasters([step(1, 2, v1_to_v2), step(2, 3, broken)], {"usage_event": 3})
    with pytest.raises(UpcasterFailed, match="usage_event v2→v3") as caught:
        chain.to_current("usage_event", 1, V1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "output",
    [
        {},
        None,
        [],
        {**V3, "more": 1},
        {name: value for name, value in V3.items() if name != "meter"},
        {**V3, "quantity": 5},
        {**V3, "quantity": b"short"},
        {**V3, "occurred_at": "now"},
        {**V3, "occurred_at": 2**63},
        {**V3, "properties": {"n": 1}},
        {**V3, "source": None},
    ],
    ids=[
        "empty",
        "nothing",
        "a list",
        "one field more",
        "one field less",
        "a number for a fixed",
        "too few bytes",
        "text for a time",
        "a time beyond 64 bits",
        "a number for a property",
        "no source",
    ],
)
def test_an_output_that_its_schema_refuses_is_named_by_the_step_that_made_it(output: Any) -> None:
    chain = Upcasters([step(1, 2, v1_to_v2), step(2, 3, lambda _: output)], {"usage_event": 3})
    with pytest.raises(InvalidAfterUpcast, match="usage_event v2→v3"):
        chain.to_current("usage_event", 1, V1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_quantity_that_is_no_number_is_the_records_fault_and_not_the_steps(value: float) -> None:
    with pytest.raises(Rejected) as caught:
        upcasters().to_current("usage_event", 1, {**V1, "value": value})
    assert caught.value.reason == "non_finite_quantity"


@pytest.mark.parametrize("customer", ["", "acme", "acme/", "/cust-1", "/"])
def test_a_v1_customer_without_tenant_fails_in_the_first_step(customer: str) -> None:
    with pytest.raises(UpcasterFailed, match="usage_event v1→v2"):
        upcasters().to_current("usage_event", 1, {**V1, "customer": customer})


def test_the_start_up_check_runs_every_corpus_record() -> None:
    assert check_chain(upcasters()) >= 3


def test_the_start_up_check_names_the_file_that_does_not_come_through() -> None:
    chain = Upcasters([step(1, 2, broken), step(2, 3, v2_to_v3)], {**CURRENT_VERSIONS, "usage_delta": 1})
    with pytest.raises(ChainError, match=r"v1-release-0\.1\.avro: UpcasterFailed: usage_event v1→v2"):
        check_chain(chain)
