"""The benchmark of growth at a small size: that the work is alike, and that it is counted right."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from bench import growth
from bench.generator import HOUR_US, TENANT
from bench.growth import FIGURES, Ground, Size, Stream, summary
from bench.servers import Servers, fresh_database
from services.wire.errors import Misconfigured
from services.wire.usage import item_id_hash

EVENTS = 1_000


@pytest.fixture(scope="module")
def here(servers: Any) -> Servers:
    return Servers(servers.kafka, servers.postgres, given=True)


@pytest.fixture(scope="module")
def measured(here: Servers) -> dict[str, Any]:
    return growth.run(here, events=EVENTS, rounds=1, items=[100, 500], seen=12_000)


@pytest.fixture(scope="module")
def filled(here: Servers) -> Iterator[str]:
    with fresh_database(here.dsn) as dsn:
        growth._fill(dsn, Size(7_000, 11_000), 1_700_000_000_000_000 // HOUR_US * HOUR_US)
        yield dsn


def test_every_size_is_counted_exactly(measured: dict[str, Any]) -> None:
    assert measured["checked"] is True
    assert [(size["items"], size["seen_before"]) for size in measured["sizes"]] == [
        (100, 0),
        (500, 0),
        (100, 12_000),
    ]


def test_a_result_compares_every_size_with_the_smallest(measured: dict[str, Any]) -> None:
    smallest = measured["sizes"][0]
    assert set(smallest["ratios"].values()) == {1.0}
    for size in measured["sizes"]:
        assert size["ratios"].keys() >= {"count_microseconds", "worker_microseconds", "resident_megabytes"}
        assert 0 < size["count_microseconds"] <= size["microseconds"]
        assert size["resident_megabytes"] > 10
        assert size["flat"] is all(size["ratios"].get(name, 0) <= 1.2 for name in growth.JUDGED)
    assert measured["flat"] is all(size["flat"] for size in measured["sizes"])
    assert measured["bytes_each"].keys() == {"item", "bucket", "seen_id"}
    assert json.loads(json.dumps(measured)) == measured
    assert len(growth.render(measured).columns) == 1 + 3


def test_a_local_database_s_processor_time_is_counted(here: Servers, measured: dict[str, Any]) -> None:
    if "127.0.0.1" not in here.dsn:
        pytest.skip("PostgreSQL runs elsewhere")
    for size in measured["sizes"]:
        parts = size["worker_microseconds"] + size["postgres_microseconds"]
        assert size["processor_microseconds"] == pytest.approx(parts, abs=0.2)
        assert size["postgres_microseconds"] > 0


def test_a_filled_database_is_one_that_counted_closed_and_settled(filled: str) -> None:
    with psycopg.connect(filled) as db:
        assert db.execute("SELECT count(*), count(DISTINCT item_id) FROM items").fetchone() == (7_000, 7_000)
        item = db.execute("SELECT item_id FROM items WHERE customer_ref = 'cus_0006999'").fetchone()
        assert item == (uuid.UUID(bytes=item_id_hash(TENANT, "cus_0006999", growth.METER)),)
        assert db.execute("SELECT count(*) FROM items WHERE dirty_from IS NOT NULL").fetchone() == (0,)
        settled = "total = closed AND total = pushed AND sequence = 1 AND NOT open"
        assert db.execute(f"SELECT count(*) FROM buckets WHERE {settled}").fetchone() == (7_000,)
        assert db.execute(
            "SELECT count(*) FROM deltas JOIN buckets USING (item_id, hour_start, period_start)"
        ).fetchone() == (7_000,)
        assert db.execute("SELECT count(*) FROM seen_current").fetchone() == (11_000,)


def test_bytes_are_of_table_and_index_for_each_row(filled: str) -> None:
    found = growth._bytes_each(filled)
    assert found.keys() == {"item", "bucket", "seen_id"}
    for sizes in found.values():
        assert 40 < sizes["table"] < 400
        assert 20 < sizes["index"] < 400


@pytest.mark.parametrize("items", [10, 11, 15, 20, 997, 10_000])
def test_every_size_takes_as_many_items_and_hours_and_no_hour_twice(items: int) -> None:
    stream = Stream(items, active=10, hours=3, start_us=0)
    rounds = [[stream.place(round_, number)[:2] for number in range(25)] for round_ in range(4)]
    for round_, places in enumerate(rounds):
        turns = [places[:10], places[10:20], places[20:]]
        assert [len({item for item, _ in turn}) for turn in turns] == [10, 10, 5]
        hours = [{hour // HOUR_US for _, hour in turn} for turn in turns]
        assert hours == [{3 * round_}, {3 * round_ + 1}, {3 * round_ + 2}]
    assert len({place for places in rounds for place in places}) == 100
    assert all(0 <= item < items for places in rounds for item, _ in places)
    if items >= 40:
        assert len({item for places in rounds for item, _ in places}) == 40


def ground(items: int, **figures: list[float]) -> Ground:
    values = {name: [10.0, 10.0, 10.0] for name in FIGURES} | figures
    return Ground(Size(items, 0), "", Stream(items, 10, 1, 0), {}, values)


def test_a_size_that_costs_a_quarter_more_is_not_flat() -> None:
    grounds = [ground(10), ground(20, microseconds=[12.0, 50.0, 1.0]), ground(30, microseconds=[12.5] * 3)]
    result = summary(grounds, events=1, rounds=3, checked=True, embedded=True)
    assert [size["flat"] for size in result["sizes"]] == [True, True, False]
    assert result["flat"] is False


def test_where_processor_time_goes_is_shown_and_not_judged() -> None:
    result = summary(
        [ground(10), ground(20, postgres_microseconds=[90.0] * 3)],
        events=1,
        rounds=3,
        checked=True,
        embedded=True,
    )
    assert result["sizes"][1]["ratios"]["postgres_microseconds"] == 9.0
    assert result["flat"] is True


def test_a_figure_that_cannot_be_had_is_left_out_and_not_compared() -> None:
    result = summary(
        [ground(10, postgres_microseconds=[]), ground(20, postgres_microseconds=[])],
        events=1,
        rounds=3,
        checked=True,
        embedded=False,
    )
    assert [size["postgres_microseconds"] for size in result["sizes"]] == [None, None]
    assert all("postgres_microseconds" not in size["ratios"] for size in result["sizes"])
    assert len(growth.render(result).columns) == 1 + 2


def test_events_that_would_be_too_old_are_refused_before_anything_starts(here: Servers) -> None:
    with pytest.raises(Misconfigured, match="too many hours"):
        growth.run(here, events=10_000, items=[10], seen=0)
