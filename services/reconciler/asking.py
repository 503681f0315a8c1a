"""Stripe's side: what it shows of an account, first as one number, and by the hour where that differs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TypeVar

from services.reconciler.judging import Reason
from services.reconciler.local import Window
from services.wire.stripe_reader import Away, MeterAtStripe, Missing, StripeReader
from services.wire.times import EPOCH

#: Calls at once. Stripe allows an account 100 reads a second (docs.stripe.com/rate-limits); others read too.
CALLS_AT_ONCE = 8
AWAY_MAX = 16
HOUR = timedelta(hours=1)

T = TypeVar("T")


class NotKnown(Exception):
    """Stripe's side of an account is not known."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Asking:
    """The questions of one run. Meters are read once, when first needed."""

    def __init__(self, stripe: StripeReader) -> None:
        self._stripe = stripe
        self._at_once = asyncio.Semaphore(CALLS_AT_ONCE)
        self._meters: dict[str, MeterAtStripe] | None = None
        self._reading_meters = asyncio.Lock()
        self._away = 0

    async def meter_of(self, event_name: str, formulas: set[str]) -> MeterAtStripe:
        """The Stripe meter of an event name, if it adds up by the one formula that is expected.

        Raises:
            NotKnown: Stripe does not answer, has none, or one that adds up otherwise.
        """
        async with self._reading_meters:
            if self._meters is None:
                self._meters = _by_event_name(await self._answer(self._stripe.meters))
        meter = self._meters.get(event_name)
        if meter is None:
            raise NotKnown("meter_missing")
        if formulas != {meter.formula} or meter.has_window:
            raise NotKnown("meter_differs")
        return meter

    async def shown(self, meter: MeterAtStripe, customer: str, window: Window) -> Decimal:
        """Stripe's total of a window.

        Raises:
            NotKnown: it does not say.
        """
        start, end = _seconds(window)
        return await self._answer(lambda: self._stripe.used(meter.meter_id, customer, start, end))

    async def shown_by_hour(
        self, meter: MeterAtStripe, customer: str, window: Window
    ) -> Mapping[datetime, Decimal]:
        """Stripe's totals of the hours of a window that have any; raises as :meth:`shown`."""
        start, end = _seconds(window)
        found = await self._answer(lambda: self._stripe.used_by_hour(meter.meter_id, customer, start, end))
        return {EPOCH + timedelta(seconds=hour): value for hour, value in found.items()}

    async def _answer(self, question: Callable[[], Awaitable[T]]) -> T:
        """Once Stripe has been away several times in a row, the rest of the run does not wait for it."""
        async with self._at_once:
            if self._away >= AWAY_MAX:
                raise NotKnown("no_answer")
            try:
                answer = await question()
            except Missing:
                raise NotKnown("customer_missing") from None
            except Away:
                self._away += 1
                raise NotKnown("no_answer") from None
            self._away = 0
            return answer


def hours_around(start: datetime, end: datetime, now: datetime) -> Window:
    """The full hours that hold a period, up to the one that goes on."""
    seconds = int((start - EPOCH).total_seconds())
    first = EPOCH + timedelta(seconds=seconds - seconds % 3600)
    until = -(-int((min(end, now + HOUR) - EPOCH).total_seconds()) // 3600) * 3600
    return first, max(EPOCH + timedelta(seconds=until), first + HOUR)


def _by_event_name(meters: list[MeterAtStripe]) -> dict[str, MeterAtStripe]:
    """One active meter has a name; archived ones may share it."""
    found: dict[str, MeterAtStripe] = {}
    for meter in meters:
        if meter.event_name not in found or meter.is_active:
            found[meter.event_name] = meter
    return found


def _seconds(window: Window) -> tuple[int, int]:
    return int((window[0] - EPOCH).total_seconds()), int((window[1] - EPOCH).total_seconds())
