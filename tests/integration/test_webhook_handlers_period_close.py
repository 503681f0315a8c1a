"""Invoices that are final earlier or later than closing takes for granted, as webhooks tell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.pusher import delivery
from services.pusher.intents import Policy
from services.pusher.journal import record_intents
from tests.integration.books import Books, iso, open_books, us
from tests.integration.test_webhook_handlers import Engine, invoice, item, seconds, subscription

CALENDAR = "1 month UTC 2026-01-15T13:37:42Z"
JUNE, JULY = "2026-05-15T13:37:42", "2026-06-15T13:37:42"
FINAL_AT = "2026-06-15T13:50:00"
DEFAULT_LIMIT = "2026-06-15T14:32:42"


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now="2026-06-15T13:30") as books:
        books.meter("requests", lateness_seconds=35 * 86_400, scale=1)
        books.db.execute("INSERT INTO customers VALUES ('acme', 'cus_1', 'cus_1', now(), %s)", (CALENDAR,))
        yield books


@pytest.fixture
def engine(books: Books) -> Engine:
    engine = Engine(books.db)
    engine.tell("customer.subscription.created", subscription(anchor="2026-01-15T13:37:42"))
    return engine


def at(books: Books, now: str, *uses: dict[str, Any]) -> None:
    books.now = now
    books.count(*uses)


def finalized(moment: str = FINAL_AT, **fields: Any) -> dict[str, Any]:
    return invoice("open", status_transitions={"finalized_at": seconds(moment)}, **fields)


def draft(until: str, **fields: Any) -> dict[str, Any]:
    return invoice(automatically_finalizes_at=seconds(until), **fields)


def test_what_comes_after_an_early_final_invoice_is_carried_forward_and_shown(
    books: Books, engine: Engine
) -> None:
    at(books, "2026-06-15T13:40", books.use("a", "2026-06-15T13:30", 5))
    books.settle()
    engine.tell("invoice.finalized", finalized())
    at(books, "2026-06-15T13:51", books.use("b", "2026-06-15T13:31", 2))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), delta["amount"]) == (JULY, 2)
    assert books.carried_forward() == [
        (JUNE, "2026-06-15T13:00", JULY, "2026-06-15T13:00", 2, "period_closed")
    ]
    assert len(books.ops("usage_carried_forward")) == 1
    assert (books.periods(), books.pushed()) == ({JUNE: 7}, {JUNE: 5, JULY: 2})
    books.assert_meets()
    assert books.settle() == []


def test_usage_after_the_usual_moment_goes_to_its_own_period_while_its_invoice_is_a_draft(
    books: Books, engine: Engine
) -> None:
    engine.tell("invoice.created", draft("2026-06-18T13:37:42"))
    at(books, "2026-06-18T13:32:41", books.use("a", "2026-06-15T13:30", 5))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["push_before"])) == (JUNE, "2026-06-18T13:32:42")
    at(books, "2026-06-18T13:32:42", books.use("b", "2026-06-15T13:31", 2))
    assert [iso(one["period_start"]) for one in books.settle()] == [JULY]
    assert books.pushed() == {JUNE: 5, JULY: 2}
    books.assert_meets()


@pytest.mark.parametrize("aggregation", ["sum", "count", "max", "unique"])
def test_a_period_that_opens_again_counts_nothing_twice(
    books: Books, engine: Engine, aggregation: str
) -> None:
    """Given usage that was carried forward, and then a draft that stays open for longer than was known."""
    books.meter("metered", aggregation, value_property="value", lateness_seconds=35 * 86_400)

    def use(key: str, value: int) -> dict[str, Any]:
        return books.use(key, "2026-06-15T13:30", 1, "metered", value=str(value))

    at(books, "2026-06-15T13:40", use("a", 3))
    books.settle()
    at(books, DEFAULT_LIMIT, use("b", 7))
    assert [iso(one["period_start"]) for one in books.settle()] == [JULY]
    engine.tell("invoice.updated", draft("2026-06-18T13:37:42"))
    at(books, "2026-06-16T00:00", use("c", 9))
    assert [iso(one["period_start"]) for one in books.settle()] == [JUNE]
    engine.tell("invoice.finalized", finalized("2026-06-16T10:00:00"))
    at(books, "2026-06-16T10:01", use("d", 12))
    assert [iso(one["period_start"]) for one in books.settle()] == [JULY]
    total = {"sum": 31, "count": 4, "max": 12, "unique": 4}[aggregation]
    sent = books.pushed("metered")
    if aggregation == "sum":  # of quantities: the property is what is aggregated
        total = int(sum(books.hours("metered").values()))
    assert sum(sent.values()) == total
    books.assert_meets()
    assert books.settle() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"billing_reason": "subscription_create"},
        {"billing_reason": "subscription_threshold"},
        {"billing_reason": "manual", "parent": None},
        {"customer": "cus_2"},
        {"period_end": seconds("2026-06-15T13:37:43")},
    ],
)
def test_other_invoices_close_no_period(books: Books, engine: Engine, fields: dict[str, Any]) -> None:
    engine.tell("invoice.finalized", finalized(**fields))
    at(books, "2026-06-15T13:55", books.use("a", "2026-06-15T13:30", 5))
    [delta] = books.settle()
    assert (iso(delta["period_start"]), iso(delta["push_before"])) == (JUNE, DEFAULT_LIMIT)


def test_the_invoice_of_a_subscription_without_metered_prices_closes_no_period(
    books: Books, engine: Engine
) -> None:
    engine.tell("customer.subscription.created", subscription("sub_flat", items=[item("licensed")]))
    engine.tell("invoice.finalized", finalized(parent=None, subscription="sub_flat"))
    at(books, "2026-06-15T13:55", books.use("a", "2026-06-15T13:30", 5))
    assert [iso(one["period_start"]) for one in books.settle()] == [JUNE]


def test_a_connected_accounts_invoice_closes_no_period(books: Books, engine: Engine) -> None:
    engine.tell("invoice.finalized", finalized(), account="acct_1")
    at(books, "2026-06-15T13:55", books.use("a", "2026-06-15T13:30", 5))
    assert [iso(one["period_start"]) for one in books.settle()] == [JUNE]


def test_a_period_never_ends_before_its_end_whatever_an_invoice_says(books: Books, engine: Engine) -> None:
    engine.tell("invoice.created", draft("2026-06-15T13:38:00"))
    at(books, "2026-06-15T13:37:41", books.use("a", "2026-06-15T13:30", 5))
    assert [iso(one["period_start"]) for one in books.settle()] == [JUNE]


# Intents that wait in the journal -----------------------------------------------------------------------


def claimed(dsn: str, customer: str, now: str) -> list[tuple[str, str]]:
    """What the pusher takes to send now, as (period, last safe moment); what comes too late it gives back."""

    async def claim() -> list[Any]:
        session = await delivery.connect(dsn, "test")
        moment = datetime.fromisoformat(now).replace(tzinfo=UTC)
        try:
            key = (customer, "requests")
            claims, _ = await delivery.claim(
                session, [key], now=moment, lease=timedelta(minutes=1), policy=Policy()
            )
        finally:
            await session.close()
        return claims

    claims = asyncio.run(claim())
    return [(iso(one.intent.period_start), iso(one.intent.push_before)) for one in claims]


def record(books: Books, deltas: list[dict[str, Any]]) -> None:
    """As the pusher does when it reads them from Kafka."""
    for one in deltas:
        raw = {
            name: us(value.isoformat()) if isinstance(value, datetime) else value
            for name, value in one.items()
        }
        raw["amount"] = int(one["amount"].scaleb(9)).to_bytes(16, "big", signed=True)
        record_intents(books.db, [raw])


@pytest.mark.parametrize("told_first", [True, False])
def test_an_intent_that_waits_is_given_back_and_carried_once_its_invoice_is_known_to_be_final(
    books: Books, engine: Engine, postgres_dsn: str, told_first: bool
) -> None:
    """Whether the invoice is told of before the delta gets into the journal, or after it."""
    at(books, "2026-06-15T13:40", books.use("a", "2026-06-15T13:30", 5))
    deltas = books.close()
    if told_first:
        engine.tell("invoice.finalized", finalized())
        record(books, deltas)
    else:
        record(books, deltas)
        engine.tell("invoice.finalized", finalized())
    assert claimed(postgres_dsn, "cus_1", "2026-06-15T13:51") == []
    assert engine.sql("SELECT state, error_code FROM meter_events") == [("cancelled", "period_closed")]
    books.now = "2026-06-15T13:51"
    record(books, books.close())
    assert claimed(postgres_dsn, "cus_1", "2026-06-15T13:51") == [(JULY, "2026-07-15T14:32:42")]
    assert (books.periods(), books.pushed(), books.carries()) == ({JUNE: 5}, {JULY: 5}, {})
    assert [(row[0], row[2], row[4]) for row in books.carried_forward()] == [(JUNE, JULY, 5)]


def test_an_intent_that_waits_gets_no_later_moment_than_it_had(
    books: Books, engine: Engine, postgres_dsn: str
) -> None:
    """It is given back at its own, and what is closed anew has the later one."""
    at(books, "2026-06-15T13:40", books.use("a", "2026-06-15T13:30", 5))
    record(books, books.close())
    engine.tell("invoice.created", draft("2026-06-18T13:37:42"))
    assert claimed(postgres_dsn, "cus_1", DEFAULT_LIMIT) == []
    books.now = DEFAULT_LIMIT
    record(books, books.close())
    assert claimed(postgres_dsn, "cus_1", DEFAULT_LIMIT) == [(JUNE, "2026-06-18T13:32:42")]
    assert (books.pushed(), books.carried_forward()) == ({JUNE: 5}, [])


def test_what_may_have_left_already_is_not_given_back(
    books: Books, engine: Engine, postgres_dsn: str
) -> None:
    at(books, "2026-06-15T13:40", books.use("a", "2026-06-15T13:30", 5))
    record(books, books.close())
    assert len(claimed(postgres_dsn, "cus_1", "2026-06-15T13:41")) == 1
    engine.tell("invoice.finalized", finalized())
    assert claimed(postgres_dsn, "cus_1", "2026-06-15T13:51") == [(JUNE, "2026-06-15T13:45")]
    assert engine.sql("SELECT state FROM meter_events") == [("in_flight",)]
    assert books.carried_forward() == []


def test_nothing_leaves_within_the_margin_before_a_draft_that_is_final_early(
    books: Books, engine: Engine, postgres_dsn: str
) -> None:
    at(books, "2026-06-15T13:40", books.use("a", "2026-06-15T13:30", 5))
    record(books, books.close())
    engine.tell("invoice.created", draft("2026-06-15T14:00:00"))
    assert claimed(postgres_dsn, "cus_1", "2026-06-15T13:56") == []
    assert engine.sql("SELECT state, error_code FROM meter_events") == [("cancelled", "period_closed")]


def test_a_failed_payment_does_not_make_an_unknown_subscription_one_without_metered_prices(
    books: Books, engine: Engine
) -> None:
    """Given an invoice of a subscription that no event has told of, final before its payment failed."""
    fields = {"parent": None, "subscription": "sub_unknown"}
    engine.tell("invoice.finalized", finalized(**fields))
    limits = "SELECT stripe_customer, final_at FROM invoice_limits"
    before = engine.sql(limits)
    assert len(before) == 1
    told = engine.tell("invoice.payment_failed", finalized(**fields))
    assert [one["name"] for one in told] == ["dunning_exhaustion"]
    assert engine.sql(limits) == before
