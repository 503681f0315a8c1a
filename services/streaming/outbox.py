"""The outbox: records that a transaction decided to send, and the relay that sends them.

At least once: a relay that dies between Kafka's acknowledgement and the deletion sends again. Every record in
it carries a stable identity (delta identifier, ops event id, source coordinates), so readers can tell.

Records that come by the thousand share rows, and are sent and deleted as one. A *bundle* holds whatever a
transaction has to send, in its order, once that is much. A *pack* holds records of one topic with the same
headers; packs are rows of a producer of their own, ``<producer>/packs``, so that nobody who writes a single
record waits for thousands of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import psycopg
import structlog

from services.streaming.database import TRANSIENT_ERRORS, Database
from services.streaming.faults import fault_point
from services.wire import metrics
from services.wire.errors import require
from services.wire.kafka import AckedProducer
from services.wire.ops import NAME_HEADER
from services.wire.records import OutboxRow
from services.wire.settings import Settings

RELAY_ROWS_MAX = 500
RELAY_PACKS_MAX = 500
RELAY_SECONDS = 1.0
OBSERVE_SECONDS = 5.0

#: A row below 2 kB is stored in its page as it is; a larger one PostgreSQL compresses, and stores elsewhere.
PACK_BYTES_MAX = 1_800
PACKS = "/packs"

#: From so many records on, a transaction's records share rows. Large ones: their headers compress well.
BUNDLE_FROM = 64
BUNDLE_BYTES = 64 * 1024
#: Stands for the topic of a bundle, whose records name their own.
BUNDLE = ""

log = structlog.get_logger(__name__)

_TAKE = (
    "SELECT outbox_id, topic, key, value, headers FROM outbox WHERE producer = %s "
    "ORDER BY outbox_id LIMIT %s FOR UPDATE"
)


def enqueue(db: psycopg.Connection[Any], producer: str, rows: Sequence[OutboxRow]) -> None:
    """Write ``rows`` in the current transaction, in order."""
    if not rows:
        return
    if len(rows) >= BUNDLE_FROM:
        rows = [OutboxRow(BUNDLE, None, bundle) for bundle in _bundled(rows)]
    with db.cursor().copy("COPY outbox (producer, topic, key, value, headers) FROM STDIN") as copy:
        copy.write("".join(_copy_lines(producer, rows)))


def _copy_lines(producer: str, rows: Sequence[OutboxRow]) -> Iterator[str]:
    """Rows in PostgreSQL's COPY text format: a fifth of the time that a row-wise COPY takes."""
    for row in rows:
        text = json.dumps(dict(row.headers)).replace("\\", "\\\\")
        key = "\\N" if row.key is None else f"\\\\x{row.key.hex()}"
        yield f"{producer}\t{row.topic}\t{key}\t\\\\x{row.value.hex()}\t{text}\n"


def _bundled(rows: Sequence[OutboxRow]) -> Iterator[bytes]:
    """The records in bundles: arrays of (topic, key, value, headers) in MessagePack."""
    bundle: list[tuple[str, bytes | None, bytes, Mapping[str, str]]] = []
    size = 0
    for row in rows:
        bundle.append((row.topic, row.key, row.value, row.headers))
        size += len(row.value) + sum(map(len, row.headers.values())) + 300  # with the names of headers, about
        if size >= BUNDLE_BYTES:
            yield _encode_bundle(bundle)
            bundle, size = [], 0
    if bundle:
        yield _encode_bundle(bundle)


_encode_bundle = msgspec.msgpack.Encoder().encode
_decode_bundle = msgspec.msgpack.Decoder(list[tuple[str, bytes | None, bytes, dict[str, str]]]).decode


def enqueue_packed(
    db: psycopg.Connection[Any],
    producer: str,
    topic: str,
    headers: Mapping[str, str],
    records: Sequence[tuple[bytes, bytes]],
) -> None:
    """Write (key, value) records of one topic in the current transaction, in order, several to a row."""
    if not records:
        return
    names = [text.encode() for text in (producer + PACKS, topic)]
    # PostgreSQL, COPY, "Binary Format": five fields with their lengths, -1 for null; jsonb with its version.
    start = struct.pack(">h", 5) + b"".join(struct.pack(">i", len(name)) + name for name in names)
    start += struct.pack(">i", -1)
    text = b"\x01" + json.dumps(dict(headers)).encode()
    end = struct.pack(">i", len(text)) + text
    rows = [start + struct.pack(">i", len(pack)) + pack + end for pack in packed(records)]
    with db.cursor().copy(
        "COPY outbox (producer, topic, key, value, headers) FROM STDIN (FORMAT BINARY)"
    ) as copy:
        copy.write(b"PGCOPY\n\xff\r\n\x00" + bytes(8) + b"".join(rows) + b"\xff\xff")


def packed(records: Sequence[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The records, each with the lengths of its key and value in front, in rows of a good size."""
    pack: list[bytes] = []
    size = 0
    for key, value in records:
        length = _PACKED.size + len(key) + len(value)
        if pack and size + length > PACK_BYTES_MAX:
            yield b"".join(pack)
            pack, size = [], 0
        pack += (_PACKED.pack(len(key), len(value)), key, value)
        size += length
    yield b"".join(pack)


_PACKED = struct.Struct(">II")


def unpack(pack: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) records of a pack.

    Raises:
        Broken: it is no pack.
    """
    at = 0
    while at < len(pack):
        require(len(pack) - at >= _PACKED.size, "a pack of the outbox is cut")
        key_bytes, value_bytes = _PACKED.unpack_from(pack, at)
        value_at = at + _PACKED.size + key_bytes
        at = value_at + value_bytes
        require(at <= len(pack), "a pack of the outbox is cut")
        yield pack[value_at - key_bytes : value_at], pack[value_at:at]


def relay_producer(bootstrap: str) -> AckedProducer:
    """A producer that gives up well before the idle transaction that waits for it is ended."""
    return AckedProducer(bootstrap, **{"delivery.timeout.ms": 10_000, "linger.ms": 0})


def relay(db: psycopg.Connection[Any], producer: str, kafka: AckedProducer, *, wait: bool = False) -> int:
    """Send everything ``producer`` has waiting, but for its packs; returns how many records that was.

    Rows that another relay is sending are left to it; with ``wait``, it returns only once they are gone too.

    Raises:
        Transient: Kafka did not acknowledge; the rows stay.
    """
    return _relay(db, producer, kafka, _plain, RELAY_ROWS_MAX, wait=wait)


def relay_packs(db: psycopg.Connection[Any], producer: str, kafka: AckedProducer) -> int:
    """The same for the packs of ``producer`` that no other relay is sending."""
    return _relay(db, producer + PACKS, kafka, _packed, RELAY_PACKS_MAX, wait=False)


def _relay(
    db: psycopg.Connection[Any],
    producer: str,
    kafka: AckedProducer,
    records_of: Callable[[_Row], Iterable[KafkaRecord]],
    rows_max: int,
    *,
    wait: bool,
) -> int:
    sent = 0
    while True:
        with db.transaction():
            rows = db.execute(
                _TAKE if wait else _TAKE + " SKIP LOCKED", (producer, rows_max), binary=True
            ).fetchall()
            if not rows:
                return sent
            fault_point("relay.before_send")
            records = [record for row in rows for record in records_of(row)]
            kafka.send_all(records, timeout_s=12.0)
            fault_point("relay.after_send")
            db.execute("DELETE FROM outbox WHERE outbox_id = ANY(%s)", ([row[0] for row in rows],))
        fault_point("relay.after_delete")
        sent += len(records)
        for name, number in Counter(headers.get(NAME_HEADER) for *_, headers in records).items():
            if name is not None:
                metrics.OPS_EVENTS.labels(name.decode()).inc(number)
        if len(rows) < rows_max:
            return sent


#: outbox_id, topic, key, value, headers.
_Row = tuple[int, str, bytes | None, bytes, dict[str, str]]
KafkaRecord = tuple[str, bytes | None, bytes, Mapping[str, bytes]]


def _plain(row: _Row) -> Iterator[KafkaRecord]:
    _, topic, key, value, headers = row
    rows = [(topic, key, value, headers)] if topic != BUNDLE else _decode_bundle(value)
    for topic, key, value, headers in rows:
        yield topic, key, value, {name: text.encode() for name, text in headers.items()}


def _packed(row: _Row) -> Iterator[KafkaRecord]:
    _, topic, _, pack, texts = row
    headers = {name: text.encode() for name, text in texts.items()}
    return ((topic, key, value, headers) for key, value in unpack(pack))


_WAITING = (
    "SELECT (SELECT count(*) FROM outbox WHERE producer = ANY(%(producers)s)), "
    "extract(epoch FROM now() - min(enqueued_at))::float8 FROM unnest(%(producers)s::text[]) one, "
    "LATERAL (SELECT enqueued_at FROM outbox WHERE producer = one ORDER BY outbox_id LIMIT 1) oldest"
)


def observe(db: psycopg.Connection[Any], producer: str) -> None:
    """Set the gauges of what ``producer`` has waiting, packs too."""
    row = db.execute(_WAITING, {"producers": [producer, producer + PACKS]}).fetchone()
    waiting, age = row or (0, None)
    metrics.OUTBOX.labels(producer).set(waiting)
    metrics.OUTBOX_OLDEST.labels(producer).set(max(0.0, age or 0.0))


async def relay_forever(settings: Settings, producer: str, wake: asyncio.Event | None = None) -> None:
    """Relay what ``producer`` has waiting, packs too, every second or when woken, on a connection and a
    producer of its own. For rows that no chunk relays: deltas, and what a sender writes."""
    database = Database(settings.postgres(), "relay")
    kafka = relay_producer(settings.kafka())
    wake = wake or asyncio.Event()
    observed = float("-inf")

    def relay_all() -> None:
        nonlocal observed
        if time.monotonic() - observed > OBSERVE_SECONDS:
            observed = time.monotonic()
            observe(database.connection(), producer)  # before Kafka, which may be away
        relay(database.connection(), producer, kafka)
        relay_packs(database.connection(), producer, kafka)

    while True:
        wake.clear()
        try:
            await asyncio.to_thread(relay_all)
        except TRANSIENT_ERRORS as error:
            log.warning("the outbox waits", error=error)
            await asyncio.to_thread(database.reset)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), RELAY_SECONDS)
