"""Parked records by HTTP and by command: who sees and decides them, and what a wrong question gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient
from typer.testing import CliRunner, Result

from services.cli.common import ATTENTION, MISUSED
from services.cli.main import app as command
from services.counters.ledger import GROUP
from services.streaming.parking import ParkedRow, park
from services.streaming.redriving import ParkedRecord, Redrives, Settled, StillParked, Verdict
from tests.integration.console import console, key_header
from tests.records import encoded, v3

Connection = psycopg.Connection[Any]
ARRIVED = datetime(2026, 11, 1, 12, tzinfo=UTC)
SECRET = "a-customer's-own-words"


@pytest.fixture
def db(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", postgres_dsn)
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO tenants (tenant_id) VALUES ('acme'), ('globex')")
        yield connection


@pytest.fixture
def client(postgres_dsn: str) -> Iterator[TestClient[Litestar]]:
    with console(postgres_dsn, postgres_dsn) as client:
        yield client


def add(db: Connection, offset: int, tenant: str = "acme", reason: str = "unknown_meter", **more: Any) -> int:
    """A parked record; its id."""
    fields: dict[str, Any] = {"meter": "pigeons", "event_id": f"k{offset}", **more}
    row = ParkedRow(
        "dead_letter", "usage.v3", 0, offset, ARRIVED, reason, "validate", "",
        encoded(v3(tenant_id=tenant, properties={"note": SECRET})), {}, tenant, **fields,
    )  # fmt: skip
    park(db, GROUP, [row], tried_with="")
    found = db.execute('SELECT parked_id FROM parked_records WHERE "offset" = %s', (offset,)).fetchone()
    assert found is not None
    return int(found[0])


def counting(db: Connection, records: Sequence[ParkedRecord], _: datetime) -> dict[int, Verdict]:
    """Stands in for the counters: what has an even offset can be counted."""
    return {
        one.parked_id: Settled("counted")
        if one.offset % 2 == 0
        else StillParked("dead_letter", "unknown_meter", "validate", "", one.tenant_id, one.meter)
        for one in records
    }


def carry_out(db: Connection) -> None:
    redrives = Redrives(GROUP, counting, tried_with="")
    while db.execute("SELECT 1 FROM redrives WHERE finished_at IS NULL LIMIT 1").fetchone():
        redrives.step(db)


def ids(client: TestClient[Litestar], headers: dict[str, str], query: str = "") -> list[int]:
    answer = client.get(f"/v1/parked{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["records"]]


# HTTP ---------------------------------------------------------------------------------------------------


def test_records_are_listed_by_pages_newest_first_without_their_content(
    client: TestClient[Litestar], db: Connection
) -> None:
    made = [add(db, offset) for offset in range(5)]
    reader = key_header(db, None, "read")
    answer = client.get("/v1/parked?limit=2", headers=reader)
    page = answer.json()
    assert [one["id"] for one in page["records"]] == [made[4], made[3]]
    assert ids(client, reader, f"?limit=2&before={page['next']}") == [made[2], made[1]]
    assert client.get(f"/v1/parked?before={made[2]}", headers=reader).json()["next"] is None
    assert page["records"][0] | {"arrivedAt": None} == {
        "id": made[4],
        "kind": "dead_letter",
        "reason": "unknown_meter",
        "state": "parked",
        "tenantId": "acme",
        "meter": "pigeons",
        "eventId": "k4",
        "schema": "",
        "topic": "usage.v3",
        "partition": 0,
        "offset": 4,
        "arrivedAt": None,
        "attempts": 1,
        "outcome": None,
    }
    shown = client.get(f"/v1/parked/{made[0]}", headers=reader)
    assert SECRET not in answer.text + shown.text


def test_a_tenants_key_sees_tries_and_discards_only_its_own(
    client: TestClient[Litestar], db: Connection
) -> None:
    mine, theirs = add(db, 0), add(db, 2, "globex")
    nobodys = add(db, 4, "", meter="")
    key = key_header(db, "acme", "read", "replay")
    assert ids(client, key) == [mine]
    assert ids(client, key_header(db, None, "read")) == [nobodys, theirs, mine]
    assert client.get(f"/v1/parked/{theirs}", headers=key).status_code == 404
    assert client.get("/v1/parked?tenant=globex", headers=key).json()["code"] == "tenant_forbidden"
    for path in ("redrive", "discard"):
        body: dict[str, Any] = {"tenant": "globex", **({"note": "n"} if path == "discard" else {})}
        assert client.post(f"/v1/parked/{path}", headers=key, json=body).status_code == 403
    asked = client.post("/v1/parked/redrive", headers=key, json={"ids": [mine, theirs]}).json()["redrives"]
    assert [one["selected"] for one in asked] == [1]
    carry_out(db)
    assert client.get(f"/v1/parked/{mine}", headers=key).json()["outcome"] == "counted"
    body = {"all": True, "note": "tests"}
    assert client.post("/v1/parked/discard", headers=key, json=body).json() == {"records": 0, "dryRun": False}
    operators = client.post("/v1/parked/redrive", headers=key_header(db, None, "replay"), json={"all": True})
    other = operators.json()["redrives"][0]["id"]
    assert [one["id"] for one in client.get("/v1/redrives", headers=key).json()["redrives"]] == [
        asked[0]["id"]
    ]
    assert client.get(f"/v1/redrives/{other}", headers=key).status_code == 404
    assert client.post(f"/v1/redrives/{other}/cancel", headers=key).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/parked", "read"),
        ("GET", "/v1/parked/1", "read"),
        ("GET", "/v1/redrives", "read"),
        ("GET", "/v1/redrives/1", "read"),
        ("POST", "/v1/parked/redrive", "replay"),
        ("POST", "/v1/parked/discard", "replay"),
        ("POST", "/v1/redrives/1/cancel", "replay"),
    ],
)
def test_every_route_wants_a_key_with_its_scope(
    client: TestClient[Litestar], db: Connection, method: str, path: str, scope: str
) -> None:
    body = {"all": True, "note": "n"} if "discard" in path else {"all": True} if "redrive" in path else None
    body = None if "cancel" in path or method == "GET" else body
    others = [one for one in ("ingest", "read", "adjust", "replay") if one != scope]
    assert client.request(method, path, json=body).status_code == 401
    refused = client.request(method, path, json=body, headers=key_header(db, "acme", *others))
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
    allowed = client.request(method, path, json=body, headers=key_header(db, "acme", scope))
    assert allowed.status_code in (200, 202, 404)


def test_a_re_drive_is_asked_for_carried_out_and_shown(client: TestClient[Litestar], db: Connection) -> None:
    for offset in range(4):
        add(db, offset)
    key = key_header(db, None, "read", "replay")
    asked = client.post("/v1/parked/redrive", headers=key, json={"reasons": ["unknown_meter"]})
    assert asked.status_code == 202
    [made] = asked.json()["redrives"]
    assert (made["state"], made["selected"], made["tried"]) == ("requested", 4, 0)
    carry_out(db)
    shown = client.get(f"/v1/redrives/{made['id']}", headers=key).json()
    assert (shown["state"], shown["results"]) == ("done", {"counted": 2, "parked:unknown_meter": 2})
    assert client.post(f"/v1/redrives/{made['id']}/cancel", headers=key).json() == {"changed": False}
    rows = db.execute("SELECT actor, action FROM audit_log ORDER BY audit_id DESC LIMIT 1").fetchall()
    assert rows[0][0].startswith("key:")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "nothing_chosen"),
        ({"reason": ["unknown_meter"]}, 400, "parameter_invalid"),
        ({"since": "2026-11-01T12:00:00"}, 400, "parameter_invalid"),
        ({"kinds": ["letter"]}, 400, "parameter_invalid"),
        ({"ids": [0]}, 400, "parameter_invalid"),
        ({"meter": "a\u0000b"}, 400, "parameter_invalid"),
        ([], 400, "parameter_invalid"),
        ({"ids": [2**63]}, 400, "parameter_invalid"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(
    client: TestClient[Litestar], db: Connection, body: Any, status: int, code: str
) -> None:
    add(db, 0)
    answer = client.post("/v1/parked/redrive", headers=key_header(db, None, "replay"), json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert db.execute("SELECT count(*) FROM redrives").fetchone() == (0,)


def test_a_tenants_key_must_say_that_it_means_all(client: TestClient[Litestar], db: Connection) -> None:
    add(db, 0)
    key = key_header(db, "acme", "replay")
    assert client.post("/v1/parked/redrive", headers=key, json={}).json()["code"] == "nothing_chosen"
    assert client.post("/v1/parked/redrive", headers=key, json={"all": True}).status_code == 202


def test_a_misspelt_filter_does_not_widen_an_answer(client: TestClient[Litestar], db: Connection) -> None:
    answer = client.get("/v1/parked?reasons=x", headers=key_header(db, None, "read"))
    assert (answer.status_code, answer.json()["code"]) == (400, "parameter_unknown")


TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["ids", "kinds", "reasons", "tenant", "meter", "since", "all", "dryRun", "note"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["redrive", "discard"]),
    body=st.dictionaries(FIELDS, JSON, max_size=4) | JSON,
    query=st.dictionaries(st.sampled_from(["reason", "kind", "before", "since", "tenant", "limit"]), TEXT),
)
def test_no_request_breaks_the_console(
    client: TestClient[Litestar], db: Connection, path: str, body: Any, query: dict[str, str]
) -> None:
    headers = key_header(db, None, "read", "replay")
    statuses = [
        client.post(f"/v1/parked/{path}", headers=headers, content=json.dumps(body).encode()).status_code,
        client.get("/v1/parked", headers=headers, params=query).status_code,
    ]
    assert all(status in (200, 202, 400, 403, 409) for status in statuses), statuses


# The command --------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["parked", *arguments])


def test_the_command_lists_counts_and_shows(db: Connection) -> None:
    made = [add(db, 0), add(db, 1, reason="undecodable"), add(db, 2, "globex")]
    listed = json.loads(run("list", "--json").stdout)
    assert [one["parked_id"] for one in listed["records"]] == made[::-1]
    assert listed["numbers"] == {"unknown_meter": 2, "undecodable": 1}
    restricted = json.loads(run("list", "--tenant", "globex", "--reason", "unknown_meter", "--json").stdout)
    assert [one["parked_id"] for one in restricted["records"]] == [made[2]]
    plain = run("show", str(made[0]))
    assert "unknown_meter" in plain.stdout and SECRET not in plain.stdout
    whole = json.loads(run("show", str(made[0]), "--record", "--json").stdout)
    assert whole["record"]["schema"] == "usage_event/3"
    assert whole["record"]["fields"]["properties"] == {"note": SECRET}
    missing = run("show", "999999")
    assert (missing.exit_code, "no parked record" in missing.stderr) == (MISUSED, True)


def test_the_command_waits_for_the_result_and_says_what_stays_parked(
    db: Connection, postgres_dsn: str
) -> None:
    for offset in range(4):
        add(db, offset)
    results: list[Result] = []
    waiting = threading.Thread(target=lambda: results.append(run("redrive", "--all", "--json")))
    waiting.start()
    while waiting.is_alive():
        carry_out(db)
        waiting.join(0.05)
    [result] = results
    assert result.exit_code == ATTENTION
    [row] = json.loads(result.stdout)
    assert (row["state"], row["results"]) == ("done", {"counted": 2, "parked:unknown_meter": 2})
    listed = json.loads(run("redrives", "--json").stdout)
    assert [one["redrive_id"] for one in listed] == [row["redrive_id"]]
    assert "it had ended before" in run("cancel", str(row["redrive_id"])).stdout


def test_the_command_wants_a_choice_a_time_with_an_offset_and_a_note(db: Connection) -> None:
    add(db, 0)
    for arguments, words in (
        (["redrive"], "say which"),
        (["redrive", "--since", "2026-11-01T12:00:00"], "is no time"),
        (["discard", "--all"], "--note"),
        (["cancel", "7"], "no re-drive 7"),
    ):
        result = run(*arguments)
        assert (result.exit_code, words in result.stderr) == (MISUSED, True), (arguments, result.stderr)
    assert run("redrive", "--since", "-PT24H", "--no-wait").exit_code == 0
    before = run("discard", "--until", "now", "--note", "tests", "--dry-run")
    assert before.stdout == "1 records would be discarded\n"
    assert run("discard", "--until", "now", "--note", "tests").stdout == "1 records discarded\n"
    assert json.loads(run("list", "--state", "discarded", "--json").stdout)["numbers"] == {"unknown_meter": 1}
