"""Late events in hours that were closed: told when their chunk is committed, and closed without waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import psycopg
import pytest

from services.counters import agent, ledger
from services.counters.agent import DeltaTimer
from services.counters.closing import close_round
from services.counters.deltas import Invoices
from services.streaming.database import Database
from services.streaming.outbox import PACKS
from services.wire.settings import Settings
from tests.integration.books import Books, amounts, open_books, us

NOW = "2026-03-14T20:30"
HOURS = range(10, 21)
NEVER_S = 3600.0


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    """Two customers with usage from 10 to 20 o'clock: all of it was closed, and every delta is settled."""
    with open_books(postgres_dsn, NOW) as books:
        books.meter("requests")
        use_every_hour(books, "requests")
        yield books


def use_every_hour(books: Books, meter: str, **properties: str) -> None:
    for customer in ("cus_1", "cus_2"):
        books.count(
            *[
                books.use(
                    f"{meter}-{customer}-{hour}", at(hour), 5, meter, customer_ref=customer, **properties
                )
                for hour in HOURS
            ]
        )
    books.close()
    books.push()
    assert not books.revised


def at(hour: int, minute: int = 15) -> str:
    return f"2026-03-14T{hour}:{minute:02}"


# -- What is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum", "count", "max", "last", "unique"])
def test_a_late_event_in_an_hour_whose_delta_is_settled_is_told(books: Books, aggregation: str) -> None:
    more = {"value_property": "value"} if aggregation == "unique" else {}
    books.meter("other", aggregation, **more)
    values = {"value": "ann"} if aggregation == "unique" else {}
    use_every_hour(books, "other", **values)
    books.count(books.use("late", at(10, 45), 7, "other", customer_ref="cus_2", **values))
    # In every hour but the first `unique` had nothing to send: its value was not new any more.
    assert books.revised == {books.item("other", "cus_2").bytes}


def test_what_is_not_late_in_a_settled_hour_is_not_told(books: Books) -> None:
    books.count(books.use("in order", at(20, 20)))
    books.count(books.use("late, but in the hour that is not over", at(20, 10)))
    books.count(books.use("in an hour without usage", "2026-03-14T08:00"))
    books.count(books.use(f"requests-cus_1-{HOURS[0]}", at(HOURS[0]), 5))  # a duplicate
    assert not books.revised


def test_a_late_event_in_an_hour_with_a_delta_under_way_is_not_told(books: Books) -> None:
    books.count(books.use("late", at(12)))
    assert books.revised
    books.revised.clear()
    books.close()
    books.count(books.use("later", at(12)))
    assert not books.revised, "nothing can be closed before that delta is settled"
    books.push()
    books.count(books.use("latest", at(12)))
    assert books.revised


def test_only_items_with_such_an_event_are_told(books: Books) -> None:
    books.count(
        books.use("late", at(12), customer_ref="cus_2"),
        books.use("in order", at(20, 25), customer_ref="cus_1"),
    )
    assert books.revised == {books.item(customer="cus_2").bytes}


def test_nothing_is_told_of_a_chunk_that_is_not_committed(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(name: str) -> None:
        if name == "tx.before_commit":
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ledger, "fault_point", crash)
        books.count(books.use("late", at(12)))
    assert not books.revised
    books.count(books.use("late", at(12)))
    assert books.revised


# -- What is closed --------------------------------------------------------------------------------------


def test_a_round_of_these_items_closes_no_others(books: Books) -> None:
    for customer in ("cus_1", "cus_2"):
        books.count(books.use(f"late {customer}", at(12), 3, customer_ref=customer))
    assert close_round(books.db, items={books.item().bytes}, now_us=us(NOW)) == (1, 1)
    [delta] = books.new_deltas()
    assert (delta["customer_ref"], amounts([delta])) == ("cus_1", [(at(12, 0), Decimal(3))])
    assert close_round(books.db, items={books.item().bytes}, now_us=us(NOW)) == (0, 0)
    assert [delta["customer_ref"] for delta in books.close()] == ["cus_2"]
    books.assert_meets()


def test_a_round_of_these_items_leaves_those_that_are_locked(books: Books, postgres_dsn: str) -> None:
    for customer in ("cus_1", "cus_2"):
        books.count(books.use(f"late {customer}", at(12), customer_ref=customer))
    with psycopg.connect(postgres_dsn) as chunk:
        chunk.execute("SELECT FROM items WHERE customer_ref = 'cus_1' FOR UPDATE")
        assert close_round(books.db, items=books.revised, now_us=us(NOW)) == (1, 1)
    assert close_round(books.db, items=books.revised, now_us=us(NOW)) == (1, 1)
    books.assert_meets()


def test_what_cannot_be_closed_yet_stays_for_a_later_round(books: Books) -> None:
    books.count(books.use("late", at(12), 3), books.use("late too", at(14), 4))
    books.db.execute("UPDATE buckets SET open = true WHERE extract(hour FROM hour_start) = 12")
    assert close_round(books.db, items=books.revised, now_us=us(NOW)) == (1, 1)
    assert amounts(books.new_deltas()) == [(at(14, 0), Decimal(4))]
    assert books.close() == []
    books.push()
    assert amounts(books.close()) == [(at(12, 0), Decimal(3))]
    books.assert_meets()


def test_counting_and_closing_at_once_loses_and_doubles_nothing(books: Books, postgres_dsn: str) -> None:
    """Chunks of late events on one connection, closing of what they revised and settling on another."""
    counted = threading.Event()
    closing = Database(postgres_dsn, "deltas")

    def close_and_push() -> None:
        db = closing.connection()
        while not counted.is_set() or books.revised:
            items = {books.revised.pop() for _ in range(len(books.revised))}
            if items:
                close_round(db, items=items, invoices=Invoices(), now_us=us(NOW))
            db.execute("UPDATE buckets SET open = false WHERE open")

    other = threading.Thread(target=close_and_push)
    other.start()
    try:
        for number in range(60):
            books.count(
                *[
                    books.use(f"{number}-{hour}", at(hour), 1, customer_ref=f"cus_{1 + (number + hour) % 2}")
                    for hour in HOURS
                ]
            )
    finally:
        counted.set()
        other.join(60)
        closing.reset()
    books.settle()
    books.assert_meets()
    hours = [(books.periods(customer=one), books.carries(customer=one)) for one in ("cus_1", "cus_2")]
    total = sum(amount for periods, _ in hours for amount in periods.values())
    assert total == 2 * len(HOURS) * 5 + 60 * len(HOURS)
    assert [carries for _, carries in hours] == [{}, {}]


# -- When it is closed -----------------------------------------------------------------------------------


@pytest.fixture
def today(postgres_dsn: str) -> Iterator[Books]:
    """The same of the last hours, by the clock on the wall."""
    now = datetime.now(UTC)
    with open_books(postgres_dsn, now.isoformat()) as books:
        books.meter("requests")
        books.count(*[books.use(f"h{ago}", hours_ago(now, ago), 5) for ago in (5, 4, 3, 2, 1, 0)])
        books.close()
        books.push()
        yield books


def hours_ago(now: datetime, hours: int) -> str:
    return (now - timedelta(hours=hours)).isoformat()


def timed(settings: Settings, interval_s: float, play: Callable[[DeltaTimer], None]) -> None:
    """``play`` in a thread, while a timer of this interval runs."""

    async def both() -> None:
        timer = DeltaTimer(settings.model_copy(update={"delta_interval_seconds": interval_s}))
        loop = asyncio.create_task(timer.loop())
        playing = asyncio.create_task(asyncio.to_thread(play, timer))
        await asyncio.wait({loop, playing}, return_when=asyncio.FIRST_COMPLETED)
        loop.cancel()
        await playing
        timer.database.reset()

    asyncio.run(both())


def until_closed(books: Books, number: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while books.db.execute("SELECT count(*) FROM deltas").fetchone() != (number,):
        assert time.monotonic() < deadline, "not closed"
        time.sleep(0.01)


def test_what_was_told_is_closed_and_relayed_without_waiting_for_the_interval(
    today: Books, settings: Settings
) -> None:
    def play(timer: DeltaTimer) -> None:
        time.sleep(0.5)  # behind the first tick
        today.count(today.use("in order", today.now, 1))
        today.count(today.use("late", hours_ago(datetime.fromisoformat(today.now), 3), 2))
        timer.note_revised(today.revised)
        until_closed(today, 8)
        deadline = time.monotonic() + 10
        while not timer.relay.is_set():
            assert time.monotonic() < deadline, "not relayed"
            time.sleep(0.01)

    timed(settings, NEVER_S, play)
    assert today.db.execute("SELECT DISTINCT producer FROM outbox").fetchall() == [(ledger.GROUP + PACKS,)]
    today.assert_meets()


def test_what_was_never_told_is_closed_at_the_interval(today: Books, settings: Settings) -> None:
    """As after a kill between the commit and the closing, or when another worker had the item locked."""
    today.count(today.use("late", hours_ago(datetime.fromisoformat(today.now), 3), 2))
    assert today.revised
    timed(settings, 0.2, lambda _: until_closed(today, 7))
    today.assert_meets()


def test_more_items_than_one_round_takes_are_closed_in_several(
    today: Books, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "REVISED_PER_ROUND", 2)
    now = datetime.fromisoformat(today.now)
    names = [f"cus_{number}" for number in range(10, 17)]
    today.count(
        *[
            today.use(f"{name} {ago}", hours_ago(now, ago), 5, customer_ref=name)
            for name in names
            for ago in (3, 0)
        ]
    )
    today.close()
    today.push()
    [(before,)] = today.db.execute("SELECT count(*) FROM deltas").fetchall()
    rounds = []

    def play(timer: DeltaTimer) -> None:
        time.sleep(0.5)
        today.count(*[today.use(f"{name} late", hours_ago(now, 3), customer_ref=name) for name in names])
        timer.note_revised(today.revised)
        until_closed(today, before + len(names))
        found = "SELECT count(*) FROM deltas WHERE sequence = 2 GROUP BY closed_at ORDER BY closed_at"
        rounds.extend(today.db.execute(found).fetchall())

    timed(settings, NEVER_S, play)
    assert rounds == [(2,), (2,), (2,), (1,)]
    today.assert_meets()


def test_a_database_that_goes_away_costs_no_more_than_the_interval(today: Books, settings: Settings) -> None:
    def play(timer: DeltaTimer) -> None:
        time.sleep(0.5)
        today.count(today.use("late", hours_ago(datetime.fromisoformat(today.now), 3), 2))
        today.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'tidemeter-deltas' AND datname = current_database()"
        )
        timer.note_revised(today.revised)
        until_closed(today, 7)

    timed(settings, 1.0, play)
    today.assert_meets()
