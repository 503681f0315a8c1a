"""The replayer's process: it carries out the replays that are asked for, and shows how many are open."""

from __future__ import annotations

import asyncio

import structlog

from schemas.catalog import check_catalog
from services.replay.carrying import Carrier
from services.streaming.alone import run_alone
from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.observe import Health
from services.wire import metrics
from services.wire.settings import Settings
from upcasters.chain import check_chain, upcasters

OPEN_STATES = ("requested", "running")
OBSERVE_SECONDS = 5.0
_POLL_SECONDS = 0.5

log = structlog.get_logger(__name__)


async def run(settings: Settings) -> None:
    """Run until told to stop.

    Raises:
        Misconfigured: no Kafka or no PostgreSQL is set.
        Transient: a schema registry is configured and does not answer.
    """
    check_catalog()
    check_chain(upcasters())
    carrier = Carrier(settings)

    async def carry() -> None:
        carrier.start()
        try:
            while not carrier.ended.is_set():
                await asyncio.sleep(_POLL_SECONDS)
        except asyncio.CancelledError:
            await asyncio.to_thread(carrier.stop)
            raise
        if carrier.failure is not None:
            raise carrier.failure

    health = Health()
    health.checks["replays"] = carrier.check
    await run_alone(settings, health, [carry, lambda: _observe_forever(settings)])


async def _observe_forever(settings: Settings) -> None:
    database = Database(settings.postgres(), "replayer")

    def count() -> dict[str, int]:
        rows = database.connection().execute(
            "SELECT state, count(*) FROM replays WHERE finished_at IS NULL GROUP BY state"
        )
        return dict(rows.fetchall())

    while True:
        try:
            found = await asyncio.to_thread(count)
            for state in OPEN_STATES:
                metrics.REPLAYS.labels(state).set(found.get(state, 0))
        except TRANSIENT_ERRORS as error:
            log.warning("replays are not counted", error=error)
            await asyncio.to_thread(database.reset)
        await asyncio.sleep(OBSERVE_SECONDS)
