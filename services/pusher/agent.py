"""The pusher process: deltas become intents in one transaction with the position; the sender sends them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import structlog

from schemas.catalog import check_catalog
from services.pusher.intents import intent_of
from services.pusher.journal import Connection, record_intents
from services.pusher.ops import PRODUCER
from services.pusher.sender import Sender, SenderConfig
from services.pusher.sinks import Sink
from services.pusher.sinks.stripe import StripeSink
from services.pusher.sinks.stripe_stream import StripeStreamSink
from services.pusher.sinks.webhook import WebhookSink
from services.streaming import outbox
from services.streaming.chunks import RawRecord
from services.streaming.observe import Health
from services.streaming.recording import Found, Recorder
from services.streaming.redriving import Redrives, redrive_forever
from services.streaming.worker import Worker
from services.wire.codec import Decoder, Record
from services.wire.errors import Undecodable, UnknownSchema
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.topics import DELTAS
from upcasters.chain import (
    InvalidAfterUpcast,
    MissingUpcaster,
    UpcasterFailed,
    Upcasters,
    check_chain,
    revision,
    upcasters,
)

log = structlog.get_logger(__name__)

GROUP = PRODUCER


class Intents(Recorder[Record]):
    """The chunk handler of the pusher group: deltas become intents."""

    group = GROUP
    told = ("delta_dead_lettered", "delta_record")

    def __init__(self, decoder: Decoder, upcasters: Upcasters) -> None:
        super().__init__()
        self._decoder = decoder
        self._upcasters = upcasters

    def read(self, raw: RawRecord) -> Record:
        """One delta, of whatever released version: older ones wait in the topic at an upgrade.

        Raises:
            Poison: it is none that an intent can be made of.
        """
        try:
            schema, record = self._decoder.decode(raw.value or b"")
            if schema.subject != "usage_delta":
                raise UnknownSchema("unknown_schema", "not a usage_delta")
            record = self._upcasters.to_current(schema.subject, schema.version, record)
            intent_of(record)  # what no intent can hold is refused here, not when it is stored
        except (OverflowError, ValueError, ArithmeticError) as error:
            raise Undecodable("invalid_delta", type(error).__name__) from None
        except (MissingUpcaster, UpcasterFailed, InvalidAfterUpcast) as error:
            raise Undecodable("upcaster_error", type(error).__name__) from None
        return record

    def store(self, db: Connection, found: Sequence[Found[Record]], now: datetime) -> None:
        """As intents.

        Raises:
            Broken: a known identifier comes with other content.
        """
        record_intents(db, [one.record for one in found])


def sink_of(settings: Settings) -> Sink:
    """The sink that the operator chose.

    Raises:
        Misconfigured: no Stripe key, or a live one that was not allowed; a webhook without address or secret.
    """
    if settings.sink == "webhook":
        url, secret = settings.webhook_sink()
        return WebhookSink(url, secret=secret, timeout_seconds=settings.stripe_timeout_seconds)
    return (StripeStreamSink if settings.streams else StripeSink).from_settings(settings)


async def run(settings: Settings, sink: Sink | None = None) -> None:
    """Run one pusher until it is told to stop.

    Raises:
        Misconfigured: as :func:`sink_of`.
    """
    check_catalog()
    chain = upcasters()
    check_chain(chain)
    sink = sink or sink_of(settings)
    health = Health()
    sender = Sender(settings.postgres(), sink, SenderConfig.from_settings(settings))
    health.checks["sender"] = sender.check
    health.checks["meters"] = sender.paused_meters.check
    intents = Intents(decoder_for(settings), chain)
    redrives = Redrives(GROUP, intents.retry, tried_with=revision())
    worker = Worker(
        settings,
        group=GROUP,
        topics=[DELTAS],
        handler=intents,
        health=health,
        after_apply=sender.wake,
    )
    try:
        await worker.run(
            sender.run,
            lambda: outbox.relay_forever(settings, GROUP),
            lambda: redrive_forever(settings, redrives),
        )
    finally:
        await sink.close()
