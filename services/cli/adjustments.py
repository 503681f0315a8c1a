"""``tidemeter adjustments``: see and decide events that came after their lateness window."""

from __future__ import annotations

import getpass
import json
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences

adjustments_app = typer.Typer(help="List, approve and reject adjustments.", no_args_is_help=True)


class State(StrEnum):
    """What can be asked for."""

    PENDING = "pending"
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
    "state",
)


@adjustments_app.command("list")
def list_adjustments(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    meter: Annotated[str | None, typer.Option(help="Only of this meter.")] = None,
    state: Annotated[State, typer.Option(help="Only those in this state.")] = State.PENDING,
    as_json: JsonFlag = False,
) -> None:
    """List adjustments, oldest event first.

    Example: tidemeter adjustments list --tenant acme
    """
    with sentences(), database() as db:
        rows = db.execute(
            "SELECT adjustment_id, tenant_id, customer_ref, meter, quantity, occurred_at, arrived_at, state "
            "FROM adjustments WHERE (%(state)s = 'all' OR state = %(state)s) "
            "AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
            "AND (%(meter)s::text IS NULL OR meter = %(meter)s) ORDER BY occurred_at, adjustment_id",
            {"state": state, "tenant": tenant, "meter": meter},
        ).fetchall()
    if as_json:
        typer.echo(json.dumps([dict(zip(_COLUMNS, map(_plain, row), strict=True)) for row in rows]))
        return
    table = Table(Column(_COLUMNS[0], no_wrap=True), *_COLUMNS[1:], box=None)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


@adjustments_app.command()
def approve(
    adjustment_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids from `adjustments list`.")
    ],
    by: Annotated[str | None, typer.Option(help="Who decides; default the current user.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Count adjustments: into their own hour, or the current one if Stripe would refuse their time.

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
    """Decide that adjustments are not counted. They stay listed as rejected.

    Example: tidemeter adjustments reject 0b8f6f5e-9f4b-5f0e-8a55-4b7f4a3c2d1e
    """
    _decide(adjustment_ids, False, by, as_json)


def _decide(adjustment_ids: list[str], approved: bool, by: str | None, as_json: bool) -> None:
    from services.counters.adjusting import UnknownAdjustment, decide

    with sentences(), database() as db:
        try:
            results = [
                decide(db, one, approved=approved, by=by or getpass.getuser()) for one in adjustment_ids
            ]
        except UnknownAdjustment as error:
            raise fail(str(error), MISUSED) from None
    if as_json:
        typer.echo(json.dumps([{"adjustment_id": i, "state": s, "changed": c} for i, s, c in results]))
    else:
        for adjustment_id, state, changed in results:
            typer.echo(f"{adjustment_id} {state}" + ("" if changed else " (decided before; nothing changed)"))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else str(value)
