"""Parked records are tried again: each counts once, in its own hour and period, and the books balance."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.console import parked
from services.counters.ledger import GROUP
from services.counters.prepare import Preparer
from services.counters.redriving import UsageRetry
from services.streaming import offsets, redriving
from services.streaming.chunks import Chunk, Partition
from services.streaming.parking import Choice
from services.streaming.redriving import Redrives, Verdict, version_skew
from services.wire.codec import SCHEMA_HEADER, Decoder
from tests.integration.books import EPOCH, Books, open_books, us
from tests.records import Raw, encoded
from upcasters.chain import revision, upcasters

NOON = "2026-03-10T12:00"


@pytest.fixture
def books(postgres_dsn: str) -> Iterator[Books]:
    with open_books(postgres_dsn, now=NOON) as books:
        books.db.execute("TRUNCATE parked_records, redrives, outbox")
        books.meter("requests")
        yield books


def redrives_of(books: Books, retry: Any = None, tried_with: str | None = None) -> Redrives:
    retry = retry or UsageRetry(Preparer(Decoder(), upcasters()), dedupe_days=books.dedupe_days)
    return Redrives(
        GROUP,
        retry,
        tried_with=tried_with or revision(),
        clock=lambda: EPOCH + timedelta(microseconds=us(books.now)),
    )


def run(books: Books, redrives: Redrives | None = None) -> None:
    """Until no re-drive has anything left."""
    redrives = redrives or redrives_of(books)
    while books.db.execute(
        "SELECT 1 FROM redrives WHERE state IN ('requested', 'running') LIMIT 1"
    ).fetchone():
        redrives.step(books.db)


def redrive(books: Books, choice: Choice | None = None, *, dry_run: bool = False) -> dict[str, int]:
    """Ask, carry out, and return the results."""
    made = parked.redrive(
        books.db, choice or Choice(), by="cli:ada", dry_run=dry_run, everything=choice is None
    )
    run(books)
    [row] = parked.redrives(books.db, ids=[one.redrive_id for one in made])
    assert row["state"] == "done"
    assert row["tried"] == row["selected"] == sum(row["results"].values())
    return dict(row["results"])


def count_raw(books: Books, *values: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> None:
    """One chunk of these values, which arrive now."""
    row = books.db.execute(
        "SELECT next_offset FROM partition_offsets WHERE topic = 'usage.v3' AND partition = 0"
    ).fetchone()
    assert row is not None
    arrival_ms = us(books.now) // 1000
    raws = [Raw(row[0] + n, value, arrival_ms, headers=headers) for n, value in enumerate(values)]
    chunk = Chunk(Partition("usage.v3", 0), raws)
    books.counters.apply(books.db, books.counters.prepare(chunk))


def states(books: Books) -> list[tuple[str, str, str | None, int]]:
    """(reason, state, outcome, attempts) of every parked record, in order."""
    return books.db.execute(
        "SELECT reason, state, outcome, attempts FROM parked_records ORDER BY parked_id"
    ).fetchall()


# What is kept -------------------------------------------------------------------------------------------


def test_a_parked_record_is_kept_whole_with_its_reason_and_place(books: Books) -> None:
    record = encoded(books.use("k1", NOON, meter="pigeons"))
    count_raw(books, record, headers=[(SCHEMA_HEADER, b"usage_event/3"), ("trace", b"\xff\x00")])
    [row] = parked.find(books.db, Choice())
    assert (row["kind"], row["reason"], row["tenant_id"], row["meter"], row["event_id"]) == (
        "dead_letter",
        "unknown_meter",
        "acme",
        "pigeons",
        "k1",
    )
    shown = parked.show(books.db, row["parked_id"], with_record=True)
    assert bytes(shown["value"]) == record
    assert shown["headers"] == {SCHEMA_HEADER: "usage_event/3", "trace": "\\xff\\x00"}
    assert (shown["service"], shown["schema_name"], shown["attempts"]) == (GROUP, "usage_event/3", 1)


def test_what_is_settled_stays_and_what_came_is_never_changed(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"))
    with pytest.raises(psycopg.errors.CheckViolation):
        books.db.execute("UPDATE parked_records SET value = 'other'")
    parked.discard(books.db, Choice(), note="a test", by="cli:ada", dry_run=False, everything=True)
    with pytest.raises(psycopg.errors.CheckViolation):
        books.db.execute("UPDATE parked_records SET note = 'another reason'")


def test_a_conflict_is_kept_with_its_second_record_and_can_only_be_discarded(books: Books) -> None:
    books.count(books.use("k1", NOON, 1), books.use("k1", NOON, 2))
    [row] = parked.find(books.db, Choice())
    assert (row["kind"], row["reason"], row["event_id"]) == ("conflict", "conflict", "k1")
    assert parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False, everything=True) == []
    note = "the first is right"
    assert parked.discard(books.db, Choice(kinds=("conflict",)), note=note, by="cli:ada", dry_run=False) == 1
    assert books.outcomes() == {"counted": 1, "conflict": 1}


# The fix ------------------------------------------------------------------------------------------------


def test_after_the_fix_each_parked_record_counts_once_in_its_own_hour_and_period(books: Books) -> None:
    """Of three days in two months, long after their item's watermark has left them behind."""
    ats = ["2026-02-27T10:30", "2026-02-28T23:59", "2026-03-01T00:00"]
    for number, at in enumerate(ats):
        books.now = at
        books.count(books.use(f"p{number}", at, 2**number, meter="pigeons"))
    books.now = "2026-03-20T12:00"
    books.meter("pigeons")
    books.count(books.use("later", books.now, 100, meter="pigeons"))
    assert redrive(books, Choice(reasons=("unknown_meter",))) == {"counted": 3}
    assert books.hours("pigeons") == {
        "2026-02-27T10:00": 1,
        "2026-02-28T23:00": 2,
        "2026-03-01T00:00": 4,
        "2026-03-20T12:00": 100,
    }
    assert books.periods("pigeons") == {"2026-02-01T00:00": 3, "2026-03-01T00:00": 104}
    assert books.outcomes() == {"counted": 1, "late_counted": 3}
    assert [row[1:] for row in states(books)] == [("redriven", "counted", 2)] * 3
    books.customer("cus_1")
    books.settle()
    books.assert_meets()


def test_redriving_again_finds_nothing_to_do(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"))
    books.meter("pigeons")
    assert redrive(books) == {"counted": 1}
    assert parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False, everything=True) == []
    assert books.hours("pigeons") == {NOON: 1}


def test_a_record_that_was_sent_again_meanwhile_is_a_duplicate_and_another_content_a_conflict(
    books: Books,
) -> None:
    books.count(books.use("same", NOON, 3, meter="pigeons"), books.use("other", NOON, 3, meter="pigeons"))
    books.meter("pigeons")
    books.count(books.use("same", NOON, 3, meter="pigeons"), books.use("other", NOON, 4, meter="pigeons"))
    assert redrive(books) == {"duplicate": 1, "parked:conflict": 1}
    assert books.hours("pigeons") == {NOON: 7}
    assert books.outcomes() == {"counted": 2, "duplicate": 1, "conflict": 1}
    assert [row["event_id"] for row in parked.find(books.db, Choice(kinds=("conflict",)))] == ["other"]


def test_two_parked_copies_of_one_event_count_once(books: Books) -> None:
    for _ in range(2):
        books.count(books.use("k1", NOON, 3, meter="pigeons"))
    books.meter("pigeons")
    assert redrive(books, dry_run=True) == {"counted": 1, "duplicate": 1}
    assert redrive(books) == {"counted": 1, "duplicate": 1}
    assert books.hours("pigeons") == {NOON: 3}


def test_what_is_not_mended_stays_parked_with_its_present_reason(books: Books) -> None:
    books.count(books.use("k1", NOON, -3, meter="pigeons"), books.use("k2", NOON, meter="doves"))
    books.meter("pigeons")
    assert redrive(books) == {"parked:quantity_negative": 1, "parked:unknown_meter": 1}
    assert states(books) == [("quantity_negative", "parked", None, 2), ("unknown_meter", "parked", None, 2)]
    assert books.outcomes() == {"dead_lettered": 2}


def test_an_unreadable_record_leaves_the_account_of_nobody_once_a_release_can_read_it(books: Books) -> None:
    """The stand-in for a release that cannot read: a decoder without schemas."""
    blind = Decoder()
    blind._prefixes.clear()
    blind._fingerprints = {}
    preparer = books.counters._preparer
    books.counters._preparer = Preparer(blind, upcasters())
    count_raw(books, *[encoded(books.use(f"k{n}", NOON, 5)) for n in range(3)], b"\xc3\x01garbage!")
    books.counters._preparer = preparer
    assert {row[0] for row in states(books)} == {"unknown_schema"}
    assert books.outcomes() == {"upcast_failed": 4}
    assert redrive(books) == {"counted": 3, "parked:unknown_schema": 1}
    assert books.outcomes() == {"counted": 3, "upcast_failed": 1}
    accounts = books.db.execute(
        "SELECT tenant_id, meter, received, counted, upcast_failed FROM partition_accounts "
        "WHERE received > 0 ORDER BY 1, 2"
    ).fetchall()
    assert accounts == [("", "", 1, 0, 1), ("acme", "requests", 3, 3, 0)]


# Age ----------------------------------------------------------------------------------------------------


def test_the_time_a_record_waited_makes_it_no_later_but_what_was_too_late_stays_so(books: Books) -> None:
    """Lateness is 48 hours. Both arrive on the 10th: of the 9th and of the 1st."""
    books.count(
        books.use("in time", "2026-03-09T12:00", meter="pigeons"),
        books.use("too late", "2026-03-01T12:00", meter="pigeons"),
    )
    books.meter("pigeons")
    books.count(books.use("on time", NOON, meter="pigeons"))
    books.now = "2026-03-15T12:00"
    books.count(books.use("newer", books.now, meter="pigeons"))
    assert redrive(books) == {"counted": 1, "adjusted": 1}
    assert [row[0] for row in books.adjustments()] == ["too late"]


def test_brokers_whose_clock_is_ahead_shorten_no_lateness_window(books: Books) -> None:
    """Tried again at a time before its own arrival, as this clock has it."""
    books.count(books.use("k1", "2026-03-08T12:00", meter="pigeons"))
    books.meter("pigeons")
    books.count(books.use("k2", NOON, meter="pigeons"))
    books.now = "2026-03-10T11:59"
    assert redrive(books) == {"counted": 1}
    assert books.outcomes() == {"counted": 1, "late_counted": 1}


def test_a_record_older_than_keys_are_kept_waits_for_a_person(books: Books) -> None:
    """Its key may have been counted and forgotten while it was parked."""
    books.count(books.use("k1", NOON, meter="pigeons"))
    books.meter("pigeons")
    books.now = "2026-04-20T12:00"
    assert redrive(books) == {"adjusted": 1}
    assert books.adjustments() == [("k1", Decimal(1), "beyond_retention", "pending")]


def test_a_time_in_the_future_of_its_arrival_is_refused_whenever_it_is_tried(books: Books) -> None:
    books.count(books.use("k1", "2026-03-10T13:00"))
    books.now = "2026-03-11T12:00"
    assert redrive(books) == {"parked:timestamp_in_future": 1}


def test_an_event_without_a_time_keeps_the_time_it_arrived_at(books: Books) -> None:
    books.count(books.use("k1", None, meter="pigeons"))
    books.meter("pigeons")
    books.now = "2026-03-12T09:00"
    assert redrive(books) == {"counted": 1}
    assert books.hours("pigeons") == {NOON: 1}


def test_what_is_carried_forward_counts_into_the_period_that_is_open_now(books: Books) -> None:
    books.count(books.use("k1", "2026-02-20T12:00", 7, meter="pigeons"))
    books.meter("pigeons", late_policy="carry_forward")
    books.count(books.use("k2", NOON, meter="pigeons"))
    books.now = "2026-03-25T12:00"
    assert redrive(books) == {"adjusted": 1}
    assert books.hours("pigeons") == {NOON: 1, "2026-03-25T12:00": 7}
    row = books.db.execute("SELECT applied_hour FROM adjustments").fetchone()
    assert row == (datetime(2026, 3, 25, 12, tzinfo=UTC),)


# Dry runs -----------------------------------------------------------------------------------------------


def snapshot(books: Books) -> list[Any]:
    tables = ("parked_records", "items", "buckets", "partition_accounts", "seen_current", "adjustments")
    tables += ("outbox", "partition_offsets", "audit_log", "item_periods", "calendar_changes")
    return [sorted(books.db.execute(f"SELECT t::text FROM {table} t").fetchall()) for table in tables]


def test_a_dry_run_changes_nothing_and_says_what_the_run_then_does(books: Books) -> None:
    books.count(*[books.use(f"k{n % 40}", NOON, meter="pigeons") for n in range(50)])
    books.count(books.use("negative", NOON, -1, meter="pigeons"))
    books.meter("pigeons")
    before = snapshot(books)
    predicted = redrive(books, dry_run=True)
    assert snapshot(books) == before
    assert predicted == {"counted": 40, "duplicate": 10, "parked:quantity_negative": 1}
    assert redrive(books) == predicted


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_ends_as_if_the_meter_had_been_there_all_along(postgres_dsn: str, data: Any) -> None:
    """The oracle: the same events, counted by another tenant whose meter was declared first."""
    moments = st.integers(0, 20 * 24).map(lambda hours: f"2026-03-{1 + hours // 24:02}T{hours % 24:02}:00")
    events = data.draw(
        st.lists(st.tuples(st.integers(0, 12), moments, st.integers(0, 3)), min_size=1, max_size=30)
    )
    aggregation = data.draw(st.sampled_from(["sum", "count", "max", "last", "unique"]))
    columns: dict[str, Any] = {"lateness_seconds": 3_024_000}
    if aggregation == "unique":
        columns |= {"value_property": "user", "dimensions": ["region"]}
    batch = data.draw(st.integers(1, 7))
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as db:
        offsets.ensure_positions(db, GROUP, {Partition("usage.v3", 0): 0})
        late, early = (Books(db, NOON, tenant=f"{name}{suffix}").create() for suffix in "le")
        early.meter("pigeons", aggregation, **columns)
        for at in ("a", "b"):
            for books in (late, early):
                books.now = "2026-03-21T12:00"
                half = events[: len(events) // 2] if at == "a" else events[len(events) // 2 :]
                if half:
                    books.count(
                        *[
                            books.use(f"k{k}", when, q, meter="pigeons", user=f"u{k % 5}", region=f"r{q % 2}")
                            for k, when, q in half
                        ]
                    )
        late.meter("pigeons", aggregation, **columns)
        redriving_batch, redriving.BATCH_MAX = redriving.BATCH_MAX, batch
        try:
            parked.redrive(db, Choice(tenant=late.tenant), by="cli:ada", dry_run=False)
            late.now = "2026-03-28T12:00"
            run(late)
        finally:
            redriving.BATCH_MAX = redriving_batch
        regions = [("r0",), ("r1",)] if aggregation == "unique" else [()]
        for region in regions:
            assert late.hours("pigeons", "cus_1", *region) == early.hours("pigeons", "cus_1", *region)
        accounts = [
            db.execute(
                "SELECT sum(counted + late_counted), sum(duplicate), sum(conflict), sum(dead_lettered) "
                "FROM partition_accounts WHERE tenant_id = %s",
                (books.tenant,),
            ).fetchone()
            for books in (late, early)
        ]
        assert accounts[0] == accounts[1]


# Progress, several workers, kills ---------------------------------------------------------------------


def test_nothing_that_is_parked_after_the_request_is_part_of_it(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"))
    made = parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False, everything=True)
    books.count(books.use("k2", NOON, meter="pigeons"))
    books.meter("pigeons")
    run(books)
    assert [row["tried"] for row in parked.redrives(books.db, ids=[made[0].redrive_id])] == [1]
    assert [row[1] for row in states(books)] == ["redriven", "parked"]


def test_two_workers_share_the_re_drives_and_count_nothing_twice(books: Books, postgres_dsn: str) -> None:
    books.count(*[books.use(f"k{n}", NOON, meter="pigeons") for n in range(2000)])
    books.meter("pigeons")
    for reason in ("unknown_meter", "unknown_meter"):
        parked.redrive(books.db, Choice(reasons=(reason,)), by="cli:ada", dry_run=False)

    def work() -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as db:
            mine = Books(db, books.now, tenant=books.tenant)
            run(mine)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert books.hours("pigeons") == {NOON: 2000}
    assert books.outcomes() == {"counted": 2000}


def test_a_cancelled_re_drive_keeps_what_it_did_and_does_no_more(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redriving, "BATCH_MAX", 10)
    books.count(*[books.use(f"k{n}", NOON, meter="pigeons") for n in range(30)])
    books.meter("pigeons")
    [made] = parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False, everything=True)
    redrives_of(books).step(books.db)
    assert parked.cancel(books.db, made.redrive_id, by="cli:ada")
    assert not parked.cancel(books.db, made.redrive_id, by="cli:ada")
    run(books)
    assert books.hours("pigeons") == {NOON: 10}
    assert books.outcomes() == {"counted": 10, "dead_lettered": 20}


def test_a_defect_pauses_the_re_drive_and_not_the_service(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"))

    def broken(*_: object) -> dict[int, Verdict]:
        raise ZeroDivisionError

    [made] = parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False, everything=True)
    assert redrives_of(books, broken).step(books.db) == 0
    [row] = parked.redrives(books.db, ids=[made.redrive_id])
    assert (row["state"], row["paused_reason"]) == ("paused", "defect:ZeroDivisionError")
    assert [event["attributes"] for event in books.ops("redrive_paused")] == [
        {"reason": "defect:ZeroDivisionError"}
    ]


def test_a_finished_re_drive_is_told_once_with_its_results(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"), books.use("k2", NOON, meter="doves"))
    books.meter("pigeons")
    redrive(books, dry_run=True)
    redrive(books)
    [event] = books.ops("parked_redriven")
    assert event["attributes"] == {"counted": "1", "parked:unknown_meter": "1"}


# By itself ----------------------------------------------------------------------------------------------


def test_a_meter_that_is_declared_at_last_has_its_records_counted_by_themselves(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"), books.use("k2", NOON, meter="doves"))
    assert redrives_of(books).look_for_fixes(books.db) == 0
    books.meter("pigeons")
    assert redrives_of(books).look_for_fixes(books.db) == 1
    assert redrives_of(books).look_for_fixes(books.db) == 0, "one is under way"
    run(books)
    assert books.hours("pigeons") == {NOON: 1}
    assert redrives_of(books).look_for_fixes(books.db) == 0, "what was tried is not tried again and again"


def test_another_release_tries_what_the_last_one_could_not_read_once(books: Books) -> None:
    count_raw(books, b"\xc3\x01nonsense")
    assert redrives_of(books).look_for_fixes(books.db) == 0
    newer = redrives_of(books, tried_with="another")
    assert newer.look_for_fixes(books.db) == 1
    run(books, newer)
    assert states(books) == [("unknown_schema", "parked", None, 2)]
    assert newer.look_for_fixes(books.db) == 0


def test_while_records_of_a_newer_release_wait_nothing_is_tried_by_itself(books: Books) -> None:
    """What runs is older than what writes: trying again would fail again, and a rollback may be under way."""
    books.count(books.use("k1", NOON, meter="pigeons"))
    books.meter("pigeons")
    assert redrives_of(books).look_for_fixes(books.db) == 1
    count_raw(books, b"\xc3\x01newer---", headers=[(SCHEMA_HEADER, b"usage_event/4")])
    assert version_skew(books.db, GROUP) == "usage_event/4"
    run(books)
    [row] = parked.redrives(books.db)
    assert (row["state"], row["paused_reason"]) == ("paused", "version_skew:usage_event/4")
    assert len(books.ops("redrive_paused")) == 1
    assert redrives_of(books).look_for_fixes(books.db) == 0
    assert redrive(books, Choice(reasons=("unknown_meter",))) == {"counted": 1}, "an operator still may"
    parked.discard(books.db, Choice(schema="usage_event/4"), note="rolled back", by="cli:ada", dry_run=False)
    redrives_of(books).look_for_fixes(books.db)
    run(books)
    assert [row["state"] for row in parked.redrives(books.db)] == ["done", "done"]


# Choosing -----------------------------------------------------------------------------------------------


def test_choices_restrict_by_what_they_name(books: Books) -> None:
    books.now = "2026-03-09T12:00"
    books.count(books.use("k1", books.now, meter="pigeons"))
    books.now = NOON
    books.count(books.use("k2", NOON, meter="doves"), books.use("k3", NOON, -1))
    count_raw(books, b"\x00")

    def found(**names: Any) -> list[str]:
        return [row["event_id"] for row in reversed(parked.find(books.db, Choice(**names)))]

    assert found() == ["k1", "k2", "k3", ""]
    assert found(meter="doves") == ["k2"]
    assert found(reasons=("unknown_meter",)) == ["k1", "k2"]
    assert found(kinds=("upcast_failure",)) == [""]
    assert found(tenant="acme") == ["k1", "k2", "k3"]
    assert found(tenant="globex") == []
    assert found(since=datetime(2026, 3, 10, tzinfo=UTC)) == ["k2", "k3", ""]
    assert found(until=datetime(2026, 3, 10, tzinfo=UTC)) == ["k1"]
    assert found(topic="usage.v2") == []
    assert parked.numbers(books.db, Choice(), states=["parked"]) == {
        "unknown_meter": 2,
        "quantity_negative": 1,
        "undecodable": 1,
    }


def test_everything_must_be_meant_and_very_many_forced(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    books.count(*[books.use(f"k{n}", NOON, meter="pigeons") for n in range(3)])
    with pytest.raises(parked.NothingChosen):
        parked.redrive(books.db, Choice(), by="cli:ada", dry_run=False)
    monkeypatch.setattr(parked, "AT_ONCE_MAX", 2)
    with pytest.raises(parked.TooMany):
        parked.discard(books.db, Choice(meter="pigeons"), note="n", by="cli:ada", dry_run=True)
    assert parked.discard(books.db, Choice(meter="pigeons"), note="n", by="x", dry_run=True, force=True) == 3
    assert {row[1] for row in states(books)} == {"parked"}


def test_who_acted_is_on_a_log_that_nobody_can_change(books: Books) -> None:
    books.count(books.use("k1", NOON, meter="pigeons"), books.use("k2", NOON, meter="doves"))
    redrive(books, Choice(meter="pigeons"))
    parked.discard(books.db, Choice(meter="doves"), note="tests", by="key:abc", dry_run=False)
    rows = books.db.execute("SELECT actor, action FROM audit_log ORDER BY audit_id DESC LIMIT 2").fetchall()
    assert rows == [("key:abc", "parked.discard"), ("cli:ada", "redrive.request")]
    for statement in ("UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log", "TRUNCATE audit_log"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            books.db.execute(statement)
