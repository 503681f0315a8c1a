"""``tidemeter``: one command for everything. Commands import their service only when they run."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from services.cli import (
    adjustments,
    apply,
    meter_events,
    operate,
    parked,
    periods,
    reconcile,
    replay,
    services,
    status,
    upkeep,
)
from services.cli.archive import archive
from services.cli.bench import bench
from services.cli.bridge import bridge
from services.cli.demo import demo
from services.cli.doctor import doctor
from services.cli.explain import explain
from services.cli.keys import keys_app
from services.cli.offsets import offsets_app
from services.cli.schemas import schemas_app
from services.cli.send import send
from services.cli.webhooks import webhooks_app

app = typer.Typer(
    name="tidemeter",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(version("tidemeter"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Usage metering on Kafka: exact counters, late events, idempotent deltas to Stripe."""


@app.command()
def openapi() -> None:
    """Print the OpenAPI document of the HTTP API.

    Example: tidemeter openapi > openapi.json
    """
    from services.console.routes import ROUTES
    from services.ingest.app import openapi_document

    json.dump(openapi_document(ROUTES), sys.stdout, indent=2)
    print()


for command in (
    services.up,
    demo,
    send,
    status.status,
    doctor,
    explain,
    apply.apply,
    services.ingest,
    services.counters,
    services.pusher,
    bridge,
    upkeep.upkeep,
    upkeep.prune,
    services.dispatcher,
    archive,
    services.replayer,
    services.reconciler,
    reconcile.reconcile,
    replay.replay,
    replay.rebuild,
    services.migrate,
    operate.resume,
    bench,
):
    app.command()(command)
app.command("stripe-simulator")(services.stripe_simulator)
app.add_typer(meter_events.meter_events_app, name="meter-events")
app.add_typer(parked.parked_app, name="parked")
app.add_typer(replay.replays_app, name="replays")
app.add_typer(reconcile.reconciliation_app, name="reconciliation")
app.add_typer(adjustments.adjustments_app, name="adjustments")
app.add_typer(periods.periods_app, name="periods")
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(keys_app, name="keys")
app.add_typer(offsets_app, name="offsets")
app.add_typer(schemas_app, name="schemas")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
