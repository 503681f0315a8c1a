"""Judge a schema file before it is released: may it stay on its version, or is it a new one, or neither."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.catalog import LOCK_FILE, ROOT, Schema, crc_of, released, writers
from schemas.evolution import Difference, Refusal, differences, refusals

Verdict = Literal["compatible", "new_version", "refused"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What :func:`judge` found: the differences to ``against``, and why it cannot be at all."""

    against: Schema
    differences: tuple[Difference, ...]
    refusals: tuple[Refusal, ...]

    @property
    def verdict(self) -> Verdict:
        """``compatible``: a revision of the same version, on the same topic."""
        if self.refusals:
            return "refused"
        return "compatible" if all(one.stays for one in self.differences) else "new_version"


def judge(path: Path, subject: str, version: int) -> Judgement:
    """Compare the file with every revision of ``subject``/``version``, and with what is never allowed.

    Raises:
        OSError: the file cannot be read.
        KeyError: no such subject or version.
        CatalogError: the released files cannot be read.
    """
    raw = path.read_bytes()
    try:
        document = json.loads(raw)
    except ValueError as error:
        return Judgement(released()[subject, version], (), (Refusal("not_json", "(file)", str(error)),))
    unfit = refusals(document)
    if unfit:
        return Judgement(released()[subject, version], (), tuple(unfit))
    others = [schema for schema in writers() if schema.path.resolve() != path.resolve()]
    revisions = [schema for schema in others if (schema.subject, schema.version) == (subject, version)]
    against = revisions[-1] if revisions else released()[subject, version]
    found = differences(against.document, document)
    for older in revisions[:-1]:
        found += [one for one in differences(older.document, document) if not one.stays and one not in found]
    return Judgement(against, tuple(found), tuple(_released_refusals(path, raw, document, others)))


def _released_refusals(path: Path, raw: bytes, document: Any, others: list[Schema]) -> list[Refusal]:
    found = []
    locked = _locked_digest(path)
    if locked is not None:
        same = hashlib.sha256(raw).hexdigest() == locked
        code, why = (
            ("already_released", "this is a released file as it stands; copy it and change the copy")
            if same
            else (
                "released_file_edited",
                "this file is released and was edited; restore it and change a copy",
            )
        )
        found.append(Refusal(code, "(file)", why))
    for twin in others:
        if twin.fingerprint == crc_of(document):
            why = (
                f"the fingerprint is that of {twin.label}: Avro's canonical form drops logical types, "
                "defaults and docs; also rename a field or the record"
            )
            found.append(Refusal("same_fingerprint", "(record)", why))
    return found


def _locked_digest(path: Path) -> str | None:
    """The digest that ``LOCK`` holds for this very file, if it is a released one."""
    for line in LOCK_FILE.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if (ROOT / name).resolve() == path.resolve():
            return digest
    return None
