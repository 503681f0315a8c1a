"""Events about the account: kept for 30 days, retrievable, and put on their way to who wants them.

Two kinds (docs.stripe.com/event-destinations): snapshot events of v1 carry the object as it was, under
`/v1/events`; thin events of v2 are pushed without `data` and fetched whole from `/v2/core/events/{id}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from services.stripe_simulator.deliveries import Deliveries
from services.stripe_simulator.destinations import Destinations, Payload
from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.meters import new_id
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.store import Store

RETRIEVABLE_SECONDS = 30 * 24 * 3600
LISTED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Kept:
    """One event, whole, and its place in the log."""

    sequence: int
    body: Json


class EventLog:
    def __init__(
        self, store: Store, destinations: Destinations, deliveries: Deliveries, version: str
    ) -> None:
        self._store = store
        self._destinations = destinations
        self._deliveries = deliveries
        self._version = version

    def snapshot(self, event_type: str, about: Json, created: float, now: float) -> str:
        """A v1 event with the object as it is; returns its id."""
        body: Json = {
            "id": new_id("evt_test"),
            "object": "event",
            "api_version": self._version,
            "created": int(created),
            "data": {"object": about},
            "livemode": False,
            "pending_webhooks": len(self._destinations.wanting("snapshot", event_type)),
            "request": {"id": None, "idempotency_key": None},
            "type": event_type,
        }
        self._keep("snapshot", event_type, body, created)
        self._send("snapshot", event_type, body, now)
        return str(body["id"])

    def thin(
        self, event_type: str, data: Json | None, related: Json | None, created: float, now: float
    ) -> str:
        """A v2 event; what is pushed has no `data`, and `related_object` only when there is one."""
        body: Json = {
            "id": new_id("evt_test"),
            "object": "v2.core.event",
            "type": event_type,
            "livemode": False,
            "created": rfc3339(created),
            "context": None,
            **({"related_object": related} if related is not None else {}),
        }
        self._keep("thin", event_type, body | ({} if data is None else {"data": data}), created)
        self._send("thin", event_type, body, now)
        return str(body["id"])

    def resend(self, event_id: str, now: float) -> None:
        """Push a kept event once more, as the dashboard's button does."""
        row = self._store.read_one("SELECT kind, type, body FROM events WHERE id = ?", (event_id,))
        if row is None:
            raise missing_object("event", event_id, param="event", status=404)
        kind, event_type, encoded = row
        body = json.loads(encoded)
        if kind == "thin":
            body.pop("data", None)
        self._send(kind, event_type, body, now)

    def find(self, kind: Payload, event_id: str, now: float) -> Json:
        row = self._store.read_one(
            "SELECT body FROM events WHERE id = ? AND kind = ? AND created > ?",
            (event_id, kind, now - RETRIEVABLE_SECONDS),
        )
        if row is None:
            raise missing_object("event", event_id, param="id", status=404)
        found: Json = json.loads(row[0])
        return found

    def newest_first(self, kind: Payload, types: list[str], now: float) -> list[Kept]:
        """Those that can still be retrieved; no types means all of them."""
        rows = self._store.read(
            "SELECT sequence, body FROM events WHERE kind = :kind AND created > :since"
            " AND (:all OR type IN (SELECT value FROM json_each(:types)))"
            " ORDER BY sequence DESC LIMIT :limit",
            {
                "kind": kind,
                "since": now - RETRIEVABLE_SECONDS,
                "all": not types,
                "types": json.dumps(types),
                "limit": LISTED_MAX,
            },
        )
        return [Kept(sequence, json.loads(body)) for sequence, body in rows]

    def _keep(self, kind: Payload, event_type: str, body: Json, created: float) -> None:
        self._store.write(
            "INSERT INTO events (id, kind, type, created, body) VALUES (?, ?, ?, ?, ?)",
            (body["id"], kind, event_type, created, json.dumps(body)),
        )

    def _send(self, kind: Payload, event_type: str, body: Json, now: float) -> None:
        for destination in self._destinations.wanting(kind, event_type):
            self._deliveries.add(destination, event_type, body, now)
