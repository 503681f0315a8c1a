"""A dispatcher with a planted handler, run as a program: its effect is a row, its own handler's a line."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from services.pusher.failures import fail_reported
from services.webhooks import UserHandler, WebhookEvent
from services.webhooks.agent import run
from services.webhooks.handling import Handler
from services.wire.log import configure_logging
from services.wire.records import OutboxRow, ops_event
from services.wire.settings import load_settings
from services.wire.times import micros


def effect(db: Any, event: WebhookEvent, found: str, now: datetime) -> Sequence[OutboxRow]:
    """A row, and an ops event."""
    db.execute("INSERT INTO effects (event_id, note) VALUES (%s, %s)", (event.event_id, found))
    return [
        ops_event(
            "charge_failed",
            subject_type="webhook",
            subject_id=event.event_id,
            source="test",
            at_us=micros(now),
        )
    ]


def line(event: WebhookEvent) -> None:
    """At least once: into a file that outlives the process."""
    with Path(os.environ["TIDEMETER_OWN_LINES"]).open("a", encoding="utf-8") as file:
        file.write(f"{event.event_id}\n")


#: What TIDEMETER_WEBHOOK_HANDLERS names.
OWN = UserHandler("own", ("thing.*",), line)


def main() -> None:
    settings = load_settings()
    configure_logging("info", "json", service="dispatcher")
    handlers = [Handler(("thing.changed",), effect, fetch=lambda event, _: event.data["note"])]
    asyncio.run(run(settings, fail_reported, lambda *_: None, handlers))


if __name__ == "__main__":
    main()
