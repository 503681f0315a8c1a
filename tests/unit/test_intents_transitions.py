"""The pure rules: what an answer means for an intent, and what may be done with it next."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from services.pusher.intents import (
    AFTER,
    OPEN,
    PERIOD_CLOSED,
    TOO_OLD,
    TRANSITIONS,
    Action,
    Answer,
    Claim,
    Formula,
    Intent,
    Meaning,
    Policy,
    Shown,
    State,
    Verdict,
    expired_because,
    given_back,
    intent_of,
    judge,
    next_action,
    next_state,
    settlement_of,
)
from services.wire.decimals import plain
from services.wire.errors import Broken
from services.wire.waits import full_jitter
from upcasters.usage_delta_v1_to_v2 import upcast

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY = timedelta(days=1)
INTENT = Intent(
    identifier="d1",
    item_id="00" * 16,
    tenant_id="acme",
    meter="calls",
    period_start=NOW - 9 * DAY,
    period_end=NOW + 20 * DAY,
    hour_start=NOW,
    event_name="calls",
    stripe_customer="cus_1",
    customer_payload_key="stripe_customer_id",
    value_payload_key="value",
    amount=Decimal(5),
    event_at=NOW,
)


def claim(doubted_since: datetime | None = None, action: Action = Action.SEND) -> Claim:
    return Claim(INTENT, action, 1, doubted_since, None, NOW)


def action_at(
    age: timedelta | None,
    *,
    attempts: int = 1,
    event_age: timedelta = timedelta(),
    push_before: datetime | None = None,
) -> Action:
    return next_action(
        doubted_since=None if age is None else NOW - age,
        event_at=NOW - event_age,
        push_before=push_before,
        attempts=attempts,
        now=NOW,
        policy=Policy(),
    )


def test_every_answer_has_a_next_state_that_the_table_allows() -> None:
    assert set(AFTER) == set(Meaning)
    for meaning, pair in AFTER.items():
        for doubted, after in zip((False, True), pair, strict=True):
            assert next_state(State.IN_FLIGHT, meaning, doubted=doubted) is after


def test_nothing_leaves_a_terminal_state() -> None:
    assert {state for state, after in TRANSITIONS.items() if not after} == set(State) - OPEN


@pytest.mark.parametrize("state", sorted(set(State) - {State.IN_FLIGHT}))
def test_only_an_intent_in_flight_can_be_answered(state: State) -> None:
    with pytest.raises(Broken):
        next_state(state, Meaning.DELIVERED, doubted=False)


@pytest.mark.parametrize("meaning", sorted(set(Meaning) - {Meaning.DELIVERED, Meaning.ALREADY_DELIVERED}))
def test_only_proof_of_delivery_ends_a_doubt(meaning: Meaning) -> None:
    assert next_state(State.IN_FLIGHT, meaning, doubted=True) is State.IN_DOUBT


def test_a_doubt_keeps_the_time_of_the_first_call() -> None:
    first = NOW - timedelta(hours=3)
    again = settlement_of(claim(first), Answer(Meaning.UNKNOWN), now=NOW, chance=0.5, policy=Policy())
    fresh = settlement_of(claim(), Answer(Meaning.UNKNOWN), now=NOW, chance=0.5, policy=Policy())
    assert again.first_sent_at == first
    assert fresh.first_sent_at == NOW


def test_a_call_without_effect_leaves_no_doubt_behind() -> None:
    for meaning in (Meaning.THROTTLED, Meaning.UNAUTHORISED, Meaning.NOT_SENT):
        after = settlement_of(claim(), Answer(meaning), now=NOW, chance=0.5, policy=Policy())
        assert (after.state, after.first_sent_at) == (State.PENDING, None)


def test_a_claim_given_back_is_as_it_was_and_due_at_once() -> None:
    assert given_back(claim(), "paused", now=NOW).state is State.PENDING
    back = given_back(claim(NOW - DAY), "paused", now=NOW)
    assert (back.state, back.first_sent_at, back.next_attempt_at) == (State.IN_DOUBT, NOW - DAY, NOW)


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (None, Action.SEND),
        (timedelta(0), Action.SEND),
        (timedelta(hours=22, minutes=59), Action.SEND),
        (timedelta(hours=23), Action.WAIT),
        (timedelta(hours=23, minutes=59, seconds=59), Action.WAIT),
        (timedelta(hours=24), Action.ASK),
        (timedelta(days=40), Action.ASK),
    ],
)
def test_the_age_of_the_doubt_decides_between_sending_and_asking(
    age: timedelta | None, expected: Action
) -> None:
    assert action_at(age) is expected


def test_a_young_doubt_also_looks_at_summaries_now_and_then() -> None:
    actions = [action_at(timedelta(hours=1), attempts=n) for n in range(1, 9)]
    assert actions.count(Action.LOOK) == 2
    assert action_at(timedelta(minutes=5), attempts=4) is Action.SEND


def test_usage_expires_only_while_it_was_never_sent() -> None:
    assert action_at(None, event_age=timedelta(days=34, hours=23)) is Action.SEND
    assert action_at(None, event_age=timedelta(days=35)) is Action.EXPIRE
    assert action_at(timedelta(hours=1), event_age=timedelta(days=36)) is Action.SEND


def test_usage_that_comes_too_late_for_its_invoice_expires_only_while_it_was_never_sent() -> None:
    second = timedelta(seconds=1)
    assert action_at(None, push_before=NOW + second) is Action.SEND
    assert action_at(None, push_before=NOW) is Action.EXPIRE
    assert action_at(timedelta(hours=1), push_before=NOW - DAY) is Action.SEND
    assert action_at(timedelta(hours=24), push_before=NOW - DAY) is Action.ASK


def test_an_expiry_has_a_code() -> None:
    def code(event_age: timedelta, push_before: datetime | None) -> str | None:
        return expired_because(event_at=NOW - event_age, push_before=push_before, now=NOW, policy=Policy())

    assert code(DAY, None) is None
    assert code(DAY, NOW) == PERIOD_CLOSED
    assert code(36 * DAY, None) == code(36 * DAY, NOW) == TOO_OLD


def test_what_was_never_sent_can_be_cancelled_and_never_fails() -> None:
    assert TRANSITIONS[State.PENDING] == {State.IN_FLIGHT, State.CANCELLED}


def test_the_deadline_is_the_invoice_s_or_else_the_end_of_the_period() -> None:
    assert INTENT.deadline == INTENT.period_end
    assert replace(INTENT, push_before=NOW).deadline == NOW


def test_an_intent_keeps_its_dimensions_to_itself_and_can_be_hashed() -> None:
    given = {"region": "eu"}
    one = replace(INTENT, dimensions=given)
    given["region"] = "us"
    assert one.dimensions == {"region": "eu"}
    assert one != INTENT
    assert len({one, INTENT}) == 2
    with pytest.raises(TypeError):
        one.dimensions["region"] = "us"  # type: ignore[index]


DELTA_V1 = {
    "identifier": "d1",
    "item_id": bytes(16),
    "tenant_id": "acme",
    "customer_ref": "one",
    "meter": "calls",
    "stripe_customer": "cus_1",
    "event_name": "calls",
    "customer_payload_key": "stripe_customer_id",
    "value_payload_key": "value",
    "period_start": 0,
    "period_end": 2_000_000,
    "hour_start": 0,
    "event_at": 1_500_000,
    "sequence": 1,
    "amount": (5 * 10**9).to_bytes(16, "big", signed=True),
    "closed_at": 0,
}


def test_a_delta_of_version_1_has_no_dimensions_is_summed_and_has_no_invoice() -> None:
    one = intent_of(upcast(DELTA_V1))
    assert (one.dimensions, one.formula, one.push_before) == ({}, Formula.SUM, None)
    assert one.event_at == datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)


def test_a_delta_of_version_2_says_all_three() -> None:
    one = intent_of(
        upcast(DELTA_V1) | {"dimensions": {"region": "eu"}, "formula": "last", "push_before": 5_000_000}
    )
    assert (one.dimensions, one.formula) == ({"region": "eu"}, Formula.LAST)
    assert one.push_before == datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)


def test_a_dimension_that_the_journal_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        intent_of(upcast(DELTA_V1) | {"dimensions": {"region": "e\x00u"}})


def test_the_next_turn_never_falls_between_the_last_resend_and_the_first_question() -> None:
    policy = Policy()
    first = NOW - timedelta(hours=22, minutes=59, seconds=59)
    turn = policy.turn_after(NOW, attempts=30, chance=0.99, doubted_since=first)
    assert turn == first + policy.ask_after


@pytest.mark.parametrize(
    ("total", "verdict"),
    [
        ("12", Verdict.APPLIED),
        ("12.0000000000001", Verdict.APPLIED),
        ("7", Verdict.NOT_APPLIED),
        ("8", Verdict.UNCLEAR),
        ("0", Verdict.UNCLEAR),
        ("17", Verdict.UNCLEAR),
        (None, Verdict.UNREADABLE),
    ],
)
def test_a_total_proves_only_what_it_equals(total: str | None, verdict: Verdict) -> None:
    seen = None if total is None else Shown(Decimal(total))
    assert judge(seen, reported=Decimal(7), amount=Decimal(5)) is verdict


def test_no_usage_shown_is_a_sum_of_0() -> None:
    assert judge(Shown(None), reported=Decimal(0), amount=Decimal(5)) is Verdict.NOT_APPLIED
    assert judge(Shown(None), reported=Decimal(5), amount=Decimal(-5)) is Verdict.APPLIED
    assert judge(Shown(None), reported=Decimal(7), amount=Decimal(5)) is Verdict.UNCLEAR


@pytest.mark.parametrize(
    ("shown", "amount", "verdict"),
    [
        (Shown(Decimal("5")), "5", Verdict.APPLIED),
        (Shown(Decimal("5.0000000000001")), "5", Verdict.APPLIED),
        (Shown(Decimal("7")), "5", Verdict.NOT_APPLIED),
        (Shown(Decimal("12")), "5", Verdict.NOT_APPLIED),
        (Shown(Decimal("0")), "0", Verdict.APPLIED),
        (Shown(Decimal("0.000000001")), "0", Verdict.NOT_APPLIED),
        (Shown(None), "0", Verdict.NOT_APPLIED),
        (Shown(None), "5", Verdict.NOT_APPLIED),
        (None, "5", Verdict.UNREADABLE),
    ],
)
def test_the_value_of_an_hour_is_the_amount_or_is_not(
    shown: Shown | None, amount: str, verdict: Verdict
) -> None:
    seen = judge(shown, reported=Decimal(7), amount=Decimal(amount), formula=Formula.LAST)
    assert seen is verdict


def test_an_amount_lost_in_the_rounding_of_doubles_proves_nothing() -> None:
    huge = Decimal(10**15)
    assert judge(Shown(huge), reported=huge, amount=Decimal("0.000000001")) is Verdict.UNCLEAR


def test_the_replacement_has_another_identifier_always_the_same_and_only_once() -> None:
    one, two = INTENT.replacement(), INTENT.replacement()
    assert one == two
    assert one.identifier != INTENT.identifier
    assert (one.replaces, one.amount, one.event_at) == ("d1", INTENT.amount, INTENT.event_at)
    with pytest.raises(Broken):
        one.replacement()


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("5", "5"),
        ("5.000000000", "5"),
        ("-0.500", "-0.5"),
        ("1E+3", "1000"),
        ("0.000000001", "0.000000001"),
        ("-0", "0"),
        ("123456789012345678901234567890.5", "123456789012345678901234567890.5"),
    ],
)
def test_amounts_are_written_plainly_and_exactly(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text


def test_backoff_is_jittered_from_zero_and_capped() -> None:
    waits = [full_jitter(n, 0.999, base_seconds=0.5, cap_seconds=300) for n in range(1, 100)]
    assert waits == sorted(waits)
    assert waits[0] < 0.5 and waits[-1] < 300
    assert full_jitter(20, 0.0, base_seconds=0.5, cap_seconds=300) == 0.05
