"""``tidemeter resume``: an operator says go on."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import psycopg
import typer
from confluent_kafka.admin import AdminClient

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences
from services.streaming import offsets
from services.streaming.chunks import Partition
from services.streaming.lag import log_starts
from services.streaming.outbox import enqueue
from services.wire.records import ops_event
from services.wire.settings import Settings, load_settings


def resume(
    partition: Annotated[
        list[str] | None,
        typer.Option("--partition", help="topic/number, repeatable; default every halted one."),
    ] = None,
    accept_lost: Annotated[
        bool,
        typer.Option("--accept-lost", help="Go past records that retention deleted before they were read."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Let halted partitions go on, after you have seen why they stopped (`tidemeter status`).

    With --accept-lost, what `offset_gap` waits for is given up; an ops event `records_lost` says how much.

    Example: tidemeter resume --partition usage.v3/0
    """
    wanted = None if not partition else [_partition(text) for text in partition]
    with sentences():
        settings = load_settings()
        with database(settings) as db, db.transaction():
            if accept_lost:
                _accept_lost(db, settings, wanted)
            resumed = offsets.resume(db, None, wanted)
    if as_json:
        names = ("consumer", "topic", "partition", "reason")
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in resumed]))
    else:
        for consumer, topic, number, reason in resumed:
            typer.echo(f"{consumer} {topic}/{number} goes on (was halted: {reason})")
        if not resumed:
            typer.echo("nothing was halted")


def _accept_lost(db: psycopg.Connection[Any], settings: Settings, wanted: list[Partition] | None) -> None:
    rows = db.execute(
        "SELECT DISTINCT topic, partition FROM partition_offsets WHERE halted = 'offset_gap'"
    ).fetchall()
    stopped = [tp for tp in (Partition(*row) for row in rows) if wanted is None or tp in wanted]
    admin = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
    for consumer, tp, position, lost in offsets.accept_lost(db, log_starts(admin, stopped)):
        typer.echo(
            f"{consumer} {tp.topic}/{tp.partition}: {lost} records from offset {position} are lost", err=True
        )
        event = ops_event(
            "records_lost",
            subject_type="partition",
            subject_id=f"{consumer}/{tp.topic}/{tp.partition}/{position}",
            source="cli",
            at_us=time.time_ns() // 1000,
            attributes={"records": str(lost)},
        )
        enqueue(db, consumer, [event])


def _partition(text: str) -> Partition:
    topic, slash, number = text.rpartition("/")
    if not slash or not number.isdigit():
        raise fail(f"{text!r} is not topic/number, such as usage.v3/0", MISUSED)
    return Partition(topic, int(number))
