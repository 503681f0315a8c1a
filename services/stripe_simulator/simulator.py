"""The parts of one running simulator, put together once, and how to empty them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from services.stripe_simulator.background import Background
from services.stripe_simulator.billing import Billing
from services.stripe_simulator.clock import Clock
from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.deliveries import Deliveries, read_webhook_rule
from services.stripe_simulator.destinations import Destinations
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.faults import FaultTape, read_rule
from services.stripe_simulator.freshness import Freshness
from services.stripe_simulator.gateway import Endpoint, Gateway
from services.stripe_simulator.ledger import Ledger
from services.stripe_simulator.meters import Registry
from services.stripe_simulator.observations import Observations
from services.stripe_simulator.profile import Profile
from services.stripe_simulator.seeding import customer_from, meter_from
from services.stripe_simulator.store import Store


@dataclass(frozen=True, slots=True)
class Simulator:
    config: SimulatorConfig
    store: Store
    clock: Clock
    registry: Registry
    ledger: Ledger
    observations: Observations
    faults: FaultTape
    dice: random.Random
    freshness: Freshness
    destinations: Destinations
    deliveries: Deliveries
    webhook_faults: FaultTape
    event_log: EventLog
    billing: Billing
    background: Background
    gateway: Gateway
    endpoints: dict[tuple[str, str], Endpoint]
    closing: asyncio.Event

    def begin(self, profile: Profile) -> None:
        """Take up what a profile holds. An id that is there already stays as it is."""
        now = int(self.clock.now())
        for customer in (customer_from(one, now) for one in profile.customers):
            if customer.id not in self.registry.customers:
                self.registry.keep_customer(customer)
        for meter in (meter_from(one, now) for one in profile.meters):
            if meter.id not in self.registry.meters:
                self.registry.keep_meter(meter)
        self.faults.extend([read_rule(one) for one in profile.faults])
        self.webhook_faults.extend([read_webhook_rule(one) for one in profile.webhook_faults])

    def reset(self) -> None:
        """Back to an empty account at real time, with the seed started over."""
        self.store.clear()
        for kept in (self.registry, self.destinations, self.freshness):
            kept.load()
        for tape in (self.faults, self.webhook_faults):
            tape.clear()
            tape.reseed(self.config.seed)
        self.dice.seed(self.config.seed)
        self.clock.offset_seconds = 0.0
        self.observations.reset()
