"""``tidemeter offsets``: what Kafka remembers of the live groups, beside the truth; and moving it back."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import psycopg
import typer
from confluent_kafka.admin import AdminClient

from services.cli.common import ATTENTION, JsonFlag, database, operator, sentences, show_table
from services.streaming import groups
from services.streaming.chunks import Partition
from services.streaming.lag import first_records
from services.streaming.parking import audit
from services.streaming.resetting import (
    PROBLEMS,
    Current,
    Earliest,
    Exactly,
    Shift,
    Since,
    Stand,
    Step,
    Target,
    falls_short,
    in_scope,
    plan,
    shown,
)
from services.wire.errors import Misconfigured
from services.wire.groups import COUNTERS as COUNTERS_GROUP
from services.wire.groups import NOTIFIER as NOTIFIER_GROUP
from services.wire.groups import PUSHER as PUSHER_GROUP
from services.wire.ops import DISPATCHER
from services.wire.settings import load_settings
from services.wire.times import micros, moment
from services.wire.topics import DELTAS, OPS, STRIPE_WEBHOOKS, USAGE_VERSIONS

offsets_app = typer.Typer(
    help="Show where the consumer groups stand; move back what Kafka remembers of one.", no_args_is_help=True
)

POLL_SECONDS = 0.5


class LiveGroup(StrEnum):
    """The consumer groups of the product's own workers."""

    COUNTERS = COUNTERS_GROUP
    PUSHER = PUSHER_GROUP
    DISPATCHER = DISPATCHER
    NOTIFIER = NOTIFIER_GROUP


#: What each reads. Nothing else that a group may own is ever touched: Faust keeps topics of its own.
TOPICS: dict[str, tuple[str, ...]] = {
    COUNTERS_GROUP: tuple(USAGE_VERSIONS),
    PUSHER_GROUP: (DELTAS,),
    DISPATCHER: (STRIPE_WEBHOOKS,),
    NOTIFIER_GROUP: (OPS,),
}


# -- show ----------------------------------------------------------------------------------------------------


@offsets_app.command()
def show(
    group: Annotated[LiveGroup | None, typer.Option(help="Only this group.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what Kafka remembers of each group beside its positions in PostgreSQL, which are the truth.

    Exit status 1: something does not fit together, or a partition is halted.

    Example: tidemeter offsets show --group tidemeter-counters
    """
    with sentences():
        settings = load_settings()
        admin = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
        with database(settings) as db:
            found = [
                (name, groups.describe(admin, name), groups.stands(admin, db, name, topics))
                for name, topics in TOPICS.items()
                if group is None or name == group.value
            ]
    if as_json:
        typer.echo(json.dumps({"groups": [_group_document(*one) for one in found]}))
    else:
        for one in found:
            _print_group(*one)
        wrong = {
            problem for _, _, stands in found for stand in stands.values() for problem in stand.problems()
        }
        for problem in sorted(wrong):
            typer.echo(f"{problem}: {PROBLEMS[problem]}", err=True)
    if any(stand.halted or stand.problems() for _, _, stands in found for stand in stands.values()):
        raise typer.Exit(ATTENTION)


def _group_document(group: str, known: groups.Group, stands: Mapping[Partition, Stand]) -> dict[str, Any]:
    return {
        "group": group,
        "state": known.state,
        "members": [asdict(member) for member in known.members],
        "partitions": [
            {**tp._asdict(), **asdict(stand), "lag": stand.lag, "problems": stand.problems()}
            for tp, stand in stands.items()
        ],
    }


def _print_group(group: str, known: groups.Group, stands: Mapping[Partition, Stand]) -> None:
    typer.echo(f"{group}: {known.state}")
    for member in known.members:
        typer.echo(f"  {member}")
    show_table(
        ("partition", "committed", "position", "log start", "log end", "lag", "halted", "problem"),
        [
            (
                f"{tp.topic}/{tp.partition}",
                _number(stand.committed),
                _number(stand.position),
                str(stand.log_start),
                str(stand.log_end),
                str(stand.lag),
                stand.halted or "",
                ", ".join(stand.problems()),
            )
            for tp, stand in stands.items()
        ],
    )


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


# -- reset ---------------------------------------------------------------------------------------------------


@offsets_app.command()
def reset(
    group: Annotated[LiveGroup, typer.Option(help="The group whose workers are stopped.")],
    topic: Annotated[
        list[str] | None,
        typer.Option(
            "--topic", help="topic, or topic:partition,…; repeatable; default all topics of the group."
        ),
    ] = None,
    to_datetime: Annotated[
        str | None, typer.Option(help="To the first record then or later: ISO 8601 with an offset.")
    ] = None,
    by_duration: Annotated[
        str | None, typer.Option(help="To the first record of the time before now: ISO 8601, such as PT24H.")
    ] = None,
    to_earliest: Annotated[
        bool, typer.Option("--to-earliest", help="To the first record that is left.")
    ] = False,
    to_offset: Annotated[
        int | None, typer.Option(min=0, help="To this offset, in every partition in scope.")
    ] = None,
    shift_by: Annotated[
        int | None, typer.Option(help="So many records on; back, if negative, such as -1000.")
    ] = None,
    to_current: Annotated[
        bool, typer.Option("--to-current", help="To the positions in PostgreSQL: where a worker goes on.")
    ] = False,
    execute: Annotated[bool, typer.Option("--execute", help="Do it; without this, only the plan.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="With --execute: wait so many seconds for the group to be empty.")
    ] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Move back what Kafka remembers of a group. Positions stay: records are read again, none counts twice.

    Without --execute it only prints the plan. Exit status 1: some of it is not done, or could not be.

    Example: tidemeter offsets reset --group tidemeter-counters --by-duration PT24H
    """
    name = group.value
    choices = {
        "--to-datetime": to_datetime,
        "--by-duration": by_duration,
        "--to-earliest": to_earliest or None,
        "--to-offset": to_offset,
        "--shift-by": shift_by,
        "--to-current": to_current or None,
    }
    with sentences():
        chosen, target = _target(choices, datetime.now(UTC))
        if wait and not execute:
            raise Misconfigured("--wait is for --execute: a plan needs no empty group")
        settings = load_settings()
        admin = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
        with database(settings) as db:
            known = _until_inactive(admin, name, wait) if execute else groups.describe(admin, name)
            if execute and known.active:
                raise Misconfigured(_held(name, known))
            steps = _plan(admin, db, name, target, topic or ())
            if not as_json:
                _print_plan(steps)
            moves = {step.partition: step.to for step in steps if step.moves and step.to is not None}
            refused = _carry_out(admin, db, name, chosen, steps, moves) if execute and moves else {}
    if as_json:
        document = [_step_document(step, refused.get(step.partition)) for step in steps]
        typer.echo(json.dumps({"group": name, "executed": execute, "partitions": document}))
    for tp, why in refused.items():
        typer.echo(f"error: {tp.topic}/{tp.partition}: {why}", err=True)
    if execute:
        typer.echo(f"{len(moves) - len(refused)} of {len(moves)} partitions moved", err=True)
    else:
        typer.echo("nothing was changed; --execute does it", err=True)
        if known.active:
            typer.echo(f"not yet: {_held(name, known)}", err=True)
    if refused or falls_short(steps) or (known.active and not execute):
        raise typer.Exit(ATTENTION)


def _target(choices: Mapping[str, Any], now: datetime) -> tuple[str, Target]:
    """What was chosen, in words for the audit log, and as a target.

    Raises:
        Misconfigured: not exactly one of ``choices``; or a time that is none.
    """
    given = {name: value for name, value in choices.items() if value is not None}
    if len(given) != 1:
        raise Misconfigured(f"say where to, by exactly one of {', '.join(choices)}")
    [(name, value)] = given.items()
    match name:
        case "--to-datetime":
            since = moment(value, now)
            return f"{name} {shown(since)}", Since(since)
        case "--by-duration":
            since = _before(value, now)
            return f"{name} {value} ({shown(since)})", Since(since)
        case "--to-offset":
            return f"{name} {value}", Exactly(value)
        case "--shift-by":
            return f"{name} {value}", Shift(value)
    return name, Earliest() if name == "--to-earliest" else Current()


def _before(duration: str, now: datetime) -> datetime:
    if duration.startswith("P"):
        with contextlib.suppress(Misconfigured):
            return moment(f"-{duration}", now)
    raise Misconfigured(f"{duration!r} is no duration: write PT24H, P7D or PT1H30M")


def _until_inactive(admin: AdminClient, group: str, wait_s: float) -> groups.Group:
    """The group, once it has no members; or as it is when that took too long."""
    deadline = time.monotonic() + wait_s
    waited = False
    while True:
        known = groups.describe(admin, group)
        left_s = deadline - time.monotonic()
        if not known.active or left_s <= 0:
            return known
        if not waited:
            waited = True
            typer.echo(f"waiting until {group} is empty: {_members(known)}", err=True)
        time.sleep(min(POLL_SECONDS, left_s))


def _members(known: groups.Group) -> str:
    return "; ".join(map(str, known.members)) or known.state


def _held(group: str, known: groups.Group) -> str:
    return (
        f"{group} has members, and Kafka lets nobody else move its offsets: stop its workers first "
        f"({_members(known)}). A worker with a name, or one that was killed, stays a member until its "
        "session ends (TIDEMETER_SESSION_TIMEOUT_SECONDS); --execute --wait SECONDS waits for that"
    )


def _plan(
    admin: AdminClient, db: psycopg.Connection[Any], group: str, target: Target, wanted: Sequence[str]
) -> list[Step]:
    stands = groups.stands(admin, db, group, TOPICS[group])
    if not stands:
        raise Misconfigured(f"no topic {TOPICS[group][0]}: run `tidemeter migrate`")
    chosen = in_scope(wanted, TOPICS[group], stands.keys())
    firsts = {}
    if isinstance(target, Since):
        full = [tp for tp in chosen if stands[tp].log_end > stands[tp].log_start]
        firsts = first_records(admin, full, -(-micros(target.moment) // 1000))
    return plan({tp: stands[tp] for tp in chosen}, target, firsts)


def _carry_out(
    admin: AdminClient,
    db: psycopg.Connection[Any],
    group: str,
    chosen: str,
    steps: Sequence[Step],
    moves: Mapping[Partition, int],
) -> dict[Partition, str]:
    """Commit ``moves``; returns why, for each that did not go.

    The audit log has it before Kafka is asked, so that nothing moves without a row. What then did not go is a
    second row: nobody can change the first.
    """
    asked = [
        {**step.partition._asdict(), "from": step.committed, "to": step.to} for step in steps if step.moves
    ]
    audit(db, operator(), "offsets.reset", group, {"choice": chosen, "partitions": asked})
    refused = groups.commit(admin, group, moves)
    if refused:
        failed = [{**tp._asdict(), "error": why} for tp, why in refused.items()]
        audit(db, operator(), "offsets.reset.failed", group, {"choice": chosen, "partitions": failed})
    return refused


def _print_plan(steps: Sequence[Step]) -> None:
    show_table(
        ("partition", "from", "to", "position", "read again", ""),
        [
            (
                f"{step.partition.topic}/{step.partition.partition}",
                _number(step.committed),
                _number(step.to),
                _number(step.position),
                "" if step.to is None else str(step.read_again),
                step.why or ("" if step.moves else "is there already"),
            )
            for step in steps
        ],
    )
    typer.echo(f"{sum(step.moves for step in steps)} of {len(steps)} partitions to move", err=True)


def _step_document(step: Step, error: str | None) -> dict[str, Any]:
    return {
        **step.partition._asdict(),
        "from": step.committed,
        "to": step.to,
        "position": step.position,
        "read_again": step.read_again,
        "left": step.reason,
        "why": step.why,
        "error": error,
    }
