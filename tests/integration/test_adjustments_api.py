"""Adjustments by HTTP and by command, with a real PostgreSQL: who sees them, who decides, what is left."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from litestar import Litestar
from litestar.testing import TestClient
from typer.testing import CliRunner, Result

from services.cli.common import MISUSED
from services.cli.main import app as command
from services.console.adjustments import (
    PUSHABLE,
    Decision,
    TooOldForStripe,
    UnknownAdjustment,
    decide,
    find,
)
from services.console.routes import ROUTES
from services.ingest.app import openapi_document
from services.web.database import DatabasePool
from services.wire.errors import Transient
from tests.integration.console import console, key_header
from tests.integration.ingest_serving import new_key

Connection = psycopg.Connection[Any]
NOW = datetime.now(UTC).replace(microsecond=123_456)
NOWHERE = "postgresql://127.0.0.1:1/none"


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        for tenant in ("acme", "globex"):
            connection.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (tenant,))
            for meter, aggregation in (("requests", "sum"), ("seats", "last")):
                connection.execute(
                    "INSERT INTO meters (tenant_id, meter, aggregation, event_name) VALUES (%s, %s, %s, %s)",
                    (tenant, meter, aggregation, meter),
                )
        yield connection


@pytest.fixture
def client(postgres_dsn: str) -> Iterator[TestClient[Litestar]]:
    with console(postgres_dsn, postgres_dsn) as client:
        yield client


def add(
    db: Connection,
    *,
    tenant: str = "acme",
    meter: str = "requests",
    customer: str = "c1",
    occurred_at: datetime | None = None,
    state: str = "pending",
    quantity: str = "1",
    reason: str = "too_late",
) -> str:
    """A new adjustment."""
    key = uuid.uuid4()
    db.execute(
        "INSERT INTO adjustments (adjustment_id, item_id, tenant_id, customer_ref, meter, idempotency_key, "
        'quantity, occurred_at, arrived_at, watermark, policy, state, reason, topic, partition, "offset") '
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 'manual', %s, %s, 'usage.v3', 0, 0)",
        (
            *(key, uuid.uuid4(), tenant, customer, meter, f"key-{key}", Decimal(quantity)),
            *(occurred_at or NOW - timedelta(days=5), NOW, NOW, state, reason),
        ),
    )
    return str(key)


def row_of(db: Connection, adjustment: str) -> tuple[Any, ...]:
    row = db.execute(
        "SELECT state, decided_by, decided_at IS NOT NULL, applied_hour FROM adjustments "
        "WHERE adjustment_id = %s",
        (adjustment,),
    ).fetchone()
    assert row is not None
    return row


def listed(client: TestClient[Litestar], headers: dict[str, str], query: str = "") -> list[str]:
    answer = client.get(f"/v1/adjustments{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["adjustments"]]


# Deciding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("approved", "state"), [(True, "approved"), (False, "rejected")])
def test_a_decision_changes_the_state_alone_and_only_once(db: Connection, approved: bool, state: str) -> None:
    one = add(db)
    assert decide(db, one, approved=approved, by="ann") == Decision(one, state, True)
    assert decide(db, one, approved=approved, by="bob") == Decision(one, state, False)
    assert decide(db, one, approved=not approved, by="bob") == Decision(one, state, False)
    assert row_of(db, one) == (state, "ann", True, None)
    assert db.execute("SELECT count(*) FROM buckets").fetchone() == (0,)


@pytest.mark.parametrize("state", ["applied", "rejected", "approved"])
def test_what_was_decided_stays(db: Connection, state: str) -> None:
    one = add(db, state=state)
    assert decide(db, one, approved=True, by="ann") == Decision(one, state, False)


@pytest.mark.parametrize("unknown", ["x", "", "0b8f6f5e-9f4b-5f0e-8a55-4b7f4a3c2d1e", "\x00"])
def test_an_unknown_id_is_refused(db: Connection, unknown: str) -> None:
    with pytest.raises(UnknownAdjustment):
        decide(db, unknown, approved=True, by="ann")


def test_another_tenants_adjustment_is_unknown(db: Connection) -> None:
    one = add(db, tenant="globex")
    with pytest.raises(UnknownAdjustment):
        decide(db, one, approved=True, by="ann", tenant="acme")
    assert row_of(db, one)[0] == "pending"


def test_an_old_value_of_a_last_meter_can_be_rejected_but_not_approved(db: Connection) -> None:
    too_old = add(db, meter="seats", occurred_at=NOW - PUSHABLE - timedelta(microseconds=1))
    just_fits = add(db, meter="seats", occurred_at=NOW - PUSHABLE)
    of_a_sum = add(db, occurred_at=NOW - timedelta(days=300))
    with pytest.raises(TooOldForStripe, match="34.5 days; reject it"):
        decide(db, too_old, approved=True, by="ann", now=NOW)
    assert row_of(db, too_old)[0] == "pending"
    assert decide(db, just_fits, approved=True, by="ann", now=NOW).state == "approved"
    assert decide(db, of_a_sum, approved=True, by="ann", now=NOW).state == "approved"
    assert decide(db, too_old, approved=False, by="ann", now=NOW).state == "rejected"


def test_of_two_opposite_decisions_at_once_the_first_stays(db: Connection, postgres_dsn: str) -> None:
    one = add(db)
    outcomes: list[Decision] = []

    def decided(approved: bool) -> None:
        with psycopg.connect(postgres_dsn, autocommit=True) as own:
            outcomes.append(decide(own, one, approved=approved, by=str(approved)))

    threads = [threading.Thread(target=decided, args=(approved,)) for approved in (True, False) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.changed for outcome in outcomes) == 1
    assert {outcome.state for outcome in outcomes} == {row_of(db, one)[0]}


def test_pages_follow_the_order_of_events_without_leaving_one_out(db: Connection) -> None:
    moments = [NOW - timedelta(hours=hours) for hours in (3, 3, 3, 2, 1)]
    ids = {add(db, occurred_at=moment) for moment in moments}
    seen: list[str] = []
    after = None
    while rows := find(db, after=after, limit=2):
        seen += [str(row["adjustment_id"]) for row in rows]
        after = (rows[-1]["occurred_at"], rows[-1]["adjustment_id"])
    assert len(seen) == 5
    assert set(seen) == ids
    assert find(db)[0]["occurred_at"] == min(moments)


# The API -------------------------------------------------------------------------------------------------


def test_an_adjustment_is_listed_with_what_a_person_needs_to_decide(
    db: Connection, client: TestClient[Litestar]
) -> None:
    one = add(db, quantity="12.500000000", reason="beyond_retention", occurred_at=NOW - timedelta(days=40))
    answer = client.get("/v1/adjustments", headers=key_header(db, "acme", "read"))
    assert answer.json() == {
        "adjustments": [
            {
                "id": one,
                "tenantId": "acme",
                "customerRef": "c1",
                "meter": "requests",
                "idempotencyKey": f"key-{one}",
                "quantity": "12.5",
                "occurredAt": f"{NOW - timedelta(days=40):%Y-%m-%dT%H:%M:%S.%fZ}",
                "arrivedAt": f"{NOW:%Y-%m-%dT%H:%M:%S.%fZ}",
                "reason": "beyond_retention",
                "state": "pending",
                "decidedBy": None,
                "decidedAt": None,
                "appliedHour": None,
                "appliedAt": None,
            }
        ],
        "next": None,
    }


def test_the_list_can_be_narrowed(db: Connection, client: TestClient[Litestar]) -> None:
    operator = key_header(db, None, "admin")
    a = add(db, customer="c 1/ü")
    b = add(db, meter="seats", state="applied")
    c = add(db, tenant="globex", state="approved")
    assert set(listed(client, operator)) == {a, b, c}
    assert listed(client, operator, "?state=pending") == [a]
    assert listed(client, operator, "?state=approved") == [c]
    assert listed(client, operator, "?state=rejected") == []
    assert listed(client, operator, "?tenant=globex") == [c]
    assert listed(client, operator, "?meter=seats") == [b]
    assert listed(client, operator, "?customer=c%201%2F%C3%BC") == [a]
    assert listed(client, operator, "?customer=c1&meter=seats&tenant=acme&state=applied") == [b]


def test_pages_lead_through_the_whole_list(db: Connection, client: TestClient[Litestar]) -> None:
    ids = [add(db, occurred_at=NOW - timedelta(minutes=n // 2)) for n in range(7)]
    headers = key_header(db, "acme", "read")
    seen: list[str] = []
    query, pages = "?limit=3", 0
    while query:
        page = client.get(f"/v1/adjustments{query}", headers=headers).json()
        seen += [one["id"] for one in page["adjustments"]]
        query = f"?limit=3&after={page['next']}" if page["next"] else ""
        pages += 1
    assert pages == 3
    assert len(seen) == 7
    assert set(seen) == set(ids)


def test_a_line_feed_at_the_end_of_a_parameter_breaks_nothing(
    db: Connection, client: TestClient[Litestar]
) -> None:
    headers = key_header(db, None, "admin")
    for query in (f"?after=1-{uuid.UUID(int=0).hex}%0A", "?tenant=acme%0A", "?customer=c%0A", "?meter=m%0A"):
        assert listed(client, headers, query) == []


@pytest.mark.parametrize(
    ("query", "code", "path"),
    [
        ("?limit=0", "parameter_invalid", "limit"),
        ("?limit=101", "parameter_invalid", "limit"),
        ("?limit=ten", "parameter_invalid", "limit"),
        ("?state=open", "parameter_invalid", "state"),
        ("?tenant=%C3%9C", "parameter_invalid", "tenant"),
        ("?meter=A", "parameter_invalid", "meter"),
        ("?customer=%00", "parameter_invalid", "customer"),
        ("?customer=", "parameter_invalid", "customer"),
        ("?after=planted", "parameter_invalid", "after"),
        ("?tennant=planted", "parameter_unknown", "query"),
    ],
)
def test_a_wrong_parameter_is_named_and_its_value_not_repeated(
    db: Connection, client: TestClient[Litestar], query: str, code: str, path: str
) -> None:
    answer = client.get(f"/v1/adjustments{query}", headers=key_header(db, "acme", "read"))
    assert answer.status_code == 400
    assert answer.json()["code"] == code
    assert answer.json()["path"] == path
    assert "planted" not in answer.text


@pytest.mark.parametrize(("verb", "state"), [("approve", "approved"), ("reject", "rejected")])
def test_a_decision_is_recorded_with_the_key_that_made_it(
    db: Connection, postgres_dsn: str, client: TestClient[Litestar], verb: str, state: str
) -> None:
    one = add(db)
    key = new_key(postgres_dsn, "acme", "adjust")
    headers = {"Authorization": f"Bearer {key.text}"}
    answer = client.post(f"/v1/adjustments/{one}/{verb}", headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"id": one, "state": state, "changed": True})
    assert row_of(db, one) == (state, f"key:{key.key_id}", True, None)
    again = client.post(f"/v1/adjustments/{one}/{verb}", headers=key_header(db, None, "admin"))
    assert (again.status_code, again.json()) == (200, {"id": one, "state": state, "changed": False})
    assert row_of(db, one)[1] == f"key:{key.key_id}"


@pytest.mark.parametrize(
    ("state", "verb", "status"),
    [("applied", "approve", 200), ("applied", "reject", 409), ("rejected", "approve", 409)],
)
def test_the_opposite_of_a_decision_is_refused(
    db: Connection, client: TestClient[Litestar], state: str, verb: str, status: int
) -> None:
    one = add(db, state=state)
    answer = client.post(f"/v1/adjustments/{one}/{verb}", headers=key_header(db, "acme", "adjust"))
    assert answer.status_code == status
    assert status == 200 or answer.json()["code"] == "adjustment_decided"
    assert row_of(db, one)[0] == state


def test_an_old_value_of_a_last_meter_is_refused_with_a_code(
    db: Connection, client: TestClient[Litestar]
) -> None:
    one = add(db, meter="seats", occurred_at=NOW - timedelta(days=36))
    answer = client.post(f"/v1/adjustments/{one}/approve", headers=key_header(db, "acme", "adjust"))
    assert (answer.status_code, answer.json()["code"]) == (409, "too_old_for_stripe")


def test_a_tenants_key_sees_and_decides_its_own_and_cannot_tell_others_from_nothing(
    db: Connection, client: TestClient[Litestar]
) -> None:
    ours, theirs = add(db), add(db, tenant="globex")
    headers = key_header(db, "acme", "read", "adjust")
    assert listed(client, headers) == [ours]
    assert listed(client, headers, "?tenant=globex") == []
    answers = [
        client.post(f"/v1/adjustments/{one}/{verb}", headers=headers)
        for one in (theirs, str(uuid.uuid4()), "planted")
        for verb in ("approve", "reject")
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["code"] == "adjustment_unknown"
    assert row_of(db, theirs)[0] == "pending"
    assert (
        client.post(f"/v1/adjustments/{theirs}/reject", headers=key_header(db, None, "admin")).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("scopes", "lists", "decides"),
    [
        (("read",), 200, 403),
        (("adjust",), 403, 200),
        (("ingest", "replay"), 403, 403),
        (("admin",), 200, 200),
    ],
)
def test_reading_and_deciding_are_two_scopes(
    db: Connection, client: TestClient[Litestar], scopes: tuple[str, ...], lists: int, decides: int
) -> None:
    headers = key_header(db, "acme", *scopes)
    assert client.get("/v1/adjustments", headers=headers).status_code == lists
    answer = client.post(f"/v1/adjustments/{add(db)}/approve", headers=headers)
    assert answer.status_code == decides
    assert decides == 200 or answer.json()["code"] == "scope_missing"


def test_without_a_key_nothing_is_shown(db: Connection, client: TestClient[Litestar]) -> None:
    for answer in (client.get("/v1/adjustments"), client.post(f"/v1/adjustments/{add(db)}/approve")):
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_while_postgresql_is_away_the_answer_is_to_try_again(db: Connection, postgres_dsn: str) -> None:
    headers = key_header(db, "acme", "read", "adjust")
    with console(postgres_dsn, NOWHERE) as client:
        for answer in (
            client.get("/v1/adjustments", headers=headers),
            client.post(f"/v1/adjustments/{uuid.uuid4()}/approve", headers=headers),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            assert int(answer.headers["retry-after"]) > 0


def test_a_store_that_was_never_asked_has_no_connection_and_can_be_closed_twice(postgres_dsn: str) -> None:
    unused = DatabasePool(lambda: pytest.fail("asked for an address"))
    unused.close()
    used = DatabasePool(lambda: postgres_dsn)
    with used.connection() as db:
        assert find(db) == []
    used.close()
    used.close()
    with pytest.raises(Transient), DatabasePool(lambda: NOWHERE).connection():
        pass


def test_the_routes_are_documented_with_their_parameters_and_refusals() -> None:
    paths = openapi_document(ROUTES)["paths"]
    listing = paths["/v1/adjustments"]["get"]
    assert {one["name"] for one in listing["parameters"]} == {
        *("state", "tenant", "meter", "customer", "after", "limit")
    }
    assert all(one["description"] for one in listing["parameters"])
    assert set(listing["responses"]) == {"200", "400", "401", "403", "500", "503"}
    for verb in ("approve", "reject"):
        deciding = paths[f"/v1/adjustments/{{adjustment_id}}/{verb}"]["post"]
        assert set(deciding["responses"]) == {"200", "400", "401", "403", "404", "409", "500", "503"}
        assert deciding["security"] == [{"apiKey": []}]


# The command ---------------------------------------------------------------------------------------------


@pytest.fixture
def tidemeter(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", postgres_dsn)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(command, list(arguments))

    return run


def test_the_command_lists_by_state_with_the_reason(db: Connection, tidemeter: Any) -> None:
    one, two = add(db, reason="beyond_retention"), add(db, state="approved")
    (shown,) = json.loads(tidemeter("adjustments", "list", "--json").stdout)
    assert (shown["adjustment_id"], shown["state"], shown["reason"]) == (one, "pending", "beyond_retention")
    (shown,) = json.loads(tidemeter("adjustments", "list", "--state", "approved", "--json").stdout)
    assert shown["adjustment_id"] == two
    table = tidemeter("adjustments", "list", "--state", "all", "--customer", "c1").stdout
    assert one in table and two in table and "beyond_retention" in table
    assert tidemeter("adjustments", "list", "--customer", "c2", "--json").stdout == "[]\n"


def test_the_command_approves_and_says_who_counts_it(db: Connection, tidemeter: Any) -> None:
    one = add(db)
    first = tidemeter("adjustments", "approve", one, "--by", "ann")
    assert first.stdout == f"{one} approved\n"
    assert "the counters apply it within seconds" in first.stderr.lower()
    again = tidemeter("adjustments", "approve", one)
    assert again.stdout == f"{one} approved (decided before; nothing changed)\n"
    assert again.stderr == ""
    assert row_of(db, one)[:2] == ("approved", "ann")
    answer = json.loads(tidemeter("adjustments", "reject", add(db), "--json").stdout)
    assert (answer[0]["state"], answer[0]["changed"]) == ("rejected", True)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_shows_what_it_decided_before_the_one_it_could_not(
    db: Connection, tidemeter: Any, as_json: bool
) -> None:
    one, old = add(db), add(db, meter="seats", occurred_at=NOW - timedelta(days=36))
    result = tidemeter("adjustments", "approve", one, old, add(db), *(["--json"] if as_json else []))
    assert result.exit_code == MISUSED
    assert one in result.stdout and old not in result.stdout
    assert f"error: adjustment {old} cannot be approved" in result.stderr
    assert row_of(db, one)[0] == "approved"
    assert row_of(db, old)[0] == "pending"
