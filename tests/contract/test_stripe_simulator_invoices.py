"""Rule 23: an invoice is final an hour after its period; what arrives later is not on it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
import stripe

from services.stripe_simulator import SimulatorControl
from tests.contract.stripe_calls import DAY, HOUR, MINUTE, event, sdk
from tests.contract.webhook_receiver import listening

MIDNIGHT = 1_800_057_600  # 2027-01-16T00:00:00Z


def use(sim: SimulatorControl, value: str, at: int, identifier: str = "") -> None:
    params: Any = event(identifier, value=value) | {"timestamp": MIDNIGHT + at}
    sdk(sim).v1.billing.meter_events.create(params)


def quantity(invoice: Any) -> Decimal:
    return Decimal(invoice.to_dict()["lines"]["data"][0]["quantity_decimal"])


@pytest.fixture
def invoice(sim: SimulatorControl) -> str:
    """An invoice of one day for cus_1 and mtr_calls, at the noon before its period ends."""
    sim.set_clock(MIDNIGHT + DAY // 2)
    return str(sim.schedule_invoice("cus_1", "mtr_calls", MIDNIGHT, MIDNIGHT + DAY)["id"])


def test_usage_counts_until_the_grace_period_ends_and_by_its_own_timestamp(
    sim: SimulatorControl, invoice: str
) -> None:
    use(sim, "1", 0)
    sim.set_clock(MIDNIGHT + DAY + 59 * MINUTE)
    use(sim, "10", DAY - 1)
    use(sim, "100", DAY)
    assert sdk(sim).v1.invoices.retrieve(invoice).status == "draft"
    sim.advance(2 * MINUTE)
    use(sim, "1000", DAY - 1)
    final = sdk(sim).v1.invoices.retrieve(invoice)
    assert (final.status, quantity(final)) == ("open", 11)
    assert sim.total() == "1111", "the late event counts, only not on this invoice"


def test_a_negative_quantity_is_invoiced_as_nothing(sim: SimulatorControl, invoice: str) -> None:
    use(sim, "2", 0)
    use(sim, "-5.5", 0)
    sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 0


def test_a_cancellation_after_the_invoice_changes_nothing_on_it(sim: SimulatorControl, invoice: str) -> None:
    sim.set_clock(MIDNIGHT + DAY - 60)
    use(sim, "3", DAY - 120, "a")
    use(sim, "4", DAY - 120, "b")
    cancel = sdk(sim).v1.billing.meter_event_adjustments.create
    cancel({"type": "cancel", "event_name": "calls", "cancel": {"identifier": "b"}})
    sim.advance(2 * HOUR)
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 3
    cancel({"type": "cancel", "event_name": "calls", "cancel": {"identifier": "a"}})
    assert quantity(sdk(sim).v1.invoices.retrieve(invoice)) == 3
    assert sim.total() == "0"


def test_draft_and_final_invoice_are_told_as_snapshots(sim: SimulatorControl, invoice: str) -> None:
    with listening() as receiver:
        sdk(sim).v1.webhook_endpoints.create(
            {"url": receiver.url, "enabled_events": ["invoice.created", "invoice.finalized"]}
        )
        use(sim, "1", 0)
        sim.set_clock(MIDNIGHT + DAY + 2 * HOUR)
        sim.deliver()
        told = [json.loads(one.body) for one in receiver.received]
    assert [(one["type"], one["data"]["object"]["status"]) for one in told] == [
        ("invoice.created", "draft"),
        ("invoice.finalized", "open"),
    ]
    assert [one["created"] - MIDNIGHT - DAY for one in told] == [0, HOUR]


def test_an_invoice_is_not_there_before_its_period_ended(sim: SimulatorControl, invoice: str) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="No such invoice"):
        sdk(sim).v1.invoices.retrieve(invoice)
    with pytest.raises(ValueError, match="after period_start"):
        sim.schedule_invoice("cus_1", "mtr_calls", 10, 10)
