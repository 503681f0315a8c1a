"""Every command block of the runbook and the operators' pages, run where something of each kind is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from confluent_kafka import Producer

from services.embedded.stack import SIMULATOR_KEY, Stack
from tests.integration.running import (
    deliver_webhooks,
    post,
    simulate,
    status,
    tidemeter,
    wait_for,
)
from tests.runbook import ROOT, Block, Shell, blocks_of, left_open

#: Functions of the runbook are used by the pages after it.
OPERATIONS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/operations").glob("*.md"))
PAGES = ("deploy/RUNBOOK.md", "deploy/ALERTS.md", *OPERATIONS)
#: Blocks of these commands alone need a container engine or a cluster, and are not run.
ELSEWHERE = ("docker ", "kubectl ")
BLOCKS = [
    block
    for page in PAGES
    for block in blocks_of(page)
    if not all(line.startswith(ELSEWHERE) for line in block.text.splitlines())
]

#: Commands that the pages say may end with another status, and with which: part of the line → statuses.
MAY_END_WITH = {
    "tidemeter status": {1},  # something needs a person; so it is here
    "tidemeter doctor": {1},
    "tidemeter rebuild": {1},
    "tidemeter offsets show": {1},
    "tidemeter reconcile ": {1, 3},
    "tidemeter reconciliation show": {1, 3},
    "tidemeter offsets reset": {1},
    "tidemeter parked redrive --kind upcast_failure": {1},  # this release cannot read them either
}

Row = tuple[Any, ...]


@dataclass
class Trouble:
    """A running system in which something of each kind is wrong, and the ids that a reader would put in."""

    stack: Stack
    shell: Shell
    ids: dict[str, str] = field(default_factory=dict)

    def row(self, statement: str, *parameters: Any) -> Row | None:
        with psycopg.connect(self.stack.postgres_dsn, autocommit=True) as db:
            cursor = db.execute(statement, parameters)
            return cursor.fetchone() if cursor.description else None

    def value(self, statement: str, *parameters: Any) -> str:
        row = self.row(statement, *parameters)
        assert row is not None, statement
        return str(row[0])


def usage(key: str, quantity: int = 2, metric: str = "requests", **more: Any) -> dict[str, Any]:
    return {
        "metric": metric,
        "customerRef": "customer-1",
        "quantity": quantity,
        "idempotencyKey": key,
        **more,
    }


@pytest.fixture(scope="module")
def trouble(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Trouble:
    tidemeter(stack, "apply", "-f", str(ROOT / "deploy/example.yaml"), "--create-in-stripe")
    made = Trouble(stack, Shell(tmp_path_factory.mktemp("shell"), stack.environment()))
    make_usage(made)
    make_billing(made)
    return made


def make_usage(trouble: Trouble) -> None:
    """Counted, late, too late, in conflict, unknown, unreadable, unmapped; and of an archived meter."""
    stack = trouble.stack
    key = json.loads(tidemeter(stack, "keys", "create", "--tenant", "demo", "--scope", "ingest", "--json"))[
        "key"
    ]
    now = datetime.now(UTC)
    jobs = {"meta": {"region": "eu", "tier": "gold"}}
    meter = trouble_meter(stack, "jobs")
    httpx.post(
        f"{stack.stripe_base}/v1/billing/meters/{meter}/deactivate",
        headers={"Authorization": f"Bearer {SIMULATOR_KEY}"},
    ).raise_for_status()
    sent = post(
        stack,
        key,
        *(usage(f"now-{number}") for number in range(5)),
        usage("rejected", 3, ts=(now - timedelta(hours=3)).isoformat()),
        usage("late", ts=(now - timedelta(hours=5)).isoformat()),
        usage("unknown", metric="storage"),
        usage("archived", metric="jobs", **jobs),
        usage("unmapped") | {"customerRef": "nobody"},
    )
    assert sent.json()["accepted"] == 10, sent.text
    wait_for(stack, "usage is counted", lambda found: found["records"] >= 10)
    sent = post(
        stack, key, usage("now-0", 99), usage("too-late", 4, ts=(now - timedelta(days=10)).isoformat())
    )
    assert sent.json()["accepted"] == 2, sent.text
    producer = Producer({"bootstrap.servers": stack.kafka_bootstrap})
    for topic in ("usage.v3", "usage.v3", "deltas.v1", "stripe_webhooks.v1"):
        producer.produce(topic, b"\x00 this is no record of ours", b"key")
    assert producer.flush(30) == 0
    wait_for(
        stack,
        "everything that cannot be counted is parked",
        lambda found: (
            found["records"] >= 14
            and found["parked"]
            == {"dead_letter": 3, "upcast_failure": 2, "conflict": 1, "paused_redrives": 0}
        ),
    )
    wait_for(stack, "pushes are done", lambda found: found["deltas"]["reported"]["count"] >= 3)
    trouble.ids["customer"] = trouble.value(
        "SELECT stripe_customer FROM customers WHERE customer_ref = 'customer-1'"
    )


def trouble_meter(stack: Stack, event_name: str) -> str:
    found = httpx.get(
        f"{stack.stripe_base}/v1/billing/meters?limit=100",
        headers={"Authorization": f"Bearer {SIMULATOR_KEY}"},
    ).json()
    return next(str(one["id"]) for one in found["data"] if one["event_name"] == event_name)


def make_billing(trouble: Trouble) -> None:
    """Stripe rejects usage later, and tells of payments; two of its events cannot be handled."""
    stack, customer = trouble.stack, trouble.ids["customer"]
    identifier = trouble.value(
        "SELECT identifier FROM meter_events WHERE meter = 'requests' AND state = 'reported' AND amount = 3"
    )
    error = {"error_message": "no", "request": {"identifier": identifier}}
    types = [{"code": "meter_event_invalid_value", "error_count": 1, "sample_errors": [error]}]
    meter = trouble_meter(stack, "requests")
    url = f"/v1/billing/meters/{meter}"
    simulate(
        stack,
        "events",
        {
            "type": "v1.billing.meter.error_report_triggered",
            "payload": "thin",
            "related_object": {"id": meter, "type": "billing.meter", "url": url},
            "data": {
                "developer_message_summary": "no",
                "validation_start": "2026-11-22T00:00:00Z",
                "validation_end": "2026-11-22T00:00:10Z",
                "reason": {"error_count": 1, "error_types": types},
            },
        },
    )
    for number in (1, 2):
        broken = {"id": f"sub_broken_{number}", "object": "subscription"}
        simulate(stack, "events", {"type": "customer.subscription.updated", "object": broken})
    price = httpx.post(
        f"{stack.stripe_base}/v1/prices",
        data={
            "currency": "usd",
            "product": "prod_api",
            "unit_amount_decimal": "0.2",
            "recurring[interval]": "month",
            "recurring[usage_type]": "metered",
            "recurring[meter]": meter,
        },
        headers={"Authorization": f"Bearer {SIMULATOR_KEY}"},
    ).json()["id"]
    anchor = int(time.time()) - 20 * 86_400
    trouble.ids["subscription"] = simulate(
        stack,
        "subscriptions",
        {"customer": customer, "prices": [price], "created": anchor, "status": "past_due"},
    )["id"]
    charge = simulate(stack, "charges", {"customer": customer, "amount": 5000, "currency": "eur", "fee": 175})
    simulate(stack, "refunds", {"charge": charge["id"], "amount": 2000})
    simulate(
        stack,
        "payment_methods",
        {"customer": customer, "exp_month": datetime.now(UTC).month, "exp_year": datetime.now(UTC).year},
    )
    simulate(stack, "accounts/acct_left/deauthorize", {})
    trouble.ids |= {"charge": charge["id"], "transaction": charge["balance_transaction"], "meter": meter}
    deliver_webhooks(stack)
    wait_for(
        stack,
        "Stripe's events had their effect",
        lambda found: found["deltas"]["failed"]["count"] == 1 and found["webhooks"]["dead"] == 2,
    )


#: (part of the section, or "" for all; placeholder) → the id that a reader would have put in.
PUT_IN: dict[tuple[str, str], Callable[[Trouble], str]] = {
    ("", "http://127.0.0.1:8080"): lambda on: on.stack.member("ingest").base_url,
    ("Parked records", " ID"): lambda on: (
        " "
        + on.value("SELECT parked_id FROM parked_records WHERE kind = 'upcast_failure' AND state = 'parked'")
    ),
    ("Adjustments", " ID"): lambda on: (
        " " + on.value("SELECT adjustment_id FROM adjustments WHERE state = 'pending'")
    ),
    ("Failed pushes", " ID"): lambda on: (
        " " + on.value("SELECT identifier FROM meter_events WHERE state = 'failed'")
    ),
    ("Move back", "PT24H"): lambda on: on.value(
        "SELECT 'PT' || extract(epoch FROM now() - min(first_arrival) "
        "- (max(last_arrival) - min(first_arrival)) / 2)::int || 'S' FROM buckets"
    ),
    ("", "EVENT_ID"): lambda on: on.value("SELECT event_id FROM webhook_runs WHERE state = 'dead'"),
    ("", "cus_…"): lambda on: on.ids["customer"],
    ("", "sub_…"): lambda on: on.ids["subscription"],
    ("", "ch_…"): lambda on: on.ids["charge"],
    ("", "txn_…"): lambda on: on.ids["transaction"],
    ("", "mtr_…"): lambda on: on.ids["meter"],
    ("", "acct_…"): lambda on: "acct_left",
    ("", "event_name = '…'"): lambda on: "event_name = 'requests'",
}


def damage_a_counter(on: Trouble) -> None:
    on.row(
        "UPDATE buckets SET total = total + 7 "
        "WHERE item_id IN (SELECT item_id FROM items WHERE meter = 'requests')"
    )


def declare_the_unknown_meter(on: Trouble) -> None:
    meter = "{slug: storage, stripe: {event_name: storage}}"
    given = f"tenants: [{{id: demo, timezone: Europe/Budapest, meters: [{meter}]}}]"
    tidemeter(on.stack, "apply", "-f", "-", "--create-in-stripe", given=given)


def refuse_charges(on: Trouble) -> None:
    simulate(on.stack, "faults", [{"fault": "status", "status": 403, "match": {"path": "/v1/charges/*"}}])


def halt(topic: str, reason: str) -> Callable[[Trouble], None]:
    return lambda on: (
        on.row(
            "UPDATE partition_offsets SET halted = %s, halted_at = now() "
            "WHERE consumer = 'tidemeter-counters' AND topic = %s AND partition = 0",
            reason,
            topic,
        )
        and None
    )


#: Part of a block → what has to be so before it.
BEFORE: dict[str, Callable[[Trouble], object]] = {
    "jq '.halted'": halt("usage.v2", "too_many_parked"),
    "--accept-lost": halt("usage.v3", "offset_gap"),
    "--since -PT24H --apply": damage_a_counter,
    "offsets reset": lambda on: on.stack.kill("counters-1"),
    "--reason unknown_meter": declare_the_unknown_meter,
    "select(.code": refuse_charges,
}
AFTER: dict[str, Callable[[Trouble], object]] = {
    "offsets reset": lambda on: on.stack.revive("counters-1"),
}
#: Part of a block → what its output has to hold: that it met what it is for.
SHOWS: dict[str, tuple[str, ...]] = {
    "tidemeter doctor\n": ("meter_archived (demo/jobs)", "customers_unmapped"),
    "/health/ready | jq": (
        '"status": "healthy"',
        "http_requests_total",
        "http_request_duration_seconds_bucket",
        "conservation gap: 0",
    ),
    "running_runtime": ("counters-1", "/health/ready"),
    "ConsumerGroupCommand": ("tidemeter-counters",),
    "parked list --limit": ("unknown_meter", "conflict"),
    "--reason unknown_meter": ("counted 1",),
    "parked discard": ("unknown_schema", "discarded"),
    "GROUP BY 1, 2, 3 ORDER BY 4": ("unknown_schema",),
    "redrive --kind upcast_failure": ("parked:unknown_schema",),
    "jq '.halted'": ("too_many_parked",),
    "--accept-lost": ("goes on",),
    "--since -PT24H --apply": ("requests",),
    "'{changedHours, changedValues, planHash}'": ('"changedHours": 0',),
    "adjustments list\n": ("too_late",),
    "meter-events list": ("meter_event_invalid_value",),
    "webhooks list --state dead\n": ("shape",),
    "webhooks replay --all-dead": ("2",),
    "select(.code": ("stripe_permission_missing", "rak_"),
    "FROM paused_meters": ("jobs",),
    "FROM stripe_fees WHERE charge_id": ("5000",),
    "exhausted_at IS NOT NULL OR past_due_since": ("past_due",),
    "offsets reset": ("partitions moved",),
    "tidemeter reconcile ": ("customer-1",),
    'stripe_get "balance': ("charge",),
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_does_what_the_page_says(block: Block, trouble: Trouble) -> None:
    """With the ids that a reader puts in; each command ends with 0, or as the page says it may."""
    text = block.text
    for (section, placeholder), found in PUT_IN.items():
        if section in block.section and placeholder in text:
            text = text.replace(placeholder, found(trouble))
    assert left_open(text) == []
    chosen = [part for part in {**BEFORE, **AFTER} if part in text]
    for part in chosen:
        BEFORE.get(part, lambda _: None)(trouble)
    try:
        ran = trouble.shell.run(text)
    finally:
        for part in chosen:
            AFTER.get(part, lambda _: None)(trouble)
    print(ran.output)
    wrong = [
        (statement, code)
        for statement, code in ran.failed
        if not any(part in statement and code in codes for part, codes in MAY_END_WITH.items())
    ]
    assert wrong == [], ran.output
    for part, expected in SHOWS.items():
        if part in block.text:
            assert [one for one in expected if one not in ran.output] == []


def test_the_pages_have_every_block_that_something_is_prepared_for() -> None:
    whole = "".join(block.text for block in BLOCKS)
    assert [part for part in (*BEFORE, *AFTER, *SHOWS) if part not in whole] == []


def test_nothing_is_lost_or_counted_twice_by_all_of_it(trouble: Trouble) -> None:
    found = wait_for(trouble.stack, "everything came to rest", lambda now: not now["waiting"]["outbox"])
    assert found["conservation_gap"] == 0
    assert status(trouble.stack)["halted"] == []
