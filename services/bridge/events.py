"""What a webhook's body says about itself: the event's id and type, and the object that it is about.

No more of it is judged: the rest belongs to whoever handles the event, and the body is kept as it came.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from services.web.problems import RequestRefused
from services.wire.errors import Invalid
from services.wire.usage import check_text

IDENTIFIER_CHARS_MAX: Final = 255
THIN: Final = "v2.core.event"


@dataclass(frozen=True, slots=True)
class StripeEvent:
    """Identity of an event. ``object_id`` orders it: events of one object share a partition."""

    event_id: str
    event_type: str
    object_id: str


def read_event(body: bytes) -> StripeEvent:
    """The event in ``body``: a snapshot (``data.object``), or a thin one (``related_object``).

    An object without an id, such as a balance, stands under the name of its kind; an event about nothing
    stands for itself.

    Raises:
        RequestRefused: 400 ``event_malformed``: not JSON in UTF-8, or without usable identifiers.
    """
    try:
        document = _decode(body.decode())  # as text: of bytes, `json` would guess other encodings too
    except (ValueError, RecursionError):
        raise _malformed("the body is not JSON", None) from None
    if not isinstance(document, dict):
        raise _malformed("the body is not an event", None)
    event_id, event_type = document.get("id"), document.get("type")
    object_id = _object_id(document) or event_id
    try:
        check_text(event_id, "id", IDENTIFIER_CHARS_MAX)
        check_text(event_type, "type", IDENTIFIER_CHARS_MAX)
        check_text(object_id, "object", IDENTIFIER_CHARS_MAX)
    except Invalid as error:
        raise _malformed(str(error), error.path) from None
    return StripeEvent(str(event_id), str(event_type), str(object_id))


def _object_id(document: dict[str, Any]) -> str | None:
    if document.get("object") == THIN:
        related = document.get("related_object")
        return _text(related, "id")
    data = document.get("data")
    about = data.get("object") if isinstance(data, dict) else None
    return _text(about, "id") or _text(about, "object")


def _text(of: object, name: str) -> str | None:
    value = of.get(name) if isinstance(of, dict) else None
    return value if isinstance(value, str) else None


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode


def _malformed(message: str, path: str | None) -> RequestRefused:
    return RequestRefused(400, "event_malformed", message, path=path)
