"""Points in time as integers: microseconds since 1970, in records and arithmetic; datetimes in PostgreSQL."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime, timedelta

import msgspec

from services.wire.errors import Misconfigured

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_AGO = re.compile(r"([0-9]{1,5})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def instant(micros: int) -> datetime:
    """The UTC datetime of ``micros``; exact.

    Raises:
        OverflowError: outside of the years 1 to 9999.
    """
    return EPOCH + timedelta(microseconds=micros)


def micros(moment: datetime) -> int:
    """Microseconds since 1970 of an aware datetime; exact, and negative before 1970."""
    return (moment - EPOCH) // _MICROSECOND


def utc(moment: datetime) -> datetime:
    """``moment``, an aware datetime of any zone, in UTC; exact."""
    return instant(micros(moment))


def moment(text: str, now: datetime) -> datetime:
    """The time that an operator wrote: ISO 8601 with an offset, ``now``, or how far away from now it is.

    ``-PT24H`` (a duration of ISO 8601 in weeks, days, hours, minutes and seconds) and ``24h`` are a day ago.

    Raises:
        Misconfigured: it is none of these; the message says what to write.
    """
    if text == "now":
        return now
    if (ago := _AGO.fullmatch(text)) is not None:
        return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    with contextlib.suppress(msgspec.ValidationError, OverflowError):
        return now + msgspec.convert(text, timedelta)
    with contextlib.suppress(msgspec.ValidationError, OverflowError):
        found = msgspec.convert(text, datetime)
        if found.utcoffset() is not None:
            return found.astimezone(UTC)
    raise Misconfigured(
        f"{text!r} is no time: write 2026-01-31T13:37:42Z, 2026-01-31T14:37:42+01:00, -PT24H, 24h or now"
    )
