"""Reconciliation by HTTP and by command, and the process that carries it out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from services.console.reconciliation_routes import ROUTES
from services.reconciler.agent import Reconciler
from services.wire.settings import Settings, load_settings
from services.wire.stripe_reader import StripeReader
from tests.integration.console import console, key_header
from tests.integration.pushing import KEY, ROOT
from tests.integration.reconciling import Scene, hours_ago, open_scene
from tests.pipeline import until

Headers = dict[str, str]


@pytest.fixture
def scene(postgres_dsn: str) -> Iterator[Scene]:
    with open_scene(postgres_dsn) as scene:
        scene.use("a", hours_ago(2), 5)
        scene.bill()
        yield scene


@pytest.fixture
def api(scene: Scene) -> Iterator[TestClient[Litestar]]:
    with console(scene.dsn, scene.dsn) as client:
        yield client


def settings_of(scene: Scene) -> Settings:
    return load_settings(
        postgres_dsn=scene.dsn,
        stripe_api_key=KEY,
        stripe_api_base=scene.world.stripe.url,
        reconcile_interval_seconds=3600,
    )


@contextmanager
def reconciler_at_work(scene: Scene) -> Iterator[None]:
    """One that looks for work in a thread of this process."""
    import asyncio

    stop = threading.Event()

    async def go() -> None:
        settings = settings_of(scene)
        stripe = StripeReader.from_settings(settings)
        reconciler = Reconciler(settings, stripe)
        while not stop.is_set():
            await reconciler.step()
            await asyncio.sleep(0.05)
        await stripe.close()
        reconciler._deciding.reset()
        reconciler._database.reset()

    thread = threading.Thread(target=lambda: asyncio.run(go()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_run_is_waited_for_and_its_summary_is_there_afterwards(
    scene: Scene, api: TestClient[Litestar]
) -> None:
    key = key_header(scene.books.db, "acme", "replay", "read")
    before = api.get("/v1/reconciliation/summary?tenantId=acme&metric=requests", headers=key).json()
    assert (before["state"], before["reason"], before["diffAbs"]) == ("unknown", "not_reconciled", None)
    with reconciler_at_work(scene):
        answer = api.post("/v1/reconciliation/run", json={"tenantId": "acme"}, headers=key)
    assert answer.status_code == 200, answer.text
    run = answer.json()
    assert (run["state"], run["result"], run["items"]) == (
        "done", "ok", {"ok": 1, "adjust": 0, "drift": 0, "unknown": 0},
    )  # fmt: skip
    assert api.get(f"/v1/reconciliation/runs/{run['id']}", headers=key).json() == run
    summary = api.get("/v1/reconciliation/summary?tenantId=acme&metric=requests", headers=key).json()
    assert (summary["state"], summary["local"], summary["stripe"], summary["diffPct"]) == (
        "ok",
        "5",
        "5",
        "0",
    )
    [period] = summary["periods"]
    assert (period["customerRef"], period["eventName"], period["findings"]) == ("cus_1", "requests", [])
    assert ("reconciliation.run",) in scene.sql("SELECT action FROM audit_log")


def test_without_a_reconciler_a_run_is_accepted_once_and_waits(
    scene: Scene, api: TestClient[Litestar]
) -> None:
    key = key_header(scene.books.db, "acme", "replay", "read")
    answers = [api.post("/v1/reconciliation/run?wait=0", json={}, headers=key) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    place = answers[0].headers["Location"]
    assert api.get(place, headers=key).json()["state"] == "requested"
    with reconciler_at_work(scene):
        until(lambda: api.get(place, headers=key).json()["state"] == "done", "the run is done", 30)


def test_a_drift_comes_with_a_body_that_the_replay_takes(scene: Scene, api: TestClient[Litestar]) -> None:
    key = key_header(scene.books.db, "acme", "replay", "read", "adjust")
    scene.damage("UPDATE buckets SET total = total + 1")
    scene.reconcile()
    [period] = api.get("/v1/reconciliation/summary", headers=key).json()["periods"]
    assert (period["state"], period["diffAbs"], period["diffPct"]) == ("drift", "1", "0.2")
    body = period["replay"]["request"]
    assert {**body, "mode": "apply"}.keys() == {
        "tenantId", "metrics", "customerRef", "since", "until", "mode"
    }  # fmt: skip
    words = period["replay"]["command"].split()
    assert words[:2] == ["tidemeter", "replay"] and words[words.index("--since") + 1] == body["since"]
    suggestion = period["suggestion"]["id"]
    path = f"/v1/reconciliation/suggestions/{suggestion}/dismiss"
    assert api.post(path, json={"note": "known"}, headers=key).json() == {"changed": True}
    assert api.post(path, json={"note": "known"}, headers=key).json() == {"changed": False}
    [period] = api.get("/v1/reconciliation/summary", headers=key).json()["periods"]
    assert period["suggestion"] is None


def test_a_tenants_key_sees_and_asks_for_its_own_only(scene: Scene, api: TestClient[Litestar]) -> None:
    scene.sql("INSERT INTO tenants (tenant_id) VALUES ('other')")
    scene.reconcile()
    scene.damage("UPDATE buckets SET total = total + 1")
    scene.reconcile()
    mine = key_header(scene.books.db, "acme", "replay", "read", "adjust")
    other = key_header(scene.books.db, "other", "replay", "read", "adjust")
    assert api.get("/v1/reconciliation/summary", headers=other).json()["periods"] == []
    refused = api.get("/v1/reconciliation/summary?tenantId=acme", headers=other)
    assert (refused.status_code, refused.json()["code"]) == (404, "tenant_unknown")
    run = api.post("/v1/reconciliation/run?wait=0", json={}, headers=mine).json()
    assert run["tenantId"] == "acme"
    assert api.get(f"/v1/reconciliation/runs/{run['id']}", headers=other).status_code == 404
    assert api.post("/v1/reconciliation/run", json={"tenantId": "acme"}, headers=other).status_code == 404
    [period] = api.get("/v1/reconciliation/summary", headers=mine).json()["periods"]
    path = f"/v1/reconciliation/suggestions/{period['suggestion']['id']}/dismiss"
    assert api.post(path, json={"note": "mine?"}, headers=other).status_code == 404


def test_each_act_needs_its_scope(scene: Scene, api: TestClient[Litestar]) -> None:
    reader = key_header(scene.books.db, "acme", "read")
    sender = key_header(scene.books.db, "acme", "ingest")
    assert api.get("/v1/reconciliation/summary", headers=sender).status_code == 403
    assert api.post("/v1/reconciliation/run", json={}, headers=reader).status_code == 403
    dismissal = api.post("/v1/reconciliation/suggestions/1/dismiss", json={"note": "x"}, headers=reader)
    assert dismissal.status_code == 403
    assert api.get("/v1/reconciliation/summary").status_code == 401
    assert len(ROUTES) == 4


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("metric=nothing", 404, "meter_unknown"),
        ("period=yesterday", 400, "time_invalid"),
        ("metrics=requests", 400, "parameter_unknown"),
        ("state=bad", 400, None),
        ("limit=0", 400, None),
    ],
)
def test_a_question_that_means_nothing_is_refused_with_its_reason(
    scene: Scene, api: TestClient[Litestar], query: str, status: int, code: str | None
) -> None:
    key = key_header(scene.books.db, "acme", "read")
    answer = api.get(f"/v1/reconciliation/summary?{query}", headers=key)
    assert answer.status_code == status, answer.text
    assert code is None or answer.json()["code"] == code
    operators = key_header(scene.books.db, None, "read")
    needs = api.get("/v1/reconciliation/summary?metric=requests", headers=operators)
    assert (needs.status_code, needs.json()["code"]) == (400, "tenant_missing")


# The command --------------------------------------------------------------------------------------------


def environment(scene: Scene, **more: str) -> dict[str, str]:
    named = {
        "POSTGRES_DSN": scene.dsn, "STRIPE_API_KEY": KEY, "STRIPE_API_BASE": scene.world.stripe.url,
        "KAFKA_BOOTSTRAP": "127.0.0.1:1", "RECONCILE_PATIENCE_SECONDS": "0", **more,
    }  # fmt: skip
    return {**os.environ, **{f"TIDEMETER_{name}": text for name, text in named.items()}}


def tidemeter(scene: Scene, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *words],
        env=environment(scene, **more), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_exit_status_says_what_was_found(scene: Scene) -> None:
    well = tidemeter(scene, "reconcile", "--json")
    assert well.returncode == 0, well.stderr
    assert json.loads(well.stdout)["state"] == "ok"
    scene.damage("UPDATE buckets SET total = total + 1")
    drifted = tidemeter(scene, "reconcile", "--tenant", "acme", "--meter", "requests")
    assert drifted.returncode == 1, drifted.stderr
    assert "tidemeter replay --tenant acme --meter requests --customer cus_1 --since" in drifted.stdout
    assert "counter differs 1" in drifted.stdout
    unknown = tidemeter(scene, "reconcile", STRIPE_API_BASE="http://127.0.0.1:1")
    assert unknown.returncode == 3, unknown.stderr
    assert "unknown: no_answer" in unknown.stdout
    assert tidemeter(scene, "reconciliation", "show").returncode == 3
    assert tidemeter(scene, "reconcile", "--meter", "requests").returncode == 2
    nothing = tidemeter(scene, "reconcile", "--tenant", "acme", "--customer", "nobody")
    assert nothing.returncode == 3
    runs = scene.sql("SELECT state, ok, drift, unknown FROM reconciliation_runs ORDER BY run_id")
    assert runs == [("done", 1, 0, 0), ("done", 0, 1, 0), ("done", 0, 0, 1), ("done", 0, 0, 0)]


def test_what_stripe_lost_is_failed_once_and_sent_again_under_another_identifier(scene: Scene) -> None:
    [[lost]] = scene.sql("SELECT identifier FROM meter_events")
    early = tidemeter(scene, "reconciliation", "confirm-missing", lost)
    assert early.returncode == 1 and "does not clearly lack" in early.stderr
    scene.world._client().v1.billing.meter_event_adjustments.create(
        {"event_name": "requests", "type": "cancel", "cancel": {"identifier": lost}}
    )
    scene.world.advance(timedelta(minutes=1))
    done = tidemeter(scene, "reconciliation", "confirm-missing", lost)
    assert done.returncode == 0, done.stderr
    assert scene.sql("SELECT state, error_code FROM meter_events") == [("failed", "not_at_stripe")]
    [told] = scene.books.ops("meter_reporting_failed")
    assert (told["source"], told["subject_id"]) == ("reconciler", lost)
    assert [one.cause for one in scene.found().findings] == ["push_failed"]
    assert tidemeter(scene, "meter-events", "retry", lost).returncode == 0
    scene.bill()
    assert scene.found().state == "ok"
    assert scene.world.billed() == 5
    assert tidemeter(scene, "reconciliation", "confirm-missing", lost).returncode == 1


# The process --------------------------------------------------------------------------------------------


class Process:
    """``tidemeter reconciler``, killed by its pid whatever happens."""

    def __init__(self, scene: Scene, log: Path, **more: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        variables = environment(scene, OBSERVE_PORT=str(self.port), RECONCILE_INTERVAL_SECONDS="1", **more)
        with log.open("ab") as stream:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", "reconciler"],
                env=variables, cwd=ROOT, stdout=stream, stderr=stream,
            )  # fmt: skip

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=3) as answer:
            return answer.read().decode()

    def series(self, start: str) -> dict[str, str]:
        try:
            lines = self.get("/metrics").splitlines()
        except OSError:
            return {}
        return dict(line.rsplit(" ", 1) for line in lines if line.startswith(start))

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self.child.poll() is None:
            self.child.send_signal(number)
        return self.child.wait(30)


def test_the_process_compares_by_itself_shows_it_and_is_taken_over_when_killed(
    scene: Scene, tmp_path: Path
) -> None:
    first, second = (Process(scene, tmp_path / f"{name}.log") for name in ("first", "second"))
    try:
        until(lambda: any(one.series("reconciliation_diff_pct{") for one in (first, second)), "a gauge", 60)
        until(
            lambda: all(one.series("reconciliation_diff_abs{") for one in (first, second)),
            "both show what one of them found", 30,
        )  # fmt: skip
        [(label, value)] = first.series("reconciliation_diff_abs{").items()
        assert value == "0.0" and 'meter="requests"' in label and "cus_1" not in label
        assert json.loads(first.get("/health/ready"))["status"] == "healthy"
        first.end()
        before = scene.sql("SELECT count(*) FROM reconciliation_runs WHERE state = 'done'")[0][0]
        done = "SELECT count(*) FROM reconciliation_runs WHERE state = 'done'"
        until(lambda: scene.sql(done)[0][0] > before + 1, "the second goes on", 30)
        scene.damage("UPDATE buckets SET total = total + 1")
        until(lambda: list(second.series("reconciliation_diff_abs{").values()) == ["1.0"], "the drift", 30)
        assert float(second.series('tidemeter_reconciliation_items{state="drift"}').popitem()[1]) == 1
        assert float(second.series('recon_runs_total{result="done",scope="all"}').popitem()[1]) >= 1
        assert second.end(signal.SIGTERM) == 0
        assert KEY not in second.log.read_text()
    finally:
        first.end()
        second.end()


def test_a_run_that_a_killed_process_had_begun_is_carried_out_by_the_next(
    scene: Scene, tmp_path: Path
) -> None:
    scene.sql(
        "INSERT INTO reconciliation_runs (requested_by, state, started_at) VALUES ('key:x', 'running', now())"
    )
    process = Process(scene, tmp_path / "log")
    try:
        run = "SELECT state, ok FROM reconciliation_runs WHERE requested_by = 'key:x'"
        until(lambda: scene.sql(run) == [("done", 1)], "it is carried out", 60)
    finally:
        process.end()


def test_when_stripe_is_away_the_process_says_so_and_goes_on(scene: Scene, tmp_path: Path) -> None:
    process = Process(scene, tmp_path / "log", STRIPE_API_BASE="http://127.0.0.1:1")
    try:
        until(lambda: list(process.series("reconciliation_diff_pct{").values()) == ["NaN"], "NaN", 60)
        report: dict[str, Any] = json.loads(process.get("/health/ready"))
        assert report["status"] == "degraded"
        assert "gave no answer about 1" in report["checks"]["reconciler"]["reason"]
        assert process.child.poll() is None
    finally:
        process.end()
