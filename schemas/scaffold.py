"""The files that a new version begins with, and what is left to do. Pure: texts by path, nothing is written.

Nothing starts with them as they are: the catalogue refuses a version above the current one, and the upcaster
raises.
"""

from __future__ import annotations

from typing import Any

from schemas.catalog import Schema

_SAMPLES: dict[str, str] = {
    "string": '"text"',
    "bytes": 'b"bytes"',
    "int": "1",
    "long": "1",
    "double": "0.5",
    "map": '{"key": "value"}',
    "array": '["key=value"]',
}


def new_files(schema: Schema) -> dict[str, str]:
    """The text of each new file by its path below the repository, for the version after ``schema``."""
    subject, source, target = schema.subject, schema.version, schema.version + 1
    return {
        f"schemas/{subject}/v{target}.avsc": schema.path.read_text(encoding="utf-8"),
        f"upcasters/{subject}_v{source}_to_v{target}.py": _upcaster(schema),
        f"tests/unit/test_{subject}_v{source}_to_v{target}.py": _test(schema),
    }


def remaining_steps(schema: Schema, topic: str | None) -> list[str]:
    """What is left to do, in order, as ``docs/evolution.md`` explains it.

    ``topic`` is the new version's own, or None where all versions of the subject share one.
    """
    subject, source, target = schema.subject, schema.version, schema.version + 1
    step = f"{subject}_v{source}_to_v{target}"
    steps = [
        f"Edit schemas/{subject}/v{target}.avsc; a `doc` on every field. Ask `tidemeter schemas check "
        f"schemas/{subject}/v{target}.avsc --subject {subject}`.",
        f'Set "{subject}": {target} in CURRENT_VERSIONS (schemas/catalog.py).',
        f"Write upcast in upcasters/{step}.py, remove its raise, and add the module to STEPS "
        "(upcasters/chain.py).",
    ]
    if topic is not None:
        steps += [
            f'Add {target}: "{topic}" to USAGE_TOPICS (services/wire/topics.py).',
            "Bring to_record (services/wire/usage.py) and services/counters/prepare.py to the new fields.",
        ]
    else:
        steps.append(f"Bring what writes and reads {subject} to the new fields.")
    return [
        *steps,
        f"Write a corpus file: schemas/{subject}/corpus/v{target}-release-<release>.avro.",
        f"Finish tests/unit/test_{step}.py.",
        "Lock the new files: python -m schemas.catalog",
        "Run make check test, and tidemeter schemas list.",
        "Release: tidemeter migrate, then readers, then writers.",
    ]


def _fields(schema: Schema) -> list[dict[str, Any]]:
    return list(schema.plain["fields"])


def _upcaster(schema: Schema) -> str:
    subject, source, target = schema.subject, schema.version, schema.version + 1
    fields = "".join(f'        "{one["name"]}": record["{one["name"]}"],\n' for one in _fields(schema))
    return f'''"""{subject} v{source} → v{target}: say here what changed."""

from __future__ import annotations

from upcasters.values import Record

SUBJECT, FROM, TO = "{subject}", {source}, {target}


def upcast(record: Record) -> Record:
    """A v{source} record as v{target}."""
    raise NotImplementedError("{subject} v{source}→v{target} is not written yet")
    # Bring these to the fields of v{target}, and remove the raise.
    return {{
{fields}    }}
'''


def _test(schema: Schema) -> str:
    subject, source, target = schema.subject, schema.version, schema.version + 1
    fields = "".join(f'    "{one["name"]}": {_sample(one["type"])},\n' for one in _fields(schema))
    return f'''"""{subject} v{source} → v{target}, value by value."""

from __future__ import annotations

from upcasters.{subject}_v{source}_to_v{target} import upcast

V{source} = {{
{fields}}}


def test_a_v{source}_record_as_v{target}() -> None:
    # Write the expected record out: what is computed from the input agrees with any mistake.
    assert upcast(dict(V{source})) == {{**V{source}}}
'''


def _sample(kind: Any) -> str:
    """A value of a plain type, as source."""
    if isinstance(kind, list):
        return _sample(kind[1])
    if isinstance(kind, dict):
        if kind["type"] == "fixed":
            return f"bytes({kind['size']})"
        if kind["type"] == "enum":
            return f'"{kind["symbols"][0]}"'
        kind = kind["type"]
    return _SAMPLES[kind]
