"""The whole product with damaged counters: what was billed wrongly is replayed, and exact at Stripe."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import psycopg
import pytest

from services.embedded.stack import Stack
from services.wire.settings import load_settings
from tests.pipeline import until

TIDEMETER = [sys.executable, "-m", "services.cli.main"]
CONFIGURATION = """
tenants:
  - id: acme
    meters:
      - {slug: credits, stripe: {event_name: acme.credits, allow_negative: true}}
    customers: [{ref: shop-0}, {ref: shop-1}, {ref: shop-2}, {ref: shop-3}]
"""
DAMAGE = (
    "UPDATE buckets SET total = total * 2 + 3",
    "UPDATE buckets SET total = total - 5, events = events + 1",
    "UPDATE buckets SET pushed = pushed - 4, closed = closed - 4",
    "UPDATE buckets SET closed = 0",
    "DELETE FROM buckets WHERE NOT open",
)


@dataclass
class Shop:
    """One tenant, its keys, and what it has sent: the truth, which no part of the product touches."""

    stack: Stack
    ingest_key: str
    operator_key: str
    sent: Decimal = Decimal(0)
    number: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(11))  # noqa: S311

    @property
    def url(self) -> str:
        return self.stack.member("ingest").base_url

    def use(self, events: int) -> None:
        batch = []
        for _ in range(events):
            self.number += 1
            quantity = self.chance.randrange(1, 20)
            at = datetime.now(UTC) - timedelta(minutes=self.chance.randrange(1, 400))
            batch.append(
                {
                    "metric": "credits",
                    "customerRef": f"shop-{self.chance.randrange(4)}",
                    "quantity": quantity,
                    "idempotencyKey": f"k{self.number}",
                    "ts": at.isoformat().replace("+00:00", "Z"),
                }
            )
            self.sent += quantity
        answer = httpx.post(
            f"{self.url}/v1/events/ingest",
            json={"events": batch},
            headers={"Authorization": f"Bearer {self.ingest_key}"},
            timeout=30,
        )
        assert answer.json()["accepted"] == events, answer.text

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Usage goes on beside the body."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.1):
                self.use(3)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def replay(self, **body: Any) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1/replay",
            params={"wait": 60} if body.get("mode") == "apply" else {},
            json={"tenantId": "acme", "metrics": ["credits"], "since": "-PT24H", "until": "now", **body},
            headers={"Authorization": f"Bearer {self.operator_key}"},
            timeout=120,
        )

    def billed(self) -> Decimal:
        answer = httpx.get(f"{self.stack.stripe_base}/_simulator/totals", timeout=10)
        return Decimal(answer.json()["grand_total"])

    def damage(self, change: str) -> None:
        """Do it, and have the closing notice: so it is billed."""
        with psycopg.connect(self.stack.postgres_dsn, autocommit=True) as db:
            assert db.execute(change).rowcount > 0
            db.execute("UPDATE items SET dirty_from = now() - interval '2 days'")

    def waits(self) -> tuple[int, ...]:
        """Hours, meter events and outbox rows that something has yet to be done with."""
        with psycopg.connect(self.stack.postgres_dsn, autocommit=True) as db:
            row = db.execute(
                "SELECT (SELECT count(*) FROM buckets WHERE open OR closed IS DISTINCT FROM total), "
                "(SELECT count(*) FROM meter_events WHERE state IN ('pending', 'in_flight', 'in_doubt')), "
                "(SELECT count(*) FROM outbox)"
            ).fetchone()
        return row or ()

    def settled(self) -> bool:
        return self.waits() == (0, 0, 0)

    def stands(self) -> str:
        return f"{self.billed()} billed, {self.sent} sent, {self.waits()} wait"


@contextmanager
def supervised(stack: Stack) -> Iterator[None]:
    """As `tidemeter up` does: hours that are gone end the counters, until a replay brings them back."""
    stop = threading.Event()

    def supervise() -> None:
        while not stop.wait(0.2):
            stack.supervise()

    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    root = tmp_path_factory.mktemp("shop")
    for part in (root, *root.parents):
        if part.stat().st_uid == os.getuid() and part.name.startswith(("pytest-", "shop")):
            part.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KAFKA_BOOTSTRAP", "POSTGRES_DSN", "STRIPE_API_KEY", "STRIPE_API_BASE"):
            patch.delenv(f"TIDEMETER_{name}", raising=False)
        patch.setenv("TIDEMETER_DATA_DIR", str(root))
        patch.setenv("TIDEMETER_DELTA_INTERVAL_SECONDS", "0.2")
        with Stack(root, load_settings()) as stack:

            def tidemeter(*arguments: str, given: str | None = None) -> str:
                done = subprocess.run(
                    [*TIDEMETER, *arguments],
                    env=stack.environment(),
                    input=given,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=True,
                )
                return done.stdout

            tidemeter("apply", "-f", "-", "--create-in-stripe", given=CONFIGURATION)
            ingest = tidemeter("keys", "create", "--tenant", "acme", "--scope", "ingest", "--json")
            operator = tidemeter("keys", "create", "--scope", "admin", "--json")
            with supervised(stack):
                yield Shop(stack, json.loads(ingest)["key"], json.loads(operator)["key"])


@pytest.mark.timeout(400)
def test_whatever_is_damaged_and_billed_a_replay_beside_traffic_leaves_stripe_exact(shop: Shop) -> None:
    shop.use(100)
    until(lambda: shop.billed() == shop.sent and shop.settled(), "the first bill", 60, shop.stands)
    for change in DAMAGE:
        shop.damage(change)
        with shop.busy():
            time.sleep(1.5)
            answer = shop.replay(mode="apply", force=True)
            assert answer.status_code == 200, answer.text
            assert answer.json()["state"] == "done"
            assert answer.json()["result"]["changedHours"] + answer.json()["result"]["changedPeriods"] > 0
        until(
            lambda: shop.billed() == shop.sent and shop.settled(),
            f"an exact bill after {change}",
            60,
            shop.stands,
        )
        again = shop.replay(mode="dry-run")
        assert again.status_code == 200, again.text
        assert (again.json()["changedHours"], again.json()["changedPeriods"]) == (0, 0), change
    assert shop.billed() == shop.sent
