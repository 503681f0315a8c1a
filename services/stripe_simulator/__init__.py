"""A Stripe that runs beside the tests: usage metering over HTTP, with faults on demand.

Serves    the meter events of v1 and v2, the v2 stream, adjustments, meters, summaries, customers, events,
          signed webhooks; prices, subscriptions, invoices; charges, refunds, disputes, payouts, cards to
          read; and `/_simulator/` for tests: ledger, clock, faults, seeding, payments and more.
Keeps     everything in one SQLite database. With `data_path` an answer leaves only after its commit, so a
          SIGKILL of the simulator loses nothing that was answered; a power cut may lose the last moments.
Promises  the ledger of applied events is independent of the summaries, exact, and append-only: compare a
          client's claims with it, never with what this service chose to show.
Differs   where Stripe is silent this service chooses, and says so where it does; docs/stripe-simulator.md
          lists every rule and whether it is documented, observed or chosen. Leaves out collecting money,
          products, prorations and taxes. It proves conformance to these rules, not to Stripe.
Fails     closed: a failed commit answers nobody and turns `/health/ready` to unhealthy.
"""

from __future__ import annotations

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.control_client import SimulatorControl
from services.stripe_simulator.profile import InvalidProfile, Profile, load_profile
from services.stripe_simulator.running import run, running_simulator, serve
from services.stripe_simulator.server import create_app

__all__ = [
    "InvalidProfile",
    "Profile",
    "SimulatorConfig",
    "SimulatorControl",
    "create_app",
    "load_profile",
    "run",
    "running_simulator",
    "serve",
]
