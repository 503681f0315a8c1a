"""A running ingest API with real Kafka and PostgreSQL, and what tests ask of them."""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import uvicorn
from confluent_kafka import Consumer, TopicPartition
from litestar import Litestar
from pydantic import SecretStr

from services.ingest.app import create_app
from services.ingest.limits import Limits
from services.web.keys import NewKey, generate_key
from services.wire.codec import Decoder, Record
from services.wire.errors import Poison
from services.wire.settings import Settings
from services.wire.topics import USAGE_CURRENT

#: For httpx, which else reads every certificate there is for each call, 30 ms of processor; ours are http.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass
class Serving:
    """Its address, and the database behind it."""

    url: str
    dsn: str

    def key(self, tenant: str | None, *scopes: str) -> NewKey:
        return new_key(self.dsn, tenant, *scopes)

    def post(self, body: object, key: NewKey, **headers: str) -> httpx.Response:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        fields = {"Authorization": f"Bearer {key.text}", "Content-Type": "application/json", **headers}
        return httpx.post(
            f"{self.url}/v1/events/ingest", content=content, headers=fields, timeout=30, verify=PLAIN
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, verify=PLAIN)


@contextmanager
def serving(kafka: str, dsn: str, **limits: Any) -> Iterator[Serving]:
    """The API, serving."""
    settings = Settings(kafka_bootstrap=kafka, postgres_dsn=SecretStr(dsn))
    with served(create_app(settings, limits=Limits(**limits))) as url:
        yield Serving(url, dsn)


@contextmanager
def served(app: Litestar) -> Iterator[str]:
    """The address of ``app`` under uvicorn on a free port, in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline_s = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline_s, "the API did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the API did not stop"


def new_tenant(dsn: str) -> str:
    """A tenant nobody else uses, on topics that others do."""
    tenant = f"t-{secrets.token_hex(6)}"
    with psycopg.connect(dsn) as database:
        database.execute("INSERT INTO tenants (tenant_id) VALUES (%s)", (tenant,))
    return tenant


def new_key(dsn: str, tenant: str | None, *scopes: str) -> NewKey:
    key = generate_key()
    with psycopg.connect(dsn) as database:
        database.execute(
            "INSERT INTO api_keys (key_id, tenant_id, secret_sha256, scopes) VALUES (%s, %s, %s, %s)",
            (key.key_id, tenant, key.secret_sha256, list(scopes or ("ingest",))),
        )
    return key


def records_of(kafka: str, tenant: str, at_least: int, timeout_s: float = 20.0) -> list[Record]:
    """Every usage record of ``tenant`` by the time ``at_least`` are there and the log is read to its end."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": f"test-{secrets.token_hex(6)}",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",  # other tests trim the topics: offset 0 may be gone
        }
    )
    decoder, found = Decoder(), []
    try:
        partitions = consumer.list_topics(USAGE_CURRENT, timeout=10).topics[USAGE_CURRENT].partitions
        consumer.assign([TopicPartition(USAGE_CURRENT, number, 0) for number in partitions])
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            messages = consumer.consume(5000, timeout=0.5)
            for message in messages:
                if message.error() is None:
                    try:
                        schema, record = decoder.decode(message.value() or b"")
                    except Poison:  # left by a test of what cannot be read
                        continue
                    if schema.name == "usage_event/3" and record["tenant_id"] == tenant:
                        found.append(record)
            if len(found) >= at_least and not messages:
                break
    finally:
        consumer.close()
    assert len(found) >= at_least
    return found
