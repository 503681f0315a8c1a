"""Replays beside one real worker: what a dry run finds, and what an apply puts right."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from services.archive.agent import run_once
from services.replay import running
from services.replay.running import Replayer
from services.streaming import replays
from services.streaming.replay_plan import Plan
from services.streaming.replays import RefusedReplay, ReplayRequest
from services.wire.settings import load_settings
from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import Pipeline, Worker, until

NOW_S = int(time.time())
COUNTED = (
    "SELECT item_id, hour_start, period_start, trim_scale(total), events, first_event, last_event, last_key, "
    "trim_scale(closed), trim_scale(pushed), sequence FROM buckets JOIN items i USING (item_id) "
    "WHERE i.tenant_id = %s ORDER BY 1, 2, 3"
)


@dataclass
class Scene:
    """One tenant with a meter of each aggregation, and replays of it."""

    pipeline: Pipeline
    tenant: str
    replayer: Replayer

    def usage(
        self, key: str, quantity: str | int = 1, at_s: float = NOW_S - 600, meter: str = "sum", **more: Any
    ) -> Usage:
        names = {"tenant": self.tenant, "customer": "cus_1", "meter": meter, **more}
        return Usage(quantity=Decimal(quantity), key=key, occurred_s=at_s, **names)

    def feed(self, *usages: Usage) -> None:
        self.pipeline.send(*usages)
        self.pipeline.await_quiet()

    def request(self, **more: Any) -> ReplayRequest:
        return ReplayRequest(**{"tenant_id": self.tenant, "since": "-PT72H", **more})

    def dry_run(self, **more: Any) -> Plan:
        return self.replayer.dry_run(self.request(**more))

    def apply(self, **more: Any) -> dict[str, Any]:
        """Ask for it, and carry it out; what is kept of it."""
        request = self.request(mode="apply", **more)
        now = datetime.now(UTC)
        with self.pipeline.database() as db:
            scope = replays.resolve(db, request, now)
            replay_id = replays.request_apply(db, request, scope, by="cli:test", now=now)
        with self.replayer.connect() as db:
            assert self.replayer.step(db) == replay_id
            return dict(replays.show(db, replay_id))

    def damage(self, change: str, *values: Any) -> int:
        """Change buckets ``b`` of this tenant by hand; how many."""
        with self.pipeline.database() as db:
            return db.execute(
                "WITH held AS MATERIALIZED (SELECT item_id FROM items WHERE tenant_id = %s "
                f"ORDER BY item_id FOR UPDATE) UPDATE buckets b SET {change} FROM held i "
                "WHERE i.item_id = b.item_id",
                (self.tenant, *values),
            ).rowcount

    def settle(self) -> None:
        """Wait until closing has nothing left to do, and report its deltas."""
        left = (
            "SELECT count(*) FROM items i WHERE tenant_id = %s AND (dirty_from IS NOT NULL "
            "OR EXISTS (SELECT FROM buckets b WHERE b.item_id = i.item_id AND b.open))"
        )

        def settled() -> bool:
            self.pipeline.push()
            return bool(self.pipeline.query(left, self.tenant) == [(0,)])

        until(settled, "everything closed")
        self.pipeline.await_quiet()

    def counted(self) -> list[tuple[Any, ...]]:
        return self.pipeline.query(COUNTED, self.tenant)

    def total(self, meter: str = "sum") -> Decimal:
        return self.pipeline.total((self.tenant, "cus_1", meter))


@pytest.fixture(scope="module")
def replayer(pipeline: Pipeline) -> Replayer:
    return Replayer(load_settings(kafka_bootstrap=pipeline.kafka, postgres_dsn=pipeline.dsn))


@pytest.fixture
def scene(pipeline: Pipeline, worker: Worker, replayer: Replayer) -> Scene:
    tenant = f"t{uuid.uuid4().hex[:8]}"
    pipeline.tenant(tenant)
    for aggregation in ("sum", "count", "max", "last"):
        pipeline.meter(tenant, aggregation, aggregation, lateness_s=2 * DAY_S)
    pipeline.meter(tenant, "unique", "unique", value_property="user", lateness_s=2 * DAY_S)
    return Scene(pipeline, tenant, replayer)


def history(scene: Scene, seed: int, number: int = 300) -> list[Usage]:
    """Usage of all meters and versions: disordered, with duplicates, conflicts, and some too late."""
    chance = random.Random(seed)  # noqa: S311
    usages: list[Usage] = []
    for place in range(number):
        at_s = NOW_S - chance.randrange(60, 30 * HOUR_S)
        if chance.random() < 0.03:
            at_s = NOW_S - 9 * DAY_S
        meter = chance.choice(["sum", "count", "max", "last", "unique"])
        more: dict[str, Any] = (
            {"properties": {"user": f"u{chance.randrange(12)}"}} if meter == "unique" else {}
        )
        usages.append(
            scene.usage(
                f"k{place}", chance.randrange(1, 50), at_s, meter, customer=f"cus_{place % 5}", **more
            )
        )
    usages += chance.sample(usages, number // 10)
    clashes = chance.sample(usages, number // 20)
    usages += [
        scene.usage(one.key, one.quantity + 1, one.occurred_s or 0, one.meter, customer=one.customer)
        for one in clashes
        if one.meter != "unique"
    ]
    return usages


def test_a_replay_of_what_was_never_damaged_finds_nothing_whatever_happened_to_it(scene: Scene) -> None:
    scene.feed(*history(scene, 1))
    plan = scene.dry_run()
    assert (plan.changed_hours, plan.changed_values, plan.changed_watermarks) == (0, 0, 0), plan
    assert plan.events_matched > 200 and plan.unreadable == {}
    assert plan.totals and all(
        (one.before, one.events_before) == (one.after, one.events_after) for one in plan.totals
    )


def test_a_dry_run_changes_no_row_and_no_offset(scene: Scene) -> None:
    scene.feed(*history(scene, 2, 60))
    scene.damage("total = total + 5")
    before = snapshot(scene)
    plan = scene.dry_run()
    assert plan.changed_hours > 0
    assert snapshot(scene) == before


def snapshot(scene: Scene) -> dict[str, Any]:
    """Every row of every table, every committed offset, and the end of every topic."""
    tables = scene.pipeline.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    rows = {table: scene.pipeline.query(f"SELECT t::text FROM {table} t ORDER BY 1") for (table,) in tables}
    groups = sorted(group.group_id for group in scene.pipeline.admin.list_consumer_groups().result().valid)
    return {"rows": rows, "committed": scene.pipeline.committed(), "groups": groups,
            "ends": scene.pipeline.log_bounds()}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "total = total + 7",
        "total = 0",
        "total = total - 1, events = events + 3",
        "first_event = first_event + interval '1 second'",
    ],
)
def test_rows_that_were_damaged_by_hand_are_repaired_as_the_plan_said(scene: Scene, change: str) -> None:
    scene.feed(*history(scene, 3, 120))
    scene.settle()
    before = scene.counted()
    assert scene.damage(change) > 0
    assert scene.counted() != before
    plan = scene.dry_run()
    done = scene.apply(plan_hash=plan.plan_hash)
    assert done["state"] == "done", done["error"]
    assert done["result"]["planHash"] == plan.plan_hash
    assert done["result"]["changedHours"] == plan.changed_hours
    scene.settle()
    assert scene.counted() == before
    assert scene.dry_run().changed_hours == 0


def test_applied_twice_is_applied_once_and_a_stale_plan_is_refused(scene: Scene) -> None:
    scene.feed(scene.usage("a", 10), scene.usage("b", 20))
    scene.damage("total = total + 1")
    plan = scene.dry_run()
    assert scene.apply(plan_hash=plan.plan_hash)["state"] == "done"
    again = scene.apply(plan_hash=plan.plan_hash)
    assert (again["state"], again["result"]["changedHours"]) == ("done", 0)
    scene.damage("total = total + 2")
    refused = scene.apply(plan_hash=plan.plan_hash)
    assert refused["state"] == "refused" and refused["error"].startswith("plan_stale")
    assert scene.total() == 32
    assert scene.apply()["state"] == "done"
    assert scene.total() == 30


def test_rows_that_are_gone_and_rows_that_never_were_are_put_right(scene: Scene) -> None:
    scene.feed(*history(scene, 4, 80))
    scene.settle()
    before = scene.counted()
    with scene.pipeline.database() as db:
        db.execute(
            "DELETE FROM unique_values v USING items i WHERE i.item_id = v.item_id AND i.tenant_id = %s",
            (scene.tenant,),
        )
        db.execute(
            "INSERT INTO unique_values SELECT i.item_id, date_trunc('month', now(), 'UTC'), "
            "gen_random_uuid(), date_trunc('hour', now() - interval '3 hours', 'UTC') FROM items i "
            "WHERE tenant_id = %s AND meter = 'unique'",
            (scene.tenant,),
        )
        db.execute(
            "INSERT INTO buckets (item_id, hour_start, period_start, total, events, late_events, "
            "first_event, last_event, first_arrival, last_arrival) "
            "SELECT item_id, h, date_trunc('month', h, 'UTC'), 9, 2, 0, h, h, now(), now() FROM items, "
            "date_trunc('hour', now() - interval '50 hours', 'UTC') h "
            "WHERE tenant_id = %s AND meter = 'sum'",
            (scene.tenant,),
        )
    assert scene.dry_run().changed_values > 0
    assert scene.apply()["state"] == "done"
    scene.settle()
    assert [row for row in scene.counted() if row[4] or row[3]] == before


def test_only_what_was_asked_for_is_touched(scene: Scene) -> None:
    scene.feed(
        *(
            scene.usage(f"{c}{m}", 5, NOW_S - 600, m, customer=c)
            for c in ("cus_1", "cus_2")
            for m in ("sum", "max")
        ),
        scene.usage("old", 3, NOW_S - 20 * HOUR_S, customer="cus_1"),
    )
    scene.damage("total = total + 1")
    assert scene.dry_run(metrics=("sum",)).changed_hours == 3
    assert scene.dry_run(customer_ref="cus_2").changed_hours == 2
    assert scene.dry_run(since="-PT2H").changed_hours == 4
    assert scene.dry_run(metrics=("max",), customer_ref="cus_1", since="-PT2H").changed_hours == 1
    assert scene.apply(metrics=("sum",), customer_ref="cus_1", since="-PT24H")["result"]["changedHours"] == 2
    assert scene.dry_run().changed_hours == 3


def test_an_hour_that_a_new_calendar_cuts_is_cut_by_a_replay(scene: Scene) -> None:
    hour_s = NOW_S // HOUR_S * HOUR_S - 5 * HOUR_S
    scene.pipeline.customer(scene.tenant, "cus_1", "1 month UTC")
    scene.feed(scene.usage("before", 3, hour_s + 600), scene.usage("after", 4, hour_s + 3000))
    scene.settle()
    edge = datetime.fromtimestamp(hour_s + 1800, UTC)
    scene.pipeline.query(
        "UPDATE customers SET calendar = %s WHERE tenant_id = %s RETURNING 1",
        f"1 month UTC {edge:%Y-%m-%dT%H:%M:%SZ}",
        scene.tenant,
    )
    moved = (
        "SELECT straddling FROM calendar_changes WHERE tenant_id = %s AND done_at IS NOT NULL AND items > 0"
    )
    until(lambda: scene.pipeline.query(moved, scene.tenant) == [(1,)], "the change carried out")
    hours = (
        "SELECT total, events FROM buckets b JOIN items i USING (item_id) WHERE i.tenant_id = %s "
        "AND events > 0 ORDER BY period_start"
    )
    assert scene.pipeline.query(hours, scene.tenant) == [(7, 2)]
    assert scene.dry_run().changed_hours == 2
    assert scene.apply()["state"] == "done"
    assert scene.pipeline.query(hours, scene.tenant) == [(3, 1), (4, 1)]
    scene.settle()
    assert not scene.dry_run().changed_hours


def test_a_log_that_ends_below_what_was_counted_proves_nothing(scene: Scene) -> None:
    scene.feed(scene.usage("a", 3))
    move = (
        "UPDATE partition_offsets SET next_offset = next_offset + %s, decided_to = decided_to + %s "
        "WHERE topic = 'usage.v1' AND partition = 0 RETURNING 1"
    )
    scene.pipeline.query(move, 5, 5)
    try:
        with pytest.raises(RefusedReplay, match="is not the log that was counted") as refused:
            scene.dry_run()
        assert refused.value.code == "log_truncated"
        assert scene.apply()["state"] == "refused"
    finally:
        scene.pipeline.query(move, -5, -5)
    assert scene.total() == 3 and not scene.dry_run().changed_hours


def test_a_plan_has_one_hash_in_every_time_zone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.feed(scene.usage("a", 3))
    scene.damage("total = total + 1")
    here = scene.dry_run()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    time.tzset()
    try:
        assert scene.dry_run().plan_hash == here.plan_hash
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_meter_that_is_declared_while_a_replay_runs_is_known_to_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.feed(scene.usage("a", 3))
    scene.damage("total = total + 1")
    scan = running._Work.scan

    def meanwhile(self: Any) -> None:
        scan(self)
        if (scene.tenant, "new") not in scene.pipeline.meters:
            scene.pipeline.meter(scene.tenant, "new")
            scene.feed(scene.usage("b", 5, meter="new"))

    monkeypatch.setattr(running._Work, "scan", meanwhile)
    done = scene.apply()
    assert (done["state"], done["result"]["unreadable"]) == ("done", {}), done["error"]
    assert (scene.total(), scene.total("new")) == (3, 5)


def test_a_window_by_arrival_and_by_offsets_covers_the_usage_that_arrived_there(scene: Scene) -> None:
    began = datetime.now(UTC)
    _, ends = scene.pipeline.log_bounds()
    scene.feed(scene.usage("late", 3, NOW_S - 30 * HOUR_S), scene.usage("now", 4))
    scene.damage("total = total + 1")
    by_arrival = scene.dry_run(by="arrival", since=began.isoformat())
    assert by_arrival.changed_hours == 2
    assert by_arrival.since is not None and by_arrival.since <= began - timedelta(hours=29)
    _, now = scene.pipeline.log_bounds()
    offsets = tuple(
        replays.OffsetRange(topic, number, ends[topic, number], end)
        for (topic, number), end in now.items()
        if end > ends[topic, number]
    )
    assert scene.dry_run(since=None, offsets=offsets).changed_hours == 2


def test_a_window_without_bounds_of_its_own_can_be_applied_and_shown(scene: Scene) -> None:
    scene.feed(scene.usage("a", 3))
    scene.damage("total = total + 1")
    done = scene.apply(by="arrival", since="-PT1H")
    assert (done["state"], done["since"], done["until"]) == ("done", None, None), done["error"]
    with scene.pipeline.database() as db:
        [listed] = replays.find(db, only_tenant=scene.tenant)
    assert (listed["since"], listed["records_read"]) == (None, done["records_read"])


@pytest.mark.parametrize(
    "edges",
    [
        {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T23:59:59.999999Z"},
        {"since": "1969-12-31T23:59:59Z", "until": "9999-12-31T23:59:59Z", "by": "arrival"},
    ],
)
def test_a_window_to_the_edges_of_time_is_a_window(scene: Scene, edges: dict[str, Any]) -> None:
    scene.feed(scene.usage("a", 3))
    scene.damage("total = total + 1")
    assert scene.dry_run(**edges).changed_hours == 1


@pytest.mark.parametrize(
    ("wrong", "code", "path"),
    [
        ({"since": "2026-01-01T00:00:00"}, "time_invalid", "since"),
        ({"until": "yesterday"}, "time_invalid", "until"),
        ({"since": "now", "until": "-PT1H"}, "window_invalid", "since"),
        ({"tenant_id": "nobody"}, "tenant_unknown", "tenantId"),
        ({"metrics": ("sum", "nothing")}, "meter_unknown", "metrics[1]"),
        ({"since": None}, "window_missing", "since"),
        ({"period": "now"}, "window_ambiguous", "period"),
    ],
)
def test_a_request_that_means_nothing_is_refused_with_the_field(
    scene: Scene, wrong: dict[str, Any], code: str, path: str
) -> None:
    with pytest.raises(RefusedReplay) as refused:
        scene.dry_run(**wrong)
    assert (refused.value.code, refused.value.path) == (code, path)


def test_overlapping_replays_are_refused_with_the_id_of_the_other(scene: Scene) -> None:
    scene.feed(scene.usage("a"))
    now = datetime.now(UTC)
    with scene.pipeline.database() as db:

        def ask(**more: Any) -> int:
            request = scene.request(mode="apply", **more)
            return replays.request_apply(
                db, request, replays.resolve(db, request, now), by="cli:test", now=now
            )

        first = ask(metrics=("sum",))
        with pytest.raises(RefusedReplay) as refused:
            ask(since="-PT1H")
        assert (refused.value.code, refused.value.replay_id) == ("replay_overlaps", first)
        second = ask(metrics=("max",))
        assert replays.cancel(db, first, by="cli:test")
        assert not replays.cancel(db, first, by="cli:test")
        with scene.replayer.connect() as own:
            assert scene.replayer.step(own) == second
            assert scene.replayer.step(own) is None
        assert [row["state"] for row in replays.find(db, only_tenant=scene.tenant)] == ["done", "cancelled"]


@pytest.mark.parametrize(
    "change",
    [
        "closed = b.closed + 3",
        "pushed = b.pushed - 2",
        "sequence = 0",
        "open = NOT b.open",
        "total = b.total + 5, closed = b.closed + 5, pushed = b.pushed + 5",
    ],
)
def test_what_closing_keeps_is_repaired_from_the_journal_and_nothing_is_sent_twice(
    scene: Scene, change: str
) -> None:
    scene.feed(
        *(scene.usage(f"{m}{n}", 3, NOW_S - 600 - n * HOUR_S, m) for n in range(6) for m in ("sum", "max"))
    )
    scene.settle()
    before = scene.counted()
    deltas = scene.pipeline.query("SELECT identifier, amount FROM deltas ORDER BY 1")
    scene.damage(change)
    plan = scene.dry_run()
    assert plan.changed_periods > 0
    done = scene.apply(plan_hash=plan.plan_hash)
    assert done["state"] == "done", done["error"]
    scene.settle()
    again = scene.dry_run()
    assert (again.changed_hours, again.changed_periods) == (0, 0)
    assert [row[3:5] + row[9:] for row in scene.counted()] == [row[3:5] + row[9:] for row in before]
    assert scene.pipeline.query("SELECT identifier, amount FROM deltas ORDER BY 1") == deltas


def test_rows_that_were_deleted_come_back_with_what_was_sent_of_them(scene: Scene) -> None:
    scene.feed(*history(scene, 6, 100))
    scene.settle()
    before = [(row[:8], row[9:]) for row in scene.counted()]
    deltas = scene.pipeline.query("SELECT identifier, amount FROM deltas ORDER BY 1")
    with scene.pipeline.database() as db:
        for table in ("buckets", "item_periods", "unique_values"):
            db.execute(
                f"DELETE FROM {table} b USING items i WHERE i.item_id = b.item_id AND i.tenant_id = %s "
                "AND i.meter <> 'last'",
                (scene.tenant,),
            )
    assert scene.apply(since="-PT240H")["state"] == "done"
    scene.settle()
    assert [(row[:8], row[9:]) for row in scene.counted() if row[4]] == before
    assert scene.pipeline.query("SELECT identifier, amount FROM deltas ORDER BY 1") == deltas
    again = scene.dry_run(since="-PT240H")
    assert (again.changed_hours, again.changed_periods, again.changed_values) == (0, 0, 0)


def test_a_window_that_begins_before_the_log_names_the_earliest_time_and_an_empty_one_is_empty(
    scene: Scene,
) -> None:
    assert scene.dry_run(since="2020-01-01T00:00:00Z", until="2020-02-01T00:00:00Z").changed_hours == 0
    assert scene.dry_run(since="now", until="now").changed_hours == 0
    scene.feed(scene.usage("a"))
    _, ends = scene.pipeline.log_bounds()
    gone = [TopicPartition(*tp, end) for tp, end in ends.items()]
    for future in scene.pipeline.admin.delete_records(gone).values():
        future.result()
    for since in ("2020-01-01T00:00:00Z", "-PT24H"):
        with pytest.raises(RefusedReplay, match="earliest it can begin is 20") as refused:
            scene.dry_run(since=since)
        assert (refused.value.code, refused.value.path) == ("window_not_held", "since")


def test_what_the_log_has_lost_is_replayed_from_the_archive_and_log_as_one(
    pipeline: Pipeline, worker: Worker, tmp_path: Path
) -> None:
    settings = load_settings(
        kafka_bootstrap=pipeline.kafka, postgres_dsn=pipeline.dsn, archive_url=f"file://{tmp_path}/archive"
    )
    # What earlier tests have deleted was never archived: these partitions begin where the log does.
    starts, _ = pipeline.log_bounds()
    with pipeline.database() as db:
        for (topic, number), start in starts.items():
            db.execute(
                "UPDATE partition_offsets SET start_offset = %s WHERE topic = %s AND partition = %s",
                (start, topic, number),
            )
    tenant = f"t{uuid.uuid4().hex[:8]}"
    pipeline.tenant(tenant)
    for aggregation in ("sum", "count", "max", "last"):
        pipeline.meter(tenant, aggregation, aggregation, lateness_s=2 * DAY_S)
    pipeline.meter(tenant, "unique", "unique", value_property="user", lateness_s=2 * DAY_S)
    scene = Scene(pipeline, tenant, Replayer(settings))
    usages = history(scene, 8, 120)
    scene.feed(*usages[:90])
    run_once(settings, lambda _: None, lambda: None)
    _, ends = pipeline.log_bounds()
    scene.feed(*usages[90:])
    gone = [TopicPartition(*tp, end) for tp, end in ends.items()]
    for future in pipeline.admin.delete_records(gone).values():
        future.result()
    scene.settle()
    before = scene.counted()
    scene.damage("total = total + 1")
    plan = scene.dry_run()
    assert plan.changed_hours > 0
    assert scene.apply(plan_hash=plan.plan_hash)["state"] == "done"
    scene.settle()
    assert scene.counted() == before
    found = next((tmp_path / "archive").rglob("*.avro"))
    found.write_bytes(found.read_bytes()[:-20])
    with pytest.raises(RefusedReplay) as refused:
        scene.dry_run()
    assert refused.value.code == "archive_damaged" and found.name in str(refused.value)
