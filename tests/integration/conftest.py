"""Fixtures of the integration tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.embedded.stack import Stack
from tests.conftest import NewDatabase
from tests.integration.pushing import World, open_world
from tests.integration.running import CONFIGURATION, running_stack, tidemeter
from tests.pipeline import Pipeline, Worker, trim_topics


@pytest.fixture(scope="module")
def pipeline(
    kafka_bootstrap: str, new_database: NewDatabase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    """Trimmed topics and a database for all tests of one module; each has a tenant of its own."""
    trim_topics(kafka_bootstrap)
    with new_database() as dsn:
        pipeline = Pipeline(kafka_bootstrap, dsn, tmp_path_factory.mktemp("pipeline"))
        try:
            yield pipeline
        finally:
            pipeline.close()


@pytest.fixture(scope="module")
def worker(pipeline: Pipeline) -> Worker:
    """The one counters worker of that."""
    return pipeline.worker().start().await_healthy()


@pytest.fixture
def world(postgres_dsn: str) -> Iterator[World]:
    """An empty journal, a simulator, and senders on demand."""
    with open_world(postgres_dsn) as opened:
        yield opened


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The whole product, for the tests of one module."""
    # Not below pytest's own directory: see `_embedded` in ../conftest.py.
    with tempfile.TemporaryDirectory(prefix="tidemeter-stack-") as directory:
        root = Path(directory)
        root.chmod(0o711)
        with running_stack(root) as running:
            yield running


@pytest.fixture(scope="module")
def api_key(stack: Stack) -> str:
    tidemeter(stack, "apply", "-f", "-", "--create-in-stripe", given=CONFIGURATION)
    key: str = json.loads(
        tidemeter(stack, "keys", "create", "--tenant", "acme", "--scope", "ingest", "--json")
    )["key"]
    return key
