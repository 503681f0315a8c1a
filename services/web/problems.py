"""One problem for a whole request: a stable code, a sentence, and the field at fault.

An answer never repeats a value that was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from services.wire.errors import TidemeterError

Code = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$", description="Stable reason code.")]
Path = Annotated[str, msgspec.Meta(description="Field at fault, such as `events[0].quantity`.")]
Message = Annotated[str, msgspec.Meta(description="For people; may change between releases.")]

#: Seconds a client is told to wait before it retries a 503 or 429.
RETRY_AFTER_S = 2


class Problem(msgspec.Struct, omit_defaults=True, frozen=True):
    """Why a request was refused as a whole; nothing of it was stored."""

    code: Code
    message: Message
    path: Path | None = None


class RequestRefused(TidemeterError):
    """The whole request gets ``status`` and a :class:`Problem`; ``headers`` are added to the answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        path: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.problem = Problem(code, message, path)
        self.headers = dict(headers or {})
