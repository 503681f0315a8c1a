"""Webhooks delivered and dispatched, for tests: a real PostgreSQL, a clock that leaps, planted handlers."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from schemas.catalog import current
from services.streaming import offsets
from services.streaming.chunks import Chunk, Partition
from services.streaming.worker import Applied
from services.webhooks.deciding import Policy
from services.webhooks.dispatching import BuiltIn, Dispatcher, by_type
from services.webhooks.handling import Handler, WebhookEvent
from services.webhooks.intake import Intake
from services.webhooks.own import UserHandler
from services.webhooks.stripe_access import StripeAccess
from services.wire.codec import Decoder, Encoder
from services.wire.ops import DISPATCHER
from services.wire.records import OutboxRow
from tests.oracle import unframe
from tests.pipeline import until
from tests.records import Raw

TOPIC = "stripe_webhooks.v1"
#: Of the first event of a test: Stripe tells whole seconds.
T0 = 1_790_000_000

EFFECTS = "CREATE TABLE effects (n bigint GENERATED ALWAYS AS IDENTITY, event_id text, note text)"


def snapshot(
    event_id: str, event_type: str = "thing.changed", object_id: str = "obj_1", at: int = 0, **extra: Any
) -> dict[str, Any]:
    """A snapshot event, made ``at`` seconds after the test's beginning."""
    return {
        "id": event_id,
        "object": "event",
        "type": event_type,
        "created": T0 + at,
        "livemode": False,
        "data": {"object": {"id": object_id, "note": event_id}},
        **extra,
    }


def thin(event_id: str, event_type: str, object_id: str, created: str, **extra: Any) -> dict[str, Any]:
    """A thin event, which holds no object."""
    return {
        "id": event_id,
        "object": "v2.core.event",
        "type": event_type,
        "created": created,
        "livemode": False,
        "related_object": {"id": object_id, "type": "thing", "url": f"/v2/things/{object_id}"},
        **extra,
    }


def envelope(body: dict[str, Any] | bytes, **changes: Any) -> bytes:
    """What the bridge writes for a body."""
    event = body if isinstance(body, dict) else {}
    found = event.get("related_object") or event.get("data", {}).get("object") or {}
    record = {
        "endpoint": "main",
        "event_id": event.get("id", ""),
        "event_type": event.get("type", ""),
        "object_id": found.get("id", ""),
        "received_at": (T0 + 1) * 1_000_000,
        "body": body if isinstance(body, bytes) else json.dumps(body).encode(),
        **changes,
    }
    return Encoder(current("stripe_webhook")).encode(record)


class Clock:
    """Real time, and what the test let pass."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def leap(self, **by: float) -> None:
        self.ahead += timedelta(**by)


def note(db: psycopg.Connection[Any], event: WebhookEvent, found: Any, _: datetime) -> Sequence[OutboxRow]:
    """The effect of a planted handler: a row."""
    db.execute("INSERT INTO effects (event_id, note) VALUES (%s, %s)", (event.event_id, found))
    return ()


def planted(*types: str, **parts: Any) -> Handler:
    """A handler whose effect is a row."""
    return Handler(**{"types": types or ("thing.changed",), "apply": note, **parts})


QUICK = Policy(attempts_max=3, retry_seconds=0.05, retry_max_seconds=0.05, timeout_seconds=20)


class Desk:
    """One database of webhooks: deliver events, run dispatchers, look."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.clock = Clock()
        self.offset = itertools.count()
        self.broken: list[BaseException] = []
        self.query(EFFECTS)

    def query(self, text: str, *arguments: Any) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as db:
            cursor = db.execute(text, arguments)
            return cursor.fetchall() if cursor.description else []

    def intake(self, handlers: Sequence[Handler] = (), own: Sequence[UserHandler] = ()) -> Intake:
        decoder = Decoder()
        return Intake(decoder, by_type(handlers), own, clock=self.clock)

    def deliver(
        self,
        *bodies: dict[str, Any] | bytes,
        handlers: Sequence[Handler] = (planted(),),
        own: Sequence[UserHandler] = (),
        partition: int = 0,
        first_offset: int | None = None,
    ) -> Applied:
        """One chunk, as the worker hands it over. Bytes are a record's whole value."""
        records = [
            Raw(
                next(self.offset) if first_offset is None else first_offset + index,
                body if isinstance(body, bytes) else envelope(body),
            )
            for index, body in enumerate(bodies)
        ]
        tp = Partition(TOPIC, partition)
        intake = self.intake(handlers, own)
        with psycopg.connect(self.dsn, autocommit=True) as db:
            offsets.ensure_positions(db, DISPATCHER, {tp: 0})
            return intake.apply(db, intake.prepare(Chunk(tp, records)))

    @contextlib.contextmanager
    def dispatching(
        self,
        *handlers: Handler,
        own: Sequence[UserHandler] = (),
        policy: Policy = QUICK,
        concurrency: int = 4,
        stripe_base: str = "http://127.0.0.1:1",
        chance: Callable[[], float] = lambda: 1.0,
    ) -> Iterator[Dispatcher]:
        """A dispatcher at work."""
        access = StripeAccess("sk_test_webhooks", api_base=stripe_base, timeout_seconds=5)
        dispatcher = Dispatcher(
            self.dsn,
            BuiltIn(by_type(handlers or (planted(),)), access),
            own,
            policy=policy,
            concurrency=concurrency,
            clock=self.clock,
            chance=chance,
            broken=lambda _, error: self.broken.append(error),
        )
        dispatcher.start()
        try:
            yield dispatcher
        finally:
            dispatcher.stop()
            assert self.broken == []

    # -- Looking -------------------------------------------------------------------------------------

    def states(self, handler: str = "tidemeter") -> dict[str, str]:
        return dict(self.query("SELECT event_id, state FROM webhook_runs WHERE handler = %s", handler))

    def run(self, event_id: str, handler: str = "tidemeter") -> tuple[Any, ...]:
        """State, attempts, class and code of the error."""
        [row] = self.query(
            "SELECT state, attempts, error_class, error_code FROM webhook_runs "
            "WHERE event_id = %s AND handler = %s",
            event_id,
            handler,
        )
        return tuple(row)

    def effects(self) -> list[str]:
        """Events whose effect happened, in order."""
        return [row[0] for row in self.query("SELECT event_id FROM effects ORDER BY n")]

    def outbox(self, topic: str = "ops.v1") -> list[dict[str, Any]]:
        """What waits for Kafka: ops events decoded, other records with their headers."""
        rows = self.query(
            "SELECT value, headers FROM outbox WHERE producer = %s AND topic = %s ORDER BY outbox_id",
            DISPATCHER,
            topic,
        )
        if topic == "ops.v1":
            return [unframe("ops_event", 1, row[0]) for row in rows]
        return [{"value": row[0], **row[1]} for row in rows]

    def until_settled(self, timeout_s: float = 30) -> None:
        until(
            lambda: not self.query("SELECT 1 FROM webhook_runs WHERE settled_at IS NULL LIMIT 1"),
            "every run settled",
            timeout_s,
            lambda: str(self.query("SELECT * FROM webhook_runs WHERE settled_at IS NULL LIMIT 20")),
        )

    def until_state(self, event_id: str, state: str, handler: str = "tidemeter") -> None:
        until(
            lambda: self.run(event_id, handler)[0] == state,
            f"{event_id} {state}",
            30,
            lambda: str(self.query("SELECT * FROM webhook_runs")),
        )


class Gate:
    """A place where a handler waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_through(self, *_: Any) -> None:
        self.reached.set()
        assert self.opened.wait(30)
