"""Counters, the push and the reconciler on one PostgreSQL and one simulated Stripe, without Kafka."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from services.pusher import journal
from services.reconciler.running import Limits, reconcile
from services.streaming.database import BULK_OPTIONS, Database
from services.streaming.outbox import unpack
from services.streaming.reconciliation import Asked, Item, State, Summary, summarise
from services.stripe_simulator import SimulatorConfig
from services.wire.codec import Decoder
from services.wire.settings import load_settings
from services.wire.stripe_reader import StripeReader
from tests.integration.books import Books, open_books
from tests.integration.pushing import KEY, World, open_world

HOUR = timedelta(hours=1)


def hours_ago(number: float, at: datetime | None = None) -> str:
    """ISO text of the middle of an hour that many hours before the one that goes on."""
    start = (at or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0, tzinfo=None)
    return (start - number * HOUR + timedelta(minutes=7)).isoformat()


@dataclass
class Scene:
    """One tenant with its books, a journal with a real sender, a Stripe, and whoever compares them."""

    books: Books
    world: World
    dsn: str
    limits: Limits
    read: int = 0

    # -- Usage ---------------------------------------------------------------------------------------

    def use(self, key: str, at: str, quantity: str | int = 1, meter: str = "requests", **more: Any) -> None:
        self.books.now = self.world.now().replace(tzinfo=None).isoformat()
        self.books.count(self.books.use(key, at, quantity, meter, **more))

    def close(self) -> int:
        """Close what is dirty, and hand the deltas to the journal; how many there were."""
        self.books.now = self.world.now().replace(tzinfo=None).isoformat()
        self.books.close()
        rows = self.books.db.execute(
            "SELECT outbox_id, value FROM outbox WHERE topic = 'deltas.v1' AND outbox_id > %s ORDER BY 1",
            (self.read,),
        ).fetchall()
        self.read = max((row[0] for row in rows), default=self.read)
        decoder = Decoder()
        deltas = [decoder.decode(bytes(value))[1] for row in rows for _, value in unpack(row[1])]
        if deltas:
            with self.books.db.transaction():
                journal.record_intents(self.books.db, deltas)
        return len(deltas)

    def send(self) -> None:
        """Let a real sender work until nothing is due."""

        async def go() -> None:
            async with self.world.sending():
                for _ in range(600):
                    if not set(self.world.states()) & {"pending", "in_flight"}:
                        return
                    await asyncio.sleep(0.02)

        asyncio.run(go())

    def bill(self) -> None:
        """Close and send until both have nothing to do."""
        while self.close():
            self.send()

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        cursor = self.books.db.execute(query, values)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []

    def damage(self, query: str, *values: Any) -> None:
        """As somebody with every right would: no trigger of ours keeps it back. One row at least."""
        with self.books.db.transaction():
            self.books.db.execute("SET LOCAL session_replication_role = replica")
            assert self.books.db.execute(query, values).rowcount > 0, query  # type: ignore[arg-type]

    # -- Reconciliation ------------------------------------------------------------------------------

    def reconcile(
        self, *, asked: Asked | None = None, base: str | None = None, timeout_s: float = 5
    ) -> Counter[State]:
        """One run; ``base``: another Stripe."""

        async def go() -> Counter[State]:
            stripe = StripeReader(KEY, api_base=base or self.world.stripe.url, timeout_seconds=timeout_s)
            database = Database(self.dsn, "reconcile-test", BULK_OPTIONS)
            try:
                return await reconcile(database, stripe, asked or Asked(), self.limits, clock=self.world.now)
            finally:
                await stripe.close()
                database.reset()

        return asyncio.run(go())

    def summary(self, **asked: Any) -> Summary:
        return summarise(self.books.db, Asked(**asked), load_settings(), now=self.world.now())

    def found(self, meter: str = "requests", customer: str = "cus_1", **more: Any) -> Item:
        """Reconcile; the one finding of this customer and meter."""
        self.reconcile(**more)
        return self.stored(meter, customer)

    def stored(self, meter: str = "requests", customer: str = "cus_1") -> Item:
        [item] = [
            one for one in self.summary().periods if (one.metric, one.customer_ref) == (meter, customer)
        ]
        return item

    def causes(self, item: Item) -> list[tuple[str | None, str, Decimal]]:
        return [
            (None if one.hour is None else f"{one.hour:%Y-%m-%dT%H}", one.cause, one.amount)
            for one in item.findings
        ]

    def patient(self, seconds: float) -> None:
        self.limits = replace(self.limits, patience=timedelta(seconds=seconds))


@contextmanager
def open_scene(dsn: str, config: SimulatorConfig | None = None) -> Iterator[Scene]:
    """A tenant with the meter ``requests``; Stripe shows at once what it took, and has all the time."""
    now = datetime.now(UTC).replace(tzinfo=None).isoformat()
    with open_world(dsn, config) as world, open_books(dsn, now=now) as books:
        books.db.execute("TRUNCATE deltas, item_periods, buckets, items, outbox")
        scene = Scene(books, world, dsn, Limits.from_settings(load_settings()))
        scene.limits = replace(scene.limits, patience=timedelta(0))
        for customer in (*(f"cus_{number}" for number in range(20)), "cus_missing"):
            map_customer(scene, customer, customer)
        declare(scene, "requests")
        yield scene


def map_customer(scene: Scene, ref: str, stripe_customer: str) -> None:
    """With billing periods that began 20 days ago, whatever day of the month it is."""
    anchor = scene.world.now().replace(minute=0, second=0, microsecond=0) - timedelta(days=20)
    scene.sql(
        "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) "
        "VALUES ('acme', %s, %s, %s)",
        ref,
        stripe_customer,
        f"1 month UTC {anchor:%Y-%m-%dT%H:%M:%SZ}",
    )


def declare(scene: Scene, slug: str, aggregation: str = "sum", **columns: Any) -> None:
    """A meter here and at Stripe; with 35 days of lateness, so that no event needs a person."""
    scene.books.meter(slug, aggregation, lateness_seconds=35 * 86_400, **columns)
    formula = "last" if aggregation == "last" else "sum"
    scene.world.stripe.seed(
        meters=[{"id": f"mtr_{slug}", "event_name": slug, "default_aggregation": {"formula": formula}}]
    )
