"""parse_quantity against an oracle that shares no code with it: exact fractions."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from services.wire.errors import Invalid
from services.wire.usage import QUANTITY_MAX, QUANTITY_UNIT, parse_quantity

JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def outcome(value: Decimal | int | str) -> int | str:
    try:
        return parse_quantity(value)
    except Invalid as error:
        return error.reason


def expected(text: str) -> int | str:
    value = Fraction(text)
    if value == 0:
        return "quantity_negative_zero" if text.startswith("-") else 0
    if abs(value) > QUANTITY_MAX:
        return "quantity_out_of_range"
    billionths = value * QUANTITY_UNIT
    return int(billionths) if billionths.denominator == 1 else "quantity_too_precise"


digits = st.text("0123456789", min_size=1, max_size=45)
exponents = st.one_of(st.just(""), st.integers(-60, 60).map(lambda number: f"e{number}"))
numbers = st.builds(
    lambda sign, whole, fraction, exponent: f"{sign}{whole}{fraction}{exponent}",
    st.sampled_from(["", "-"]),
    digits,
    st.one_of(st.just(""), digits.map(lambda text: f".{text}")),
    exponents,
)


@given(numbers)
@example("9007199254740992")
@example("9007199254740992.000000001")
@example("-9007199254740992.0")
@example("9007199254740991.999999999")
@example("0.0000000010")
@example("-0.0e-3")
def test_text_is_converted_exactly_or_refused_for_the_right_reason(text: str) -> None:
    assert outcome(text) == expected(text)


@given(numbers)
def test_decimals_and_their_text_mean_the_same(text: str) -> None:
    assert outcome(Decimal(text)) == outcome(text)


@given(st.integers(-(2**54), 2**54))
def test_integers_and_their_text_mean_the_same(value: int) -> None:
    assert outcome(value) == outcome(str(value)) == expected(str(value))


@given(st.integers(-QUANTITY_MAX * QUANTITY_UNIT, QUANTITY_MAX * QUANTITY_UNIT))
def test_every_storable_quantity_survives_its_decimal_text(billionths: int) -> None:
    whole, rest = divmod(abs(billionths), QUANTITY_UNIT)
    text = f"{'-' if billionths < 0 else ''}{whole}.{rest:09d}"
    assert parse_quantity(text) == billionths


@given(st.one_of(st.text(max_size=60), st.text("0123456789.eE+-_ \n\0Naifty", max_size=20)))
def test_any_text_is_either_a_number_by_json_or_refused(text: str) -> None:
    result = outcome(text)
    if JSON_NUMBER.fullmatch(text) and "e" not in text.lower():
        assert result == expected(text)
    elif isinstance(result, int):
        assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text, re.ASCII)
    else:
        assert result.startswith("quantity_")


@given(st.decimals(allow_nan=True, allow_infinity=True))
def test_any_decimal_is_exact_or_refused(value: Decimal) -> None:
    result = outcome(value)
    if not value.is_finite():
        assert result == "quantity_not_finite"
    elif isinstance(result, int):
        assert Fraction(result, QUANTITY_UNIT) == Fraction(value)
    else:
        assert result in ("quantity_negative_zero", "quantity_out_of_range", "quantity_too_precise")
