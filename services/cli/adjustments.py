"""``tidemeter adjustments``: see and decide events that came after their lateness window."""

from __future__ import annotations

import getpass
import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences, show_table

adjustments_app = typer.Typer(help="List, approve and reject adjustments.", no_args_is_help=True)


class State(StrEnum):
    """What can be asked for."""

    PENDING = "pending"
    APPROVED = "approved"
    APPLIED = "applied"
    REJECTED = "rejected"
    ALL = "all"


_COLUMNS = (
    "adjustment_id",
    "tenant_id",
    "customer_ref",
    "meter",
    "quantity",
    "occurred_at",
    "arrived_at",
    "reason",
    "state",
)


@adjustments_app.command("list")
def list_adjustments(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    meter: Annotated[str | None, typer.Option(help="Only of this meter.")] = None,
    customer: Annotated[str | None, typer.Option(help="Only of this customer, by your reference.")] = None,
    state: Annotated[State, typer.Option(help="Only those in this state.")] = State.PENDING,
    as_json: JsonFlag = False,
) -> None:
    """List adjustments, oldest event first. The reason beyond_retention: it may have been counted before.

    Example: tidemeter adjustments list --tenant acme
    """
    from services.console.adjustments import STATES, find

    states = STATES if state is State.ALL else [state.value]
    with sentences(), database() as db:
        rows = [
            [row[name] for name in _COLUMNS]
            for row in find(db, states=states, tenant=tenant, meter=meter, customer=customer)
        ]
    if as_json:
        typer.echo(json.dumps([dict(zip(_COLUMNS, map(_plain, row), strict=True)) for row in rows]))
        return
    show_table(_COLUMNS, [[_plain(value) for value in row] for row in rows])


@adjustments_app.command()
def approve(
    adjustment_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids from `adjustments list`.")
    ],
    by: Annotated[str | None, typer.Option(help="Who decides; default the current user.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Have adjustments counted: into their own hour, or the current one if Stripe would refuse their time.

    The counters do so within seconds; then their state is applied.

    Example: tidemeter adjustments approve 0b8f6f5e-9f4b-5f0e-8a55-4b7f4a3c2d1e
    """
    _decide(adjustment_ids, True, by, as_json)


@adjustments_app.command()
def reject(
    adjustment_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids from `adjustments list`.")
    ],
    by: Annotated[str | None, typer.Option(help="Who decides; default the current user.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Decide that adjustments are never counted. They stay listed as rejected.

    Example: tidemeter adjustments reject 0b8f6f5e-9f4b-5f0e-8a55-4b7f4a3c2d1e
    """
    _decide(adjustment_ids, False, by, as_json)


def _decide(adjustment_ids: list[str], approved: bool, by: str | None, as_json: bool) -> None:
    from services.console.adjustments import Decision, TooOldForStripe, UnknownAdjustment, decide

    decisions: list[Decision] = []
    refused: Exception | None = None
    with sentences(), database() as db:
        try:
            for one in adjustment_ids:
                decisions.append(decide(db, one, approved=approved, by=by or getpass.getuser()))
        except (UnknownAdjustment, TooOldForStripe) as error:
            refused = error  # those before it are decided, and shown
    if as_json:
        if refused is None or decisions:
            typer.echo(
                json.dumps(
                    [
                        {"adjustment_id": d.adjustment_id, "state": d.state, "changed": d.changed}
                        for d in decisions
                    ]
                )
            )
    else:
        for decision in decisions:
            typer.echo(
                f"{decision.adjustment_id} {decision.state}"
                + ("" if decision.changed else " (decided before; nothing changed)")
            )
        if any(decision.changed and decision.state == "approved" for decision in decisions):
            typer.echo("The counters apply it within seconds.", err=True)
    if refused is not None:
        raise fail(str(refused), MISUSED)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else str(value)
