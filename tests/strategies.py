"""Hypothesis strategies for records of the released schemas, in the plain form that the product uses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from schemas.catalog import Schema

_PRIMITIVES: dict[str, st.SearchStrategy[Any]] = {
    "null": st.none(),
    "boolean": st.booleans(),
    "string": st.text(max_size=20),
    "bytes": st.binary(max_size=40),
    "int": st.integers(-(2**31), 2**31 - 1),
    "long": st.integers(-(2**63), 2**63 - 1),
    "double": st.floats(width=64),
}


def records_of(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    """Anything that ``schema`` can hold, sensible or not."""
    return values_of(schema.plain)


def values_of(node: Any) -> st.SearchStrategy[Any]:
    """Values of one plain type."""
    if isinstance(node, list):
        return st.one_of([values_of(branch) for branch in node])
    if isinstance(node, str):
        return _PRIMITIVES[node]
    match node["type"]:
        case "record":
            return st.fixed_dictionaries(
                {field["name"]: values_of(field["type"]) for field in node["fields"]}
            )
        case "array":
            return st.lists(values_of(node["items"]), max_size=5)
        case "map":
            return st.dictionaries(st.text(max_size=10), values_of(node["values"]), max_size=5)
        case "enum":
            return st.sampled_from(node["symbols"])
        case "fixed":
            return st.binary(min_size=node["size"], max_size=node["size"])
        case other:
            return values_of(other)
