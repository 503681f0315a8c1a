"""Compose the steps into a chain from any released version to the current one, and prove it whole.

The chain is built when this module is imported by a process that reads, and
:func:`check_chain` runs every step on every corpus record at start: a hole, a cycle, a step above the
current version, or an output that its target schema refuses is an error that names the step.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import fastavro
from fastavro.validation import validate

from schemas.catalog import CURRENT_VERSIONS, LOCK_FILE, ROOT, released
from upcasters import usage_delta_v1_to_v2, usage_event_v1_to_v2, usage_event_v2_to_v3, values
from upcasters.values import Record, Rejected

STEPS: tuple[ModuleType, ...] = (usage_event_v1_to_v2, usage_event_v2_to_v3, usage_delta_v1_to_v2)


class ChainError(Exception):
    """The upcasters do not form one path to the current version. The message names the step."""


class MissingUpcaster(Exception):
    """A record's version is known, but no step leads from it to the current version."""


class UpcasterFailed(Exception):
    """A step raised. The cause is chained; its message may hold content, so only its class is logged."""


class InvalidAfterUpcast(Exception):
    """A step returned something its target schema refuses."""


@dataclass(frozen=True, slots=True)
class Step:
    """One upcaster: ``upcast`` turns a record of ``source`` into one of ``target`` (always source + 1)."""

    subject: str
    source: int
    target: int
    upcast: Callable[[Record], Record]

    @property
    def name(self) -> str:
        """``subject vN→vN+1``, for errors."""
        return f"{self.subject} v{self.source}→v{self.target}"


def _step(module: ModuleType) -> Step:
    return Step(module.SUBJECT, module.FROM, module.TO, module.upcast)


def build_chain(steps: Iterable[Step], current: Mapping[str, int]) -> dict[tuple[str, int], Step]:
    """The steps by (subject, source version), proven complete.

    Raises:
        ChainError: a cycle or a jump (target is not source + 1), two steps from one version, a step above the
            current version, or a hole below it.
    """
    chain: dict[tuple[str, int], Step] = {}
    for step in steps:
        if step.target != step.source + 1:
            raise ChainError(f"{step.name}: a step leads from N to N+1, never back and never further")
        if step.target > current.get(step.subject, 0):
            raise ChainError(f"{step.name}: leads above the current version {current.get(step.subject, 0)}")
        if (step.subject, step.source) in chain:
            raise ChainError(f"{step.name}: a second step from the same version")
        chain[step.subject, step.source] = step
    for subject, version in current.items():
        for source in range(1, version):
            if (subject, source) not in chain:
                raise ChainError(f"{subject} v{source}→v{source + 1}: the step is missing")
    return chain


class Upcasters:
    """The built chain. ``to_current`` is what every reader calls."""

    def __init__(self, steps: Iterable[Step], current: Mapping[str, int]) -> None:
        self._chain = build_chain(steps, current)
        self._current = dict(current)

    def path(self, subject: str, version: int) -> list[Step]:
        """The steps from ``version`` to the current one, in order: two for usage_event v1, none for v3.

        Raises:
            MissingUpcaster: no path, or a version above the current one.
        """
        current = self._current.get(subject, 0)
        if not 1 <= version <= current:
            raise MissingUpcaster(f"{subject} v{version}")
        return [self._chain[subject, source] for source in range(version, current)]

    def to_current(self, subject: str, version: int, record: Record) -> Record:
        """``record`` brought to the current version.

        Raises:
            MissingUpcaster: no path.
            UpcasterFailed: a step raised.
            InvalidAfterUpcast: a step's output fails its target schema.
            Rejected: a step found content that can never be counted.
        """
        for step in self.path(subject, version):
            try:
                record = step.upcast(record)
            except Rejected:
                raise
            except Exception as error:
                raise UpcasterFailed(step.name) from error
            if not _fits(subject, step.target, record):
                raise InvalidAfterUpcast(step.name)
        return record


def _fits(subject: str, version: int, record: Any) -> bool:
    plain = released()[subject, version].plain
    if not isinstance(record, dict) or record.keys() != {field["name"] for field in plain["fields"]}:
        return False
    try:
        return bool(validate(record, plain, raise_errors=False, strict=True))
    except Exception:
        return False


def upcasters() -> Upcasters:
    """The product's own chain."""
    return Upcasters((_step(module) for module in STEPS), CURRENT_VERSIONS)


@cache
def revision() -> str:
    """Names the schemas and upcasters of this release: another release of the same ones has the same name."""
    digest = hashlib.blake2b(LOCK_FILE.read_bytes(), digest_size=8)
    for module in (*STEPS, values):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def check_chain(chain: Upcasters) -> int:
    """Run the chain over every corpus record, and return how many there were.

    Raises:
        ChainError: a subject version without a corpus, or a record that does not come through.
    """
    checked = 0
    for (subject, version), schema in released().items():
        if version == CURRENT_VERSIONS[subject] == 1:
            continue
        files = sorted((ROOT / subject / "corpus").glob(f"v{version}-*.avro"))
        if not files:
            raise ChainError(f"schemas/{subject}/corpus has no v{version}-*.avro")
        for path in files:
            with path.open("rb") as stream:
                for record in fastavro.reader(stream, reader_schema=schema.plain):
                    try:
                        chain.to_current(subject, version, dict(record))
                    except Exception as error:
                        raise ChainError(f"{path.name}: {type(error).__name__}: {error}") from error
                    checked += 1
    return checked
