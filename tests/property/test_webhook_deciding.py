"""What becomes of a webhook run, and what an event says, against oracles of a few lines."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import psycopg
import pytest
import stripe
from hypothesis import example, given
from hypothesis import strategies as st

from services.webhooks.deciding import Failure, Policy, failure_of, is_stale, next_after
from services.webhooks.handling import Refused
from services.webhooks.reading import Facts, event_of, facts_of
from services.wire.errors import Poison
from services.wire.waits import SHORTEST_SECONDS

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
moments = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
policies = st.builds(
    Policy,
    attempts_max=st.integers(1, 25),
    retry_seconds=st.floats(0.01, 3600),
    retry_max_seconds=st.floats(0.01, 86_400),
    timeout_seconds=st.floats(0.1, 3600),
)


@given(policies, st.integers(1, 60), st.floats(0, 1, exclude_max=True), st.booleans())
@example(Policy(), 25, 0.5, False)
@example(Policy(), 24, 0.0, False)
def test_a_failure_waits_within_its_doubling_bound_or_is_the_last(
    policy: Policy, attempts: int, chance: float, is_final: bool
) -> None:
    then = next_after(Failure("E", None, is_final), attempts, now=NOW, chance=chance, policy=policy)
    if is_final or attempts > policy.attempts_max - 1:
        assert (then.state, then.at) == ("dead", NOW)
        return
    bound = Fraction(policy.retry_seconds)
    for _ in range(attempts - 1):
        bound = min(2 * bound, Fraction(10**6))
    bound = min(bound, Fraction(policy.retry_max_seconds))
    expected = max(Fraction(SHORTEST_SECONDS), Fraction(chance) * bound)
    assert then.state == "failed"
    assert abs(Fraction((then.at - NOW).total_seconds()) - expected) < Fraction(1, 1000)


@given(moments, st.none() | moments)
def test_only_what_is_strictly_older_is_stale(created: datetime, newest: datetime | None) -> None:
    behind = timedelta(0) if newest is None else newest - created
    assert is_stale(created, newest) is (behind > timedelta(0))


def test_the_lease_outlives_the_time_limit() -> None:
    assert Policy(timeout_seconds=60).lease > timedelta(seconds=60)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Refused("no_such_thing"), Failure("Refused", "no_such_thing", is_final=True)),
        (Refused("a sentence, not a code"), Failure("Refused", None, is_final=True)),
        (ValueError("secret"), Failure("ValueError", None)),
        (SystemExit(1), Failure("SystemExit", None)),
        (TimeoutError(), Failure("TimeoutError", "timed_out")),
        (psycopg.errors.UniqueViolation(), Failure("UniqueViolation", "23505")),
        (stripe.APIConnectionError("secret"), Failure("APIConnectionError", None)),
        (stripe.RateLimitError("secret", http_status=429), Failure("RateLimitError", "http_429")),
        (
            stripe.InvalidRequestError("secret", "x", code="resource_missing", http_status=404),
            Failure("InvalidRequestError", "resource_missing"),
        ),
    ],
)
def test_a_failure_is_told_by_class_and_code_never_by_message(
    error: BaseException, expected: Failure
) -> None:
    assert failure_of(error) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["evt_1", ""]) | json_values,
        "object": st.sampled_from(["event", "v2.core.event", "charge"]) | json_values,
        "type": st.just("thing.changed") | json_values,
        "created": st.integers()
        | st.sampled_from(["2026-01-01T00:00:00Z", "9999-12-31T23:59:59-23:00"])
        | json_values,
        "livemode": st.booleans() | json_values,
        "account": st.just("acct_1") | json_values,
        "context": st.just("acct_2") | json_values,
        "data": st.fixed_dictionaries(
            {"object": st.just({"id": "obj_1"}) | json_values},
            optional={"previous_attributes": json_values},
        )
        | json_values,
    },
)


@given(bodies, st.sampled_from(["obj_1", "", "nul\x00"]))
def test_any_body_is_an_event_that_can_be_stored_and_handled_or_is_refused(
    body: dict[str, object], object_id: str
) -> None:
    record = {
        "endpoint": "main",
        "event_id": body.get("id", ""),
        "event_type": body.get("type", ""),
        "object_id": object_id,
        "received_at": 0,
        "body": json.dumps(body).encode(),
    }
    try:
        facts = facts_of(record)
    except Poison as error:
        assert error.reason == "invalid_webhook"
        return
    assert facts.created_at.tzinfo is not None
    assert facts.account == (body.get("account") or body.get("context") or "")
    assert "\x00" not in "".join([facts.event_id, facts.object_id, facts.account, facts.event_type])
    event = event_of(facts)
    assert event.is_thin is (body["object"] == "v2.core.event")
    assert event.data == ({} if event.is_thin else body["data"]["object"])  # type: ignore[index]


texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=8)


def facts(account: str, object_id: str, event_id: str) -> Facts:
    return Facts(event_id, "main", account, "t", object_id, False, False, NOW, NOW, b"")


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
def test_two_events_share_a_subject_only_if_account_and_object_are_the_same(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    left, right = facts(*one).subject(is_state=True), facts(*other).subject(is_state=True)
    assert (left == right) is (one[:2] == other[:2])
    left, right = facts(*one).subject(is_state=False), facts(*other).subject(is_state=False)
    assert (left == right) is ((one[0], one[2]) == (other[0], other[2]))
