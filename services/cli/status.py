"""``tidemeter status``: lag, watermarks, outcomes, conservation gap, deltas by state."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import psycopg
import typer
from confluent_kafka.admin import AdminClient
from rich.console import Console
from rich.table import Table

from services.cli.common import ATTENTION, JsonFlag, database, sentences
from services.streaming.lag import behind, log_ends, topic_partitions
from services.streaming.offsets import read_positions
from services.wire.decimals import plain
from services.wire.groups import COUNTERS, PUSHER
from services.wire.settings import Settings, load_settings
from services.wire.topics import DELTAS, USAGE_VERSIONS

_STATES = ("pending", "in_flight", "in_doubt", "reported", "failed", "cancelled")


def collect(settings: Settings) -> dict[str, Any]:
    """Everything the command shows, as one document.

    Raises:
        Transient: Kafka does not answer.
        psycopg.OperationalError: PostgreSQL does not answer.
    """
    # Not above: what these import takes longer than most commands do, and all of them import this module.
    from services.counters.conservation import conservation, outcomes_by_meter

    admin = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
    groups = {COUNTERS: tuple(USAGE_VERSIONS), PUSHER: (DELTAS,)}
    ends = {group: log_ends(admin, topic_partitions(admin, topics)) for group, topics in groups.items()}
    with database(settings) as db:
        partitions = [row for group in groups for row in _partitions(db, group, ends[group])]
        kept = conservation(db)
        return {
            "lag": {group: sum(p["lag"] for p in partitions if p["group"] == group) for group in groups},
            "partitions": partitions,
            "halted": [p for p in partitions if p["halted"]],
            "records": kept.records,
            "outcomes": dict(kept.outcomes),
            "conservation_gap": kept.gap,
            "meters": outcomes_by_meter(db),
            "watermarks": _watermarks(db),
            "deltas": _deltas(db),
            "waiting": _waiting(db),
            "carried_forward": _carried_forward(db),
            "parked": _parked(db),
            "webhooks": _webhooks(db),
        }


def _partitions(db: psycopg.Connection[Any], group: str, ends: Any) -> list[dict[str, Any]]:
    positions = read_positions(db, group)
    lag = behind(ends, {tp: position.next_offset for tp, position in positions.items()})
    return [
        {
            "group": group,
            "topic": tp.topic,
            "partition": tp.partition,
            "next_offset": positions[tp].next_offset if tp in positions else None,
            "end_offset": end,
            "lag": lag[tp],
            "halted": positions[tp].halted if tp in positions else None,
        }
        for tp, end in sorted(ends.items())
    ]


def _watermarks(db: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    rows = db.execute(
        "SELECT tenant_id, meter, count(*), min(watermark) FILTER (WHERE isfinite(watermark)), "
        "max(watermark) FILTER (WHERE isfinite(watermark)), count(*) FILTER (WHERE dirty_from IS NOT NULL) "
        "FROM items GROUP BY tenant_id, meter ORDER BY tenant_id, meter"
    ).fetchall()
    return [
        {
            "tenant": row[0],
            "meter": row[1],
            "items": row[2],
            "oldest_watermark": row[3] and row[3].isoformat(),
            "newest_watermark": row[4] and row[4].isoformat(),
            "items_to_close": row[5],
        }
        for row in rows
    ]


def _deltas(db: psycopg.Connection[Any]) -> dict[str, dict[str, Any]]:
    rows = db.execute(
        # Values of `last` meters replace each other: they have no sum.
        "SELECT state, count(*), coalesce(sum(amount) FILTER (WHERE formula = 'sum'), 0) "
        "FROM meter_events GROUP BY state"
    ).fetchall()
    found = {state: {"count": count, "amount": plain(amount)} for state, count, amount in rows}
    return {state: found.get(state, {"count": 0, "amount": "0"}) for state in _STATES}


def _waiting(db: psycopg.Connection[Any]) -> dict[str, int]:
    """What lies between two stages, or waits for a person."""
    row = db.execute(
        "SELECT (SELECT count(*) FROM outbox), "
        "(SELECT count(*) FROM deltas d WHERE NOT EXISTS "
        "  (SELECT FROM meter_events m WHERE m.identifier = d.identifier)), "
        "(SELECT count(*) FROM items WHERE dirty_from IS NOT NULL), "
        "(SELECT count(*) FROM items i LEFT JOIN customers c USING (tenant_id, customer_ref) "
        "  WHERE i.dirty_from IS NOT NULL AND c.stripe_customer IS NULL "
        "  AND i.customer_ref !~ '^cus_[A-Za-z0-9_]+$'), "
        "(SELECT count(*) FROM adjustments WHERE state = 'pending'), "
        "(SELECT count(*) FROM adjustments WHERE state = 'approved'), "
        "(SELECT count(*) FROM calendar_changes WHERE done_at IS NULL)"
    ).fetchone()
    names = (
        "outbox",
        "deltas_without_intent",
        "items_to_close",
        "items_without_stripe_customer",
        "adjustments",
        "approved_adjustments",
        "calendar_changes",
    )
    return dict(zip(names, row or (0,) * len(names), strict=True))


def _carried_forward(db: psycopg.Connection[Any]) -> dict[str, int]:
    """How often usage went to a later period than its own, by reason."""
    rows = db.execute("SELECT reason, count(*) FROM carry_forwards GROUP BY reason").fetchall()
    return {"period_closed": 0, "too_old_for_stripe": 0, **dict(rows)}


def _parked(db: psycopg.Connection[Any]) -> dict[str, int]:
    """Parked records that are not settled, by kind; and re-drives that are paused."""
    rows = db.execute(
        "SELECT kind, count(*) FROM parked_records WHERE state = 'parked' GROUP BY kind "
        "UNION ALL SELECT 'paused_redrives', count(*) FROM redrives WHERE state = 'paused'"
    ).fetchall()
    return {**dict.fromkeys(("dead_letter", "upcast_failure", "conflict"), 0), **dict(rows)}


def _webhooks(db: psycopg.Connection[Any]) -> dict[str, int]:
    """Runs of webhook handlers that are not done, by state."""
    states = ("received", "processing", "failed", "dead")
    rows = db.execute(
        "SELECT state, count(*) FROM webhook_runs WHERE state = ANY(%s) GROUP BY state", (list(states),)
    ).fetchall()
    return {**dict.fromkeys(states, 0), **dict(rows)}


def needs_attention(document: dict[str, Any]) -> bool:
    """Something that does not cure itself: a gap, a halt, failed or doubtful pushes, dead webhooks."""
    deltas = document["deltas"]
    return bool(
        document["conservation_gap"]
        or document["halted"]
        or deltas["failed"]["count"]
        or deltas["in_doubt"]["count"]
        or document["waiting"]["items_without_stripe_customer"]
        or document["webhooks"]["dead"]
        or document["parked"]["paused_redrives"]
    )


def status(
    watch: Annotated[
        float | None, typer.Option(min=0.2, help="Repeat every so many seconds until Ctrl-C.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show where everything stands. Exit status 1 when something needs a person.

    Example: tidemeter status --json
    """
    with sentences():
        settings = load_settings()
        while True:
            document = collect(settings)
            if as_json:
                typer.echo(json.dumps(document))
            else:
                _print(document)
            if watch is None:
                break
            time.sleep(watch)
    if needs_attention(document):
        raise typer.Exit(ATTENTION)


#: Column heads of the outcomes that fit a terminal of 80 columns.
_SHORT = ("counted", "dup", "conflict", "late", "adjust", "dead", "upcast")


def _table(*columns: str, title: str) -> Table:
    return Table(*columns, title=title, box=None, title_justify="left", title_style="bold", padding=(0, 1))


def _print(document: dict[str, Any]) -> None:
    from services.counters.prepare import OUTCOMES

    console = Console()
    lag = ", ".join(f"{group} {records}" for group, records in document["lag"].items())
    console.print(
        f"lag: {lag}    records: {document['records']}    conservation gap: {document['conservation_gap']}"
    )
    outcomes = _table("tenant", "meter", "received", *_SHORT, title="outcomes")
    for row in document["meters"]:
        names = (row["tenant"] or "(unreadable)", row["meter"] or "-")
        outcomes.add_row(*names, *(str(row[column]) for column in ("received", *OUTCOMES)))
    console.print(outcomes)
    marks = _table(
        "tenant", "meter", "items", "oldest watermark", "newest watermark", "to close", title="watermarks"
    )
    for row in document["watermarks"]:
        times = [(row[name] or "-")[:19] for name in ("oldest_watermark", "newest_watermark")]
        marks.add_row(row["tenant"], row["meter"], str(row["items"]), *times, str(row["items_to_close"]))
    console.print(marks)
    deltas = _table("state", "count", "amount", title="deltas")
    for state, row in document["deltas"].items():
        deltas.add_row(state, str(row["count"]), row["amount"])
    console.print(deltas)
    for name, number in document["waiting"].items():
        if number:
            console.print(f"waiting: {number} {name.replace('_', ' ')}")
    for reason, number in document["carried_forward"].items():
        if number:
            console.print(
                f"carried forward: {number} times, {reason.replace('_', ' ')} (`tidemeter periods carried`)"
            )
    for kind, number in document["parked"].items():
        if number:
            console.print(f"parked: {number} {kind.replace('_', ' ')} (`tidemeter parked list`)")
    for state, number in document["webhooks"].items():
        if number:
            console.print(f"webhooks: {number} {state} (`tidemeter webhooks list --state {state}`)")
    for row in document["halted"]:
        console.print(
            f"[bold red]halted[/]: {row['topic']}/{row['partition']}: {row['halted']} (`tidemeter resume`)"
        )
