"""Records that park: a bad release is stopped, and nothing is committed before Kafka has what was parked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from services.streaming.offsets import resume
from tests.fault.campaign import prove
from tests.oracle import Usage
from tests.pipeline import ROOT, Coordinates, Pipeline, Worker, until

NOW_S = int(time.time())
HALTS = "SELECT topic, partition, next_offset, halted FROM partition_offsets WHERE halted IS NOT NULL"
GARBAGE = b"\xfe\xed\xfa\xce"


def usages(prefix: str, count: int, meter: str = "requests", **more: int) -> list[Usage]:
    return [
        Usage("acme", f"cus_{n}", meter, Decimal(1), f"{prefix}-{n}", NOW_S - 60, **more)
        for n in range(count)
    ]


def send_garbage(pipeline: Pipeline, count: int) -> list[Coordinates]:
    return pipeline.send_raw([("usage.v3", b"one key", GARBAGE, [], None)] * count)


def reason(worker: Worker) -> str:
    return str(worker.health()["checks"].get("stream", {}).get("reason", ""))


# The relay ----------------------------------------------------------------------------------------------


@contextmanager
def refusing(pipeline: Pipeline, topic: str) -> Iterator[None]:
    """The brokers refuse every record for ``topic``."""

    def limit(size: int) -> None:
        entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        [future] = pipeline.admin.incremental_alter_configs([resource]).values()
        future.result()

    limit(1)
    try:
        yield
    finally:
        limit(2 * 1024 * 1024)


def test_while_parked_records_cannot_be_written_the_offset_stays_and_after_the_cure_all_arrive(
    pipeline: Pipeline,
) -> None:
    """The delta timer relays beside the chunk, a kill and a takeover come in between: none lets go."""
    pipeline.send(*usages("before", 12))
    first = pipeline.worker("w1").start()
    second = pipeline.worker("w2").start()
    pipeline.await_quiet()
    with refusing(pipeline, "dead_letters.v1"):
        [place] = pipeline.send(*usages("unknown", 1, meter="pigeons"))
        topic, partition, offset = place
        pipeline.send(*usages("after", 1))
        until(lambda: any("Kafka" in reason(worker) for worker in (first, second)), "the wait for Kafka", 30)
        [owner] = [worker for worker in (first, second) if "Kafka" in reason(worker)]
        assert owner.health()["status"] == "unhealthy"
        stays(pipeline, place, 3)
        owner.kill()
        stays(pipeline, place, 6)  # long enough for the other worker to take over
        owner.start()
        stays(pipeline, place, 3)
        assert not pipeline.read("dead_letters.v1")
    prove(pipeline)
    assert pipeline.committed()[topic, partition] > offset


def stays(pipeline: Pipeline, place: Coordinates, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert pipeline.committed().get(place[:2], 0) <= place[2], (
            "committed past a record that is not parked"
        )
        time.sleep(0.1)


# The breaker --------------------------------------------------------------------------------------------


def test_a_hundred_undecodable_in_a_row_halt_the_partition_in_front_of_the_hundredth_until_told(
    pipeline: Pipeline,
) -> None:
    places = send_garbage(pipeline, 150)
    topic, partition, _ = places[0]
    pipeline.send(*usages("good", 60))
    worker = pipeline.worker(CHUNK_RECORDS_MAX="40").start()
    until(lambda: "too_many_parked" in reason(worker), "the halt", 30, worker.log)
    until(lambda: sum(pipeline.lag().values()) == pipeline.lag()[topic, partition], "the others", 30)
    assert pipeline.query(HALTS) == [(topic, partition, places[99][2], "too_many_parked")]
    until(lambda: pipeline.committed()[topic, partition] == places[99][2], "the commit up to there", 10)
    assert len(pipeline.read("upcast_failures.v1")) == 99
    [alarm] = pipeline.ops("partition_halted")
    assert alarm["attributes"]["reason"] == "too_many_parked"
    worker.kill()
    worker.start()
    until(lambda: "too_many_parked" in reason(worker), "the halt after a restart", 30, worker.log)
    assert pipeline.query(HALTS) == [(topic, partition, places[99][2], "too_many_parked")]
    with pipeline.database() as db:
        assert [row[:3] for row in resume(db, None, None)] == [("tidemeter-counters", topic, partition)]
    prove(pipeline)


def test_more_than_one_percent_undecodable_halts_too(pipeline: Pipeline) -> None:
    records = []
    for n in range(140):
        usage = usages(f"mixed-{n}", 1)[0]
        records += [("usage.v3", b"one key", usage.value(), [], usage)] * 1
        records += [("usage.v3", b"one key", GARBAGE, [], None)]
    places = pipeline.send_raw(records)
    worker = pipeline.worker().start()
    until(lambda: "too_many_parked" in reason(worker), "the halt", 30, worker.log)
    assert pipeline.query(HALTS)[0][2] == places[2 * 100 + 1][2]


# A release whose upcasters are broken -------------------------------------------------------------------


def test_broken_upcasters_park_each_record_with_its_reason_and_the_partition_moves_on(
    pipeline: Pipeline,
) -> None:
    prefixes = {
        "raises": "upcaster_error",
        "shapeless": "invalid_after_upcast",
        "not-a-record": "invalid_after_upcast",
    }
    wanted = {}
    for prefix, code in prefixes.items():
        pipeline.send(*usages(f"fine-{prefix}", 3, version=1))
        for place in pipeline.send(*usages(prefix, 3, version=1)):
            wanted["/".join(map(str, place))] = code
    for place in pipeline.send(*usages("no-way-on", 3, version=2)):
        wanted["/".join(map(str, place))] = "missing_upcaster"
    pipeline.send(*usages("current", 3))
    worker = pipeline.worker(
        command=[sys.executable, str(ROOT / "tests/fault/faulty_worker.py"), "bad_upcasters"]
    )
    worker.start()
    pipeline.await_quiet()
    headers = [one.headers for one in pipeline.read("upcast_failures.v1")]
    found = {
        "/".join(
            (one[f"__connect.errors.{name}"] or b"").decode() for name in ("topic", "partition", "offset")
        ): (one["tidemeter-error-reason"] or b"").decode()
        for one in headers
    }
    assert found == wanted
    assert len(headers) == len(wanted)
    events = {one["subject_id"]: one["attributes"]["reason"] for one in pipeline.ops("events_upcast_failed")}
    assert events == wanted
    assert pipeline.outcomes() == {"counted": 12, "upcast_failed": 12}
