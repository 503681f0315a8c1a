"""The outbox: records that a transaction decided to send, and the relay that sends them.

At least once: a relay that dies between Kafka's acknowledgement and the deletion sends again. Every record in
it carries a stable identity (delta identifier, ops event id, source coordinates), so readers can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
import structlog

from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.wire.kafka import AckedProducer
from services.wire.records import OutboxRow
from services.wire.settings import Settings

RELAY_ROWS_MAX = 2000
RELAY_SECONDS = 1.0

log = structlog.get_logger(__name__)

_TAKE = (
    "SELECT outbox_id, topic, key, value, headers FROM outbox WHERE producer = %s "
    "ORDER BY outbox_id LIMIT %s FOR UPDATE"
)


def enqueue(db: psycopg.Connection[Any], producer: str, rows: Sequence[OutboxRow]) -> None:
    """Write ``rows`` in the current transaction, in order."""
    if rows:
        with db.cursor().copy("COPY outbox (producer, topic, key, value, headers) FROM STDIN") as copy:
            copy.write("".join(_copy_lines(producer, rows)))


def _copy_lines(producer: str, rows: Sequence[OutboxRow]) -> Iterator[str]:
    """Rows in PostgreSQL's COPY text format: a fifth of the time that a row-wise COPY takes."""
    headers: Mapping[str, str] | None = None
    text = ""
    for row in rows:
        if row.headers is not headers:  # runs of deltas share theirs
            headers = row.headers
            text = json.dumps(dict(headers)).replace("\\", "\\\\")
        key = "\\N" if row.key is None else f"\\\\x{row.key.hex()}"
        yield f"{producer}\t{row.topic}\t{key}\t\\\\x{row.value.hex()}\t{text}\n"


def relay_producer(bootstrap: str) -> AckedProducer:
    """A producer that gives up well before the idle transaction that waits for it is ended."""
    return AckedProducer(bootstrap, **{"delivery.timeout.ms": 10_000, "linger.ms": 0})


def relay(db: psycopg.Connection[Any], producer: str, kafka: AckedProducer, *, wait: bool = False) -> int:
    """Send everything ``producer`` has waiting and return how many records that was.

    Rows that another relay is sending are left to it; with ``wait``, it returns only once they are gone too.

    Raises:
        Transient: Kafka did not acknowledge; the rows stay.
    """
    sent = 0
    while True:
        with db.transaction():
            rows = db.execute(
                _TAKE if wait else _TAKE + " SKIP LOCKED",
                (producer, RELAY_ROWS_MAX),
            ).fetchall()
            if not rows:
                return sent
            fault_point("relay.before_send")
            records = [
                (topic, key, value, {name: text.encode() for name, text in headers.items()})
                for _, topic, key, value, headers in rows
            ]
            kafka.send_all(records, timeout_s=12.0)
            fault_point("relay.after_send")
            db.execute("DELETE FROM outbox WHERE outbox_id = ANY(%s)", ([row[0] for row in rows],))
        fault_point("relay.after_delete")
        sent += len(rows)
        if len(rows) < RELAY_ROWS_MAX:
            return sent


async def relay_forever(settings: Settings, producer: str, wake: asyncio.Event | None = None) -> None:
    """Relay what ``producer`` has waiting, every second or when woken, on a connection and a producer of its
    own. For rows that no chunk relays: deltas, and what a sender writes."""
    database = Database(settings.postgres(), "relay")
    kafka = relay_producer(settings.kafka())
    wake = wake or asyncio.Event()
    while True:
        wake.clear()
        try:
            await asyncio.to_thread(lambda: relay(database.connection(), producer, kafka))
        except TRANSIENT_ERRORS as error:
            log.warning("the outbox waits", error=error)
            await asyncio.to_thread(database.reset)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), RELAY_SECONDS)
