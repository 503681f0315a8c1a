"""What closing sends: the arithmetic of portions, carries and peaks. Pure; amounts are whole billionths.

The exact difference of each hour joins the carry of the item's period, and what the meter's scale can carry
leaves as that hour's portion. The rest stays in the carry, so ten times 0.4 on an integer meter bills 4, in
whatever hours they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.wire.usage import QUANTITY_SCALE

#: (hour, exact difference), by ascending hour.
Differences = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Portion:
    """What one hour sends: ``amount`` is a multiple of the meter's unit and not zero."""

    hour: int
    amount: int


def unit_of(scale: int) -> int:
    """The smallest amount that a meter of this scale takes."""
    return int(10 ** (QUANTITY_SCALE - scale))


def split(differences: Differences, carry: int, unit: int, *, signed: bool) -> tuple[list[Portion], int]:
    """Split exact hourly differences into portions and the new carry.

    ``signed``: each hour gets its own, negative ones too. Otherwise hours that fell are taken out of those
    that rose, and only these send anything. What is negative on the whole waits in the carry for later usage.
    Rounds towards zero: the carry of a signed meter, and a positive carry, stay below one unit.
    """
    return _signed(differences, carry, unit) if signed else _rising(differences, carry, unit)


def _signed(differences: Differences, carry: int, unit: int) -> tuple[list[Portion], int]:
    portions = []
    for hour, difference in differences:
        carry += difference
        amount = whole(carry, unit)
        if amount:
            portions.append(Portion(hour, amount))
            carry -= amount
    return portions, carry


def _rising(differences: Differences, carry: int, unit: int) -> tuple[list[Portion], int]:
    left = whole(max(carry + sum(difference for _, difference in differences), 0), unit)
    portions = []
    for hour, difference in differences:
        carry += difference
        amount = min(whole(max(carry, 0), unit), left)
        if difference > 0 and amount:
            portions.append(Portion(hour, amount))
            carry -= amount
            left -= amount
    return portions, carry


def whole(amount: int, unit: int) -> int:
    """``amount`` rounded towards zero to a multiple of ``unit``."""
    return amount - amount % unit if amount >= 0 else amount + -amount % unit


def peak_difference(hours: Sequence[tuple[int, int]], before: int, peak: int) -> list[tuple[int, int]]:
    """How the greatest value of a period changed, booked in the hour that holds it, or else the last one.

    ``hours`` are the (hour, greatest value) that changed; ``peak`` is the period's greatest value now.
    """
    if peak == before:
        return []
    hour = next((hour for hour, value in hours if value == peak), hours[-1][0])
    return [(hour, peak - before)]
