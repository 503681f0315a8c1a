"""Read Stripe's objects without trusting their shape: what is missing or foreign is refused by name.

Identifiers that pass here hold no blank, no control character and nothing that PostgreSQL or a log could
choke on, so they may be stored, compared and told of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from services.webhooks.handling import Refused, WebhookEvent
from services.wire.records import OutboxRow, ops_event
from services.wire.times import micros

Object = Mapping[str, Any]

CODE_CHARS_MAX = 100
UNKNOWN = "unknown"

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,255}")
_WORD = re.compile(r"[a-z0-9_]{1,100}")
_CURRENCY = re.compile(r"[a-z]{3}")
_FOREIGN = re.compile(r"[^a-z0-9_]")
_AMOUNT_MAX = 2**63 - 1
_SECOND_MAX = 253_402_300_799  # of the year 9999


def at(of: Any, *path: str) -> Any:
    """What stands at ``path``; None if any part of the way is missing or no object."""
    for name in path:
        of = of.get(name) if isinstance(of, Mapping) else None
    return of


def objects(found: Any) -> list[Object]:
    """The objects of a list, or of Stripe's list object; anything else in it is left out."""
    found = at(found, "data") if isinstance(found, Mapping) else found
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def identifier(of: Object, *path: str) -> str:
    """An identifier, or that of the object it was expanded to.

    Raises:
        Refused: there is none.
    """
    found = identifier_or_none(of, *path)
    if found is None:
        raise _refused(path)
    return found


def identifier_or_none(of: Object, *path: str) -> str | None:
    """The same; None for null and for what is missing.

    Raises:
        Refused: something else stands there.
    """
    found = at(of, *path)
    if isinstance(found, Mapping):
        found = found.get("id")
    elif found is None:
        return None
    if not isinstance(found, str) or not _IDENTIFIER.fullmatch(found):
        raise _refused(path)
    return found


def word(of: Object, *path: str) -> str:
    """One of Stripe's enumerations, such as a status; new ones come without notice.

    Raises:
        Refused: it is none.
    """
    found = at(of, *path)
    if not isinstance(found, str) or not _WORD.fullmatch(found):
        raise _refused(path)
    return found


def amount(of: Object, *path: str) -> int:
    """An amount in minor units, never negative.

    Raises:
        Refused: it is none.
    """
    found = at(of, *path)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= _AMOUNT_MAX:
        raise _refused(path)
    return found


def currency(of: Object) -> str:
    """Three small letters.

    Raises:
        Refused: it is something else.
    """
    found = at(of, "currency")
    if not isinstance(found, str) or not _CURRENCY.fullmatch(found):
        raise _refused(("currency",))
    return found


def moment(of: Object, *path: str) -> datetime:
    """A time in seconds since 1970.

    Raises:
        Refused: it is none.
    """
    found = moment_or_none(of, *path)
    if found is None:
        raise _refused(path)
    return found


def moment_or_none(of: Object, *path: str) -> datetime | None:
    """The same; None for null and for what is missing.

    Raises:
        Refused: something else stands there.
    """
    found = at(of, *path)
    if found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= _SECOND_MAX:
        raise _refused(path)
    return datetime.fromtimestamp(found, UTC)


def code(found: Any) -> str | None:
    """A code of Stripe's in the form that codes are kept in; None if it is none, or too long to be kept."""
    if not isinstance(found, str) or not 0 < len(found) <= CODE_CHARS_MAX:
        return None
    return _FOREIGN.sub("_", found.lower())[:CODE_CHARS_MAX]


def _refused(path: tuple[str, ...]) -> Refused:
    return Refused("shape_" + "_".join(path))


def told(
    name: str,
    event: WebhookEvent,
    now: datetime,
    subject_type: str,
    subject_id: str,
    attributes: Mapping[str, object],
) -> OutboxRow:
    """An ops event of something that a webhook told. Attributes that are None are left out."""
    given = {**attributes, "account": event.account or None}
    return ops_event(
        name,
        subject_type=subject_type,
        subject_id=subject_id,
        source="webhook",
        at_us=micros(now),
        attributes={key: str(value) for key, value in given.items() if value is not None},
    )
