"""Whatever is answered, lost or killed, in any order and at any age: billed once, or provably not at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from services.pusher.intents import (
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
    judge,
    next_action,
    settlement_of,
)

START = datetime(2026, 3, 10, 12, tzinfo=UTC)
POLICY = Policy()
LEASE = timedelta(seconds=30)
#: Strictest reading of Stripe: identifiers are forgotten after exactly a day, then count again.
IDENTIFIER_WINDOW = timedelta(hours=24)

ANSWERS = {
    "throttled": Meaning.THROTTLED,
    "unauthorised": Meaning.UNAUTHORISED,
    "not_sent": Meaning.NOT_SENT,
    "refused": Meaning.REFUSED,
    "lost_before": Meaning.UNKNOWN,
}
EVENTS = [*ANSWERS, "accepted", "lost_after", "killed_before", "killed_after", "unreadable"]


@dataclass
class Stripe:
    """Counts every effect, and forgets identifiers after a day. Summaries lag."""

    lag: timedelta
    formula: Formula = Formula.SUM
    effects: list[tuple[str, Decimal, datetime]] = field(default_factory=list)

    def accept(self, intent: Intent, now: datetime) -> Meaning:
        if any(known == intent.identifier and now - at < IDENTIFIER_WINDOW for known, _, at in self.effects):
            return Meaning.ALREADY_DELIVERED
        self.effects.append((intent.identifier, intent.amount, now))
        return Meaning.DELIVERED

    def billed(self, until: datetime | None = None) -> Decimal | None:
        """The sum, or the last value; None without usage."""
        amounts = [amount for _, amount, at in self.effects if until is None or at <= until]
        if not amounts:
            return None
        return amounts[-1] if self.formula is Formula.LAST else sum(amounts, Decimal(0))

    def shown(self, now: datetime) -> Shown:
        return Shown(self.billed(now - self.lag))


@dataclass
class Row:
    """One row of the journal."""

    intent: Intent
    state: State = State.PENDING
    first_sent_at: datetime | None = None
    next_attempt_at: datetime = START
    attempts: int = 0

    def move(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} → {state}"
        self.state = state


@dataclass
class Model:
    """One delta, its journal rows, and a Stripe; the same decisions as the sender's, without SQL."""

    stripe: Stripe
    rows: list[Row]
    now: datetime = START
    sent: dict[str, set[Decimal]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    given_back: list[Decimal] = field(default_factory=list)

    def step(self, event: str) -> None:
        row = self.rows[-1]
        if row.state not in (State.PENDING, State.IN_FLIGHT, State.IN_DOUBT):
            return
        self.now = max(self.now, row.next_attempt_at)
        action = next_action(
            doubted_since=row.first_sent_at,
            event_at=row.intent.event_at,
            push_before=row.intent.push_before,
            attempts=row.attempts,
            now=self.now,
            policy=POLICY,
        )
        row.attempts += 1
        claim = Claim(row.intent, action, row.attempts, row.first_sent_at, None, self.now)
        if action is Action.EXPIRE:
            row.move(State.CANCELLED)
            self.given_back.append(row.intent.amount)
            return
        row.first_sent_at = claim.doubted_from
        row.move(claim.from_state)
        row.next_attempt_at = self.now + LEASE
        if action is Action.SEND:
            self._send(row, claim, event)
        elif action is Action.WAIT:
            row.next_attempt_at = POLICY.outside_gap(self.now, row.first_sent_at)
        elif not event.startswith("killed"):
            self._ask(row, claim, readable=event != "unreadable")

    def _send(self, row: Row, claim: Claim, event: str) -> None:
        doubted = claim.doubted_since
        assert doubted is None or self.now - doubted < timedelta(hours=24), "sent again after a day in doubt"
        invoice_open = row.intent.push_before is None or self.now < row.intent.push_before
        assert doubted is not None or invoice_open, "a first call that comes too late for the invoice"
        assert row.intent.replaces is None or row.intent.replaces in self.asked, "replaced without a question"
        if event != "killed_before":
            self.sent.setdefault(row.intent.identifier, set()).add(row.intent.amount)
        meaning = ANSWERS.get(event, Meaning.UNKNOWN)
        if event in ("accepted", "lost_after", "killed_after"):
            meaning = self.stripe.accept(row.intent, self.now)
        if event.startswith("killed"):
            return
        if event in ("lost_after", "unreadable"):
            meaning = Meaning.UNKNOWN
        after = settlement_of(claim, Answer(meaning), now=self.now, chance=0.9, policy=POLICY)
        row.move(after.state)
        row.first_sent_at, row.next_attempt_at = after.first_sent_at, after.next_attempt_at

    def _ask(self, row: Row, claim: Claim, *, readable: bool) -> None:
        shown = self.stripe.shown(self.now) if readable else None
        verdict = judge(shown, reported=Decimal(0), amount=row.intent.amount, formula=row.intent.formula)
        self.asked.add(row.intent.identifier)
        if verdict is Verdict.APPLIED:
            row.move(State.REPORTED)
        elif verdict is Verdict.NOT_APPLIED and claim.action is Action.ASK and row.intent.replaces is None:
            row.move(State.CANCELLED)
            self.rows.append(Row(row.intent.replacement(), next_attempt_at=self.now))
        else:
            row.next_attempt_at = POLICY.turn_after(
                self.now, attempts=row.attempts, chance=0.9, doubted_since=row.first_sent_at
            )


def intent(amount: Decimal, formula: Formula = Formula.SUM, push_within: timedelta | None = None) -> Intent:
    return Intent(
        identifier="d1",
        item_id="00" * 16,
        tenant_id="acme",
        meter="calls",
        period_start=START,
        period_end=START + timedelta(days=20),
        hour_start=START,
        event_name="calls",
        stripe_customer="cus_1",
        customer_payload_key="stripe_customer_id",
        value_payload_key="value",
        amount=amount,
        event_at=START,
        formula=formula,
        push_before=None if push_within is None else START + push_within,
    )


push_within = st.one_of(st.none(), st.integers(0, 5 * 86_400).map(lambda seconds: timedelta(seconds=seconds)))
steps = st.lists(
    st.tuples(
        st.sampled_from(EVENTS),
        st.one_of(st.integers(0, 120), st.integers(0, 3 * 86_400)).map(lambda s: timedelta(seconds=s)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(
    steps=steps,
    amount=st.decimals("-1000", "1000", places=3).filter(bool),
    lag=st.integers(0, 50).map(lambda minutes: timedelta(minutes=minutes)),
    formula=st.sampled_from(Formula),
    push_within=push_within,
)
def test_no_sequence_of_answers_and_kills_bills_twice_or_forgets(
    steps: list[tuple[str, timedelta]],
    amount: Decimal,
    lag: timedelta,
    formula: Formula,
    push_within: timedelta | None,
) -> None:
    model = Model(Stripe(lag, formula), [Row(intent(amount, formula, push_within))])
    for event, pause in steps:
        model.step(event)
        model.now += pause
    billed = model.stripe.billed()
    last = model.rows[-1]
    assert billed in (None, amount)
    assert all(len(amounts) == 1 for amounts in model.sent.values())
    assert len(model.rows) <= 2
    assert all(row.state is State.CANCELLED for row in model.rows[:-1])
    if last.state is State.REPORTED:
        assert billed == amount
    if last.state in (State.FAILED, State.PENDING, State.CANCELLED):
        assert billed is None
    assert model.given_back == ([amount] if last.state is State.CANCELLED else [])


@settings(max_examples=200, deadline=None)
@given(
    steps=steps,
    amount=st.decimals("0.001", "1000", places=3),
    formula=st.sampled_from(Formula),
    push_within=push_within,
)
def test_once_the_world_is_well_again_every_delta_is_billed_exactly_once_or_given_back(
    steps: list[tuple[str, timedelta]], amount: Decimal, formula: Formula, push_within: timedelta | None
) -> None:
    """Unless it was refused with certainty, or its one replacement got lost as well."""
    model = Model(Stripe(timedelta(minutes=5), formula), [Row(intent(amount, formula, push_within))])
    for event, pause in steps:
        model.step(event)
        model.now += pause
    for _ in range(100):
        model.step("accepted")
    last = model.rows[-1]
    if last.state is State.IN_DOUBT:
        assert last.intent.replaces is not None and not model.stripe.effects
    else:
        assert last.state in (State.REPORTED, State.FAILED, State.CANCELLED)
    assert model.stripe.billed() == (amount if last.state is State.REPORTED else None)
    assert model.given_back == ([amount] if last.state is State.CANCELLED else [])
