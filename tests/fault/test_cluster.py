"""Three brokers, three replicas, two of which must confirm: brokers die under load, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from services.doctor import gather_kafka as doctor
from services.doctor.judge_kafka import judge_topics
from services.producer import NotAcknowledged, UsageEvent, UsageProducer
from services.producer.client import ReceiptState
from services.wire.settings import load_settings
from services.wire.topics import create_topics, plan_for
from tests.cluster import NODES, Cluster, settled
from tests.fault.campaign import Campaign, some_seed
from tests.fault.traffic import configure
from tests.integration.ingest_serving import Serving, serving
from tests.oracle import Logged, Usage, unframe
from tests.pipeline import GROUP, ROOT, USAGE, Coordinates, Pipeline, Worker, trim_topics, until

ACK_TIMEOUT_S = 3.0
TENANT = "acme"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """With one controller, which stays, so that both of the others may be away."""
    yield from running((1,))


@pytest.fixture
def quorum() -> Iterator[Cluster]:
    """Every broker is a controller, too: with any of them goes one of three votes."""
    yield from running(NODES)


def running(controllers: tuple[int, ...]) -> Iterator[Cluster]:
    with (
        tempfile.TemporaryDirectory(prefix="tidemeter-tests-") as directory,
        Cluster(Path(directory), controllers) as cluster,
    ):
        create_topics(cluster.bootstrap, plan_for(load_settings(kafka_bootstrap=cluster.bootstrap)))
        cluster.make_offsets_topic()
        yield cluster


@pytest.fixture
def pipeline(request: pytest.FixtureRequest, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    name = "quorum" if "quorum" in request.fixturenames else "cluster"
    cluster: Cluster = request.getfixturevalue(name)
    cluster.await_in_sync()
    trim_topics(cluster.bootstrap)
    pipeline = Pipeline(cluster.bootstrap, postgres_dsn, tmp_path)
    configure(pipeline)
    try:
        yield pipeline
    finally:
        pipeline.close()


# Senders that are told what is durable -------------------------------------------------------------------


@dataclass
class Sender:
    """Sends small events until it is told to stop, each again until it is acknowledged.

    ``put`` tries to send some, and returns the keys that were acknowledged.
    """

    name: str
    put: Callable[[list[Usage]], set[str]]
    known: dict[str, Usage] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    refused: int = 0

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Beside the body; in the end everything that was tried is acknowledged."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def send() -> None:
            try:
                while not stop.wait(0.3):
                    self._send_some()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=send, name=self.name)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    def _send_some(self) -> None:
        rest = {}
        for _ in range(10):
            number = len(self.known)
            usage = Usage(
                *(TENANT, f"cus_{self.name}{number % 7}", "requests", Decimal(number % 100 + 1)),
                *(f"{self.name}-{number}", int(time.time())),
            )
            self.known[usage.key] = rest[usage.key] = usage
        deadline = time.monotonic() + 120
        while rest:
            assert time.monotonic() < deadline, f"{self.name}: nothing was acknowledged for two minutes"
            done = self.put(list(rest.values()))
            self.acknowledged |= done
            self.refused += len(rest) - len(done)
            for key in done:
                del rest[key]
            if rest:
                time.sleep(0.2)


def client_of(producer: UsageProducer) -> Callable[[list[Usage]], set[str]]:
    """By the product's own producer client."""

    def put(usages: list[Usage]) -> set[str]:
        receipts = [
            producer.send(UsageEvent(one.tenant, one.customer, one.meter, one.quantity, one.key, moment(one)))
            for one in usages
        ]
        with contextlib.suppress(NotAcknowledged):
            producer.flush()
        return {one.idempotency_key for one in receipts if one.state is ReceiptState.ACKNOWLEDGED}

    return put


def api_client(api: Serving) -> Callable[[list[Usage]], set[str]]:
    """By HTTP. An answer is 202, or 503 where Kafka did not confirm; never anything else."""
    key = api.key(TENANT)

    def put(usages: list[Usage]) -> set[str]:
        events = [
            {"metric": one.meter, "customerRef": one.customer, "quantity": str(one.quantity)}
            | {"idempotencyKey": one.key, "ts": moment(one).isoformat()}
            for one in usages
        ]
        answer = api.post({"events": events}, key)
        results = answer.json()["results"]
        assert answer.status_code in (202, 503), answer.text
        assert {one["status"] for one in results} <= {"accepted", "unavailable"}, answer.text
        return {one["idempotencyKey"] for one in results if one["status"] == "accepted"}

    return put


def moment(usage: Usage) -> datetime:
    assert usage.occurred_s is not None
    return datetime.fromtimestamp(usage.occurred_s, UTC)


@dataclass
class Senders:
    """The producer client and the API, beside the campaign's own traffic."""

    client: Sender
    api: Sender

    def complete(self, pipeline: Pipeline) -> None:
        """What was acknowledged is in the log. Give the oracle all that is, also where nobody knew it."""
        noted = {(one.topic, one.partition, one.offset) for one in pipeline.log}
        known, stored = self.client.known | self.api.known, set()
        for topic in USAGE:
            for one in pipeline.read(topic):
                place = (one.topic, one.partition, one.offset)
                if place in noted:
                    noted.remove(place)
                    continue
                key = unframe("usage_event", 3, one.value)["idempotency_key"]
                stored.add(key)
                pipeline.log.append(Logged(*place, known[key]))
        assert not noted, f"{len(noted)} acknowledged records are gone"
        for sender in (self.client, self.api):
            assert sender.acknowledged == sender.known.keys() <= stored, f"{sender.name} lost some"


@contextlib.contextmanager
def senders(pipeline: Pipeline) -> Iterator[Senders]:
    """Both, sending until the body ends."""
    with (
        serving(pipeline.kafka, pipeline.dsn, ack_timeout_s=ACK_TIMEOUT_S) as api,
        UsageProducer(pipeline.kafka, kafka={"delivery.timeout.ms": 5000}) as producer,
    ):
        both = Senders(Sender("client", client_of(producer)), Sender("api", api_client(api)))
        with both.client.sending(), both.api.sending():
            yield both


# Harm ----------------------------------------------------------------------------------------------------


def harm(campaign: Campaign, cluster: Cluster, node: int, worker: Worker, *, politely: bool = False) -> None:
    """End a broker, wait until what it led is counted again without it, and bring it back."""
    _, ends = settled(campaign.pipeline.log_bounds)
    led = [tp for tp in ends if cluster.leader(*tp) == node]
    ends = {tp: end for tp, end in ends.items() if tp in led or not led}
    campaign.kills += 1
    began = time.monotonic()
    if politely:
        cluster.nodes[node].stop()
    else:
        cluster.nodes[node].kill()
    until(lambda: moved(campaign.pipeline, ends), f"counting on without {node}", 60, worker.log)
    campaign.recoveries.append(time.monotonic() - began)
    cluster.start([node])
    cluster.await_in_sync()


def moved(pipeline: Pipeline, ends: dict[Coordinates, int]) -> bool:
    """Every one of these partitions was counted beyond its end of then."""
    places = {
        (topic, partition): offset
        for topic, partition, offset in pipeline.query(
            "SELECT topic, partition, next_offset FROM partition_offsets WHERE consumer = %s", GROUP
        )
    }
    return all(places.get(tp, 0) > end for tp, end in ends.items())


def leader_but(cluster: Cluster, *but: int) -> int:
    """The broker that leads the most usage partitions, of those that may go."""
    led = [cluster.leader(topic, number) for topic in USAGE for number in range(4)]
    return max((node for node in NODES if node not in but), key=led.count)


# The tests -----------------------------------------------------------------------------------------------


def test_migrate_creates_topics_that_outlive_a_broker(cluster: Cluster, postgres_dsn: str) -> None:
    """With nothing said: three replicas where there are three brokers, and all but one confirm."""
    doomed = ["conflicts.v1"]
    cluster.admin.delete_topics(doomed)["conflicts.v1"].result()
    until(lambda: "conflicts.v1" not in cluster.admin.list_topics(timeout=10).topics, "the topic gone")
    done = tidemeter(cluster, postgres_dsn, "migrate", "--json")
    assert json.loads(done.stdout)["topics_created"] == doomed, done.stderr
    assert "replicas: 3; to confirm a write: 2" in done.stderr
    topics = cluster.admin.list_topics(timeout=10).topics
    ours = [*USAGE, "deltas.v1", "ops.v1", "conflicts.v1", "stripe_webhooks.v1"]
    assert {len(part.replicas) for name in ours for part in topics[name].partitions.values()} == {3}
    asked = cluster.admin.describe_configs([ConfigResource(ResourceType.TOPIC, name) for name in ours])
    assert {future.result()["min.insync.replicas"].value for future in asked.values()} == {"2"}
    refused = tidemeter(cluster, postgres_dsn, "migrate", TIDEMETER_MIN_INSYNC_REPLICAS="4")
    assert refused.returncode == 2
    assert "TIDEMETER_MIN_INSYNC_REPLICAS=4 of 3 replicas" in refused.stderr


def tidemeter(
    cluster: Cluster, dsn: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "TIDEMETER_KAFKA_BOOTSTRAP": cluster.bootstrap,
            "TIDEMETER_POSTGRES_DSN": dsn,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.timeout(240)
def test_a_leader_killed_and_another_broker_restarted_under_load_lose_nothing(
    campaign: Campaign, cluster: Cluster
) -> None:
    worker = campaign.pipeline.worker().start().await_healthy()
    pid = worker.pid
    with campaign.load(20_260_102, 4_000, seconds=60), senders(campaign.pipeline) as sent:
        campaign.recover(worker.log, least=200)
        first = leader_but(cluster, *cluster.controllers)
        harm(campaign, cluster, first, worker)
        harm(campaign, cluster, leader_but(cluster, first, *cluster.controllers), worker, politely=True)
    sent.complete(campaign.pipeline)
    assert worker.await_healthy().pid == pid, "the worker did not live through it"
    campaign.prove()


@pytest.mark.timeout(240)
def test_with_two_brokers_away_writes_are_refused_and_nothing_is_lost(
    campaign: Campaign, cluster: Cluster
) -> None:
    """One replica alone takes nothing, so nothing that was acknowledged can go with it."""
    worker = campaign.pipeline.worker().start().await_healthy()
    pid = worker.pid
    away = [node for node in NODES if node not in cluster.controllers]
    with senders(campaign.pipeline) as sent:
        campaign.recover(worker.log, least=50)
        for node in away:
            cluster.nodes[node].kill()
            campaign.kills += 1
        cluster.await_in_sync(away)
        before = sent.api.refused
        until(lambda: sent.api.refused > before + 20, "refusals by the API", 60)
        accepted = len(sent.api.acknowledged), len(sent.client.acknowledged)
        time.sleep(ACK_TIMEOUT_S)
        assert (len(sent.api.acknowledged), len(sent.client.acknowledged)) == accepted
        cluster.start(away)
        campaign.recover(worker.log, least=50)
        until(lambda: len(sent.api.acknowledged) > accepted[0], "the API accepts again", 60)
    cluster.await_in_sync()
    sent.complete(campaign.pipeline)
    assert worker.await_healthy().pid == pid, "the worker did not live through it"
    campaign.prove()


def test_the_doctor_finds_what_makes_an_acknowledgement_worth_less(cluster: Cluster) -> None:
    """As created every topic is safe; then one copy of a topic, one confirmation, and one broker too many."""
    cluster.await_in_sync()
    settings = load_settings(kafka_bootstrap=cluster.bootstrap)
    admin = doctor.connect(settings)

    def found() -> dict[str, str]:
        return {one.code: one.subject for one in judge_topics(doctor.gather_topics(admin, settings))}

    assert found() == {}
    one_copy = next(plan for plan in plan_for(settings) if plan.name == "conflicts.v1")
    try:
        admin.delete_topics([one_copy.name])[one_copy.name].result()
        until(lambda: one_copy.name not in admin.list_topics(timeout=10).topics, "the topic is gone")
        create_topics(cluster.bootstrap, [replace(one_copy, replication=1, min_insync_replicas=1)])
        for topic, number in (("usage.v1", "1"), ("usage.v2", "3")):
            set_min_insync(admin, topic, number)
        expected = {
            "replication_too_low": "conflicts.v1",
            "min_insync_too_low": "usage.v1",
            "min_insync_blocks": "usage.v2",
        }
        until(lambda: found() == expected, "the doctor finds all three")
    finally:
        for topic in ("usage.v1", "usage.v2"):
            set_min_insync(admin, topic, "2")
        admin.delete_topics([one_copy.name])[one_copy.name].result()
        until(lambda: one_copy.name not in admin.list_topics(timeout=10).topics, "the topic is gone")
        create_topics(cluster.bootstrap, [one_copy])


def set_min_insync(admin: AdminClient, topic: str, number: str) -> None:
    change = ConfigEntry("min.insync.replicas", number, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[change])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_twenty_brokers_killed_one_after_the_other_under_load_lose_nothing(
    campaign: Campaign, quorum: Cluster
) -> None:
    """Leaders, the coordinator, controllers, sometimes politely; each is back before the next one goes."""
    chance = random.Random(seed := some_seed())  # noqa: S311
    pipeline = campaign.pipeline
    workers = [pipeline.worker(name, CHUNK_RECORDS_MAX="200").start() for name in ("w1", "w2")]
    program = [sys.executable, "-m", "services.cli.main"]
    stripe = {"STRIPE_API_KEY": "sk_test_unused", "STRIPE_API_BASE": "http://127.0.0.1:9"}
    # Another group on the same ground, at rest.
    workers.append(pipeline.worker("dispatcher", [*program, "dispatcher"], **stripe).start())
    pids = [worker.await_healthy().pid for worker in workers]
    with campaign.load(seed, 30_000, seconds=600, parts=300), senders(pipeline) as sent:
        campaign.recover(least=500)
        for number in range(20):
            pipeline.approve(2)
            pipeline.push()
            time.sleep(chance.random() * 2)
            victim = chance.choice([leader_but(quorum), quorum.coordinator(GROUP), chance.choice(NODES)])
            harm(campaign, quorum, victim, workers[0], politely=number % 5 == 4)
    sent.complete(pipeline)
    assert [worker.await_healthy().pid for worker in workers] == pids, "a worker did not live through it"
    campaign.prove()
