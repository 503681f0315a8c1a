"""A webhook event as handlers see it, and what a handler is.

A handler of the product has two parts, because what Stripe is asked must not happen inside a transaction:

1. ``fetch`` asks Stripe, if it has to; it changes nothing here and may be repeated;
2. ``apply`` runs inside the transaction that also says ``succeeded``, so its effect happens once, whatever is
   killed when. It returns what has to leave (ops events) through the outbox.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import psycopg
import stripe

from services.wire.records import OutboxRow

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """One event of Stripe. ``data`` is the snapshot's ``data.object``; empty for a thin event."""

    event_id: str
    endpoint: str
    account: str
    event_type: str
    object_id: str
    is_thin: bool
    livemode: bool
    created_at: datetime
    data: Mapping[str, Any]
    previous: Mapping[str, Any]


class Refused(Exception):
    """The event can never be handled, however often it is tried: its run is dead at once, for ``code``."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Unfinished(Exception):
    """What ``apply`` did stays done, but not all of it could be yet: the run is tried again, for ``code``."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


Fetch = Callable[[WebhookEvent, stripe.StripeClient], Any]
Apply = Callable[[Connection, WebhookEvent, Any, datetime], Sequence[OutboxRow]]


def nothing(_: WebhookEvent, __: stripe.StripeClient) -> None:
    """For handlers to whom the event says all."""


@dataclass(frozen=True, slots=True)
class Handler:
    """What the product does with events of ``types``, each written out.

    ``is_state``: the event tells how its object is now, so an older one changes nothing (``stale``) and
    events of one object are handled in their order. False: it tells a fact of its own, that is never stale.

    ``apply`` gets the connection in its transaction, the event, what ``fetch`` returned, and the time.
    """

    types: tuple[str, ...]
    apply: Apply
    fetch: Fetch = nothing
    is_state: bool = True


class FailReported(Protocol):
    """Fails intents that Stripe rejected after accepting them, by identifier and code; returns which.

    Writes their ops events to the outbox of ``producer`` itself, inside the caller's transaction.
    """

    def __call__(
        self, db: Connection, codes: Mapping[str, str], *, source: str, now: datetime, producer: str
    ) -> list[str]: ...
