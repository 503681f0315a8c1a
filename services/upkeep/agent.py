"""The upkeep process: each job in a loop of its own, and the notifier when there is a mail server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog

from schemas.catalog import check_catalog
from services.streaming import outbox
from services.streaming.alone import Background, run_alone
from services.streaming.database import Database
from services.streaming.loops import Clock, Loop, utc_now
from services.streaming.observe import Health, Status
from services.streaming.redriving import Redrives, redrive_forever
from services.streaming.worker import Worker
from services.upkeep import PRODUCER, cards, dunning, fees, pruning, sending
from services.upkeep.mails import Post, names_of, post_of
from services.upkeep.notices import GROUP, Notices
from services.upkeep.smtp import MailServer
from services.wire.registry import decoder_for
from services.wire.settings import Settings
from services.wire.stripe_reader import StripeReader
from services.wire.topics import OPS
from upcasters.chain import check_chain, revision, upcasters

log = structlog.get_logger(__name__)

Check = Callable[[], tuple[Status, str]]


@dataclass(frozen=True, slots=True)
class Mailing:
    """How mails go, if they do."""

    server: MailServer
    post: Post
    names: frozenset[str]

    @classmethod
    def from_settings(cls, settings: Settings) -> Mailing | None:
        """None without a mail server.

        Raises:
            Misconfigured: what it needs beside the server is missing or wrong.
        """
        server = MailServer.from_settings(settings)
        return None if server is None else cls(server, post_of(settings), names_of(settings.mail_events))


class Jobs:
    """The loops of this process; each adds its checks to ``health``."""

    def __init__(self, settings: Settings, health: Health, *, clock: Clock = utc_now) -> None:
        self._settings = settings
        self._health = health
        self._clock = clock
        self.loops: list[Background] = [lambda: outbox.relay_forever(settings, PRODUCER)]
        database = self._database("cards")
        self._add(
            "cards",
            cards.LOOK_SECONDS,
            cards.Cards(database, days=settings.card_expiry_days, clock=clock).step,
            database,
        )
        database = self._database("pruner")
        self._add(
            "pruner", pruning.EVERY_SECONDS, pruning.Pruner(database, settings, clock=clock).step, database
        )

    def ask(self, stripe: StripeReader) -> None:
        """The jobs that read Stripe."""
        database = self._database("fees")
        fee_job = fees.Fees(
            database, stripe, timeout_seconds=self._settings.stripe_timeout_seconds, clock=self._clock
        )
        self._add("fees", fees.LOOK_SECONDS, fee_job.step, database, fee_job.check)
        database = self._database("dunning")
        sweeper = dunning.Dunning(database, stripe, days=self._settings.dunning_days, clock=self._clock)
        self._add("dunning", dunning.LOOK_SECONDS, sweeper.step, database, sweeper.check)

    def mail(self, mailing: Mailing) -> None:
        """The sender of mails."""
        database = self._database("mails")
        sender = sending.Mails(database, mailing.server, mailing.post, clock=self._clock)
        self._add("mails", sending.LOOK_SECONDS, sender.step, database, sender.check)

    def _database(self, name: str) -> Database:
        return Database(self._settings.postgres(), f"upkeep-{name}")

    def _add(
        self,
        name: str,
        seconds: float,
        step: Callable[[], Awaitable[bool]],
        database: Database,
        check: Check | None = None,
    ) -> None:
        loop = Loop(name, seconds, step, database)
        self._health.checks[name] = lambda: _worse(loop.check(), check() if check else loop.check())
        self.loops.append(loop.run)


def _worse(first: tuple[Status, str], second: tuple[Status, str]) -> tuple[Status, str]:
    return first if first[0] == "unhealthy" else second


async def run(settings: Settings) -> None:
    """Run until told to stop.

    Raises:
        Misconfigured: a live Stripe key that was not allowed; a mail server without what it needs.
    """
    check_catalog()
    chain = upcasters()
    check_chain(chain)
    settings.kafka()  # said at the start, not by the first loop that needs it
    mailing = Mailing.from_settings(settings)
    health = Health()
    jobs = Jobs(settings, health)
    async with AsyncExitStack() as stack:
        if settings.stripe_api_key is not None:
            stripe = StripeReader.from_settings(settings)
            stack.push_async_callback(stripe.close)
            jobs.ask(stripe)
        else:
            _off(health, "stripe", "no Stripe key: fees and subscriptions are not looked at")
        if mailing is None:
            _off(health, "mails", "no mail server: nobody is told by mail")
            await run_alone(settings, health, jobs.loops)
            return
        jobs.mail(mailing)
        handler = Notices(decoder_for(settings), chain, mailing.names)
        worker = Worker(settings, group=GROUP, topics=[OPS], handler=handler, health=health)
        redrives = Redrives(GROUP, handler.retry, tried_with=revision())
        await worker.run(
            *jobs.loops,
            lambda: outbox.relay_forever(settings, GROUP),
            lambda: redrive_forever(settings, redrives),
        )


def _off(health: Health, name: str, reason: str) -> None:
    log.info("off", part=name, reason=reason)
    health.checks[name] = lambda: ("healthy", f"off: {reason}")
