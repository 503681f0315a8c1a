"""``tidemeter bridge``: Stripe's webhooks to Kafka."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.common import sentences
from services.wire.settings import load_settings


def bridge(
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; default TIDEMETER_BRIDGE_PORT.")
    ] = None,
) -> None:
    """Run the webhook bridge.

    Example: TIDEMETER_WEBHOOK_SECRETS_FILE=/run/secrets/webhooks tidemeter bridge
    """
    from services.bridge.app import run

    with sentences():
        run(load_settings(bridge_port=port))
