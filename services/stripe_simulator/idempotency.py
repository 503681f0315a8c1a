"""Idempotency-Key: the first result of a POST is the result, for a day; in v2 the first success, for a month.

v1, as documented (docs.stripe.com/api/idempotent_requests): status and body of the first request are saved
once execution began, 500s included, and returned for the same key and parameters; other parameters are
refused; parameter validation, 401, 429 and a conflict with a request in flight save nothing. Keys live for
24 hours and are then forgotten. A key belongs to one account.

v2, as documented (docs.stripe.com/api-v2-overview): the same key for the same endpoint and account within 30
days changes nothing more once it succeeded; a request that failed is executed again. Choices: the repeated
answer is the first one and carries the marks of v1; other parameters are refused as in v1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from services.stripe_simulator.clock import Clock
from services.stripe_simulator.errors import Answer, InvalidParameters, KeyInUse, KeyMismatch
from services.stripe_simulator.forms import Form
from services.stripe_simulator.store import Store

KEY_LENGTH_MAX = 255
PRUNE_EVERY_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Retention:
    """What one version of the API keeps, where, and for how long."""

    table: str
    kept_seconds: float
    keeps_failures: bool


V1 = Retention("idempotency", 24 * 3600, keeps_failures=True)
V2 = Retention("idempotency_v2", 30 * 24 * 3600, keeps_failures=False)


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """One POST under a key. Equal fingerprints mean the same request, whatever the parameter order."""

    account: str
    key: str
    fingerprint: bytes

    @classmethod
    def of(cls, account: str, key: str, path: str, form: Form) -> KeyedRequest:
        if len(key) > KEY_LENGTH_MAX:
            raise InvalidParameters(f"Invalid Idempotency-Key: it has more than {KEY_LENGTH_MAX} characters")
        if not key.isascii():
            raise InvalidParameters("Invalid Idempotency-Key: it is not ASCII")
        canonical = msgspec.json.encode([path, form], order="sorted")
        return cls(account, key, hashlib.blake2b(canonical, digest_size=16).digest())


@dataclass(frozen=True, slots=True)
class Remembered:
    answer: Answer
    request_id: str


class IdempotencyKeys:
    def __init__(self, store: Store, clock: Clock, retention: Retention = V1) -> None:
        self._retention = retention
        self._store = store
        self._clock = clock
        self._in_flight: set[tuple[str, str]] = set()
        self._pruned_at = clock.now()

    def find(self, request: KeyedRequest) -> Remembered | None:
        """The saved result, or None for a new key. A request in flight wins over a mismatch."""
        if (request.account, request.key) in self._in_flight:
            raise KeyInUse()
        row = self._store.read_one(
            f"SELECT fingerprint, status, headers, body, request_id FROM {self._retention.table}"  # noqa: S608
            " WHERE account = ? AND key = ? AND created_at > ?",
            (request.account, request.key, self._clock.now() - self._retention.kept_seconds),
        )
        if row is None:
            return None
        fingerprint, status, headers, body, request_id = row
        if fingerprint != request.fingerprint:
            raise KeyMismatch(request.key)
        return Remembered(Answer(status, body, json.loads(headers)), request_id)

    @contextmanager
    def running(self, request: KeyedRequest | None) -> Iterator[None]:
        """Hold the key while its first request executes; None is a request without a key."""
        if request is None:
            yield
            return
        held = (request.account, request.key)
        self._in_flight.add(held)
        try:
            yield
        finally:
            self._in_flight.discard(held)

    def remember(self, request: KeyedRequest, answer: Answer, request_id: str) -> None:
        if answer.status >= HTTPStatus.BAD_REQUEST and not self._retention.keeps_failures:
            return
        now = self._clock.now()
        self._store.write(
            f"INSERT OR REPLACE INTO {self._retention.table} VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                request.account,
                request.key,
                request.fingerprint,
                answer.status,
                json.dumps(answer.headers) if answer.headers else "{}",
                answer.body,
                request_id,
                now,
            ),
        )
        if abs(now - self._pruned_at) > PRUNE_EVERY_SECONDS:
            sql = f"DELETE FROM {self._retention.table} WHERE created_at <= ?"  # noqa: S608
            self._store.write(sql, (now - self._retention.kept_seconds,))
            self._pruned_at = now
