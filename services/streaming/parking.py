"""Parked records: every record that its reader could not process, in PostgreSQL, until it is settled.

Written in the transaction that moves past the record, so none is parked twice and none is lost. The original
bytes stay with it: a re-drive needs nothing else, and outlives the retention of every topic.

Also asked for here: which parked records are meant (:class:`Choice`), and the request of a re-drive. Who
carries it out is the service that parked (``redriving``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, get_args

import msgspec
import psycopg

from services.wire.codec import SCHEMA_HEADER

Connection = psycopg.Connection[Any]
Kind = Literal["dead_letter", "upcast_failure", "conflict"]
State = Literal["parked", "redriven", "discarded"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STATES: tuple[State, ...] = get_args(State)

#: What a release can cure. The other reasons want another configuration, or another event.
RELEASE_REASONS = (
    "unknown_schema",
    "missing_upcaster",
    "upcaster_error",
    "invalid_after_upcast",
    "undecodable",
)
#: A conflict is never re-driven: the first record stays counted.
REDRIVABLE: tuple[Kind, ...] = ("dead_letter", "upcast_failure")

_SCHEMA_NAME = re.compile(r"[a-z_]{1,64}/[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class ParkedRow:
    """One record to park. ``headers`` are its own, as text; ``arrived_at`` its timestamp."""

    kind: Kind
    topic: str
    partition: int
    offset: int
    arrived_at: datetime
    reason: str
    stage: str
    error_class: str
    value: bytes
    headers: Mapping[str, str]
    tenant_id: str = ""
    meter: str = ""
    event_id: str = ""

    @property
    def schema_name(self) -> str:
        """What the record says it is, or nothing."""
        name = self.headers.get(SCHEMA_HEADER, "")
        return name if _SCHEMA_NAME.fullmatch(name) else ""


def park(db: Connection, service: str, rows: Sequence[ParkedRow], *, tried_with: str) -> None:
    """Store ``rows`` in the current transaction. ``tried_with``: the schemas and upcasters that failed.

    A place in a log is parked once, even if a position was moved back by hand.
    """
    rows = _not_yet_parked(db, rows)
    if rows:
        with db.cursor().copy(_COPY) as copy:
            copy.write("".join(_copy_lines(service, rows, tried_with)))


def _not_yet_parked(db: Connection, rows: Sequence[ParkedRow]) -> Sequence[ParkedRow]:
    known: set[tuple[str, int, int]] = set()
    for place in sorted({(row.topic, row.partition) for row in rows}):
        offsets = [row.offset for row in rows if (row.topic, row.partition) == place]
        found = db.execute(
            'SELECT topic, partition, "offset" FROM parked_records '
            'WHERE topic = %s AND partition = %s AND "offset" BETWEEN %s AND %s',
            (*place, min(offsets), max(offsets)),
        ).fetchall()
        known.update(found)
    return [row for row in rows if (row.topic, row.partition, row.offset) not in known] if known else rows


_COPY = (
    'COPY parked_records (service, tried_with, kind, topic, partition, "offset", arrived_at, reason, stage, '
    "error_class, tenant_id, meter, event_id, schema_name, value, headers) FROM STDIN"
)
#: What PostgreSQL's COPY text format wants written otherwise.
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _copy_lines(service: str, rows: Sequence[ParkedRow], tried_with: str) -> Iterator[str]:
    for row in rows:
        texts = (
            *(row.reason, row.stage, row.error_class, row.tenant_id, row.meter),
            *(row.event_id, row.schema_name),
        )
        names = "\t".join(texts)
        if "\\" in names or names.count("\t") != len(texts) - 1 or "\n" in names or "\r" in names:
            names = "\t".join(text.translate(_ESCAPES) for text in texts)
        headers = json.dumps(dict(row.headers)).translate(_ESCAPES) if row.headers else "{}"
        yield (
            f"{service}\t{tried_with}\t{row.kind}\t{row.topic}\t{row.partition}\t{row.offset}\t"
            f"{row.arrived_at.isoformat()}\t{names}\t\\\\x{row.value.hex()}\t{headers}\n"
        )


class Choice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which parked records; what is not given does not restrict. Times are those of arrival."""

    kinds: tuple[Kind, ...] = ()
    reasons: tuple[str, ...] = ()
    tenant: str | None = None
    meter: str | None = None
    topic: str | None = None
    schema: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: tuple[int, ...] = ()
    #: What the service itself found that a fix may be there for: see ``redriving``.
    automatic: bool = False

    def values(self) -> dict[str, Any]:
        """Parameters of :data:`CHOSEN`."""
        return {
            "kinds": list(self.kinds) or None,
            "reasons": list(self.reasons) or None,
            "tenant": self.tenant,
            "meter": self.meter,
            "topic": self.topic,
            "schema": self.schema,
            "since": self.since,
            "until": self.until,
            "ids": list(self.ids) or None,
        }


#: Of ``parked_records p``; parameters: :meth:`Choice.values`.
CHOSEN = """
    (%(kinds)s::text[] IS NULL OR p.kind = ANY(%(kinds)s))
    AND (%(reasons)s::text[] IS NULL OR p.reason = ANY(%(reasons)s))
    AND (%(tenant)s::text IS NULL OR p.tenant_id = %(tenant)s)
    AND (%(meter)s::text IS NULL OR p.meter = %(meter)s)
    AND (%(topic)s::text IS NULL OR p.topic = %(topic)s)
    AND (%(schema)s::text IS NULL OR p.schema_name = %(schema)s)
    AND (%(since)s::timestamptz IS NULL OR p.arrived_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR p.arrived_at < %(until)s)
    AND (%(ids)s::bigint[] IS NULL OR p.parked_id = ANY(%(ids)s))
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A re-drive that was asked for: one for each service that parked some of the chosen records."""

    redrive_id: int
    service: str
    selected: int


def request_redrives(db: Connection, choice: Choice, *, by: str, dry_run: bool) -> list[Request]:
    """Ask for the chosen records to be tried again, in the current transaction, with its audit row.

    Nothing that is parked afterwards is part of it.
    """
    rows = db.execute(
        f"SELECT p.service, count(*), max(p.parked_id) FROM parked_records p "  # noqa: S608  constants only
        f"WHERE p.state = 'parked' AND p.kind = ANY(%(redrivable)s) AND {CHOSEN} GROUP BY 1 ORDER BY 1",
        {**choice.values(), "redrivable": list(REDRIVABLE)},
    ).fetchall()
    requests = []
    for service, selected, last_id in rows:
        row = db.execute(
            "INSERT INTO redrives (service, choice, dry_run, requested_by, last_id, selected) "
            "VALUES (%s, %s, %s, %s, %s, %s) RETURNING redrive_id",
            (service, msgspec.json.encode(choice).decode(), dry_run, by, last_id, selected),
        ).fetchone()
        if row is not None:
            requests.append(Request(row[0], service, selected))
    if not dry_run:
        for request in requests:
            details = {**asdict(request), "choice": msgspec.to_builtins(choice)}
            audit(db, by, "redrive.request", str(request.redrive_id), details)
    return requests


def audit(db: Connection, actor: str, action: str, subject: str, details: Mapping[str, Any]) -> None:
    """Who did what: identifiers, counts and choices, never content. Nobody can change or remove it."""
    db.execute(
        "INSERT INTO audit_log (actor, action, subject, details) VALUES (%s, %s, %s, %s)",
        (actor, action, subject, json.dumps(dict(details), default=str)),
    )
