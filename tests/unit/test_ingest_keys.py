"""API keys: verified in constant time, cached for seconds, forgiving only while PostgreSQL is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from services.web.keys import (
    FRESH_S,
    OUTAGE_S,
    KeyRow,
    KeyStore,
    NewKey,
    Principal,
    Scope,
    generate_key,
)
from services.web.problems import RequestRefused
from services.wire.errors import Transient

NOW = datetime(2026, 3, 1, tzinfo=UTC)


class Rows:
    """Keys in memory, which can go away."""

    def __init__(self) -> None:
        self.rows: dict[str, KeyRow] = {}
        self.away = False
        self.finds = 0
        self.touched: list[str] = []

    def add(
        self,
        *scopes: str,
        tenant: str | None = "acme",
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> NewKey:
        key = generate_key()
        self.rows[key.key_id] = KeyRow(
            key.key_id, tenant, key.secret_sha256, frozenset(scopes), expires_at, revoked
        )
        return key

    def revoke(self, key: NewKey) -> None:
        row = self.rows[key.key_id]
        self.rows[key.key_id] = KeyRow(row.key_id, row.tenant_id, row.secret_sha256, row.scopes, None, True)

    async def find(self, key_id: str) -> KeyRow | None:
        self.finds += 1
        await asyncio.sleep(0)
        if self.away:
            raise Transient("away")
        return self.rows.get(key_id)

    async def touch(self, key_id: str) -> None:
        self.touched.append(key_id)

    async def open(self) -> None: ...
    async def close(self) -> None: ...


class World:
    """A store with its rows and a clock that stands still."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.now_s = 1000.0
        self.store = KeyStore(self.rows, now_s=lambda: self.now_s, now=lambda: NOW)

    async def ask(self, key: NewKey | str, scope: Scope = "ingest") -> Principal | int:
        header = key if isinstance(key, str) else f"Bearer {key.text}"
        try:
            principal = await self.store.authenticate(header, scope)
        except RequestRefused as error:
            return error.status
        await asyncio.sleep(0)  # lets look-ups in the background run
        await asyncio.sleep(0)
        return principal


def scenario(story: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def tell() -> None:
            await story(World())

        asyncio.run(tell())

    run.__doc__ = story.__doc__
    return run


@scenario
async def test_a_key_stands_for_its_tenant_and_scopes(world: World) -> None:
    key = world.rows.add("ingest", "read")
    principal = await world.ask(key)
    assert principal == Principal(key.key_id, "acme", frozenset({"ingest", "read"}))


@scenario
async def test_a_missing_scope_is_forbidden_and_admin_includes_all(world: World) -> None:
    assert await world.ask(world.rows.add("read")) == 403
    operator = await world.ask(world.rows.add("admin", tenant=None), "replay")
    assert isinstance(operator, Principal)
    assert operator.tenant_id is None


@scenario
async def test_a_wrong_expired_or_revoked_key_is_unauthorized(world: World) -> None:
    good = world.rows.add("ingest")
    other = generate_key()
    assert await world.ask(f"Bearer tmk_{good.key_id}_{other.text[-43:]}") == 401
    assert await world.ask(other) == 401
    assert await world.ask(world.rows.add("ingest", expires_at=NOW)) == 401
    assert await world.ask(world.rows.add("ingest", revoked=True)) == 401
    later = world.rows.add("ingest", expires_at=NOW + timedelta(seconds=1))
    assert isinstance(await world.ask(later), Principal)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer tmk__",
        "Bearer tmk_a_b",
        "Bearer " + "x" * 9999,
    ],
)
def test_a_header_that_holds_no_key_is_unauthorized_without_asking_the_database(header: str | None) -> None:
    world = World()
    with pytest.raises(RequestRefused) as caught:
        asyncio.run(world.store.authenticate(header, "ingest"))
    assert (caught.value.status, caught.value.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert world.rows.finds == 0


@scenario
async def test_every_reason_for_unauthorized_gets_the_same_answer(world: World) -> None:
    revoked, unknown = world.rows.add("ingest", revoked=True), generate_key()
    answers = []
    for header in (None, "nonsense", f"Bearer {revoked.text}", f"Bearer {unknown.text}"):
        with pytest.raises(RequestRefused) as caught:
            await world.store.authenticate(header, "ingest")
        answers.append((caught.value.status, caught.value.problem, caught.value.headers))
    assert all(answer == answers[0] for answer in answers)


@scenario
async def test_a_revocation_holds_after_five_seconds_at_most(world: World) -> None:
    key = world.rows.add("ingest")
    assert isinstance(await world.ask(key), Principal)
    world.rows.revoke(key)
    world.now_s += FRESH_S + 0.001
    assert await world.ask(key) == 401


@scenario
async def test_a_fresh_key_costs_one_look_up_whatever_the_traffic(world: World) -> None:
    key = world.rows.add("ingest")
    await asyncio.gather(*(world.ask(key) for _ in range(100)))
    world.now_s += FRESH_S
    await world.ask(key)
    assert world.rows.finds == 1


@scenario
async def test_during_an_outage_recently_verified_keys_work_for_five_minutes(world: World) -> None:
    key, stranger = world.rows.add("ingest"), world.rows.add("ingest")
    await world.ask(key)
    world.rows.away = True
    world.now_s += 10
    assert isinstance(await world.ask(key), Principal)
    assert await world.ask(stranger) == 503
    world.now_s += OUTAGE_S - 10.001
    assert isinstance(await world.ask(key), Principal)
    world.now_s += 1
    assert await world.ask(key) == 503
    assert await world.ask(f"Bearer tmk_{key.key_id}_{stranger.text[-43:]}") == 503


@scenario
async def test_during_an_outage_a_wrong_secret_stays_wrong(world: World) -> None:
    key = world.rows.add("ingest")
    await world.ask(key)
    world.rows.away = True
    world.now_s += 10
    assert await world.ask(f"Bearer tmk_{key.key_id}_{generate_key().text[-43:]}") == 401


@scenario
async def test_during_an_outage_requests_do_not_each_wait_for_the_database(world: World) -> None:
    key = world.rows.add("ingest")
    await world.ask(key)
    world.rows.away = True
    world.now_s += 10
    for _ in range(50):
        await world.ask(key)
    assert world.rows.finds <= 3


@scenario
async def test_after_an_outage_a_revocation_holds_again(world: World) -> None:
    key = world.rows.add("ingest")
    await world.ask(key)
    world.rows.away = True
    world.now_s += 10
    await world.ask(key)
    assert world.store.away_s() > 0
    world.rows.away = False
    world.rows.revoke(key)
    world.now_s += FRESH_S
    assert await world.ask(key) == 401
    assert world.store.away_s() == 0


@scenario
async def test_use_is_noted_once_a_minute_and_only_for_the_right_secret(world: World) -> None:
    key = world.rows.add("ingest")
    await world.ask(f"Bearer tmk_{key.key_id}_{generate_key().text[-43:]}")
    assert world.rows.touched == []
    for _ in range(10):
        await world.ask(key)
    assert world.rows.touched == [key.key_id]
    world.now_s += 60
    await world.ask(key)
    assert world.rows.touched == [key.key_id] * 2


def test_keys_are_random_and_only_their_hash_is_kept() -> None:
    first, second = generate_key(), generate_key()
    assert first.text != second.text
    assert first.key_id != second.key_id
    assert first.text.startswith(f"tmk_{first.key_id}_")
    assert len(first.text.rsplit("_", 1)[0]) >= 20
    assert len(first.secret_sha256) == 32
