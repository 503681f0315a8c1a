"""The outbox on a real PostgreSQL: rows and packs, what a relay takes, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psycopg
import pytest

from services.streaming import outbox
from services.wire.errors import Transient
from services.wire.kafka import AckedProducer
from services.wire.records import OutboxRow

Database = psycopg.Connection[Any]
HEADERS = {"tidemeter-schema": "usage_delta/2", "odd": 'a "quote" and a \\'}
RECORDS = [(f"key-{number}".encode(), bytes([number % 256]) * (number % 400)) for number in range(1000)]


class Brokers(AckedProducer):
    """Keeps what it is sent, or refuses it."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes | None, bytes, Mapping[str, bytes]]] = []
        self.refuses = False

    def send_all(
        self, records: Iterable[tuple[str, bytes | None, bytes, Mapping[str, bytes]]], timeout_s: float = 35.0
    ) -> None:
        if self.refuses:
            raise Transient("Kafka refused a record")
        self.records += records


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Database]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


def rows(db: Database) -> int:
    found = db.execute("SELECT count(*) FROM outbox").fetchone()
    assert found is not None
    return int(found[0])


def test_packed_records_leave_in_their_order_with_their_headers(db: Database) -> None:
    kafka = Brokers()
    with db.transaction():
        outbox.enqueue_packed(db, "us", "deltas", HEADERS, RECORDS[:400])
        outbox.enqueue_packed(db, "us", "deltas", HEADERS, RECORDS[400:])
    assert rows(db) < len(RECORDS) / 5
    assert outbox.relay_packs(db, "us", kafka) == len(RECORDS)
    headers = {name: text.encode() for name, text in HEADERS.items()}
    assert kafka.records == [("deltas", key, value, headers) for key, value in RECORDS]
    assert rows(db) == 0


def test_no_records_make_no_pack(db: Database) -> None:
    outbox.enqueue_packed(db, "us", "deltas", HEADERS, [])
    assert rows(db) == 0


def test_who_relays_single_records_does_not_wait_for_packs(db: Database, postgres_dsn: str) -> None:
    kafka = Brokers()
    with db.transaction():
        outbox.enqueue_packed(db, "us", "deltas", HEADERS, RECORDS)
        outbox.enqueue(db, "us", [OutboxRow("parked", None, b"one", {"h": "text"})])
    with psycopg.connect(postgres_dsn) as other:
        other.execute("SELECT FROM outbox WHERE producer = 'us/packs' FOR UPDATE")  # another relay sends them
        assert outbox.relay(db, "us", kafka, wait=True) == 1
        assert outbox.relay_packs(db, "us", kafka) == 0
    assert kafka.records == [("parked", None, b"one", {"h": b"text"})]
    assert outbox.relay_packs(db, "them", kafka) == 0
    assert outbox.relay_packs(db, "us", kafka) == len(RECORDS)


def test_packs_that_are_not_acknowledged_stay(db: Database) -> None:
    kafka = Brokers()
    kafka.refuses = True
    outbox.enqueue_packed(db, "us", "deltas", HEADERS, RECORDS)
    before = rows(db)
    with pytest.raises(Transient):
        outbox.relay_packs(db, "us", kafka)
    assert rows(db) == before
    kafka.refuses = False
    assert outbox.relay_packs(db, "us", kafka) == len(RECORDS)


def test_more_packs_than_one_transaction_takes_all_leave(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RELAY_PACKS_MAX", 7)
    kafka = Brokers()
    outbox.enqueue_packed(db, "us", "deltas", HEADERS, RECORDS)
    assert outbox.relay_packs(db, "us", kafka) == len(RECORDS)
    assert [(key, value) for _, key, value, _ in kafka.records] == RECORDS


def test_many_records_share_rows_and_leave_whole_in_their_order(db: Database) -> None:
    """Values of no bytes and of a mebibyte, without keys, and headers of any text."""
    odd = {"tidemeter-schema": "usage_event/3", "tr\u00e9s": 'a "quote", a \\, a \t and \u20ac', "empty": ""}
    many = [
        OutboxRow(
            f"t{n % 2}", None if n % 3 else b"\x00key", b"\x00\xff" * (n * 7 % 999), odd if n % 5 else {}
        )
        for n in range(300)
    ]
    many[10] = OutboxRow("t0", b"large", bytes(1024 * 1024))
    kafka = Brokers()
    outbox.enqueue(db, "us", many[:200])
    outbox.enqueue(db, "us", many[200:201])  # a row of its own between two bundles
    outbox.enqueue(db, "us", many[201:])
    assert rows(db) < len(many) / 5
    assert outbox.relay(db, "us", kafka) == len(many)
    assert kafka.records == [
        (one.topic, one.key, one.value, {name: text.encode() for name, text in one.headers.items()})
        for one in many
    ]
    assert rows(db) == 0


def test_large_headers_make_a_bundle_no_larger_than_one_record_more(db: Database) -> None:
    """A relay takes hundreds of rows at once."""
    large = {"baggage": "x" * 100_000}
    outbox.enqueue(db, "us", [OutboxRow("t", None, b"", large)] * outbox.BUNDLE_FROM)
    found = db.execute("SELECT max(octet_length(value)) FROM outbox").fetchone()
    assert found is not None
    assert found[0] < outbox.BUNDLE_BYTES + 110_000
    db.execute("DELETE FROM outbox WHERE producer = 'us'")
