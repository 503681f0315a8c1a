"""Give amounts of intents back to the counters: what came too late, and what an operator has sent again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from services.wire.errors import require

_GIVEN = """
    unnest(
        %(items)s::uuid[], %(hours)s::timestamptz[], %(periods)s::timestamptz[], %(amounts)s::numeric[],
        %(formulas)s::text[]
    ) AS a (item_id, hour_start, period_start, amount, formula)
    """

_MARK_DIRTY = f"""
    WITH held AS (
        SELECT item_id, given.hour_start
        FROM items JOIN (SELECT item_id, min(hour_start) AS hour_start FROM {_GIVEN} GROUP BY item_id) given
            USING (item_id)
        ORDER BY item_id FOR UPDATE OF items
    )
    UPDATE items i SET dirty_from = least(i.dirty_from, held.hour_start)
    FROM held WHERE i.item_id = held.item_id
    RETURNING i.item_id
    """  # noqa: S608  constants only

#: A `last` or `max` bucket counts as never closed again. What a `last` bucket pushed was no change.
_GIVE_TO_BUCKETS = f"""
    WITH given AS (
        SELECT item_id, hour_start, period_start, bool_or(formula = 'last') AS is_last,
            coalesce(sum(amount) FILTER (WHERE formula = 'sum'), 0) AS amount
        FROM {_GIVEN} GROUP BY item_id, hour_start, period_start
    ), held AS (
        SELECT item_id, hour_start, period_start, given.amount, given.is_last,
            NOT given.is_last AND EXISTS (
                SELECT FROM items JOIN meters USING (tenant_id, meter)
                WHERE items.item_id = given.item_id AND aggregation = 'max') AS is_max
        FROM buckets JOIN given USING (item_id, hour_start, period_start)
        ORDER BY item_id, hour_start, period_start FOR UPDATE OF buckets
    )
    UPDATE buckets b SET
        closed = CASE WHEN held.is_last OR held.is_max THEN NULL ELSE b.closed - held.amount END,
        pushed = b.pushed - held.amount
    FROM held
    WHERE (b.item_id, b.hour_start, b.period_start) = (held.item_id, held.hour_start, held.period_start)
    RETURNING b.item_id, b.period_start, held.is_max
    """  # noqa: S608  constants only

#: `max`: no bucket's difference can hold a rise that was not billed; its period takes it for not closed.
_GIVE_TO_PERIODS = f"""
    WITH given AS (
        SELECT item_id, period_start, sum(amount) AS amount
        FROM {_GIVEN} JOIN items USING (item_id) JOIN meters USING (tenant_id, meter)
        WHERE aggregation = 'max' AND formula = 'sum' GROUP BY item_id, period_start
    ), held AS (
        SELECT item_id, period_start, given.amount FROM item_periods JOIN given USING (item_id, period_start)
        ORDER BY item_id, period_start FOR UPDATE OF item_periods
    )
    UPDATE item_periods p SET value = p.value - held.amount
    FROM held WHERE (p.item_id, p.period_start) = (held.item_id, held.period_start)
    RETURNING p.item_id
    """  # noqa: S608  constants only


@dataclass(frozen=True, slots=True)
class Returned:
    """The amount of an intent that was cancelled, and where it came from."""

    item_id: UUID
    hour_start: datetime
    period_start: datetime
    amount: Decimal
    formula: str


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Gives amounts back to the counters, to be closed again or carried forward.

    The caller, with a connection of either kind, runs :data:`STATEMENTS` in their order with :attr:`values`,
    in the transaction that cancelled the intents, and has :meth:`check` read what they return.
    """

    STATEMENTS: ClassVar[tuple[str, ...]] = (_MARK_DIRTY, _GIVE_TO_BUCKETS, _GIVE_TO_PERIODS)
    amounts: Sequence[Returned]

    @property
    def values(self) -> dict[str, list[Any]]:
        """Parameters of each statement."""
        return {
            "items": [one.item_id for one in self.amounts],
            "hours": [one.hour_start for one in self.amounts],
            "periods": [one.period_start for one in self.amounts],
            "amounts": [one.amount for one in self.amounts],
            "formulas": [one.formula for one in self.amounts],
        }

    def check(self, items: Sequence[Any], buckets: Sequence[Any], carries: Sequence[Any]) -> None:
        """Every amount has arrived.

        Raises:
            Broken: an item, a bucket, or for a `max` meter an item period is missing.
        """
        places = {(one.item_id, one.hour_start, one.period_start) for one in self.amounts}
        peaks = {(item, period) for item, period, is_max in buckets if is_max}
        require(len(items) == len({item for item, _, _ in places}), "an amount has no item to go back to")
        require(len(buckets) == len(places), "an amount has no bucket to go back to")
        require(len(carries) == len(peaks), "an amount has no item period to go back to")
