"""What the routes share: who asks, and PostgreSQL's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard

from services.web.keys import KeyStore, Principal, Scope
from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.wire.errors import Transient

Answer = TypeVar("Answer")
Asked = Callable[[psycopg.Connection[Any]], Answer]


async def principal_of(request: Request[Any, Any, State], scope: Scope) -> Principal:
    """Who asks.

    Raises:
        RequestRefused: nobody we know, or not with ``scope``; see :meth:`KeyStore.authenticate`.
    """
    store: KeyStore = request.app.state.key_store
    return await store.authenticate(request.headers.get("authorization"), scope)


def refuse_unknown_parameters(request: Request[Any, Any, State], known: frozenset[str]) -> None:
    """A filter that is misspelt must not widen an answer.

    Raises:
        RequestRefused: 400, a query parameter is none of ``known``.
    """
    if not known.issuperset(request.query_params.keys()):
        raise RequestRefused(
            400, "parameter_unknown", f"the parameters are {', '.join(sorted(known))}", path="query"
        )


def operators_only(scope: Scope) -> Guard:
    """For what belongs to no tenant: the key has ``scope`` and no tenant. Asked before anything is read.

    The principal is then ``request.state.principal``.
    """

    async def guard(connection: ASGIConnection[Any, Any, Any, State], _: BaseRouteHandler) -> None:
        store: KeyStore = connection.app.state.key_store
        principal = await store.authenticate(connection.headers.get("authorization"), scope)
        if principal.tenant_id is not None:
            raise RequestRefused(
                403, "operators_only", "this is for keys without a tenant", path="Authorization"
            )
        connection.state.principal = principal

    return guard


async def ask(request: Request[Any, Any, State], question: Asked[Answer]) -> Answer:
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
