"""Error reports of meters: usage that Stripe took, and rejected afterwards.

A report names samples. The intents among them fail, each once, and a meter that Stripe does not have, or has
archived, is paused. Of what is not named only the number is known: reconciliation finds it.

A report may come before the answer to the call is in the journal, or that answer got lost. Such an intent is
still to become ``reported``, so the run is tried again until none that is named is under way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import stripe
import structlog

from services.webhooks.handlers.reading import Object, at, code, objects
from services.webhooks.handling import Connection, FailReported, Handler, Refused, Unfinished, WebhookEvent
from services.wire.ops import DISPATCHER
from services.wire.records import OutboxRow

log = structlog.get_logger(__name__)

#: What ops events say who told.
SOURCE = "webhook"

_TYPES = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")

#: Asked before any is failed: what is reported in between is found by the next attempt.
_UNDER_WAY = """
    SELECT count(*) FROM meter_events WHERE identifier = ANY(%s) AND state IN ('in_flight', 'in_doubt')
    """

#: Our identifiers hold no hyphen. An Idempotency-Key of ours is the identifier and, once an answer proved
#: that it had no effect, how often that was: ``<identifier>-2``.
_KEY = re.compile(r"([A-Za-z0-9_]{1,100})(?:-[0-9]{1,9})?")


def handlers(fail_reported: FailReported) -> list[Handler]:
    """``fail_reported`` is the pusher's; services do not import each other."""

    def apply(db: Connection, event: WebhookEvent, fetched: Object | None, now: datetime) -> list[OutboxRow]:
        if fetched is None:
            log.info("a meter's errors are not ours", event_id=event.event_id)
            return []
        named = list(_samples(fetched))
        codes: dict[str, str] = {}
        for identifier, reason in named:
            if identifier is not None and reason is not None:
                codes.setdefault(identifier, reason)
        row = db.execute(_UNDER_WAY, (sorted(codes),)).fetchone() if codes else None
        under_way = row[0] if row else 0
        failed = fail_reported(db, codes, source=SOURCE, now=now, producer=DISPATCHER) if codes else []
        log.warning(
            "meter errors reported",
            event_id=event.event_id,
            errors=_number(at(fetched, "reason", "error_count")),
            named=len(named),
            failed=len(failed),
            under_way=under_way,
            ignored=len(named) - len(failed) - under_way,
        )
        if under_way:
            raise Unfinished("intent_under_way")
        return []

    return [Handler(_TYPES, apply, _fetch, is_state=False)]


def _fetch(event: WebhookEvent, client: stripe.StripeClient) -> Object | None:
    """The data of the whole event; None for a connected account, to which nothing of ours is sent.

    Raises:
        Refused: Stripe does not have it any more, or has another.
        stripe.StripeError: anything else that keeps us from reading it.
    """
    if event.account:
        return None
    try:
        found: Any = client.v2.core.events.retrieve(event.event_id)
    except stripe.InvalidRequestError as error:
        if error.http_status == 404:
            raise Refused("event_not_found") from None
        raise
    whole = found.to_dict()
    if at(whole, "id") != event.event_id or at(whole, "type") != event.event_type:
        raise Refused("shape_event")
    data = at(whole, "data")
    if not isinstance(at(data, "reason", "error_types"), list):
        raise Refused("shape_reason_error_types")
    return data  # type: ignore[no-any-return]


def _samples(data: Object) -> Iterator[tuple[str | None, str | None]]:
    """(identifier, code) of each sample; None for what cannot be one of ours, or cannot be kept."""
    for kind in objects(at(data, "reason", "error_types")):
        reason = code(at(kind, "code"))
        for sample in objects(at(kind, "sample_errors")):
            request = at(sample, "request")
            yield _identifier(at(request, "identifier") or at(request, "idempotency_key")), reason


def _identifier(named: Any) -> str | None:
    """The identifier that a request is named by: itself, or the Idempotency-Key that was made of it."""
    match = _KEY.fullmatch(named) if isinstance(named, str) else None
    return None if match is None else match[1]


def _number(found: Any) -> int | None:
    return found if isinstance(found, int) else None
