"""What the tests of billing share: prices, and the events that were told, as Stripe's client reads them."""

from __future__ import annotations

from typing import Any

from services.stripe_simulator import SimulatorControl
from tests.contract.stripe_calls import sdk

MIDNIGHT = 1_800_057_600  # 2027-01-16T00:00:00Z


def metered_price(sim: SimulatorControl, meter: str = "mtr_calls", **recurring: Any) -> str:
    """Two tenths of a cent for each call, by the month unless it is said otherwise."""
    every: Any = {"interval": "month", "usage_type": "metered", "meter": meter} | recurring
    made = sdk(sim).v1.prices.create(
        {"currency": "usd", "product": "prod_api", "unit_amount_decimal": "0.2", "recurring": every}  # type: ignore[typeddict-item]
    )
    return str(made.id)


def told(sim: SimulatorControl, *types: str) -> list[Any]:
    """The snapshot events of these types that the account lists, oldest first."""
    wanted: Any = {"limit": 100} | ({"types": list(types)} if types else {})
    return list(sdk(sim).v1.events.list(wanted).auto_paging_iter())[::-1]


def types_told(sim: SimulatorControl) -> list[str]:
    return [one.type for one in told(sim)]


def previous(event: Any) -> Any:
    """`data.previous_attributes`, or None."""
    return event.data.to_dict().get("previous_attributes")
