"""What is said about a change of schema is what Avro's resolution, as fastavro does it, then really does."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import catalog
from schemas.catalog import writers
from schemas.evolution import PRIMITIVES, differences, refusals
from services.wire.reader import compile_reader
from tests.strategies import values_of

SYMBOLS = ("a", "b", "c")
PLAIN = st.sampled_from(PRIMITIVES)
ENUM = st.lists(st.sampled_from(SYMBOLS), min_size=1, unique=True).map(
    lambda symbols: {"type": "enum", "name": "choice", "symbols": symbols}
)
FIXED = st.sampled_from([2, 3]).map(lambda size: {"type": "fixed", "name": "digits", "size": size})
COLLECTION = st.sampled_from([{"type": "map", "values": "string"}, {"type": "array", "items": "string"}])
ONE = st.one_of(PLAIN, ENUM, FIXED, COLLECTION)
TYPE = st.one_of(ONE, ONE.map(lambda kind: ["null", kind]))


def defaults_of(kind: Any) -> st.SearchStrategy[Any]:
    """A default as a schema may write it."""
    if isinstance(kind, list):
        return st.none()
    return values_of(kind).filter(lambda value: not isinstance(value, float) or math.isfinite(value))


def may_have_default(kind: Any) -> bool:
    """Bytes and fixed may not: a default of theirs is text, and libraries differ about it."""
    return isinstance(kind, list) or (kind["type"] if isinstance(kind, dict) else kind) not in (
        "bytes",
        "fixed",
    )


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A schema that we would release. A named type stands in it once: our reader follows no references."""
    fields, used = [], set()
    for name in draw(st.lists(st.sampled_from("pqrs"), min_size=1, unique=True)):
        kind = draw(TYPE)
        inner = kind[1] if isinstance(kind, list) else kind
        if isinstance(inner, dict) and inner.get("name") in used:
            kind = "string"
        elif isinstance(inner, dict):
            used.add(inner.get("name"))
        field = {"name": name, "type": kind, "doc": "A field."}
        if may_have_default(kind) and draw(st.booleans()):
            field["default"] = draw(defaults_of(kind))
        fields.append(field)
    return {"type": "record", "name": "thing", "namespace": "tests", "doc": "A record.", "fields": fields}


@st.composite
def changes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two schemas that have much in common."""
    old, other = draw(documents()), draw(documents())
    if draw(st.booleans()):
        return old, other
    taken = {field["name"] for field in old["fields"]}
    kept = [field for field in old["fields"] if draw(st.integers(0, 3))]
    names = {_named(field) for field in kept} - {None}
    more = [one for one in other["fields"] if one["name"] not in taken and _named(one) not in names]
    fields = draw(st.permutations(kept + more))
    return old, {**old, "fields": fields or other["fields"]}


def _named(field: dict[str, Any]) -> Any:
    kind = field["type"][1] if isinstance(field["type"], list) else field["type"]
    return kind.get("name") if isinstance(kind, dict) else None


def values_that_tell(kind: Any) -> list[Any]:
    """A few values of a type, between which every reader that cannot read all of them fails on one."""
    if isinstance(kind, list):
        return [None, *values_that_tell(kind[1])]
    if isinstance(kind, dict):
        match kind["type"]:
            case "enum":
                return list(kind["symbols"])
            case "fixed":
                return [b"x" * kind["size"]]
            case "map":
                return [{"k": "v"}]
            case _:
                return [["i"]]
    return {"string": ["t"], "bytes": [b"t"], "int": [7], "long": [7], "double": [0.25]}[kind]


def records_that_tell(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One usual record, and from it one for each other value of each field."""
    usual = {field["name"]: values_that_tell(field["type"])[-1] for field in document["fields"]}
    yield usual
    for field in document["fields"]:
        for value in values_that_tell(field["type"]):
            yield {**usual, field["name"]: value}


def body_of(document: dict[str, Any], record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, document, record, strict=True)
    return stream.getvalue()


def resolved(writer: dict[str, Any], reader: dict[str, Any], body: bytes) -> Any:
    """What fastavro makes of ``body``, or None."""
    try:
        return fastavro.schemaless_reader(io.BytesIO(body), writer, reader)
    except Exception:
        return None


def reads_all(writer: dict[str, Any], reader: dict[str, Any]) -> bool:
    return all(
        resolved(writer, reader, body_of(writer, record)) is not None for record in records_that_tell(writer)
    )


@given(changes())
@settings(max_examples=600, deadline=None)
def test_who_can_read_whom_is_said_exactly_as_avro_resolves(pair: tuple[Any, Any]) -> None:
    old, new = pair
    assert refusals(old) == refusals(new) == []
    found = differences(old, new)
    assert all(one.new_reads_old for one in found) == reads_all(old, new)
    assert all(one.old_reads_new for one in found) == reads_all(new, old)


@given(changes(), st.data())
@settings(max_examples=600, deadline=None)
def test_a_revision_is_read_as_avro_resolves_it_in_both_directions(
    pair: tuple[Any, Any], data: st.DataObject
) -> None:
    old, new = pair
    if not all(one.stays for one in differences(old, new)):
        return
    for writer, reader in ((old, new), (new, old)):
        record = data.draw(values_of(writer))
        body = body_of(writer, record)
        ours, theirs = compile_reader(writer, reader)(body, 0), resolved(writer, reader, body)
        assert repr(sorted(ours.items())) == repr(sorted(theirs.items()))  # text, or NaN were not NaN


@given(documents())
@settings(max_examples=300, deadline=None)
def test_what_is_not_refused_our_reader_compiles(document: dict[str, Any]) -> None:
    assert refusals(document) == []
    compile_reader(document)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), PLAIN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "name", "items", "symbols", "size", "fields"]), inner),
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A schema of which one part is something else."""

    def somewhere(node: Any) -> Any:
        if isinstance(node, dict) and node and draw(st.integers(0, 5)):
            key = draw(st.sampled_from(sorted(node)))
            return {**node, key: somewhere(node[key])}
        if isinstance(node, list) and node and draw(st.integers(0, 5)):
            at = draw(st.integers(0, len(node) - 1))
            return [*node[:at], somewhere(node[at]), *node[at + 1 :]]
        return draw(ANYTHING)

    return somewhere(draw(documents()))


@given(damaged())
@settings(max_examples=1000, deadline=None)
def test_whatever_a_file_holds_is_refused_by_name_or_can_be_read(document: Any) -> None:
    if not refusals(document):
        plain = catalog._without_logical_types(json.loads(json.dumps(document)))
        compile_reader(fastavro.parse_schema(plain))
        assert differences(document, document) == []


@given(documents())
@settings(max_examples=100, deadline=None)
def test_a_schema_does_not_differ_from_itself(document: dict[str, Any]) -> None:
    assert differences(document, document) == []


@pytest.mark.parametrize("schema", writers(), ids=lambda schema: schema.label)
def test_no_released_schema_would_be_refused(schema: Any) -> None:
    assert refusals(schema.document) == []
