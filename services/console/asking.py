"""What the routes share: who asks, and PostgreSQL's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from litestar import Request
from litestar.datastructures import State

from services.web.keys import KeyStore, Principal, Scope
from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.wire.errors import Transient

Answer = TypeVar("Answer")


async def principal_of(request: Request[Any, Any, State], scope: Scope) -> Principal:
    store: KeyStore = request.app.state.key_store
    return await store.authenticate(request.headers.get("authorization"), scope)


async def ask(
    request: Request[Any, Any, State], question: Callable[[psycopg.Connection[Any]], Answer]
) -> Answer:
    """The answer of PostgreSQL, or 503."""
    store = request.app.state.database

    def asked() -> Answer:
        with store.connection() as db:
            return question(db)

    try:
        return await asyncio.to_thread(asked)
    except Transient:
        raise RequestRefused(
            503,
            "database_unavailable",
            "PostgreSQL does not answer at the moment; try again",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        ) from None
