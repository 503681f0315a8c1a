"""A pipeline of its own for each test: trimmed topics, an empty database, no worker yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
