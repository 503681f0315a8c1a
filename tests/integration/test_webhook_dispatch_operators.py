"""What operators see and do: list, show, replay, prune, by command and by HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from litestar import Litestar
from litestar.testing import TestClient
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from services.cli.main import app as command
from services.console.routes import ROUTES
from services.console.webhook_runs import Retention, prune
from services.ingest.app import create_app
from services.web.keys import KeyStore, PostgresKeyRows
from services.wire.settings import Settings
from services.wire.topics import DEAD_LETTERS
from tests.integration.console import NoKafka
from tests.integration.dispatching import Desk, planted, snapshot
from tests.integration.ingest_serving import new_key

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def desk(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", postgres_dsn)
    monkeypatch.setenv("COLUMNS", "400")
    yield Desk(postgres_dsn)


@pytest.fixture
def client(postgres_dsn: str) -> Iterator[TestClient[Litestar]]:
    app = create_app(
        Settings.model_construct(postgres_dsn=SecretStr(postgres_dsn)),
        producer=NoKafka(),
        keys=KeyStore(PostgresKeyRows(postgres_dsn)),
        routes=ROUTES,
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def tidemeter(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(command, ["webhooks", *arguments], input=typed)


def said(*arguments: str) -> Any:
    result = tidemeter(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def header(desk: Desk, tenant: str | None, *scopes: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {new_key(desk.dsn, tenant, *scopes).text}"}


def put(desk: Desk, number: int, state: str = "dead", *, days: float = 0, first: int = 0, **row: Any) -> None:
    """``number`` events whose run of ours is in ``state``, settled so many days before NOW."""
    settled = None if state in ("received", "processing", "failed") else NOW - days * DAY
    with psycopg.connect(desk.dsn) as db, db.cursor() as cursor:
        ids = [f"evt_{first + n:05d}" for n in range(number)]
        cursor.executemany(
            "INSERT INTO webhook_events VALUES (%s, 'main', '', %s, 'obj', false, false, %s, %s, 1, "
            "'{\"secret\": 1}', 't', 0, 0)",
            [
                (one, row.get("type", "invoice.paid"), NOW + timedelta(seconds=n), NOW)
                for n, one in enumerate(ids)
            ],
        )
        cursor.executemany(
            "INSERT INTO webhook_runs VALUES (%s, %s, %s, %s, %s, 25, %s, 'ValueError', NULL, 0, %s)",
            [
                (
                    *(one, row.get("handler", "tidemeter"), row.get("subject", one)),
                    *(NOW + timedelta(seconds=n), state, NOW, settled),
                )
                for n, one in enumerate(ids)
            ],
        )


def also(desk: Desk, event_id: str, handler: str, state: str, days: float) -> None:
    """Another handler's run of the same event."""
    desk.query(
        "INSERT INTO webhook_runs VALUES (%s, %s, %s, %s, %s, 1, %s, NULL, NULL, 0, %s)",
        *(event_id, handler, event_id, NOW, state, NOW, NOW - days * DAY),
    )


def acts(desk: Desk) -> list[tuple[str, dict[str, str]]]:
    return [(one["name"], one["attributes"]) for one in desk.outbox()]


# -- Looking -----------------------------------------------------------------------------------------------


def test_what_needs_a_person_is_listed_unless_another_state_is_asked_for(desk: Desk) -> None:
    put(desk, 2, "dead")
    put(desk, 1, "failed", first=10)
    put(desk, 3, "succeeded", first=20, type="charge.failed")
    assert [one["event_id"] for one in said("list")] == ["evt_00001", "evt_00010", "evt_00000"]
    assert len(said("list", "--state", "all")) == 6
    assert len(said("list", "--state", "succeeded", "--type", "charge.*")) == 3
    assert said("list", "--state", "all", "--type", "charge") == []
    assert said("list", "--state", "all", "--type", "%") == []
    assert len(said("list", "--state", "all", "--limit", "2")) == 2
    assert "more than 2" in tidemeter("list", "--state", "all", "--limit", "2").stderr
    assert said("list", "--endpoint", "other") == []
    assert len(said("list", "--since", "2026-11-22T12:00:01Z")) == 1
    assert len(said("list", "--until", "2026-11-22T12:00:01+00:00")) == 2
    assert tidemeter("list", "--since", "yesterday").exit_code == 2
    assert tidemeter("list", "--since", "2026-11-22T12:00:01").exit_code == 2
    assert tidemeter("list", "--since", "-PT24H").exit_code == 0
    assert "secret" not in tidemeter("list").output


def test_an_event_is_shown_with_its_runs_and_its_body_only_on_request(desk: Desk) -> None:
    put(desk, 1)
    also(desk, "evt_00000", "mine", "succeeded", 0)
    shown = said("show", "evt_00000")
    assert [(one["handler"], one["state"]) for one in shown["runs"]] == [
        ("tidemeter", "dead"),
        ("mine", "succeeded"),
    ]
    assert "body" not in shown
    assert "secret" not in tidemeter("show", "evt_00000").output
    assert said("show", "evt_00000", "--body")["body"] == '{"secret": 1}'
    missing = tidemeter("show", "evt_none")
    assert (missing.exit_code, "not_found" in missing.stderr) == (2, True)


# -- Replay ------------------------------------------------------------------------------------------------


def test_a_replayed_event_is_handled_anew_with_all_its_attempts(desk: Desk) -> None:
    failing = [True]

    def fetch(*_: Any) -> None:
        if failing[0]:
            raise ValueError

    handler = planted(fetch=fetch)
    desk.deliver(snapshot("evt_1"), snapshot("evt_2", object_id="obj_2"))
    with desk.dispatching(handler):
        desk.until_settled()
        assert said("replay", "--id", "evt_1") == {"requeued": 1, "skipped": 0, "dry_run": False}
        desk.until_settled()
        assert desk.run("evt_1")[:2] == ("dead", 3)
        assert len(desk.outbox(DEAD_LETTERS)) == 3
        told = [one["ops_event_id"] for one in desk.outbox() if one["name"] == "webhook_dlq.dead_lettered"]
        assert len(set(told)) == 3, "it died again, which is another transition"
        failing[0] = False
        assert said("replay", "--all-dead")["requeued"] == 2
        desk.until_settled()
    assert set(desk.states().values()) == {"succeeded"}
    assert desk.query("SELECT event_id, replays FROM webhook_runs ORDER BY 1") == [("evt_1", 2), ("evt_2", 1)]
    assert sorted(desk.effects()) == ["evt_1", "evt_2"]


def test_a_dry_run_counts_what_the_real_one_then_does_and_changes_nothing(desk: Desk) -> None:
    put(desk, 250)
    put(desk, 5, "failed", first=1000)
    put(desk, 7, "dead", first=2000, type="charge.failed")
    before = desk.query("SELECT * FROM webhook_runs ORDER BY 1")
    dry = said("replay", "--type", "invoice.*", "--dry-run")
    assert desk.query("SELECT * FROM webhook_runs ORDER BY 1") == before
    assert acts(desk) == []
    real = said("replay", "--type", "invoice.*", "--yes")
    assert (dry["requeued"], real["requeued"]) == (250, 250)
    assert acts(desk) == [("webhook_dlq.replay", {"requeued": "250", "skipped": "0"})]
    [(actor, details)] = desk.query("SELECT actor, details FROM audit_log")
    assert actor.startswith("cli:")
    assert details["requeued"] == "250"
    batches = desk.query(
        "SELECT count(*) FROM webhook_runs WHERE state = 'received' AND attempts = 0 AND replays = 1 "
        "GROUP BY next_attempt_at ORDER BY next_attempt_at"
    )
    assert batches == [(100,), (100,), (50,)]
    [(seconds,)] = desk.query(
        "SELECT extract(epoch FROM max(next_attempt_at) - min(next_attempt_at)) FROM webhook_runs "
        "WHERE state = 'received'"
    )
    assert seconds == 2
    first = desk.query(
        "SELECT event_id FROM webhook_runs WHERE state = 'received' ORDER BY next_attempt_at, 1"
    )
    assert [row[0] for row in first] == [f"evt_{n:05d}" for n in range(250)]


def test_more_than_ten_are_replayed_only_once_a_person_confirms(desk: Desk) -> None:
    put(desk, 11)
    assert tidemeter("replay", "--all-dead", typed="n\n").exit_code == 1
    assert set(desk.states().values()) == {"dead"}
    assert tidemeter("replay", "--all-dead", typed="y\n").exit_code == 0
    assert set(desk.states().values()) == {"received"}


def test_too_many_need_force(desk: Desk) -> None:
    put(desk, 10_001)
    refused = tidemeter("replay", "--all-dead", "--yes")
    assert (refused.exit_code, "replay_too_large" in refused.stderr) == (2, True)
    assert set(desk.states().values()) == {"dead"}
    assert said("replay", "--all-dead", "--yes", "--force")["requeued"] == 10_001


def test_what_cannot_be_replayed_is_refused_by_name(desk: Desk) -> None:
    put(desk, 1, "dead")
    put(desk, 1, "failed", first=1)
    put(desk, 1, "succeeded", first=2)
    for arguments, code in (
        (("--id", "evt_none"), "not_found"),
        (("--id", "evt_00000", "--id", "evt_none"), "not_found"),
        (("--id", "evt_00002"), "not_dead_lettered"),
        (("--id", "evt_00000", "--handler", "mine"), "not_dead_lettered"),
        ((), "say which"),
    ):
        refused = tidemeter("replay", *arguments)
        assert (refused.exit_code, code in refused.stderr) == (2, True), refused.output
    assert acts(desk) == []
    both = said("replay", "--id", "evt_00000", "--id", "evt_00001", "--id", "evt_00002")
    assert both == {"requeued": 2, "skipped": 1, "dry_run": False}
    assert desk.states() == {"evt_00000": "received", "evt_00001": "received", "evt_00002": "succeeded"}


def test_a_replay_may_be_of_one_handler(desk: Desk) -> None:
    put(desk, 1)
    also(desk, "evt_00000", "mine", "dead", 0)
    assert said("replay", "--all-dead", "--handler", "mine")["requeued"] == 1
    assert (desk.run("evt_00000")[0], desk.run("evt_00000", "mine")[0]) == ("dead", "received")


# -- Prune -------------------------------------------------------------------------------------------------


def kept(desk: Desk) -> list[str]:
    return [row[0] for row in desk.query("SELECT event_id FROM webhook_events ORDER BY 1")]


def pruned(desk: Desk, succeeded: int = 14, dead: int = 90, **more: Any) -> tuple[int, int, int]:
    with psycopg.connect(desk.dsn, autocommit=True) as db:
        done = prune(db, Retention(succeeded, dead), now=NOW, actor="test", **more)
    return done.events, done.runs, done.subjects


def test_pruning_keeps_what_retention_says(desk: Desk) -> None:
    put(desk, 1, "succeeded", days=14.1, first=0)
    put(desk, 1, "stale", days=15, first=1)
    put(desk, 1, "succeeded", days=13.9, first=2)
    put(desk, 1, "dead", days=89, first=3)
    put(desk, 1, "dead", days=91, first=4)
    put(desk, 1, "failed", first=5)
    put(desk, 1, "received", first=6)
    put(desk, 1, "succeeded", days=30, first=7)
    also(desk, "evt_00007", "mine", "dead", 30)
    put(desk, 1, "succeeded", days=30, first=8)
    also(desk, "evt_00008", "mine", "succeeded", 15)
    assert pruned(desk, dry_run=True) == (4, 5, 0)
    assert len(kept(desk)) == 9
    assert pruned(desk) == (4, 5, 0)
    assert kept(desk) == [f"evt_{n:05d}" for n in (2, 3, 5, 6, 7)]
    assert acts(desk) == [("webhook_dlq.prune", {"events": "4", "runs": "5", "subjects": "0"})]
    assert pruned(desk) == (0, 0, 0)
    assert len(acts(desk)) == 1, "nothing was deleted, so nothing is told"


@pytest.mark.parametrize(("succeeded", "dead", "left"), [(-1, 90, 2), (14, -1, 2), (-1, -1, 4), (0, 0, 0)])
def test_minus_one_keeps_for_ever(desk: Desk, succeeded: int, dead: int, left: int) -> None:
    put(desk, 2, "succeeded", days=1000)
    put(desk, 2, "dead", days=1000, first=10)
    would = pruned(desk, succeeded, dead, dry_run=True)
    assert pruned(desk, succeeded, dead) == would
    assert len(kept(desk)) == left


def test_many_are_pruned_in_batches(desk: Desk) -> None:
    put(desk, 2500, "succeeded", days=20)
    assert pruned(desk) == (2500, 2500, 0)
    assert kept(desk) == []
    assert len(acts(desk)) == 1


def test_the_order_of_an_object_is_remembered_while_something_older_may_come(desk: Desk) -> None:
    put(desk, 1, "dead", days=20, first=1, subject="of dead")
    put(desk, 1, "failed", first=2, subject="of failed")
    put(desk, 1, "succeeded", days=1, first=3, subject="young")
    for subject, days in (("of dead", 20), ("of failed", 20), ("young", 1), ("old", 20), ("older", 21)):
        desk.query("INSERT INTO webhook_subjects VALUES ('tidemeter', %s, %s)", subject, NOW - days * DAY)
    assert pruned(desk, dry_run=True) == pruned(desk) == (0, 0, 2)
    left = [row[0] for row in desk.query("SELECT subject FROM webhook_subjects ORDER BY 1")]
    assert left == ["of dead", "of failed", "young"]


def test_pruning_by_command_goes_by_the_settings(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    put(desk, 3, "succeeded", days=20)
    monkeypatch.setenv("TIDEMETER_WEBHOOK_SUCCEEDED_DAYS", "-1")
    assert said("prune")["events"] == 0
    monkeypatch.setenv("TIDEMETER_WEBHOOK_SUCCEEDED_DAYS", "0")
    assert said("prune", "--dry-run")["events"] == 3
    assert said("prune") == {"events": 3, "runs": 3, "subjects": 0, "dry_run": False}
    assert [row[0][:4] for row in desk.query("SELECT actor FROM audit_log")] == ["cli:"]


# -- HTTP --------------------------------------------------------------------------------------------------


def test_only_keys_without_a_tenant_see_and_do_anything(desk: Desk, client: TestClient[Litestar]) -> None:
    desk.query("INSERT INTO tenants (tenant_id) VALUES ('acme')")
    put(desk, 1)
    requests = [
        ("GET", "/v1/webhooks", "read", None),
        ("GET", "/v1/webhooks/evt_00000", "read", None),
        ("POST", "/v1/webhooks/replay", "replay", {"allDead": True}),
        ("POST", "/v1/webhooks/prune", "replay", {"dryRun": True}),
    ]
    tenant, nobody = header(desk, "acme", "admin"), header(desk, None, "ingest")
    for method, path, scope, body in requests:
        assert client.request(method, path, json=body).status_code == 401
        for headers, code in ((tenant, "operators_only"), (nobody, "scope_missing")):
            answer = client.request(method, path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, code), path
        answer = client.request(method, path, json=body, headers=header(desk, None, scope))
        assert answer.status_code == 200, answer.text
        assert "secret" not in answer.text


def test_runs_are_listed_by_pages(desk: Desk, client: TestClient[Litestar]) -> None:
    put(desk, 25)
    also(desk, "evt_00003", "mine", "dead", 0)
    key = header(desk, None, "read")
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = client.get("/v1/webhooks", params={"limit": "10", **after}, headers=key).json()
        seen += [f"{one['eventId']} {one['handler']}" for one in page["runs"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert len(seen) == len(set(seen)) == 26
    one = client.get("/v1/webhooks", params={"type": "invoice.*", "limit": "1"}, headers=key).json()["runs"][
        0
    ]
    assert (one["state"], one["attempts"], one["errorClass"], one["nextAttemptAt"]) == (
        "dead",
        25,
        "ValueError",
        None,
    )
    for bad in ({"colour": "red"}, {"limit": "0"}, {"state": "odd"}, {"since": "2026-11-22T00:00:00"}):
        assert client.get("/v1/webhooks", params=bad, headers=key).status_code == 400
    assert client.get("/v1/webhooks", params={"since": "2026-11-22T12:00:20Z"}, headers=key).json()["runs"]


def test_an_event_is_shown_without_its_body(desk: Desk, client: TestClient[Litestar]) -> None:
    put(desk, 1)
    key = header(desk, None, "read")
    shown = client.get("/v1/webhooks/evt_00000", headers=key).json()
    assert (shown["eventId"], shown["bodyBytes"], len(shown["runs"])) == ("evt_00000", 13, 1)
    for missing in ("evt_none", "e" * 400, "a%00b"):
        assert client.get(f"/v1/webhooks/{missing}", headers=key).status_code == 404


def test_dead_runs_are_replayed_by_http(desk: Desk, client: TestClient[Litestar]) -> None:
    put(desk, 30)
    put(desk, 1, "succeeded", first=100)
    key = header(desk, None, "replay")

    def ask(body: Any) -> tuple[int, Any]:
        answer = client.post("/v1/webhooks/replay", json=body, headers=key)
        return answer.status_code, answer.json()

    assert ask({"allDead": True, "dryRun": True}) == (200, {"requeued": 30, "skipped": 0, "dryRun": True})
    assert ask({"ids": ["evt_00001", "evt_00100"]}) == (200, {"requeued": 1, "skipped": 1, "dryRun": False})
    assert ask({"allDead": True}) == (200, {"requeued": 29, "skipped": 0, "dryRun": False})
    for body, status, code in (
        ({"ids": ["evt_none"]}, 404, "not_found"),
        ({"ids": ["evt_00100"]}, 409, "not_dead_lettered"),
        ({}, 400, "body_invalid"),
        ({"ids": []}, 400, "parameter_invalid"),
        ({"allDead": True, "colour": "red"}, 400, "parameter_invalid"),
        ({"ids": ["a\x00"]}, 400, "body_invalid"),
        ({"since": "2026-11-22T00:00:00"}, 400, "parameter_invalid"),
    ):
        answered = ask(body)
        assert (answered[0], answered[1]["code"]) == (status, code), body
    assert client.post("/v1/webhooks/replay", content=b"{", headers=key).status_code == 400
    actors = {row[0] for row in desk.query("SELECT actor FROM audit_log")}
    assert len(actors) == 1
    assert actors.pop().startswith("key:")
    assert len(acts(desk)) == 2


def test_old_webhooks_are_pruned_by_http(desk: Desk, client: TestClient[Litestar]) -> None:
    put(desk, 3, "succeeded", days=100)
    key = header(desk, None, "admin")
    for dry, left in ((True, 3), (False, 0)):
        answer = client.post("/v1/webhooks/prune", json={"dryRun": dry}, headers=key)
        assert answer.json() == {"events": 3, "runs": 3, "subjects": 0, "dryRun": dry}
        assert len(kept(desk)) == left


def test_nothing_is_forgotten_while_stripe_may_deliver_it_again(desk: Desk) -> None:
    put(desk, 1, "succeeded", days=3.9, first=0)
    put(desk, 1, "succeeded", days=4.1, first=1)
    assert pruned(desk, 0, 0, dry_run=True) == pruned(desk, 0, 0) == (1, 1, 0)
    assert kept(desk) == ["evt_00000"]
