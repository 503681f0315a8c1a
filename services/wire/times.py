"""Points in time as integers: microseconds since 1970, in records and arithmetic; datetimes in PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def instant(micros: int) -> datetime:
    """The UTC datetime of ``micros``; exact.

    Raises:
        OverflowError: outside of the years 1 to 9999.
    """
    return EPOCH + timedelta(microseconds=micros)


def micros(moment: datetime) -> int:
    """Microseconds since 1970 of an aware datetime; exact, and negative before 1970."""
    return (moment - EPOCH) // _MICROSECOND
