"""The few value conversions that upcasters share."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any

Record = dict[str, Any]

#: Wide enough for 38 digits and for any float that is later refused for its size.
WIDE = Context(prec=400)


class Rejected(Exception):
    """The record is readable, but its content can never be counted.

    ``reason`` is a dead-letter reason code. Any other exception out of an upcaster means that the upcaster,
    not the record, is to blame, and parks the record under ``upcaster_error``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def fixed_decimal(value: Decimal, scale: int) -> bytes:
    """``value`` as 16 big-endian bytes counting units of 10**-scale; half-even where digits are dropped.

    Raises:
        Rejected: ``quantity_out_of_range`` when it does not fit 38 digits.
    """
    try:
        unscaled = int(value.scaleb(scale, WIDE).to_integral_value(ROUND_HALF_EVEN, WIDE))
        if abs(unscaled) >= 10**38:
            raise Rejected("quantity_out_of_range")
    except InvalidOperation as error:
        raise Rejected("quantity_out_of_range") from error
    return unscaled.to_bytes(16, "big", signed=True)


def decimal_of_float(value: float) -> Decimal:
    """The shortest decimal that reads back as ``value``: 0.1 stays 0.1.

    Raises:
        Rejected: ``non_finite_quantity`` for NaN and the infinities.
    """
    if not math.isfinite(value):
        raise Rejected("non_finite_quantity")
    return Decimal(repr(value))
