"""The oracle of the push campaign against planted faults: it sees each, and blames no push without one."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from tests.fault.push_campaign import (
    DAY_S,
    HOUR_S,
    Bucket,
    Call,
    Entry,
    Evidence,
    Read,
    Recorded,
    Row,
    judge,
    month_of,
)

HOUR = 1_772_366_400  # 2026-03-01T12:00:00Z
LATER = HOUR + 2 * HOUR_S
NEXT_DAY = LATER + DAY_S
ITEMS = {name: uuid.uuid5(uuid.NAMESPACE_OID, name) for name in ("calls", "seats", "gone")}


def usage(
    name: str, amount: str, *, hour: int = HOUR, customer: str = "cus_1", at: int | None = None, **more: Any
) -> Recorded:
    tenant, meter, event_name = "alpha", "calls", "api_calls"
    item = ITEMS["calls"] if customer == "cus_1" else ITEMS["gone"]
    if more.get("formula") == "last":
        tenant, meter, event_name, item = "beta", "seats", "beta.seats", ITEMS["seats"]
    where = (item, tenant, meter, customer, event_name, hour, month_of(hour))
    return Recorded(name, *where, 0, Decimal(amount), hour if at is None else at, **more)


def call(one: Recorded, name: str | None = None, *, at: float = LATER, **more: Any) -> Call:
    content = (one.at, str(one.amount), ())
    return Call(name or one.identifier, one.customer, one.event_name, content, at, at, **more)


def entry(one: Recorded, name: str | None = None) -> Entry:
    return Entry(name or one.identifier, one.customer, one.event_name, one.amount, one.at, {})


def bucket(one: Recorded, total: str, sent: str | None, *, dirty: bool = False) -> Bucket:
    pushed = Decimal(total if sent is None else sent)
    closed = None if sent is None else pushed
    return Bucket(one.bucket, Decimal(total), closed, pushed, False, float(one.hour) if dirty else None)


PLAIN = usage("plain", "5")
LATE = usage("late", "7", hour=HOUR - HOUR_S, push_before=LATER)
LOST = usage("lost", "3", hour=HOUR - 2 * HOUR_S)
REFUSED = usage("refused", "2", customer="cus_gone", doom="unknown_customer")
FIRST = usage("first", "4", formula="last", at=HOUR + 1)
SECOND = usage("second", "6", formula="last", at=HOUR + 2)


def world() -> Evidence:
    """Reported, given back, replaced after a day, failed, and a value that took another one's place."""
    return Evidence(
        recorded=[PLAIN, LATE, LOST, REFUSED, FIRST, SECOND],
        rows=[
            Row("plain", "reported", Decimal(5), settled_at=LATER, doubted_from=LATER),
            Row("late", "cancelled", Decimal(7), code="period_closed", settled_at=LATER + 1),
            Row("lost", "cancelled", Decimal(3), settled_at=NEXT_DAY, doubted_from=LATER),
            Row("anew", "reported", Decimal(3), replaces="lost", settled_at=NEXT_DAY),
            Row("refused", "failed", Decimal(2), code="resource_missing"),
            Row("first", "reported", Decimal(4)),
            Row("second", "reported", Decimal(6)),
        ],
        ledger=[entry(PLAIN), entry(LOST, "anew"), entry(FIRST), entry(SECOND)],
        calls=[
            call(PLAIN),
            call(LOST, at=LATER + 5),
            call(REFUSED, at=LATER + 6, refused=True),
            call(FIRST, at=LATER + 10),
            call(SECOND, at=LATER + 20),
            call(LOST, "anew", at=NEXT_DAY + 60),
        ],
        reads=[Read("cus_1", "api_calls", LOST.hour, NEXT_DAY + 30)],
        buckets=[
            bucket(PLAIN, "5", "5"),
            bucket(LATE, "7", "0", dirty=True),
            bucket(LOST, "3", "3"),
            bucket(REFUSED, "2", "2"),
            bucket(FIRST, "6", "6"),
        ],
        counted={one.bucket: one.amount for one in (PLAIN, LATE, LOST, REFUSED)},
        peaks={(one.item, one.period): Decimal(0) for one in (PLAIN, REFUSED, FIRST)},
        told=[("refused", "resource_missing")],
        lives=[(LATER - 10, float("inf"))],
        rate=10.0,
    )


def test_a_push_without_a_fault_is_not_blamed() -> None:
    judgement = judge(world())
    assert judgement.wrong == []
    assert judgement.difference == 0
    assert judgement.fates == {"reported": 4, "given_back": 1, "failed": 1}


def row(seen: Evidence, name: str, **changes: Any) -> None:
    """Change one row of the journal."""
    seen.rows = [replace(one, **changes) if one.identifier == name else one for one in seen.rows]


def applied_twice(seen: Evidence) -> None:
    seen.ledger = [*seen.ledger, entry(PLAIN)]


def applied_under_both_identifiers(seen: Evidence) -> None:
    seen.ledger = [*seen.ledger, entry(LOST)]


def lost(seen: Evidence) -> None:
    seen.ledger = seen.ledger[1:]


def another_amount_applied(seen: Evidence) -> None:
    seen.ledger = [replace(seen.ledger[0], value=Decimal(6)), *seen.ledger[1:]]


def another_hour_applied(seen: Evidence) -> None:
    seen.ledger = [replace(seen.ledger[0], timestamp=HOUR + HOUR_S), *seen.ledger[1:]]


def dimensions_applied_that_nobody_recorded(seen: Evidence) -> None:
    seen.ledger = [replace(seen.ledger[0], dimensions={"region": "eu"}), *seen.ledger[1:]]


def given_back_and_applied(seen: Evidence) -> None:
    seen.ledger = [*seen.ledger, entry(LATE)]


def given_back_too_early(seen: Evidence) -> None:
    row(seen, "late", settled_at=LATER - 1)


def given_back_though_young(seen: Evidence) -> None:
    row(seen, "late", code="too_old_for_stripe")


def failed_without_a_reason(seen: Evidence) -> None:
    row(seen, "plain", state="failed")


def reported_though_stripe_rejected_it(seen: Evidence) -> None:
    seen.reported = {"plain": "archived_meter"}


def forgotten(seen: Evidence) -> None:
    row(seen, "plain", state="in_flight")


def pending_for_ever(seen: Evidence) -> None:
    row(seen, "late", state="pending", code=None)


def in_doubt_and_nobody_told(seen: Evidence) -> None:
    row(seen, "anew", state="in_doubt", code="in_doubt_unresolved")


def missing_in_the_journal(seen: Evidence) -> None:
    seen.rows = seen.rows[1:]


def an_intent_out_of_nowhere(seen: Evidence) -> None:
    seen.rows = [*seen.rows, Row("nobody", "reported", Decimal(1))]


def an_amount_that_changed(seen: Evidence) -> None:
    row(seen, "plain", amount=Decimal(6))


def two_contents(seen: Evidence) -> None:
    seen.calls = [*seen.calls, replace(seen.calls[0], content=(HOUR, "6", ()))]


def a_resend_after_a_day(seen: Evidence) -> None:
    seen.calls = [*seen.calls, call(PLAIN, at=LATER + DAY_S)]


def no_question_before_the_replacement(seen: Evidence) -> None:
    seen.reads = []


def a_question_too_early(seen: Evidence) -> None:
    seen.reads = [replace(seen.reads[0], at=LATER + 600)]


def a_first_call_after_the_deadline(seen: Evidence) -> None:
    seen.calls = [*seen.calls, call(LATE, at=LATER + 60)]


def two_calls_at_once(seen: Evidence) -> None:
    seen.calls = [*seen.calls, call(PLAIN, at=LATER + 1, beside=1)]


def too_many_calls_in_a_second(seen: Evidence) -> None:
    seen.calls = [*seen.calls, *(call(PLAIN, at=LATER + 1 + n / 100) for n in range(40))]


def values_in_the_wrong_order(seen: Evidence) -> None:
    seen.ledger = [*seen.ledger[:2], entry(SECOND), entry(FIRST)]


def a_value_that_never_arrived(seen: Evidence) -> None:
    seen.ledger = seen.ledger[:3]


def a_bucket_left_open(seen: Evidence) -> None:
    seen.buckets = [replace(seen.buckets[0], is_open=True), *seen.buckets[1:]]


def an_amount_that_no_bucket_got_back(seen: Evidence) -> None:
    seen.buckets = [seen.buckets[0], bucket(LATE, "7", "7", dirty=True), *seen.buckets[2:]]


def a_bucket_that_nobody_will_close_again(seen: Evidence) -> None:
    seen.buckets = [seen.buckets[0], bucket(LATE, "7", "0"), *seen.buckets[2:]]


def a_failure_that_nobody_was_told(seen: Evidence) -> None:
    seen.told = []


def a_failure_told_twice(seen: Evidence) -> None:
    seen.told = [*seen.told, *seen.told]


def news_of_no_failure(seen: Evidence) -> None:
    seen.told = [*seen.told, ("plain", "no_meter")]


FAULTS: dict[Callable[[Evidence], None], str] = {
    applied_twice: "applied 2 times",
    applied_under_both_identifiers: "applied 2 times",
    lost: "is reported and was not applied",
    another_amount_applied: "was applied as",
    another_hour_applied: "was applied as",
    dimensions_applied_that_nobody_recorded: "was applied as",
    given_back_and_applied: "was applied and is not reported",
    given_back_too_early: "was given back before its deadline",
    given_back_though_young: "although Stripe takes its time",
    failed_without_a_reason: "failed without a reason",
    reported_though_stripe_rejected_it: "although Stripe said archived_meter",
    forgotten: "ended in_flight",
    pending_for_ever: "nothing of its hour is in doubt",
    in_doubt_and_nobody_told: "nobody was told",
    missing_in_the_journal: "is not in the journal",
    an_intent_out_of_nowhere: "nobody recorded nobody",
    an_amount_that_changed: "recorded was 5",
    two_contents: "two contents",
    a_resend_after_a_day: "sent again 24.0 hours after",
    no_question_before_the_replacement: "no summary was read",
    a_question_too_early: "no summary was read",
    a_first_call_after_the_deadline: "sent first 60 s after its deadline",
    two_calls_at_once: "called beside 1",
    too_many_calls_in_a_second: "calls in one second",
    values_in_the_wrong_order: "went through",
    a_value_that_never_arrived: "went through",
    a_bucket_left_open: "is open",
    an_amount_that_no_bucket_got_back: "was sent, it was 0",
    a_bucket_that_nobody_will_close_again: "will not be closed again",
    a_failure_that_nobody_was_told: "not told",
    a_failure_told_twice: "was told 2 times",
    news_of_no_failure: "reported, and this was told",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(fault: Callable[[Evidence], None]) -> None:
    seen = world()
    fault(seen)
    wrong = judge(seen).wrong
    assert any(FAULTS[fault] in one for one in wrong), wrong


def test_a_difference_is_counted_over_all_hours() -> None:
    seen = world()
    applied_twice(seen)
    lost(seen)
    seen.ledger = [one for one in seen.ledger if one.identifier != "anew"]
    assert judge(seen).difference == 3


def test_a_value_that_equals_the_one_before_need_not_be_sent() -> None:
    seen = world()
    again = usage("again", "6", formula="last", at=HOUR + 3)
    seen.recorded = [*seen.recorded, again]
    seen.rows = [*seen.rows, Row("again", "reported", Decimal(6), code="applied_by_summary")]
    assert judge(seen).wrong == []


def test_what_waits_behind_an_unresolved_doubt_is_known() -> None:
    """Its one replacement got lost as well; an operator was told."""
    seen = world()
    behind = usage("behind", "9", hour=LOST.hour)
    behind = replace(behind, item=ITEMS["gone"])
    seen.recorded = [*seen.recorded, behind]
    row(seen, "anew", state="in_doubt", code="in_doubt_unresolved")
    seen.rows = [*seen.rows, Row("behind", "pending", Decimal(9))]
    seen.ledger = [one for one in seen.ledger if one.identifier != "anew"]
    seen.told = [*seen.told, ("anew", "in_doubt_unresolved")]
    seen.buckets = [replace(one, is_open=one.place == LOST.bucket) for one in seen.buckets]
    judgement = judge(seen)
    assert judgement.wrong == []
    assert judgement.fates["blocked"] == judgement.fates["unresolved"] == 1


def test_a_first_call_after_the_deadline_is_none_when_a_sender_died_in_the_middle_of_it() -> None:
    seen = world()
    row(seen, "late", state="reported", code=None, doubted_from=LATER - 3)
    seen.ledger = [*seen.ledger, entry(LATE)]
    seen.buckets = [seen.buckets[0], bucket(LATE, "7", "7"), *seen.buckets[2:]]
    seen.calls = [*seen.calls, call(LATE, at=LATER + 60)]
    assert any("after its deadline" in one for one in judge(seen).wrong)
    seen.ends = [LATER - 2]
    assert judge(seen).wrong == []
