"""The parts of billing, put together once, and what happens to which of their objects by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.invoices import SCHEDULED, Invoices
from services.stripe_simulator.ledger import Ledger
from services.stripe_simulator.meters import Registry
from services.stripe_simulator.payment_methods import PaymentMethods
from services.stripe_simulator.payments import WAITING, Balance, Payments
from services.stripe_simulator.payouts import Payouts
from services.stripe_simulator.prices import Prices
from services.stripe_simulator.resources import Resources, Step
from services.stripe_simulator.subscriptions import Subscriptions


@dataclass(frozen=True, slots=True)
class Billing:
    prices: Prices
    subscriptions: Subscriptions
    invoices: Invoices
    balance: Balance
    payments: Payments
    payouts: Payouts
    payment_methods: PaymentMethods

    def steps(self) -> Mapping[str, Step]:
        return {
            SCHEDULED: self.invoices.begin,
            "invoice": self.invoices.finalize,
            "subscription": self.subscriptions.step,
            WAITING: self.payments.settle,
            "balance_transaction": self.balance.release,
            "payout": self.payouts.arrive,
        }


def assemble_billing(
    config: SimulatorConfig, resources: Resources, registry: Registry, ledger: Ledger, log: EventLog
) -> Billing:
    invoices = Invoices(config, resources, registry, ledger)
    balance = Balance(resources)
    return Billing(
        prices=Prices(resources, registry),
        subscriptions=Subscriptions(resources, registry, invoices),
        invoices=invoices,
        balance=balance,
        payments=Payments(resources, registry, balance),
        payouts=Payouts(resources, log, balance),
        payment_methods=PaymentMethods(resources, registry),
    )
