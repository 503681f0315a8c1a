"""Stripe's request encoding: `payload[value]=5&expand[]=x` becomes nested values; readers check them.

Everything refused here is parameter validation: it happens before execution and is never stored for an
Idempotency-Key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias
from urllib.parse import unquote_plus

from services.stripe_simulator.errors import InvalidParameters

FormValue: TypeAlias = "str | list[FormValue] | dict[str, FormValue]"
Form: TypeAlias = "dict[str, FormValue]"

FIELDS_MAX = 500
DEPTH_MAX = 6
NAMES_CACHED = 1024
TEXT_LENGTH_MAX = 5000
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


def decode_form(encoded: str) -> Form:
    form: Form = {}
    fields = encoded.split("&", FIELDS_MAX) if encoded else []
    if len(fields) > FIELDS_MAX:
        raise InvalidParameters(f"Invalid request body: it has more than {FIELDS_MAX} parameters.")
    for field in fields:
        name, _, value = field.partition("=")
        _place(form, _path(name), _unescape(value))
    return form


def _unescape(escaped: str) -> str:
    if "%" not in escaped and "+" not in escaped:
        return escaped
    try:
        return unquote_plus(escaped, errors="strict")
    except ValueError as error:
        raise InvalidParameters("Invalid request body: it is not UTF-8.") from error


@lru_cache(maxsize=NAMES_CACHED)
def _path(escaped: str) -> tuple[str, ...]:
    """`payload[value]` as its parts; clients send the same few names over and over."""
    name = _unescape(escaped)
    if "[" not in name:
        return (name,)
    matched = _NAME.fullmatch(name)
    if matched is None:
        raise InvalidParameters(f"Invalid parameter name: {name}", param=name)
    path = (matched[1], *re.findall(r"\[([^\[\]]*)\]", matched[2]))
    if len(path) > DEPTH_MAX:
        raise InvalidParameters(f"Invalid parameter name: {name} is nested too deeply", param=path[0])
    return path


def _place(form: Form, path: tuple[str, ...], value: str) -> None:
    if path == ("",):
        return
    branch = form
    for depth, part in enumerate(path[:-1]):
        follows_list = path[depth + 1] == ""
        child = branch.setdefault(part, [] if follows_list else {})
        if isinstance(child, list) and follows_list and depth + 2 == len(path):
            child.append(value)
            return
        if not isinstance(child, dict):
            raise InvalidParameters(f"Invalid {path[0]}: it mixes shapes", param=path[0])
        branch = child
    branch[path[-1]] = value


class Params:
    """One level of parameters: each reader takes its name off, `finish` refuses what nobody took."""

    def __init__(self, form: Mapping[str, FormValue], inside: str = "") -> None:
        self._left = dict(form)
        self._inside = inside
        self._expand = None if inside else self._left.pop("expand", None)  # accepted on every call

    def name(self, name: str) -> str:
        return f"{self._inside}[{name}]" if self._inside else name

    def text(self, name: str, *, length_max: int = TEXT_LENGTH_MAX) -> str | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str):
            raise InvalidParameters(f"Invalid string: {self.name(name)}", param=self.name(name))
        if len(value) > length_max:
            message = f"Invalid string: {value[:20]}...; must be at most {length_max} characters"
            raise InvalidParameters(message, param=self.name(name))
        return value

    def required_text(self, name: str, *, length_max: int = TEXT_LENGTH_MAX) -> str:
        value = self.text(name, length_max=length_max)
        if value is None:
            raise self.missing(name)
        if not value:
            message = f"You passed an empty string for '{self.name(name)}'."
            raise InvalidParameters(message, code="parameter_invalid_empty", param=self.name(name))
        return value

    def missing(self, name: str) -> InvalidParameters:
        full = self.name(name)
        return InvalidParameters(f"Missing required param: {full}.", code="parameter_missing", param=full)

    def integer(self, name: str) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        if not _INTEGER.fullmatch(value):
            message = f"Invalid integer: {value}"
            raise InvalidParameters(message, code="parameter_invalid_integer", param=self.name(name))
        return int(value)

    def required_integer(self, name: str) -> int:
        value = self.integer(name)
        if value is None:
            raise self.missing(name)
        return value

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            message = f"Invalid {self.name(name)}: must be one of {', '.join(allowed)}"
            raise InvalidParameters(message, param=self.name(name))
        return value

    def nested(self, name: str) -> Params:
        value = self._left.pop(name, {})
        if not isinstance(value, dict):
            raise InvalidParameters(f"Invalid object: {self.name(name)}", param=self.name(name))
        return Params(value, self.name(name))

    def has(self, name: str) -> bool:
        return name in self._left

    def texts(self, name: str) -> list[str]:
        """A list of strings, however it was written: `a[]=x`, `a[0]=x`, JSON; empty when absent."""
        value = self._left.pop(name, None)
        items = [] if value is None else list(value.values()) if isinstance(value, dict) else value
        if not isinstance(items, list) or not all(isinstance(one, str) for one in items):
            raise InvalidParameters(f"Invalid array: {self.name(name)}", param=self.name(name))
        return [one for one in items if isinstance(one, str)]

    def expand(self) -> list[str]:
        """Which references the answer shows whole; endpoints without any never ask."""
        return [] if self._expand is None else Params({"expand": self._expand}, "expand").texts("expand")

    def flag(self, name: str) -> bool | None:
        value = self.choice(name, ("true", "false"))
        return None if value is None else value == "true"

    def objects(self, name: str) -> list[Params]:
        """A list of objects, `items[0][price]=…`, in the order of their numbers; empty when absent."""
        level = self.nested(name)
        numbers = [key for key in level._left if key.isdecimal()]
        return [level.nested(number) for number in sorted(numbers, key=int)]

    def bounds(self, name: str) -> dict[str, int]:
        """A filter by time, `created=5` or `created[gte]=5`: the moment for each operator."""
        if isinstance(self._left.get(name), str):
            return {"eq": self.required_integer(name)}
        level = self.nested(name)
        given = {operator: level.integer(operator) for operator in ("gt", "gte", "lt", "lte")}
        level.finish()
        return {operator: moment for operator, moment in given.items() if moment is not None}

    def text_map(self, name: str, *, length_max: int) -> dict[str, str] | None:
        """A flat map of strings (`payload`, `metadata`); None when absent."""
        value = self._left.pop(name, None)
        if value is None or value == "":
            return None
        if not isinstance(value, dict):
            raise InvalidParameters(f"Invalid object: {self.name(name)}", param=self.name(name))
        read = Params(value, self.name(name))
        return {key: read.text(key, length_max=length_max) or "" for key in value}

    def everything(self) -> Form:
        """All that is left, for a reader of its own."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        if self._left:
            name = self.name(next(iter(self._left)))
            message = f"Received unknown parameter: {name}"
            raise InvalidParameters(message, code="parameter_unknown", param=name)
