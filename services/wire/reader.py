"""Compile an Avro schema into a Python function that reads its records.

fastavro looks each field's type up again for every record, 5.3 µs for a usage event here; a function written
for one schema needs 3.3 µs. Decoding is the largest part of counting, so it is worth these lines. The subset
is what our own schemas use: records of string, bytes, int, long, double, fixed, enum, array and map of
strings, and unions with null. Tests hold it against fastavro, value for value and refusal for refusal.

Reads nothing past the end: slices stop there and the final position would not fit. Varints are at most ten
bytes (Avro 1.12, "Binary encoding"); a count costs at least one byte for each item, so none can run away.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

#: Reads the record that begins at an index and ends with the bytes.
Reader = Callable[[bytes, int], dict[str, Any]]

_VARINT_BITS_MAX = 63
_UNSIGNED_MAX = 2**64 - 1


class NotOneRecord(ValueError):
    """The bytes are not exactly one record of the schema."""


def read_long(data: bytes, at: int) -> tuple[int, int]:
    """A zigzag varint and the index after it.

    Raises:
        IndexError: it runs past the end.
        NotOneRecord: it has more than ten bytes, or more than 64 bits.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _UNSIGNED_MAX:
                raise NotOneRecord("number of more than 64 bits")
            return (value >> 1) ^ -(value & 1), at
        shift += 7
        if shift > _VARINT_BITS_MAX:
            raise NotOneRecord("varint of more than ten bytes")


def compile_reader(schema: Any, shape: Any = None) -> Reader:
    """The reader of a plain record schema (see ``schemas.catalog``).

    ``shape`` is another revision of the same version (see ``schemas.evolution``): the records come out with
    its fields, what was not written as its default, and what it does not have left out.

    Raises:
        ValueError: the schema uses a type outside the subset.
        KeyError: a field of the shape was not written and has no default.
    """
    lines = ["def read(data, at):"]
    written: dict[str, str] = {}
    for number, field in enumerate(schema["fields"]):
        name = written[field["name"]] = f"v{number}"
        lines += _indent(_value(field["type"], name))
    names = [
        f"{field['name']!r}: {written.get(field['name']) or _default(field)}"
        for field in (shape or schema)["fields"]
    ]
    lines += ["    if at != len(data):", "        raise NotOneRecord", f"    return {{{', '.join(names)}}}"]
    scope: dict[str, Any] = {
        "read_long": read_long,
        "NotOneRecord": NotOneRecord,
        "double": struct.Struct("<d").unpack_from,
    }
    exec("\n".join(lines), scope)  # noqa: S102  (source made from our own, locked schemas only)
    reader: Reader = scope["read"]
    return reader


def _default(field: Any) -> str:
    """A field's default as source, so that each record gets a map or array of its own."""
    return repr(float(field["default"]) if field["type"] == "double" else field["default"])


def _indent(lines: list[str], levels: int = 1) -> list[str]:
    return [" " * 4 * levels + line for line in lines]


def _length(into: str) -> list[str]:
    """A length: nearly always one byte, and never negative."""
    return [
        f"{into} = data[at]",
        f"if {into} & 0x81:",
        f"    {into}, at = read_long(data, at)",
        f"    if {into} < 0: raise NotOneRecord",
        "else:",
        f"    {into} >>= 1",
        "    at += 1",
    ]


def _value(kind: Any, into: str) -> list[str]:
    """Source lines that read one value of ``kind`` at ``at`` into the variable ``into``."""
    if isinstance(kind, list):
        return _union(kind, into)
    if isinstance(kind, dict):
        return _complex(kind, into)
    if kind in ("string", "bytes"):
        decode = ".decode()" if kind == "string" else ""
        return [*_length("n"), "end = at + n", f"{into} = data[at:end]{decode}", "at = end"]
    if kind in ("int", "long"):
        return [f"{into}, at = read_long(data, at)"]
    if kind == "double":
        return ["if at + 8 > len(data): raise NotOneRecord", f"{into} = double(data, at)[0]", "at += 8"]
    raise ValueError(f"the reader has no {kind!r}")


def _union(kinds: list[Any], into: str) -> list[str]:
    if len(kinds) != 2 or kinds[0] != "null":
        raise ValueError("the reader knows only unions of null and one other type")
    return [
        "branch = data[at]",
        "at += 1",
        "if branch == 0:",
        f"    {into} = None",
        "elif branch == 2:",
        *_indent(_value(kinds[1], into)),
        "else:",
        "    raise NotOneRecord",
    ]


def _complex(kind: dict[str, Any], into: str) -> list[str]:
    if kind["type"] == "fixed":
        return [f"end = at + {kind['size']}", f"{into} = data[at:end]", "at = end"]
    if kind["type"] == "enum":
        symbols = tuple(kind["symbols"])
        return [*_length("n"), f"if n >= {len(symbols)}: raise NotOneRecord", f"{into} = {symbols!r}[n]"]
    if kind["type"] == "map" and kind["values"] == "string":
        return _blocks(
            into, "{}", [*_value("string", "key"), *_value("string", "item"), f"{into}[key] = item"]
        )
    if kind["type"] == "array" and kind["items"] == "string":
        return _blocks(into, "[]", [*_value("string", "item"), f"{into}.append(item)"])
    raise ValueError(f"the reader has no {kind['type']!r} of this kind")


def _blocks(into: str, empty: str, item: list[str]) -> list[str]:
    """Blocks of items: a count each, zero at the end; a negative count is followed by a size in bytes."""
    return [
        f"{into} = {empty}",
        "count, at = (data[at] >> 1, at + 1) if not data[at] & 0x81 else read_long(data, at)",
        "while count:",
        "    if count < 0:",
        "        count, (_, at) = -count, read_long(data, at)",
        "    while count:",
        *_indent(item, 2),
        "        count -= 1",
        "    count, at = (data[at] >> 1, at + 1) if not data[at] & 0x81 else read_long(data, at)",
    ]
