"""A Stripe that runs beside the tests: usage metering over HTTP, with faults on demand.

Serves    the v1 meter events, meters, event summaries, adjustments and customers of Stripe, form-encoded,
          and `/_simulator/` for tests: ledger, totals, statistics, clock, fault tape, seeding, reset.
Keeps     everything in one SQLite database. With `data_path` an answer leaves only after its commit, so a
          SIGKILL of the simulator loses nothing that was answered; a power cut may lose the last moments.
Promises  the ledger of applied events is independent of the summaries, exact, and append-only: compare a
          client's claims with it, never with what this service chose to show.
Differs   where Stripe is silent this service chooses, and says so where it does: which refusals come at the
          call and which later, the scope of identifiers, wording of adjustment and alignment errors, the
          status of the concurrency refusal, what 502/503/504 leave behind. Leaves out v2, webhooks, invoices.
          It proves conformance to these rules, not to Stripe.
Fails     closed: a failed commit answers nobody and turns `/health/ready` to unhealthy.
"""

from __future__ import annotations

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.control_client import SimulatorControl
from services.stripe_simulator.running import run, running_simulator, serve
from services.stripe_simulator.server import create_app

__all__ = ["SimulatorConfig", "SimulatorControl", "create_app", "run", "running_simulator", "serve"]
