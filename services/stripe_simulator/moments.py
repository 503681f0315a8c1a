"""Moments as v2 writes them: RFC 3339 strings in UTC with milliseconds, where v1 has Unix seconds."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def rfc3339(epoch_seconds: float) -> str:
    return datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def read_rfc3339(written: str) -> int:
    """Unix seconds, the fraction dropped; ValueError unless it is a full date, time and offset."""
    if not _RFC3339.fullmatch(written):
        raise ValueError("not an RFC 3339 moment")
    try:
        return int(datetime.fromisoformat(written.upper()).timestamp() // 1)
    except OverflowError as error:
        raise ValueError("out of range") from error
