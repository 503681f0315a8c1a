"""The API on real Kafka and PostgreSQL: what it accepts is on the topic, and keys behave."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition

from services.web.keys import FRESH_S, generate_key
from services.wire.topics import USAGE_CURRENT
from tests.integration.ingest_serving import Serving, new_tenant, records_of, serving


@pytest.fixture
def api(kafka_bootstrap: str, postgres_dsn: str) -> Iterator[Serving]:
    with serving(kafka_bootstrap, postgres_dsn) as api:
        yield api


def event(key: str = "k1", **changes: object) -> dict[str, object]:
    return {
        "metric": "requests",
        "customerRef": "cust_42",
        "quantity": "1.5",
        "idempotencyKey": key,
        **changes,
    }


def test_what_is_accepted_is_on_the_topic_exactly_as_sent(api: Serving, kafka_bootstrap: str) -> None:
    tenant = new_tenant(api.dsn)
    sent = event("k1", quantity=0.1, ts="2026-03-01T13:00:00.5+01:00", meta={"n": 1.50, "ok": True})
    answer = api.post({"events": [sent, event("k2"), event("k3", quantity="NaN")]}, api.key(tenant))
    assert answer.status_code == 207
    by_key = {record["idempotency_key"]: record for record in records_of(kafka_bootstrap, tenant, at_least=2)}
    assert by_key.keys() == {"k1", "k2"}
    assert by_key["k1"] == {
        "idempotency_key": "k1",
        "tenant_id": tenant,
        "customer_ref": "cust_42",
        "meter": "requests",
        "quantity": (100_000_000).to_bytes(16, "big"),
        "occurred_at": 1_772_366_400_500_000,
        "properties": {"n": "1.5", "ok": "true"},
        "source": "api",
    }
    assert by_key["k2"]["occurred_at"] is None


def test_records_carry_their_schema_the_item_as_key_and_arrival_time(
    api: Serving, kafka_bootstrap: str
) -> None:
    tenant = new_tenant(api.dsn)
    before_ms = time.time_ns() // 1_000_000
    assert api.post(event(), api.key(tenant)).status_code == 202
    consumer = Consumer({"bootstrap.servers": kafka_bootstrap, "group.id": f"g-{tenant}"})
    try:
        partitions = consumer.list_topics(USAGE_CURRENT).topics[USAGE_CURRENT].partitions
        starts = [TopicPartition(USAGE_CURRENT, number, before_ms - 1000) for number in partitions]
        consumer.assign([start for start in consumer.offsets_for_times(starts, 10) if start.offset >= 0])
        message = next(
            message
            for message in consumer.consume(5000, timeout=3)
            if message.key() == json.dumps([tenant, "cust_42", "requests"], separators=(",", ":")).encode()
        )
    finally:
        consumer.close()
    assert ("tidemeter-schema", b"usage_event/3") in message.headers()
    assert before_ms - 1000 <= message.timestamp()[1] <= before_ms + 60_000


def test_a_thousand_events_are_one_request_and_one_thousand_records(
    api: Serving, kafka_bootstrap: str
) -> None:
    tenant = new_tenant(api.dsn)
    body = gzip.compress(json.dumps([event(f"k{number}") for number in range(1000)]).encode())
    answer = api.post(body, api.key(tenant), **{"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["accepted"]) == (202, 1000)
    assert len(records_of(kafka_bootstrap, tenant, at_least=1000)) == 1000


def test_a_chunked_upload_is_stopped_at_the_limit(api: Serving) -> None:
    key = api.key(new_tenant(api.dsn))
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/events/ingest HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer " + key.text.encode() + b"\r\n\r\n"
        )
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_key_of_one_tenant_cannot_write_for_another(api: Serving, kafka_bootstrap: str) -> None:
    ours, theirs = new_tenant(api.dsn), new_tenant(api.dsn)
    answer = api.post([event("a"), event("b", tenantId=theirs)], api.key(ours))
    assert answer.status_code == 207
    assert answer.json()["results"][1]["code"] == "tenant_forbidden"
    assert len(records_of(kafka_bootstrap, ours, at_least=1)) == 1
    assert records_of(kafka_bootstrap, theirs, at_least=0, timeout_s=1) == []


def test_scopes_expiry_and_unknown_keys_are_told_apart_from_nothing_else(api: Serving) -> None:
    tenant = new_tenant(api.dsn)
    assert api.post(event(), api.key(tenant, "read", "replay")).status_code == 403
    assert api.post(event(), generate_key()).status_code == 401
    expired = api.key(tenant)
    with psycopg.connect(api.dsn) as database:
        database.execute("UPDATE api_keys SET expires_at = now() WHERE key_id = %s", (expired.key_id,))
    assert api.post(event(), expired).status_code == 401


def test_a_revoked_key_stops_within_five_seconds_and_its_last_use_is_known(api: Serving) -> None:
    key = api.key(new_tenant(api.dsn))
    assert api.post(event(), key).status_code == 202
    with psycopg.connect(api.dsn, autocommit=True) as database:
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            row = database.execute(
                "SELECT last_used_at FROM api_keys WHERE key_id = %s", (key.key_id,)
            ).fetchone()
            if row is not None and row[0] is not None:
                break
            time.sleep(0.05)
        assert row is not None and row[0] is not None
        database.execute("UPDATE api_keys SET revoked_at = now() WHERE key_id = %s", (key.key_id,))
    time.sleep(FRESH_S + 0.1)
    assert api.post(event(), key).status_code == 401


def test_a_key_that_was_verified_works_while_postgresql_is_away(
    kafka_bootstrap: str, postgres_dsn: str
) -> None:
    role = f"ingest_{new_tenant(postgres_dsn).replace('-', '_')}"
    with psycopg.connect(postgres_dsn, autocommit=True) as database:
        database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        database.execute(f"GRANT SELECT, UPDATE ON api_keys TO {role}")
        info = psycopg.conninfo.conninfo_to_dict(postgres_dsn)
        dsn = psycopg.conninfo.make_conninfo(**{**info, "user": role, "password": "x"})
        try:
            with serving(kafka_bootstrap, dsn) as api:
                tenant = new_tenant(postgres_dsn)
                known = Serving(api.url, postgres_dsn).key(tenant)
                stranger = Serving(api.url, postgres_dsn).key(tenant)
                assert api.post(event("before"), known).status_code == 202
                database.execute(f"ALTER ROLE {role} NOLOGIN")
                database.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (role,)
                )
                time.sleep(FRESH_S + 0.1)
                assert api.post(event("during"), known).status_code == 202
                refused = api.post(event("stranger"), stranger)
                assert (refused.status_code, refused.json()["code"]) == (503, "authentication_unavailable")
                assert api.get("/health/ready").json()["status"] == "degraded"
                database.execute(f"ALTER ROLE {role} LOGIN")
                deadline_s = time.monotonic() + 20
                while api.post(event("after"), stranger).status_code != 202:
                    assert time.monotonic() < deadline_s, "did not reconnect"
                    time.sleep(0.2)
        finally:
            database.execute(f"DROP OWNED BY {role}")
            database.execute(f"DROP ROLE {role}")
