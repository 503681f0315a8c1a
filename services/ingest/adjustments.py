"""Adjustments: find them, and decide them.

A decision only changes the state, from ``pending`` to ``approved`` or ``rejected``. Counting what was
approved is the counters' part, within seconds: only they know where it belongs.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, Literal, LiteralString, get_args

import psycopg
from psycopg.rows import TupleRow, dict_row
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from services.wire.errors import TidemeterError, Transient

State = Literal["pending", "approved", "applied", "rejected"]
STATES: tuple[State, ...] = get_args(State)

#: Below Stripe's 35 days, with room for the push itself.
PUSHABLE = timedelta(days=34, hours=12)

CONNECTIONS_MAX = 4
WAIT_S = 2.0
SERVER_TIMEOUT_MS = 5000

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


class AdjustmentStore:
    """PostgreSQL for threads, connected at first use: a process that only takes usage has no such connection.

    Apart from the pool that keys are verified with, so that nobody's list makes usage wait.
    """

    def __init__(self, dsn: Callable[[], str]) -> None:
        self._dsn = dsn
        self._lock = Lock()
        self._pool: ConnectionPool[psycopg.Connection[TupleRow]] | None = None

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in autocommit mode.

        Raises:
            Transient: PostgreSQL does not answer within the time limit.
        """
        try:
            with self._opened().connection() as connection:
                yield connection
        except (psycopg.OperationalError, PoolTimeout, TooManyRequests, OSError) as error:
            raise Transient("PostgreSQL does not answer") from error

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            if self._pool is not None:
                self._pool.close(timeout=WAIT_S)
                self._pool = None

    def _opened(self) -> ConnectionPool[psycopg.Connection[TupleRow]]:
        with self._lock:
            if self._pool is None:
                self._pool = ConnectionPool(
                    self._dsn(),
                    kwargs={
                        "autocommit": True,
                        "connect_timeout": int(WAIT_S),
                        "options": f"-c statement_timeout={SERVER_TIMEOUT_MS}",
                        "application_name": "tidemeter-ingest",
                    },
                    min_size=0,
                    max_size=CONNECTIONS_MAX,
                    max_waiting=64,
                    timeout=WAIT_S,
                    reconnect_timeout=WAIT_S,
                    num_workers=1,
                    check=ConnectionPool.check_connection,
                    open=True,
                )
            return self._pool
