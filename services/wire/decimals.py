"""Decimals as text."""

from __future__ import annotations

from decimal import Decimal


def plain(amount: Decimal) -> str:
    """``amount`` exactly, without exponent, sign of zero, or zeros behind the last digit."""
    text = f"{amount:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
