"""What this machine knows of time zones, by the IANA database that Python itself uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo, ZoneInfoNotFoundError

#: Links that are no old names.
_CURRENT = frozenset({"UTC", "GMT", "Etc/UTC", "Etc/GMT"})


@dataclass(frozen=True, slots=True)
class Zones:
    """``links`` are other names of zones, ``current`` the places that the database still lists."""

    version: str
    links: Mapping[str, str]
    current: frozenset[str]

    def exists(self, name: str) -> bool:
        """Whether times of this zone can be read here."""
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            return False
        return True

    def alias_of(self, name: str) -> str | None:
        """The zone that ``name`` is an old name of; None if it is none."""
        if name in self.current or name in _CURRENT:
            return None
        return self.links.get(name)


def known_zones() -> Zones:
    """From the system, else from the package tzdata; without either no alias is known."""
    rules, places = (_read(name) for name in ("tzdata.zi", "zone.tab"))
    return parse_zones(rules.splitlines(), places.splitlines())


def parse_zones(rules: Iterable[str], places: Iterable[str]) -> Zones:
    """Lines of ``tzdata.zi`` and ``zone.tab``."""
    links, version = {}, "unknown"
    for line in rules:
        words = line.split()
        if line.startswith("# version"):
            version = words[-1]
        elif words[:1] == ["L"] and len(words) == 3:
            links[words[2]] = words[1]
    current = {line.split("\t")[2] for line in places if line and not line.startswith("#")}
    return Zones(version, links, frozenset(current))


def _read(name: str) -> str:
    for directory in TZPATH:
        path = Path(directory, name)
        if path.is_file():
            return path.read_text(encoding="utf-8")
    try:
        return files("tzdata").joinpath("zoneinfo", name).read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError):
        return ""
