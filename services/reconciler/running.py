"""One reconciliation: read what is there, ask Stripe, compare, keep what was found.

Accounts go through in batches, so memory does not grow with them. A batch is: books of its items in one
snapshot; Stripe's total of each account; and, for accounts that differ, Stripe's hours beside the journal's.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

from services.reconciler import local, storing
from services.reconciler.asking import Asking, NotKnown, hours_around
from services.reconciler.judging import (
    HOUR,
    Account,
    AccountAnswer,
    Period,
    Policy,
    State,
    Verdict,
    compare_hours,
    judge,
    same,
)
from services.reconciler.local import Subject, Window
from services.streaming.database import Database
from services.streaming.loops import in_thread
from services.streaming.reconciliation import Asked
from services.wire.settings import Settings
from services.wire.stripe_reader import MeterAtStripe, StripeReader

#: (places done, places in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """``grace``: from the end of a period to its final invoice, where Stripe has not told."""

    patience: timedelta
    epsilon: Decimal
    grace: timedelta

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        """What the operator configured."""
        return cls(
            timedelta(seconds=settings.reconcile_patience_seconds),
            Decimal(str(settings.reconcile_epsilon)),
            timedelta(seconds=settings.invoice_grace_seconds),
        )


async def reconcile(
    database: Database,
    stripe: StripeReader,
    asked: Asked,
    limits: Limits,
    *,
    clock: Callable[[], datetime],
    progress: Progress = lambda *_: None,
) -> Counter[State]:
    """Reconcile what was asked for and store what was found; returns how many periods are in which state.

    That Stripe does not answer is a finding (``unknown``), not an error.

    Raises:
        psycopg.OperationalError: PostgreSQL is away; batches that were done are stored.
    """
    began = clock()
    asking = Asking(stripe)
    places = await in_thread(database, local.list_items, asked, began)
    found: Counter[State] = Counter()
    for first in range(1, places + 1, local.ACCOUNTS_AT_ONCE):
        last = min(first + local.ACCOUNTS_AT_ONCE - 1, places)
        found += await _batch(database, asking, asked, limits, (first, last), clock)
        progress(last, places)
    await in_thread(database, storing.forget, asked, began)
    return found


async def _batch(
    database: Database,
    asking: Asking,
    asked: Asked,
    limits: Limits,
    places: tuple[int, int],
    clock: Callable[[], datetime],
) -> Counter[State]:
    await in_thread(database, _lock)
    try:
        now = clock()
        subjects = await asyncio.to_thread(
            lambda: local.read_subjects(database.connection(), *places, now=now, grace=limits.grace)
        )
        if asked.period_at is not None:
            subjects = [one for one in subjects if one.start <= asked.period_at < one.end]
        answers = await _ask(database, asking, subjects, now, now - limits.patience)
        policy = Policy(now, limits.patience, limits.epsilon)
        verdicts = [
            (subject, _verdict(subject, [answers[one] for one in _totals_of(subject, now)], policy))
            for subject in subjects
        ]
        return await in_thread(database, storing.store, verdicts, now)
    finally:
        await in_thread(database, _unlock)


#: Whoever reads a batch stores it before another reads one: an older finding never replaces a newer.
_LOCK = "hashtextextended('tidemeter/reconciling', 0)"


def _lock(db: local.Connection) -> None:
    db.execute("SET lock_timeout = '60s'")  # one that was stopped must not stop us
    db.execute(f"SELECT pg_advisory_lock({_LOCK})")  # noqa: S608  a constant


def _unlock(db: local.Connection) -> None:
    db.execute(f"SELECT pg_advisory_unlock({_LOCK})")  # noqa: S608  a constant


def _verdict(subject: Subject, answers: Sequence[AccountAnswer], policy: Policy) -> Verdict:
    period = Period(
        items=frozenset(subject.items),
        start=subject.start,
        end=subject.end,
        is_final=subject.is_final,
        has_customer=subject.stripe_customer is not None or bool(subject.accounts),
        newest=subject.newest,
    )
    return judge(period, subject.parts, answers, policy)


# -- Stripe ------------------------------------------------------------------------------------------------

#: What is asked for: an account in the full hours around a period.
Total = tuple[Account, Window]


def _totals_of(subject: Subject, now: datetime) -> list[Total]:
    window = hours_around(subject.start, subject.end, now)
    return [(account, window) for account in sorted(subject.accounts, key=str)]


async def _ask(
    database: Database, asking: Asking, subjects: Sequence[Subject], now: datetime, young_since: datetime
) -> Mapping[Total, AccountAnswer]:
    """What Stripe says of every account that a subject was or is billed to, in the hours of its period.

    One number first. Where that differs, and what is still moving alone explains it, only the last hours.
    """
    formulas: defaultdict[Total, set[str]] = defaultdict(set)
    for subject in subjects:
        for total in _totals_of(subject, now):
            formulas[total].add(subject.formula)
    found = await asyncio.gather(*(_total(asking, *one, formulas[one]) for one in formulas))
    told = await in_thread(database, local.reported_totals, list(formulas))
    answers: dict[Total, AccountAnswer] = {}
    differing: dict[Total, MeterAtStripe] = {}
    for one, answer, ours in zip(formulas, found, told, strict=True):
        if isinstance(answer, AccountAnswer):
            answers[one] = answer
        elif answer[1] is not None and same(ours, answer[1]):
            answers[one] = AccountAnswer()
        else:
            differing[one] = answer[0]
    answers.update(await _differing(database, asking, differing, now, young_since))
    return answers


async def _total(
    asking: Asking, account: Account, window: Window, formulas: set[str]
) -> AccountAnswer | tuple[MeterAtStripe, Decimal | None]:
    """The meter, and Stripe's one number of the window; a ``last`` meter has none that says something."""
    try:
        meter = await asking.meter_of(account.event_name, formulas)
        if meter.formula == "last":
            return meter, None
        return meter, await asking.shown(meter, account.stripe_customer, window)
    except NotKnown as error:
        return AccountAnswer(unknown=error.reason)


async def _differing(
    database: Database,
    asking: Asking,
    differing: Mapping[Total, MeterAtStripe],
    now: datetime,
    young_since: datetime,
) -> dict[Total, AccountAnswer]:
    """The hours of accounts whose total differs; of those that differ lately only, the last few."""
    parts = {one: _settled_part(one[1], now) for one in differing}
    asked = {one: part for one, part in parts.items() if part and differing[one].formula != "last"}
    settled = await asyncio.gather(*(_total(asking, one[0], part, {"sum"}) for one, part in asked.items()))
    told = await in_thread(database, local.reported_totals, [(one[0], part) for one, part in asked.items()])
    windows = {one: one[1] for one in differing}
    for one, answer, ours in zip(asked, settled, told, strict=True):
        if not isinstance(answer, AccountAnswer) and answer[1] is not None and same(ours, answer[1]):
            windows[one] = (asked[one][1], one[1][1])
    hours = await asyncio.gather(*(_hours(asking, differing[one], one[0], windows[one]) for one in differing))
    return {
        one: shown
        if isinstance(shown, AccountAnswer)
        else await asyncio.to_thread(_compared, database, one[0], windows[one], shown, young_since)
        for one, shown in zip(differing, hours, strict=True)
    }


def _settled_part(window: Window, now: datetime) -> Window | None:
    """The hours of a window in which nothing should be moving any more."""
    until = hours_around(now, now, now)[0] - 2 * HOUR
    return (window[0], until) if window[0] < until < window[1] else None


async def _hours(
    asking: Asking, meter: MeterAtStripe, account: Account, window: Window
) -> AccountAnswer | Mapping[datetime, Decimal]:
    try:
        return await asking.shown_by_hour(meter, account.stripe_customer, window)
    except NotKnown as error:
        return AccountAnswer(unknown=error.reason)


def _compared(
    database: Database,
    account: Account,
    window: Window,
    shown: Mapping[datetime, Decimal],
    young_since: datetime,
) -> AccountAnswer:
    """Stripe first, our journal after it: see ``local``."""
    db = database.connection()
    journal = local.account_hours(db, account, window, young_since=young_since)
    return AccountAnswer(
        [
            replace(one, candidates=local.candidates(db, account, one.hour)) if one.missing > 0 else one
            for one in compare_hours(journal, shown)
        ]
    )
