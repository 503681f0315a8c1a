"""Fees of charges and refunds: what Stripe kept, by its own balance transactions, once known and fitting.

A row waits as ``pending`` until Stripe has said what its balance transaction is. No answer is never taken for
one: while Stripe is away nothing counts as tried. "There is none yet" does count, and after a week of it the
row ``differs``. Rows are claimed by a lease (``next_attempt_at``), so a process that dies leaves its rows to
the next one, and an answer that comes after the lease ended is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
import structlog

from services.streaming import outbox
from services.streaming.database import Database
from services.streaming.loops import Clock, in_thread
from services.streaming.observe import Status
from services.upkeep import PRODUCER
from services.wire.records import OutboxRow, ops_event
from services.wire.stripe_reader import Away, Missing, StripeReader
from services.wire.times import micros

log = structlog.get_logger(__name__)

Connection = psycopg.Connection[Any]

LOOK_SECONDS = 5.0
CLAIMS_MAX = 8
TRIED_FOR = timedelta(days=7)
PAUSE = timedelta(seconds=30)
PAUSE_MAX = timedelta(hours=6)
AWAY_PAUSE = timedelta(seconds=60)
DEGRADED_AFTER = timedelta(minutes=5)
#: Beyond the time that its two calls may take.
LEASE_SLACK = timedelta(seconds=5)

#: What Stripe calls the balance transaction of each kind; ``payment`` is for methods other than cards.
TYPES: Mapping[str, frozenset[str]] = {
    "charge": frozenset({"charge", "payment"}),
    "refund": frozenset({"refund", "payment_refund"}),
}


@dataclass(frozen=True, slots=True)
class Due:
    """A claimed row. ``lease`` is when the claim ends, and its mark: nobody else has the same."""

    object_id: str
    kind: str
    account: str
    charge_id: str
    amount: int
    currency: str
    balance_transaction: str | None
    attempts: int
    lease: datetime


@dataclass(frozen=True, slots=True)
class Booked:
    """A balance transaction, as far as it matters. Minor units of ``currency``; a refund's are negative."""

    balance_transaction: str
    type: str
    source: str | None
    amount: int
    fee: int
    net: int
    currency: str
    has_exchange_rate: bool


@dataclass(frozen=True, slots=True)
class NotYet:
    """Stripe answered, and there is no balance transaction."""


Answer = Booked | NotYet | Away


def pause_after(attempts: int) -> timedelta:
    """Until the next question, after ``attempts`` answers that there is none yet."""
    return min(PAUSE_MAX, PAUSE * (1 << min(attempts - 1, 20)))


def attempts_in(span: timedelta) -> int:
    """How many answers it takes until ``span`` has passed since the first."""
    attempts, passed = 1, timedelta()
    while passed < span:
        passed += pause_after(attempts)
        attempts += 1
    return attempts


ATTEMPTS_MAX = attempts_in(TRIED_FOR)


def difference(due: Due, booked: Booked) -> str | None:
    """What does not fit, as a code; None when all of it fits.

    In another currency only the sign can be compared: Stripe rounds by rules of its own.
    """
    if booked.type not in TYPES[due.kind]:
        return "type_differs"
    if booked.source != due.object_id:
        return "source_differs"
    expected = due.amount if due.kind == "charge" else -due.amount
    if booked.currency != due.currency:
        if not booked.has_exchange_rate:
            return "currency_differs"
        if booked.amount * expected < 0:
            return "amount_differs"
    elif booked.amount != expected:
        return "amount_differs"
    if booked.net != booked.amount - booked.fee:
        return "net_differs"
    return None


# -- PostgreSQL ------------------------------------------------------------------------------------------

_CLAIM = """
    UPDATE stripe_fees f SET next_attempt_at = %(lease)s
    FROM (
        SELECT object_id FROM stripe_fees WHERE state = 'pending' AND next_attempt_at <= %(now)s
        ORDER BY next_attempt_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) due
    WHERE f.object_id = due.object_id
    RETURNING f.object_id, f.kind, f.account, f.charge_id, f.amount, f.currency, f.balance_transaction,
        f.attempts, f.next_attempt_at
    """
_MINE = "object_id = %(object_id)s AND state = 'pending' AND next_attempt_at = %(lease)s"
_LATER = f"""
    UPDATE stripe_fees SET attempts = %(attempts)s, next_attempt_at = %(at)s WHERE {_MINE}
    """  # noqa: S608  (a constant)
_SETTLE = f"""
    UPDATE stripe_fees SET state = %(state)s, difference = %(difference)s, settled_at = %(now)s,
        attempts = %(attempts)s, balance_transaction = coalesce(%(balance_transaction)s, balance_transaction),
        fee = %(fee)s, net = %(net)s, fee_currency = %(fee_currency)s
    WHERE {_MINE}
    """  # noqa: S608  (a constant)
#: Both a charge and its refund come this way when they are settled, and both hold the charge's row: whichever
#: is second sees the other.
_LOCK_CHARGE = "SELECT FROM stripe_fees WHERE object_id = %s FOR UPDATE"
_FULL_REFUND = """
    SELECT r.object_id, r.account, c.object_id, c.fee + r.fee, c.fee_currency
    FROM stripe_fees c JOIN stripe_fees r ON r.charge_id = c.object_id AND r.kind = 'refund'
    WHERE c.object_id = %s AND c.kind = 'charge' AND c.state = 'matched' AND r.state = 'matched'
        AND r.amount = c.amount AND r.currency = c.currency AND r.fee_currency = c.fee_currency
        AND c.fee + r.fee > 0
    """


def claim(db: Connection, now: datetime, lease: timedelta, limit: int = CLAIMS_MAX) -> list[Due]:
    """Take what is due, for as long as ``lease``."""
    rows = db.execute(_CLAIM, {"now": now, "lease": now + lease, "limit": limit}).fetchall()
    return [Due(*row) for row in rows]


def settle(db: Connection, due: Due, answer: Answer, now: datetime) -> str:
    """Store what the answer means, with what has to be told, in one transaction; returns the state.

    ``lost``: the lease ended, and the row is somebody else's or settled.
    """
    with db.transaction():
        if isinstance(answer, Away):
            return _later(db, due, due.attempts, now + AWAY_PAUSE)
        attempts = due.attempts + 1
        if isinstance(answer, NotYet):
            if attempts < ATTEMPTS_MAX:
                return _later(db, due, attempts, now + pause_after(attempts))
            return _settled(db, due, None, "balance_transaction_missing", attempts, now)
        return _settled(db, due, answer, difference(due, answer), attempts, now)


def _later(db: Connection, due: Due, attempts: int, at: datetime) -> str:
    values = {"object_id": due.object_id, "lease": due.lease, "attempts": attempts, "at": at}
    return "pending" if db.execute(_LATER, values).rowcount else "lost"


def _settled(
    db: Connection, due: Due, booked: Booked | None, code: str | None, attempts: int, now: datetime
) -> str:
    state = "matched" if code is None else "differs"
    db.execute(_LOCK_CHARGE, (due.charge_id,))
    values = {
        "object_id": due.object_id,
        "lease": due.lease,
        "state": state,
        "difference": code,
        "now": now,
        "attempts": attempts,
        "balance_transaction": booked and booked.balance_transaction,
        "fee": booked and booked.fee,
        "net": booked and booked.net,
        "fee_currency": booked and booked.currency,
    }
    if not db.execute(_SETTLE, values).rowcount:
        return "lost"
    events = [_mismatch(due, code, booked, now)] if code is not None else _kept(db, due, now)
    outbox.enqueue(db, PRODUCER, events)
    return state


def _mismatch(due: Due, code: str, booked: Booked | None, now: datetime) -> OutboxRow:
    attributes = {
        "reason": code,
        "kind": due.kind,
        "charge_id": due.charge_id,
        "account": due.account,
        "balance_transaction": booked.balance_transaction if booked else due.balance_transaction or "",
    }
    return ops_event(
        "charge_fee_mismatch",
        subject_type=due.kind,
        subject_id=due.object_id,
        source="fees",
        at_us=micros(now),
        attributes=attributes,
    )


def _kept(db: Connection, due: Due, now: datetime) -> list[OutboxRow]:
    """The fee that a full refund did not bring back, told when the later of the two rows is settled.

    A charge that was refunded in full has one such refund; only of that is the amount known exactly.
    """
    rows = db.execute(_FULL_REFUND, (due.charge_id,)).fetchall()
    return [
        ops_event(
            "revenue_loss",
            subject_type="refund",
            subject_id=refund_id,
            source="fees",
            at_us=micros(now),
            attributes={
                "reason": "refund_fee_kept",
                "charge_id": charge_id,
                "account": account,
                "amount": str(kept),
                "currency": currency,
            },
        )
        for refund_id, account, charge_id, kept, currency in rows
        if due.kind == "charge" or due.object_id == refund_id
    ]


# -- Stripe ----------------------------------------------------------------------------------------------


async def ask(stripe: StripeReader, due: Due) -> Answer:
    """The balance transaction of a charge or refund, or why it is not known."""
    try:
        balance_id = due.balance_transaction
        if balance_id is None:
            read = stripe.charge if due.kind == "charge" else stripe.refund
            balance_id = _id_of((await read(due.object_id, due.account)).balance_transaction)
        if balance_id is None:
            return NotYet()
        found = await stripe.balance_transaction(balance_id, due.account)
        return Booked(
            balance_transaction=found.id,
            type=found.type,
            source=_id_of(found.source),
            amount=found.amount,
            fee=found.fee,
            net=found.net,
            currency=found.currency,
            has_exchange_rate=found.exchange_rate is not None,
        )
    except Missing:
        return NotYet()
    except Away as away:
        return away
    except (AttributeError, KeyError, TypeError):
        return Away("unreadable")


def _id_of(reference: Any) -> str | None:
    """Stripe gives an identifier, or the object itself when it is expanded."""
    if reference is None or isinstance(reference, str):
        return reference
    found: str = reference.id
    return found


class Fees:
    """The job: claim, ask, settle."""

    def __init__(
        self, database: Database, stripe: StripeReader, *, timeout_seconds: float, clock: Clock
    ) -> None:
        self._database = database
        self._stripe = stripe
        self._lease = timedelta(seconds=2 * timeout_seconds) + LEASE_SLACK
        self._clock = clock
        self._away_since: datetime | None = None
        self._away_reason = ""

    async def step(self) -> bool:
        """One batch; True when there may be more that is worth asking for now."""
        due = await in_thread(self._database, claim, self._clock(), self._lease)
        answers = await asyncio.gather(*(ask(self._stripe, one) for one in due))
        for one, answer in zip(due, answers, strict=True):
            state = await in_thread(self._database, settle, one, answer, self._clock())
            if state == "differs":
                log.warning("a fee does not fit", object_id=one.object_id)
        self._note(answers)
        return len(due) == CLAIMS_MAX and self._away_since is None

    def _note(self, answers: Sequence[Answer]) -> None:
        away = [answer for answer in answers if isinstance(answer, Away)]
        if away and len(away) == len(answers):
            self._away_since = self._away_since or self._clock()
            self._away_reason = away[0].reason
        elif answers:
            self._away_since = None

    def check(self) -> tuple[Status, str]:
        """For ``/health/ready``."""
        if self._away_since is None:
            return "healthy", "Stripe answers"
        status: Status = "degraded" if self._clock() - self._away_since >= DEGRADED_AFTER else "healthy"
        return status, f"no answer of Stripe since {self._away_since:%Y-%m-%dT%H:%MZ}: {self._away_reason}"
