"""EmbeddedError
├── ToolMissing       no Java, no PostgreSQL binaries, no jgo  → install something
├── DownloadFailed    the Kafka jars could not be fetched      → mend the network or name a mirror, run again
├── AlreadyRunning    a live process owns this data directory  → stop it, or choose another directory
└── StartFailed       a server came up late or not at all      → its last log lines are attached

Every one is meant for a person at a terminal: the message says what to do next.
"""

from __future__ import annotations


class EmbeddedError(Exception):
    """Something the embedded runtime needs is missing, busy or broken."""


class ToolMissing(EmbeddedError):
    """A program or package that should be installed is not."""


class DownloadFailed(EmbeddedError):
    """A download did not complete, or what came is not what was pinned."""


class AlreadyRunning(EmbeddedError):
    """The data directory belongs to another live process, `pid`, if it could be read."""

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StartFailed(EmbeddedError):
    """A server did not become ready."""
