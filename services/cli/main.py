"""``tidemeter``: one command for everything. Commands import their service only when they run."""

from __future__ import annotations

import json
import sys

import typer

from services.cli import adjustments, apply, operate, services, status
from services.cli.bench import bench
from services.cli.demo import demo
from services.cli.keys import keys_app
from services.cli.send import send

app = typer.Typer(
    name="tidemeter",
    help="Usage metering on Kafka: exact counters, late events, idempotent deltas to Stripe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document of the HTTP API.

    Example: tidemeter openapi > openapi.json
    """
    from services.ingest.app import openapi_document

    json.dump(openapi_document(), sys.stdout, indent=2)
    print()


for command in (
    services.up,
    demo,
    send,
    status.status,
    apply.apply,
    services.ingest,
    services.counters,
    services.pusher,
    services.migrate,
    operate.resume,
    bench,
):
    app.command()(command)
app.command("stripe-simulator")(services.stripe_simulator)
app.command("retry-failed")(operate.retry_failed)
app.add_typer(adjustments.adjustments_app, name="adjustments")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
