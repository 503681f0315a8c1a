"""Just enough of invoices to see what becomes of late usage: a draft when a period ends, final an hour later.

As documented (docs.stripe.com/billing/subscriptions/usage-based: configure-grace-period, meters/configure):
usage of the period that arrives within the grace period is on the invoice, later usage is not; a finalized
invoice never changes; a negative quantity is invoiced as 0. There are no prices, subscriptions or amounts:
the control API schedules an invoice, and its one line has a quantity.
"""

from __future__ import annotations

import json
from decimal import Decimal

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.ledger import Ledger, text
from services.stripe_simulator.meters import Registry, new_id
from services.stripe_simulator.store import Store
from services.stripe_simulator.summaries import aggregate, last_received


class Invoices:
    def __init__(
        self, config: SimulatorConfig, store: Store, registry: Registry, ledger: Ledger, log: EventLog
    ) -> None:
        self._config = config
        self._store = store
        self._registry = registry
        self._ledger = ledger
        self._log = log

    def schedule(self, customer: str, meter: str, period_start: int, period_end: int) -> Json:
        """An invoice to be created when its period ends."""
        if period_start >= period_end:
            raise ValueError("period_end must be after period_start")
        finalizes_at = period_end + self._config.invoice_grace_seconds
        invoice: Json = {
            "id": new_id("in_test"),
            "object": "invoice",
            "automatically_finalizes_at": int(finalizes_at),
            "created": period_end,
            "customer": self._registry.customer(customer).id,
            "lines": {"object": "list", "data": [], "has_more": False},
            "livemode": False,
            "metadata": {"meter": self._registry.meter(meter).id},
            "period_end": period_end,
            "period_start": period_start,
            "status": "scheduled",
        }
        self._keep(invoice, due_at=period_end)
        return invoice

    def find(self, invoice_id: str) -> Json:
        row = self._store.read_one("SELECT body FROM invoices WHERE id = ?", (invoice_id,))
        invoice: Json = {} if row is None else json.loads(row[0])
        if not invoice or invoice["status"] == "scheduled":
            raise missing_object("invoice", invoice_id, param="id", status=404)
        return invoice

    def run_due(self, now: float) -> None:
        while True:
            row = self._store.read_one(
                "SELECT body FROM invoices WHERE due_at <= ? ORDER BY due_at LIMIT 1", (now,)
            )
            if row is None:
                return
            self._step(json.loads(row[0]), now)

    def _step(self, invoice: Json, now: float) -> None:
        finalizes_at = invoice["automatically_finalizes_at"]
        if invoice["status"] == "scheduled":
            invoice["status"] = "draft"
            self._keep(invoice, due_at=finalizes_at)
            self._log.snapshot("invoice.created", invoice, invoice["period_end"], now)
            return
        quantity = self._quantity(invoice, finalizes_at)
        invoice["status"] = "open"
        invoice["lines"]["data"] = [
            {"id": new_id("il_test"), "object": "line_item", "quantity_decimal": text(quantity)}
        ]
        self._keep(invoice, due_at=None)
        self._log.snapshot("invoice.finalized", invoice, finalizes_at, now)

    def _quantity(self, invoice: Json, until: float) -> Decimal:
        """What was received in time, of the period by event timestamp, never below zero."""
        meter = self._registry.meter(invoice["metadata"]["meter"])
        usage = list(
            self._ledger.received(
                meter.id, invoice["customer"], invoice["period_start"], invoice["period_end"], until
            )
        )
        return max(Decimal(0), aggregate(last_received(usage, meter), meter.formula)) if usage else Decimal(0)

    def _keep(self, invoice: Json, due_at: float | None) -> None:
        sql = "INSERT OR REPLACE INTO invoices (id, due_at, body) VALUES (?, ?, ?)"
        self._store.write(sql, (invoice["id"], due_at, json.dumps(invoice)))
