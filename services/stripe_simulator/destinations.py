"""Where events are sent: v1 webhook endpoints and v2 event destinations, their secrets, and their shapes.

As documented (docs.stripe.com/webhooks, docs.stripe.com/event-destinations): a v1 endpoint gets snapshot
events, a v2 destination snapshot or thin ones as it was created; a secret is told once, at creation; a rolled
secret stays valid for at most 24 hours beside its successor; an endpoint made with `connect` gets the events
of connected accounts and no others, one without it the platform's own (docs.stripe.com/connect/webhooks), and
`events_from` says the same of a v2 destination. Only webhook endpoints are simulated, and `http` is allowed
as in a sandbox. There is no API for rolling a secret, so tests do it through the control API.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, cast
from urllib.parse import urlsplit

from services.stripe_simulator.errors import ApiError, InvalidParameters, Json, missing_object
from services.stripe_simulator.forms import Params
from services.stripe_simulator.meters import METADATA_LENGTH_MAX, new_id
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.store import Store

Payload = Literal["snapshot", "thin"]
SELF, ACCOUNTS = "@self", "@accounts"  # whose events: the account's own, its connected accounts'
APPLICATION = "ca_simulator"  # of the platform, the same for all connected accounts
ROLL_SECONDS_MAX = 24 * 3600
DESTINATIONS_MAX = 16  # of one account (docs.stripe.com/webhooks)
EVENT_TYPES_MAX = 500
SECRET, URL = "webhook_endpoint.signing_secret", "webhook_endpoint.url"


@dataclass(frozen=True, slots=True)
class Destination:
    id: str
    url: str
    payload: Payload
    enabled_events: list[str]
    created: float
    secret: str
    name: str = ""
    description: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    enabled: bool = True
    old_secret: str | None = None
    old_secret_until: float = 0.0
    events_from: list[str] = field(default_factory=lambda: [SELF])

    def wants(self, payload: Payload, event_type: str, account: str | None = None) -> bool:
        """`account` is the connected account of the event; None stands for the platform's own."""
        if not self.enabled or payload != self.payload:
            return False
        if (SELF if account is None else ACCOUNTS) not in self.events_from:
            return False
        return event_type in self.enabled_events or "*" in self.enabled_events

    def secrets_at(self, now: float) -> list[str]:
        """Every secret that signs at this moment, the newest first."""
        if self.old_secret is not None and now < self.old_secret_until:
            return [self.secret, self.old_secret]
        return [self.secret]

    def to_v1(self, *, with_secret: bool = False) -> Json:
        return {
            "id": self.id,
            "object": "webhook_endpoint",
            "api_version": None,
            "application": APPLICATION if ACCOUNTS in self.events_from else None,
            "created": int(self.created),
            "description": self.description,
            "enabled_events": self.enabled_events,
            "livemode": False,
            "metadata": self.metadata,
            **({"secret": self.secret} if with_secret else {}),
            "status": "enabled" if self.enabled else "disabled",
            "url": self.url,
        }

    def to_v2(self, include: list[str]) -> Json:
        """Secret and URL are redacted unless they are asked for."""
        return {
            "id": self.id,
            "object": "v2.core.event_destination",
            "created": rfc3339(self.created),
            "description": self.description or "",
            "enabled_events": self.enabled_events,
            "event_payload": self.payload,
            "events_from": self.events_from,
            "livemode": False,
            "metadata": self.metadata,
            "name": self.name,
            "status": "enabled" if self.enabled else "disabled",
            "status_details": None if self.enabled else {"disabled": {"reason": "user"}},
            "type": "webhook_endpoint",
            "updated": rfc3339(self.created),
            "webhook_endpoint": {
                "signing_secret": self.secret if SECRET in include else None,
                "url": self.url if URL in include else None,
            },
        }


def new_secret() -> str:
    return f"whsec_{secrets.token_hex(16)}"


def read_endpoint(params: Params, now: float) -> Destination:
    """A new v1 webhook endpoint."""
    url, enabled_events = _url(params), _events(params)
    description = params.text("description")
    metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX) or {}
    connect = params.flag("connect")
    params.text("api_version")
    params.finish()
    return Destination(
        id=new_id("we_test"),
        url=url,
        payload="snapshot",
        enabled_events=enabled_events,
        created=now,
        secret=new_secret(),
        description=description,
        metadata=metadata,
        events_from=[ACCOUNTS] if connect else [SELF],
    )


def change_endpoint(params: Params, known: Destination) -> Destination:
    """A v1 webhook endpoint with the parameters that are named."""
    url = _url(params) if params.has("url") else known.url
    enabled_events = _events(params) if params.has("enabled_events") else known.enabled_events
    disabled = params.choice("disabled", ("true", "false"))
    description = params.text("description")
    metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX) or {}
    params.finish()
    return replace(
        known,
        url=url,
        enabled_events=enabled_events,
        enabled=known.enabled if disabled is None else disabled == "false",
        description=known.description if description is None else description,
        metadata=known.metadata | metadata,
    )


def read_destination(params: Params, now: float) -> tuple[Destination, list[str]]:
    """A new v2 event destination, and which redacted fields its answer shows."""
    name, include = params.required_text("name", length_max=250), params.texts("include")
    if params.choice("type", ("webhook_endpoint",)) is None:
        raise params.missing("type")
    payload = params.choice("event_payload", ("snapshot", "thin"))
    if payload is None:
        raise params.missing("event_payload")
    enabled_events = _events(params)
    endpoint = params.nested("webhook_endpoint")
    url = _url(endpoint)
    endpoint.finish()
    description = params.text("description")
    metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX) or {}
    events_from = params.texts("events_from") or [SELF]
    if not set(events_from) <= {SELF, ACCOUNTS}:
        message = f"Invalid events_from: must be of {SELF}, {ACCOUNTS}"
        raise InvalidParameters(message, param="events_from")
    params.text("snapshot_api_version")
    params.finish()
    destination = Destination(
        id=new_id("ed_test"),
        url=url,
        payload=cast(Payload, payload),
        enabled_events=enabled_events,
        created=now,
        secret=new_secret(),
        name=name,
        description=description,
        metadata=metadata,
        events_from=events_from,
    )
    return destination, include


def change_destination(params: Params, known: Destination) -> tuple[Destination, list[str]]:
    """A v2 event destination with the parameters that are named, and which redacted fields to show."""
    include, name, description = params.texts("include"), params.text("name"), params.text("description")
    enabled_events = _events(params) if params.has("enabled_events") else known.enabled_events
    url, moves = known.url, params.has("webhook_endpoint")
    endpoint = params.nested("webhook_endpoint")
    if moves:
        url = _url(endpoint)
    endpoint.finish()
    metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX) or {}
    params.finish()
    changed = replace(
        known,
        url=url,
        enabled_events=enabled_events,
        name=name or known.name,
        description=known.description if description is None else description,
        metadata=known.metadata | metadata,
    )
    return changed, include


def _url(params: Params) -> str:
    url = params.required_text("url")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidParameters("Invalid URL: an explicit scheme must be provided.", param=params.name("url"))
    return url


def _events(params: Params) -> list[str]:
    types = params.texts("enabled_events")
    if not types:
        raise params.missing("enabled_events")
    if len(types) > EVENT_TYPES_MAX:
        raise InvalidParameters(f"At most {EVENT_TYPES_MAX} event types.", param="enabled_events")
    return types


class Destinations:
    """All of them, oldest first; few and read for every event, so they live in memory too."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.known: dict[str, Destination] = {}
        self.load()

    def load(self) -> None:
        rows = self._store.read("SELECT body FROM destinations ORDER BY rowid")
        self.known = {one.id: one for one in (Destination(**json.loads(body)) for (body,) in rows)}

    def wanting(self, payload: Payload, event_type: str, account: str | None) -> list[Destination]:
        return [one for one in self.known.values() if one.wants(payload, event_type, account)]

    def find(self, destination_id: str) -> Destination:
        found = self.known.get(destination_id)
        if found is None:
            raise missing_object("webhook endpoint", destination_id, param="id", status=404)
        return found

    def keep(self, destination: Destination) -> None:
        if destination.id not in self.known and len(self.known) >= DESTINATIONS_MAX:
            raise ApiError(f"You have reached the maximum of {DESTINATIONS_MAX} webhook endpoints.")
        self.known[destination.id] = destination
        self._store.write(
            "INSERT INTO destinations VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (destination.id, json.dumps(asdict(destination))),
        )

    def remove(self, destination_id: str) -> None:
        self.find(destination_id)
        del self.known[destination_id]
        self._store.write("DELETE FROM destinations WHERE id = ?", (destination_id,))

    def roll(self, destination_id: str, now: float, keep_old_seconds: float) -> Destination:
        """A new secret; the old one signs too until `keep_old_seconds` have passed."""
        if not 0 <= keep_old_seconds <= ROLL_SECONDS_MAX:
            raise ValueError(f"keep_old_seconds must lie between 0 and {ROLL_SECONDS_MAX}")
        known = self.find(destination_id)
        rolled = replace(
            known, secret=new_secret(), old_secret=known.secret, old_secret_until=now + keep_old_seconds
        )
        self.keep(rolled)
        return rolled
