"""Intake: what the bridge wrote becomes events and runs, in one transaction with the position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from services.streaming.chunks import RawRecord
from services.streaming.recording import Found, Recorder
from services.webhooks.handling import Connection, Handler
from services.webhooks.own import BUILT_IN, UserHandler
from services.webhooks.reading import Facts, facts_of
from services.webhooks.store import Delivered, NewRun, store
from services.wire.codec import Decoder
from services.wire.errors import UnknownSchema
from services.wire.ops import DISPATCHER


class Intake(Recorder[Facts]):
    """The chunk handler of the dispatcher's group. ``handlers`` by event type."""

    group = DISPATCHER
    told = ("webhook_dead_lettered", "webhook_record")

    def __init__(
        self,
        decoder: Decoder,
        handlers: Mapping[str, Handler],
        own: Sequence[UserHandler],
        *,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(clock)
        self._decoder = decoder
        self._handlers = handlers
        self._own = own

    def read(self, raw: RawRecord) -> Facts:
        """The envelope, and the event in its body.

        Raises:
            Poison: one of them is none.
        """
        schema, record = self._decoder.decode(raw.value or b"")
        if schema.subject != "stripe_webhook":
            raise UnknownSchema("unknown_schema", "not a stripe_webhook")
        return facts_of(record)

    def store(self, db: Connection, found: Sequence[Found[Facts]], now: datetime) -> None:
        """Events, and a run for each handler."""
        events = _delivered(found)
        store(db, events, [run for one in events for run in self._runs(one.facts)], now)

    def _runs(self, facts: Facts) -> list[NewRun]:
        """One for the product, and one for each of a user's handlers that wants the type."""
        handler = self._handlers.get(facts.event_type)
        built_in = NewRun(
            facts.event_id, BUILT_IN, facts.subject(is_state=handler is None or handler.is_state)
        )
        return [
            built_in,
            *(
                NewRun(facts.event_id, one.name, facts.subject(is_state=one.is_state))
                for one in self._own
                if one.takes(facts.event_type)
            ),
        ]


def _delivered(found: Sequence[Found[Facts]]) -> list[Delivered]:
    """Each event once: a statement cannot touch one row twice. By id, so that locks are taken in order."""
    events: dict[str, Delivered] = {}
    for one in found:
        event_id = one.record.event_id
        known = events.get(event_id)
        if known is None:
            events[event_id] = Delivered(one.record, 1, one.topic, one.partition, one.offset)
        else:
            events[event_id] = replace(known, deliveries=known.deliveries + 1)
    return [events[event_id] for event_id in sorted(events)]
