"""``tidemeter periods``: when billing periods changed, and what was billed in a later one than its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, LiteralString

import typer
from psycopg.rows import dict_row

from services.cli.common import JsonFlag, database, sentences, show_table
from services.wire.decimals import plain

periods_app = typer.Typer(help="See changes of billing periods, and what was carried.", no_args_is_help=True)

Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
Customer = Annotated[str | None, typer.Option(help="Only of this customer, by your reference.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")]


@periods_app.command()
def changes(
    tenant: Tenant = None,
    customer: Customer = None,
    only_open: Annotated[bool, typer.Option("--open", help="Only those not carried out yet.")] = False,
    limit: Limit = 100,
    as_json: JsonFlag = False,
) -> None:
    """List changes of billing periods, newest first. Without a customer: of all that have none of their own.

    Straddling hours hold events of two periods; they were put into the period of their first event.

    Example: tidemeter periods changes --tenant acme --open
    """
    _show(
        "SELECT change_id, tenant_id, customer_ref, calendar, requested_at, done_at, items, buckets, "
        "straddling FROM calendar_changes WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
        "AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s) "
        "AND (done_at IS NULL OR NOT %(open)s) ORDER BY change_id DESC LIMIT %(limit)s",
        {"tenant": tenant, "customer": customer, "open": only_open, "limit": limit},
        ("change_id", "tenant_id", "customer_ref", "calendar", "done_at", "items", "buckets", "straddling"),
        as_json,
    )


@periods_app.command()
def carried(
    tenant: Tenant = None,
    customer: Customer = None,
    meter: Annotated[str | None, typer.Option(help="Only of this meter.")] = None,
    limit: Limit = 100,
    as_json: JsonFlag = False,
) -> None:
    """List usage that came after its period's last push and was billed in a later one, newest first.

    Example: tidemeter periods carried --tenant acme --json
    """
    _show(
        "SELECT carry_id, tenant_id, customer_ref, meter, dimensions, period_start, hour_start, to_period, "
        "to_hour, amount, reason, carried_at FROM carry_forwards JOIN items USING (item_id) "
        "WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
        "AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s) "
        "AND (%(meter)s::text IS NULL OR meter = %(meter)s) ORDER BY carry_id DESC LIMIT %(limit)s",
        {"tenant": tenant, "customer": customer, "meter": meter, "limit": limit},
        (
            "tenant_id",
            "customer_ref",
            "meter",
            "dimensions",
            "period_start",
            "hour_start",
            "to_period",
            "amount",
            "reason",
        ),
        as_json,
    )


def _show(query: LiteralString, parameters: dict[str, Any], columns: Sequence[str], as_json: bool) -> None:
    """All columns as JSON, or ``columns`` as a table."""
    with sentences(), database() as db:
        rows = db.cursor(row_factory=dict_row).execute(query, parameters).fetchall()
    if as_json:
        typer.echo(json.dumps([{name: _document(value) for name, value in row.items()} for row in rows]))
        return
    show_table(columns, [[_cell(row[name]) for name in columns] for row in rows])


def _document(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return plain(value) if isinstance(value, Decimal) else value


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S%z}"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(_document(value))
