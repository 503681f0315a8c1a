"""Decimals as text."""

from __future__ import annotations

from decimal import Decimal

#: Half of the smallest amount that there is.
_LEAST = Decimal(1).scaleb(-9) / 2
_DOUBLE = Decimal("1e-13")


def rounding(amount: Decimal) -> Decimal:
    """By how much a sum that was added up in doubles, as Stripe adds, may differ from ``amount``."""
    return max(_LEAST, abs(amount) * _DOUBLE)


def plain(amount: Decimal) -> str:
    """``amount`` exactly, without exponent, sign of zero, or zeros behind the last digit."""
    text = f"{amount:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
