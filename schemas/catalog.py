"""Find a released Avro schema by subject and version, or by its fingerprint.

Every schema is kept twice: as published (with logical types, for stock readers and for writing
documentation), and *plain*, with logical types removed. The product reads and writes the plain form:
timestamps are then integers (microseconds) and decimals are bytes, which is exact and several times faster
than building ``datetime`` and ``Decimal`` objects for each record.

Fingerprints are CRC-64-AVRO of the parsing canonical form (Avro 1.12 specification, "Schema
Fingerprints"). That form drops ``logicalType``, ``default`` and ``doc``: a change from milliseconds to
microseconds would keep the fingerprint. Hence two rules, checked by :func:`check_catalog`: no two released
schemas share a fingerprint, and no released file changes (``LOCK``).

A version may have *revisions*: ``v3.1.avsc`` beside ``v3.avsc``, a change that Avro's schema resolution
bridges in both directions (``schemas.evolution``). The newest revision is the version's shape: what is
written, and what records of the older ones are read as.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

from schemas.evolution import differences

ROOT = Path(__file__).parent
LOCK_FILE = ROOT / "LOCK"
_FILE_NAME = re.compile(r"v([1-9][0-9]*)(?:\.([1-9][0-9]*))?\.avsc")

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
    revision: int
    path: Path
    document: Any
    published: Any
    plain: Any
    fingerprint: bytes

    @property
    def name(self) -> str:
        """``subject/version``, as in the record header ``tidemeter-schema``."""
        return f"{self.subject}/{self.version}"

    @property
    def label(self) -> str:
        """``subject/version``, with the revision if it has one: ``usage_event/3.1``."""
        return self.name if self.revision == 0 else f"{self.name}.{self.revision}"


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


def crc_of(document: Any) -> bytes:
    """CRC-64-AVRO of a schema's parsing canonical form: blind to logical types, defaults and docs."""
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(document), "CRC-64-AVRO"))


def _read(path: Path, subject: str) -> Schema:
    form = _FILE_NAME.fullmatch(path.name)
    if form is None:
        raise CatalogError(
            f"schemas/{subject}/{path.name}: name it v<version>.avsc or v<version>.<revision>.avsc"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Schema(
            subject=subject,
            version=int(form[1]),
            revision=int(form[2] or 0),
            path=path,
            document=document,
            published=fastavro.parse_schema(document),
            plain=fastavro.parse_schema(_without_logical_types(document)),
            fingerprint=crc_of(document),
        )
    except Exception as error:
        raise CatalogError(f"schemas/{subject}/{path.name} is no Avro schema: {error}") from error


@cache
def writers() -> tuple[Schema, ...]:
    """Every released schema, revisions too, oldest first: all that a value may have been written with."""
    found: list[Schema] = []
    for subject in CURRENT_VERSIONS:
        files = [_read(path, subject) for path in (ROOT / subject).glob("v*.avsc")]
        found += sorted(files, key=lambda schema: (schema.version, schema.revision))
    return tuple(found)


@cache
def released() -> dict[tuple[str, int], Schema]:
    """The shape of every released version by (subject, version): its newest revision."""
    return {(schema.subject, schema.version): schema for schema in writers()}


@cache
def by_fingerprint() -> dict[bytes, Schema]:
    """Every released schema by its 8 fingerprint bytes."""
    return {schema.fingerprint: schema for schema in writers()}


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
        CatalogError: a version is missing or unfinished, two schemas share a fingerprint, a revision is not
            compatible with an earlier one, or a file differs from ``LOCK``.
    """
    schemas = released()
    for subject, version in CURRENT_VERSIONS.items():
        missing = [n for n in range(1, version + 1) if (subject, n) not in schemas]
        if missing:
            raise CatalogError(
                f"schemas/{subject}: version {missing[0]} is missing; released files must stay"
            )
    seen: dict[bytes, Schema] = {}
    for schema in writers():
        twin = seen.setdefault(schema.fingerprint, schema)
        if twin is not schema:
            raise CatalogError(
                f"{schema.label} and {twin.label} have the same fingerprint; Avro's canonical form ignores "
                "logical types, defaults and docs, so the new version must also rename a field or the record"
            )
        if schema.version > CURRENT_VERSIONS[schema.subject]:
            raise CatalogError(
                f"{schema.label} is above the current version {CURRENT_VERSIONS[schema.subject]}: finish it, "
                "or remove it; docs/evolution.md has the steps"
            )
    _check_revisions()
    if lock_lines() != LOCK_FILE.read_text(encoding="utf-8").splitlines():
        raise CatalogError(
            "a released schema, corpus or migration file differs from schemas/LOCK; restore it, or, for "
            "a new file only, run `python -m schemas.catalog` and commit the new LOCK"
        )


def _check_revisions() -> None:
    for newer in writers():
        for older in writers():
            if (older.subject, older.version) != (newer.subject, newer.version):
                continue
            if older.revision >= newer.revision:
                continue
            breaking = [one for one in differences(older.document, newer.document) if not one.stays]
            if breaking:
                raise CatalogError(
                    f"{newer.label} cannot be a revision beside {older.label}: {breaking[0].path}: "
                    f"{breaking[0].why}"
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
