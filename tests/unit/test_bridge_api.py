"""The bridge's HTTP surface without Kafka: the order of checks, answers, silence, and any request at all."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.testing import TestClient

from services.bridge.app import create_app
from services.bridge.endpoints import Endpoints
from services.web.app import MeteredApp
from services.web.publishing import Delivery
from services.wire.codec import Decoder, Record
from services.wire.errors import Transient
from services.wire.settings import Settings

SECRETS = "main=whsec_planted1,whsec_planted2\nconnect=whsec_planted3"
ROUTE = "/v1/webhooks/main"
BODY = b'{"id": "evt_1", "type": "invoice.paid", "data": {"object": {"id": "in_1"}}}'
BODY_BYTES_MAX = 256 * 1024


class Kafka:
    """Acknowledges everything, or says ``outcome``, or breaks."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes, Record]] = []
        self.outcome = Delivery.ACKNOWLEDGED
        self.error: Exception | None = None
        self.closed = False

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        if self.error is not None:
            raise self.error
        self.records += [(key, Decoder().decode(value)[1]) for key, value in records]
        return [self.outcome] * len(records)

    async def check(self) -> None:
        if self.outcome is not Delivery.ACKNOWLEDGED:
            raise Transient("Kafka does not answer")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


@pytest.fixture
def client(kafka: Kafka) -> Iterator[TestClient[MeteredApp]]:
    app = create_app(Settings.model_construct(), publisher=kafka, endpoints=Endpoints(SECRETS))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def sign(body: bytes, secret: str | None = None, at_s: int | None = None) -> str:
    secret = secret or "whsec_planted1"
    moment = int(time.time()) if at_s is None else at_s
    mac = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256)
    return f"t={moment},v1={mac.hexdigest()}"


def post(client: TestClient[MeteredApp], body: bytes = BODY, path: str = ROUTE, **headers: str) -> Any:
    fields = {"Stripe-Signature": sign(body), "Content-Type": "application/json"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, content=body, headers=fields)


def answer(client: TestClient[MeteredApp], *args: Any, **headers: str) -> tuple[int, str]:
    response = post(client, *args, **headers)
    return response.status_code, response.json().get("code", "")


def test_what_stripe_signed_is_kept_byte_for_byte(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    body = (
        '{ "id":"evt_1",\n\t"type": "invoice.paid" ,"data":{"object":{"id":"in_1","x":"Käse \\ud83d"}}}\r\n '
    )
    before_us = time.time_ns() // 1000
    header = stripe.WebhookSignature.generate_signature_header(body, "whsec_planted2")
    response = client.post(ROUTE, content=body.encode(), headers={"Stripe-Signature": header})
    assert (response.status_code, response.json()) == (200, {"received": True})
    ((key, record),) = kafka.records
    assert key == b"in_1"
    received_at = record.pop("received_at")
    assert before_us <= received_at <= time.time_ns() // 1000
    assert record == {
        "endpoint": "main",
        "event_id": "evt_1",
        "event_type": "invoice.paid",
        "object_id": "in_1",
        "body": body.encode(),
    }


def test_the_same_delivery_twice_is_two_records(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    assert [post(client).status_code for _ in range(2)] == [200, 200]
    assert len(kafka.records) == 2


def test_an_endpoint_knows_its_own_secrets_only(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    connect = {"Stripe_Signature": sign(BODY, "whsec_planted3")}
    assert answer(client, **connect) == (400, "signature_invalid")
    assert answer(client, BODY, "/v1/webhooks/connect", **connect) == (200, "")
    assert [record["endpoint"] for _, record in kafka.records] == ["connect"]


LARGE = b" " * (BODY_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("path", "body", "headers", "expected"),
    [
        ("/v1/webhooks/nobody", LARGE, {"Content_Encoding": "gzip"}, (404, "endpoint_unknown")),
        ("/v1/webhooks/MAIN", BODY, {}, (404, "endpoint_unknown")),
        ("/v1/webhooks/%6dain%00", BODY, {}, (404, "endpoint_unknown")),
        (ROUTE, LARGE, {"Content_Encoding": "gzip"}, (413, "body_too_large")),
        (ROUTE, BODY, {"Content_Encoding": "gzip", "Stripe_Signature": ""}, (415, "encoding_unsupported")),
        (ROUTE, BODY, {"Content_Encoding": "br"}, (415, "encoding_unsupported")),
        (ROUTE, b"{", {"Stripe_Signature": ""}, (400, "signature_malformed")),
        (ROUTE, b"{", {"Stripe_Signature": "v1=aa"}, (400, "signature_malformed")),
        (ROUTE, b"{", {"Stripe_Signature": sign(BODY, at_s=1)}, (400, "signature_invalid")),
        (ROUTE, b"{", {"Stripe_Signature": sign(b"{", at_s=1)}, (400, "timestamp_outside_tolerance")),
        (ROUTE, b"{", {}, (400, "event_malformed")),
        (ROUTE, b'{"id": "evt_1"}', {}, (400, "event_malformed")),
        (ROUTE, BODY, {"Content_Encoding": "Identity"}, (200, "")),
        (ROUTE, BODY, {"Content_Type": "text/plain"}, (200, "")),
    ],
)
def test_checks_come_in_their_order_and_the_body_is_looked_into_last(
    client: TestClient[MeteredApp],
    kafka: Kafka,
    path: str,
    body: bytes,
    headers: dict[str, str],
    expected: tuple[int, str],
) -> None:
    assert answer(client, body, path, **headers) == expected
    assert len(kafka.records) == (expected[0] == 200)


def test_a_missing_signature_is_refused(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    assert client.post(ROUTE, content=BODY).json()["code"] == "signature_missing"
    assert kafka.records == []


def test_the_largest_body_is_taken_and_one_byte_more_is_not(
    client: TestClient[MeteredApp], kafka: Kafka
) -> None:
    largest = BODY + b" " * (BODY_BYTES_MAX - len(BODY))
    assert answer(client, largest) == (200, "")
    assert answer(client, largest + b" ") == (413, "body_too_large")
    assert kafka.records[0][1]["body"] == largest


def test_a_decompression_bomb_is_not_even_opened(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    assert answer(client, bomb, Content_Encoding="gzip") == (415, "encoding_unsupported")
    assert answer(client, bomb, Content_Encoding="identity, gzip") == (415, "encoding_unsupported")
    assert answer(client, bomb) == (400, "event_malformed")
    assert kafka.records == []


@pytest.mark.parametrize("outcome", [Delivery.NOT_ACKNOWLEDGED, Delivery.QUEUE_FULL])
def test_what_kafka_does_not_confirm_is_not_claimed(
    client: TestClient[MeteredApp], kafka: Kafka, outcome: Delivery
) -> None:
    kafka.outcome = outcome
    response = post(client)
    assert (response.status_code, response.json()["code"]) == (503, outcome.value)
    assert int(response.headers["Retry-After"]) > 0
    assert client.get("/health/ready").status_code == 503


def test_other_spellings_of_the_route_mean_the_same(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    assert answer(client, BODY, ROUTE + "/") == (200, "")
    assert answer(client, b"{", ROUTE + "/") == (400, "event_malformed")
    assert answer(client, BODY, ROUTE + "/more") == (404, "not_found")
    assert answer(client, BODY, "/v1/webhooks/") == (404, "endpoint_unknown")
    wrong = client.get(ROUTE)
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["Allow"]
    assert len(kafka.records) == 1


def test_health_tells_that_the_secrets_are_old_ones(kafka: Kafka, tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text(SECRETS)
    endpoints = Endpoints(path=path)
    app = create_app(Settings.model_construct(), publisher=kafka, endpoints=endpoints)
    path.unlink()
    endpoints.refresh()
    with TestClient(app) as client:
        ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"]["secrets"]["status"] == "degraded"


def test_requests_are_counted_by_endpoint_and_result_never_by_what_is_invented(
    client: TestClient[MeteredApp],
) -> None:
    post(client)
    post(client, Stripe_Signature="t=1,v1=invented")
    post(client, BODY, "/v1/webhooks/invented")
    client.get("/health/ready")
    text = client.get("/metrics").text
    assert re.search(r'tidemeter_webhooks_total\{endpoint="main",result="accepted"\} \d', text)
    assert re.search(r'tidemeter_webhooks_total\{endpoint="main",result="signature_invalid"\} \d', text)
    assert re.search(r'tidemeter_webhooks_total\{endpoint="unknown",result="endpoint_unknown"\} \d', text)
    assert re.search(
        r'http_requests_total\{method="POST",route="/v1/webhooks/{endpoint}",status_code="200"\} \d', text
    )
    assert "invented" not in text


def test_nothing_that_was_sent_and_no_secret_is_answered_or_logged(
    client: TestClient[MeteredApp],
    kafka: Kafka,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpx")  # the client's own
    planted = b'{"id": "evt_planted", "type": "planted", "data": {"object": {"id": "planted\\u0000"}}}'
    answers = [
        post(client, planted),
        post(client, planted, "/v1/webhooks/planted"),
        post(client, planted, Stripe_Signature="t=planted"),
        post(client, planted, Stripe_Signature="t=1,v1=planted"),
        post(client, planted, Content_Encoding="planted"),
    ]
    kafka.error = RuntimeError("planted")
    answers += [post(client), post(client, BODY, ROUTE + "/")]
    assert [one.status_code for one in answers] == [400, 404, 400, 400, 415, 500, 500]
    logged = caplog.text + "".join(capfd.readouterr())
    assert "planted" not in logged + "".join(one.text + str(one.headers) for one in answers)
    assert "webhook.malformed" in logged
    assert "http.unexpected" in logged


def test_every_answer_is_documented(client: TestClient[MeteredApp]) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/webhooks/{endpoint}"]["post"]
    assert set(operation["responses"]) == {"200", "400", "404", "413", "415", "500", "503"}
    assert {one["name"] for one in operation["parameters"]} == {"endpoint", "Stripe-Signature"}
    assert client.get("/docs").headers["Content-Type"].startswith("text/html")


def test_the_app_closes_what_it_was_given(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    client.__exit__(None, None, None)
    assert kafka.closed
    client.__enter__()


# Any request at all -------------------------------------------------------------------------------------

DOCUMENTED = {200, 204, 400, 404, 405, 413, 415}  # 204 to OPTIONS
NAMES = st.sampled_from(
    [b"stripe-signature", b"content-encoding", b"content-length", b"content-type", b"host", b"x-odd"]
) | st.binary(min_size=1, max_size=20).map(bytes.lower)
VALUES = st.binary(max_size=60) | st.sampled_from(
    [b"gzip", b"identity", b"0", b"-1", b"1e9", b"9" * 40, b"t=1,v1=" + b"0" * 64]
)
PATHS = st.sampled_from(
    [ROUTE, "/v1/webhooks/connect", "/v1/webhooks/", "/health/live", "//", ROUTE + "/"]
) | (
    st.text(max_size=40).map(lambda text: "/" + text)
    | st.text(max_size=20).map(lambda text: "/v1/webhooks/" + text)
)
BODIES = st.sampled_from([BODY, b"", b"{}", LARGE]) | st.binary(max_size=200)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, list[tuple[bytes, bytes]], list[bytes], bool]:
    """Method, path, headers, chunks of the body, and whether it is rightly signed."""
    method = draw(
        st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS"]) | st.text(max_size=8)
    )
    path, body = draw(PATHS), draw(BODIES)
    headers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=5))
    is_signed = draw(st.booleans())
    if is_signed:
        headers.insert(draw(st.integers(0, len(headers))), (b"stripe-signature", sign(body).encode()))
    cut = draw(st.integers(0, len(body)))
    return method, path, headers, [body[:cut], body[cut:]], is_signed


async def ask(
    app: MeteredApp, method: str, path: str, headers: list[tuple[bytes, bytes]], chunks: list[bytes]
) -> int:
    """The status, by ASGI itself: a client library would mend what is odd about the request."""
    statuses: list[int] = []

    async def messages() -> AsyncIterator[dict[str, Any]]:
        for number, chunk in enumerate(chunks, start=1):
            yield {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
        while True:
            yield {"type": "http.disconnect"}

    incoming = messages()

    async def receive() -> Any:
        return await anext(incoming)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    (status,) = statuses
    return status


Ask = Callable[[str, str, list[tuple[bytes, bytes]], list[bytes]], int]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Ask, Kafka]]:
    kafka = Kafka()
    app = create_app(Settings.model_construct(), publisher=kafka, endpoints=Endpoints(SECRETS))
    with TestClient(app) as client, client.portal() as portal:
        yield partial(portal.call, ask, app), kafka


@given(requests())
@settings(max_examples=500, deadline=None)
def test_any_request_gets_a_documented_answer_and_nothing_unsigned_is_kept(
    running: tuple[Ask, Kafka],
    request_: tuple[str, str, list[tuple[bytes, bytes]], list[bytes], bool],
) -> None:
    asked, kafka = running
    method, path, headers, chunks, is_signed = request_
    kafka.records.clear()
    status = asked(method, path, headers, chunks)
    assert status in DOCUMENTED
    if not is_signed:
        assert kafka.records == []
    for _, record in kafka.records:
        assert (method, status) == ("POST", 200)
        assert record["body"] == b"".join(chunks)


def test_a_signature_that_comes_twice_is_refused_though_it_holds(running: tuple[Ask, Kafka]) -> None:
    asked, kafka = running
    kafka.records.clear()
    header = (b"stripe-signature", sign(BODY).encode())
    assert asked("POST", ROUTE, [header, header], [BODY]) == 400
    assert kafka.records == []
    assert asked("POST", ROUTE, [header], [BODY]) == 200


def test_a_request_that_breaks_off_is_not_kept(running: tuple[Ask, Kafka]) -> None:
    asked, kafka = running
    kafka.records.clear()
    assert asked("POST", ROUTE, [(b"stripe-signature", sign(b"").encode())], []) == 400
    assert kafka.records == []


def test_an_event_in_json_lines_is_no_event(client: TestClient[MeteredApp], kafka: Kafka) -> None:
    lines = BODY + b"\n" + json.dumps({"id": "evt_2", "type": "x"}).encode()
    assert answer(client, lines) == (400, "event_malformed")
    assert kafka.records == []
