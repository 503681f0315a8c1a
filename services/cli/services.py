"""``tidemeter ingest | counters | pusher | dispatcher | replayer | … | up | migrate``: start things."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from services.cli.common import JsonFlag, fail, sentences
from services.wire.errors import Misconfigured
from services.wire.log import configure_logging
from services.wire.settings import data_directory, load_settings, running_runtime


def ingest(
    port: Annotated[int | None, typer.Option(help="Port to listen on; default TIDEMETER_HTTP_PORT.")] = None,
) -> None:
    """Run the HTTP API.

    Example: tidemeter ingest --port 8080
    """
    from services.console.routes import ROUTES
    from services.ingest.app import run

    with sentences():
        run(load_settings(http_port=port), ROUTES)


def counters() -> None:
    """Run one counters worker. Start more of them, on any machine, to share the partitions.

    Example: TIDEMETER_WORKER_ID=counters-1 tidemeter counters
    """
    from services.counters.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="counters")
        asyncio.run(run(settings))


def pusher() -> None:
    """Run one pusher: deltas to Stripe.

    Example: TIDEMETER_STRIPE_API_KEY_FILE=/run/secrets/stripe tidemeter pusher
    """
    from services.pusher.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="pusher")
        asyncio.run(run(settings))


def dispatcher() -> None:
    """Run one dispatcher: Stripe's webhooks to their handlers.

    Example: TIDEMETER_STRIPE_API_KEY_FILE=/run/secrets/stripe tidemeter dispatcher
    """
    from services.console.webhook_runs import Retention, prune
    from services.pusher.failures import fail_reported
    from services.webhooks.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="dispatcher")
        retention = Retention.from_settings(settings)
        asyncio.run(
            run(
                settings,
                fail_reported,
                lambda db, now: prune(db, retention, now=now, actor="dispatcher"),
            )
        )


def replayer() -> None:
    """Run one replayer: it carries out replays that are applied, one at a time.

    Example: TIDEMETER_WORKER_ID=replayer-1 tidemeter replayer
    """
    from services.replay.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="replayer")
        asyncio.run(run(settings))


def reconciler() -> None:
    """Run one reconciler: what Stripe shows beside what it should, every so often and when asked for.

    Example: TIDEMETER_STRIPE_API_KEY_FILE=/run/secrets/stripe tidemeter reconciler
    """
    from services.reconciler.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="reconciler")
        asyncio.run(run(settings))


def stripe_simulator(
    port: Annotated[int, typer.Option(help="Port to listen on, 0 for a free one.")] = 12111,
    data: Annotated[
        Path | None, typer.Option(help="SQLite file to keep the state in; default memory.")
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(help="YAML profile: how it behaves, what fails, which meters and customers it holds."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Calls per second before it answers 429; default 1000.")
    ] = None,
    summary_lag: Annotated[
        float | None, typer.Option(help="Seconds until summaries show an event; default 0.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the profile and end.")] = False,
) -> None:
    """Run the simulated Stripe: meter events of v1 and v2, the stream, summaries, webhooks, faults.

    Point a Stripe client at it with any key that begins with sk_test_, as the addresses `api` and
    `meter_events`. Tests steer it under /_simulator/: its clock, its faults, its ledger of what counted.
    A profile says what goes wrong: deploy/stripe-faults.example.yaml explains each line. Options given here
    win over the profile. It proves conformance to its rules, listed in docs/stripe-simulator.md, not to
    Stripe.

    Example: tidemeter stripe-simulator --port 12111 --faults deploy/stripe-faults.example.yaml
    """
    from services.stripe_simulator import InvalidProfile, Profile, SimulatorConfig, load_profile, run

    with sentences():
        settings = load_settings()
        try:
            profile = load_profile(faults) if faults is not None else Profile()
            chosen = {"rate_per_second": rate, "summary_lag_seconds": summary_lag}
            given = {name: value for name, value in chosen.items() if value is not None}
            config = SimulatorConfig(port=port, data_path=data, **{**profile.config, **given})
        except InvalidProfile as error:
            raise Misconfigured(str(error)) from None
        except ValueError as error:
            raise Misconfigured(f"stripe-simulator: {error}") from None
        if check:
            typer.echo("the profile is valid")
            return
        configure_logging(settings.log_level, settings.log_format, service="stripe-simulator")
        run(config, profile)


def migrate(as_json: JsonFlag = False) -> None:
    """Create missing topics and apply missing migrations. Safe to repeat.

    Example: tidemeter migrate
    """
    from services.wire.migrations import apply_migrations
    from services.wire.topics import create_topics, plan_for

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="migrate")
        plans = plan_for(settings)
        created = create_topics(settings.kafka(), plans)
        applied = apply_migrations(settings.postgres())
    if as_json:
        typer.echo(json.dumps({"topics_created": created, "migrations_applied": applied}))
    else:
        typer.echo(f"{len(created)} topics created, {applied} migrations applied")
    if created:
        plan = plans[0]
        typer.echo(f"replicas: {plan.replication}; to confirm a write: {plan.min_insync_replicas}", err=True)


def up(
    counters: Annotated[int, typer.Option(min=1, max=16, help="Counters workers to run.")] = 1,
    port: Annotated[int | None, typer.Option(help="Port of the API; default 8080 or a free one.")] = None,
) -> None:
    """Run everything on this machine until Ctrl-C: Kafka, PostgreSQL, Stripe simulator, API, bridge, workers.

    What TIDEMETER_KAFKA_BOOTSTRAP, TIDEMETER_POSTGRES_DSN and TIDEMETER_STRIPE_API_KEY name is used
    instead of an embedded one. Data stay in TIDEMETER_DATA_DIR (default ~/.local/share/tidemeter).

    Example: tidemeter up --counters 2
    """
    from services.embedded import EmbeddedError
    from services.embedded.processes import is_free
    from services.embedded.stack import Stack

    stop = threading.Event()
    with sentences():
        configure_logging("info", service="up")
        running = running_runtime()
        if running:
            raise Misconfigured(
                f"it already runs, as process {running['pid']}: stop that one, or set TIDEMETER_DATA_DIR"
            )
        settings = load_settings()
        wanted = port or (settings.http_port if is_free(settings.http_port) else None)
        stack = Stack(data_directory(), settings, http_port=wanted, counters=counters)
        try:
            stack.start(lambda text: typer.echo(text, err=True))
        except EmbeddedError as error:
            raise fail(str(error), 2) from None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            typer.echo(f"API        http://127.0.0.1:{stack.member('ingest').port}  (OpenAPI at /docs)")
            typer.echo(f"Kafka      {stack.kafka_bootstrap}")
            typer.echo(f"Stripe     {stack.stripe_base or 'api.stripe.com'}")
            if (bridge := stack.members().get("bridge")) is not None:
                typer.echo(f"Webhooks   {bridge.base_url}/v1/webhooks/<endpoint>")
            typer.echo("Ready. Ctrl-C stops everything; data stay.")
            while not stop.wait(0.5):
                stack.supervise()
            typer.echo("stopping", err=True)
        finally:
            stack.stop()
