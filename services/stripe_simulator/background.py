"""What happens by itself as the simulator's clock moves: error reports, billing, webhook tries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from services.stripe_simulator.answering import pause
from services.stripe_simulator.clock import Clock
from services.stripe_simulator.courier import Courier
from services.stripe_simulator.reports import ErrorReports
from services.stripe_simulator.resources import Resources, Step

log = structlog.get_logger()

TICK_SECONDS = 0.1
FAILED_SECONDS = 5.0


class Background:
    def __init__(
        self,
        clock: Clock,
        reports: ErrorReports,
        resources: Resources,
        steps: Mapping[str, Step],
        courier: Courier,
    ) -> None:
        """`steps` says what happens to a resource of each kind when it is due."""
        self._clock = clock
        self._reports = reports
        self._resources = resources
        self._steps = steps
        self._courier = courier

    def catch_up(self) -> None:
        """Write down what is due by now; nothing is sent. Asked for before anything reads events."""
        now = self._clock.now()
        self._reports.run_due(now)
        self._resources.run_due(now, self._steps)

    async def deliver_due(self) -> int:
        """Catch up and try every delivery that is due; returns how many tries that took."""
        self.catch_up()
        return await self._courier.deliver_due()

    async def run(self, closing: asyncio.Event) -> None:
        """Until `closing`. A failure is logged and what failed is tried again, more slowly."""
        try:
            while not closing.is_set():
                seconds = TICK_SECONDS
                try:
                    await self.deliver_due()
                except Exception as error:
                    log.error("simulator_background_failed", error=type(error).__name__, exc_info=True)
                    seconds = FAILED_SECONDS
                await pause(seconds, closing)
        finally:
            await self._courier.close()
