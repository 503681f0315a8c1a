"""What changed between two schemas, who can still read whom, and what no schema of ours may hold.

A change *stays* on its version, as a revision under a new fingerprint, when Avro's schema resolution bridges
it in both directions: this release reads what older ones wrote, and a reader that still reads into the older
schema reads what this one writes. Our own reader is stricter than Avro and converts nothing, so the type of a
field that both have must be the same. Everything else is a new version with an upcaster.

Avro's resolution ignores logical types. Here a changed one breaks both directions: the bytes would still be
read, and mean something else.

Documents are parsed JSON. Pure: no files, no clock.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import fastavro

#: What the compiled reader reads: ``services/wire/reader.py``; a test holds the two together.
PRIMITIVES: Final = ("string", "bytes", "int", "long", "double")

_LOGICAL: Final = ("logicalType", "precision", "scale")
_PROMOTIONS: Final = {
    ("int", "long"),
    ("int", "double"),
    ("long", "double"),
    ("string", "bytes"),
    ("bytes", "string"),
}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER_BITS: Final = {"int": 31, "long": 63}
#: Attributes that :func:`differences` compares one by one; others are only told of.
_FIELD_KEYS: Final = {"name", "type", "doc", "default"}
_TYPE_KEYS: Final = {"type", "name", "symbols", "size", "items", "values", "fields", "doc", *_LOGICAL}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that changed. ``path`` names the field, or is ``(record)``."""

    code: str
    path: str
    before: str
    after: str
    new_reads_old: bool
    old_reads_new: bool
    #: It may be released as a revision of the same version.
    stays: bool
    why: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that no schema of ours may hold, whatever its version."""

    code: str
    path: str
    why: str


# What no schema may hold ----------------------------------------------------------------------------------


def refusals(document: Any) -> list[Refusal]:
    """Why ``document`` can be no schema of ours; empty when it can."""
    found = list(_record_refusals(document))
    if found:
        return found
    try:
        fastavro.parse_schema(json.loads(json.dumps(document)))
    except Exception as error:
        return [Refusal("not_avro", "(record)", f"Avro refuses it: {type(error).__name__}: {error}")]
    return []


def _record_refusals(document: Any) -> Iterator[Refusal]:
    if not isinstance(document, Mapping) or document.get("type") != "record":
        yield Refusal("not_a_record", "(record)", "a schema of a topic is one record")
        return
    fields = document.get("fields")
    if not isinstance(document.get("name"), str) or not isinstance(fields, list):
        yield Refusal("not_avro", "(record)", "a record has a name and a list of fields")
        return
    if not fields:
        yield Refusal("zero_width_type", "(record)", "a record without fields has no bytes")
    yield from _named_refusals(document, "(record)")
    seen: set[str] = set()
    for field in fields:
        if not isinstance(field, Mapping) or not isinstance(field.get("name"), str) or "type" not in field:
            yield Refusal("not_avro", "(record)", "a field is an object with a name and a type")
            continue
        if _NAME.fullmatch(field["name"]) is None:
            yield Refusal(
                "not_avro", field["name"], "a name is letters, digits and _, and begins with no digit"
            )
        if field["name"] in seen:
            yield Refusal("not_avro", field["name"], "two fields have this name")
        seen.add(field["name"])
        yield from _named_refusals(field, field["name"])
        unfit = list(_type_refusals(field["type"], field["name"], _names_of(document)))
        yield from unfit
        if not unfit and "default" in field and not _fits(field["type"], field["default"]):
            yield Refusal(
                "invalid_default",
                field["name"],
                "a default is a value of the type, or null if it may be null; bytes and fixed have none",
            )


def _named_refusals(node: Mapping[str, Any], path: str) -> Iterator[Refusal]:
    if not isinstance(node.get("doc"), str) or not node["doc"].strip():
        yield Refusal("missing_doc", path, "every record and every field says in `doc` what it is")
    if node.get("aliases"):
        yield Refusal("aliases", path, "our reader knows no aliases, and others would read another value")


def _names_of(document: Mapping[str, Any]) -> set[str]:
    name = document["name"]
    return {name, f"{document.get('namespace', '')}.{name}", name.rpartition(".")[2]}


def _type_refusals(node: Any, path: str, enclosing: set[str]) -> Iterator[Refusal]:
    if isinstance(node, list):
        yield from _union_refusals(node, path, enclosing)
        return
    if isinstance(node, Mapping) and isinstance(node.get("type"), Mapping | list):
        yield Refusal("type_not_read", path, "a type inside a type of no name; write the inner one alone")
        return
    kind = node.get("type") if isinstance(node, Mapping) else node
    more = node if isinstance(node, Mapping) else {}
    if kind == "null":
        yield Refusal("zero_width_type", path, "null alone has no bytes; make it a union of null and a type")
    elif kind in enclosing:
        yield Refusal("recursive_type", path, "a record inside itself can be as deep as its writer likes")
    elif kind in ("map", "array"):
        yield from _collection_refusals(more, path, enclosing)
    elif kind == "enum":
        symbols = more.get("symbols")
        if not isinstance(symbols, list):
            yield Refusal("not_avro", path, "an enum has a list of symbols")
        elif not symbols:
            yield Refusal("zero_width_type", path, "an enum without symbols has no value")
    elif kind == "fixed":
        size = more.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            yield Refusal("zero_width_type", path, "a fixed needs a size of at least one byte")
    elif kind == "record" and not more.get("fields"):
        yield Refusal("zero_width_type", path, "a record without fields has no bytes")
    elif kind == "record":
        yield Refusal("type_not_read", path, "our reader reads no record inside a record; flatten it")
    elif kind not in PRIMITIVES:
        yield Refusal("type_not_read", path, f"our reader reads no {_text(kind)}")
    elif kind == "bytes" and more.get("logicalType") == "decimal":
        yield Refusal("bytes_decimal", path, "a decimal in bytes has no bound; use a fixed of 16 bytes")
    elif set(more) - {"type", "doc", *_LOGICAL}:
        yield Refusal(
            "type_not_read", path, "our reader knows no attributes of a plain type but logical ones"
        )
    if kind in ("enum", "fixed") and more.get("aliases"):
        yield Refusal("aliases", path, "our reader knows no aliases, and others would read another value")


def _union_refusals(node: list[Any], path: str, enclosing: set[str]) -> Iterator[Refusal]:
    if len(node) != 2 or node[0] != "null" or isinstance(node[1], list) or _kind(node[1]) == "null":
        yield Refusal("union", path, "the only union is of null, which stands first, and one other type")
        return
    yield from _type_refusals(node[1], path, enclosing)


def _collection_refusals(node: Mapping[str, Any], path: str, enclosing: set[str]) -> Iterator[Refusal]:
    inner = node.get("items" if node["type"] == "array" else "values")
    below = f"{path}[]"
    deeper = list(_type_refusals(inner, below, enclosing))
    yield from deeper
    if not deeper and inner != "string" and inner != {"type": "string"}:
        yield Refusal("type_not_read", below, "our reader reads only maps and arrays of strings")


def _fits(node: Any, default: Any) -> bool:
    """Whether ``default`` is a value of a type that :func:`_type_refusals` lets pass."""
    if isinstance(node, list):
        return default is None
    kind = _kind(node)
    if kind in _INTEGER_BITS:
        limit = 1 << _INTEGER_BITS[kind]
        return isinstance(default, int) and not isinstance(default, bool) and -limit <= default < limit
    if kind == "double":
        return isinstance(default, int | float) and not isinstance(default, bool) and math.isfinite(default)
    if kind == "array":
        return isinstance(default, list) and all(isinstance(item, str) for item in default)
    if kind == "map":
        return isinstance(default, dict) and all(isinstance(item, str) for item in default.values())
    if kind == "enum":
        return default in node["symbols"]
    # A default of bytes is text, and libraries differ about whether they turn it back into bytes.
    return kind == "string" and isinstance(default, str)


# What changed ---------------------------------------------------------------------------------------------


def differences(old: Any, new: Any) -> list[Difference]:
    """Every difference between two documents that :func:`refusals` lets pass, in the order of the fields."""
    found = list(_record_differences(old, new))
    before = {field["name"]: field for field in old["fields"]}
    after = {field["name"]: field for field in new["fields"]}
    for name in [*after, *(name for name in before if name not in after)]:
        if name not in before:
            found.append(_added(after[name]))
        elif name not in after:
            found.append(_removed(before[name]))
        else:
            found += _field_differences(name, before[name], after[name])
    kept = [name for name in before if name in after]
    if kept != [name for name in after if name in before]:
        found.append(
            _harmless("order_changed", "(record)", ", ".join(before), ", ".join(after), "fields go by name")
        )
    return found


def _record_differences(old: Any, new: Any) -> Iterator[Difference]:
    names = [f"{one['namespace']}.{one['name']}" if "namespace" in one else one["name"] for one in (old, new)]
    if names[0] != names[1]:
        yield Difference(
            "record_renamed", "(record)", names[0], names[1], False, False, False, "Avro resolves by name"
        )
    yield from _told(old, new, "(record)", {"type", "name", "namespace", "doc", "fields"})


def _added(field: Any) -> Difference:
    with_default = "default" in field
    return Difference(
        "field_added" if with_default else "field_added_without_default",
        field["name"],
        "–",
        _text(field["type"]),
        with_default,
        True,
        with_default,
        "read from older records as its default; readers of the older schema skip it"
        if with_default
        else "older records do not have it, and there is no default to read instead",
    )


def _removed(field: Any) -> Difference:
    had_default = "default" in field
    return Difference(
        "field_removed" if had_default else "field_removed_without_default",
        field["name"],
        _text(field["type"]),
        "–",
        True,
        had_default,
        had_default,
        "skipped in older records; readers of the older schema fill in its default"
        if had_default
        else "readers of the older schema need it and have no default to read instead",
    )


def _field_differences(name: str, old: Any, new: Any) -> Iterator[Difference]:
    yield from _type_difference(name, old["type"], new["type"])
    if ("default" in old) != ("default" in new):
        code = "default_added" if "default" in new else "default_removed"
        yield _harmless(code, name, *_defaults(old, new), "no record lacks the field")
    elif "default" in old and not _same(old["default"], new["default"]):
        why = "records of a revision without the field would mean something else from now on"
        yield Difference("default_changed", name, *_defaults(old, new), True, True, False, why)
    yield from _told(old, new, name, _FIELD_KEYS)


def _defaults(old: Any, new: Any) -> tuple[str, str]:
    before, after = (_text(one["default"]) if "default" in one else "–" for one in (old, new))
    return before, after


def _type_difference(name: str, old: Any, new: Any) -> Iterator[Difference]:
    """At most one difference of type, and what is only told of."""
    texts = _text(old), _text(new)
    logical = _logical(old), _logical(new)
    before, after = _shape(old), _shape(new)
    if before == after and logical[0] == logical[1]:
        inner = [one[1] if isinstance(one, list) else one for one in (old, new)]
        if all(isinstance(one, Mapping) for one in inner):
            yield from _told(inner[0], inner[1], name, _TYPE_KEYS)
        return
    if before == after:
        why = "the bytes stay the same and would mean something else: the fingerprint cannot tell"
        yield Difference("logical_type_changed", name, *texts, False, False, False, why)
        return
    same_meaning = logical[0] == logical[1]
    forward, backward = resolves(old, new) and same_meaning, resolves(new, old) and same_meaning
    code = "type_changed"
    if isinstance(old, list) != isinstance(new, list):
        code = "null_added" if isinstance(new, list) else "null_removed"
    elif _kind(_branch(old)) == _kind(_branch(new)):
        code = {"enum": "symbols_changed", "fixed": "size_changed"}.get(_kind(_branch(new)), code)
    yield Difference(code, name, *texts, forward, backward, False, _why(forward, backward))


def _why(forward: bool, backward: bool) -> str:
    if forward and backward:
        return "Avro would read it both ways, but our reader converts nothing"
    if forward:
        return "older records can be read, but readers of the older schema cannot read newer ones"
    if backward:
        return "readers of the older schema can read newer records, but older ones cannot be read"
    return "neither can read the other's records"


def resolves(writer: Any, reader: Any) -> bool:
    """Whether Avro's schema resolution reads every value of type ``writer`` as ``reader`` (1.12)."""
    if isinstance(writer, list) and not isinstance(reader, list):
        return False
    writer, reader = _branch(writer), _branch(reader)
    kinds = _kind(writer), _kind(reader)
    if kinds[0] != kinds[1]:
        return kinds in _PROMOTIONS
    if kinds[0] in ("enum", "fixed") and _short(writer) != _short(reader):
        return False
    if kinds[0] == "enum":
        return set(writer["symbols"]) <= set(reader["symbols"]) or "default" in reader
    return kinds[0] != "fixed" or writer["size"] == reader["size"]


def logical_types(document: Any) -> list[tuple[str, Any]]:
    """Every field's name and logical type: what a fingerprint does not tell."""
    return [(field["name"], _logical(field["type"])) for field in document["fields"]]


def _told(old: Any, new: Any, path: str, known: set[str]) -> Iterator[Difference]:
    if old.get("doc") != new.get("doc"):
        yield _harmless(
            "doc_changed", path, _text(old.get("doc")), _text(new.get("doc")), "no reader reads it"
        )
    for key in sorted((set(old) | set(new)) - known):
        if old.get(key) != new.get(key):
            texts = _text(old.get(key)), _text(new.get(key))
            yield _harmless(
                "attribute_changed", path, f"{key}: {texts[0]}", f"{key}: {texts[1]}", "told of only"
            )


def _harmless(code: str, path: str, before: str, after: str, why: str) -> Difference:
    return Difference(code, path, before, after, True, True, True, why)


def _branch(node: Any) -> Any:
    return node[1] if isinstance(node, list) else node


def _kind(node: Any) -> str:
    return str(node["type"]) if isinstance(node, Mapping) and "type" in node else str(node)


def _short(node: Any) -> str:
    return str(node["name"]).rpartition(".")[2]


def _logical(node: Any) -> tuple[Any, ...]:
    node = _branch(node)
    return tuple(node.get(key) for key in _LOGICAL) if isinstance(node, Mapping) else (None,) * len(_LOGICAL)


def _shape(node: Any) -> Any:
    """What decides the bytes, and the names that Avro resolves by."""
    inner = _branch(node)
    kind = _kind(inner)
    rest: tuple[Any, ...] = ()
    if kind in ("enum", "fixed"):
        rest = (_short(inner), tuple(inner.get("symbols", ())), inner.get("size"))
    return isinstance(node, list), kind, rest


def _same(left: Any, right: Any) -> bool:
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def _text(node: Any) -> str:
    """A type or value, short: ``null or long (timestamp-micros)``."""
    if isinstance(node, list) and len(node) == 2 and node[0] == "null":
        return f"null or {_text(node[1])}"
    if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
        return node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
    kind = node["type"]
    if kind in ("map", "array"):
        kind = f"{kind} of {_text(node.get('values', node.get('items')))}"
    elif kind == "fixed":
        kind = f"fixed {node.get('name')}[{node.get('size')}]"
    elif kind == "enum":
        kind = f"enum {node.get('name')} {{{', '.join(map(str, node.get('symbols', ())))}}}"
    logical = ", ".join(
        f"{node[key]}" if key == "logicalType" else f"{key} {node[key]}" for key in _LOGICAL if key in node
    )
    return f"{kind} ({logical})" if logical else kind
