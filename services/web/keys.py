"""Verify API keys: ``Authorization: Bearer tmk_<key id>_<secret>``.

A key holds 256 random bits, so its SHA-256 is stored and no slow hash is needed. It is found by its public id
and compared in constant time; an unknown id costs the same comparison.

A key that was verified stays in memory for five seconds, so a revocation holds after at most that. While
PostgreSQL does not answer, keys verified in the last five minutes go on working, without waiting for it:
refusing usage is worse than a revocation that takes minutes during an outage. Every other key gets 503, never
401, for nobody can say that it is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, LiteralString, Protocol, get_args

import psycopg
import structlog
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.wire.errors import Transient

Scope = Literal["ingest", "read", "adjust", "replay", "admin"]
#: ``admin`` includes every other scope.
SCOPES: tuple[Scope, ...] = get_args(Scope)

FRESH_S = 5.0
OUTAGE_S = 300.0
#: Pause after a failed look-up, so that an outage does not add its time limit to every request.
RETRY_LOOKUP_S = 1.0
#: A failure that is older than this says nothing any more: the next request waits for an answer again.
STALE_FAILURE_S = 3.0
LAST_USED_S = 60.0
CACHED_KEYS_MAX = 10_000
LOOKUP_TIMEOUT_S = 2.0
SERVER_TIMEOUT_MS = 2000

_KEY = re.compile(r"tmk_([a-z0-9]{16})_([A-Za-z0-9_-]{43})")
_KEY_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_NOBODY = bytes(32)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at its birth. ``text`` is shown once and never stored."""

    key_id: str
    text: str
    secret_sha256: bytes


def generate_key() -> NewKey:
    """A new random key: 80 bits of public id, 256 bits of secret."""
    key_id = "".join(secrets.choice(_KEY_ID_ALPHABET) for _ in range(16))
    secret = secrets.token_urlsafe(32)
    return NewKey(key_id, f"tmk_{key_id}_{secret}", _digest(secret))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A row of ``api_keys`` as far as verification needs it. A null tenant is an operator's key."""

    key_id: str
    tenant_id: str | None
    secret_sha256: bytes
    scopes: frozenset[str]
    expires_at: datetime | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a verified key stands for."""

    key_id: str
    tenant_id: str | None
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has ``scope``, or ``admin``."""
        return scope in self.scopes or "admin" in self.scopes


class KeyRows(Protocol):
    """Where keys are kept. Every method raises Transient when it cannot be reached."""

    async def find(self, key_id: str) -> KeyRow | None: ...
    async def touch(self, key_id: str) -> None: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...


@dataclass(slots=True)
class _Cached:
    row: KeyRow | None
    verified_s: float


class KeyStore:
    """Verifies keys against ``rows`` and remembers the answer. ``now_s`` is a monotonic clock in seconds."""

    def __init__(
        self,
        rows: KeyRows,
        *,
        now_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._rows = rows
        self._now_s = now_s
        self._now = now
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[_Cached]] = {}
        self._touched_s: OrderedDict[str, float] = OrderedDict()
        self._touches: set[asyncio.Task[None]] = set()
        self._away = False
        self._retry_at_s = float("-inf")
        self._answered_s = now_s()

    async def open(self) -> None:
        """Connect in the background; a store that is away is not an error here."""
        await self._rows.open()

    async def close(self) -> None:
        """Finish what is under way and disconnect."""
        if self._touches:
            await asyncio.wait(self._touches, timeout=LOOKUP_TIMEOUT_S)
        await self._rows.close()

    async def authenticate(self, authorization: str | None, scope: Scope) -> Principal:
        """The principal of an ``Authorization`` header.

        Raises:
            RequestRefused: 401 for no key, a wrong, expired or revoked one; 403 without ``scope``; 503 if the
                key cannot be verified now.
        """
        presented = _KEY.fullmatch(_bearer(authorization))
        if presented is None:
            raise _unauthorized()
        key_id, secret = presented.groups()
        row = await self._row(key_id)
        stored = _NOBODY if row is None else row.secret_sha256
        matches = hmac.compare_digest(_digest(secret), stored)
        if row is None or not matches or row.revoked:
            raise _unauthorized()
        if row.expires_at is not None and row.expires_at <= self._now():
            raise _unauthorized()
        principal = Principal(row.key_id, row.tenant_id, row.scopes)
        if not principal.may(scope):
            raise RequestRefused(
                403, "scope_missing", f"this key lacks the scope {scope}", path="Authorization"
            )
        self._touch(key_id)
        return principal

    def away_s(self) -> float:
        """For how many seconds PostgreSQL has not answered; 0 while it does."""
        return self._now_s() - self._answered_s if self._away else 0.0

    async def check(self) -> None:
        """Ask PostgreSQL for a key that does not exist.

        Raises:
            Transient: it does not answer.
        """
        await self._find("health")

    async def _row(self, key_id: str) -> KeyRow | None:
        cached = self._cache.get(key_id)
        now_s = self._now_s()
        if cached is not None and now_s - cached.verified_s <= FRESH_S:
            return cached.row
        usable = cached.row if cached is not None and now_s - cached.verified_s <= OUTAGE_S else None
        if usable is not None and now_s < self._retry_at_s + STALE_FAILURE_S:
            if now_s >= self._retry_at_s:
                self._retry_at_s = now_s + RETRY_LOOKUP_S
                self._start_look_up(key_id)
            return usable
        if now_s >= self._retry_at_s:
            try:
                return (await asyncio.shield(self._start_look_up(key_id))).row
            except Transient:
                if usable is not None:
                    return usable
        raise RequestRefused(
            503,
            "authentication_unavailable",
            "the key cannot be verified at the moment; try again",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )

    def _start_look_up(self, key_id: str) -> asyncio.Task[_Cached]:
        """One look-up at a time for each key, whoever waits for it."""
        task = self._lookups.get(key_id)
        if task is None:
            task = asyncio.create_task(self._look_up_once(key_id))
            self._lookups[key_id] = task
            task.add_done_callback(lambda done: self._looked_up(key_id, done))
        return task

    def _looked_up(self, key_id: str, task: asyncio.Task[_Cached]) -> None:
        self._lookups.pop(key_id, None)
        if not task.cancelled():
            task.exception()  # seen, even if every waiter has gone

    async def _look_up_once(self, key_id: str) -> _Cached:
        asked_s = self._now_s()
        cached = _Cached(await self._find(key_id), asked_s)
        self._cache[key_id] = cached
        self._cache.move_to_end(key_id)
        if len(self._cache) > CACHED_KEYS_MAX:
            self._cache.popitem(last=False)
        return cached

    async def _find(self, key_id: str) -> KeyRow | None:
        try:
            row = await self._rows.find(key_id)
        except Transient as error:
            if not self._away:
                log.warning("keys.postgres_away", error=type(error).__name__)
            self._away = True
            self._retry_at_s = self._now_s() + RETRY_LOOKUP_S
            raise
        self._away = False
        self._retry_at_s = float("-inf")
        self._answered_s = self._now_s()
        return row

    def _touch(self, key_id: str) -> None:
        now_s = self._now_s()
        if now_s - self._touched_s.get(key_id, -LAST_USED_S) < LAST_USED_S or self._away:
            return
        self._touched_s[key_id] = now_s
        self._touched_s.move_to_end(key_id)
        if len(self._touched_s) > CACHED_KEYS_MAX:
            self._touched_s.popitem(last=False)
        task = asyncio.create_task(self._touch_quietly(key_id))
        self._touches.add(task)
        task.add_done_callback(self._touches.discard)

    async def _touch_quietly(self, key_id: str) -> None:
        try:
            await self._rows.touch(key_id)
        except Transient as error:
            log.info("keys.last_used_not_written", error=type(error).__name__)


def _bearer(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized() -> RequestRefused:
    return RequestRefused(
        401,
        "unauthorized",
        "send a valid API key: Authorization: Bearer tmk_…",
        path="Authorization",
        headers={"WWW-Authenticate": "Bearer"},
    )


class PostgresKeyRows:
    """``api_keys`` in PostgreSQL, through a small pool that waits for nobody longer than two seconds."""

    def __init__(self, dsn: str) -> None:
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]] = AsyncConnectionPool(
            dsn,
            kwargs={
                "autocommit": True,
                "connect_timeout": int(LOOKUP_TIMEOUT_S),
                "options": f"-c statement_timeout={SERVER_TIMEOUT_MS}",
                "application_name": "tidemeter-ingest",
            },
            min_size=1,
            max_size=4,
            max_waiting=256,
            timeout=LOOKUP_TIMEOUT_S,
            reconnect_timeout=LOOKUP_TIMEOUT_S,
            check=AsyncConnectionPool.check_connection,
            open=False,
        )

    async def open(self) -> None:
        """Begin to connect."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Disconnect."""
        await self._pool.close(timeout=LOOKUP_TIMEOUT_S)

    async def find(self, key_id: str) -> KeyRow | None:
        """The row of ``key_id``, revoked and expired ones too.

        Raises:
            Transient: no answer within the time limit.
        """
        row = await self._execute(
            "SELECT key_id, tenant_id, secret_sha256, scopes, expires_at, revoked_at IS NOT NULL"
            " FROM api_keys WHERE key_id = %s",
            key_id,
        )
        if row is None:
            return None
        key_id, tenant_id, secret_sha256, scopes, expires_at, revoked = row
        return KeyRow(key_id, tenant_id, bytes(secret_sha256), frozenset(scopes), expires_at, revoked)

    async def touch(self, key_id: str) -> None:
        """Note that the key was used, at most once a minute over all processes.

        Raises:
            Transient: no answer within the time limit.
        """
        await self._execute(
            "UPDATE api_keys SET last_used_at = now() WHERE key_id = %s"
            " AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute') RETURNING key_id",
            key_id,
        )

    async def _execute(self, statement: LiteralString, key_id: str) -> tuple[Any, ...] | None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S), self._pool.connection() as connection:
                return await (await connection.execute(statement, (key_id,))).fetchone()
        except (psycopg.Error, PoolTimeout, TooManyRequests, TimeoutError, OSError) as error:
            raise Transient("PostgreSQL does not answer") from error
