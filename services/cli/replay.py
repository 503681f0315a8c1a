"""``tidemeter replay | replays | rebuild``: counters recomputed from the log, shown and corrected."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any

import msgspec
import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.cli.common import (
    ATTENTION,
    INTERRUPTED,
    MISUSED,
    JsonFlag,
    database,
    fail,
    operator,
    sentences,
    show_table,
)
from services.console.replays import shown
from services.streaming import replays
from services.streaming.replay_plan import Plan
from services.streaming.replays import (
    OffsetRange,
    RefusedReplay,
    ReplayRequest,
    Scope,
    UnknownReplay,
    everything,
)
from services.wire.errors import Misconfigured
from services.wire.log import configure_logging
from services.wire.settings import Settings, load_settings

replays_app = typer.Typer(
    help="List, show and cancel replays that were asked for with --apply.", no_args_is_help=True
)

POLL_SECONDS = 0.2
#: A replayer that runs takes a replay up sooner than this.
PATIENCE_SECONDS = 3.0
#: Plans of the same differences that are tried, while usage goes on.
PLANS_MAX = 4
PLAIN_EVERY_SECONDS = 5.0
#: Refused for what was asked. Any other refusal says something of the data: it needs attention.
_MISUSE = frozenset(
    {"time_invalid", "window_invalid", "window_ambiguous", "window_missing", "tenant_missing"}
    | {"tenant_unknown", "meter_unknown", "partition_unknown"}
)
_OFFSETS = re.compile(r"([^/\s]+)/([0-9]{1,9}):([0-9]{1,18})-([0-9]{1,18})")


class ByOption(StrEnum):
    """What times are times of."""

    EVENT = "event"
    ARRIVAL = "arrival"


TenantOption = Annotated[str | None, typer.Option(help="Only of this tenant.")]
MeterOption = Annotated[list[str] | None, typer.Option("--meter", help="Only of this meter; repeatable.")]
CustomerOption = Annotated[str | None, typer.Option(help="Only of this customer.")]
SinceOption = Annotated[
    str | None, typer.Option(help="From this hour on: ISO 8601 with an offset, or -PT24H.")
]
UntilOption = Annotated[str | None, typer.Option(help="To before this hour: the same, or now, the default.")]
ByChoice = Annotated[ByOption, typer.Option("--by", help="What --since and --until are times of.")]
PeriodOption = Annotated[
    str | None, typer.Option(help="Instead of both: the billing period that holds this time.")
]
OffsetsOption = Annotated[
    list[str] | None,
    typer.Option("--offsets", help="Instead: the hours of what lies at usage.v3/0:100-200; repeatable."),
]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Correct what differs.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask on a terminal.")]
HashOption = Annotated[
    str | None,
    typer.Option("--plan-hash", help="Apply the plan of this hash, without another dry run, or nothing."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also if it is large, or takes out what cannot be read any more.")
]
IdArgument = Annotated[int, typer.Argument(metavar="ID", help="Id from `replays list`.")]


@contextmanager
def _sentences() -> Iterator[None]:
    """As :func:`sentences`, with the refusals of replays."""
    with sentences():
        try:
            yield
        except RefusedReplay as error:
            code = MISUSED if error.code in _MISUSE else ATTENTION
            raise fail(f"{error} ({error.code})", code) from None
        except UnknownReplay as error:
            raise fail(str(error), MISUSED) from None


def replay(
    tenant: TenantOption = None,
    meter: MeterOption = None,
    customer: CustomerOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    by: ByChoice = ByOption.EVENT,
    period: PeriodOption = None,
    offsets: OffsetsOption = None,
    apply: ApplyOption = False,
    yes: YesOption = False,
    plan_hash: HashOption = None,
    force: ForceOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Recompute the counters of a window from the log, and show what differs; with --apply, correct it.

    An apply does what its dry run has shown, or nothing. Ctrl-C before its end cancels it.

    Example: tidemeter replay --tenant demo --meter requests --since -PT24H
    """
    with _sentences():
        request = _request(
            tenant_id=tenant,
            metrics=tuple(meter or ()),
            customer_ref=customer,
            since=since,
            until=until,
            period=period,
            by="offsets" if offsets else by.value,
            offsets=tuple(_offsets(text) for text in offsets or ()),
            plan_hash=plan_hash,
            force=force,
        )
        if request.plan_hash is not None and not apply:
            raise Misconfigured("--plan-hash goes with --apply")
        _Run(request, None, yes=yes, as_json=as_json).run(apply)


def rebuild(
    apply: ApplyOption = False,
    yes: YesOption = False,
    plan_hash: HashOption = None,
    force: ForceOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Recompute every counter from the whole log, and compare; with --apply, correct what differs.

    Exit status 1: counters and log differ, and nothing was asked to be corrected.

    Example: tidemeter rebuild --json
    """
    with _sentences():
        request = _request(plan_hash=plan_hash, force=force)
        if request.plan_hash is not None and not apply:
            raise Misconfigured("--plan-hash goes with --apply")
        plan = _Run(request, everything(), yes=yes, as_json=as_json).run(apply)
    if not apply and _differs(plan):
        raise typer.Exit(ATTENTION)


@replays_app.command("list")
def list_replays(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List replays that were asked for with --apply, the newest first.

    Example: tidemeter replays list
    """
    with _sentences(), database() as db:
        found = [shown(row) for row in replays.find(db, limit=limit)]
    if as_json:
        typer.echo(msgspec.json.encode(found))
        return
    show_table(
        ("id", "state", "tenant", "meters", "window", "records", "requested by", "at"),
        [
            (
                str(one.id),
                one.state,
                one.tenant_id or "every",
                ", ".join(one.metrics) or "every",
                _window(one.since, one.until),
                f"{one.records_read} of {one.records_total}",
                one.requested_by,
                one.requested_at.isoformat(),
            )
            for one in found
        ],
    )


@replays_app.command("show")
def show_replay(replay_id: IdArgument, as_json: JsonFlag = False) -> None:
    """Show one replay: how far it got; once it is done, what it has changed.

    Example: tidemeter replays show 7
    """
    with _sentences(), database() as db:
        row = replays.show(db, replay_id)
    one = shown(row)
    if as_json:
        typer.echo(msgspec.json.encode(one))
        return
    fields = msgspec.to_builtins(msgspec.structs.replace(one, result=None))
    show_table(
        ("field", "value"),
        [(name, _text(value)) for name, value in fields.items() if name not in ("result", "error")]
        + ([("error", f"{one.error.message} ({one.error.code})")] if one.error else []),
    )
    if one.result is not None:
        _show_plan(one.result)


@replays_app.command("cancel")
def cancel_replay(replay_id: IdArgument) -> None:
    """Stop a replay before it changes anything.

    Example: tidemeter replays cancel 7
    """
    with _sentences(), database() as db:
        changed = replays.cancel(db, replay_id, by=operator())
    typer.echo("cancelled: nothing was changed" if changed else "it had ended before; nothing changed")


def _request(**fields: Any) -> ReplayRequest:
    """The request; by the same rules as one by HTTP.

    Raises:
        Misconfigured: a value that it does not take.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    names = dict(zip(ReplayRequest.__struct_fields__, ReplayRequest.__struct_encode_fields__, strict=True))
    options = {"tenantId": "tenant", "metrics": "meter", "customerRef": "customer", "planHash": "plan-hash"}
    try:
        return msgspec.convert(
            {names[name]: msgspec.to_builtins(value) for name, value in given.items()}, ReplayRequest
        )
    except msgspec.ValidationError as error:
        wrong = re.search(r"\$\.(\w+)", str(error))
        name = wrong[1] if wrong else ""
        raise Misconfigured(f"--{options.get(name, name)} takes other values than this") from None


def _offsets(text: str) -> OffsetRange:
    found = _OFFSETS.fullmatch(text)
    if found is None:
        raise Misconfigured(f"{text!r} is not topic/number:from-to, such as usage.v3/0:100-200")
    return OffsetRange(found[1], int(found[2]), int(found[3]), int(found[4]))


class _Run:
    """One replay by command: the dry run, the question, the apply. ``scope`` None: as the request says."""

    def __init__(self, request: ReplayRequest, scope: Scope | None, *, yes: bool, as_json: bool) -> None:
        self._request = request
        self._scope = scope
        self._yes, self._as_json = yes, as_json
        self._settings = load_settings()
        configure_logging("error", self._settings.log_format, service="replay")
        self._now = datetime.now(UTC)

    def run(self, apply: bool) -> Plan | None:
        """The plan that was shown, if one was made.

        Raises:
            RefusedReplay: there can be no such replay.
        """
        plan = None if self._request.plan_hash is not None else self._dry_run()
        if plan is not None and not (apply and self._as_json):
            self._print(plan)
        if not apply:
            return plan
        request = msgspec.structs.replace(self._request, mode="apply")
        if plan is not None:
            if not _differs(plan):
                typer.echo("nothing differs: there is nothing to apply", err=True)
                if self._as_json:
                    typer.echo(msgspec.json.encode({"plan": plan, "replay": None}))
                return plan
            self._confirm(plan)
            return self._apply_as_shown(request, plan)
        self._apply(request, None)
        return None

    def _apply_as_shown(self, request: ReplayRequest, plan: Plan) -> Plan:
        """Apply this plan. Usage goes on: when it has only come on top of the same differences, the plan that
        has it is applied in its place."""
        for left in reversed(range(PLANS_MAX)):
            try:
                self._apply(msgspec.structs.replace(request, plan_hash=plan.plan_hash), plan)
                break
            except RefusedReplay as error:
                if error.code != "plan_stale" or not left:
                    raise
                fresh = self._dry_run()
                if plan.truncated or _effect(fresh) != _effect(plan):
                    raise
                typer.echo("usage has come meanwhile; the differences are the same", err=True)
                plan = fresh
        return plan

    def _dry_run(self) -> Plan:
        from services.replay.carrying import replayer_of

        replayer = replayer_of(self._settings)
        with _Shown("dry run") as progress:
            return replayer.dry_run(self._request, now=self._now, scope=self._scope, progress=progress.note)

    def _print(self, plan: Plan) -> None:
        if self._as_json:
            typer.echo(msgspec.json.encode(plan))
        else:
            _show_plan(plan)

    def _confirm(self, plan: Plan) -> None:
        if self._yes or not _is_asked():
            return
        if not typer.confirm(f"Apply the plan {plan.plan_hash}?", err=True):
            raise fail("not applied; nothing was changed", ATTENTION)

    def _apply(self, request: ReplayRequest, plan: Plan | None) -> None:
        with database(self._settings) as db:
            scope = self._scope or replays.resolve(db, request, self._now)
            replay_id = replays.request_apply(db, request, scope, by=operator(), now=self._now)
            row = _carried_out(self._settings, db, replay_id)
        if row["state"] == "refused":
            raise replays.refusal_of(row)
        done = shown(row)
        if self._as_json:
            typer.echo(msgspec.json.encode({"plan": plan, "replay": done}))
        elif done.result is not None:
            if plan is None:
                _show_plan(done.result)
            typer.echo(f"replay {replay_id} is done: {_changes(done.result)} corrected")
        if row["state"] == "cancelled":
            raise fail(f"somebody has cancelled replay {replay_id}; nothing was changed", ATTENTION)
        if row["state"] == "failed":
            raise fail(f"replay {replay_id} failed: {row['error']}; nothing was changed", ATTENTION)


def _effect(plan: Plan) -> Sequence[object]:
    """What a plan does, whatever usage there is besides."""
    return (
        (plan.changed_values, plan.changed_watermarks, plan.changed_periods, plan.unreadable),
        [
            (item.tenant_id, item.customer_ref, item.meter, item.dimensions, hour.hour, hour.period_start)
            + (hour.delta, hour.events_after - hour.events_before)
            for item in plan.items
            for hour in item.hours
        ],
    )


def _is_asked() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def _carried_out(settings: Settings, db: psycopg.Connection[Any], replay_id: int) -> Mapping[str, Any]:
    """The replay once it has ended; carried out here, if no replayer takes it up. Ctrl-C cancels it."""
    from services.replay.carrying import Carrier

    carrier: Carrier | None = None
    started = time.monotonic()
    try:
        with _Shown(f"replay {replay_id}") as progress:
            while True:
                row = replays.show(db, replay_id)
                if row["finished_at"] is not None:
                    return row
                here = (0, 0) if carrier is None else carrier.progress
                progress.note(max(row["records_read"], here[0]), max(row["records_total"], here[1]))
                if carrier is None and time.monotonic() - started > PATIENCE_SECONDS:
                    # Also while another process seems to: should that one die, this one goes on.
                    carrier = Carrier(settings)
                    carrier.start()
                elif carrier is not None:
                    if carrier.failure is not None:
                        raise carrier.failure
                    status, reason = carrier.check()
                    progress.say(reason if status == "unhealthy" else "")
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise _cancelled(settings, replay_id) from None
    finally:
        if carrier is not None:
            carrier.stop()


def _cancelled(settings: Settings, replay_id: int) -> typer.Exit:
    """What Ctrl-C came to; on a connection of its own, for the interrupted one may be in any state."""
    with database(settings) as db:
        if replays.cancel(db, replay_id, by=operator()):
            typer.echo(f"replay {replay_id} is cancelled: nothing was changed", err=True)
        else:
            state = replays.show(db, replay_id)["state"]
            said = "the counters are corrected" if state == "done" else "nothing was changed"
            typer.echo(f"replay {replay_id} had ended as {state}: {said}", err=True)
    return typer.Exit(INTERRUPTED)


class _Shown:
    """Progress on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._said_at = time.monotonic()
        self._said = ""
        if self._console.is_terminal:
            columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=None)

    def note(self, read: int, total: int) -> None:
        """So many records were read, of so many; 0: not known yet."""
        if self._bar is not None:
            self._bar.update(self._task, completed=read, total=total or None)
        elif time.monotonic() - self._said_at >= PLAIN_EVERY_SECONDS:
            self._said_at = time.monotonic()
            of = f" of {total}" if total else ""
            typer.echo(f"{self._what}: {read}{of} records read", err=True)

    def say(self, text: str) -> None:
        """Tell it, unless it was told last."""
        if text and text != self._said:
            self._console.print(text)
        self._said = text

    def __enter__(self) -> _Shown:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


# -- Plans -------------------------------------------------------------------------------------------------


def _show_plan(plan: Plan) -> None:
    typer.echo(f"window   {_window(plan.since, plan.until)}")
    for one in plan.ranges:
        typer.echo(f"read     {one.topic}/{one.partition}:{one.start}-{one.end}")
    typer.echo(f"records  {plan.records_read} read, {plan.events_matched} of them counted in the window")
    for reason, number in plan.unreadable.items():
        typer.echo(f"         {number} counted once and cannot be counted by this release: {reason}")
    if plan.totals:
        show_table(
            ("tenant", "meter", "events", "after", "total of the hours", "after"),
            [
                (
                    *(one.tenant_id, one.meter, str(one.events_before)),
                    *(str(one.events_after), str(one.before), str(one.after)),
                )
                for one in plan.totals
            ],
        )
    if plan.items:
        show_table(
            ("customer", "meter", "hour", "before", "after", "difference", "events", "after"),
            _hours(plan),
        )
    if plan.periods:
        show_table(
            ("customer", "meter", "billing period", "pushed", "by the journal"),
            [
                (
                    *(one.customer_ref, one.meter, _time(one.period_start)),
                    *(str(one.pushed_before), str(one.pushed_after)),
                )
                for one in plan.periods
            ],
        )
    if plan.truncated:
        typer.echo("more hours change than are listed here")
    typer.echo(f"{_changes(plan)} {'differ' if _differs(plan) else 'differ: counters and log agree'}")
    typer.echo(f"plan     {plan.plan_hash}")


def _hours(plan: Plan) -> Iterator[Sequence[str]]:
    for item in plan.items:
        meter = f"{item.meter} ({', '.join(item.dimensions)})" if item.dimensions else item.meter
        for hour in item.hours:
            yield (
                item.customer_ref,
                meter,
                _time(hour.hour),
                str(hour.before),
                str(hour.after),
                _signed(hour.delta),
                str(hour.events_before),
                str(hour.events_after),
            )


def _differs(plan: Plan | None) -> bool:
    return plan is not None and bool(
        plan.changed_hours or plan.changed_values or plan.changed_watermarks or plan.changed_periods
    )


def _changes(plan: Plan) -> str:
    """How many things that is."""
    return (
        f"{plan.changed_hours} hours of {plan.changed_items} items, {plan.changed_values} distinct values, "
        f"{plan.changed_watermarks} watermarks, {plan.changed_periods} billing periods"
    )


def _window(since: datetime | None, until: datetime | None) -> str:
    if since is None and until is None:
        return "everything"
    return f"{_time(since)} to {_time(until)}"


def _time(time: datetime | None) -> str:
    return "…" if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _signed(number: Decimal) -> str:
    return f"+{number}" if number > 0 else str(number)


def _text(value: Any) -> str:
    if value in (None, "", []):
        return "–"
    return ", ".join(value) if isinstance(value, list) else str(value)
