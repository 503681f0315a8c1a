"""``tidemeter parked``: what could not be processed, and what becomes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.common import ATTENTION, MISUSED, JsonFlag, database, fail, operator, sentences, show_table
from services.console import parked
from services.streaming.parking import STATES, Choice, Kind
from services.wire.errors import TidemeterError
from services.wire.settings import load_settings
from services.wire.times import moment

parked_app = typer.Typer(
    help="List, show, re-drive and discard records that could not be processed.", no_args_is_help=True
)

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 10.0


class Which(StrEnum):
    """States that can be asked for."""

    PARKED = "parked"
    REDRIVEN = "redriven"
    DISCARDED = "discarded"
    ALL = "all"


class KindOption(StrEnum):
    """Kinds that can be asked for."""

    DEAD_LETTER = "dead_letter"
    UPCAST_FAILURE = "upcast_failure"
    CONFLICT = "conflict"


Ids = Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Ids from `parked list`.")]
KindsOption = Annotated[list[KindOption] | None, typer.Option("--kind", help="Only of this kind.")]
ReasonsOption = Annotated[list[str] | None, typer.Option("--reason", help="Only with this reason.")]
TenantOption = Annotated[str | None, typer.Option(help="Only of this tenant.")]
MeterOption = Annotated[str | None, typer.Option(help="Only of this meter.")]
TopicOption = Annotated[str | None, typer.Option(help="Only read from this topic.")]
SchemaOption = Annotated[str | None, typer.Option(help="Only that say they are this, such as usage_event/4.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Arrived then or later: ISO 8601 with an offset, or -PT24H.")
]
UntilOption = Annotated[str | None, typer.Option(help="Arrived earlier: the same, or now.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them, without any restriction.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also more than 10,000 records.")]


@contextmanager
def _sentences() -> Iterator[None]:
    """As :func:`sentences`, with the refusals of this group."""
    with sentences():
        try:
            yield
        except parked.NothingChosen:
            raise fail("say which: ids, --reason, --tenant, --since …; or --all", MISUSED) from None
        except parked.TooMany as error:
            raise fail(
                f"{error.number} records are meant; restrict the choice, or add --force", MISUSED
            ) from None
        except parked.UnknownRecord as error:
            raise fail(str(error), MISUSED) from None


def _choice(
    ids: Sequence[int] | None,
    kinds: Sequence[KindOption] | None,
    reasons: Sequence[str] | None,
    since: str | None,
    until: str | None,
    *,
    tenant: str | None,
    meter: str | None,
    topic: str | None,
    schema: str | None,
) -> Choice:
    now = datetime.now(UTC)
    known: tuple[Kind, ...] = tuple(kind.value for kind in kinds or ())
    return Choice(
        ids=tuple(ids or ()),
        kinds=known,
        reasons=tuple(reasons or ()),
        since=None if since is None else moment(since, now),
        until=None if until is None else moment(until, now),
        tenant=tenant,
        meter=meter,
        topic=topic,
        schema=schema,
    )


@parked_app.command("list")
def list_parked(
    kind: KindsOption = None,
    reason: ReasonsOption = None,
    tenant: TenantOption = None,
    meter: MeterOption = None,
    topic: TopicOption = None,
    schema: SchemaOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    state: Annotated[Which, typer.Option(help="Only those in this state.")] = Which.PARKED,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List parked records, the newest first, and count them by reason.

    Example: tidemeter parked list --reason unknown_meter --since -PT24H
    """
    states = STATES if state is Which.ALL else (state.value,)
    with _sentences():
        choice = _choice(
            None, kind, reason, since, until, tenant=tenant, meter=meter, topic=topic, schema=schema
        )
        with database() as db:
            rows = parked.find(db, choice, states=states, limit=limit)
            numbers = parked.numbers(db, choice, states=states)
    if as_json:
        records = [{name: _plain(row[name]) for name in parked.COLUMNS} for row in rows]
        typer.echo(json.dumps({"records": records, "numbers": numbers}))
        return
    show_table(parked.COLUMNS, [[_text(row[name]) for name in parked.COLUMNS] for row in rows])
    total = sum(numbers.values())
    reasons = ", ".join(f"{name} {number}" for name, number in numbers.items())
    typer.echo(f"{len(rows)} of {total}" + (f": {reasons}" if reasons else ""), err=True)


@parked_app.command()
def show(
    parked_id: Annotated[int, typer.Argument(metavar="ID", help="Id from `parked list`.")],
    record: Annotated[
        bool, typer.Option("--record", help="Also its headers and content. It may hold customers' data.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show one parked record: where it was read, why it is parked, what was tried.

    Example: tidemeter parked show 42 --record
    """
    with _sentences(), database() as db:
        row = parked.show(db, parked_id, with_record=record)
    shown = {name: _plain(value) for name, value in row.items() if name != "value"}
    if record:
        shown["record"] = _content(row["value"])
    if as_json:
        typer.echo(json.dumps(shown))
        return
    show_table(("field", "value"), [(name, _text(value)) for name, value in shown.items()])


@parked_app.command()
def redrive(
    ids: Ids = None,
    kind: KindsOption = None,
    reason: ReasonsOption = None,
    tenant: TenantOption = None,
    meter: MeterOption = None,
    topic: TopicOption = None,
    schema: SchemaOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    wait: Annotated[bool, typer.Option(help="Wait for the result.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Have parked records tried again, by the service that parked them. Each counts once, in its own period.

    A dry run does the same and takes it back. Exit status 1: some stay parked. Ctrl-C does not stop it:
    `tidemeter parked cancel` does.

    Example: tidemeter parked redrive --reason unknown_meter --tenant acme --dry-run
    """
    with _sentences():
        choice = _choice(
            ids, kind, reason, since, until, tenant=tenant, meter=meter, topic=topic, schema=schema
        )
        with database() as db:
            requests = parked.redrive(
                db,
                choice,
                by=operator(),
                dry_run=dry_run,
                everything=everything,
                force=force,
            )
            wanted = [request.redrive_id for request in requests]
            rows = _await(db, wanted) if wait else parked.redrives(db, ids=wanted)
    _show_redrives(rows, as_json)
    if not rows and not as_json:
        typer.echo("nothing that can be tried again was chosen", err=True)
    if any(row["state"] == "paused" or _still_parked(row) for row in rows):
        raise typer.Exit(ATTENTION)


@parked_app.command()
def discard(
    note: Annotated[str, typer.Option(help="Why; stays with the records.")],
    ids: Ids = None,
    kind: KindsOption = None,
    reason: ReasonsOption = None,
    tenant: TenantOption = None,
    meter: MeterOption = None,
    topic: TopicOption = None,
    schema: SchemaOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Settle that parked records are never processed. They stay listed, with the note.

    Example: tidemeter parked discard 42 43 --note "test traffic, agreed with acme"
    """
    with _sentences():
        choice = _choice(
            ids, kind, reason, since, until, tenant=tenant, meter=meter, topic=topic, schema=schema
        )
        with database() as db:
            number = parked.discard(
                db,
                choice,
                note=note,
                by=operator(),
                dry_run=dry_run,
                everything=everything,
                force=force,
            )
    if as_json:
        typer.echo(json.dumps({"records": number, "dry_run": dry_run}))
    else:
        typer.echo(f"{number} records {'would be ' if dry_run else ''}discarded")


@parked_app.command()
def redrives(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List re-drives, the newest first.

    Example: tidemeter parked redrives
    """
    with _sentences(), database() as db:
        rows = parked.redrives(db, limit=limit)
    _show_redrives(rows, as_json)


@parked_app.command()
def cancel(
    redrive_id: Annotated[int, typer.Argument(metavar="ID", help="Id from `parked redrives`.")],
) -> None:
    """Stop a re-drive after the batch under way. What was counted stays counted.

    Example: tidemeter parked cancel 7
    """
    with _sentences(), database() as db:
        changed = parked.cancel(db, redrive_id, by=operator())
    typer.echo("cancelled" if changed else "it had ended before; nothing changed")


def _await(db: psycopg.Connection[Any], wanted: Sequence[int]) -> Sequence[Mapping[str, Any]]:
    """Wait until these re-drives have ended or paused; progress goes to standard error."""
    started = time.monotonic()
    hinted = False
    columns = TextColumn("re-drive"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        while True:
            rows = parked.redrives(db, ids=wanted)
            tried = sum(row["tried"] for row in rows)
            progress.update(bar, completed=tried, total=sum(row["selected"] for row in rows))
            if all(row["finished_at"] is not None or row["state"] == "paused" for row in rows):
                return rows
            waiting = [row["service"] for row in rows if row["state"] == "requested"]
            if waiting and not hinted and time.monotonic() - started > PATIENCE_SECONDS:
                hinted = True
                progress.console.print(f"waiting for a worker of {waiting[0]}: is one running?")
            time.sleep(POLL_SECONDS)


_REDRIVE_COLUMNS = ("id", "service", "state", "dry run", "selected", "tried", "results", "requested by", "at")


def _show_redrives(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([{name: _plain(value) for name, value in row.items()} for row in rows]))
        return
    show_table(
        _REDRIVE_COLUMNS,
        [
            (
                str(row["redrive_id"]),
                row["service"],
                row["state"] + (f" ({row['paused_reason']})" if row["state"] == "paused" else ""),
                "yes" if row["dry_run"] else "no",
                str(row["selected"]),
                str(row["tried"]),
                ", ".join(f"{name} {number}" for name, number in sorted(row["results"].items())) or "–",
                row["requested_by"],
                _text(row["requested_at"]),
            )
            for row in rows
        ],
    )


def _still_parked(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("parked:") for name in row["results"])


def _content(value: bytes | None) -> Any:
    """The record as far as it can be read, else its bytes in hexadecimal."""
    from services.wire.registry import decoder_for

    if value is None:
        return "not kept: parked by an older release; see its topic"
    try:
        schema, record = decoder_for(load_settings()).decode(bytes(value))
    except TidemeterError:
        return {"bytes": len(value), "hex": bytes(value[:4096]).hex()}
    return {"schema": schema.name, "fields": {name: _plain(field) for name, field in record.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return value


def _text(value: Any) -> str:
    value = _plain(value)
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value)
