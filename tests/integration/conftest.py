"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.pushing import World, open_world


@pytest.fixture
def world(postgres_dsn: str) -> Iterator[World]:
    """An empty journal, a simulator, and senders on demand."""
    with open_world(postgres_dsn) as opened:
        yield opened
