"""The whole product, as `tidemeter up` and `tidemeter demo` run it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from confluent_kafka import Consumer, Producer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from services.embedded.stack import Stack
from tests.integration.running import (
    PLANTED_CUSTOMER,
    PLANTED_PROPERTY,
    TIDEMETER,
    deliver_webhooks,
    event,
    post,
    simulate,
    status,
    tidemeter,
    wait_for,
)
from tests.oracle import unframe

#: More values that must never reach a log, a label or an error answer.
PLANTED_MAIL = "planted.person@example.org"
PLANTED_NAME = "Planted Q. Person"
PLANTED_URL = "https://billing.example.org/session/planted-5d2e"
PLANTED_POISON = "planted-poison-e07f"
#: Every process of ours.
PROCESSES = (
    *("simulator", "ingest", "counters-1", "pusher", "dispatcher", "upkeep", "replayer", "reconciler"),
    *("archive", "bridge"),
)


def at_stripe(stack: Stack) -> str:
    total: str = httpx.get(f"{stack.stripe_base}/_simulator/totals", timeout=10).json()["grand_total"]
    return total


def test_usage_becomes_money_once_over_restarts_of_every_process(stack: Stack, api_key: str) -> None:
    """Given one event twice in a request, again in another, and again after everything was killed: once."""
    assert post(stack, api_key, event("a", 5), event("a", 5)).json()["accepted"] == 2
    assert post(stack, api_key, event("a", 5)).json()["accepted"] == 1
    wait_for(stack, "three records counted", lambda now: now["records"] == 3)
    for name in PROCESSES:
        stack.kill(name)
        stack.revive(name)
    for name in PROCESSES:
        stack._await_ready(name)
    assert post(stack, api_key, event("a", 5), event("b", "2")).json()["accepted"] == 2
    now = wait_for(
        stack,
        "everything settled",
        lambda now: now["records"] == 5 and now["deltas"]["reported"]["amount"] == "7",
    )
    assert now["outcomes"]["counted"] == 2
    assert now["outcomes"]["duplicate"] == 3
    assert now["conservation_gap"] == 0
    assert at_stripe(stack) == "7"


def test_a_killed_process_is_started_again(stack: Stack) -> None:
    child = stack.member("pusher").child
    assert child is not None
    child.kill()
    child.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not stack.ready("pusher"):
        stack.supervise()
        time.sleep(0.1)
    assert stack.ready("pusher")
    assert stack.member("pusher").restarts == 1


def test_every_process_answers_health_and_metrics(stack: Stack) -> None:
    for name in PROCESSES:
        base = stack.member(name).base_url
        assert httpx.get(f"{base}/health/live").status_code == 200
        ready = httpx.get(f"{base}/health/ready")
        assert ready.json()["status"] == "healthy", (name, ready.text)
        families = list(text_string_to_metric_families(httpx.get(f"{base}/metrics").text))
        assert any(family.name.startswith(("tidemeter_", "http_")) for family in families), name


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    for name in PROCESSES:
        child = stack.member(name).child
        assert child is not None
        listening = {
            (found.laddr.ip, found.laddr.port)
            for found in psutil.Process(child.pid).net_connections("inet")
            if found.status == psutil.CONN_LISTEN
        }
        assert listening == {("127.0.0.1", stack.member(name).port)}


def test_what_stripe_tells_becomes_state_and_ops_events(stack: Stack, api_key: str) -> None:
    """Through simulator, bridge, Kafka and dispatcher: a payment fails, a refund costs, an account leaves."""
    made = httpx.post(
        f"{stack.stripe_base}/v1/customers",
        data={"email": PLANTED_MAIL, "name": PLANTED_NAME, "metadata[tidemeter_timezone]": "Europe/Budapest"},
        headers={"Authorization": "Bearer sk_test_simulator"},
        timeout=30,
    ).json()
    simulate(
        stack,
        "charges",
        {"customer": made["id"], "amount": 900, "currency": "eur", "failed": "card_declined"},
    )
    good = simulate(stack, "charges", {"customer": made["id"], "amount": 5000, "currency": "eur", "fee": 175})
    simulate(stack, "refunds", {"charge": good["id"], "amount": 2000})
    simulate(stack, "accounts/acct_left/deauthorize", {})
    portal = {"id": "cs_1", "object": "checkout.session", "url": PLANTED_URL, "customer": made["id"]}
    simulate(stack, "events", {"type": "checkout.session.completed", "object": portal})
    deliver_webhooks(stack)
    wait_for(stack, "ops events are on Kafka", lambda now: not now["waiting"]["outbox"])
    told = {one["name"]: one for one in ops_events(stack)}
    assert told["charge_failed"]["attributes"]["customer_id"] == made["id"]
    assert (told["revenue_loss"]["attributes"]["amount"], told["revenue_loss"]["attributes"]["reason"]) == (
        "2000",
        "refund",
    )
    assert "acct_left" in json.dumps(told["connect_account_deauthorized"], default=str)
    listed = json.loads(tidemeter(stack, "webhooks", "list", "--state", "all", "--json"))
    assert {one["state"] for one in listed} == {"succeeded"}


def test_what_the_stream_rejects_later_fails_by_the_report_and_can_be_retried(
    stack: Stack, api_key: str
) -> None:
    """An error report is fetched and fails what it names, once; nothing else of the customer does."""
    before = status(stack)["deltas"]["failed"]["count"]
    assert post(stack, api_key, event("reported-later", 3)).json()["accepted"] == 1
    now = wait_for(stack, "it is at Stripe", lambda now: not now["waiting"]["items_to_close"])
    wait_for(stack, "nothing under way", lambda now: not now["deltas"]["pending"]["count"])
    rows = json.loads(tidemeter(stack, "meter-events", "list", "--state", "reported", "--json"))
    newest = rows[0]["identifier"]
    error = {"error_message": PLANTED_MAIL, "request": {"identifier": newest}}
    types = [{"code": "meter_event_invalid_value", "error_count": 1, "sample_errors": [error]}]
    simulate(
        stack,
        "events",
        {
            "type": "v1.billing.meter.error_report_triggered",
            "payload": "thin",
            "related_object": {"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
            "data": {
                "developer_message_summary": PLANTED_NAME,
                "validation_start": "2026-11-22T00:00:00Z",
                "validation_end": "2026-11-22T00:00:10Z",
                "reason": {"error_count": 1, "error_types": types},
            },
        },
    )
    deliver_webhooks(stack)
    now = wait_for(stack, "it failed", lambda now: now["deltas"]["failed"]["count"] == before + 1)
    assert now["deltas"]["reported"]["count"]
    shown = json.loads(tidemeter(stack, "meter-events", "show", newest, "--json"))
    assert (shown["state"], shown["error_code"]) == ("failed", "meter_event_invalid_value")
    tidemeter(stack, "meter-events", "retry", "--tenant", "acme")
    wait_for(
        stack, "the retry is reported", lambda now: not now["waiting"]["items_to_close"] and at_stripe(stack)
    )


def ops_events(stack: Stack) -> list[dict[str, Any]]:
    """Everything on ops.v1, as a stock reader sees it."""
    consumer = Consumer(
        {"bootstrap.servers": stack.kafka_bootstrap, "group.id": f"test-{time.monotonic_ns()}"}
        | {"auto.offset.reset": "earliest", "enable.partition.eof": True}
    )
    found = []
    try:
        topic = consumer.list_topics("ops.v1", timeout=20).topics["ops.v1"]
        consumer.assign([TopicPartition("ops.v1", number, 0) for number in topic.partitions])
        ended: set[int] = set()
        while len(ended) < len(topic.partitions):
            message = consumer.poll(20)
            assert message is not None
            if message.error() is not None:
                ended.add(message.partition())
            else:
                found.append(unframe("ops_event", 1, message.value() or b""))
    finally:
        consumer.close()
    return found


def test_no_secret_and_nothing_personal_reaches_a_log_a_label_an_error_answer_or_an_ops_event(
    stack: Stack, api_key: str
) -> None:
    """After everything that plants something: names, mails, session addresses, payloads, poison, secrets."""
    refused = post(stack, api_key, event("bad", "NaN"), event("worse", "1e400"), event("x" * 300))
    wrong_key = post(stack, api_key[:-4] + "AAAA", event("c"))
    assert refused.status_code == 400
    assert wrong_key.status_code == 401
    producer = Producer({"bootstrap.servers": stack.kafka_bootstrap})
    for value in (PLANTED_POISON.encode(), b"\xc3\x01" + PLANTED_MAIL.encode()):
        producer.produce("usage.v3", value, PLANTED_MAIL.encode(), headers=[("note", PLANTED_POISON)])
    producer.produce("stripe_webhooks.v1", PLANTED_POISON.encode(), b"key")
    assert producer.flush(30) == 0
    unsigned = httpx.post(
        f"{stack.member('bridge').base_url}/v1/webhooks/main",
        content=json.dumps({"id": "evt_1", "type": "x", "email": PLANTED_MAIL}),
        headers={"Stripe-Signature": f"t={int(time.time())},v1={PLANTED_POISON}"},
        timeout=30,
    )
    assert unsigned.status_code == 400
    wait_for(stack, "the poison is parked", lambda now: now["parked"]["upcast_failure"] >= 2)
    key_file = stack.root / "processes" / "webhook-secrets"
    signing = key_file.read_text("utf-8").split("=")[1].split("\n")[0]
    secrets = {
        "API key": api_key.rsplit("_", 1)[1],
        "PostgreSQL password": stack.postgres_dsn.split(":")[2].split("@")[0],
        "signing secret": signing,
        "Stripe key": "sk_test_simulator",
        "property": PLANTED_PROPERTY,
        "mail": PLANTED_MAIL,
        "name": PLANTED_NAME,
        "session": PLANTED_URL,
        "poison": PLANTED_POISON,
    }
    listed = tidemeter(stack, "parked", "list", "--json") + tidemeter(stack, "webhooks", "list", "--json")
    texts = {f"log of {name}": stack.log_file(name).read_text("utf-8") for name in PROCESSES}
    texts |= {
        f"metrics of {name}": httpx.get(f"{stack.member(name).base_url}/metrics").text for name in PROCESSES
    }
    texts |= {
        "refusal": refused.text,
        "wrong key": wrong_key.text,
        "unsigned": unsigned.text,
        "lists": listed,
    }
    texts |= {"ops events": json.dumps(ops_events(stack), default=str)}
    for where, text in texts.items():
        assert text, where
        for what, secret in secrets.items():
            assert secret not in text, f"{what} in the {where}"
        if where != "lists":
            assert PLANTED_CUSTOMER not in text, f"a customer in the {where}"
    assert key_file.stat().st_mode & 0o777 == 0o600


def test_the_runtime_file_is_private_and_points_other_commands_here(stack: Stack) -> None:
    path = Path(stack.root) / "runtime.json"
    assert path.stat().st_mode & 0o777 == 0o600
    bare = {"PATH": os.environ["PATH"], "TIDEMETER_DATA_DIR": str(stack.root)}
    done = subprocess.run(
        [*TIDEMETER, "status", "--json"], env=bare, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["conservation_gap"] == 0


def test_a_second_one_on_the_same_data_is_refused(stack: Stack) -> None:
    environment = {"PATH": os.environ["PATH"], "TIDEMETER_DATA_DIR": str(stack.root)}
    done = subprocess.run([*TIDEMETER, "up"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert str(os.getpid()) in done.stderr


def test_the_demo_proves_itself_and_leaves_a_running_system_alone(stack: Stack) -> None:
    before = status(stack)["records"]
    done = subprocess.run(
        [*TIDEMETER, "demo", "--events", "1500", "--seed", "11", "--once", "--json"],
        env={"PATH": os.environ["PATH"], "TIDEMETER_DATA_DIR": str(stack.root)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert status(stack)["records"] == before
    proof = json.loads(done.stdout.splitlines()[-1])
    assert proof["events_sent"] == proof["acknowledged"] == 1500 == sum(proof["outcomes"].values())
    assert proof["conservation_gap"] == 0
    assert proof["stripe_difference"] == 0
    assert proof["local_total"] == proof["stripe_total"] == proof["expected_total"] > 0
    assert proof["counters_events_per_second"] > 0
    assert proof["kills"] == 1
