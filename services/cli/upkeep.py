"""``tidemeter upkeep | prune``: the recurring jobs, and retention by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from services.cli.common import ATTENTION, JsonFlag, database, fail, operator, sentences, show_table
from services.wire.log import configure_logging
from services.wire.settings import load_settings


def upkeep() -> None:
    """Run the recurring jobs: fees, dunning, expiring cards, retention, and mails to operators.

    Example: TIDEMETER_SMTP_HOST=mail.example.com TIDEMETER_MAIL_FROM=… TIDEMETER_MAIL_TO=… tidemeter upkeep
    """
    from services.upkeep.agent import run

    with sentences():
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, service="upkeep")
        asyncio.run(run(settings))


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only; delete nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete what is settled and older than its retention; `tidemeter upkeep` does so daily.

    Example: tidemeter prune --dry-run
    """
    from services.upkeep import pruning

    now = datetime.now(UTC)
    with sentences():
        settings = load_settings()
        wanted = pruning.rules(settings)
        with database(settings) as db:
            try:
                if dry_run:
                    pruned = pruning.count(db, wanted, now)
                else:
                    pruned = pruning.prune(db, wanted, now, actor=operator())
            except pruning.AlreadyRunning:
                raise fail("another process prunes at this moment", ATTENTION) from None
    if as_json:
        found = {"dry_run": dry_run, "at": now.isoformat(), "tables": [asdict(one) for one in pruned]}
        typer.echo(json.dumps(found))
        return
    show_table(
        ("table", "kept for days", "would be deleted" if dry_run else "deleted"),
        [(one.table, "for ever" if one.days < 0 else str(one.days), str(one.rows)) for one in pruned],
    )
