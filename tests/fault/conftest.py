"""A pipeline of its own for each test: trimmed topics, an empty database, no worker yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.campaign import LINES, Campaign
from tests.fault.traffic import configure
from tests.pipeline import Pipeline, trim_topics


@pytest.fixture
def pipeline(kafka_bootstrap: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Pipeline]:
    trim_topics(kafka_bootstrap)
    pipeline = Pipeline(kafka_bootstrap, postgres_dsn, tmp_path)
    configure(pipeline)
    try:
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture
def campaign(pipeline: Pipeline, request: pytest.FixtureRequest) -> Campaign:
    return Campaign(pipeline, request.node.name.removeprefix("test_"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each fault test that came to its proof, whether or not it held."""
    if LINES:
        terminalreporter.section("faults survived")
        for line in LINES:
            terminalreporter.line(line)
