"""Parked records: find them, have them tried again, or settle that they never will be.

Trying again is the part of the service that parked; here it is only asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from services.streaming import outbox
from services.streaming.parking import (
    CHOSEN,
    REDRIVABLE,
    STATES,
    Choice,
    Request,
    audit,
    request_redrives,
)
from services.wire.errors import TidemeterError
from services.wire.records import ops_event
from services.wire.times import micros

Connection = psycopg.Connection[Any]
Row = Mapping[str, Any]

#: More than this at once needs to be forced.
AT_ONCE_MAX = 10_000

COLUMNS = (
    *("parked_id", "kind", "reason", "state", "tenant_id", "meter", "event_id", "schema_name"),
    *("topic", "partition", "offset", "arrived_at", "attempts", "outcome"),
)
_DETAILS = (
    *COLUMNS,
    *("service", "stage", "error_class", "parked_at", "tried_at", "settled_at", "settled_by", "note"),
)
_REDRIVE = (
    *("redrive_id", "service", "state", "dry_run", "selected", "tried", "results", "choice"),
    *("requested_by", "requested_at", "paused_reason", "finished_at"),
)


class UnknownRecord(TidemeterError):
    """No parked record, or no re-drive, has this id, or not one of this tenant."""


class NothingChosen(TidemeterError):
    """Every parked record was meant, without saying so."""


class TooMany(TidemeterError):
    """More records than may be meant by accident."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{number} records; more than {AT_ONCE_MAX} at once need force")
        self.number = number


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f'p."{name}"' for name in columns)


def find(
    db: Connection,
    choice: Choice,
    *,
    states: Sequence[str] = STATES,
    before: int | None = None,
    limit: int = 100,
) -> Sequence[Row]:
    """Parked records, the newest first; ``before``: only with a smaller id."""
    return (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_names(COLUMNS)} FROM parked_records p WHERE p.state = ANY(%(states)s) "  # noqa: S608
            f"AND (%(before)s::bigint IS NULL OR p.parked_id < %(before)s) AND {CHOSEN} "
            f"ORDER BY p.parked_id DESC LIMIT %(limit)s",
            {**choice.values(), "states": list(states), "before": before, "limit": limit},
        )
        .fetchall()
    )


def numbers(db: Connection, choice: Choice, *, states: Sequence[str]) -> dict[str, int]:
    """How many, by reason, the most frequent first."""
    rows = db.execute(
        f"SELECT p.reason, count(*) FROM parked_records p WHERE p.state = ANY(%(states)s) "  # noqa: S608
        f"AND {CHOSEN} GROUP BY 1 ORDER BY 2 DESC, 1",
        {**choice.values(), "states": list(states)},
    ).fetchall()
    return dict(rows)


def show(db: Connection, parked_id: int, *, only_tenant: str | None = None, with_record: bool = False) -> Row:
    """Everything about one record; its bytes and headers only ``with_record``.

    Raises:
        UnknownRecord: there is none.
    """
    columns = (*_DETAILS, "value", "headers") if with_record else _DETAILS
    row = (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_names(columns)} FROM parked_records p WHERE parked_id = %s "  # noqa: S608
            "AND (%s::text IS NULL OR tenant_id = %s)",
            (parked_id, only_tenant, only_tenant),
        )
        .fetchone()
    )
    if row is None:
        raise UnknownRecord(f"no parked record {parked_id}; see `tidemeter parked list --state all`")
    return row


def redrive(
    db: Connection, choice: Choice, *, by: str, dry_run: bool, everything: bool = False, force: bool = False
) -> list[Request]:
    """Ask for the chosen records to be tried again.

    Raises:
        NothingChosen: the choice does not restrict, and ``everything`` is not meant.
        TooMany: more than 10,000 without ``force``.
    """
    with db.transaction():
        _check(db, choice, everything, force, list(REDRIVABLE))
        return request_redrives(db, choice, by=by, dry_run=dry_run)


def discard(
    db: Connection,
    choice: Choice,
    *,
    note: str,
    by: str,
    dry_run: bool,
    everything: bool = False,
    force: bool = False,
    now: datetime | None = None,
) -> int:
    """Settle that the chosen records are never processed, because of ``note``; returns how many that is.

    They stay listed, and on their topics. A conflict that was looked at is settled so, too.

    Raises:
        NothingChosen: the choice does not restrict, and ``everything`` is not meant.
        TooMany: more than 10,000 without ``force``.
    """
    now = now or datetime.now(UTC)
    with db.transaction():
        number = _check(db, choice, everything, force, None)
        if dry_run or not number:
            return number
        rows = db.execute(
            f"WITH chosen AS (SELECT p.parked_id FROM parked_records p WHERE p.state = 'parked' "  # noqa: S608
            f"AND {CHOSEN} ORDER BY p.parked_id FOR UPDATE), "
            f"settled AS (UPDATE parked_records p SET state = 'discarded', settled_at = %(now)s, "
            f"settled_by = %(by)s, note = %(note)s FROM chosen WHERE p.parked_id = chosen.parked_id "
            f"RETURNING p.service, p.parked_id) "
            f"SELECT service, count(*), min(parked_id) FROM settled GROUP BY 1 ORDER BY 1",
            {**choice.values(), "now": now, "by": by, "note": note},
        ).fetchall()
        for service, discarded, first_id in rows:
            event = ops_event(
                "parked_discarded",
                subject_type="parked_record",
                subject_id=str(first_id),
                source="operator",
                at_us=micros(now),
                attributes={"records": str(discarded), "service": service, "by": by},
            )
            outbox.enqueue(db, service, [event])
        discarded = sum(row[1] for row in rows)
        audit(db, by, "parked.discard", note[:200], {"records": discarded})
        return int(discarded)


def _check(db: Connection, choice: Choice, everything: bool, force: bool, kinds: Sequence[str] | None) -> int:
    if choice == Choice() and not everything:
        raise NothingChosen("say which: ids, a reason, a tenant, a time; or all of them, explicitly")
    row = db.execute(
        f"SELECT count(*) FROM parked_records p WHERE p.state = 'parked' AND {CHOSEN} "  # noqa: S608
        "AND (%(wanted)s::text[] IS NULL OR p.kind = ANY(%(wanted)s))",
        {**choice.values(), "wanted": kinds},
    ).fetchone()
    number = int(row[0]) if row else 0
    if number > AT_ONCE_MAX and not force:
        raise TooMany(number)
    return number


def redrives(
    db: Connection, *, ids: Sequence[int] | None = None, only_tenant: str | None = None, limit: int = 100
) -> Sequence[Row]:
    """Re-drives, the newest first."""
    return (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {', '.join(_REDRIVE)} FROM redrives "  # noqa: S608
            "WHERE (%(ids)s::bigint[] IS NULL OR redrive_id = ANY(%(ids)s)) "
            "AND (%(tenant)s::text IS NULL OR choice ->> 'tenant' = %(tenant)s) "
            "ORDER BY redrive_id DESC LIMIT %(limit)s",
            {"ids": None if ids is None else list(ids), "tenant": only_tenant, "limit": limit},
        )
        .fetchall()
    )


def cancel(
    db: Connection, redrive_id: int, *, by: str, only_tenant: str | None = None, now: datetime | None = None
) -> bool:
    """Stop a re-drive after the batch under way; False when it had ended.

    Raises:
        UnknownRecord: there is none.
    """
    with db.transaction():
        row = db.execute(
            "SELECT finished_at IS NULL FROM redrives WHERE redrive_id = %s "
            "AND (%s::text IS NULL OR choice ->> 'tenant' = %s) FOR UPDATE",
            (redrive_id, only_tenant, only_tenant),
        ).fetchone()
        if row is None:
            raise UnknownRecord(f"no re-drive {redrive_id}; see `tidemeter parked redrives`")
        if not row[0]:
            return False
        db.execute(
            "UPDATE redrives SET state = 'cancelled', finished_at = %s WHERE redrive_id = %s",
            (now or datetime.now(UTC), redrive_id),
        )
        audit(db, by, "redrive.cancel", str(redrive_id), {})
        return True
