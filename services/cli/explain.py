"""``tidemeter explain``: why Stripe holds a number for a customer in an hour."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.common import ATTENTION, MISUSED, JsonFlag, fail, sentences, show_table
from services.streaming.explanation import LIMIT, LIMIT_MAX
from services.wire.decimals import plain
from services.wire.settings import load_settings

if TYPE_CHECKING:
    from services.streaming.explanation import Event, Explanation


def explain(
    customer: Annotated[str, typer.Option(help="Stripe's id of the customer, or your reference.")],
    meter: Annotated[str, typer.Option(help="The meter's slug, or the event name at Stripe.")],
    hour: Annotated[str, typer.Option(help="Any time within the hour: ISO 8601 with an offset, or -PT24H.")],
    tenant: Annotated[
        str | None, typer.Option(help="Needed if several tenants have such a customer and meter.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, max=LIMIT_MAX, help="Rows of each list, at most; all are counted.")
    ] = LIMIT,
    as_json: JsonFlag = False,
) -> None:
    """Tell why Stripe holds a number: from its meter events down to the offsets of the events behind it.

    Reads the log, and changes nothing. Exit status 1: two numbers differ and nothing explains it, or records
    are gone that would tell.

    Example: tidemeter explain --customer cus_9s6XKzkNRiz8i3 --meter requests --hour 2026-11-22T10:30:00Z
    """
    from services.replay.customer_hours import RefusedQuestion
    from services.replay.explaining import Explainer
    from services.streaming.explanation import Question

    with sentences():
        try:
            question = msgspec.convert(
                {"customer": customer, "meter": meter, "hour": hour, "tenantId": tenant, "limit": limit},
                Question,
            )
        except msgspec.ValidationError as error:
            raise fail(str(error), MISUSED) from None
        question = msgspec.structs.replace(question, others=True)
        columns = TextColumn("records"), BarColumn(), MofNCompleteColumn()
        console = Console(stderr=True)
        # Where there is no terminal it would leave an empty line.
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=None)
            try:
                found = Explainer(load_settings()).explain(
                    question, progress=lambda read, total: progress.update(bar, completed=read, total=total)
                )
            except RefusedQuestion as error:
                raise fail(str(error), MISUSED) from None
    if as_json:
        typer.echo(msgspec.json.encode(found))
    else:
        _show(found)
    if not found.agrees:
        raise typer.Exit(ATTENTION)


def _show(found: Explanation) -> None:
    """Everything, from Stripe down; an empty list is left out."""
    names = ", ".join(found.customer_refs) or "nobody"
    typer.echo(
        f"{found.tenant_id}: {names} as {found.stripe_customer or 'no Stripe customer'}, "
        f"{', '.join(found.meters)} as {found.event_name}, {_text(found.hour)}"
    )
    typer.echo(found.stripe.sentence)
    items = [f"{place}" for place in range(len(found.items))]
    _list("items", found.totals.items, found.items, {"item": items}, "calendar")
    _list("meter events", found.totals.intents, found.intents)
    _list("deltas", found.totals.deltas, found.deltas)
    _list("carried forward", found.totals.carried, found.carried)
    _list("buckets", found.totals.buckets, found.buckets)
    if found.events:
        show_table(_EVENT_COLUMNS, [_event(one) for one in found.events])
        _say_cut("events", found.totals.events, len(found.events))
    typer.echo(", ".join(f"{number} {fate}" for fate, number in found.fates.items()) or "no events")
    _list("adjustments", found.totals.adjustments, found.adjustments)
    typer.echo(found.records.sentence)
    for check in found.checks:
        typer.echo(
            f"[{check.verdict}] {check.sentence}" + ("" if len(items) < 2 else f" (item {check.item})")
        )
    _say_cut("checks", sum(found.totals.checks.values()), len(found.checks))


def _list(
    name: str,
    total: int,
    rows: Sequence[msgspec.Struct],
    first: Mapping[str, Sequence[str]] | None = None,
    *without: str,
) -> None:
    """A table of the columns in which any row holds something."""
    if rows:
        documents = [msgspec.structs.asdict(row) for row in rows]
        columns = [
            column
            for column in documents[0]
            if column not in without and any(one[column] not in (None, {}) for one in documents)
        ]
        before = first or {}
        show_table(
            [f"{name}:", *before, *columns],
            [
                [
                    "",
                    *(texts[place] for texts in before.values()),
                    *(_text(one[column]) for column in columns),
                ]
                for place, one in enumerate(documents)
            ],
        )
    _say_cut(name, total, len(rows))


def _say_cut(name: str, total: int, listed: int) -> None:
    if listed < total:
        typer.echo(f"{listed} of {total} {name}; see the rest with --limit {total}", err=True)


_EVENT_COLUMNS = (
    *("events:", "topic", "partition", "offset", "arrived_at", "key", "occurred_at", "quantity", "value"),
    *("dimensions", "fate", "because"),
)


def _event(one: Event) -> list[str]:
    because = []
    if one.first is not None:
        because.append(f"first at {one.first.topic}/{one.first.partition}/{one.first.offset}")
    if one.adjustment is not None:
        counted = one.adjustment.counted_at
        because.append(f"{one.adjustment.reason}, {one.adjustment.state}")
        because.append("" if counted is None else f"counts at {_text(counted)}")
    if one.parked is not None:
        because.append(f"{one.parked.reason}, {one.parked.state}, parked record {one.parked.id}")
    return [
        "",
        *(one.topic, str(one.partition), str(one.offset), _text(one.arrived_at), one.idempotency_key),
        *(_text(one.occurred_at), _text(one.quantity), _text(one.value), _text(dict(one.dimensions))),
        *(one.fate, "; ".join(filter(None, because)) or "–"),
    ]


def _text(value: Any) -> str:
    if value is None or value == {} or value == "":
        return "–"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)
