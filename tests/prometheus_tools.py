"""Prometheus, promtool and amtool for tests: named, installed, or out of Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from services.embedded.kafka_jars import cache_root

#: A directory that holds all of them.
VARIABLE = "PROMETHEUS_BIN"
PACKAGES = ("prometheus", "prometheus-alertmanager")
FETCH_SECONDS = 150


class ToolsMissing(Exception):
    """There is no way to the programs here; the message says what to do."""


@dataclass(frozen=True)
class PrometheusTools:
    """Paths of the programs."""

    prometheus: str
    promtool: str
    amtool: str


def find_tools() -> PrometheusTools:
    """In this order: the directory that ``PROMETHEUS_BIN`` names, PATH, the cache, Debian's packages.

    Raises:
        ToolsMissing: none of these has them.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        found = _all_on(named)
        if found is None:
            raise ToolsMissing(f"{VARIABLE}={named} lacks one of prometheus, promtool and amtool")
        return found
    unpacked = cache_root() / "prometheus-debian"
    found = _all_on(os.environ.get("PATH", "")) or _all_on(str(unpacked / "usr/bin"))
    if found is None:
        _fetch(unpacked)
        found = _all_on(str(unpacked / "usr/bin"))
    if found is None:
        raise ToolsMissing("Debian's packages lack one of prometheus, promtool and amtool")
    return found


def _all_on(path: str) -> PrometheusTools | None:
    names = ("prometheus", "promtool", "amtool")
    found = [where for name in names if (where := shutil.which(name, path=path)) is not None]
    return PrometheusTools(*found) if len(found) == len(names) else None


def _fetch(target: Path) -> None:
    """Unpack the packages into ``target``, which then is whole; needs no root, and installs nothing."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ToolsMissing(
            f"no prometheus, promtool and amtool: install them, or set {VARIABLE} (no apt here)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="prometheus-") as name:
        scratch = Path(name)
        try:
            _run(scratch, "apt-get", "download", *PACKAGES)
        except ToolsMissing:  # lists that are missing or old: take new ones, in a place of our own
            own = _own_state(scratch)
            _run(scratch, "apt-get", *own, "update")
            _run(scratch, "apt-get", *own, "download", *PACKAGES)
        unpacked = scratch / "unpacked"
        for package in scratch.glob("*.deb"):
            _run(scratch, "dpkg", "-x", str(package), str(unpacked))
        if not target.exists():
            unpacked.rename(target)


def _own_state(scratch: Path) -> list[str]:
    for part in ("lists/partial", "archives/partial"):
        (scratch / part).mkdir(parents=True)
    places = {"State::Lists": scratch / "lists", "Cache": scratch, "Cache::archives": scratch / "archives"}
    return [f"-oDir::{place}={path}" for place, path in places.items()] + ["-oDebug::NoLocking=1"]


def _run(directory: Path, *command: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ToolsMissing(f"{command[0]} took longer than {FETCH_SECONDS} s") from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolsMissing(f"no prometheus, promtool and amtool: {command[0]} says: {line}")
