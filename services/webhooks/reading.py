"""From a record of stripe_webhooks.v1 to the facts of an event. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from services.webhooks.handling import WebhookEvent
from services.wire.codec import Record
from services.wire.errors import Undecodable
from services.wire.times import instant

#: Stripe documents at most 255 characters for an id; PostgreSQL does not index long texts.
TEXT_CHARS_MAX = 255


@dataclass(frozen=True, slots=True)
class Facts:
    """One delivered event, as it is stored. ``body`` is what Stripe signed, byte for byte."""

    event_id: str
    endpoint: str
    account: str
    event_type: str
    object_id: str
    is_thin: bool
    livemode: bool
    created_at: datetime
    received_at: datetime
    body: bytes

    def subject(self, *, is_state: bool) -> str:
        """What this event is handled in order with: its object, or only itself.

        With the account: all accounts share the id of an application.
        """
        name = self.object_id if is_state and self.object_id else self.event_id
        return json.dumps([self.account, name], separators=(",", ":"), ensure_ascii=False)


class _Body(msgspec.Struct):
    id: str
    object: Literal["event", "v2.core.event"]
    type: str
    created: int | str
    livemode: bool = False
    account: str | None = None
    context: str | None = None
    data: Any = None


_BODY = msgspec.json.Decoder(_Body)


def facts_of(envelope: Record) -> Facts:
    """The event in an envelope.

    Raises:
        Undecodable: the body is no event of Stripe, or not the one that the envelope names.
    """
    body = _body_of(envelope["body"])
    if (body.id, body.type) != (envelope["event_id"], envelope["event_type"]):
        raise Undecodable("invalid_webhook", "the envelope names another event")
    if body.object == "event":
        _snapshot(body)
    texts = {
        "event_id": body.id,
        "endpoint": envelope["endpoint"],
        "account": body.account or body.context or "",
        "event_type": body.type,
        "object_id": envelope["object_id"],
    }
    if not body.id or not body.type or not all(map(_storable, texts.values())):
        raise Undecodable("invalid_webhook", "a text that cannot be stored")
    return Facts(
        **texts,
        is_thin=body.object != "event",
        livemode=body.livemode,
        created_at=_created(body.created),
        received_at=_moment(envelope["received_at"]),
        body=envelope["body"],
    )


def event_of(facts: Facts) -> WebhookEvent:
    """The event as handlers see it: decoded anew for each attempt, so that no handler changes another's.

    Raises:
        Undecodable: as :func:`facts_of`.
    """
    data, previous = ({}, {}) if facts.is_thin else _snapshot(_body_of(facts.body))
    return WebhookEvent(
        event_id=facts.event_id,
        endpoint=facts.endpoint,
        account=facts.account,
        event_type=facts.event_type,
        object_id=facts.object_id,
        is_thin=facts.is_thin,
        livemode=facts.livemode,
        created_at=facts.created_at,
        data=data,
        previous=previous,
    )


def _body_of(body: bytes) -> _Body:
    try:
        return _BODY.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Undecodable("invalid_webhook", type(error).__name__) from None


def _snapshot(body: _Body) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    data = body.data if isinstance(body.data, dict) else {}
    found, previous = data.get("object"), data.get("previous_attributes") or {}
    if not isinstance(found, dict) or not isinstance(previous, dict):
        raise Undecodable("invalid_webhook", "a snapshot without its object")
    return found, previous


def _storable(text: str) -> bool:
    return len(text) <= TEXT_CHARS_MAX and "\x00" not in text


def _created(created: int | str) -> datetime:
    """Unix seconds of a snapshot; RFC 3339 of a thin event."""
    if isinstance(created, int):
        return _moment(created * 1_000_000)
    try:
        moment = datetime.fromisoformat(created)
        if moment.tzinfo is None:
            raise Undecodable("invalid_webhook", "a time without its zone")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise Undecodable("invalid_webhook", "no time") from None


def _moment(at_us: int) -> datetime:
    try:
        return instant(at_us)
    except OverflowError:
        raise Undecodable("invalid_webhook", "no time") from None
