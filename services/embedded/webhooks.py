"""Have the simulated Stripe send its webhooks to the bridge of the same stack.

Three endpoints, as a real account would have them: ``main`` for snapshot events, ``connect`` for those of
connected accounts, ``thin`` for thin ones. The simulator and the ports may change between two starts, so
what is registered is looked up at each; secrets stay, in a file that only its owner reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import stripe

THIN_EVENTS = ["v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"]
KNOWN_FILE = "webhook-endpoints.json"
SECRETS_FILE = "webhook-secrets"


def register_webhooks(stripe_base: str, key: str, bridge_port: int, directory: Path) -> Path:
    """Point the simulator at the bridge; returns the file with the signing secrets.

    Raises:
        stripe.StripeError: the simulator refused.
    """
    client = stripe.StripeClient(key, base_addresses={"api": stripe_base, "meter_events": stripe_base})
    known_file = directory / KNOWN_FILE
    known: dict[str, dict[str, str]] = json.loads(known_file.read_text()) if known_file.exists() else {}
    for name in ("main", "connect", "thin"):
        url = f"http://127.0.0.1:{bridge_port}/v1/webhooks/{name}"
        if name not in known or not _moved(client, name, known[name]["id"], url):
            known[name] = _made(client, name, url)
    _write_private(known_file, json.dumps(known))
    secrets = directory / SECRETS_FILE
    _write_private(secrets, "".join(f"{name}={one['secret']}\n" for name, one in known.items()))
    return secrets


def _moved(client: stripe.StripeClient, name: str, identifier: str, url: str) -> bool:
    """Whether the endpoint is still there; it is at ``url`` then."""
    try:
        if name == "thin":
            client.v2.core.event_destinations.update(identifier, {"webhook_endpoint": {"url": url}})
        else:
            client.v1.webhook_endpoints.update(identifier, {"url": url})
    except stripe.InvalidRequestError:
        return False
    return True


def _made(client: stripe.StripeClient, name: str, url: str) -> dict[str, str]:
    made: Any
    if name == "thin":
        made = client.v2.core.event_destinations.create(
            {
                "name": name,
                "type": "webhook_endpoint",
                "event_payload": "thin",
                "enabled_events": THIN_EVENTS,
                "webhook_endpoint": {"url": url},
                "include": ["webhook_endpoint.signing_secret"],
            }
        )
        return {"id": made.id, "secret": made.webhook_endpoint.signing_secret}
    made = client.v1.webhook_endpoints.create(
        {"url": url, "enabled_events": ["*"], "connect": name == "connect"}
    )
    return {"id": made.id, "secret": made.secret}


def _write_private(path: Path, text: str) -> None:
    """The whole text or nothing, for its owner only."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(path)
