"""Start and stop: as a process, as a task beside others, or in a thread for the length of a test."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from aiohttp import web

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.control_client import SimulatorControl
from services.stripe_simulator.profile import EMPTY, Profile
from services.stripe_simulator.server import create_app

log = structlog.get_logger()

SHUTDOWN_SECONDS = 2.0
START_SECONDS_MAX = 15.0


async def serve(
    config: SimulatorConfig,
    *,
    profile: Profile = EMPTY,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set, or without one until SIGINT or SIGTERM; then finish and flush.

    `on_ready` is told the base address, which matters with port 0.
    """
    if stop is None:
        stop = _stop_on_signals()
    runner = web.AppRunner(create_app(config, profile), access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
        url = "http://{}:{}".format(*runner.addresses[0][:2])
        log.info("simulator_listening", url=url, persistent=config.data_path is not None)
        if on_ready is not None:
            on_ready(url)
        await stop.wait()
    finally:
        await runner.cleanup()
        log.info("simulator_stopped")


def run(config: SimulatorConfig, profile: Profile = EMPTY) -> None:
    """Serve on the main thread until SIGINT or SIGTERM."""
    asyncio.run(serve(config, profile=profile))


@contextmanager
def running_simulator(
    config: SimulatorConfig | None = None, profile: Profile = EMPTY
) -> Iterator[SimulatorControl]:
    """A simulator in a thread of this process, on a free port unless the configuration names one."""
    wanted = config or SimulatorConfig(port=0)
    outcome: dict[str, str] = {}
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def ready(url: str) -> None:
        outcome["url"] = url
        started.set()

    def work() -> None:
        try:
            loop.run_until_complete(serve(wanted, profile=profile, stop=stop, on_ready=ready))
        finally:
            loop.close()
            started.set()

    thread = threading.Thread(target=work, name="stripe-simulator", daemon=True)
    thread.start()
    if not started.wait(START_SECONDS_MAX) or "url" not in outcome:
        raise RuntimeError("the Stripe simulator did not start; its thread says why")
    try:
        yield SimulatorControl(outcome["url"])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(SHUTDOWN_SECONDS + 5)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop
