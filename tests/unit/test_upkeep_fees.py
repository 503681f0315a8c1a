"""What a balance transaction must say of its charge or refund, and how long one is waited for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import stripe

from services.upkeep.fees import ATTEMPTS_MAX, PAUSE_MAX, Booked, Due, difference, pause_after
from services.wire.stripe_reader import Away, Missing, failure_of

LEASE = datetime(2026, 11, 22, tzinfo=UTC)
CHARGE = Due("ch_1", "charge", "", "ch_1", 1000, "usd", None, 0, LEASE)
REFUND = replace(CHARGE, object_id="re_1", kind="refund")
OF_CHARGE = Booked("txn_1", "charge", "ch_1", 1000, 59, 941, "usd", False)
OF_REFUND = Booked("txn_2", "refund", "re_1", -1000, 0, -1000, "usd", False)


@pytest.mark.parametrize(
    ("due", "booked"),
    [
        (CHARGE, OF_CHARGE),
        (CHARGE, replace(OF_CHARGE, type="payment")),
        (REFUND, OF_REFUND),
        (REFUND, replace(OF_REFUND, fee=-59, net=-941)),
        (REFUND, replace(OF_REFUND, type="payment_refund")),
        (CHARGE, replace(OF_CHARGE, currency="eur", has_exchange_rate=True, amount=913, net=854)),
        (REFUND, replace(OF_REFUND, currency="jpy", has_exchange_rate=True, amount=-1571, net=-1571)),
    ],
)
def test_what_stripe_booked_fits(due: Due, booked: Booked) -> None:
    assert difference(due, booked) is None


@pytest.mark.parametrize(
    ("due", "booked", "code"),
    [
        (CHARGE, replace(OF_CHARGE, type="refund"), "type_differs"),
        (REFUND, replace(OF_REFUND, type="charge"), "type_differs"),
        (CHARGE, replace(OF_CHARGE, source="ch_2"), "source_differs"),
        (CHARGE, replace(OF_CHARGE, source=None), "source_differs"),
        (CHARGE, replace(OF_CHARGE, amount=1001, net=942), "amount_differs"),
        (REFUND, replace(OF_REFUND, amount=1000, net=1000), "amount_differs"),
        (CHARGE, replace(OF_CHARGE, net=940), "net_differs"),
        (CHARGE, replace(OF_CHARGE, currency="eur"), "currency_differs"),
        (CHARGE, replace(OF_CHARGE, currency="eur", has_exchange_rate=True, amount=-1), "amount_differs"),
        (CHARGE, replace(OF_CHARGE, currency="eur", has_exchange_rate=True, net=1000), "net_differs"),
    ],
)
def test_what_does_not_fit_has_a_code(due: Due, booked: Booked, code: str) -> None:
    assert difference(due, booked) == code


def test_the_answers_until_one_counts_as_missing_span_a_week_and_not_much_more() -> None:
    passed = sum((pause_after(number) for number in range(1, ATTEMPTS_MAX)), timedelta())
    assert timedelta(days=7) <= passed < timedelta(days=7) + PAUSE_MAX


@pytest.mark.parametrize(
    ("error", "is_missing"),
    [
        (stripe.InvalidRequestError("", None, http_status=404, code="resource_missing"), False),
        (stripe.APIConnectionError("cut"), False),
        (stripe.AuthenticationError("", http_status=401), False),
        (stripe.APIError("", http_status=500), False),
        (TimeoutError(), False),
        (
            stripe.InvalidRequestError(
                "", None, http_status=404, json_body={"error": {"code": "resource_missing"}}
            ),
            True,
        ),
        (
            stripe.PermissionError("", http_status=403, json_body={"error": {"code": "account_invalid"}}),
            True,
        ),
    ],
)
def test_only_stripes_own_words_say_that_something_is_not_there(error: Exception, is_missing: bool) -> None:
    assert isinstance(failure_of(error), Missing if is_missing else Away)
