"""One reconciliation: read what is there, ask Stripe, compare, keep what was found.

Accounts go through in batches, so memory does not grow with them. A batch is: books of its items in one
snapshot; Stripe's total of each account; and, for accounts that differ, Stripe's hours beside the journal's.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from services.reconciler import local, storing
from services.reconciler.asking import Asking, NotKnown, hours_around
from services.reconciler.judging import (
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
    per_second: float

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        """What the operator configured."""
        return cls(
            timedelta(seconds=settings.reconcile_patience_seconds),
            Decimal(str(settings.reconcile_epsilon)),
            timedelta(seconds=settings.invoice_grace_seconds),
            settings.reconcile_rate_per_second,
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
    asking = Asking(stripe, per_second=limits.per_second)
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
    now = clock()
    subjects = [
        subject
        for subject in await asyncio.to_thread(
            lambda: local.read_subjects(database.connection(), *places, now=now, grace=limits.grace)
        )
        if asked.period_at is None or subject.start <= asked.period_at < subject.end
    ]
    answers = await _ask(database, asking, subjects, limits, now)
    policy = Policy(clock(), limits.patience, limits.epsilon)
    verdicts = [
        (subject, _verdict(subject, [answers[one] for one in sorted(subject.accounts, key=str)], policy))
        for subject in subjects
    ]
    await in_thread(database, storing.store, verdicts, policy.now)
    return Counter(verdict.state for _, verdict in verdicts)


def _verdict(subject: Subject, answers: Sequence[AccountAnswer], policy: Policy) -> Verdict:
    period = Period(
        items=frozenset(subject.items),
        start=subject.start,
        end=subject.end,
        is_final=subject.is_final,
        has_customer=subject.stripe_customer is not None or bool(subject.accounts),
    )
    return judge(period, subject.parts, answers, policy)


# -- Stripe ------------------------------------------------------------------------------------------------


async def _ask(
    database: Database, asking: Asking, subjects: Sequence[Subject], limits: Limits, now: datetime
) -> Mapping[Account, AccountAnswer]:
    """What Stripe says of every account that a subject was or is billed to."""
    about: defaultdict[Account, list[Subject]] = defaultdict(list)
    for subject in subjects:
        for account in subject.accounts:
            about[account].append(subject)
    windows = {
        account: hours_around(min(one.start for one in ones), max(one.end for one in ones), now)
        for account, ones in about.items()
    }
    totals = dict(
        zip(
            about,
            await asyncio.gather(
                *(_total(asking, account, ones, windows) for account, ones in about.items())
            ),
            strict=True,
        )
    )
    told = await in_thread(database, local.reported_totals, windows)
    answers: dict[Account, AccountAnswer] = {}
    for account, total in totals.items():
        if isinstance(total, AccountAnswer):
            answers[account] = total
        elif total[1] is not None and same(told[account], total[1]):
            answers[account] = AccountAnswer()
        else:
            young_since = now - limits.patience
            answers[account] = await _by_hour(
                database, asking, account, total[0], windows[account], young_since
            )
    return answers


async def _total(
    asking: Asking, account: Account, subjects: Sequence[Subject], windows: Mapping[Account, Window]
) -> AccountAnswer | tuple[MeterAtStripe, Decimal | None]:
    """The meter, and Stripe's one number of the window; a ``last`` meter has none that says something."""
    try:
        meter = await asking.meter_of(account.event_name, {one.formula for one in subjects})
        if meter.formula == "last":
            return meter, None
        return meter, await asking.shown(meter, account.stripe_customer, windows[account])
    except NotKnown as error:
        return AccountAnswer(unknown=error.reason)


async def _by_hour(
    database: Database,
    asking: Asking,
    account: Account,
    meter: MeterAtStripe,
    window: Window,
    young_since: datetime,
) -> AccountAnswer:
    """Stripe first, our journal after it: see ``local``."""
    try:
        shown = await asking.shown_by_hour(meter, account.stripe_customer, window)
    except NotKnown as error:
        return AccountAnswer(unknown=error.reason)
    journal = await asyncio.to_thread(
        lambda: local.account_hours(database.connection(), account, window, young_since=young_since)
    )
    return AccountAnswer(compare_hours(journal, shown))
