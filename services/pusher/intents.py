"""The life of one intent: a delta that shall reach the billing system exactly once in effect.

Pure: times and chance are parameters. An intent is *doubted* from the moment a call for it began until an
answer proves that the call had no effect; the journal keeps that moment as ``first_sent_at``. A doubted
intent is only ever settled by proof: an acceptance, "already exists", or the sink's own total.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Context, Decimal, Inexact
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType

from services.wire.codec import Record
from services.wire.decimals import rounding
from services.wire.errors import require
from services.wire.times import instant
from services.wire.waits import full_jitter

AMOUNT_SCALE = 9
_EXACT = Context(prec=60, traps=[Inexact])
HOUR = timedelta(hours=1)

#: Why an intent that was never sent is given back to the counters.
TOO_OLD = "too_old_for_stripe"
PERIOD_CLOSED = "period_closed"


#: Codes, of answers and of error reports, that say that the sink's meter does not exist or is archived.
METER_AWAY_CODES = frozenset({"no_meter", "archived_meter"})


class Formula(StrEnum):
    """How the sink's meter aggregates what it is sent, as stored."""

    SUM = "sum"  # amounts are changes
    LAST = "last"  # amounts are values; of an hour's the one with the latest time stays


class State(StrEnum):
    """Where an intent stands, as stored."""

    PENDING = "pending"  # no call for it can have had an effect
    IN_FLIGHT = "in_flight"  # a call may be under way
    IN_DOUBT = "in_doubt"  # an earlier call may have had its effect
    REPORTED = "reported"
    FAILED = "failed"
    CANCELLED = "cancelled"  # replaced by another identifier, or its amount given back to the counters


OPEN = frozenset({State.PENDING, State.IN_FLIGHT, State.IN_DOUBT})

#: Every step the sender may take; from pending to cancelled goes what was never sent and comes too late. One
#: more belongs to others: a late error report turns reported into failed. The database allows no other step.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.PENDING: frozenset({State.IN_FLIGHT, State.CANCELLED}),
        State.IN_FLIGHT: frozenset(
            {State.PENDING, State.IN_DOUBT, State.REPORTED, State.FAILED, State.IN_FLIGHT}
        ),
        State.IN_DOUBT: frozenset({State.IN_FLIGHT, State.IN_DOUBT, State.REPORTED, State.CANCELLED}),
        State.REPORTED: frozenset(),
        State.FAILED: frozenset(),
        State.CANCELLED: frozenset(),
    }
)


class Meaning(StrEnum):
    """What a call to the sink meant for the intent."""

    DELIVERED = "delivered"
    ALREADY_DELIVERED = "already_delivered"  # the identifier is known there: an earlier call had its effect
    REFUSED = "refused"  # this call had no effect, and repeating it will not help
    METER_AWAY = "meter_away"  # no effect; nothing of this event name is taken until the sink's meter is back
    THROTTLED = "throttled"  # this call had no effect; later it may
    UNAUTHORISED = "unauthorised"  # no effect; nothing can be sent until an operator acts
    NOT_SENT = "not_sent"  # no byte of it left
    UNKNOWN = "unknown"  # anything else, silence included


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``code`` is a stable reason code, never a message: messages can quote content."""

    meaning: Meaning
    code: str | None = None
    http_status: int | None = None
    request_id: str | None = None


#: State after a call, by what it meant: (no earlier call is doubted, an earlier call is doubted).
#: A refusal does not disprove an earlier call, so a doubted intent stays in doubt.
AFTER: Mapping[Meaning, tuple[State, State]] = MappingProxyType(
    {
        Meaning.DELIVERED: (State.REPORTED, State.REPORTED),
        Meaning.ALREADY_DELIVERED: (State.REPORTED, State.REPORTED),
        Meaning.REFUSED: (State.FAILED, State.IN_DOUBT),
        Meaning.METER_AWAY: (State.PENDING, State.IN_DOUBT),
        Meaning.THROTTLED: (State.PENDING, State.IN_DOUBT),
        Meaning.UNAUTHORISED: (State.PENDING, State.IN_DOUBT),
        Meaning.NOT_SENT: (State.PENDING, State.IN_DOUBT),
        Meaning.UNKNOWN: (State.IN_DOUBT, State.IN_DOUBT),
    }
)


def next_state(state: State, meaning: Meaning, *, doubted: bool) -> State:
    """State of an intent in flight once its call is answered.

    Raises:
        Broken: only an intent in flight can be answered.
    """
    require(state is State.IN_FLIGHT, f"an answer for an intent that is {state}")
    after = AFTER[meaning][doubted]
    require(after in TRANSITIONS[state], f"{state} → {after} is no transition")
    return after


@dataclass(frozen=True, slots=True)
class Policy:
    """How long things may take.

    Stripe keeps identifiers unique for "at least 24 hours" (docs.stripe.com/api/billing/meter-event/create).
    Resending stops ``resend_for`` after the first call, early enough that the last call shows in summaries
    when they are read, ``ask_after`` after the first call.
    """

    resend_for: timedelta = timedelta(hours=23)
    ask_after: timedelta = timedelta(hours=24)
    #: A doubted intent of this age also has summaries read now and then: they can prove that it was applied.
    look_after: timedelta = timedelta(minutes=10)
    look_every: int = 4
    #: Summaries unreadable, or telling neither, for this long after ``ask_after``: an operator is told.
    unclear_after: timedelta = timedelta(hours=12)
    #: Stripe takes timestamps of the past 35 days up to 5 minutes ahead; a minute is left for the way.
    past_max: timedelta = timedelta(days=35) - timedelta(minutes=1)
    future_max: timedelta = timedelta(minutes=4)
    #: No first call begins this close to the moment that Stripe told an invoice is final.
    invoice_margin: timedelta = timedelta(minutes=5)
    backoff_base_seconds: float = 0.5
    backoff_cap_seconds: float = 300.0

    def turn_after(
        self, now: datetime, *, attempts: int, chance: float, doubted_since: datetime | None
    ) -> datetime:
        """When an intent that was not settled has its next turn: after a backoff, but never between the last
        resend and the first question."""
        wait = full_jitter(
            attempts, chance, base_seconds=self.backoff_base_seconds, cap_seconds=self.backoff_cap_seconds
        )
        return self.outside_gap(now + timedelta(seconds=wait), doubted_since)

    def outside_gap(self, wanted: datetime, doubted_since: datetime | None) -> datetime:
        """``wanted``, or the first question when that is nearer to the truth."""
        if doubted_since is not None and wanted - doubted_since >= self.resend_for:
            return max(wanted, doubted_since + self.ask_after)
        return wanted


class Action(StrEnum):
    """What to do with an intent whose turn has come."""

    SEND = "send"
    LOOK = "look"  # read the sink's total: applied, or still in doubt
    ASK = "ask"  # read the sink's total: applied, or not applied; nothing may be sent before
    WAIT = "wait"  # too old to send again, too young to ask
    EXPIRE = "expire"  # it comes too late, and no call for it can have had an effect: give its amount back


def expired_because(
    *, event_at: datetime, push_before: datetime | None, now: datetime, policy: Policy
) -> str | None:
    """Why a first call comes too late, as a code: the sink no longer takes the timestamp, or the period's
    invoice no longer takes the usage."""
    if now - event_at > policy.past_max:
        return TOO_OLD
    return PERIOD_CLOSED if push_before is not None and now >= push_before else None


def next_action(
    *,
    doubted_since: datetime | None,
    event_at: datetime,
    push_before: datetime | None,
    attempts: int,
    now: datetime,
    policy: Policy,
) -> Action:
    """The only place that decides whether an identifier may leave (again).

    What may have been applied is never given up for being late: only proof settles it.
    """
    if doubted_since is None:
        late = expired_because(event_at=event_at, push_before=push_before, now=now, policy=policy)
        return Action.SEND if late is None else Action.EXPIRE
    age = now - doubted_since
    if age >= policy.ask_after:
        return Action.ASK
    if age >= policy.resend_for:
        return Action.WAIT
    if age >= policy.look_after and attempts % policy.look_every == 0:
        return Action.LOOK
    return Action.SEND


@dataclass(frozen=True, slots=True)
class Shown:
    """What the sink shows of one customer, meter and hour. No value: it shows no usage, which is not 0."""

    value: Decimal | None


class Verdict(StrEnum):
    """What the sink shows of the hour says about a doubted intent."""

    APPLIED = "applied"
    NOT_APPLIED = "not_applied"
    UNCLEAR = "unclear"  # neither: someone else's usage, a lagging summary, a bug
    UNREADABLE = "unreadable"


def judge(
    shown: Shown | None, *, reported: Decimal, amount: Decimal, formula: Formula = Formula.SUM
) -> Verdict:
    """Compare what the sink shows with the journal's sum of the same customer, meter and hour.

    The sink adds in doubles, so equality allows their rounding, unless the amount itself is that small. With
    formula ``last`` the hour's value either is the amount, and sending it again would change nothing, or it
    is not.
    """
    if shown is None:
        return Verdict.UNREADABLE
    if formula is Formula.LAST:
        applied = shown.value is not None and abs(shown.value - amount) <= rounding(amount)
        return Verdict.APPLIED if applied else Verdict.NOT_APPLIED
    total = shown.value or Decimal(0)
    tolerance = rounding(reported + amount)
    if abs(amount) <= 2 * tolerance:
        return Verdict.UNCLEAR
    if abs(total - (reported + amount)) <= tolerance:
        return Verdict.APPLIED
    return Verdict.NOT_APPLIED if abs(total - reported) <= tolerance else Verdict.UNCLEAR


@dataclass(frozen=True, slots=True)
class Intent:
    """What shall be sent: fixed for ever once it is in the journal."""

    identifier: str
    item_id: str
    tenant_id: str
    meter: str
    period_start: datetime
    period_end: datetime
    hour_start: datetime
    event_name: str
    stripe_customer: str
    customer_payload_key: str
    value_payload_key: str
    amount: Decimal
    event_at: datetime
    replaces: str | None = None
    #: By name; read-only. Beside customer and value in what is sent.
    dimensions: Mapping[str, str] = field(default_factory=dict, hash=False)
    formula: Formula = Formula.SUM
    push_before: datetime | None = None  # a first call from here on comes too late for the period's invoice

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimensions", MappingProxyType(dict(self.dimensions)))

    @property
    def deadline(self) -> datetime:
        """The order of sending: the last moment for the invoice, else the end of the period."""
        return self.push_before or self.period_end

    @property
    def key(self) -> tuple[str, str]:
        """What allows one call at a time."""
        return self.stripe_customer, self.event_name

    def replacement(self) -> Intent:
        """The same usage under another identifier, which is the same whoever computes it.

        Raises:
            Broken: this intent is a replacement already; there is only one.
        """
        require(self.replaces is None, "a replacement is not replaced again")
        digest = blake2b(f"replaces {self.identifier}".encode(), digest_size=20).digest()
        identifier = base64.b32encode(digest).decode().lower()
        return replace(self, identifier=identifier, replaces=self.identifier)


def intent_of(delta: Record) -> Intent:
    """The intent of one decoded ``usage_delta`` of the current version.

    Raises:
        ArithmeticError, ValueError: a time, an amount or a dimension that no intent can hold.
    """
    units = int.from_bytes(delta["amount"], "big", signed=True)
    dimensions: Mapping[str, str] = delta["dimensions"]
    if any("\x00" in text for pair in dimensions.items() for text in pair):
        raise ValueError("NUL in a dimension; the journal cannot hold it")
    push_before = delta["push_before"]
    return Intent(
        identifier=delta["identifier"],
        item_id=delta["item_id"].hex(),
        tenant_id=delta["tenant_id"],
        meter=delta["meter"],
        period_start=instant(delta["period_start"]),
        period_end=instant(delta["period_end"]),
        hour_start=instant(delta["hour_start"]),
        event_name=delta["event_name"],
        stripe_customer=delta["stripe_customer"],
        customer_payload_key=delta["customer_payload_key"],
        value_payload_key=delta["value_payload_key"],
        amount=Decimal(units).scaleb(-AMOUNT_SCALE, _EXACT),
        event_at=instant(delta["event_at"]),
        dimensions=dimensions,
        formula=Formula(delta["formula"]),
        push_before=None if push_before is None else instant(push_before),
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """An intent this process may act on. ``attempts`` fences: a later claim of the same intent has more."""

    intent: Intent
    action: Action
    attempts: int
    doubted_since: datetime | None  # before this claim
    error_code: str | None
    claimed_at: datetime
    refusals: int = 0

    @property
    def idempotency_key(self) -> str:
        """The same for every call that an earlier one may have had its effect under.

        Stripe repeats a stored answer for a day (docs.stripe.com/api/idempotent_requests), a refusal too. So
        once a refusal proved that there was no effect, the next call has a new key; the identifier stays.
        """
        identifier = self.intent.identifier
        return identifier if not self.refusals else f"{identifier}-{self.refusals}"

    @property
    def from_state(self) -> State:
        """The stored state while the claim is held."""
        if self.action is Action.EXPIRE:
            return State.PENDING
        return State.IN_FLIGHT if self.action is Action.SEND else State.IN_DOUBT

    @property
    def doubted_from(self) -> datetime | None:
        """What is stored as ``first_sent_at`` while the claim is held."""
        return (
            self.claimed_at
            if self.from_state is State.IN_FLIGHT and not self.doubted_since
            else self.doubted_since
        )


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the journal shall say after a claim."""

    claim: Claim
    state: State
    first_sent_at: datetime | None
    next_attempt_at: datetime
    answer: Answer


def settlement_of(
    claim: Claim, answer: Answer, *, now: datetime, chance: float, policy: Policy
) -> Settlement:
    """The answered claim, with the time of its next turn if it has one."""
    state = next_state(State.IN_FLIGHT, answer.meaning, doubted=claim.doubted_since is not None)
    doubted_since = claim.doubted_since
    if state is not State.PENDING and doubted_since is None:
        doubted_since = claim.claimed_at
    turn = policy.turn_after(now, attempts=claim.attempts, chance=chance, doubted_since=doubted_since)
    return Settlement(claim, state, doubted_since, turn, answer)


def given_back(claim: Claim, code: str, *, now: datetime) -> Settlement:
    """A claim that was not acted on: as it was before, due at once."""
    state = State.PENDING if claim.doubted_since is None else State.IN_DOUBT
    answer = Answer(Meaning.NOT_SENT, claim.error_code or code)
    return Settlement(claim, state, claim.doubted_since, now, answer)
