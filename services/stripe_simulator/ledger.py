"""The independent record of what was applied: append-only rows, exact sums, identifiers as they were used.

This is the truth that a client's claim is compared with. Summaries are computed from the same rows but lag
and round; nothing here does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TypeAlias

from services.stripe_simulator.errors import Json
from services.stripe_simulator.store import Store

ROWS_MAX = 100_000

IdentifierUse: TypeAlias = "tuple[str, str, str, str]"  # identifier, event name, customer, value


@dataclass(frozen=True, slots=True)
class Origin:
    """Which request did it, and when."""

    request_id: str
    idempotency_key: str | None
    received_at: float


@dataclass(frozen=True, slots=True)
class Applied:
    """One meter event that counts, before it has a place in the ledger."""

    identifier: str
    event_name: str
    meter: str
    customer: str
    value: Decimal
    timestamp: int
    visible_at: float
    dimensions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    sequence: int
    identifier: str
    event_name: str
    customer: str
    value: str
    timestamp: int
    received_at: float
    idempotency_key: str | None
    request_id: str
    cancelled_at: float | None
    dimensions: str | None = None  # what the payload carried beside customer and value, as JSON

    def to_json(self) -> Json:
        return asdict(self) | {"dimensions": json.loads(self.dimensions or "{}")}


@dataclass(frozen=True, slots=True)
class Usage:
    """What summaries need of an applied event."""

    sequence: int
    timestamp: int
    value: Decimal


@dataclass(frozen=True, slots=True)
class AsyncError:
    """An event that was answered 200 and then failed, as `error_report_triggered` names it."""

    code: str
    message: str
    identifier: str
    event_name: str
    customer: str | None
    meter: str | None


TOTALS = """
SELECT event_name, customer, decimal_sum(value) AS value, count(*) AS events
FROM ledger WHERE cancelled_at IS NULL GROUP BY event_name, customer ORDER BY event_name, customer
"""
TOTALS_BY_HOUR = """
SELECT event_name, customer, timestamp - timestamp % 3600 AS hour, decimal_sum(value) AS value,
    count(*) AS events
FROM ledger WHERE cancelled_at IS NULL GROUP BY event_name, customer, hour ORDER BY event_name, customer, hour
"""


def text(value: Decimal) -> str:
    return f"{value:f}"


class Ledger:
    def __init__(self, store: Store) -> None:
        self._store = store

    # Writing

    def append(self, events: Sequence[Applied], origin: Origin) -> None:
        self._store.write_many(
            "INSERT INTO ledger (identifier, event_name, meter, customer, value, timestamp, received_at,"
            " visible_at, idempotency_key, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    event.identifier,
                    event.event_name,
                    event.meter,
                    event.customer,
                    text(event.value),
                    event.timestamp,
                    origin.received_at,
                    event.visible_at,
                    origin.idempotency_key,
                    origin.request_id,
                )
                for event in events
            ],
        )
        if any(event.dimensions for event in events):
            self._append_dimensions(events)

    def _append_dimensions(self, events: Sequence[Applied]) -> None:
        """For the rows just written, which are the last ones."""
        first = int(self._store.read_one("SELECT max(sequence) FROM ledger")[0]) - len(events) + 1
        self._store.write_many(
            "INSERT INTO ledger_dimensions VALUES (?, ?)",
            [
                (sequence, json.dumps(dict(event.dimensions)))
                for sequence, event in enumerate(events, first)
                if event.dimensions
            ],
        )

    def report(self, errors: Sequence[AsyncError], origin: Origin) -> None:
        self._store.write_many(
            "INSERT INTO error_reports"
            " (code, message, identifier, event_name, customer, received_at, request_id, meter,"
            " idempotency_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    error.code,
                    error.message,
                    error.identifier,
                    error.event_name,
                    error.customer,
                    origin.received_at,
                    origin.request_id,
                    error.meter,
                    origin.idempotency_key,
                )
                for error in errors
            ],
        )

    def cancel(self, sequence: int, cancelled_at: float, visible_at: float) -> None:
        sql = "UPDATE ledger SET cancelled_at = ?, cancel_visible_at = ? WHERE sequence = ?"
        self._store.write(sql, (cancelled_at, visible_at, sequence))

    def saw_identifier(self, identifier: str, event_name: str, customer: str, value: str) -> None:
        """Remember what an identifier was first sent for, whatever became of that request."""
        self.saw_identifiers([(identifier, event_name, customer, value)])

    def saw_identifiers(self, uses: Sequence[IdentifierUse]) -> None:
        new = self._store.write_many("INSERT OR IGNORE INTO identifier_uses VALUES (?, ?, ?, ?)", uses)
        if new == len(uses):
            return
        for use in uses:
            first = self._store.read_one("SELECT * FROM identifier_uses WHERE identifier = ?", (use[0],))
            if tuple(first) != use:
                self._store.write("INSERT OR IGNORE INTO identifier_conflicts VALUES (?, ?, ?, ?)", use)

    # Identifiers

    def accepted_at(self, identifier: str, event_name: str | None) -> float | None:
        """When an event with this identifier (of this event name, if given) was last accepted."""
        row = self._store.read_one(
            "SELECT max(received_at) FROM accepted WHERE identifier = :identifier"
            " AND (:event_name IS NULL OR event_name = :event_name)",
            {"identifier": identifier, "event_name": event_name},
        )
        return None if row[0] is None else float(row[0])

    def accepted_since(self, identifiers: Sequence[str], since: float | None) -> set[tuple[str, str]]:
        """(identifier, event name) of those accepted at `since` or later; None is for ever."""
        rows = self._store.read(
            "SELECT identifier, event_name FROM accepted"
            " WHERE identifier IN (SELECT value FROM json_each(:identifiers))"
            " AND (:since IS NULL OR received_at >= :since)",
            {"identifiers": json.dumps(list(identifiers)), "since": since},
        )
        return {(identifier, event_name) for identifier, event_name in rows}

    def latest(self, identifier: str, event_name: str) -> Row | None:
        row = self._store.read_one(
            "SELECT * FROM ledger_rows WHERE identifier = ? AND event_name = ?"
            " ORDER BY sequence DESC LIMIT 1",
            (identifier, event_name),
        )
        return None if row is None else Row(*row)

    def ambiguous_identifiers(self) -> int:
        """How many identifiers were sent with two different values, customers or event names."""
        row = self._store.read_one("SELECT count(DISTINCT identifier) FROM identifier_conflicts")
        return int(row[0])

    # Reading

    def rows(self, customer: str | None, event_name: str | None, after: int, limit: int) -> list[Row]:
        rows = self._store.read(
            "SELECT ledger_rows.*, dimensions FROM ledger_rows LEFT JOIN ledger_dimensions USING (sequence)"
            " WHERE (:customer IS NULL OR customer = :customer)"
            " AND (:event_name IS NULL OR event_name = :event_name)"
            " AND sequence > :after ORDER BY sequence LIMIT :limit",
            {"customer": customer, "event_name": event_name, "after": after, "limit": limit},
        )
        return [Row(*row) for row in rows]

    def total(self, customer: str | None = None, event_name: str | None = None) -> str:
        row = self._store.read_one(
            "SELECT decimal_sum(value) FROM ledger WHERE cancelled_at IS NULL"
            " AND (:customer IS NULL OR customer = :customer)"
            " AND (:event_name IS NULL OR event_name = :event_name)",
            {"customer": customer, "event_name": event_name},
        )
        return "0" if row[0] is None else str(row[0])

    def count(self) -> int:
        return int(self._store.read_one("SELECT count(*) FROM ledger")[0])

    def totals(self, *, by_hour: bool) -> list[Json]:
        """Exact sums per event name and customer; per UTC hour of the event too, when asked."""
        return self._store.read_named(TOTALS_BY_HOUR if by_hour else TOTALS)

    def usage(self, meter: str, customer: str, start: int, end: int, seen_at: float) -> Iterator[Usage]:
        """Applied events of [start, end) by event time that summaries show at `seen_at`, as received."""
        shown = "visible_at <= ? AND (cancel_visible_at IS NULL OR cancel_visible_at > ?)"
        return self._usage(shown, meter, customer, start, end, seen_at)

    def received(self, meter: str, customer: str, start: int, end: int, until: float) -> Iterator[Usage]:
        """Events of [start, end) by event time that were received, and not cancelled, by `until`."""
        there = "received_at <= ? AND (cancelled_at IS NULL OR cancelled_at > ?)"
        return self._usage(there, meter, customer, start, end, until)

    def _usage(
        self, condition: str, meter: str, customer: str, start: int, end: int, at: float
    ) -> Iterator[Usage]:
        """Events of [start, end) by event time, as received; ``condition`` takes the moment ``at`` twice."""
        rows = self._store.read(
            "SELECT sequence, timestamp, value FROM ledger"  # noqa: S608  constants only
            " WHERE meter = ? AND customer = ? AND timestamp >= ? AND timestamp < ?"
            f" AND {condition} ORDER BY sequence",
            (meter, customer, start, end, at, at),
        )
        return (Usage(sequence, timestamp, Decimal(value)) for sequence, timestamp, value in rows)

    def reports(self) -> list[Json]:
        return self._store.read_named("SELECT * FROM error_reports ORDER BY sequence LIMIT ?", (ROWS_MAX,))

    def cancellations(self, now: float) -> Json:
        row = self._store.read_one(
            "SELECT count(*) FILTER (WHERE cancel_visible_at > :now),"
            " count(*) FILTER (WHERE cancel_visible_at <= :now) FROM ledger",
            {"now": now},
        )
        return {"pending": row[0], "complete": row[1]}
