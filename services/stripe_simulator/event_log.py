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
from services.stripe_simulator.ledger import Origin
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


@dataclass(frozen=True, slots=True)
class Occasion:
    """When something happened, when it is told, and the request that did it, if one did."""

    at: float
    now: float
    origin: Origin | None = None

    @classmethod
    def of(cls, origin: Origin) -> Occasion:
        return cls(origin.received_at, origin.received_at, origin)


class EventLog:
    def __init__(
        self, store: Store, destinations: Destinations, deliveries: Deliveries, version: str
    ) -> None:
        self._store = store
        self._destinations = destinations
        self._deliveries = deliveries
        self._version = version

    def snapshot(
        self, event_type: str, about: Json, when: Occasion, *, previous: Json | None = None, account: str = ""
    ) -> str:
        """A v1 event with the object as it is; returns its id.

        ``previous`` holds the old values of what changed; ``account`` is a connected account.
        """
        wanting = self._destinations.wanting("snapshot", event_type, account or None)
        request: Json = {"id": None, "idempotency_key": None}
        if when.origin is not None:
            request = {"id": when.origin.request_id, "idempotency_key": when.origin.idempotency_key}
        body: Json = {
            "id": new_id("evt_test"),
            "object": "event",
            **({"account": account} if account else {}),
            "api_version": self._version,
            "created": int(when.at),
            "data": {"object": about} | ({"previous_attributes": previous} if previous else {}),
            "livemode": False,
            "pending_webhooks": len(wanting),
            "request": request,
            "type": event_type,
        }
        self._keep("snapshot", event_type, body, when.at)
        self._send("snapshot", event_type, body, when.now)
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

    def find(self, kind: Payload, event_id: str, now: float, account: str | None = None) -> Json:
        """The event, if it can still be retrieved; of this connected account, or of the platform for None."""
        row = self._store.read_one(
            "SELECT body FROM events WHERE id = ? AND kind = ? AND created > ?",
            (event_id, kind, now - RETRIEVABLE_SECONDS),
        )
        found: Json = {} if row is None else json.loads(row[0])
        if not found or found.get("account") != account:
            raise missing_object("event", event_id, param="id", status=404)
        return found

    def newest_first(
        self, kind: Payload, types: list[str], now: float, account: str | None = None
    ) -> list[Kept]:
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
        kept = [Kept(sequence, json.loads(body)) for sequence, body in rows]
        return [one for one in kept if one.body.get("account") == account]

    def _keep(self, kind: Payload, event_type: str, body: Json, created: float) -> None:
        self._store.write(
            "INSERT INTO events (id, kind, type, created, body) VALUES (?, ?, ?, ?, ?)",
            (body["id"], kind, event_type, created, json.dumps(body)),
        )

    def _send(self, kind: Payload, event_type: str, body: Json, now: float) -> None:
        for destination in self._destinations.wanting(kind, event_type, body.get("account")):
            self._deliveries.add(destination, event_type, body, now)
