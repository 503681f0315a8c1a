"""Fees: what is stored and told of charges and refunds, by a real stripe-python and the simulated Stripe."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest

from services.streaming.database import Database
from services.stripe_simulator import SimulatorConfig, SimulatorControl, running_simulator
from services.upkeep.fees import ATTEMPTS_MAX, DEGRADED_AFTER, Booked, Fees, NotYet, claim, settle
from services.wire.stripe_reader import Away, StripeReader
from tests.integration.upkeeping import NOW, fee_row, told

LEASE = timedelta(seconds=30)
Connection = psycopg.Connection[Any]


@pytest.fixture
def stripe() -> Iterator[SimulatorControl]:
    with running_simulator(SimulatorConfig(port=0, rate_per_second=10_000)) as control:
        control.seed(customers=["cus_1"])
        yield control


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


class Moment:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def moment() -> Moment:
    return Moment()


def work(
    dsn: str, base: str, moment: Moment, *, rounds: int = 1, between: timedelta = timedelta()
) -> tuple[str, str]:
    """Rounds of the job; what its check says then."""

    async def go() -> tuple[str, str]:
        reader = StripeReader("sk_test_fees", api_base=base, timeout_seconds=2)
        database = Database(dsn, "test")
        job = Fees(database, reader, timeout_seconds=2, clock=moment)
        for _ in range(rounds):
            while await job.step():
                pass
            moment.now += between
        await reader.close()
        database.reset()
        return job.check()

    return asyncio.run(go())


def rows(db: Connection, columns: str) -> list[tuple[Any, ...]]:
    return db.execute(f"SELECT {columns} FROM stripe_fees ORDER BY object_id").fetchall()


def test_the_fee_of_a_charge_and_of_its_refund_are_stored_and_what_stripe_kept_is_told_once(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, moment: Moment
) -> None:
    charge = stripe.charge("cus_1", 1000, fee=59)
    refund = stripe.refund(charge["id"])
    fee_row(db, charge["id"], 1000)
    fee_row(db, refund["id"], 1000, kind="refund", charge=charge["id"])
    work(postgres_dsn, stripe.url, moment)
    assert rows(db, "kind, state, fee, net, fee_currency, difference") == [
        ("charge", "matched", 59, 941, "usd", None),
        ("refund", "matched", 0, -1000, "usd", None),
    ]
    [loss] = told(db)
    assert (loss["name"], loss["subject_id"]) == ("revenue_loss", refund["id"])
    assert loss["attributes"]["reason"] == "refund_fee_kept"
    assert (loss["attributes"]["amount"], loss["attributes"]["currency"]) == ("59", "usd")


@pytest.mark.parametrize("refund_first", [True, False])
def test_the_kept_fee_is_told_when_the_later_of_the_two_is_settled(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, moment: Moment, refund_first: bool
) -> None:
    charge = stripe.charge("cus_1", 1000, fee=59)
    refund = stripe.refund(charge["id"])
    moments = (NOW, NOW + timedelta(hours=1))
    fee_row(db, charge["id"], 1000, due=moments[refund_first])
    fee_row(db, refund["id"], 1000, kind="refund", charge=charge["id"], due=moments[not refund_first])
    work(postgres_dsn, stripe.url, moment)
    assert told(db) == []
    moment.now += timedelta(hours=2)
    work(postgres_dsn, stripe.url, moment)
    assert [event["name"] for event in told(db)] == ["revenue_loss"]


@pytest.mark.parametrize(
    "refunds", [[{"amount": 400}], [{"amount": 500}, {"amount": 500}], [{"fee_refunded": 59}]]
)
def test_a_partial_refund_and_one_that_returns_the_fee_tell_of_no_loss(
    db: Connection,
    postgres_dsn: str,
    stripe: SimulatorControl,
    moment: Moment,
    refunds: list[dict[str, int]],
) -> None:
    charge = stripe.charge("cus_1", 1000, fee=59)
    fee_row(db, charge["id"], 1000)
    for wanted in refunds:
        refund = stripe.refund(charge["id"], **wanted)
        fee_row(db, refund["id"], refund["amount"], kind="refund", charge=charge["id"])
    work(postgres_dsn, stripe.url, moment)
    assert {state for (state,) in rows(db, "state")} == {"matched"}
    assert told(db) == []


def test_a_charge_that_stripe_booked_otherwise_differs_and_is_told_once(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, moment: Moment
) -> None:
    charge, other = stripe.charge("cus_1", 1000, fee=59), stripe.charge("cus_1", 700)
    fee_row(db, charge["id"], 999)
    fee_row(db, other["id"], 700, balance_transaction=charge["balance_transaction"])
    work(postgres_dsn, stripe.url, moment, rounds=3, between=timedelta(hours=1))
    differences = dict(rows(db, "object_id, difference"))
    assert differences == {charge["id"]: "amount_differs", other["id"]: "source_differs"}
    events = told(db)
    assert [event["name"] for event in events] == ["charge_fee_mismatch"] * 2
    assert {event["subject_id"]: event["attributes"]["reason"] for event in events} == differences


def test_a_balance_transaction_that_comes_later_is_waited_for(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, moment: Moment
) -> None:
    charge = stripe.charge("cus_1", 1000, fee=59, settle_after_seconds=3600)
    fee_row(db, charge["id"], 1000)
    work(postgres_dsn, stripe.url, moment)
    assert rows(db, "state, fee, attempts") == [("pending", None, 1)]
    stripe.advance(7200)
    moment.now += timedelta(hours=2)
    work(postgres_dsn, stripe.url, moment)
    assert rows(db, "state, fee, net") == [("matched", 59, 941)]
    assert told(db) == []


def test_a_balance_transaction_that_never_comes_is_told_as_missing_after_a_week_of_answers(
    db: Connection, postgres_dsn: str, stripe: SimulatorControl, moment: Moment
) -> None:
    fee_row(db, "ch_of_nobody", 1000)
    work(postgres_dsn, stripe.url, moment, rounds=ATTEMPTS_MAX - 1, between=timedelta(hours=6))
    assert rows(db, "state, attempts, fee") == [("pending", ATTEMPTS_MAX - 1, None)]
    assert told(db) == []
    work(postgres_dsn, stripe.url, moment)
    assert rows(db, "state, difference, fee") == [("differs", "balance_transaction_missing", None)]
    [event] = told(db)
    assert event["attributes"]["reason"] == "balance_transaction_missing"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"fault": "status", "status": 429}, "http_429"),
        ({"fault": "status", "status": 503}, "http_503"),
        ({"fault": "cut_body"}, "RemoteProtocolError"),
        ({"fault": "reset_before_apply"}, "Re"),
    ],
)
def test_while_stripe_gives_no_answer_nothing_is_concluded_and_health_says_so_after_a_while(
    db: Connection,
    postgres_dsn: str,
    stripe: SimulatorControl,
    moment: Moment,
    fault: dict[str, Any],
    reason: str,
) -> None:
    charge = stripe.charge("cus_1", 1000, fee=59)
    fee_row(db, charge["id"], 1000)
    stripe.play({**fault, "times": 100})
    status, said = work(postgres_dsn, stripe.url, moment, rounds=ATTEMPTS_MAX + 5, between=DEGRADED_AFTER)
    assert status == "degraded"
    assert reason in said
    assert rows(db, "state, attempts, fee") == [("pending", 0, None)]
    stripe.clear_faults()
    assert work(postgres_dsn, stripe.url, moment)[0] == "healthy"
    assert rows(db, "state, fee") == [("matched", 59)]


def test_with_nobody_at_stripes_address_everything_waits(
    db: Connection, postgres_dsn: str, moment: Moment
) -> None:
    fee_row(db, "ch_1", 1000)
    work(postgres_dsn, "http://127.0.0.1:9", moment, rounds=2, between=timedelta(hours=1))
    assert rows(db, "state, attempts") == [("pending", 0)]


def test_a_connected_accounts_charge_is_asked_for_at_that_account(
    db: Connection, postgres_dsn: str, moment: Moment
) -> None:
    asked: list[tuple[str, str | None]] = []

    class NotThere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append((self.path, self.headers.get("Stripe-Account")))
            body = b'{"error": {"code": "resource_missing", "type": "invalid_request_error"}}'
            self.send_response(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), NotThere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        fee_row(db, "ch_theirs", 1000, account="acct_1")
        fee_row(db, "re_ours", 1000, kind="refund", charge="ch_0")
        work(postgres_dsn, f"http://127.0.0.1:{server.server_port}", moment)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(asked) == [("/v1/charges/ch_theirs", "acct_1"), ("/v1/refunds/re_ours", None)]
    assert rows(db, "state, attempts") == [("pending", 1), ("pending", 1)]


def test_a_charge_and_its_refund_settled_at_the_same_moment_tell_of_the_kept_fee_once(
    postgres_dsn: str, db: Connection
) -> None:
    pairs = 30
    for number in range(pairs):
        fee_row(db, f"ch_{number}", 1000)
        fee_row(db, f"re_{number}", 1000, kind="refund", charge=f"ch_{number}")
    due = {one.object_id: one for one in claim(db, NOW, LEASE, limit=2 * pairs)}
    together = threading.Barrier(2)

    def settle_all(kind: str, prefix: str, amount: int, fee: int) -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as own:
            for number in range(pairs):
                one = due[f"{prefix}_{number}"]
                booked = Booked(f"txn_{prefix}", kind, one.object_id, amount, fee, amount - fee, "usd", False)
                together.wait(10)
                assert settle(own, one, booked, NOW) == "matched"

    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(settle_all, "charge", "ch", 1000, 59),
            pool.submit(settle_all, "refund", "re", -1000, 0),
        ]
        for one in work:
            one.result()
    assert sorted(event["subject_id"] for event in told(db)) == sorted(f"re_{n}" for n in range(pairs))


def test_two_processes_never_claim_the_same_row_and_a_lease_that_ended_counts_for_nothing(
    postgres_dsn: str, db: Connection
) -> None:
    fee_row(db, "ch_1", 1000)
    fee_row(db, "ch_2", 1000)
    [first], [second] = claim(db, NOW, LEASE, limit=1), claim(db, NOW, LEASE, limit=1)
    assert first.object_id != second.object_id
    assert claim(db, NOW, LEASE) == []
    later = NOW + LEASE + timedelta(seconds=1)
    again = {due.object_id: due for due in claim(db, later, LEASE)}
    booked = Booked("txn_1", "charge", first.object_id, 1000, 59, 941, "usd", False)
    assert settle(db, first, Away("http_500"), later) == "lost"
    assert settle(db, first, NotYet(), later) == "lost"
    assert settle(db, first, booked, later) == "lost"
    assert settle(db, again[first.object_id], booked, later) == "matched"
    assert settle(db, again[first.object_id], NotYet(), later) == "lost"
