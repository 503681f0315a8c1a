"""Endpoints and their signing secrets, and the file that they are read from again when it changes.

``name=whsec_…[,whsec_…]``, one endpoint to a line, or separated by ``;``. Of several secrets each one signs:
while one is rolled, the old and the new. A file that changed and cannot be used changes nothing: the secrets
that were read before stay, a warning is logged, and health is degraded until the file is mended.

No message holds any of the text, not even a name: what stands in the wrong place may be a secret.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from services.wire.errors import Misconfigured
from services.wire.settings import PREFIX, Settings, secret_file

VARIABLE: Final = f"{PREFIX}WEBHOOK_SECRETS"
#: Pause between two looks at the file.
LOOK_S: Final = 1.0

_NAME = re.compile(r"(?!whsec_)[a-z0-9][a-z0-9_-]{0,63}")
_SECRET = re.compile(r"whsec_[A-Za-z0-9+/=_-]{1,255}")

Secrets = Mapping[str, tuple[bytes, ...]]
Stamp = tuple[int, int, int]

log = structlog.get_logger(__name__)


def parse_secrets(text: str) -> Secrets:
    """Secrets by endpoint.

    Raises:
        Misconfigured: no endpoint, one of them twice, or a name or secret that is none.
    """
    found: dict[str, tuple[bytes, ...]] = {}
    entries = [entry.strip() for line in text.splitlines() for entry in line.split(";")]
    for number, entry in enumerate(filter(None, entries), start=1):
        name, _, listed = (part.strip() for part in entry.partition("="))
        if _NAME.fullmatch(name) is None:
            raise _wrong(number, "must be name=whsec_…, with a name of a-z, 0-9, _ and -, at most 64")
        if name in found:
            raise _wrong(number, "names an endpoint that stands before it; put all secrets into one entry")
        secrets = [secret.strip() for secret in listed.split(",")]
        if not all(_SECRET.fullmatch(secret) for secret in secrets):
            raise _wrong(number, "must hold signing secrets, whsec_…, separated by commas")
        found[name] = tuple(secret.encode() for secret in secrets)
    if not found:
        raise Misconfigured(f"no webhook endpoint: set {VARIABLE} or {VARIABLE}_FILE to name=whsec_…")
    return found


def _wrong(number: int, what: str) -> Misconfigured:
    return Misconfigured(f"{VARIABLE}: entry {number} {what}")


class Endpoints:
    """The secrets in force. With a ``path`` they follow that file."""

    def __init__(self, text: str = "", path: Path | None = None) -> None:
        """Read them.

        Raises:
            Misconfigured: they, or the file, cannot be used.
        """
        self._path = path
        self._stamp = None if path is None else _stamp(path)
        self.secrets = parse_secrets(text if path is None else _read(path))
        #: Whether the file says something else by now that cannot be used.
        self.is_stale = False

    def refresh(self) -> None:
        """Read the file again if it is another one, or was written to, since the last look."""
        if self._path is None:
            return
        try:
            stamp = _stamp(self._path)  # before the content: what is written after it is seen next time
            if stamp == self._stamp:
                self.is_stale = False
                return
            secrets = parse_secrets(_read(self._path))
        except Misconfigured as error:
            if not self.is_stale:
                log.warning("webhook_secrets.unusable", reason=str(error))
            self.is_stale = True
            return
        self._stamp, self.secrets, self.is_stale = stamp, secrets, False
        log.info("webhook_secrets.read", endpoints=len(secrets))

    async def follow(self) -> None:
        """Look at the file once a second, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.refresh)


def configured(settings: Settings) -> Endpoints:
    """The endpoints that ``settings`` name.

    Raises:
        Misconfigured: there is none, or one of them is wrong.
    """
    path = secret_file("webhook_secrets")
    if path is not None:
        return Endpoints(path=path)
    given = settings.webhook_secrets
    return Endpoints("" if given is None else given.get_secret_value())


def _stamp(path: Path) -> Stamp:
    try:
        about = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:
        raise Misconfigured(f"{VARIABLE}_FILE: the file is not UTF-8") from None


def _unreadable(path: Path, error: OSError) -> Misconfigured:
    return Misconfigured(f"{VARIABLE}_FILE: cannot read {path}: {error.strerror}")
