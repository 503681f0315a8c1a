"""Find a released Avro schema by subject and version, or by its fingerprint.

Every schema is kept twice: as published (with logical types, for stock readers and for writing
documentation), and *plain*, with logical types removed. The product reads and writes the plain form:
timestamps are then integers (microseconds) and decimals are bytes, which is exact and several times faster
than building ``datetime`` and ``Decimal`` objects for each record.

Fingerprints are CRC-64-AVRO of the parsing canonical form (Avro 1.12 specification, "Schema
Fingerprints"). That form drops ``logicalType``, ``default`` and ``doc``: a change from milliseconds to
microseconds would keep the fingerprint. Hence two rules, checked by :func:`check_catalog`: no two released
schemas share a fingerprint, and no released file changes (``LOCK``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

ROOT = Path(__file__).parent
LOCK_FILE = ROOT / "LOCK"

#: Subjects and their current version: the one this release writes and the upcasters lead to.
CURRENT_VERSIONS: dict[str, int] = {
    "usage_event": 3,
    "usage_delta": 2,
    "conflict": 1,
    "adjustment": 1,
    "ops_event": 1,
    "stripe_webhook": 1,
}


class CatalogError(Exception):
    """The schema files do not hold together. The message names the file and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """One released schema. ``fingerprint`` is the 8 bytes after ``C3 01`` on the wire, little-endian."""

    subject: str
    version: int
    path: Path
    published: Any
    plain: Any
    fingerprint: bytes

    @property
    def name(self) -> str:
        """``subject/version``, as in the record header ``tidemeter-schema``."""
        return f"{self.subject}/{self.version}"


def _without_logical_types(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_logical_types(part) for part in node]
    if isinstance(node, dict):
        kept = {
            key: _without_logical_types(part)
            for key, part in node.items()
            if key not in ("logicalType", "precision", "scale", "doc")
        }
        return kept["type"] if set(kept) == {"type"} and isinstance(kept["type"], str) else kept
    return node


def _read(path: Path, subject: str, version: int) -> Schema:
    document = json.loads(path.read_text(encoding="utf-8"))
    canonical = to_parsing_canonical_form(document)
    crc = bytes.fromhex(fingerprint(canonical, "CRC-64-AVRO"))
    return Schema(
        subject=subject,
        version=version,
        path=path,
        published=fastavro.parse_schema(document),
        plain=fastavro.parse_schema(_without_logical_types(document)),
        fingerprint=crc,
    )


@cache
def released() -> dict[tuple[str, int], Schema]:
    """Every released schema by (subject, version)."""
    found: dict[tuple[str, int], Schema] = {}
    for subject in CURRENT_VERSIONS:
        for path in sorted((ROOT / subject).glob("v*.avsc")):
            version = int(path.stem[1:])
            found[subject, version] = _read(path, subject, version)
    return found


@cache
def by_fingerprint() -> dict[bytes, Schema]:
    """Every released schema by its 8 fingerprint bytes."""
    return {schema.fingerprint: schema for schema in released().values()}


def current(subject: str) -> Schema:
    """The schema this release writes for ``subject``.

    Raises:
        KeyError: no such subject.
    """
    return released()[subject, CURRENT_VERSIONS[subject]]


def lock_lines() -> list[str]:
    """``<sha256>  <path below schemas/>`` of every file that must never change, sorted by path."""
    frozen = [*ROOT.glob("*/v*.avsc"), *ROOT.glob("*/corpus/*.avro"), *ROOT.glob("postgres/*.sql")]
    return [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(ROOT).as_posix()}"
        for path in sorted(frozen)
    ]


def check_catalog() -> None:
    """Prove at start that the released files are whole, unedited and distinguishable.

    Raises:
        CatalogError: a version is missing, two schemas share a fingerprint, or a file differs from ``LOCK``.
    """
    schemas = released()
    for subject, version in CURRENT_VERSIONS.items():
        missing = [n for n in range(1, version + 1) if (subject, n) not in schemas]
        if missing:
            raise CatalogError(
                f"schemas/{subject}: version {missing[0]} is missing; released files must stay"
            )
    seen: dict[bytes, Schema] = {}
    for schema in schemas.values():
        twin = seen.setdefault(schema.fingerprint, schema)
        if twin is not schema:
            raise CatalogError(
                f"{schema.name} and {twin.name} have the same fingerprint; Avro's canonical form ignores "
                "logical types, defaults and docs, so the new version must also rename a field or the record"
            )
    if lock_lines() != LOCK_FILE.read_text(encoding="utf-8").splitlines():
        raise CatalogError(
            "a released schema, corpus or migration file differs from schemas/LOCK; restore it, or, for "
            "a new file only, run `python -m schemas.catalog` and commit the new LOCK"
        )


def write_lock() -> None:
    """Add new files to ``LOCK``.

    Raises:
        CatalogError: a file that is already locked was edited or removed.
    """
    old = set(LOCK_FILE.read_text(encoding="utf-8").splitlines()) if LOCK_FILE.exists() else set()
    new = lock_lines()
    lost = sorted(old - set(new))
    if lost:
        raise CatalogError(f"released file edited or removed: {lost[0].split('  ')[1]}")
    LOCK_FILE.write_text("\n".join(new) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_lock()
