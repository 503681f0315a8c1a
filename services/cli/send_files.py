"""Usage events as lines of a file: NDJSON with the fields of the API, or CSV with a header of them.

Lines are read one at a time and checked by the rules of one event, so that a file of any size can be sent,
and what is wrong is found with its line number, before it travels.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO

from services.ingest.parse import (
    EVENT_FIELDS,
    JSON,
    Caller,
    Refusal,
    event_of_mapping,
    read_batch,
    refusal_of,
)
from services.web.problems import RequestRefused
from services.wire.errors import Invalid, Misconfigured
from services.wire.usage import UsageEvent, to_record

LINE_BYTES_MAX = 1024 * 1024
#: Stands in for the API key's tenant, which only the API knows, while the other rules are checked here.
_SOME_TENANT = "0"


class Format(StrEnum):
    """How lines are written."""

    NDJSON = "ndjson"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class Line:
    """One event and where it stands. ``number`` counts from 1."""

    number: int
    event: UsageEvent


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line that was not taken, by us or by the API."""

    number: int
    refusal: Refusal


def read_ndjson(stream: IO[bytes], caller: Caller) -> Iterator[Line | RefusedLine]:
    """One event per line, fields as in the API; empty lines are skipped."""
    number = 0
    while raw := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(raw) > LINE_BYTES_MAX:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(LINE_BYTES_MAX)
            yield RefusedLine(number, Refusal("line_too_long", "", f"has more than {LINE_BYTES_MAX} bytes"))
        elif raw.strip():
            yield _line_of_json(number, raw, caller)


def _line_of_json(number: int, raw: bytes, caller: Caller) -> Line | RefusedLine:
    try:
        batch = read_batch(raw, JSON, caller, events_max=1)
    except RequestRefused as error:
        return RefusedLine(
            number, Refusal(error.problem.code, error.problem.path or "", error.problem.message)
        )
    if batch.prefix:
        return RefusedLine(number, Refusal("line_invalid", "", "a line must hold one event object"))
    event = batch.events[0]
    return RefusedLine(number, event) if isinstance(event, Refusal) else _checked(number, event)


def _checked(number: int, event: UsageEvent) -> Line | RefusedLine:
    """The rules of one event, before it travels. The clock may differ from the API's by its tolerance."""
    try:
        to_record(
            event if event.tenant_id is not None else replace(event, tenant_id=_SOME_TENANT),
            source="cli",
            now_us=time.time_ns() // 1000,
        )
    except Invalid as error:
        return RefusedLine(number, refusal_of(error, event.idempotency_key))
    return Line(number, event)


def read_csv(stream: IO[str], caller: Caller) -> Iterator[Line | RefusedLine]:
    """One event per row under a header of field names; ``meta.NAME`` columns are properties.

    An empty cell is an absent field.

    Raises:
        Misconfigured: the header names an unknown column, or a column twice.
    """
    rows = csv.reader(stream)
    header = [name.strip() for name in next(rows, [])]
    plain = EVENT_FIELDS - {"meta", "properties"}
    for name in header:
        if (name not in plain and not name.startswith("meta.")) or header.count(name) > 1:
            raise Misconfigured(
                f"CSV column {name!r}: use each of {', '.join(sorted(plain))} or meta.NAME once"
            )
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield RefusedLine(rows.line_num, Refusal("row_invalid", "", "is not a CSV row"))
            continue
        if row:
            yield _line_of_row(rows.line_num, header, row, caller)


def _line_of_row(number: int, header: list[str], row: list[str], caller: Caller) -> Line | RefusedLine:
    if len(row) != len(header):
        return RefusedLine(
            number, Refusal("row_invalid", "", f"has {len(row)} cells, the header {len(header)}")
        )
    cells = {name: cell for name, cell in zip(header, row, strict=True) if cell}
    fields: dict[str, object] = {name: cell for name, cell in cells.items() if not name.startswith("meta.")}
    fields["meta"] = {name[len("meta.") :]: cell for name, cell in cells.items() if name.startswith("meta.")}
    try:
        event = event_of_mapping(fields, caller)
    except Invalid as error:
        return RefusedLine(number, refusal_of(error, fields.get("idempotencyKey")))
    return _checked(number, event)


def _binary(file: str) -> IO[bytes]:
    return Path(file).open("rb")


def open_lines(
    file: str, form: Format | None, caller: Caller, stack: ExitStack
) -> Iterator[Line | RefusedLine]:
    """The lines of ``file`` (``-``: standard input), which ``stack`` closes.

    Raises:
        Misconfigured: the file cannot be read.
    """
    if form is None:
        form = Format.CSV if Path(file).suffix.lower() == ".csv" else Format.NDJSON
    try:
        raw: IO[bytes] = sys.stdin.buffer if file == "-" else stack.enter_context(_binary(file))
    except OSError as error:
        raise Misconfigured(f"cannot read {file}: {error.strerror}") from None
    if form is Format.NDJSON:
        return read_ndjson(raw, caller)
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    stack.callback(text.detach)
    return read_csv(text, caller)
