"""The HTTP surface without Kafka and PostgreSQL: answers, headers, documentation, silence about values."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from services.ingest.app import create_app, openapi_document
from services.ingest.limits import Limits
from services.web.keys import KeyRow, KeyStore, generate_key
from services.web.publishing import Delivery
from services.wire.codec import Decoder, Record
from services.wire.errors import Transient
from services.wire.settings import Settings

ROUTE = "/v1/events/ingest"
GOOD = {"metric": "requests", "customerRef": "cust_42", "quantity": 1, "idempotencyKey": "k1"}
KEY, OPERATOR = generate_key(), generate_key()


class Kafka:
    """Acknowledges everything, or what ``outcomes`` says, or breaks."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.outcomes: list[Delivery] = []
        self.error: Exception | None = None
        self.closed = False

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        if self.error is not None:
            raise self.error
        self.records += [Decoder().decode(value)[1] for _, value in records]
        return self.outcomes or [Delivery.ACKNOWLEDGED] * len(records)

    async def check(self) -> None:
        if self.outcomes:
            raise Transient("Kafka does not answer")

    async def close(self) -> None:
        self.closed = True


class Rows:
    away = False

    async def find(self, key_id: str) -> KeyRow | None:
        if self.away:
            raise Transient("PostgreSQL does not answer")
        for key, tenant, scopes in ((KEY, "acme", {"ingest"}), (OPERATOR, None, {"admin"})):
            if key.key_id == key_id:
                return KeyRow(key_id, tenant, key.secret_sha256, frozenset(scopes), None, False)
        return None

    async def touch(self, key_id: str) -> None: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def client(kafka: Kafka, rows: Rows) -> Iterator[TestClient[Litestar]]:
    app = create_app(
        Settings.model_construct(),
        producer=kafka,
        keys=KeyStore(rows),
        limits=Limits(body_bytes_max=50_000, events_max=10, burst_events=20, events_per_second=0.001),
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        client.headers.update({"Authorization": f"Bearer {KEY.text}", "Content-Type": "application/json"})
        yield client


def post(client: TestClient[Litestar], body: object, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(ROUTE, content=content, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_each_event_gets_its_own_result_in_order(client: TestClient[Litestar], kafka: Kafka) -> None:
    answer = post(client, {"events": [GOOD, {**GOOD, "quantity": "-0", "idempotencyKey": "k2"}]})
    assert answer.status_code == 207
    assert answer.json() == {
        "accepted": 1,
        "rejected": 1,
        "unavailable": 0,
        "results": [
            {"index": 0, "status": "accepted", "idempotencyKey": "k1"},
            {
                "index": 1,
                "status": "rejected",
                "idempotencyKey": "k2",
                "code": "quantity_negative_zero",
                "path": "events[1].quantity",
                "message": "must not be negative zero",
            },
        ],
    }
    assert [record["idempotency_key"] for record in kafka.records] == ["k1"]
    assert kafka.records[0]["source"] == "api"


def test_all_accepted_is_202_none_acceptable_is_400_all_foreign_is_403(client: TestClient[Litestar]) -> None:
    assert post(client, GOOD).status_code == 202
    assert post(client, {**GOOD, "quantity": None}).status_code == 400
    assert post(client, {**GOOD, "tenantId": "globex"}).status_code == 403


def test_the_same_event_twice_in_one_request_is_taken_twice(
    client: TestClient[Litestar], kafka: Kafka
) -> None:
    assert post(client, [GOOD, GOOD]).json()["accepted"] == 2
    assert len(kafka.records) == 2


def test_an_unacknowledged_event_makes_the_answer_503_and_names_it(
    client: TestClient[Litestar], kafka: Kafka
) -> None:
    kafka.outcomes = [Delivery.ACKNOWLEDGED, Delivery.NOT_ACKNOWLEDGED, Delivery.QUEUE_FULL]
    answer = post(client, [GOOD, GOOD, {}, GOOD])
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    statuses = [(result["status"], result.get("code")) for result in answer.json()["results"]]
    assert statuses == [
        ("accepted", None),
        ("unavailable", "not_acknowledged"),
        ("rejected", "customer_ref_missing"),
        ("unavailable", "queue_full"),
    ]


def test_an_event_too_large_for_readers_is_refused_singly(client: TestClient[Litestar], kafka: Kafka) -> None:
    big = {**GOOD, "meta": {f"{n}": "\u20ac" * 500 for n in range(50)}}
    body = json.dumps([GOOD, big], ensure_ascii=False).encode()
    answer = client.post(ROUTE, content=gzip.compress(body), headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413  # the body itself is bounded first
    small = create_app(Settings.model_construct(), producer=kafka, keys=KeyStore(Rows()))
    with TestClient(small) as roomy:
        answer = roomy.post(
            ROUTE,
            content=body,
            headers={"Authorization": f"Bearer {KEY.text}", "Content-Type": "application/json"},
        )
    assert (answer.status_code, answer.json()["results"][1]["code"]) == (207, "event_too_large")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 202),
        ("Application/JSON; charset=UTF-8", 202),
        ('application/json; charset="utf-8"', 202),
        ("application/json; charset=utf-16", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/json", 415),
        ("", 415),
    ],
)
def test_only_documented_media_types_are_read(
    client: TestClient[Litestar], content_type: str, status: int
) -> None:
    assert post(client, GOOD, Content_Type=content_type).status_code == status


def test_cloudevents_are_taken_single_and_in_batches(client: TestClient[Litestar], kafka: Kafka) -> None:
    event = {
        "specversion": "1.0",
        "id": "1",
        "source": "/gw",
        "type": "usage",
        "subject": "cust_42",
        "data": {"metric": "requests", "quantity": 2},
    }
    assert post(client, event, Content_Type="application/cloudevents+json").status_code == 202
    answer = post(client, [event, {**event, "id": "2"}], Content_Type="application/cloudevents-batch+json")
    assert answer.status_code == 202
    assert [record["idempotency_key"] for record in kafka.records] == ["/gw/1", "/gw/1", "/gw/2"]


def test_headers_never_merge_the_events_of_a_batch(client: TestClient[Litestar], kafka: Kafka) -> None:
    events = [{**GOOD, "idempotencyKey": key} for key in ("a", "b", "c")]
    assert post(client, {"events": events}, Idempotency_Key="one").json()["accepted"] == 3
    assert [record["idempotency_key"] for record in kafka.records] == ["a", "b", "c"]


@pytest.mark.parametrize("value", ["", "x" * 256, "tab\tinside", "caf\u00e9"])
def test_a_malformed_key_header_is_refused_even_where_it_is_not_needed(
    client: TestClient[Litestar], value: str
) -> None:
    answer = client.post(
        ROUTE, content=json.dumps(GOOD), headers={"Idempotency-Key": value.encode("latin-1")}
    )
    assert (answer.status_code, answer.json()["path"]) == (400, "Idempotency-Key")


def test_limits_answer_413_and_429(client: TestClient[Litestar]) -> None:
    assert post(client, b" " * 50_001).json()["code"] == "body_too_large"
    assert post(client, [GOOD] * 11).json()["code"] == "too_many_events"
    assert post(client, [GOOD] * 10).status_code == 202
    assert post(client, [GOOD] * 10).status_code == 202
    limited = post(client, GOOD)
    assert (limited.status_code, limited.headers["Retry-After"]) == (429, "2")


def test_authentication_comes_before_the_body(client: TestClient[Litestar]) -> None:
    anonymous = post(client, b"x" * 60_000, Authorization="")
    assert (anonymous.status_code, anonymous.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_an_operator_must_name_the_tenant(client: TestClient[Litestar], kafka: Kafka) -> None:
    bearer = f"Bearer {OPERATOR.text}"
    assert post(client, GOOD, Authorization=bearer).json()["results"][0]["code"] == "tenant_id_missing"
    assert post(client, {**GOOD, "tenantId": "globex"}, Authorization=bearer).status_code == 202
    assert kafka.records[0]["tenant_id"] == "globex"


def test_unknown_routes_and_methods_answer_in_the_same_form(client: TestClient[Litestar]) -> None:
    assert client.get("/nowhere").json()["code"] == "not_found"
    wrong = client.get(ROUTE)
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["Allow"]


def test_a_defect_is_a_500_that_says_nothing_of_its_cause(
    client: TestClient[Litestar],
    kafka: Kafka,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kafka.error = RuntimeError("planted-secret")
    caplog.set_level(logging.DEBUG)
    answer = post(client, {**GOOD, "customerRef": "planted-customer"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    logged = caplog.text + "".join(capfd.readouterr())
    assert "planted" not in answer.text + logged
    assert "http.unexpected" in logged


def test_no_answer_repeats_a_value_but_the_idempotency_key(client: TestClient[Litestar]) -> None:
    planted = "planted\u0000"
    for field in ("metric", "customerRef", "quantity", "ts", "tenantId", "idempotencyKey"):
        assert "planted" not in post(client, {**GOOD, field: planted}).text
    assert "planted" not in post(client, {**GOOD, "meta": {"planted\u0000": "planted\u0000"}}).text
    assert "planted" not in post(client, b'{"planted').text


def test_health_tells_what_is_wrong(client: TestClient[Litestar], kafka: Kafka, rows: Rows) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    rows.away = True
    degraded = client.get("/health/ready")
    assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
    assert "five minutes" in degraded.json()["checks"]["postgres"]["reason"]


def test_without_kafka_it_is_not_ready(client: TestClient[Litestar], kafka: Kafka) -> None:
    kafka.outcomes = [Delivery.NOT_ACKNOWLEDGED]
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert answer.json()["checks"]["kafka"]["reason"].startswith("Kafka does not answer")


def test_requests_are_counted_by_route_template_never_by_what_clients_invent(
    client: TestClient[Litestar],
) -> None:
    post(client, GOOD)
    client.get("/invented/path")
    client.request("INVENTED", "/health/live")
    text = client.get("/metrics").text
    assert re.search(
        r'http_requests_total\{method="POST",route="/v1/events/ingest",status_code="202"\} \d', text
    )
    assert re.search(
        r'http_request_duration_seconds_bucket\{le="[^"]*",method="POST",route="/v1/events/ingest"\}', text
    )
    assert 'method="GET",route="unmatched",status_code="404"' in text
    assert "invented" not in text.lower()


def test_every_answer_of_the_route_is_documented() -> None:
    operation = openapi_document()["paths"][ROUTE]["post"]
    assert set(operation["responses"]) == {
        *("202", "207", "400", "401", "403", "413", "415", "429", "500", "503")
    }
    assert set(operation["requestBody"]["content"]) == {
        "application/json",
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
    }
    assert operation["security"] == [{"apiKey": []}]


def test_the_document_and_its_page_are_served(client: TestClient[Litestar]) -> None:
    assert client.get("/openapi.json").json() == openapi_document()
    assert client.get("/docs").headers["Content-Type"].startswith("text/html")


def test_the_app_closes_what_it_was_given(client: TestClient[Litestar], kafka: Kafka) -> None:
    client.__exit__(None, None, None)
    assert kafka.closed
    client.__enter__()
