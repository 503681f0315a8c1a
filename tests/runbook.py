"""Command blocks of a page, and a shell that runs them as an operator would, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PART = re.compile(r"^(#+ [^\n]*)$|^( *)```bash\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
#: What a page leaves to its reader.
_OPEN = re.compile(r"…|<[a-z-]+>|\b(?:ID|KEYID|EVENT_ID|FILE|TEXT|HASH|TIME|TOPIC|SECONDS|NAME)\b")
_COMMENT = re.compile(r"(?:^|\s)#.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """The ``number``-th block of ``page``, from 1, in ``section``."""

    page: str
    section: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{Path(self.page).stem} {self.number} {self.section}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What a block printed, and each command that did not end with 0, with its status."""

    output: str
    failed: tuple[tuple[str, int], ...]


def blocks_of(page: str) -> list[Block]:
    """Every command block of a page of the repository."""
    found: list[Block] = []
    section = ""
    for heading, _, body in _PART.findall((ROOT / page).read_text(encoding="utf-8")):
        if heading:
            section = heading.lstrip("# ")
        else:
            found.append(Block(page, section, len(found) + 1, textwrap.dedent(body)))
    return found


def left_open(text: str) -> list[str]:
    """Placeholders in a block that nobody has filled in."""
    return _OPEN.findall(_COMMENT.sub("", text))


_SESSION = """
source {state}
set -o pipefail
trap 'echo "$? $LINENO" >>{failed}' ERR
source {block}
trap - ERR
{{ declare -f; for name in $(compgen -v | grep -E '^[a-z][a-z_]*$'); do declare -p "$name"; done; }} >{state}
"""


class Shell:
    """A session: functions and variables of a block are there for the next ones.

    Each block is a bash of its own, so that one that hangs or exits takes nothing with it.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._state = directory / "state"
        self._failed = directory / "failed"
        self._block = directory / "block.sh"
        self._state.touch()
        bin_directory = directory / "bin"
        bin_directory.mkdir()
        for name, arguments in {"python": "", "tidemeter": " -m services.cli.main"}.items():
            script = bin_directory / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable}{arguments} "$@"\n')
            script.chmod(0o755)
        path = f"{bin_directory}{os.pathsep}{environment['PATH']}"
        self._environment = {**environment, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def run(self, text: str, timeout_s: float = 120.0) -> Ran:
        """Run a block, from the root of the repository."""
        self._failed.write_text("")
        self._block.write_text(text)
        program = _SESSION.format(state=self._state, failed=self._failed, block=self._block)
        done = subprocess.run(
            ["bash", "-c", program],
            env=self._environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        told = [line.split() for line in self._failed.read_text().splitlines()]
        failed = tuple((_statement(text, int(number)), int(status)) for status, number in told)
        return Ran(done.stdout, failed)


def _statement(text: str, number: int) -> str:
    """The command that ends in line ``number``, with the lines before that it goes on from."""
    lines = text.splitlines()[:number]
    first = len(lines) - 1
    while first > 0 and lines[first - 1].endswith(("\\", "|")):
        first -= 1
    return "\n".join(lines[first:])
