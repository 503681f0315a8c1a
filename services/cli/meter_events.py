"""``tidemeter meter-events``: what was and was not sent to Stripe, and what a person can do about it."""

from __future__ import annotations

import getpass
import json
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

import psycopg
import typer
from psycopg.rows import dict_row

from services.cli.common import ATTENTION, MISUSED, JsonFlag, database, fail, sentences, show_table
from services.wire.decimals import plain

meter_events_app = typer.Typer(
    help="List, show and retry meter events; settle a doubt by hand.", no_args_is_help=True
)


class Which(StrEnum):
    """States, and groups of states, that can be asked for."""

    ATTENTION = "attention"
    OPEN = "open"
    ALL = "all"
    PENDING = "pending"
    IN_FLIGHT = "in_flight"
    IN_DOUBT = "in_doubt"
    REPORTED = "reported"
    FAILED = "failed"
    CANCELLED = "cancelled"


_GROUPS = {
    Which.ATTENTION: ("state = 'in_doubt' OR (state = 'failed' AND released_at IS NULL)"),
    Which.OPEN: "state IN ('pending', 'in_flight', 'in_doubt')",
    Which.ALL: "true",
}

_COLUMNS = (
    "identifier",
    "state",
    "tenant_id",
    "meter",
    "stripe_customer",
    "hour_start",
    "amount",
    "attempts",
    "error_code",
    "created_at",
)

_ONE = """
    SELECT m.*, i.customer_ref, d.sequence,
        (SELECT s.identifier FROM meter_events s WHERE s.replaces = m.identifier) AS replaced_by,
        ARRAY(SELECT f.identifier FROM meter_events f WHERE f.retried_as = m.identifier) AS retries,
        p.reason AS meter_paused
    FROM meter_events m
    LEFT JOIN items i USING (item_id) LEFT JOIN deltas d USING (identifier)
    LEFT JOIN paused_meters p USING (event_name)
    WHERE m.identifier = %s
    """

TenantOption = Annotated[str | None, typer.Option(help="Only of this tenant.")]
MeterOption = Annotated[str | None, typer.Option(help="Only of this meter.")]
CodeOption = Annotated[str | None, typer.Option(help="Only with this error code.")]


@meter_events_app.command("list")
def list_events(
    state: Annotated[
        Which, typer.Option(help="A state; attention: in doubt, or failed and not retried; open; all.")
    ] = Which.ATTENTION,
    tenant: TenantOption = None,
    meter: MeterOption = None,
    customer: Annotated[str | None, typer.Option(help="Only of this Stripe customer.")] = None,
    code: CodeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List meter events, newest first.

    Example: tidemeter meter-events list --state failed --tenant acme
    """
    group = _GROUPS.get(state, "state = %(state)s")
    query = (
        f"SELECT {', '.join(_COLUMNS)}, count(*) OVER () FROM meter_events WHERE ({group}) "  # noqa: S608
        "AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
        "AND (%(meter)s::text IS NULL OR meter = %(meter)s) "
        "AND (%(customer)s::text IS NULL OR stripe_customer = %(customer)s) "
        "AND (%(code)s::text IS NULL OR error_code = %(code)s) "
        "ORDER BY created_at DESC, identifier LIMIT %(limit)s"
    )
    values = {"state": state, "tenant": tenant, "meter": meter, "customer": customer}
    with sentences(), database() as db:
        rows = db.execute(query, {**values, "code": code, "limit": limit}).fetchall()
    total = rows[0][-1] if rows else 0
    if as_json:
        typer.echo(json.dumps([dict(zip(_COLUMNS, map(_plain, row[:-1]), strict=True)) for row in rows]))
    else:
        show_table(_COLUMNS, [[_text(value) for value in row[:-1]] for row in rows])
    if total > len(rows):
        typer.echo(f"{len(rows)} of {total}; see the rest with --limit {total}", err=True)


@meter_events_app.command()
def show(
    identifier: Annotated[str, typer.Argument(help="Identifier of the meter event.")],
    as_json: JsonFlag = False,
) -> None:
    """Show one meter event: what is sent, what became of it, and what comes next.

    Example: tidemeter meter-events show 3kzqj5m2r7e4n6c2lq5x3w7yab2ud4fi
    """
    with sentences(), database() as db:
        row = db.cursor(row_factory=dict_row).execute(_ONE, (identifier,)).fetchone()
    if row is None:
        raise fail(f"there is no meter event {identifier}", MISUSED)
    next_step = _next_step(row, datetime.now(UTC))
    if as_json:
        typer.echo(json.dumps({name: _plain(value) for name, value in row.items()} | {"next": next_step}))
        return
    show_table(
        ("field", "value"),
        [[name, _text(value)] for name, value in row.items() if value is not None and value != []],
    )
    typer.echo(next_step)


@meter_events_app.command()
def retry(
    identifiers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Failed meter events; default: what the options choose."),
    ] = None,
    tenant: TenantOption = None,
    meter: MeterOption = None,
    code: CodeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many it would be.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Send failed usage again, once its cause is mended: in new meter events, under new identifiers, once.

    Its amount goes back to its own hour, and the next closing makes a delta of it, with today's mapping of
    customer and meter; where the hour is final or too old for Stripe it is carried forward. The failed meter
    event stays as it is, and names the new one (`meter-events show`).

    Example: tidemeter meter-events retry --tenant acme --code meter_event_customer_not_found
    """
    from services.pusher.failures import Choice, count_failed, release_failed

    if not identifiers and tenant is None and meter is None and code is None:
        raise fail("say which: identifiers, --tenant, --meter or --code", MISUSED)
    choice = Choice(tenant, meter, code, identifiers or None)
    released = 0
    with sentences(), database() as db:
        unknown = _not_failed(db, identifiers or [])
        count, amount = count_failed(db, choice)
        while not dry_run:
            with db.transaction():
                done = release_failed(db, choice, now=datetime.now(UTC))
            released += len(done)
            if not done:
                break
    if as_json:
        document = {"failed": count, "amount": plain(amount), "released": released, "not_failed": unknown}
        typer.echo(json.dumps(document))
    elif dry_run:
        typer.echo(f"{count} failed meter events with {plain(amount)} in all would be sent again")
    else:
        typer.echo(f"{released} failed meter events will be sent again, within seconds")
    if unknown:
        raise fail(f"not failed, or retried before: {', '.join(unknown)}", ATTENTION)


@meter_events_app.command()
def settle(
    identifier: Annotated[str, typer.Argument(help="A meter event in doubt for more than a day.")],
    applied: Annotated[
        bool, typer.Option("--applied/--not-applied", help="Whether Stripe has it. Look there first.")
    ],
    by: Annotated[str | None, typer.Option(help="Who decides; default the current user.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Settle a doubt by hand, when Stripe's own total proves nothing (`in_doubt_unresolved`).

    Applied: it counts as reported. Not applied: it is never sent again, and one replacement is.

    Example: tidemeter meter-events settle 3kzqj5m2r7e4n6c2lq5x3w7yab2ud4fi --not-applied
    """
    from services.pusher.doubts import CannotSettle, settle_by_hand

    with sentences(), database() as db:
        try:
            successor = settle_by_hand(
                db, identifier, applied=applied, by=by or getpass.getuser(), now=datetime.now(UTC)
            )
        except CannotSettle as error:
            raise fail(str(error), MISUSED) from None
    if as_json:
        typer.echo(json.dumps({"identifier": identifier, "applied": applied, "replaced_by": successor}))
    elif successor is None:
        typer.echo(f"{identifier} is reported")
    else:
        typer.echo(f"{identifier} is cancelled; {successor} is sent in its place")


def _not_failed(db: psycopg.Connection[Any], identifiers: list[str]) -> list[str]:
    """Of those asked for by name, the ones that cannot be retried."""
    rows = db.execute(
        "SELECT identifier FROM meter_events "
        "WHERE identifier = ANY(%s) AND state = 'failed' AND released_at IS NULL",
        (identifiers,),
    ).fetchall()
    return sorted(set(identifiers) - {row[0] for row in rows})


def _next_step(row: dict[str, Any], now: datetime) -> str:
    from services.pusher.intents import Policy

    policy = Policy()
    if row["state"] == "pending":
        if row["meter_paused"]:
            return f"Waits until Stripe has the meter {row['event_name']} again ({row['meter_paused']})."
        return f"Is sent from {max(row['next_attempt_at'], now):%Y-%m-%d %H:%M:%S} UTC on."
    if row["state"] in ("in_flight", "in_doubt"):
        resend, ask = row["first_sent_at"] + policy.resend_for, row["first_sent_at"] + policy.ask_after
        if now < resend:
            return f"Is sent again under the same identifier until {resend:%Y-%m-%d %H:%M} UTC."
        if now < ask:
            return f"Nothing is sent; Stripe's total is read at {ask:%Y-%m-%d %H:%M} UTC."
        if row["error_code"] == "in_doubt_unresolved":
            return "Stripe's total fits neither case. Look there, then `tidemeter meter-events settle`."
        return "Stripe's total is being read; it settles this."
    if row["state"] == "failed":
        if row["retried_as"] is not None:
            return f"Was sent again as {row['retried_as']}."
        if row["released_at"] is not None:
            return "Its amount is back in its hour, and leaves in the next delta or is carried forward."
        return "Mend the cause, then `tidemeter meter-events retry`."
    if row["state"] == "cancelled" and row["replaced_by"] is not None:
        return f"Stripe did not apply it; {row['replaced_by']} was sent in its place."
    return "Settled." if row["state"] == "reported" else "Was never sent; its amount was carried forward."


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return plain(value)
    return value if value is None or isinstance(value, str | int | bool | list | dict) else str(value)


def _text(value: Any) -> str:
    shown = _plain(value)
    return "" if shown is None else shown if isinstance(shown, str) else str(shown)
