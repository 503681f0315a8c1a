"""Replays by HTTP: who may ask for what, what a wrong question gets, and what the answer stands for."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from services.console.processes import AT_ONCE_MAX
from services.console.replay_routes import MODULE
from services.console.routes import ROUTES
from services.ingest.app import create_app, openapi_document
from services.streaming.replay_plan import Plan
from services.streaming.replays import ReplayRequest
from services.wire.settings import Settings
from tests.integration.ingest_serving import PLAIN, new_key, served
from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import Pipeline, Worker, until

NOW_S = int(time.time())
REPLAYER = [sys.executable, "-m", "services.cli.main", "replayer"]
#: Bodies of a runbook for another product, which operators know by heart.
RUNBOOK = (
    '{ "tenantId": "demo", "metrics": ["requests"], "since": "-PT24H", "until": "now", "mode": "dry-run" }',
    '{ "tenantId": "demo", "metrics": ["requests"], "since": "-PT24H", "until": "now", "mode": "apply" }',
    '{ "tenantId": "demo", "metrics": ["requests"], "since": "2025-01-01T00:00:00Z", '
    '"until": "2025-02-01T00:00:00Z", "mode": "dry-run" }',
)


@dataclass
class Site:
    """A running API over a pipeline with one counters worker; replayers on demand."""

    pipeline: Pipeline
    url: str
    replayer: Worker

    def key(self, tenant: str | None, *scopes: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {new_key(self.pipeline.dsn, tenant, *scopes).text}"}

    def tenant(self, name: str | None = None) -> str:
        tenant = name or f"t{uuid.uuid4().hex[:8]}"
        self.pipeline.tenant(tenant)
        for meter in ("requests", "storage"):
            self.pipeline.meter(tenant, meter, lateness_s=2 * DAY_S)
        return tenant

    def used(self, *tenants: str) -> None:
        """Usage of each, counted; then every hour of it damaged by 5."""
        self.pipeline.send(
            *(
                Usage(tenant, customer, meter, Decimal(2), f"{customer}{meter}{hour}", NOW_S - hour * HOUR_S)
                for tenant in tenants
                for customer in ("cus_1", "cus_2")
                for meter in ("requests", "storage")
                for hour in (2, 20)
            )
        )
        self.pipeline.await_quiet()
        for tenant in tenants:
            self.damage(tenant)

    def damage(self, tenant: str, by: int = 5) -> None:
        self.pipeline.query(
            "UPDATE buckets b SET total = total + %s FROM items i WHERE i.item_id = b.item_id "
            "AND i.tenant_id = %s RETURNING 1",
            by,
            tenant,
        )

    def totals(self, tenant: str) -> set[Decimal]:
        rows = self.pipeline.query(
            "SELECT DISTINCT trim_scale(total) FROM buckets JOIN items USING (item_id) WHERE tenant_id = %s",
            tenant,
        )
        return {row[0] for row in rows}

    def post(
        self, headers: dict[str, str], query: str = "", timeout: float = 60, **body: Any
    ) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1/replay{query}", headers=headers, json=body, timeout=timeout, verify=PLAIN
        )

    def get(self, path: str, headers: dict[str, str]) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30, verify=PLAIN)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """While a replayer runs."""
        self.replayer.start().await_healthy()
        try:
            yield
        finally:
            assert self.replayer.stop() == 0


@pytest.fixture(scope="module")
def site(pipeline: Pipeline, worker: Worker) -> Iterator[Site]:
    known = Settings(kafka_bootstrap=pipeline.kafka, postgres_dsn=SecretStr(pipeline.dsn))
    with served(create_app(known, routes=ROUTES)) as url:
        yield Site(pipeline, url, pipeline.worker("replayer", REPLAYER))


def snapshot(site: Site) -> dict[str, Any]:
    """Every row of every table but for when keys were used, every committed offset, every end of a log."""
    tables = site.pipeline.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    rows = {
        table: site.pipeline.query(f"SELECT t::text FROM {table} t ORDER BY 1")
        for (table,) in tables
        if table != "api_keys"
    }
    groups = sorted(group.group_id for group in site.pipeline.admin.list_consumer_groups().result().valid)
    return {"rows": rows, "committed": site.pipeline.committed(), "groups": groups,
            "ends": site.pipeline.log_bounds()}  # fmt: skip


def children() -> list[psutil.Process]:
    """Dry runs of this process that live."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if MODULE in one.cmdline() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


@contextlib.contextmanager
def frozen_dry_runs(site: Site) -> Iterator[None]:
    """Dry runs get as far as their first look at the positions, and wait there."""
    with site.pipeline.database() as db:
        db.execute("SELECT pg_advisory_lock(hashtextextended('tidemeter/beside-the-log', 0))")
        try:
            yield
        finally:
            db.execute("SELECT pg_advisory_unlock(hashtextextended('tidemeter/beside-the-log', 0))")


# Dry runs -----------------------------------------------------------------------------------------------


def test_a_dry_run_answers_with_the_plan_and_leaves_every_row_as_it_was(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    before = snapshot(site)
    answer = site.post(site.key(tenant, "replay"), metrics=["requests"], since="-PT24H")
    assert snapshot(site) == before
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    assert (plan["changedHours"], plan["changedItems"], plan["truncated"]) == (4, 2, False)
    [total] = plan["totals"]
    assert total == {
        "tenantId": tenant,
        "meter": "requests",
        "eventsBefore": 4,
        "eventsAfter": 4,
        "before": "28",
        "after": "8",
    }
    assert {item["meter"] for item in plan["items"]} == {"requests"}
    assert {hour["delta"] for item in plan["items"] for hour in item["hours"]} == {"-5"}
    assert children() == []


def test_the_bodies_of_the_runbook_work_as_they_are(site: Site) -> None:
    site.tenant("demo")
    site.used("demo")
    headers = {**site.key("demo", "replay"), "Content-Type": "application/json"}
    dry, apply, month = RUNBOOK

    def curl(body: str) -> Any:
        answer = httpx.post(f"{site.url}/v1/replay", headers=headers, content=body, timeout=60, verify=PLAIN)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert curl(dry)["changedHours"] == 4
    assert curl(month)["changedHours"] == 0
    with site.replaying():
        done = curl(apply)
    assert (done["state"], done["result"]["changedHours"]) == ("done", 4)
    assert curl(dry)["changedHours"] == 0


def test_a_replay_is_restricted_by_customer_and_by_period(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    key = site.key(tenant, "replay")
    assert site.post(key, customerRef="cus_1", since="-PT24H").json()["changedHours"] == 4
    month = datetime.fromtimestamp(NOW_S - 2 * HOUR_S).astimezone().isoformat()
    plan = site.post(key, customerRef="cus_1", metrics=["storage"], period=month).json()
    assert plan["changedHours"] in (1, 2)  # at the first day of a month the other hour is in the one before
    assert plan["since"][8:] == "01T00:00:00Z"


def test_no_more_than_two_dry_runs_run_at_once_and_none_outlives_its_client(site: Site) -> None:
    tenant = site.tenant()
    key = site.key(tenant, "replay")
    body = json.dumps({"since": "-PT1H"}).encode()
    head = f"POST /v1/replay HTTP/1.1\r\nHost: x\r\nAuthorization: {key['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    where = urlsplit(site.url)
    with frozen_dry_runs(site), contextlib.ExitStack() as stack:
        for _ in range(AT_ONCE_MAX):
            client = stack.enter_context(socket.create_connection((where.hostname or "", where.port or 0)))
            client.sendall(head.encode() + body)
        until(lambda: len(children()) == AT_ONCE_MAX, "dry runs under way", 20)
        busy = site.post(key, since="-PT1H")
        assert (busy.status_code, busy.json()["code"]) == (429, "replay_busy")
        assert int(busy.headers["Retry-After"]) > 0
        stack.close()
        until(lambda: not children(), "dry runs ended", 10)
    until(lambda: site.post(key, since="-PT1H").status_code == 200, "the places are free again", 10)


def test_a_dry_run_ends_when_its_time_is_over(site: Site) -> None:
    tenant = site.tenant()
    key = site.key(tenant, "replay")
    known = Settings(
        kafka_bootstrap=site.pipeline.kafka,
        postgres_dsn=SecretStr(site.pipeline.dsn),
        replay_dry_run_seconds=3,
    )
    with frozen_dry_runs(site), served(create_app(known, routes=ROUTES)) as url:
        late = httpx.post(f"{url}/v1/replay", headers=key, json={"since": "-PT1H"}, timeout=30, verify=PLAIN)
        assert (late.status_code, late.json()["code"]) == (504, "replay_too_long")
        assert not children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dry_run_ends_with_its_api_however_that_ends(site: Site, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "services.cli.main", "ingest", "--port", str(port)]
    api = site.pipeline.worker(f"api-{number.name}", command).start()
    key = site.key(site.tenant(), "replay")

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (
                httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=2, verify=PLAIN).status_code == 200
            )
        return False

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(
                f"http://127.0.0.1:{port}/v1/replay",
                headers=key,
                json={"since": "now"},
                timeout=60,
                verify=PLAIN,
            )

    until(ready, "the API serves", 30, api.log)
    with frozen_dry_runs(site):
        client = threading.Thread(target=ask)
        client.start()
        until(lambda: len(children()) == 1, "a dry run under way", 20)
        [child] = children()
        api.send(number)
        api.ended(25)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "it ended", 5)
        client.join(10)


# Who may ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/replay", "replay"),
        ("GET", "/v1/replays", "read"),
        ("GET", "/v1/replays/1", "read"),
        ("POST", "/v1/replays/1/cancel", "replay"),
    ],
)
def test_every_route_wants_a_key_with_its_scope(site: Site, method: str, path: str, scope: str) -> None:
    tenant = site.tenant()
    body = {"since": "now"} if path == "/v1/replay" else None
    others = [one for one in ("ingest", "read", "adjust", "replay") if one != scope]

    def ask(headers: dict[str, str]) -> httpx.Response:
        return httpx.request(method, site.url + path, json=body, headers=headers, timeout=30)

    assert ask({}).status_code == 401
    refused = ask(site.key(tenant, *others))
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
    for key in (site.key(tenant, scope), site.key(tenant, "admin"), site.key(None, scope)):
        answer = ask(key)
        assert answer.status_code in (200, 404), answer.text


def test_a_tenants_key_replays_its_own_tenant_only_and_another_is_as_unknown_as_none(site: Site) -> None:
    mine, theirs = site.tenant(), site.tenant()
    site.used(mine, theirs)
    key = site.key(mine, "read", "replay")
    for body in ({}, {"tenantId": mine}):
        plan = site.post(key, since="-PT24H", **body).json()
        assert {one["tenantId"] for one in plan["totals"] + plan["items"]} == {mine}
    for mode in ("dry-run", "apply"):
        answers = [
            site.post(key, since="-PT24H", mode=mode, metrics=["requests"], tenantId=tenant)
            for tenant in (theirs, "nobody")
        ]
        assert {answer.status_code for answer in answers} == {404}
        assert answers[0].json() == answers[1].json()
        assert answers[0].json()["path"] == "tenantId"
    operator = site.key(None, "read", "replay")
    seen = site.post(operator, since="-PT24H").json()
    assert {mine, theirs} <= {one["tenantId"] for one in seen["totals"]}
    assert site.post(operator, since="-PT24H", metrics=["requests"]).json()["code"] == "tenant_missing"
    of_theirs = site.post(operator, "?wait=0", since="-PT24H", mode="apply", tenantId=theirs).json()["id"]
    of_all = site.post(operator, "?wait=0", since="2001-01-01T00:00:00Z", until="2001-01-02T00:00:00Z",
                       mode="apply").json()["id"]  # fmt: skip
    unknown = site.get(f"/v1/replays/{2**40}", key)
    for hidden in (of_theirs, of_all):
        assert site.get(f"/v1/replays/{hidden}", key).json() == unknown.json()
        cancelled = httpx.post(f"{site.url}/v1/replays/{hidden}/cancel", headers=key)
        assert (cancelled.status_code, cancelled.json()) == (404, unknown.json())
        assert site.get(f"/v1/replays/{hidden}", operator).json()["state"] == "requested"
    own = site.post(key, "?wait=0", since="-PT24H", mode="apply").json()["id"]
    assert [one["id"] for one in site.get("/v1/replays", key).json()["replays"]] == [own]
    everyones = site.get("/v1/replays?limit=3", operator).json()
    assert [one["id"] for one in everyones["replays"]] == [own, of_all, of_theirs]
    assert site.get(f"/v1/replays?limit=1&before={own}", operator).json()["next"] == of_all
    for one in (own, of_all, of_theirs):
        assert httpx.post(f"{site.url}/v1/replays/{one}/cancel", headers=operator).json() == {"changed": True}
    acts = site.pipeline.query(
        "SELECT actor, action, subject FROM audit_log WHERE subject = %s ORDER BY 2", str(own)
    )
    assert [row[1] for row in acts] == ["replay.cancel", "replay.request"]
    assert all(row[0].startswith("key:") for row in acts)


# What cannot be ---------------------------------------------------------------------------------------


REFUSED = [
    ({"since": "2026-01-01T00:00:00"}, 400, "time_invalid", "since"),
    ({"since": "-PT1H", "until": "yesterday"}, 400, "time_invalid", "until"),
    ({"period": "soon"}, 400, "time_invalid", "period"),
    ({"period": "9999-12-31T23:59:59Z"}, 400, "time_invalid", "period"),
    ({"since": "now", "until": "-PT1H"}, 400, "window_invalid", "since"),
    ({}, 400, "window_missing", "since"),
    ({"by": "offsets"}, 400, "window_missing", "offsets"),
    ({"since": "-PT1H", "period": "now"}, 400, "window_ambiguous", "period"),
    ({"since": "-PT1H", "metrics": ["requests", "nothing"]}, 404, "meter_unknown", "metrics[1]"),
    ({"since": "-PT1H", "metrics": ["requests", 5]}, 400, "parameter_invalid", "metrics[1]"),
    ({"since": 5}, 400, "parameter_invalid", "since"),
    ({"since": "-PT1H", "mode": "test"}, 400, "parameter_invalid", "mode"),
    ({"since": "-PT1H", "planHash": "abc"}, 400, "parameter_invalid", "planHash"),
    ({"since": "-PT1H", "surprise": 1}, 400, "parameter_invalid", "data"),
    (
        {"offsets": [{"topic": "usage.v3", "partition": 0, "start": 5, "end": 1}]},
        *(400, "window_invalid", "offsets[0].start"),
    ),
    (
        {"since": "-PT1H", "offsets": [{"topic": "usage.v3", "partition": 0, "start": 0, "end": 1}]},
        *(400, "window_ambiguous", "offsets"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["dry-run", "apply"])
@pytest.mark.parametrize(("body", "status", "code", "path"), REFUSED)
def test_a_request_that_means_nothing_is_refused_with_the_field_and_leaves_nothing(
    site: Site, mode: str, body: dict[str, Any], status: int, code: str, path: str
) -> None:
    tenant = site.tenant()
    answer = site.post(site.key(tenant, "read", "replay"), **{"mode": mode, **body})
    assert (answer.status_code, answer.json()["code"], answer.json()["path"]) == (status, code, path)
    assert site.pipeline.query("SELECT FROM replays WHERE tenant_id = %s", tenant) == []


def test_offsets_of_a_partition_that_is_not_counted_are_named(site: Site) -> None:
    key = site.key(site.tenant(), "replay")
    offsets = [{"topic": "usage.v3", "partition": 0, "start": 0, "end": 1},
               {"topic": "deltas.v1", "partition": 0, "start": 0, "end": 1}]  # fmt: skip
    answer = site.post(key, offsets=offsets)
    assert (answer.status_code, answer.json()["path"]) == (404, "offsets[1]")
    with site.replaying():
        answer = site.post(key, offsets=offsets, mode="apply")
    assert (answer.status_code, answer.json()["code"]) == (404, "partition_unknown")


def test_unknown_parameters_and_waits_are_refused(site: Site) -> None:
    key = site.key(site.tenant(), "read", "replay")
    assert site.post(key, "?mode=apply", since="now").json()["code"] == "parameter_unknown"
    assert site.get("/v1/replays?tenant=x", key).json()["code"] == "parameter_unknown"
    for wait in ("61", "-1", "x"):
        answer = site.post(key, f"?wait={wait}", since="now", mode="apply")
        assert (answer.status_code, answer.json()["path"]) == (400, "wait")


def test_what_is_away_is_said_with_503(site: Site) -> None:
    tenant = site.tenant()
    key = site.key(tenant, "replay")
    known = Settings(kafka_bootstrap="127.0.0.1:1", postgres_dsn=SecretStr(site.pipeline.dsn))
    with served(create_app(known, routes=ROUTES)) as url:
        answer = httpx.post(
            f"{url}/v1/replay", headers=key, json={"since": "-PT1H"}, timeout=60, verify=PLAIN
        )
    assert (answer.status_code, answer.json()["code"]) == (503, "kafka_unavailable")
    assert int(answer.headers["Retry-After"]) > 0


# Applies ----------------------------------------------------------------------------------------------


def test_an_apply_waits_for_its_end_and_repeating_it_with_its_hash_is_safe(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    key = site.key(tenant, "read", "replay")
    body = {"since": "-PT24H", "until": "now"}
    plan = site.post(key, **body).json()
    with site.replaying():
        done = site.post(key, **body, mode="apply", planHash=plan["planHash"])
        assert (done.status_code, done.json()["state"]) == (200, "done"), done.text
        assert done.json()["result"]["items"] == plan["items"]
        assert site.totals(tenant) == {2}
        again = site.post(key, **body, mode="apply", planHash=plan["planHash"])
        assert (again.status_code, again.json()["result"]["changedHours"]) == (200, 0)
        site.damage(tenant, 1)
        stale = site.post(key, **body, mode="apply", planHash=plan["planHash"])
        assert (stale.status_code, stale.json()["code"]) == (409, "plan_stale")
        assert stale.json()["path"] == "planHash"
        shown = site.get(f"/v1/replays/{stale.json()['replayId']}", key).json()
        assert (shown["state"], shown["error"]["code"], shown["result"]) == ("refused", "plan_stale", None)
    assert site.totals(tenant) == {3}


def test_without_a_replayer_an_apply_is_answered_with_202_overlaps_and_can_be_cancelled(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    key = site.key(tenant, "read", "replay")
    started = time.monotonic()
    later = site.post(key, "?wait=1", since="-PT24H", mode="apply")
    assert 1 <= time.monotonic() - started < 5
    assert (later.status_code, later.json()["state"]) == (202, "requested")
    where = later.headers["Location"]
    assert where == f"/v1/replays/{later.json()['id']}"
    assert site.get(where, key).json() == later.json()
    other = site.post(key, since="-PT2H", metrics=["requests"], mode="apply")
    assert (other.status_code, other.json()["code"]) == (409, "replay_overlaps")
    assert other.json()["replayId"] == later.json()["id"]
    elsewhere = site.post(
        key, "?wait=0", since="2025-01-01T00:00:00Z", until="2025-01-02T00:00:00Z", mode="apply"
    )
    assert elsewhere.status_code == 202
    waiting: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: waiting.append(site.post(key, since="2025-02-01T00:00:00Z",
                                                until="2025-02-02T00:00:00Z", mode="apply"))
    )  # fmt: skip
    thread.start()
    until(lambda: len(site.get("/v1/replays", key).json()["replays"]) == 3, "asked for", 10)
    newest = site.get("/v1/replays?limit=1", key).json()["replays"][0]["id"]
    for one in (later.json()["id"], elsewhere.json()["id"], newest):
        assert httpx.post(f"{site.url}/v1/replays/{one}/cancel", headers=key).json() == {"changed": True}
    assert httpx.post(f"{site.url}{where}/cancel", headers=key).json() == {"changed": False}
    thread.join(10)
    assert (waiting[0].status_code, waiting[0].json()["code"]) == (409, "replay_cancelled")
    assert site.get(where, key).json()["state"] == "cancelled"
    assert site.totals(tenant) == {7}


def test_an_apply_that_changes_too_much_or_reads_too_much_wants_force(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    key = site.key(tenant, "replay")
    small = site.pipeline.worker("replayer-small", REPLAYER, REPLAY_RECORDS_MAX="1").start().await_healthy()
    try:
        large = site.post(key, since="-PT24H", mode="apply")
        assert (large.status_code, large.json()["code"], large.json()["path"]) == (
            *(422, "window_too_large"),
            "since",
        )
        forced = site.post(key, since="-PT24H", mode="apply", force=True)
        assert forced.json()["state"] == "done"
    finally:
        assert small.stop() == 0


def test_everything_is_shown_of_a_replay_by_arrival_which_has_no_bounds_of_its_own(site: Site) -> None:
    tenant = site.tenant()
    site.used(tenant)
    key = site.key(tenant, "read", "replay")
    with site.replaying():
        done = site.post(key, since="-PT1H", by="arrival", mode="apply").json()
    assert (done["state"], done["since"], done["until"]) == ("done", None, None)
    assert done["result"]["changedHours"] == 8
    [listed] = site.get("/v1/replays", key).json()["replays"]
    assert (listed["id"], listed["result"]) == (done["id"], None)


# Whatever is asked --------------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*("tenantId", "metrics", "customerRef", "since", "until", "period", "by", "offsets", "planHash"), "x"]
)
TIMES = st.sampled_from(
    ["now", "-PT24H", "P1D", "99999d", "-P9999999D", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z",
     "1969-12-31T23:00:00+01:00", "2026-02-30T00:00:00Z", "0001-01-01T00:00:00+23:59", "now\n", "∞"]
)  # fmt: skip
OFFSETS = st.lists(
    st.fixed_dictionaries(
        {
            "topic": st.sampled_from(["usage.v1", "usage.v3", "x"]),
            "partition": st.integers(-1, 5) | st.just(2**31 - 1),
            "start": st.integers(0, 9) | st.just(2**62),
            "end": st.integers(0, 9) | st.just(2**62),
        }
    ),
    max_size=2,
)
MEANT = st.fixed_dictionaries(
    {"mode": st.just("apply")},
    optional={
        "since": TIMES,
        "until": TIMES,
        "period": TIMES,
        "by": st.sampled_from(["event", "arrival", "offsets"]),
        "offsets": OFFSETS,
        "customerRef": TEXT,
        "metrics": st.lists(st.sampled_from(["requests", "nothing"]), max_size=2),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=MEANT | st.dictionaries(FIELDS, JSON, max_size=4).map(lambda one: {**one, "mode": "apply"}) | JSON
)
def test_no_request_breaks_the_api_and_what_is_accepted_can_be_shown(site: Site, body: Any) -> None:
    tenant = site.tenant()
    key = site.key(tenant, "read", "replay")
    if not isinstance(body, dict):
        body = [body]  # without a mode it would be a dry run, in a process
    answer = httpx.post(
        f"{site.url}/v1/replay?wait=0",
        headers=key,
        content=json.dumps(body).encode(),
        timeout=30,
        verify=PLAIN,
    )
    assert answer.status_code in (202, 400, 404), answer.text
    listed = site.get("/v1/replays", key)
    assert listed.status_code == 200
    site.pipeline.query(
        "UPDATE replays SET state = 'cancelled', finished_at = now() WHERE finished_at IS NULL RETURNING 1"
    )


@pytest.mark.parametrize(
    "body",
    [
        {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z"},
        {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z", "by": "arrival"},
        {"since": "99999d", "until": "now", "by": "arrival"},
        {"period": "0001-01-01T00:00:00Z"},
        {"offsets": [{"topic": "usage.v3", "partition": 0, "start": 2**62, "end": 2**62}]},
        {"customerRef": "nobody", "since": "now", "until": "now"},
    ],
)
def test_a_window_at_the_edge_of_time_has_a_plan(site: Site, body: dict[str, Any]) -> None:
    answer = site.post(site.key(site.tenant(), "replay"), **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["changedHours"] == 0


def test_the_document_names_every_answer_and_shows_examples() -> None:
    paths = openapi_document(ROUTES)["paths"]
    asking = paths["/v1/replay"]["post"]
    assert set(asking["responses"]) == {
        *("200", "202", "400", "401", "403", "404", "409", "410", "413", "422", "429", "500", "503", "504")
    }
    body = asking["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == set(ReplayRequest.__struct_encode_fields__)
    for example in body["examples"].values():
        msgspec.convert(example["value"], ReplayRequest)
    msgspec.convert(
        asking["responses"]["200"]["content"]["application/json"]["examples"]["plan"]["value"], Plan
    )
    assert set(paths["/v1/replays"]["get"]["responses"]) == {"200", "400", "401", "403", "500", "503"}
    for path, verb in (("", "get"), ("/cancel", "post")):
        found = paths[f"/v1/replays/{{replay_id}}{path}"][verb]
        assert set(found["responses"]) == {"200", "400", "401", "403", "404", "500", "503"}


def test_a_window_that_is_held_no_more_is_gone_and_the_earliest_time_is_named(site: Site) -> None:
    """The last one: it takes the log away."""
    tenant = site.tenant()
    site.used(tenant)
    _, ends = site.pipeline.log_bounds()
    admin = AdminClient({"bootstrap.servers": site.pipeline.kafka})
    for future in admin.delete_records([TopicPartition(*tp, end) for tp, end in ends.items()]).values():
        future.result()
    key = site.key(tenant, "replay")
    answer = site.post(key, since="-PT24H")
    assert (answer.status_code, answer.json()["code"], answer.json()["path"]) == (
        *(410, "window_not_held"),
        "since",
    )
    named = answer.json()["message"].rpartition(" ")[2]
    assert datetime.fromisoformat(named) > datetime.fromtimestamp(NOW_S).astimezone() - timedelta(hours=20)
    with site.replaying():
        answer = site.post(key, since="-PT24H", mode="apply")
    assert (answer.status_code, answer.json()["code"], answer.json()["path"]) == (
        *(410, "window_not_held"),
        "since",
    )
