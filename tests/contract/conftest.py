"""One simulator for each test module, emptied and seeded before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.stripe_simulator import SimulatorControl, running_simulator


@pytest.fixture(scope="module")
def running() -> Iterator[SimulatorControl]:
    with running_simulator() as control:
        yield control


@pytest.fixture
def sim(running: SimulatorControl) -> SimulatorControl:
    running.reset()
    running.seed(customers=["cus_1", "cus_2"], meters=["calls", "bytes"])
    return running
