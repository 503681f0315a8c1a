"""The whole product, as `tidemeter up` and `tidemeter demo` run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.embedded.stack import Stack
from services.wire.settings import load_settings

TIDEMETER = [sys.executable, "-m", "services.cli.main"]
#: Values that must never reach a log, a label or an error answer.
PLANTED_CUSTOMER = "planted-customer-7f3a"
PLANTED_PROPERTY = "planted-property-91bc"
CONFIGURATION = f"""
tenants:
  - id: acme
    timezone: Europe/Budapest
    meters:
      - {{slug: calls, stripe: {{event_name: acme.calls}}}}
    customers:
      - {{ref: {PLANTED_CUSTOMER}}}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("stack")
    for part in (root, *root.parents):
        if part.stat().st_uid == os.getuid() and part.name.startswith(("pytest-", "stack")):
            part.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KAFKA_BOOTSTRAP", "POSTGRES_DSN", "STRIPE_API_KEY", "STRIPE_API_BASE"):
            patch.delenv(f"TIDEMETER_{name}", raising=False)
        patch.setenv("TIDEMETER_DATA_DIR", str(root))
        patch.setenv("TIDEMETER_DELTA_INTERVAL_SECONDS", "0.2")
        with Stack(root, load_settings()) as running:
            yield running


def tidemeter(stack: Stack, *arguments: str, given: str | None = None, code: int = 0) -> str:
    done = subprocess.run(
        [*TIDEMETER, *arguments],
        env=stack.environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def status(stack: Stack) -> dict[str, Any]:
    done = subprocess.run(
        [*TIDEMETER, "status", "--json"], env=stack.environment(), capture_output=True, text=True, timeout=60
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def wait_for(stack: Stack, what: str, done: Any, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = status(stack)
        if done(now):
            return now
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}; {now}")


@pytest.fixture(scope="module")
def api_key(stack: Stack) -> str:
    tidemeter(stack, "apply", "-f", "-", "--create-in-stripe", given=CONFIGURATION)
    key: str = json.loads(
        tidemeter(stack, "keys", "create", "--tenant", "acme", "--scope", "ingest", "--json")
    )["key"]
    return key


def post(stack: Stack, key: str, *events: dict[str, Any]) -> httpx.Response:
    url = f"{stack.member('ingest').base_url}/v1/events/ingest"
    return httpx.post(
        url, json={"events": list(events)}, headers={"Authorization": f"Bearer {key}"}, timeout=30
    )


def event(key: str, quantity: Any = 1, **more: Any) -> dict[str, Any]:
    return {
        "metric": "calls",
        "customerRef": PLANTED_CUSTOMER,
        "quantity": quantity,
        "idempotencyKey": key,
        "meta": {"note": PLANTED_PROPERTY},
        **more,
    }


def at_stripe(stack: Stack) -> str:
    total: str = httpx.get(f"{stack.stripe_base}/_simulator/totals", timeout=10).json()["grand_total"]
    return total


def test_usage_becomes_money_once_over_restarts_of_every_process(stack: Stack, api_key: str) -> None:
    """Given one event twice in a request, again in another, and again after everything was killed: once."""
    assert post(stack, api_key, event("a", 5), event("a", 5)).json()["accepted"] == 2
    assert post(stack, api_key, event("a", 5)).json()["accepted"] == 1
    wait_for(stack, "three records counted", lambda now: now["records"] == 3)
    for name in ("ingest", "counters-1", "pusher", "simulator"):
        stack.kill(name)
        stack.revive(name)
    for name in ("ingest", "counters-1", "pusher", "simulator"):
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
    for name in ("simulator", "ingest", "counters-1", "pusher"):
        base = stack.member(name).base_url
        assert httpx.get(f"{base}/health/live").status_code == 200
        ready = httpx.get(f"{base}/health/ready")
        assert ready.json()["status"] == "healthy", (name, ready.text)
        families = list(text_string_to_metric_families(httpx.get(f"{base}/metrics").text))
        assert any(family.name.startswith(("tidemeter_", "http_")) for family in families), name


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    for name in ("simulator", "ingest", "counters-1", "pusher"):
        child = stack.member(name).child
        assert child is not None
        listening = {
            (found.laddr.ip, found.laddr.port)
            for found in psutil.Process(child.pid).net_connections("inet")
            if found.status == psutil.CONN_LISTEN
        }
        assert listening == {("127.0.0.1", stack.member(name).port)}


def test_no_secret_and_no_content_reaches_a_log_a_label_or_an_error_answer(
    stack: Stack, api_key: str
) -> None:
    refused = post(stack, api_key, event("bad", "NaN"), event("worse", "1e400"), event("x" * 300))
    wrong_key = post(stack, api_key[:-4] + "AAAA", event("c"))
    assert refused.status_code == 400
    assert wrong_key.status_code == 401
    secrets = {
        "API key": api_key.rsplit("_", 1)[1],
        "PostgreSQL password": stack.postgres_dsn.split(":")[2].split("@")[0],
        "customer": PLANTED_CUSTOMER,
        "property": PLANTED_PROPERTY,
    }
    texts = {
        name: stack.log_file(name).read_text("utf-8")
        for name in ("simulator", "ingest", "counters-1", "pusher")
    }
    texts |= {
        f"{name} metrics": httpx.get(f"{stack.member(name).base_url}/metrics").text
        for name in ("simulator", "ingest", "counters-1", "pusher")
    }
    texts |= {"refusal": refused.text, "wrong key": wrong_key.text}
    for where, text in texts.items():
        for what, secret in secrets.items():
            assert secret not in text, f"{what} in {where}"


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
