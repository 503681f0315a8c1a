"""A counters worker with one deliberate fault, run as a program: ``faulty_worker.py <fault>``.

raise_in_prepare, raise_in_apply   an exception that nobody foresaw, at a chunk that holds the text ``bomb``
block_in_apply                     at the same chunk, a call that never returns
raise_at                           that exception at record TIDEMETER_RAISE_AT, in TIDEMETER_RAISE_IN
bad_upcasters                      the chain's second version has no way on, and steps that fail by key
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from schemas.catalog import CURRENT_VERSIONS
from services.counters import agent
from services.counters.ledger import Counters
from services.streaming.chunks import Chunk
from services.wire.log import configure_logging
from services.wire.settings import load_settings
from upcasters import usage_event_v1_to_v2
from upcasters.chain import MissingUpcaster, Step, Upcasters, upcasters

FAULT = sys.argv[1]


def _is_bomb(chunk: Chunk) -> bool:
    return any(b"bomb" in (record.value or b"") for record in chunk.records)


_left = {os.environ.get("TIDEMETER_RAISE_IN"): int(os.environ.get("TIDEMETER_RAISE_AT", "0"))}


def _count_down(step: str, chunk: Chunk) -> None:
    """Raise in the chunk that holds the record that was named, counted from this process's first."""
    if FAULT == "raise_at" and step in _left:
        _left[step] -= len(chunk.records)
        if _left[step] <= 0:
            raise RuntimeError("nobody foresaw this")


class FaultyCounters(Counters):
    def prepare(self, chunk: Chunk) -> Any:
        _count_down("prepare", chunk)
        if FAULT == "raise_in_prepare" and _is_bomb(chunk):
            raise RuntimeError("nobody foresaw this")
        return super().prepare(chunk)

    def apply(self, db: Any, prepared: Any) -> Any:
        _count_down("apply", prepared.chunk)
        if FAULT == "raise_in_apply" and _is_bomb(prepared.chunk):
            raise RuntimeError("nobody foresaw this")
        if FAULT == "block_in_apply" and _is_bomb(prepared.chunk):
            time.sleep(3600)
        return super().apply(db, prepared)


def _faulty_step(record: dict[str, Any]) -> dict[str, Any]:
    if record["event_id"].startswith("raises"):
        raise RuntimeError("the step fails")
    if record["event_id"].startswith("shapeless"):
        return {"nonsense": 1}
    if record["event_id"].startswith("not-a-record"):
        return None  # type: ignore[return-value]
    return usage_event_v1_to_v2.upcast(record)


class FaultyUpcasters(Upcasters):
    def path(self, subject: str, version: int) -> list[Step]:
        if (subject, version) == ("usage_event", 2):
            raise MissingUpcaster(f"{subject} v2")
        return super().path(subject, version)


def _faulty_upcasters() -> Upcasters:
    """The product's chain, but for the first step of usage events."""
    whole = upcasters()
    good = [
        whole.path(subject, version)[0]
        for subject, current in CURRENT_VERSIONS.items()
        for version in range(1, current)
        if (subject, version) != ("usage_event", 1)
    ]
    return FaultyUpcasters([Step("usage_event", 1, 2, _faulty_step), *good], CURRENT_VERSIONS)


agent.Counters = FaultyCounters  # type: ignore[misc]
if FAULT == "bad_upcasters":
    agent.upcasters = _faulty_upcasters
    agent.check_chain = lambda chain: 0
settings = load_settings()
configure_logging(settings.log_level, settings.log_format)
asyncio.run(agent.run(settings))
