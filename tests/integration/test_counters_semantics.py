"""What the counters mean, through one real worker: late, duplicate, conflicting and unreadable records."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from services.console.adjustments import decide
from services.embedded import kafka_tool
from tests.oracle import DAY_S, HOUR_S, Usage, published, unframe
from tests.pipeline import GROUP, TOPICS, Coordinates, Pipeline, Read, Worker, until

NOW_S = int(time.time())


@dataclass
class Scene:
    """One tenant, its meter, one customer."""

    pipeline: Pipeline
    tenant: str
    customer: str = "cus_1"
    meter: str = "requests"
    sent: list[Coordinates] = field(default_factory=list)

    def usage(self, key: str, quantity: str | int = 1, at_s: int | None = NOW_S, **more: Any) -> Usage:
        names = {"tenant": self.tenant, "customer": self.customer, "meter": self.meter, **more}
        return Usage(quantity=Decimal(quantity), key=key, occurred_s=at_s, **names)

    def feed(self, *usages: Usage) -> list[Coordinates]:
        """Send, and wait until the counters and every topic have it."""
        coordinates = self.pipeline.send(*usages)
        self.pipeline.await_quiet()
        return coordinates

    def feed_raw(self, *records: tuple[str, bytes | None, bytes | None, list[Any]]) -> list[Coordinates]:
        coordinates = self.pipeline.send_raw([(*record, None) for record in records])
        self.pipeline.await_quiet()
        return coordinates

    def total(self, meter: str | None = None) -> Decimal:
        return self.pipeline.total((self.tenant, self.customer, meter or self.meter))

    def outcomes(self) -> dict[str, int]:
        return dict(self.pipeline.outcomes(self.tenant))

    def key(self) -> bytes:
        return self.usage("").record_key()


@pytest.fixture
def scene(pipeline: Pipeline, worker: Worker) -> Iterator[Scene]:
    pid = worker.pid
    tenant = f"tenant-{uuid.uuid4().hex[:8]}"
    pipeline.tenant(tenant)
    pipeline.meter(tenant, "requests")
    yield Scene(pipeline, tenant)
    assert worker.alive() and worker.pid == pid, "the worker ended"


def parked_at(records: list[Read], place: Coordinates) -> list[Read]:
    key = json.dumps(place, separators=(",", ":")).encode()
    return [one for one in records if one.key == key]


def text(headers: dict[str, bytes | None], name: str) -> str:
    return (headers[f"tidemeter-error-{name}"] or b"").decode()


# Counting -----------------------------------------------------------------------------------------------


def test_100_and_250_and_a_duplicate_100_and_a_late_75_are_425(scene: Scene) -> None:
    first = scene.usage("a", 100)
    scene.feed(first, scene.usage("b", 250), first, scene.usage("c", 75, NOW_S - DAY_S))
    assert scene.total() == 425
    assert scene.outcomes() == {"counted": 2, "duplicate": 1, "late_counted": 1}


def test_an_event_one_day_late_is_counted_in_its_own_hour_without_an_adjustment(scene: Scene) -> None:
    scene.feed(scene.usage("a", 5), scene.usage("b", 3, NOW_S - DAY_S))
    assert scene.total() == 8
    item = (scene.tenant, "cus_1", "requests")
    hours = {hour: total for (name, hour), total in scene.pipeline.hours().items() if name == item}
    assert hours == {NOW_S // HOUR_S * HOUR_S: 5, (NOW_S - DAY_S) // HOUR_S * HOUR_S: 3}
    assert not scene.pipeline.query("SELECT 1 FROM adjustments WHERE tenant_id = %s", scene.tenant)


def test_an_event_nine_days_late_is_one_adjustment_that_counts_once_approved_and_only_once(
    scene: Scene,
) -> None:
    scene.feed(scene.usage("a", 5), scene.usage("b", 2, NOW_S - 9 * DAY_S))
    again = scene.usage("b", 2, NOW_S - 9 * DAY_S)
    scene.feed(again)
    assert scene.total() == 5
    assert scene.outcomes() == {"counted": 1, "adjusted": 1, "duplicate": 1}
    on_topic = [unframe("adjustment", 1, one.value) for one in scene.pipeline.read("adjustments.v1")]
    [record] = {one["adjustment_id"]: one for one in on_topic if one["tenant_id"] == scene.tenant}.values()
    assert record["quantity"] == 2
    assert record["occurred_at"] == datetime.fromtimestamp(NOW_S - 9 * DAY_S, UTC)
    [(adjustment,)] = scene.pipeline.query(
        "SELECT adjustment_id::text FROM adjustments WHERE tenant_id = %s", scene.tenant
    )
    with psycopg.connect(scene.pipeline.dsn, autocommit=True) as db:
        decided = decide(db, adjustment, approved=True, by="a test")
        assert (decided.state, decided.changed) == ("approved", True)
        until(lambda: scene.total() != 5, "the counters applied it")
        for approved in (True, False):
            decided = decide(db, adjustment, approved=approved, by="somebody else")
            assert (decided.state, decided.changed) == ("applied", False)
    assert scene.pipeline.query(
        "SELECT state, decided_by, applied_hour = date_trunc('hour', occurred_at), applied_at >= decided_at "
        "FROM adjustments WHERE tenant_id = %s",
        scene.tenant,
    ) == [("applied", "a test", True, True)]
    time.sleep(1)  # five more rounds of the timer
    assert scene.total() == 7
    scene.pipeline.settle_deltas()
    sums = scene.pipeline.query(
        "SELECT sum(amount) FROM deltas JOIN items USING (item_id) WHERE tenant_id = %s", scene.tenant
    )
    assert sums == [(7,)]


def test_a_count_meter_counts_events_whatever_their_quantity(scene: Scene) -> None:
    scene.pipeline.meter(scene.tenant, "logins", "count")
    events = [scene.usage(f"l{n}", n * 10, meter="logins") for n in range(1, 5)]
    scene.feed(*events, events[0])
    assert scene.total("logins") == 4


def test_a_rejected_adjustment_never_counts_and_no_delta_ever_holds_it(scene: Scene) -> None:
    scene.feed(scene.usage("a", 5), scene.usage("b", 2, NOW_S - 9 * DAY_S))
    with psycopg.connect(scene.pipeline.dsn, autocommit=True) as db:
        [(adjustment,)] = scene.pipeline.query(
            "SELECT adjustment_id::text FROM adjustments WHERE tenant_id = %s", scene.tenant
        )
        assert decide(db, adjustment, approved=False, by="a test").state == "rejected"
        assert decide(db, adjustment, approved=True, by="a test").state == "rejected"
    scene.feed(scene.usage("c", 1))
    scene.pipeline.settle_deltas()
    assert scene.total() == 6
    assert scene.pipeline.query(
        "SELECT sum(amount) FROM deltas JOIN items USING (item_id) WHERE tenant_id = %s", scene.tenant
    ) == [(6,)]


def test_every_aggregation_and_a_split_meter_through_the_worker(scene: Scene) -> None:
    """The same three events, of which the second is late and the last comes twice."""
    pipeline = scene.pipeline
    for aggregation in ("sum", "count", "max", "last", "unique"):
        pipeline.meter(scene.tenant, aggregation, aggregation, value_property="size")
    pipeline.meter(scene.tenant, "split", dimensions=("region",))
    events = []
    for meter in ("sum", "count", "max", "last", "unique", "split"):
        for key, size, region, at in (
            ("a", "7", "eu", NOW_S),
            ("b", "9", "us", NOW_S - DAY_S),
            ("c", "7", "eu", NOW_S),
        ):
            properties = {"size": size, "region": region}
            events.append(scene.usage(f"{meter}/{key}", 1, at, meter=meter, properties=properties))
        events.append(events[-1])
    scene.feed(*events)
    hour, before = (at // HOUR_S * HOUR_S for at in (NOW_S, NOW_S - DAY_S))
    hours = {place: total for place, total in pipeline.hours().items() if place[0][0] == scene.tenant}
    name = (scene.tenant, "cus_1")
    assert hours == {
        ((*name, "sum"), hour): 14,
        ((*name, "sum"), before): 9,
        ((*name, "count"), hour): 2,
        ((*name, "count"), before): 1,
        ((*name, "max"), hour): 7,
        ((*name, "max"), before): 9,
        ((*name, "last"), hour): 7,
        ((*name, "last"), before): 9,
        ((*name, "unique"), hour): 1,
        ((*name, "unique"), before): 1,
        ((*name, "split", "eu"), hour): 2,
        ((*name, "split", "us"), before): 1,
    }


def test_the_same_key_in_two_tenants_counts_twice(scene: Scene) -> None:
    other = f"{scene.tenant}-b"
    scene.pipeline.tenant(other)
    scene.pipeline.meter(other, "requests")
    scene.feed(scene.usage("same", 10), scene.usage("same", 20, tenant=other))
    assert scene.total() == 10
    assert scene.pipeline.total((other, "cus_1", "requests")) == 20
    assert scene.outcomes() == {"counted": 1}


def test_two_events_in_the_same_microsecond_with_different_keys_both_count(scene: Scene) -> None:
    scene.feed(scene.usage("a", 3), scene.usage("b", 3))
    assert scene.total() == 6


def test_the_same_key_with_another_payload_is_one_conflict_that_names_both_and_changes_nothing(
    scene: Scene,
) -> None:
    first, second = scene.usage("k", 10), scene.usage("k", 11)
    [place_1] = scene.feed(first)
    [place_2] = scene.feed(second)
    assert scene.total() == 10
    assert scene.outcomes() == {"counted": 1, "conflict": 1}
    records = [unframe("conflict", 1, one.value) for one in scene.pipeline.read("conflicts.v1")]
    [record] = [one for one in records if one["tenant_id"] == scene.tenant]
    assert (record["first_topic"], record["first_partition"], record["first_offset"]) == place_1
    assert (record["second_topic"], record["second_partition"], record["second_offset"]) == place_2
    assert record["second_record"] == second.value()
    assert record["first_digest"] != record["second_digest"]
    [event] = [
        one for one in scene.pipeline.ops("usage_conflict") if one["attributes"]["tenant"] == scene.tenant
    ]
    assert event["subject_id"] == "/".join(map(str, place_2))


def test_conflicts_are_also_found_inside_one_chunk_and_against_a_record_on_another_item(scene: Scene) -> None:
    scene.feed(scene.usage("k", 1), scene.usage("k", 2), scene.usage("k", 1), scene.usage("k", 3))
    scene.feed(scene.usage("k", 1, customer="cus_2"))
    assert scene.total() == 1
    assert scene.outcomes() == {"counted": 1, "conflict": 3, "duplicate": 1}


def test_the_same_event_written_by_three_releases_counts_once(scene: Scene) -> None:
    for version in (2, 1, 3):
        scene.feed(scene.usage("k", "2.5", properties={"region": "eu"}, version=version))
    assert scene.total() == Decimal("2.5")
    assert scene.outcomes() == {"counted": 1, "duplicate": 2}


def test_an_event_without_a_time_gets_its_arrival_and_its_retry_is_a_duplicate(scene: Scene) -> None:
    scene.feed(scene.usage("k", 4, None))
    time.sleep(0.05)
    scene.feed(scene.usage("k", 4, None))
    assert scene.total() == 4
    assert scene.outcomes() == {"counted": 1, "duplicate": 1}
    [(age,)] = scene.pipeline.query(
        "SELECT extract(epoch FROM now() - watermark) FROM items WHERE tenant_id = %s", scene.tenant
    )
    assert abs(age) < 60


def test_a_timestamp_in_the_future_is_a_dead_letter_and_does_not_move_the_watermark(scene: Scene) -> None:
    soon = int(time.time()) + 200
    future = scene.usage("future", 1000, int(time.time()) + 3600)
    scene.feed(scene.usage("a", 1), future)
    scene.feed(scene.usage("b", 2, NOW_S - DAY_S), scene.usage("c", 3, soon))
    assert scene.total() == 6
    assert scene.outcomes() == {"counted": 2, "late_counted": 1, "dead_lettered": 1}
    assert scene.pipeline.query(
        "SELECT extract(epoch FROM watermark)::bigint FROM items WHERE tenant_id = %s", scene.tenant
    ) == [(soon,)]
    [dead] = [one for one in scene.pipeline.read("dead_letters.v1") if one.value == future.value()]
    assert text(dead.headers, "reason") == "timestamp_in_future"


# Records that park --------------------------------------------------------------------------------------


def test_an_unknown_meter_is_a_dead_letter_with_the_original_bytes_and_headers(scene: Scene) -> None:
    usage = scene.usage("k", 9, meter="pigeons", properties={"note": "ä"})
    headers = [("tidemeter-schema", b"usage_event/3"), ("trace", b"abc")]
    [place] = scene.feed_raw((usage.topic, usage.record_key(), usage.value(), headers))
    scene.pipeline.log[-1] = scene.pipeline.log[-1].__class__(*place, usage)
    assert scene.outcomes() == {"dead_lettered": 1}
    [dead] = parked_at(scene.pipeline.read("dead_letters.v1"), place)
    assert dead.value == usage.value()
    assert dead.headers["tidemeter-schema"] == b"usage_event/3"
    assert dead.headers["trace"] == b"abc"
    assert text(dead.headers, "reason") == "unknown_meter"
    where = [dead.headers[f"__connect.errors.{name}"] for name in ("topic", "partition", "offset")]
    assert where == [str(part).encode() for part in place]
    events = [
        one
        for one in scene.pipeline.ops("usage_dead_lettered")
        if one["subject_id"] == "/".join(map(str, place))
    ]
    assert len(events) == 1


def test_three_hundred_unknown_meters_in_a_row_do_not_stop_anybody_else(scene: Scene) -> None:
    """The breaker is for bad releases; a tenant that forgot to configure a meter is not one."""
    scene.feed(*[scene.usage(f"p{n}", 1, meter="pigeons") for n in range(300)], scene.usage("good", 7))
    assert scene.total() == 7
    assert scene.outcomes() == {"counted": 1, "dead_lettered": 300}
    assert not scene.pipeline.query("SELECT 1 FROM partition_offsets WHERE halted IS NOT NULL")


def poison(scene: Scene) -> dict[str, tuple[bytes | None, list[Any], str]]:
    """Name → (value, headers, reason): what must park on the first try and stop nothing."""
    good = scene.usage("poison", 1).value()
    prefix, body = good[:10], good[10:]
    older = scene.usage("poison", 1, version=2).value()
    return {
        "unknown fingerprint": (b"\xc3\x01" + b"\x07" * 8 + body, [], "unknown_schema"),
        "confluent framing without a registry": (b"\x00\x00\x00\x00\x01" + body, [], "unknown_schema"),
        "framing of another version": (older, [], "unknown_schema"),
        "header of another version": (good, [("tidemeter-schema", b"usage_event/2")], "unknown_schema"),
        "header without a value": (good, [("tidemeter-schema", None)], "unknown_schema"),
        "random bytes": (b"\xfe\xed" * 40, [], "undecodable"),
        "empty": (b"", [], "undecodable"),
        "tombstone": (None, [], "undecodable"),
        "prefix only": (prefix, [], "undecodable"),
        "truncated": (good[:-4], [], "undecodable"),
        "trailing bytes": (good + b"\x00", [], "undecodable"),
        "string of 100 MB declared": (prefix + zigzag(100_000_000) + b"abc", [], "undecodable"),
        "string of negative length": (prefix + zigzag(-5) + b"abc", [], "undecodable"),
        "map of 30 million entries declared": (map_bomb(scene), [], "undecodable"),
        "invalid UTF-8": (prefix + zigzag(2) + b"\xff\xfe" + body[8:], [], "undecodable"),
        "larger than the limit": (prefix + zigzag(70_000) + b"x" * 70_000, [], "undecodable"),
        "as large as a record can be": (b"\xc3\x01" + uuid.uuid4().bytes * 65_000, [], "undecodable"),
        "huge but compressed small": (b"\xc3\x01" + b"z" * 12_000_000, [], "undecodable"),
        "foreign header that is null": (b"\x01", [("trace", None)], "undecodable"),
        "foreign header of any bytes": (b"\x02", [("trace", b"\xff\x00\xc3")], "undecodable"),
    }


def zigzag(number: int) -> bytes:
    """An Avro long."""
    rest, out = (number << 1) ^ (number >> 63), b""
    while rest > 0x7F:
        out, rest = out + bytes([rest & 0x7F | 0x80]), rest >> 7
    return out + bytes([rest])


def map_bomb(scene: Scene) -> bytes:
    good = scene.usage("bomb", 1).value()
    end = b"\x00" + zigzag(4) + b"test"
    assert good.endswith(end)
    return good[: -len(end)] + zigzag(30_000_000) + b"\x00" * 20


def test_each_unreadable_record_parks_once_with_its_reason_and_the_partition_moves_on(scene: Scene) -> None:
    cases = poison(scene)
    records: list[tuple[str, bytes | None, bytes | None, list[Any]]] = []
    for number, (value, headers, _) in enumerate(cases.values()):
        good = scene.usage(f"good-{number}", 1)
        records += [(good.topic, good.record_key(), good.value(), [])]
        records += [("usage.v3", scene.key(), value, headers)]
    places = scene.feed_raw(*records)
    assert len({place[:2] for place in places}) == 1, "not on one partition"
    assert scene.total() == len(cases)
    parked = scene.pipeline.read("upcast_failures.v1")
    events = scene.pipeline.ops("events_upcast_failed")
    for (name, (value, headers, reason)), place in zip(cases.items(), places[1::2], strict=True):
        copies = parked_at(parked, place)
        assert len(copies) == 1, name
        assert copies[0].value == (value or b""), name
        assert text(copies[0].headers, "reason") == reason, name
        assert {header for header, _ in headers} <= copies[0].headers.keys(), name
        assert sum(one["subject_id"] == "/".join(map(str, place)) for one in events) == 1, name


def test_a_nul_or_an_endless_name_in_an_identity_is_a_dead_letter_and_not_a_crash(scene: Scene) -> None:
    """A producer that writes to Kafka itself can put anything into a text."""
    cases = {
        "invalid_customer_ref": scene.usage("k1", customer="a\x00b"),
        "invalid_meter": scene.usage("k2", meter="\x00" * 300),
        "invalid_idempotency_key": scene.usage("k\x003"),
        "quantity_out_of_range": scene.usage("k4", 2**53 + 1),
        "quantity_negative": scene.usage("k5", -1),
        "timestamp_out_of_range": scene.usage("k6", 1, 12),
    }
    places = scene.feed_raw(*[(one.topic, scene.key(), one.value(), []) for one in cases.values()])
    letters = scene.pipeline.read("dead_letters.v1")
    for reason, place in zip(cases, places, strict=True):
        [dead] = parked_at(letters, place)
        assert text(dead.headers, "reason") == reason
    assert scene.total() == 0


# Other people's tools -----------------------------------------------------------------------------------


def test_kafkas_own_consumer_groups_tool_shows_no_lag_at_rest(scene: Scene) -> None:
    scene.feed(*[scene.usage(f"t{n}", customer=f"cus_{n}") for n in range(50)])
    command = kafka_tool(
        "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
        *("--bootstrap-server", scene.pipeline.kafka, "--describe", "--group", GROUP),
    )
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] == [GROUP]]
    assert len(rows) == 12
    known = [(row[1], int(row[2]), row[3], int(row[4]), row[5]) for row in rows]
    _, ends = scene.pipeline.log_bounds()
    for topic, partition, current, end, lag in known:
        assert end == ends[topic, partition]
        # A partition that never had a record of this group shows "-" for both.
        assert lag == "0" or (current, lag) == ("-", "-")
    assert sum(row[4] == "0" for row in known) >= 4


def test_a_stock_reader_decodes_every_record_with_the_committed_schema(scene: Scene) -> None:
    scene.feed(
        scene.usage("a", "1.5"), scene.usage("a", 2), scene.usage("b", 3, NOW_S - 9 * DAY_S), scene.usage("c")
    )
    scene.pipeline.settle_deltas()
    subjects = {
        "deltas.v1": ("usage_delta", 2),
        "conflicts.v1": ("conflict", 1),
        "adjustments.v1": ("adjustment", 1),
        "ops.v1": ("ops_event", 1),
    }
    for topic, (subject, version) in subjects.items():
        records = scene.pipeline.read(topic)
        assert records, topic
        assert all(unframe(subject, version, one.value) for one in records)
        assert {one.headers["tidemeter-schema"] for one in records} == {f"{subject}/{version}".encode()}
        assert published(subject, version)[1] == records[0].value[:10]
    [delta] = [
        one
        for one in (unframe("usage_delta", 2, record.value) for record in scene.pipeline.read("deltas.v1"))
        if one["tenant_id"] == scene.tenant
    ]
    assert isinstance(delta["amount"], Decimal)
    assert isinstance(delta["hour_start"], datetime)


def test_the_metrics_agree_with_the_outcomes(scene: Scene, worker: Worker) -> None:
    scene.feed(scene.usage("a"), scene.usage("a"))
    everything = scene.pipeline.outcomes()
    series = worker.metrics()
    counted = {name: series.get(f'tidemeter_outcomes_total{{outcome="{name}"}}', 0.0) for name in everything}
    assert counted == everything
    until(lambda: worker.metrics()["tidemeter_conservation_gap"] == 0, "a conservation gap of 0")
    assert set(TOPICS) <= set(scene.pipeline.admin.list_topics(timeout=10).topics)
