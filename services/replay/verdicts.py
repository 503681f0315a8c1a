"""Whether the numbers of an hour agree, and what the difference is where they do not. Pure.

Each difference is taken apart exactly: what its parts do not add up to is ``unexplained``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from services.counters.portions import unit_of, whole
from services.streaming.explanation import Check, Verdict
from services.wire.decimals import plain
from services.wire.usage import QUANTITY_UNIT

ZERO = Decimal(0)

#: Intents that hold an amount which Stripe does not have for sure.
UNSETTLED = ("pending", "in_flight", "in_doubt", "failed", "cancelled", "not_recorded")

_WORDS = {
    "not_closed": "not closed into a delta yet",
    "carried_in_period": "left in the carry of its period, or sent with other hours of it",
    "carried_forward_out": "carried forward into a later hour",
    "carried_forward_in": "carried forward into this hour from others",
    "pending": "waits to be sent",
    "in_flight": "is being sent",
    "in_doubt": "is in doubt",
    "failed": "was refused by Stripe",
    "cancelled": "was taken back before it was sent",
    "not_recorded": "waits for the pusher",
    "unexplained": "has no explanation",
}


@dataclass(slots=True)
class HourNumbers:
    """The buckets of one item and hour, all periods together, and what was made of them.

    ``reported`` is what Stripe was told of the hour: a sum, or of a ``last`` meter the newest value.
    ``unsettled``: amounts by state, and those without an intent; of a ``last`` meter only the newest delta.
    """

    item: int
    aggregation: str
    scale: int
    billable: bool
    total: Decimal = ZERO
    closed: Decimal = ZERO
    pushed: Decimal = ZERO
    open: bool = False
    carried_out: Decimal = ZERO
    carried_in: Decimal = ZERO
    reported: Decimal = ZERO
    unsettled: Mapping[str, Decimal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeriodNumbers:
    """What closing kept of a period: closed + carried in − carried out − pushed = carry."""

    item: int
    start: datetime
    closed: Decimal
    pushed: Decimal
    carried_out: Decimal
    carried_in: Decimal
    carry: Decimal


def check_events(
    item: int,
    period_start: datetime,
    bucket: tuple[Decimal, int],
    own: tuple[Decimal, int] | None,
    aggregation: str,
) -> Check:
    """A bucket's total and events beside what the log amounts to; ``own`` None: it is not all there."""
    total, events = bucket
    if own is None:
        return Check(
            about="events",
            item=item,
            period_start=period_start,
            verdict="unknown",
            difference=None,
            parts={},
            sentence=f"The bucket holds {plain(total)} of {events} events; whether that is right cannot be "
            "told, because not every record of the hour is there or can be read.",
        )
    found, number = own
    difference = total - found
    agree = difference == 0 and events == number
    says = f"By {aggregation}, the {number} events amount to {plain(found)}"
    return Check(
        about="events",
        item=item,
        period_start=period_start,
        verdict="agree" if agree else "differ",
        difference=difference,
        parts={} if agree else {"unexplained": difference},
        sentence=f"{says}, and so does the bucket."
        if agree
        else f"{says}; the bucket holds {plain(total)} of {events} events{_more(difference)}.",
    )


def check_pushes(hour: HourNumbers) -> Check:
    """What an hour's buckets hold, and what was reported to Stripe of it."""
    difference = hour.total - hour.reported
    parts = {name: amount for name, amount in _parts(hour, difference).items() if amount}
    return Check(
        about="pushes",
        item=hour.item,
        period_start=None,
        verdict=_verdict(difference, parts),
        difference=difference,
        parts=parts,
        sentence=_pushed(hour, difference, parts),
    )


def _parts(hour: HourNumbers, difference: Decimal) -> dict[str, Decimal]:
    if hour.aggregation == "last":
        value = _whole(hour.total, hour.scale)
        parts = {"carried_in_period": hour.total - value, "not_closed": value - hour.pushed}
    else:
        parts = {
            "not_closed": hour.total - hour.closed,
            "carried_in_period": hour.closed - hour.pushed - hour.carried_out + hour.carried_in,
            "carried_forward_out": hour.carried_out,
            "carried_forward_in": -hour.carried_in,
        }
    parts |= {state: hour.unsettled.get(state, ZERO) for state in UNSETTLED}
    parts["unexplained"] = difference - sum(parts.values(), ZERO)
    return parts


def _pushed(hour: HourNumbers, difference: Decimal, parts: Mapping[str, Decimal]) -> str:
    what = "The value of this hour is" if hour.aggregation == "last" else "This hour amounts to"
    if not parts and not difference:
        return f"{what} {plain(hour.total)}, and that was reported to Stripe."
    words = "; ".join(f"{plain(amount)} {_words(name, hour)}" for name, amount in parts.items())
    sentence = f"{what} {plain(hour.total)}, and {plain(hour.reported)} was reported to Stripe: {words}."
    if hour.open and not hour.billable:
        return sentence
    if not hour.billable:
        return sentence[:-1] + "; its customer has no Stripe id."
    if hour.open and parts.get("not_closed"):
        return sentence[:-1] + "; that waits until the hour's open delta is settled."
    return sentence


def _words(name: str, hour: HourNumbers) -> str:
    if name == "carried_in_period" and hour.aggregation == "max":
        return "was reported with other hours: only what raises the period's greatest value is sent"
    if name == "carried_in_period" and hour.aggregation == "last":
        return "is finer than the meter's scale"
    return _WORDS[name]


def check_period(period: PeriodNumbers) -> Check:
    """Whether what a period closed is what it sent, passed on, or keeps."""
    carry = period.closed + period.carried_in - period.carried_out - period.pushed
    difference = carry - period.carry
    if difference:
        sentence = (
            f"The item's period has closed {plain(carry)} more than it sent or passed on, and "
            f"{plain(period.carry)} is in its carry."
        )
    elif period.carry:
        sentence = (
            f"Of the item's period {plain(period.carry)} is closed and not sent: it waits in the carry."
        )
    else:
        sentence = "Everything that the item's period has closed was sent or passed on."
    return Check(
        about="period",
        item=period.item,
        period_start=period.start,
        verdict="differ" if difference else "agree",
        difference=difference,
        parts={"unexplained": difference} if difference else {},
        sentence=sentence,
    )


def _verdict(difference: Decimal, parts: Mapping[str, Decimal]) -> Verdict:
    if "unexplained" in parts:
        return "differ"
    return "explained" if parts or difference else "agree"


def _more(difference: Decimal) -> str:
    if difference == 0:
        return ""
    return f", {plain(abs(difference))} {'more' if difference > 0 else 'less'} than the log proves"


def _whole(amount: Decimal, scale: int) -> Decimal:
    """Rounded towards zero to what the meter's scale can carry."""
    return Decimal(whole(int(amount * QUANTITY_UNIT), unit_of(scale))) / QUANTITY_UNIT
