"""The whole product for a test module, as `tidemeter up` runs it, and what tests do with it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.cli.status import collect
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


@contextlib.contextmanager
def running_stack(root: Path) -> Iterator[Stack]:
    """Everything, below ``root``, with an archive and quick closing; the environment points nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KAFKA_BOOTSTRAP", "POSTGRES_DSN", "STRIPE_API_KEY", "STRIPE_API_BASE"):
            patch.delenv(f"TIDEMETER_{name}", raising=False)
        patch.setenv("TIDEMETER_DATA_DIR", str(root))
        patch.setenv("TIDEMETER_DELTA_INTERVAL_SECONDS", "0.2")
        patch.setenv("TIDEMETER_ARCHIVE_URL", str(root / "archive"))
        patch.setenv("TIDEMETER_ARCHIVE_FILE_SECONDS", "1")
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
    """What ``tidemeter status --json`` shows once ``done`` says so, asked in this process."""
    settings = load_settings(kafka_bootstrap=stack.kafka_bootstrap, postgres_dsn=stack.postgres_dsn)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = collect(settings)
        if done(now):
            return now
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}; {now}")


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


def simulate(stack: Stack, path: str, body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{stack.stripe_base}/_simulator/{path}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def deliver_webhooks(stack: Stack) -> None:
    """Have the simulator send what is due, until every event that it has sent is handled."""

    def handled(now: dict[str, Any]) -> bool:
        simulate(stack, "deliveries", {})
        waiting = now["webhooks"]
        return not (waiting["received"] or waiting["processing"])

    wait_for(stack, "every webhook handled", handled)
