"""The operators' routes in one process with a test, and keys for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from litestar import Litestar
from litestar.testing import TestClient
from pydantic import SecretStr

from services.console.routes import ROUTES
from services.ingest.app import create_app
from services.web.keys import KeyStore, PostgresKeyRows
from services.web.publishing import Delivery
from services.wire.settings import Settings
from tests.integration.ingest_serving import new_key


class NoKafka:
    """Nothing here is published."""

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        raise AssertionError("the console publishes nothing")

    async def check(self) -> None: ...
    async def close(self) -> None: ...


def console(keys_at: str, database_at: str) -> TestClient[Litestar]:
    """The whole API over these two databases."""
    app = create_app(
        Settings.model_construct(postgres_dsn=SecretStr(database_at)),
        producer=NoKafka(),
        keys=KeyStore(PostgresKeyRows(keys_at)),
        routes=ROUTES,
    )
    return TestClient(app, raise_server_exceptions=False)


def key_header(db: psycopg.Connection[Any], tenant: str | None, *scopes: str) -> dict[str, str]:
    """A new key in the database that ``db`` is connected to, as a header."""
    dsn = f"{db.info.dsn} password={db.info.password}"
    return {"Authorization": f"Bearer {new_key(dsn, tenant, *scopes).text}"}
