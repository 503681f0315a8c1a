"""A customer's billing periods, as the cycles of its subscriptions at Stripe say.

The oldest live subscription with a metered price decides. Live is what Stripe makes invoices for: ``active``,
``trialing``, ``past_due``, ``unpaid``. A ``paused`` one has none, and may start a new cycle when it resumes.
Without a live one a calendar stays as it is: what is billed last is billed in the periods it was used in.
"""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import datetime

import structlog

from services.webhooks.handlers.reading import Object, at, moment, objects
from services.webhooks.handling import Connection
from services.wire.errors import Misconfigured
from services.wire.periods import COUNT_MAX, UNITS, Calendar, calendar_text
from services.wire.times import micros

log = structlog.get_logger(__name__)

LIVE = ["active", "trialing", "past_due", "unpaid"]

_MONTHS = {"month": 1, "year": 12}
#: A leap year is at most 8 years away; no month repeats differently over more than that.
_MONTHS_BACK_MAX = 96


@dataclass(frozen=True, slots=True)
class Cycle:
    """``count`` × ``unit`` from ``anchor`` on."""

    count: int
    unit: str
    anchor: datetime

    def calendar(self, timezone: str) -> str | None:
        """The text of its calendar; None where there can be none."""
        try:
            return calendar_text(timezone, self.anchor, count=self.count, unit=self.unit)
        except Misconfigured:
            return None


@dataclass(frozen=True, slots=True)
class LiveCycle:
    """The cycle of a live metered subscription."""

    subscription_id: str
    cycle: Cycle


def metered_cycles(subscription: Object) -> tuple[bool, list[Cycle]]:
    """Whether a subscription has a metered price, and the different cycles of these, the first listed first.

    Raises:
        Refused: it has one, but no anchor.
    """
    cycles: list[Cycle] = []
    is_metered = False
    for item in objects(at(subscription, "items")):
        recurring = at(item, "price", "recurring") or at(item, "plan")
        if at(recurring, "usage_type") != "metered":
            continue
        is_metered = True
        anchor = moment(subscription, "billing_cycle_anchor")
        unit, count = at(recurring, "interval"), at(recurring, "interval_count")
        if unit not in UNITS or not isinstance(count, int) or not 1 <= count <= COUNT_MAX:
            continue
        day = at(subscription, "billing_cycle_anchor_config", "day_of_month")
        cycle = Cycle(int(count), unit, _with_day(anchor, day, int(count) * _MONTHS.get(unit, 0)))
        if cycle.calendar("UTC") is not None and cycle not in cycles:
            cycles.append(cycle)
    return is_metered, cycles


def _with_day(anchor: datetime, day: object, months: int) -> datetime:
    """An anchor of the same cycle that is on ``day`` of its month.

    A subscription on the 31st that began in a shorter month has its anchor on that month's last day, although
    a later period begins on a 31st. An earlier start of a period that has that day says the same better.
    """
    if not isinstance(day, int) or not anchor.day < day <= 31 or months == 0:
        return anchor
    if anchor.day != monthrange(anchor.year, anchor.month)[1]:
        return anchor
    for back in range(months, _MONTHS_BACK_MAX + 1, months):
        year, month = divmod(anchor.year * 12 + anchor.month - 1 - back, 12)
        if day <= monthrange(year, month + 1)[1]:
            return anchor.replace(year=year, month=month + 1, day=day)
    return anchor


def hold(db: Connection, stripe_customer: str) -> None:
    """Until the transaction ends nobody else handles events of this customer: its periods follow from
    several objects, and none of them may be overlooked."""
    db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"stripe {stripe_customer}",))


def live_cycles(db: Connection, stripe_customer: str) -> list[LiveCycle]:
    """Those of a customer of our own account, the oldest subscription first."""
    rows = db.execute(
        "SELECT subscription_id, count, unit, anchor FROM stripe_subscriptions "
        "WHERE stripe_customer = %s AND account = '' AND is_metered AND status = ANY(%s) "
        "AND unit IS NOT NULL ORDER BY created_at, subscription_id",
        (stripe_customer, LIVE),
    ).fetchall()
    return [LiveCycle(row[0], Cycle(*row[1:])) for row in rows]


def feed_calendars(db: Connection, stripe_customer: str) -> None:
    """Give everybody who is billed as this customer its periods, if they are known and others than before."""
    live = live_cycles(db, stripe_customer)
    if not live:
        return
    row = db.execute(
        "SELECT timezone FROM stripe_customers WHERE stripe_customer = %s AND account = ''",
        (stripe_customer,),
    ).fetchone()
    calendar = live[0].cycle.calendar((row and row[0]) or "UTC")
    if calendar is None:
        log.warning("no calendar fits a subscription", subscription_id=live[0].subscription_id)
        return
    changed = db.execute(
        "UPDATE customers SET calendar = %s WHERE stripe_customer = %s AND calendar IS DISTINCT FROM %s",
        (calendar, stripe_customer, calendar),
    ).rowcount
    if changed:
        log.info("billing periods follow Stripe", stripe_customer=stripe_customer, customers=changed)


def same_periods(one: Cycle, other: Cycle) -> bool:
    """Whether two cycles have the same edges: equal, or one begins with a later period of the other."""
    if (one.count, one.unit) != (other.count, other.unit):
        return False
    first, second = sorted((one.anchor, other.anchor))
    if one.unit in _MONTHS and first.day != second.day:
        return False
    at_us = micros(second)
    text = Cycle(one.count, one.unit, first).calendar("UTC")
    return text is not None and Calendar.parse(text).period_start(at_us) == at_us
