"""What a comparison means. Pure.

Stripe's totals belong to an *account*: a Stripe customer and an event name. What should be there hour by hour
stands in the journal of pushes (``meter_events``); what should be there of a billing period follows from the
counters. So two comparisons meet here: the counters' period with the journal, and the journal's hours with
Stripe. Their differences add up to local - stripe exactly, each with its cause.

A difference that time may explain is no drift: what is on its way, and what Stripe took so short a while ago
that its summaries may not show it yet ("eventually consistent", docs.stripe.com/api/billing/
meter-event_summary). Where that is all there is to compare, the result is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from typing import Literal

from services.wire.decimals import rounding
from services.wire.times import utc

ZERO = Decimal(0)
HOUR = timedelta(hours=1)

State = Literal["ok", "adjust", "drift", "unknown"]
#: Why something is unknown.
Reason = Literal[
    "no_answer",  # Stripe did not answer, or not with all of it
    "in_doubt",  # a push of which it is not known whether Stripe applied it
    "summary_lags",  # Stripe may not show yet what it took
    "waiting",  # usage that should be at Stripe by now is still on its way
    "no_stripe_customer",
    "customer_missing",  # Stripe has no such customer
    "meter_missing",
    "meter_differs",  # Stripe's meter adds up otherwise
]
Cause = Literal[
    "missing_at_stripe",
    "surplus_at_stripe",
    "push_failed",  # Stripe refused it, and nobody has sent it again
    "counter_differs",  # a bucket is not what was closed, and nothing waits for closing
    "books_differ",  # what closing keeps is not what was sent
    "deficit",  # more was sent than there is; later usage makes up for it, in this period
]


# -- What is compared --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Account:
    """Where Stripe keeps a total."""

    stripe_customer: str
    event_name: str


#: An item and the start of a period of it.
Sender = tuple[object, datetime]


@dataclass(slots=True)
class JournalHour:
    """What the journal says of one hour of an account.

    ``reported``: what Stripe took; of a meter with the formula ``last`` the newest value. ``young_more`` and
    ``young_less``: of that, the positive and the negative amounts that it took less than the patience ago.
    ``flying_more`` and ``flying_less``: the same of calls under way. ``senders``: the items and periods that
    sent something in it.
    """

    reported: Decimal = ZERO
    young_more: Decimal = ZERO
    young_less: Decimal = ZERO
    flying_more: Decimal = ZERO
    flying_less: Decimal = ZERO
    doubts: int = 0
    senders: frozenset[Sender] = frozenset()


@dataclass(frozen=True, slots=True)
class HourDifference:
    """An hour in which Stripe shows something else than it was told. ``missing`` < 0: it shows more.

    ``explained``: it may be a matter of time. ``doubted``: it may be a push in doubt. ``candidates``: what
    was reported, by identifier and sender.
    """

    hour: datetime
    missing: Decimal
    explained: bool
    doubted: bool
    reported: Decimal
    senders: frozenset[Sender]
    candidates: Sequence[tuple[str, Decimal, Sender]] = ()


@dataclass(frozen=True, slots=True)
class AccountAnswer:
    """What Stripe says of an account: hours that differ, or why that is not known."""

    differences: Sequence[HourDifference] = ()
    unknown: Reason | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A part of the difference: ``amount`` is what Stripe lacks by it. ``hour`` None: of the period."""

    cause: Cause
    amount: Decimal
    hour: datetime | None = None
    identifiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ItemPeriod:
    """One item and billing period, by the counters and the journal.

    ``counted``: what it amounts to, carried in and out included. ``reported``: what Stripe took of it.
    ``waiting``: counted, and on its way to Stripe, the oldest part since ``waits_since``. ``findings``: why
    the rest of ``counted`` is not ``reported``.
    """

    counted: Decimal
    reported: Decimal
    waiting: Decimal
    waits_since: datetime | None
    doubts: int
    findings: Sequence[Finding] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of a customer's meter in a period. ``stripe`` None: it is not known."""

    state: State
    reason: Reason | None
    counted: Decimal
    waiting: Decimal
    local: Decimal
    stripe: Decimal | None
    diff_abs: Decimal | None
    diff_pct: Decimal | None
    findings: Sequence[Finding]


# -- Hours of an account -----------------------------------------------------------------------------------


def same(reported: Decimal, shown: Decimal) -> bool:
    """Whether they are, but for what adding up doubles may lose."""
    return abs(reported - shown) <= rounding(reported)


def compare_hours(
    journal: Mapping[datetime, JournalHour], shown: Mapping[datetime, Decimal]
) -> list[HourDifference]:
    """Every hour of which Stripe shows something else than it was told."""
    found = []
    for hour in sorted(journal.keys() | shown.keys()):
        told, there = journal.get(hour) or JournalHour(), shown.get(hour, ZERO)
        if same(told.reported, there):
            continue
        missing = told.reported - there
        found.append(
            HourDifference(
                hour=hour,
                missing=missing,
                explained=_time_explains(told, missing),
                doubted=told.doubts > 0,
                reported=told.reported,
                senders=told.senders,
            )
        )
    return found


def _time_explains(told: JournalHour, missing: Decimal) -> bool:
    """Stripe may lack what it took just now, and may have what is under way."""
    most = told.young_more - told.flying_less
    least = told.young_less - told.flying_more
    return least <= missing <= most


def named(candidates: Sequence[tuple[str, Decimal]], missing: Decimal) -> tuple[str, ...]:
    """The pushes that are missing, if only one choice adds up: all of them, or one."""
    if missing <= 0 or not candidates:
        return ()
    if sum((amount for _, amount in candidates), ZERO) == missing:
        return tuple(identifier for identifier, _ in candidates)
    fitting = [identifier for identifier, amount in candidates if amount == missing]
    return tuple(fitting) if len(fitting) == 1 else ()


# -- A period, by our own tables ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hour:
    """A bucket that is not as it is at rest. ``sent``: what deltas and meter events hold of it.

    ``waits``: for closing, or until its delta is settled. ``is_wrong``: it is not there although something
    was sent of it, or it does not know whether something is under way.
    """

    hour: datetime
    total: Decimal
    closed: Decimal
    pushed: Decimal
    sent: Decimal
    waits: bool
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Books:
    """What closing keeps of an item's period: closed + carried in - carried out - pushed = carry.

    ``total`` and ``closed`` are of the period: sums of its hours, or for ``max`` its greatest values.
    """

    total: Decimal
    closed: Decimal
    carried: Decimal
    carry: Decimal
    pushed: Decimal
    unit: Decimal
    is_max: bool
    hours: Sequence[Hour]


@dataclass(frozen=True, slots=True)
class Journal:
    """What became of an item's period on its way to Stripe, as amounts. ``failed``: by hour."""

    reported: Decimal = ZERO
    pending: Decimal = ZERO
    doubts: int = 0
    failed: Sequence[tuple[datetime, Decimal, tuple[str, ...]]] = ()
    waits_since: datetime | None = None


def of_books(books: Books, journal: Journal, closing_since: datetime | None) -> ItemPeriod:
    """Why what was counted is not what was reported. ``closing_since``: since when it waits for closing.

    Exactly: counted - fraction - to close - pending - in doubt = reported + the findings, where the
    fraction is what the carry holds below the meter's unit.
    """
    findings = [Finding("push_failed", amount, hour, names) for hour, amount, names in journal.failed]
    to_close = ZERO
    for hour in books.hours:
        changed = hour.total - hour.closed
        if changed and hour.waits:
            to_close += ZERO if books.is_max else changed
        elif changed:
            findings.append(Finding("counter_differs", ZERO if books.is_max else changed, hour.hour))
        if hour.pushed != hour.sent or hour.is_wrong:
            findings.append(Finding("books_differ", hour.pushed - hour.sent, hour.hour))
    if books.is_max and books.total != books.closed:
        if any(hour.waits for hour in books.hours):
            to_close = books.total - books.closed
        else:
            findings.append(Finding("counter_differs", books.total - books.closed))
    wrong = books.closed + books.carried - books.pushed - books.carry
    if wrong:
        findings.append(Finding("books_differ", wrong))
    owed = _whole(books.carry, books.unit)
    netted = min(max(-owed, ZERO), max(to_close, ZERO))  # what waits makes up for it
    owed, to_close = owed + netted, to_close - netted
    if owed:
        findings.append(Finding("deficit" if owed < 0 else "books_differ", owed))
    waits = [since for since in (journal.waits_since, closing_since if to_close else None) if since]
    return ItemPeriod(
        counted=books.total + books.carried,
        reported=journal.reported,
        waiting=to_close + journal.pending,
        waits_since=min(waits, default=None),
        doubts=journal.doubts,
        findings=findings,
    )


def of_values(
    newest: Hour | None,
    journal: Journal,
    unit: Decimal,
    others: Sequence[Hour],
    closing_since: datetime | None,
) -> ItemPeriod:
    """The same of a ``last`` meter: its newest hour's value is the period's. ``reported``: the newest one.

    Of other hours there is only said that they differ, with 0.
    """
    findings = [Finding("push_failed", ZERO, hour, names) for hour, _, names in journal.failed]
    findings += [Finding("books_differ", ZERO, one.hour) for one in others if one.is_wrong]
    findings += [
        Finding("counter_differs", ZERO, one.hour)
        for one in others
        if one.total != one.closed and not (one.waits or (newest is not None and one.hour == newest.hour))
    ]
    value = ZERO if newest is None else _whole(newest.total, unit)
    waiting, since = ZERO, journal.waits_since
    if newest is not None and newest.waits:
        since = since or closing_since
    if since is not None:
        waiting = value - journal.reported
    elif (
        newest is not None
        and not journal.doubts
        and (value != journal.reported or newest.total != newest.closed)
    ):
        cause: Cause = "push_failed" if journal.failed else "counter_differs"
        findings.append(Finding(cause, value - journal.reported, newest.hour))
    return ItemPeriod(value, journal.reported, waiting, since, journal.doubts, findings)


def _whole(amount: Decimal, unit: Decimal) -> Decimal:
    """Rounded towards zero to a multiple of ``unit``."""
    return (amount / unit).to_integral_value(ROUND_DOWN) * unit


# -- A period, with Stripe's answers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Period:
    """Which period of which items is judged."""

    items: frozenset[object]
    start: datetime
    end: datetime
    is_final: bool
    has_customer: bool
    #: Of a ``last`` meter: the hour that its value is of.
    newest: datetime | None = None

    @property
    def is_last(self) -> bool:
        """Whether its value is that of its newest hour."""
        return self.newest is not None


@dataclass(frozen=True, slots=True)
class Policy:
    """``patience``: how long Stripe's summaries, or a push, may take. ``epsilon``: up to which part of
    Stripe's total a difference is small."""

    now: datetime
    patience: timedelta
    epsilon: Decimal


def judge(
    period: Period, parts: Sequence[ItemPeriod], answers: Sequence[AccountAnswer], policy: Policy
) -> Verdict:
    """What is to be said of one customer's meter in one period.

    ``parts``: its items, one for each choice of dimensions. ``answers``: of the accounts it was sent to.
    """
    reported = sum((part.reported for part in parts), ZERO)
    findings = [finding for part in parts for finding in part.findings]
    local = reported + sum((finding.amount for finding in findings), ZERO)
    differences = list(_own(period, answers))
    hours = [one.hour for one in differences]
    lag = [one for one in differences if one.explained and not one.doubted]
    lagging = ZERO if period.is_last else sum((one.missing for one in lag), ZERO)
    stripe = reported - lagging
    for one in differences:
        if not (one.explained or one.doubted):
            finding = _finding(period, one, newest=max([period.newest or one.hour, *hours]))
            stripe -= finding.amount
            findings.append(finding)
    local -= lagging  # what Stripe may not show yet counts as on its way
    findings.sort(key=lambda one: (one.hour is None, one.hour and utc(one.hour), one.cause))
    counted = sum((part.counted for part in parts), ZERO)
    waiting = sum((part.waiting for part in parts), ZERO) + lagging
    nothing = not (local or stripe or findings) and waiting != 0
    reason = _unknown(
        period,
        parts,
        answers,
        policy,
        doubted=any(one.doubted for one in differences),
        lagging=_must_wait(period, lag, reported, policy.now),
        has_findings=bool(findings),
        nothing=nothing,
    )
    if reason is not None:
        seen = None if any(one.unknown for one in answers) or not period.has_customer else stripe
        return Verdict("unknown", reason, counted, waiting, local, seen, None, None, findings)
    state = _state(local, stripe, bool(findings), period.is_final, policy.epsilon)
    return Verdict(
        state, None, counted, waiting, local, stripe, abs(local - stripe), relative(local, stripe), findings
    )


def _finding(period: Period, one: HourDifference, *, newest: datetime) -> Finding:
    """Of a ``last`` meter only the newest hour has an amount, for its value is the period's."""
    cause: Cause = "missing_at_stripe" if one.missing > 0 else "surplus_at_stripe"
    own = [(name, amount) for name, amount, sender in one.candidates if sender[0] in period.items]
    if period.is_last and one.hour != newest:
        return Finding(cause, ZERO, one.hour)
    return Finding(cause, one.missing, one.hour, () if period.is_last else named(own, one.missing))


def relative(local: Decimal, stripe: Decimal) -> Decimal:
    """``|local - stripe| / stripe``; 1 when Stripe shows nothing and something should be there."""
    if local == stripe:
        return ZERO
    return Decimal(1) if stripe == 0 else abs(local - stripe) / abs(stripe)


def _own(period: Period, answers: Sequence[AccountAnswer]) -> Iterator[HourDifference]:
    """Hours of the period with something of its items; what nobody here sent belongs to whoever is billed."""
    mine = {(item, period.start) for item in period.items}
    for answer in answers:
        for one in answer.differences:
            within = one.hour + HOUR > period.start and one.hour < period.end
            if within and (not one.senders or one.senders & mine):
                yield one


def _must_wait(period: Period, lag: Sequence[HourDifference], reported: Decimal, now: datetime) -> bool:
    """Whether what Stripe may not show yet leaves nothing to go by. The hour that goes on may be left out."""
    if not lag:
        return False
    nothing_else = sum((one.reported for one in lag), ZERO) == reported
    return period.is_last or nothing_else or any(one.hour + HOUR <= now for one in lag)


def _unknown(
    period: Period,
    parts: Sequence[ItemPeriod],
    answers: Sequence[AccountAnswer],
    policy: Policy,
    *,
    doubted: bool,
    lagging: bool,
    has_findings: bool,
    nothing: bool,
) -> Reason | None:
    if not period.has_customer:
        return "no_stripe_customer"
    for answer in answers:
        if answer.unknown is not None:
            return answer.unknown
    if doubted or any(part.doubts for part in parts):
        return "in_doubt"
    if has_findings:
        return None  # whatever time may explain, these it does not
    if lagging:
        return "summary_lags"
    since = min((part.waits_since for part in parts if part.waits_since is not None), default=None)
    late = since is not None and (period.end <= policy.now or since < policy.now - policy.patience)
    return "waiting" if nothing or late else None


def _state(local: Decimal, stripe: Decimal, has_findings: bool, is_final: bool, epsilon: Decimal) -> State:
    if local == stripe:
        return "drift" if has_findings else "ok"  # parts that cancel out, or books that are wrong
    return "drift" if is_final or relative(local, stripe) > epsilon else "adjust"
