"""``tidemeter reconcile``: what Stripe shows beside what it should show."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.common import (
    ATTENTION,
    MISUSED,
    UNAVAILABLE,
    JsonFlag,
    database,
    fail,
    operator,
    sentences,
    show_table,
)
from services.streaming import reconciliation
from services.streaming.parking import audit
from services.streaming.reconciliation import (
    Asked,
    ReconcileRequest,
    RefusedReconciliation,
    Summary,
    resolve,
    summarise,
)
from services.wire.decimals import plain
from services.wire.settings import Settings, load_settings

if TYPE_CHECKING:
    from services.streaming.reconciliation import Item, State

#: Exit status by what was found. What is not known is not well.
EXIT = {"ok": 0, "adjust": 0, "drift": ATTENTION, "unknown": UNAVAILABLE}

reconciliation_app = typer.Typer(
    no_args_is_help=True, help="What was found by the newest reconciliations, and what to do about it."
)

TenantOption = Annotated[str | None, typer.Option(help="Only of this tenant.")]
MeterOption = Annotated[list[str] | None, typer.Option(help="Only of this meter; may be repeated.")]
CustomerOption = Annotated[str | None, typer.Option(help="Only of this customer, by your reference.")]
PeriodOption = Annotated[
    str | None, typer.Option(help="Only the billing period that holds this time, or now.")
]
LimitOption = Annotated[int, typer.Option(min=1, max=reconciliation.SHOWN_MAX, help="Rows, at most.")]


def reconcile(
    tenant: TenantOption = None,
    meter: MeterOption = None,
    customer: CustomerOption = None,
    period: PeriodOption = None,
    limit: LimitOption = 50,
    as_json: JsonFlag = False,
) -> None:
    """Compare with Stripe, now: every customer, meter and billing period of the past 40 days, or fewer.

    Nothing is corrected. Exit status 0: all is the same, or differs so little that a suggestion is enough; 1:
    something has drifted; 3: something is not known, and so may be wrong.

    Example: tidemeter reconcile --tenant demo --meter requests
    """
    with sentences():
        settings = load_settings()
        asked = _asked(settings, tenant, meter, customer, period)
        _reconciled(settings, asked)
        _tell(settings, asked, limit, as_json)


@reconciliation_app.command("show")
def show(
    tenant: TenantOption = None,
    meter: MeterOption = None,
    customer: CustomerOption = None,
    period: PeriodOption = None,
    limit: LimitOption = 50,
    as_json: JsonFlag = False,
) -> None:
    """Show what was found last, without asking Stripe. Exit status as of `tidemeter reconcile`.

    Example: tidemeter reconciliation show --tenant demo
    """
    with sentences():
        settings = load_settings()
        asked = _asked(settings, tenant, meter, customer, period)
        _tell(settings, asked, limit, as_json)


@reconciliation_app.command("dismiss")
def dismiss(
    suggestion: Annotated[int, typer.Argument(help="Its number.")],
    note: Annotated[str, typer.Option(help="Why; kept in the audit log.")],
) -> None:
    """Settle a suggestion although its difference is still there. It comes back if that becomes another.

    Example: tidemeter reconciliation dismiss 7 --note "test traffic at Stripe, agreed with finance"
    """
    with sentences(), database() as db:
        changed = reconciliation.dismiss(db, suggestion, by=operator(), note=note, now=datetime.now(UTC))
    if changed is None:
        raise fail(f"there is no suggestion {suggestion}", MISUSED)
    typer.echo("dismissed" if changed else "it was closed already")


@reconciliation_app.command("confirm-missing")
def confirm_missing(
    identifiers: Annotated[list[str], typer.Argument(help="Meter events that Stripe took and lacks.")],
) -> None:
    """Fail meter events that Stripe took and does not have, once Stripe has confirmed it to you.

    Stripe is asked again first: only what it still lacks, and what alone explains its hour, is failed. Then
    send the usage again with `tidemeter meter-events retry ID...`: it leaves under a new identifier. A
    summary that is only late would bill it twice, so be sure.

    Example: tidemeter reconciliation confirm-missing 3kzqj5m2r7e4n6c2lq5x3w7yab2ud4fi
    """
    from services.pusher.failures import fail_reported

    with sentences():
        settings = load_settings()
        with database(settings) as db:
            for asked in reconciliation.whose(db, identifiers):
                _reconciled(settings, asked)
            named = reconciliation.named_missing(db, identifiers)
            if others := sorted(set(identifiers) - set(named)):
                raise fail(f"nothing was failed: Stripe does not clearly lack {', '.join(others)}", ATTENTION)
            with db.transaction():
                codes = dict.fromkeys(named, reconciliation.NOT_AT_STRIPE)
                failed = fail_reported(db, codes, source="reconciler", now=datetime.now(UTC))
                audit(db, operator(), "reconciliation.confirm_missing", ",".join(failed), {})
    typer.echo(f"{len(failed)} failed; send them again: tidemeter meter-events retry {' '.join(failed)}")


def _asked(
    settings: Settings, tenant: str | None, meters: list[str] | None, customer: str | None, period: str | None
) -> Asked:
    document: dict[str, Any] = {
        "tenantId": tenant, "metrics": meters or [], "customerRef": customer, "period": period
    }  # fmt: skip
    try:
        request = msgspec.convert(document, ReconcileRequest)
        with database(settings) as db:
            return resolve(db, request, datetime.now(UTC))
    except (RefusedReconciliation, msgspec.ValidationError) as error:
        raise fail(str(error), MISUSED) from None


def _reconciled(settings: Settings, asked: Asked) -> None:
    """Stripe is asked here, so that it needs no reconciler that runs."""
    from services.reconciler.agent import record_run
    from services.reconciler.running import Limits, reconcile
    from services.streaming.database import BULK_OPTIONS, Database
    from services.streaming.loops import utc_now
    from services.wire.stripe_reader import StripeReader

    store = Database(settings.postgres(), "reconcile", BULK_OPTIONS)
    console = Console(stderr=True)
    began = utc_now()
    columns = TextColumn("customers and meters"), BarColumn(), MofNCompleteColumn()

    async def go(bar: Progress) -> Counter[State]:
        stripe = StripeReader.from_settings(settings, per_second=settings.reconcile_rate_per_second)
        task = bar.add_task("", total=None)
        try:
            return await reconcile(
                store,
                stripe,
                asked,
                Limits.from_settings(settings),
                clock=utc_now,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        finally:
            await stripe.close()

    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            found = asyncio.run(go(bar))
        record_run(store.connection(), asked, found, by=operator(), began=began)
    finally:
        store.reset()


def _tell(settings: Settings, asked: Asked, limit: int, as_json: bool) -> None:
    """What is stored, and the exit status of that."""
    with database(settings) as db:
        summary = summarise(db, asked, settings, now=datetime.now(UTC), limit=limit)
    if as_json:
        typer.echo(msgspec.json.encode(summary))
    else:
        _show(summary)
    if EXIT[summary.state]:
        raise typer.Exit(EXIT[summary.state])


_COLUMNS = ("tenant", "meter", "customer", "period", "state", "local", "Stripe", "difference", "%", "waiting")


def _show(summary: Summary) -> None:
    show_table(_COLUMNS, [_row(item) for item in summary.periods])
    for item in summary.periods:
        if item.state != "ok":
            _explain(item)
    numbers = msgspec.structs.asdict(summary.items)
    shown = len(summary.periods)
    more = "" if shown == sum(numbers.values()) else f"; {shown} are listed"
    typer.echo(", ".join(f"{number} {state}" for state, number in numbers.items()) + more)


def _row(item: Item) -> list[str]:
    percent = "?" if item.diff_pct is None else f"{item.diff_pct * 100:.4g}"
    return [
        *(item.tenant_id, item.metric, item.customer_ref, f"{item.period_start:%Y-%m-%dT%H:%MZ}"),
        item.state if item.reason is None else f"{item.state}: {item.reason}",
        *(_amount(one) for one in (item.local, item.stripe, item.diff_abs)),
        percent,
        _amount(item.waiting),
    ]


def _explain(item: Item) -> None:
    """Hours and causes, and what to do."""
    where = f"{item.tenant_id} {item.metric} {item.customer_ref}"
    for one in item.findings:
        hour = "the period" if one.hour is None else f"{one.hour:%Y-%m-%dT%H:%MZ}"
        names = f" ({', '.join(one.identifiers)})" if one.identifiers else ""
        typer.echo(f"{where}: {hour}: {one.cause.replace('_', ' ')} {plain(one.amount)}{names}")
    if (found := item.suggestion) is not None:
        typer.echo(f"{where}: suggestion {found.id}: {found.kind} {plain(found.amount)}")
    if item.replay is not None:
        typer.echo(f"{where}: {item.replay.command}")


def _amount(value: Decimal | None) -> str:
    return "?" if value is None else plain(value)
