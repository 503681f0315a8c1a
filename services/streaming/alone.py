"""A process without a consumer group: loops, health and metrics, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

import structlog

from services.streaming.observe import Health, serve_observation
from services.streaming.worker import crash
from services.wire.settings import Settings

log = structlog.get_logger(__name__)

Background = Callable[[], Awaitable[None]]


async def run_alone(settings: Settings, health: Health, loops: Sequence[Background]) -> None:
    """The loops, until SIGTERM or SIGINT cancels them; one that raises ends the process."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    runner, port = await serve_observation(health, settings.observe_host, settings.observe_port)
    log.info("worker starts", group=None, observe_port=port)
    tasks = [asyncio.create_task(_guarded(loop)) for loop in loops]
    await stopping.wait()
    log.info("worker stops", group=None)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await runner.cleanup()


async def _guarded(loop: Background) -> None:
    try:
        await loop()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        crash("background task failed", error)
