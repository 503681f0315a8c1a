"""Real servers for every test that wants them: from the environment, from Docker, or embedded.

One Kafka and one PostgreSQL for the session; each test gets a database of its own, and each run topics of its
own only where it asks for them, because topic names are fixed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import HealthCheck, settings

from services.wire.migrations import apply_migrations
from services.wire.settings import Settings, load_settings
from services.wire.topics import create_topics, plan_topics

pytest.register_assert_rewrite("tests.pipeline")

# How long a machine takes to make an example says nothing about the product.
settings.register_profile("house", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


# Started in the background, this process may have been told to ignore Ctrl-C, and its children with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Servers:
    """Addresses of a real Kafka and a real PostgreSQL; the DSN's user may create databases."""

    kafka: str
    postgres: str


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """In this order: addresses in the environment, testcontainers with a Docker engine, embedded."""
    kafka, postgres = os.environ.get("TIDEMETER_KAFKA_BOOTSTRAP"), os.environ.get("TIDEMETER_POSTGRES_DSN")
    if kafka and postgres:
        yield Servers(kafka, postgres)
    elif _docker_answers():
        yield from _containers()
    else:
        yield from _embedded()


def _docker_answers() -> bool:
    try:
        import docker

        return bool(docker.from_env(timeout=3).ping())
    except Exception:
        return False


def _containers() -> Iterator[Servers]:
    from testcontainers.kafka import KafkaContainer
    from testcontainers.postgres import PostgresContainer

    with KafkaContainer().with_kraft() as kafka, PostgresContainer("postgres:17") as postgres:
        yield Servers(kafka.get_bootstrap_server(), postgres.get_connection_url(driver=None))


def _embedded() -> Iterator[Servers]:
    from services.embedded import EmbeddedRuntime

    # Not below pytest's own directory: PostgreSQL may run as another user, who has to pass through, and the
    # next pytest of the same user closes that directory.
    with tempfile.TemporaryDirectory(prefix="tidemeter-tests-") as directory:
        root = Path(directory)
        root.chmod(0o711)
        with EmbeddedRuntime(root) as runtime:
            yield Servers(runtime.kafka_bootstrap, runtime.postgres_dsn)


@pytest.fixture(scope="session")
def kafka_bootstrap(servers: Servers) -> str:
    """Brokers with the product's topics."""
    create_topics(
        servers.kafka,
        plan_topics(partitions=4, replication=1, min_insync_replicas=1, usage_retention_days=90),
    )
    return servers.kafka


@pytest.fixture(scope="session")
def template_database(servers: Servers) -> Iterator[str]:
    """A migrated database that others are copied from."""
    name = f"template_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(servers.postgres, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    apply_migrations(_address(servers.postgres, name))
    yield name
    with psycopg.connect(servers.postgres, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


NewDatabase = Callable[[], contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="session")
def new_database(servers: Servers, template_database: str) -> NewDatabase:
    """For fixtures that live longer than a test: makes a migrated database, dropped in the end; its DSN."""

    @contextlib.contextmanager
    def new() -> Iterator[str]:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(servers.postgres, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE {template_database}")
        try:
            yield _address(servers.postgres, name)
        finally:
            with psycopg.connect(servers.postgres, autocommit=True) as admin:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    return new


@pytest.fixture
def postgres_dsn(new_database: NewDatabase) -> Iterator[str]:
    """A migrated database of this test's own."""
    with new_database() as dsn:
        yield dsn


def _address(server: str, database: str) -> str:
    parts = urlsplit(server)
    return urlunsplit(parts._replace(path=f"/{database}"))


@pytest.fixture
def empty_kafka(servers: Servers) -> str:
    """Brokers with the product's topics, all empty, and none of its consumer groups."""
    renew_topics(servers.kafka)
    return servers.kafka


def renew_topics(bootstrap: str) -> None:
    """Delete the product's topics and consumer groups, and create the topics again."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    plans = plan_topics(partitions=4, replication=1, min_insync_replicas=1, usage_retention_days=90)
    ours = [plan.name for plan in plans]
    present = set(admin.list_topics(timeout=10).topics)
    doomed = [name for name in ours if name in present]
    for future in admin.delete_topics(doomed).values() if doomed else ():
        future.result()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and set(ours) & set(admin.list_topics(timeout=10).topics):
        time.sleep(0.05)
    groups = [group.group_id for group in admin.list_consumer_groups().result().valid]
    ours_groups = [group for group in groups if group.startswith("tidemeter-")]
    for future in admin.delete_consumer_groups(ours_groups).values() if ours_groups else ():
        with contextlib.suppress(KafkaException):  # a member that was killed is still in its session
            future.result()
    create_topics(bootstrap, plans)


@pytest.fixture
def settings(kafka_bootstrap: str, postgres_dsn: str) -> Settings:
    """Settings that point at this test's servers."""
    return load_settings(kafka_bootstrap=kafka_bootstrap, postgres_dsn=postgres_dsn)
