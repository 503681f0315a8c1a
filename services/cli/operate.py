"""``tidemeter resume`` and ``tidemeter retry-failed``: an operator says go on."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences
from services.streaming import offsets
from services.streaming.chunks import Partition


def resume(
    partition: Annotated[
        list[str] | None,
        typer.Option("--partition", help="topic/number, repeatable; default every halted one."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Let halted partitions go on, after you have seen why they stopped (`tidemeter status`).

    Example: tidemeter resume --partition usage.v3/0
    """
    wanted = None if not partition else [_partition(text) for text in partition]
    with sentences(), database() as db:
        resumed = offsets.resume(db, None, wanted)
    if as_json:
        names = ("consumer", "topic", "partition", "reason")
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in resumed]))
    else:
        for consumer, topic, number, reason in resumed:
            typer.echo(f"{consumer} {topic}/{number} goes on (was halted: {reason})")
        if not resumed:
            typer.echo("nothing was halted")


def _partition(text: str) -> Partition:
    topic, slash, number = text.rpartition("/")
    if not slash or not number.isdigit():
        raise fail(f"{text!r} is not topic/number, such as usage.v3/0", MISUSED)
    return Partition(topic, int(number))


def retry_failed(
    tenant: Annotated[str, typer.Option(help="Whose failed pushes to send again.")],
    meter: Annotated[str | None, typer.Option(help="Only of this meter.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Send again what Stripe refused for good, once its cause is fixed: under new identifiers, once.

    Example: tidemeter retry-failed --tenant acme --meter api_requests
    """
    from services.pusher.journal import release_failed

    with sentences(), database() as db, db.transaction():
        released = release_failed(db, tenant, meter)
    typer.echo(
        json.dumps({"released": released}) if as_json else f"{released} failed pushes will be sent again"
    )
