"""The benchmark of late events at a small size: that it measures the whole way, and counts right."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import psutil
import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from bench import late_events
from bench.generator import HOUR_US
from bench.processes import ContestantFailed
from bench.product import AwaitedDeltas, own_topics, topic_names, worker
from bench.servers import Servers, fresh_database
from services.wire import topics

EVENTS, ROUNDS = 300, 2


@pytest.fixture(scope="module")
def here(servers: Any) -> Servers:
    return Servers(servers.kafka, servers.postgres, given=True)


@pytest.fixture(scope="module")
def measured(here: Servers) -> dict[str, Any]:
    before = belongings(here)
    result = late_events.run(here, events=EVENTS, seed=3, rounds=ROUNDS)
    assert belongings(here) == before
    return result


def belongings(here: Servers) -> tuple[set[str], set[str]]:
    """Topics and databases of benchmarks."""
    kafka = AdminClient({"bootstrap.servers": here.bootstrap}).list_topics(timeout=10).topics
    with psycopg.connect(here.dsn) as db:
        databases = {row[0] for row in db.execute("SELECT datname FROM pg_database").fetchall()}
    return (
        {topic for topic in kafka if topic.startswith("tidemeter-bench-")},
        {name for name in databases if name.startswith("tidemeter_bench_")},
    )


def test_late_events_revise_every_bucket_and_write_every_delta(measured: dict[str, Any]) -> None:
    sizes = (measured["items"], measured["events"], measured["deltas"], measured["rounds"])
    assert sizes == (EVENTS, EVENTS, EVENTS, ROUNDS)
    assert measured["checked"] is True
    workers = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [words for words in workers if "bench.product" in words]


def test_the_result_has_the_whole_way_its_spread_and_its_parts(measured: dict[str, Any]) -> None:
    assert measured["seconds_min"] <= measured["seconds"] <= measured["seconds_max"]
    assert measured["seconds"] <= measured["from_first_record_seconds"]
    assert measured["count_seconds"] > 0
    assert measured["close_seconds"] > 0
    assert min(measured[f"{name}_cpu_seconds"] for name in ("count", "close", "worker")) > 0
    assert [run["seconds"] > 0 for run in measured["runs"]] == [True] * ROUNDS
    assert measured["cpu"] == os.cpu_count()
    assert json.loads(json.dumps(measured)) == measured
    assert late_events.render(measured).row_count == 1


def test_every_item_has_its_late_events_in_different_closed_hours() -> None:
    source = late_events.Source(seed=1, events=10_000, rounds=2)
    source.on_time(0)
    source.late(0)
    assert source.items == 1_000
    hours: dict[str, list[int]] = {}
    for (customer, hour), (_, late) in source.truth.items():
        assert late in (0, 1)
        hours.setdefault(customer, []).extend([hour] * late)
    assert {len(set(one)) for one in hours.values()} == {10}
    last = max(hour for _, hour in source.truth)
    assert all(max(one) < last for one in hours.values()), "an event of the open hour is not late"
    before = set(source.truth)
    source.on_time(1)
    source.late(1)
    assert min(hour for _, hour in set(source.truth) - before) == last + HOUR_US


def test_more_events_than_closed_hours_take_more_items() -> None:
    source = late_events.Source(seed=1, events=30_000, rounds=1)
    assert source.items == 1_500
    source.late(0)
    assert {tuple(counts[1:]) for counts in source.truth.values()} == {(1,)}


def test_a_delta_is_found_once_it_is_committed_wherever_it_is_stored(postgres_dsn: str) -> None:
    insert = (
        "INSERT INTO deltas (identifier, item_id, period_start, hour_start, sequence, amount) "
        "SELECT md5(n::text || %(s)s::text), md5(n::text)::uuid, 'epoch', to_timestamp(3600 * n), "
        "%(s)s::int, 1 "
        "FROM generate_series(%(first)s::int, %(last)s::int) AS n"
    )
    places = [
        (hashlib.md5(str(n).encode(), usedforsecurity=False).digest(), n * HOUR_US) for n in range(1, 1001)
    ]
    with psycopg.connect(postgres_dsn, autocommit=True) as db, psycopg.connect(postgres_dsn) as other:
        db.execute(insert, {"s": 1, "first": 1, "last": 1000})
        db.execute("VACUUM deltas")
        deltas = AwaitedDeltas(db, places, sequence=2)
        assert deltas.found() == 0, "the same hour's first delta is not its second"
        other.execute(insert, {"s": 2, "first": 1, "last": 600})
        assert deltas.found() == 0, "not committed"
        other.commit()
        assert deltas.found() == 600
        db.execute(insert, {"s": 2, "first": 602, "last": 1000})
        assert deltas.found() == 600
        db.execute(insert, {"s": 2, "first": 601, "last": 601})
        assert deltas.found() == deltas.number == 1000


def test_a_worker_that_ends_is_named_with_its_last_words(here: Servers) -> None:
    before = belongings(here)
    with (
        pytest.raises(ContestantFailed, match=r"(?s)Tidemeter counters never had.*exit status"),
        fresh_database(here.dsn) as dsn,
        own_topics(here, partitions=1) as topic,
    ):
        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute("DROP TABLE config_version CASCADE")
            db.execute("DROP TABLE partition_offsets")
        with worker(here, topic, 1, dsn) as counters:
            counters.await_first()
    assert belongings(here) == before


def test_no_topic_of_the_product_keeps_its_name() -> None:
    plans = topics.plan_topics(partitions=1, replication=1, min_insync_replicas=1, usage_retention_days=1)
    names = topic_names("own")
    assert {plan.name for plan in plans} - set(names) == set(topics.USAGE_VERSIONS) - {topics.USAGE_CURRENT}
    assert all(name.startswith("own") for name in names.values())
    assert len(set(names.values())) == len(names)
