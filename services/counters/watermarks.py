"""How far each meter has come: the gauge of watermarks.

It is read from every item, whoever moved it. A look reads the whole table: it has a connection of its own,
and the longer one takes, the rarer the next ones are.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import structlog

from services.streaming.database import TRANSIENT_ERRORS, Database
from services.wire import metrics
from services.wire.settings import Settings

LOOK_SECONDS = 15.0
#: Looks take at most one hundredth of the time.
PAUSE_PER_LOOK = 99

log = structlog.get_logger(__name__)

_NEWEST = (
    "SELECT tenant_id, meter, extract(epoch FROM max(watermark))::float8 FROM items "
    "WHERE isfinite(watermark) GROUP BY tenant_id, meter"
)


def observe_watermarks(db: psycopg.Connection[Any]) -> None:
    """Set the gauge of every meter that ever counted something."""
    with db.transaction():
        db.execute("SET LOCAL enable_seqscan = on")  # the whole table is what is wanted
        rows = db.execute(_NEWEST).fetchall()
    for tenant, meter, moment in rows:
        metrics.WATERMARK.labels(tenant, meter).set(moment)


async def watch_watermarks(settings: Settings) -> None:
    """Look for ever; a database that is away is waited for."""
    database = Database(settings.postgres(), "watermarks")
    while True:
        began = time.monotonic()
        try:
            await asyncio.to_thread(lambda: observe_watermarks(database.connection()))
        except TRANSIENT_ERRORS as error:
            log.warning("watermarks cannot be read", error=error)
            await asyncio.to_thread(database.reset)
        await asyncio.sleep(max(LOOK_SECONDS, PAUSE_PER_LOOK * (time.monotonic() - began)))
