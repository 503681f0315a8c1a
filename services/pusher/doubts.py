"""An operator settles a doubt by hand, when a day has passed and Stripe's own total proves nothing.

The pusher settles what it can prove. What is left has a total that fits neither case: somebody else writes to
the same customer and meter, or a summary is wrong. Only a person can then find out whether Stripe applied it.
"""

from __future__ import annotations

from datetime import datetime

from psycopg.rows import dict_row

from services.pusher.intents import Policy
from services.pusher.journal import (
    FREE_BUCKETS,
    INSERT_INTENTS,
    INTENT_COLUMNS,
    INTENT_FIELDS,
    Connection,
    intent_values,
    stored_intent,
)
from services.wire.errors import require


class CannotSettle(ValueError):
    """The message says why this intent is not for a person to settle, or not now."""


_LOCK = f"""
    SELECT {INTENT_COLUMNS}, state, first_sent_at FROM meter_events WHERE identifier = %s FOR UPDATE
    """  # noqa: S608  constants only

_SETTLE = """
    UPDATE meter_events SET state = %s, attempts = attempts + 1, settled_at = %s, settled_by = %s,
        error_code = 'settled_by_hand'
    WHERE identifier = %s
    """


def settle_by_hand(db: Connection, identifier: str, *, applied: bool, by: str, now: datetime) -> str | None:
    """Say of an intent in doubt whether Stripe applied it, in a transaction of its own.

    Applied: it is reported. Not applied: it is cancelled, and one replacement takes its place, whose
    identifier is returned. A pusher that holds it at this moment loses its claim.

    Raises:
        CannotSettle: unknown, not in doubt, in doubt for less than a day, or a replacement itself.
        Broken: its bucket is missing or was not open.
    """
    policy = Policy()
    with db.transaction():
        row = db.cursor(row_factory=dict_row).execute(_LOCK, (identifier,)).fetchone()
        if row is None:
            raise CannotSettle(f"there is no meter event {identifier}")
        if row["state"] != "in_doubt":
            raise CannotSettle(f"{identifier} is {row['state']}, not in doubt")
        asked_from = row["first_sent_at"] + policy.ask_after
        if now < asked_from:
            raise CannotSettle(
                f"{identifier} is sent again or settled without you until {asked_from:%Y-%m-%d %H:%M} UTC"
            )
        if not applied and row["replaces"] is not None:
            raise CannotSettle(
                f"{identifier} replaces another one already, and only one replacement is ever sent; "
                "settle it as applied and correct the customer's usage with an event of its own"
            )
        state = "reported" if applied else "cancelled"
        db.execute(_SETTLE, (state, now, by, identifier))
        if applied:
            freed = db.execute(FREE_BUCKETS, ([identifier],)).rowcount
            require(freed == 1, "the bucket of a doubted intent was not open")
            return None
        successor = stored_intent([row[name] for name in INTENT_FIELDS]).replacement()
        stored = db.execute(INSERT_INTENTS, intent_values([successor], policy)).rowcount
        require(stored == 1, "an intent was replaced twice")
        return successor.identifier
