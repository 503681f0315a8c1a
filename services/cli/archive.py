"""``tidemeter archive``: usage records as files; what is held, and going on behind a hole."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from services.cli.common import ATTENTION, MISUSED, JsonFlag, database, fail, operator, sentences, show_table
from services.wire.log import configure_logging
from services.wire.settings import Settings, load_settings
from services.wire.times import instant


def archive(
    once: Annotated[
        bool, typer.Option("--once", help="Archive all that is there now, whatever its age, and end.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="List what is held, and end.")] = False,
    accept_hole: Annotated[
        bool,
        typer.Option(
            "--accept-hole", help="Give up records that were deleted before they were archived, and end."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the archiver: usage records to files at TIDEMETER_ARCHIVE_URL. One at a time works, others wait.

    With --accept-hole, partitions that stopped at deleted records go on behind them; --list shows the hole.

    Example: TIDEMETER_ARCHIVE_URL=s3://bucket/tidemeter tidemeter archive
    """
    if once + show + accept_hole > 1:
        raise fail("--once, --list and --accept-hole are three things: choose one", MISUSED)
    if as_json and not (once or show or accept_hole):
        raise fail("--json goes with --once, --list or --accept-hole", MISUSED)
    with sentences():
        settings = load_settings()
        if show:
            _list(settings, as_json)
        elif accept_hole:
            _accept_hole(settings, as_json)
        elif once:
            _once(settings, as_json)
        else:
            from services.archive.agent import run

            configure_logging(settings.log_level, settings.log_format, service="archive")
            asyncio.run(run(settings))


def _once(settings: Settings, as_json: bool) -> None:
    from services.archive.agent import run_once
    from services.archive.writing import Written

    configure_logging("error", settings.log_format, service="archive")
    waited = False

    def written(file: Written) -> None:
        tp = f"{file.partition.topic}/{file.partition.partition}"
        typer.echo(
            f"{tp}: offsets {file.first} to {file.last}, {file.bytes} bytes; {file.left} to go", err=True
        )

    def waiting() -> None:
        nonlocal waited
        if not waited:
            typer.echo("another archiver is at work; waiting for its end", err=True)
        waited = True

    summary = run_once(settings, written, waiting)
    stopped = {f"{tp.topic}/{tp.partition}": str(halt) for tp, halt in summary.halted.items()}
    if as_json:
        typer.echo(json.dumps({"records": summary.records, "files": summary.files, "stopped": stopped}))
    else:
        typer.echo(f"{summary.records} records archived in {summary.files} files")
    for tp, halt in stopped.items():
        typer.echo(f"error: {tp} stopped: {halt}", err=True)
    if stopped:
        raise typer.Exit(ATTENTION)


def _list(settings: Settings, as_json: bool) -> None:
    from services.archive.files import Archive, DamagedFile, NotHeld
    from services.wire.topics import USAGE_VERSIONS

    held = Archive(settings.archive())
    try:
        rows: list[dict[str, Any]] = [
            {"topic": tp.topic, "partition": tp.partition, **asdict(run)}
            for tp in held.partitions(USAGE_VERSIONS)
            for run in held.runs(tp)
        ]
    except (DamagedFile, NotHeld) as error:
        raise fail(str(error), ATTENTION) from None
    for row in rows:
        row["records"] = row["next_offset"] - row["first_offset"]
        for name in ("first_arrival", "last_arrival"):
            row[name] = instant(row[name] * 1000).isoformat()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    columns = (
        "topic", "partition", "first_offset", "next_offset", "records", "files", "bytes", "first_arrival",
        "last_arrival",
    )  # fmt: skip
    show_table(
        [name.replace("_", " ") for name in columns], [[str(row[name]) for name in columns] for row in rows]
    )


def _accept_hole(settings: Settings, as_json: bool) -> None:
    from services.archive.writing import accept_holes

    with database(settings) as db:
        accepted = accept_holes(settings, db, operator())
    if as_json:
        rows = [
            {"topic": tp.topic, "partition": tp.partition, "first": halt.first, "next": halt.log_offset}
            for tp, halt in accepted
        ]
        typer.echo(json.dumps(rows))
        return
    for tp, halt in accepted:
        typer.echo(f"{tp.topic}/{tp.partition} goes on: {halt}")
    if not accepted:
        typer.echo("no partition stopped at a hole")
