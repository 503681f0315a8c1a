"""The archiver's process: the job in a thread of its own, and the relay of what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from services.archive.writing import GROUP, STANDBY_SECONDS, AnotherWorks, Archiver, Summary, Written
from services.streaming import outbox
from services.streaming.alone import run_alone
from services.streaming.database import Database
from services.streaming.observe import Health
from services.wire.settings import Settings

STOP_SECONDS_MAX = 8.0


async def run(settings: Settings) -> None:
    """Run until told to stop.

    Raises:
        Misconfigured: no archive, Kafka or PostgreSQL is set, or the archive's URL cannot be used.
    """
    stop, ended = threading.Event(), asyncio.Event()
    archiver = Archiver(settings, stop=stop)
    loop = asyncio.get_running_loop()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            archiver.run()
        except BaseException as error:
            failures.append(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waited that long
            loop.call_soon_threadsafe(ended.set)

    async def job() -> None:
        # Not a thread of a pool: the process would wait for one that hangs in a storage.
        threading.Thread(target=work, daemon=True, name="archive").start()
        try:
            await ended.wait()
        except asyncio.CancelledError:
            stop.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), STOP_SECONDS_MAX)
            raise
        if failures:
            raise failures[0]

    health = Health()
    health.checks["archive"] = archiver.check
    await run_alone(settings, health, [job, lambda: outbox.relay_forever(settings, GROUP)])


def run_once(settings: Settings, written: Callable[[Written], None], waiting: Callable[[], None]) -> Summary:
    """Archive all that the logs have at this moment, whatever its age.

    ``waiting`` is called for each look at another archiver's lock, until that one has ended.

    Raises:
        Misconfigured: as :func:`run`.
        Transient, psycopg.OperationalError: something is away; what was written is.
    """
    archiver = Archiver(settings, written=written)
    try:
        while True:
            try:
                summary = archiver.look(everything=True)
                break
            except AnotherWorks:
                waiting()
                time.sleep(STANDBY_SECONDS)
    finally:
        archiver.close()
    if summary.halted:
        database = Database(settings.postgres(), "archive-relay")
        outbox.relay(database.connection(), GROUP, outbox.relay_producer(settings.kafka()), wait=True)
        database.reset()
    return summary
