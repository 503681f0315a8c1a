"""``bench/results.json``: one key for each benchmark, the newest run of each."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"

_PACKAGES = (
    "aiokafka",
    "confluent-kafka",
    "fastavro",
    "faust-streaming",
    "psycopg",
    "tidemeter",
)


def versions() -> dict[str, str]:
    """Python, and every package that a result depends on, as far as installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def merge(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the keys of ``results`` in the file and keep the others; all of it happens, or nothing.

    Raises:
        ValueError: the file is there, but is no JSON object.
    """
    document: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object")
    document.update(results)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
