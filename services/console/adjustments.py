"""Adjustments: find them, and decide them.

A decision only changes the state, from ``pending`` to ``approved`` or ``rejected``. Counting what was
approved is the counters' part, within seconds: only they know where it belongs.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, LiteralString, get_args

import psycopg
from psycopg.rows import dict_row

from services.wire.errors import TidemeterError

State = Literal["pending", "approved", "applied", "rejected"]
STATES: tuple[State, ...] = get_args(State)

#: Below Stripe's 35 days, with room for the push itself.
PUSHABLE = timedelta(days=34, hours=12)

Key = tuple[datetime, uuid.UUID]
Row = Mapping[str, Any]

#: What a person needs to decide, in the order in which it is shown.
_COLUMNS: LiteralString = (
    "adjustment_id, tenant_id, customer_ref, meter, quantity, occurred_at, arrived_at, reason, state, "
    "idempotency_key, decided_by, decided_at, applied_hour, applied_at"
)


class UnknownAdjustment(TidemeterError):
    """No adjustment has this id, or not one of this tenant."""


class TooOldForStripe(TidemeterError):
    """It cannot be approved: it has no time that Stripe takes, and none may be made up for it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The state an adjustment is in now, and whether this call brought it there."""

    adjustment_id: str
    state: State
    changed: bool


def decide(
    db: psycopg.Connection[Any],
    adjustment_id: str,
    *,
    approved: bool,
    by: str,
    now: datetime | None = None,
    tenant: str | None = None,
) -> Decision:
    """Approve or reject what is pending; deciding again changes nothing. ``tenant``: only one of its own.

    Raises:
        UnknownAdjustment: no such id.
        TooOldForStripe: approving the value of a ``last`` meter that is older than 34.5 days. At any later
            time it would replace a newer value.
    """
    now = now or datetime.now(UTC)
    try:
        key = uuid.UUID(adjustment_id)
    except ValueError:
        raise UnknownAdjustment(
            f"{adjustment_id!r} is not an adjustment id; see `tidemeter adjustments list`"
        ) from None
    with db.transaction():
        row = db.execute(
            "SELECT a.state, a.occurred_at, m.aggregation FROM adjustments a "
            "LEFT JOIN meters m USING (tenant_id, meter) "
            "WHERE adjustment_id = %(id)s AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
            "FOR UPDATE OF a",
            {"id": key, "tenant": tenant},
        ).fetchone()
        if row is None:
            raise UnknownAdjustment(
                f"no adjustment {adjustment_id}; see `tidemeter adjustments list --state all`"
            )
        state, occurred_at, aggregation = row
        if state != "pending":
            return Decision(str(key), state, False)
        if approved and aggregation == "last" and occurred_at < now - PUSHABLE:
            raise TooOldForStripe(
                f"adjustment {key} cannot be approved: its meter keeps the last value, and Stripe takes none "
                "that is older than 34.5 days; reject it"
            )
        decided: State = "approved" if approved else "rejected"
        db.execute(
            "UPDATE adjustments SET state = %s, decided_by = %s, decided_at = %s WHERE adjustment_id = %s",
            (decided, by, now, key),
        )
    return Decision(str(key), decided, True)


def find(
    db: psycopg.Connection[Any],
    *,
    states: Sequence[str] = STATES,
    tenant: str | None = None,
    meter: str | None = None,
    customer: str | None = None,
    only_tenant: str | None = None,
    after: Key | None = None,
    limit: int | None = None,
) -> Sequence[Row]:
    """Adjustments, oldest event first, by (occurred_at, adjustment_id).

    ``after`` such a pair, ``limit`` many. ``only_tenant`` is what the caller may see at all.
    """
    occurred_after, id_after = after or (None, None)
    return (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_COLUMNS} FROM adjustments "  # noqa: S608
            "WHERE state = ANY(%(states)s) AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
            "AND (%(only_tenant)s::text IS NULL OR tenant_id = %(only_tenant)s) "
            "AND (%(meter)s::text IS NULL OR meter = %(meter)s) "
            "AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s) "
            "AND (%(id_after)s::uuid IS NULL "
            "OR (occurred_at, adjustment_id) > (%(occurred_after)s::timestamptz, %(id_after)s)) "
            "ORDER BY occurred_at, adjustment_id LIMIT %(limit)s",
            {
                "states": list(states),
                "tenant": tenant,
                "only_tenant": only_tenant,
                "meter": meter,
                "customer": customer,
                "occurred_after": occurred_after,
                "id_after": id_after,
                "limit": limit,
            },
        )
        .fetchall()
    )
