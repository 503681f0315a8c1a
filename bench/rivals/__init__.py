"""The contestants of the counting benchmark, each a process of its own: ``python -m bench.rivals.<name>``.

A contestant reads its job, one JSON line, from standard input (among the arguments, the database's password
would be visible). It counts until it is killed, and writes ``first`` to standard output when it has its first
event in hand. Both rivals decode with the same few lines, so that neither is slower for that.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import fastavro

from schemas.catalog import current
from services.wire.codec import SINGLE_OBJECT_MAGIC, SINGLE_OBJECT_PREFIX_BYTES

HOUR_US = 3_600_000_000
FIRST = "first"
#: What the rivals call the state that the benchmark reads back from their changelogs.
SUMS_TABLE = "sums"
HOUR_PREFIX = "hour:"

Usage = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """Count ``topic`` as group ``group``, with state below ``directory`` or in the database ``dsn``."""

    bootstrap: str
    topic: str
    partitions: int
    group: str
    directory: str
    dsn: str

    def line(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self)) + "\n"


def read_job() -> Job:
    """The job on standard input. From now on this process ends when its owner does."""
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="owner").start()
    return job


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1.0)
    os._exit(1)


def say_first() -> None:
    """Tell the owner that the first event is in hand: its clock starts when it reads this."""
    os.write(1, f"{FIRST}\n".encode())


def usage_reader() -> Callable[[bytes], Usage]:
    """A decoder of current usage events; its first call is the first event in hand."""
    schema = current("usage_event")
    prefix = SINGLE_OBJECT_MAGIC + schema.fingerprint
    read, plain = fastavro.schemaless_reader, schema.plain
    touched = False

    def decode(value: bytes) -> Usage:
        nonlocal touched
        if not touched:
            touched = True
            say_first()
        if not value.startswith(prefix):
            raise ValueError("not a current usage event")
        event: Usage = read(io.BytesIO(value[SINGLE_OBJECT_PREFIX_BYTES:]), plain, None)
        return event

    return decode
