"""``tidemeter webhooks``: what became of Stripe's events, and having dead ones handled anew."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from services.cli.common import MISUSED, JsonFlag, database, fail, operator, sentences, show_table
from services.wire.settings import load_settings
from services.wire.times import moment

webhooks_app = typer.Typer(help="List, show, replay and prune Stripe's webhooks.", no_args_is_help=True)

#: More than so many are replayed only once a person confirms.
CONFIRM_ABOVE = 10


class Which(StrEnum):
    """States, and groups of states, that can be asked for."""

    ATTENTION = "attention"
    ALL = "all"
    RECEIVED = "received"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DEAD = "dead"
    STALE = "stale"


_COLUMNS = (
    "event_id",
    "handler",
    "state",
    "event_type",
    "object_id",
    "account",
    "endpoint",
    "created_at",
    "attempts",
    "replays",
    "next_attempt_at",
    "error_class",
    "error_code",
)

TypeOption = Annotated[str | None, typer.Option("--type", help="Only of this type; `invoice.*` for several.")]
HandlerOption = Annotated[str | None, typer.Option(help="Only runs of this handler; `tidemeter` is ours.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Only events made at or after: ISO 8601 with a zone, or 24h for a day ago.")
]
UntilOption = Annotated[str | None, typer.Option(help="Only events made before; the same form.")]


@webhooks_app.command("list")
def list_runs(
    state: Annotated[Which, typer.Option(help="A state; attention: dead or failed; all.")] = Which.ATTENTION,
    event_type: TypeOption = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only of this Stripe object.")] = None,
    account: Annotated[str | None, typer.Option(help="Only of this connected account.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Only what came to this endpoint first.")] = None,
    handler: HandlerOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List runs of handlers, newest event first.

    Example: tidemeter webhooks list --type 'invoice.*' --since 24h
    """
    from services.console.webhook_runs import ATTENTION, STATES, Choice, find

    groups = {Which.ATTENTION: ATTENTION, Which.ALL: STATES}
    with sentences():
        choice = Choice(
            None, event_type, object_id, account, endpoint, handler, _moment(since), _moment(until)
        )
        with database() as db:
            rows = find(db, choice, states=groups.get(state, (state.value,)), limit=limit + 1)
    shown = [[row[name] for name in _COLUMNS] for row in rows[:limit]]
    if as_json:
        typer.echo(json.dumps([dict(zip(_COLUMNS, map(_plain, row), strict=True)) for row in shown]))
    else:
        show_table(_COLUMNS, [[_text(value) for value in row] for row in shown])
    if len(rows) > limit:
        typer.echo(f"there are more than {limit}: see them with --limit", err=True)


@webhooks_app.command()
def show(
    event_id: Annotated[str, typer.Argument(help="Stripe's id of the event.")],
    body: Annotated[
        bool, typer.Option("--body", help="What Stripe sent too. It may hold personal data.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show one event, and how each handler stands with it.

    Example: tidemeter webhooks show evt_1S8rkH2eZvKYlo2C0k6Z4b3m
    """
    from services.console.webhook_runs import body_of, find_event

    with sentences(), database() as db:
        found = find_event(db, event_id)
        if found is None:
            raise fail(f"not_found: there is no webhook event {event_id}", MISUSED)
        text = body_of(db, event_id).decode("utf-8", "replace") if body else None
    if as_json:
        document: dict[str, Any] = {name: _plain(value) for name, value in found.event.items()}
        document["runs"] = [{name: _plain(value) for name, value in run.items()} for run in found.runs]
        typer.echo(json.dumps(document if text is None else document | {"body": text}))
        return
    show_table(("field", "value"), [[name, _text(value)] for name, value in found.event.items()])
    names = [name for name in found.runs[0] if name != "subject"] if found.runs else []
    show_table(names, [[_text(run[name]) for name in names] for run in found.runs])
    if text is not None:
        typer.echo(text)


@webhooks_app.command()
def replay(
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="An event, repeatable: its dead and failed runs.")
    ] = None,
    event_type: TypeOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Everything that is dead.")] = False,
    handler: HandlerOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many it would be.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also more than 10,000.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, however many.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Have dead runs handled anew, once their cause is mended: a hundred a second, oldest event first.

    What was done before is not done again: a run is dead only when its effect never happened.

    Example: tidemeter webhooks replay --type 'invoice.*' --since 24h --dry-run
    """
    from services.console.webhook_runs import Choice, Replayed, WebhookRefused
    from services.console.webhook_runs import replay as replay_runs

    if not (ids or event_type or since or until or all_dead):
        raise fail("say which: --id, --type, --since, --until or --all-dead", MISUSED)

    def act(dry: bool) -> Replayed:
        return replay_runs(db, choice, now=datetime.now(UTC), actor=operator(), dry_run=dry, force=force)

    with sentences():
        choice = Choice(ids or None, event_type, handler=handler, since=_moment(since), until=_moment(until))
        with database() as db:
            try:
                done = act(True)
                if not dry_run:
                    if done.requeued > CONFIRM_ABOVE and not yes:
                        typer.confirm(f"Replay {done.requeued} runs?", abort=True, err=True)
                    done = act(False)
            except WebhookRefused as error:
                raise fail(f"{error.code}: {error}", MISUSED) from None
    if as_json:
        document = {"requeued": done.requeued, "skipped": done.skipped, "dry_run": done.dry_run}
        typer.echo(json.dumps(document))
    else:
        verb = "would be handled" if done.dry_run else "are handled"
        typer.echo(f"{done.requeued} runs {verb} anew; {done.skipped} events skipped")


@webhooks_app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many it would be.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete events that were settled long enough ago. The dispatcher does so once a day by itself.

    How long: TIDEMETER_WEBHOOK_SUCCEEDED_DAYS and TIDEMETER_WEBHOOK_DEAD_DAYS.

    Example: tidemeter webhooks prune --dry-run
    """
    from services.console.webhook_runs import Retention
    from services.console.webhook_runs import prune as prune_runs

    with sentences():
        settings = load_settings()
        with database(settings) as db:
            done = prune_runs(
                db,
                Retention.from_settings(settings),
                now=datetime.now(UTC),
                actor=operator(),
                dry_run=dry_run,
            )
    if as_json:
        document = {
            "events": done.events,
            "runs": done.runs,
            "subjects": done.subjects,
            "dry_run": done.dry_run,
        }
        typer.echo(json.dumps(document))
    else:
        verb = "would go" if done.dry_run else "are gone"
        typer.echo(f"{done.events} events with {done.runs} runs {verb}, and {done.subjects} old positions")


def _moment(text: str | None) -> datetime | None:
    return None if text is None else moment(text, datetime.now(UTC))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
