"""The dispatcher process: deliveries become events and runs in one transaction with the position; lanes run
them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime

import structlog

from schemas.catalog import check_catalog
from services.streaming import outbox
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.observe import Health
from services.streaming.redriving import Redrives, redrive_forever
from services.streaming.worker import Worker, crash
from services.webhooks.dispatching import BuiltIn, Dispatcher, by_type, utc_now
from services.webhooks.handlers import product_handlers
from services.webhooks.handling import Connection, FailReported, Handler
from services.webhooks.intake import Intake
from services.webhooks.own import load_user_handlers
from services.webhooks.stripe_access import StripeAccess
from services.wire.ops import DISPATCHER
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.topics import STRIPE_WEBHOOKS
from upcasters.chain import revision

PRUNE_EVERY_SECONDS = 86_400.0
PRUNE_RETRY_SECONDS = 300.0
PRUNE_LOCK = 0x7770

#: Deletes what may go by now. Operators ask for the same by command and by API.
Prune = Callable[[Connection, datetime], object]

log = structlog.get_logger(__name__)


async def run(
    settings: Settings,
    fail_reported: FailReported,
    prune: Prune,
    handlers: Sequence[Handler] | None = None,
) -> None:
    """Run one dispatcher until it is told to stop. ``handlers``: others than the product's.

    Raises:
        Misconfigured: no Stripe key, or a live one that was not allowed; a handler that cannot be loaded.
    """
    check_catalog()
    built_in = by_type(product_handlers(fail_reported) if handlers is None else handlers)
    own = load_user_handlers(settings.webhook_handlers)
    loop, relay = asyncio.get_running_loop(), asyncio.Event()
    dispatcher = Dispatcher.from_settings(
        settings,
        BuiltIn(built_in, StripeAccess.from_settings(settings)),
        own,
        on_outbox=lambda: _wake(loop, relay),
        broken=crash,
    )
    health = Health()
    health.checks["webhooks"] = dispatcher.check
    intake = Intake(decoder_for(settings), built_in, own, clock=utc_now)
    redrives = Redrives(DISPATCHER, intake.retry, tried_with=revision())
    worker = Worker(
        settings,
        group=DISPATCHER,
        topics=[STRIPE_WEBHOOKS],
        handler=intake,
        health=health,
        after_apply=dispatcher.wake,
    )
    await worker.run(
        dispatcher.run,
        lambda: outbox.relay_forever(settings, DISPATCHER, relay),
        lambda: redrive_forever(settings, redrives),
        lambda: _prune_daily(settings, prune),
    )


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(event.set)


async def _prune_daily(settings: Settings, prune: Prune) -> None:
    """At the start and once a day; of several processes that want to, one does."""
    database = Database(settings.postgres(), "prune")

    def prune_once() -> None:
        db = database.connection()
        [locked] = db.execute("SELECT pg_try_advisory_lock(%s, 0)", (PRUNE_LOCK,)).fetchone() or [False]
        if locked:
            try:
                prune(db, utc_now())
            finally:
                db.execute("SELECT pg_advisory_unlock(%s, 0)", (PRUNE_LOCK,))

    while True:
        wait = PRUNE_EVERY_SECONDS
        try:
            await asyncio.to_thread(prune_once)
        except TRANSIENT_ERRORS as error:
            log.warning("pruning waits", error=error)
            await asyncio.to_thread(database.reset)
            wait = PRUNE_RETRY_SECONDS
        await asyncio.sleep(wait)
