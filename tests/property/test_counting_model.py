"""The counters against a small model of what they promise, on a real PostgreSQL.

The model shares no code with the product: it keeps every counted event, and aggregates from nothing but
these. In the product, a chunk, a round of closing, an answer of the pusher, an adjustment and a change of
billing periods may follow each other in any order, at any age, and any may be cut off at its fault points.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.counters import adjusting, calendars, closing, ledger
from services.counters.adjusting import apply_approved
from services.counters.calendars import carry_out_changes
from services.counters.closing import close_round
from services.counters.config import load_configuration
from services.counters.conservation import conservation
from services.counters.ledger import GROUP, Counters
from services.counters.prepare import Preparer
from services.pusher.failures import Choice, release_failed
from services.pusher.giving_back import GiveBack, Returned
from services.pusher.journal import record_intents
from services.replay import comparing
from services.replay.comparing import Differences
from services.replay.log import FromArchive
from services.replay.recompute import Recount
from services.streaming.chunks import Chunk, Partition
from services.streaming.offsets import ensure_positions
from services.streaming.outbox import unpack
from services.streaming.replays import everything
from services.wire.codec import Decoder
from tests.conftest import NewDatabase
from tests.records import Raw, encoded, v3
from upcasters.chain import upcasters

MINUTE, HOUR, DAY, UNIT = 60_000_000, 3_600_000_000, 86_400_000_000, 10**9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TOO_OLD = 34 * DAY + 12 * HOUR
FORGOTTEN = 35 * DAY - 5 * MINUTE
TOPIC = Partition("usage.v3", 0)
TENANT = "acme"


def us(text: str) -> int:
    return (datetime.fromisoformat(text) - EPOCH) // timedelta(microseconds=1)


START = us("2026-03-14T10:20:00Z")


# -- The model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cycle:
    """Billing periods in a zone without daylight saving time, counted from ``first``, a wall time."""

    text: str
    first: datetime
    days: int = 0
    months: int = 0
    east: timedelta = timedelta(0)

    def start(self, number: int) -> int:
        months = self.first.year * 12 + self.first.month - 1 + number * self.months
        wall = self.first.replace(year=months // 12, month=months % 12 + 1) + timedelta(self.days * number)
        return (wall - self.east - EPOCH) // timedelta(microseconds=1)

    def bounds(self, at: int) -> tuple[int, int]:
        number = 0
        while self.start(number) > at:
            number -= 1
        while self.start(number + 1) <= at:
            number += 1
        return self.start(number), self.start(number + 1)

    @property
    def invoiced(self) -> bool:
        return self.text.endswith("Z")


KATHMANDU = timedelta(hours=5, minutes=45)
CYCLES = {
    cycle.text: cycle
    for cycle in (
        Cycle("1 month UTC", datetime(2026, 1, 1, tzinfo=UTC), months=1),
        Cycle("1 month Asia/Kathmandu", datetime(2026, 1, 1, tzinfo=UTC), months=1, east=KATHMANDU),
        Cycle("1 month UTC 2026-01-14T11:00:00Z", datetime(2026, 1, 14, 11, tzinfo=UTC), months=1),
        Cycle(
            "1 week Asia/Kathmandu 2026-02-28T18:15:00Z",
            datetime(2026, 3, 1, tzinfo=UTC),
            days=7,
            east=KATHMANDU,
        ),
        Cycle("2 week UTC 2026-01-01T00:00:00Z", datetime(2026, 1, 1, tzinfo=UTC), days=14),
        Cycle("1 day UTC 2026-03-01T09:55:00Z", datetime(2026, 3, 1, 9, 55, tzinfo=UTC), days=1),
        Cycle("1 year UTC", datetime(2026, 1, 1, tzinfo=UTC), months=12),
    )
}


@lru_cache(maxsize=100_000)
def period_of(calendar: str, at: int) -> int:
    return CYCLES[calendar].bounds(at)[0]


@dataclass(frozen=True)
class Metering:
    """What decides a meter's counting."""

    aggregation: str
    scale: int = 0
    signed: bool = False
    by_property: bool = False
    split: bool = False
    policy: str = "manual"
    lateness: int = 2 * DAY

    @property
    def unit(self) -> int:
        return int(10 ** (9 - self.scale))

    def whole(self, amount: int) -> int:
        """Rounded towards zero to what the scale can carry."""
        return (1 if amount >= 0 else -1) * (abs(amount) // self.unit * self.unit)


@dataclass(frozen=True)
class Use:
    """One event as its producer means it. ``value`` in billionths, or text for distinct values."""

    key: str
    customer: str
    at: int
    value: int | str
    region: str = ""

    def record(self, metering: Metering) -> bytes:
        properties = {"region": self.region} if metering.split else {}
        quantity = 7 * UNIT
        if isinstance(self.value, str):
            properties["measure"] = self.value
        elif metering.by_property:
            properties["measure"] = f"{Decimal(self.value).scaleb(-9):f}"
        else:
            quantity = self.value
        return encoded(
            v3(
                idempotency_key=self.key,
                customer_ref=self.customer,
                occurred_at=self.at,
                quantity=quantity,
                properties=properties,
            )
        )

    def name(self, metering: Metering) -> Name:
        return (self.customer, *([self.region] if metering.split else []))


#: Customer, and the value of the dimension.
Name = tuple[str, ...]


@dataclass
class Counted:
    """An event where it was counted."""

    use: Use
    at: int
    hour: int
    period: int


@dataclass
class Truth:
    """Everything counted, and how each record ended."""

    metering: Metering
    calendars: dict[Name, str] = field(default_factory=dict)
    counted: dict[Name, list[Counted]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[str, Use] = field(default_factory=dict)
    adjusted: dict[str, Use] = field(default_factory=dict)
    watermarks: dict[Name, int] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    def read(self, use: Use | None, arrival: int, parked_as: str = "upcast_failed") -> None:
        """One record of the log. None: it cannot be counted, and ends as ``parked_as``."""
        if use is None:
            self.outcomes[parked_as] += 1
            return
        if use.key in self.seen:
            self.outcomes["duplicate" if self.seen[use.key] == use else "conflict"] += 1
            return
        self.seen[use.key] = use
        name = use.name(self.metering)
        watermark = self.watermarks.get(name, 0)
        if use.at < arrival - TOO_OLD or use.at < watermark - self.metering.lateness:
            self.outcomes["adjusted"] += 1
            if self.metering.policy == "carry_forward" and use.at >= arrival - FORGOTTEN:
                self.count(use, max(watermark, arrival))
            else:
                self.adjusted[use.key] = use
            return
        self.outcomes["late_counted" if use.at < watermark else "counted"] += 1
        self.watermarks[name] = max(watermark, use.at)
        self.count(use, use.at)

    def count(self, use: Use, at: int) -> None:
        name = use.name(self.metering)
        hour, period = at // HOUR * HOUR, period_of(self.calendars[name], at)
        self.counted[name].append(Counted(use, at, hour, period))

    def adjust(self, key: str, now: int) -> None:
        use = self.adjusted.pop(key)
        fits = use.at >= now - TOO_OLD or self.metering.aggregation == "last"
        self.count(use, use.at if fits else now)

    def move(self, name: Name, calendar: str, now: int) -> None:
        """New periods: an hour's events go together, with the first of them; what is long over stays."""
        self.calendars[name] = calendar
        since = period_of(calendar, now - TOO_OLD) // HOUR * HOUR
        for (hour, _), inside in self.places(name).items():
            if hour >= since:
                for one in inside:
                    one.period = period_of(calendar, min(other.at for other in inside))

    def places(self, name: Name) -> dict[tuple[int, int], list[Counted]]:
        """Events by (hour, period)."""
        found: dict[tuple[int, int], list[Counted]] = defaultdict(list)
        for one in self.counted[name]:
            found[one.hour, one.period].append(one)
        return found

    def hours(self, name: Name) -> dict[tuple[int, int], int]:
        """Totals by (hour, period)."""
        totals = {}
        used: set[tuple[int, int | str]] = set()
        for (hour, period), inside in sorted(self.places(name).items(), key=lambda item: item[0]):
            if self.metering.aggregation == "unique":
                values = {(period, one.use.value) for one in inside}
                totals[hour, period] = len(values - used) * UNIT
                used |= values
            else:
                totals[hour, period] = self.aggregate(inside)
        return totals

    def periods(self, name: Name) -> dict[int, int]:
        """Aggregates by period."""
        found: dict[int, list[Counted]] = defaultdict(list)
        for one in self.counted[name]:
            found[one.period].append(one)
        return {period: self.aggregate(inside) for period, inside in found.items()}

    def aggregate(self, inside: Sequence[Counted]) -> int:
        match self.metering.aggregation:
            case "count":
                return len(inside) * UNIT
            case "unique":
                return len({one.use.value for one in inside}) * UNIT
            case "max":
                return max(int(one.use.value) for one in inside)
            case "last":
                return int(max(inside, key=lambda one: (one.at, one.use.key)).use.value)
        return sum(int(one.use.value) for one in inside)


# -- The product -----------------------------------------------------------------------------------------


class Crash(Exception):
    """The process ends here."""


FAULTS = {
    "chunk": ["tx.locked", "tx.ids_remembered", "tx.counted", "tx.before_commit", "tx.after_commit"],
    "close": ["close.before_commit", "close.after_commit"],
    "adjust": ["adjust.before_commit", "adjust.after_commit"],
    "calendar": ["calendar.before_commit", "calendar.after_commit"],
}


@contextlib.contextmanager
def crash_at(point: str | None) -> Iterator[None]:
    """Whatever reaches ``point`` goes no further."""

    def reached(name: str) -> None:
        if name == point:
            raise Crash(name)

    with pytest.MonkeyPatch.context() as patch:
        for module in (ledger, closing, adjusting, calendars):
            patch.setattr(module, "fault_point", reached)
        yield


@dataclass
class Logged:
    """A record of the log, and what it means."""

    raw: Raw
    use: Use | None
    parked_as: str = "upcast_failed"


TABLES = [
    *("meters", "customers", "tenants", "calendar_changes"),
    *("partition_offsets", "partition_accounts", "seen_current", "adjustments", "parked_records"),
    *("uncounted_records", "recounted_records", "log_blocks"),
    *("items", "buckets", "item_periods", "unique_values", "carry_forwards"),
    *("outbox", "deltas", "meter_events"),
]


class World:
    """One meter on an empty database, its log, and the truth of it."""

    def __init__(self, db: psycopg.Connection[Any], metering: Metering, timezone: str = "UTC") -> None:
        self.db, self.metering, self.now = db, metering, START
        self.truth = Truth(metering)
        self.log: list[Logged] = []
        self.position = 0
        self.asked: dict[str, str] = {}
        self.timezone = timezone
        #: Identifiers of deltas that are not settled, and of those that were reported.
        self.open: list[str] = []
        self.reported: list[str] = []
        #: Keys of adjustments that wait for a decision.
        self.pending: list[str] = []
        #: Amounts that left and were not given back, by item; and what every identifier stood for.
        self.sent: dict[Name, int] = defaultdict(int)
        self.identifiers: dict[str, Any] = {}
        db.execute(";".join(f"DELETE FROM {table}" for table in TABLES))
        db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s)", (TENANT, timezone))
        db.execute(
            "INSERT INTO meters (tenant_id, meter, aggregation, scale, lateness_seconds, late_policy, "
            "allow_negative, event_name, value_property, dimensions) "
            "VALUES (%s, 'requests', %s, %s, %s, %s, %s, 'requests', %s, %s)",
            (
                TENANT,
                metering.aggregation,
                metering.scale,
                metering.lateness // 1_000_000,
                metering.policy,
                metering.signed,
                "measure" if metering.by_property else None,
                ["region"] if metering.split else [],
            ),
        )
        ensure_positions(db, GROUP, {TOPIC: 0})
        #: Items with an hour that was revised, as the counters told.
        self.revised: set[bytes] = set()
        self.preparer = Preparer(Decoder(), upcasters())
        self.counters = Counters(self.preparer, lambda: load_configuration(db), revised=self.revised.update)

    # Doing

    def append(self, use: Use | None, value: bytes | None = None, parked_as: str = "upcast_failed") -> None:
        content = use.record(self.metering) if use is not None else value
        self.log.append(Logged(Raw(len(self.log), content, self.now // 1000), use, parked_as))

    def deliver(self, first: int, end: int, crash: str | None = None) -> None:
        """The records of these offsets as one chunk."""
        if first >= end:
            return
        chunk = Chunk(TOPIC, [one.raw for one in self.log[first:end]])
        if self._run(lambda: self.counters.apply(self.db, self.counters.prepare(chunk)), crash):
            self._learn_calendars()
            waiting = set(self.truth.adjusted)
            for one in self.log[self.position : end]:
                self.truth.read(one.use, one.raw.timestamp * 1000, one.parked_as)
            self.pending += sorted(self.truth.adjusted.keys() - waiting)
            self.position = max(self.position, end)

    def close(self, crash: str | None = None, *, revised: bool = False) -> int:
        """One round, of any items or of those that were revised; returns the number of its deltas. They are
        recorded as intents of the pusher."""
        before = self.outflow()
        items = set(self.revised) if revised else None
        if revised:
            self.revised.clear()
        if self._run(lambda: close_round(self.db, items=items, now_us=self.now), crash):
            self._check_outflow(before)
        return self._relay()

    def _relay(self) -> int:
        rows = self.db.execute(
            "DELETE FROM outbox WHERE topic = 'deltas.v1' RETURNING outbox_id, value"
        ).fetchall()
        deltas = [Decoder().decode(value)[1] for row in sorted(rows) for _, value in unpack(row[1])]
        record_intents(self.db, deltas)
        names = self.names()
        for delta in deltas:
            amount = int.from_bytes(delta["amount"], "big", signed=True)
            content = (
                delta["item_id"],
                delta["period_start"],
                delta["hour_start"],
                delta["sequence"],
                amount,
            )
            assert delta["identifier"] not in self.identifiers, "an identifier was used again"
            self.identifiers[delta["identifier"]] = content
            self._check_delta(delta, amount)
            self.sent[names[uuid.UUID(bytes=delta["item_id"])]] += amount
            self.open.append(delta["identifier"])
        return len(deltas)

    def _check_delta(self, delta: dict[str, Any], amount: int) -> None:
        metering = self.metering
        assert amount % metering.unit == 0
        assert metering.signed or amount > 0 or (metering.aggregation == "last" and amount == 0)
        assert delta["hour_start"] >= self.now - TOO_OLD
        assert delta["event_at"] // HOUR * HOUR == delta["hour_start"]
        calendar = self.truth.calendars[self.names()[uuid.UUID(bytes=delta["item_id"])]]
        assert (delta["period_start"], delta["period_end"]) == CYCLES[calendar].bounds(delta["period_start"])
        if metering.aggregation == "last":
            assert (delta["formula"], delta["push_before"]) == ("last", None)
            return
        assert delta["event_at"] == max(delta["hour_start"], delta["period_start"])
        assert delta["formula"] == "sum"
        if CYCLES[calendar].invoiced:
            assert delta["push_before"] == delta["period_end"] + 55 * MINUTE
            assert self.now < delta["push_before"], "a delta that its invoice does not take any more"
        else:
            assert delta["push_before"] is None

    def settle(self, identifiers: Sequence[str], state: str = "reported") -> None:
        """What the pusher does with an answer: ``reported``, or ``cancelled`` for what expired."""
        with self.db.transaction():
            if state == "reported":
                self.db.execute(
                    "UPDATE meter_events SET state = 'in_flight', first_sent_at = now() "
                    "WHERE identifier = ANY(%s)",
                    (list(identifiers),),
                )
            rows = self.db.execute(
                "UPDATE meter_events SET state = %s WHERE identifier = ANY(%s) "
                "RETURNING item_id, hour_start, period_start, amount, formula",
                (state, list(identifiers)),
            ).fetchall()
            assert len(rows) == len(identifiers)
            if state == "cancelled" and rows:
                back = GiveBack([Returned(*row) for row in rows])
                back.check(*[self.db.execute(step, back.values).fetchall() for step in GiveBack.STATEMENTS])
                self._take_back(rows)
            freed = self.db.execute(
                "UPDATE buckets b SET open = false FROM unnest(%s::uuid[], %s::timestamptz[], "
                "%s::timestamptz[]) AS u (i, h, p) "
                "WHERE b.open AND (b.item_id, b.hour_start, b.period_start) = (u.i, u.h, u.p)",
                ([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]),
            )
            assert freed.rowcount == len(rows), "a settled delta has no open bucket"
        self.open = [one for one in self.open if one not in identifiers]
        if state == "reported":
            self.reported += identifiers

    def release(self, identifier: str) -> None:
        """What is reported fails after all, and an operator has it closed again."""
        with self.db.transaction():
            rows = self.db.execute(
                "UPDATE meter_events SET state = 'failed' WHERE identifier = %s "
                "RETURNING item_id, hour_start, period_start, amount",
                (identifier,),
            ).fetchall()
            choice = Choice(TENANT, identifiers=[identifier])
            assert release_failed(self.db, choice, now=datetime.now(UTC)) == [identifier]
            self._take_back(rows)
        self.reported.remove(identifier)

    def _take_back(self, rows: Sequence[Any]) -> None:
        names = self.names()
        for row in rows:
            self.sent[names[row[0]]] -= int(row[3] * UNIT)

    def decide(self, key: str, *, approved: bool) -> None:
        changed = self.db.execute(
            "UPDATE adjustments SET state = %s, decided_by = 'a test', decided_at = now() "
            "WHERE idempotency_key = %s AND state = 'pending'",
            ("approved" if approved else "rejected", key),
        )
        assert changed.rowcount == 1
        self.pending.remove(key)
        if not approved:
            self.truth.adjusted.pop(key)

    def adjust(self, crash: str | None = None) -> None:
        """Apply what was approved."""
        rows = self.db.execute("SELECT idempotency_key FROM adjustments WHERE state = 'approved'").fetchall()
        if self._run(lambda: apply_approved(self.db, self.now), crash):
            for row in rows:
                self.truth.adjust(row[0], self.now)

    def change_calendar(self, customer: str, calendar: str | None) -> None:
        self.db.execute(
            "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) "
            "VALUES (%s, %s, %s, %s) "
            "ON CONFLICT (tenant_id, customer_ref) DO UPDATE SET calendar = excluded.calendar",
            (TENANT, customer, customer, calendar),
        )
        self.asked[customer] = calendar or f"1 month {self.timezone}"

    def move_periods(self, crash: str | None = None) -> None:
        """Carry out changes of calendars, as far as they can be."""
        names = self.names()
        # A change waits for all transactions that ran when it came: here, those of whoever uses the server.
        self.db.execute("UPDATE calendar_changes SET not_before = '3' WHERE not_before IS NULL")
        self._run(lambda: carry_out_changes(self.db, self.now, seconds_max=60), crash)  # on any machine
        for item_id, calendar in self.db.execute("SELECT item_id, calendar FROM items").fetchall():
            name = names[item_id]
            if calendar != self.truth.calendars[name]:
                assert calendar == self.wanted(name), "an item has periods that nobody asked for"
                self.truth.move(name, calendar, self.now)

    @property
    def changing(self) -> bool:
        """Whether an item has other periods than it should."""
        return any(self.wanted(name) != calendar for name, calendar in self.truth.calendars.items())

    def wanted(self, name: Name) -> str:
        return self.asked.get(name[0], f"1 month {self.timezone}")

    def _run(self, step: Callable[[], Any], crash: str | None) -> bool:
        """Whether the step was committed."""
        with crash_at(crash):
            try:
                step()
            except Crash as died:
                return str(died).endswith("after_commit")
        return True

    # Asking

    def names(self) -> dict[uuid.UUID, Name]:
        rows = self.db.execute("SELECT item_id, customer_ref, dimensions FROM items").fetchall()
        return {row[0]: (row[1], *row[2]) for row in rows}

    def _learn_calendars(self) -> None:
        rows = self.db.execute("SELECT customer_ref, dimensions, calendar FROM items").fetchall()
        for customer, dimensions, calendar in rows:
            name = (customer, *dimensions)
            if name not in self.truth.calendars:
                assert calendar == self.wanted(name)
                self.truth.calendars[name] = calendar

    def outflow(self) -> dict[tuple[Name, int], tuple[int, int]]:
        """Of every period: what was pushed of it or carried to another one, and its carry."""
        names = self.names()
        rows = self.db.execute(_PERIODS).fetchall()
        return {
            (names[row[0]], _us(row[1])): (int((row[2] + row[7]) * UNIT), int((row[4] or 0) * UNIT))
            for row in rows
        }

    def _check_outflow(self, before: dict[tuple[Name, int], tuple[int, int]]) -> None:
        """Closing never takes more out of a period than is in it. What is carried into it may be negative."""
        if self.metering.signed or self.metering.aggregation == "last":
            return
        for place, (left, carry) in self.outflow().items():
            if left > before.get(place, (0, 0))[0]:
                assert carry >= 0, f"{place}: {left} left it, that is {-carry} too much"

    def check(self) -> None:
        """What holds at every moment."""
        truth, metering, db = self.truth, self.metering, self.db
        assert conservation(db).gap == 0
        outcomes = {name: number for name, number in conservation(db).outcomes.items() if number}
        assert outcomes == dict(truth.outcomes)
        names = self.names()
        watermarks = {
            names[row[0]]: _us(row[1])
            for row in db.execute(
                "SELECT item_id, watermark FROM items WHERE watermark > '-infinity'"
            ).fetchall()
        }
        assert watermarks == truth.watermarks
        stored: dict[Name, dict[tuple[int, int], Any]] = defaultdict(dict)
        rows = db.execute(
            "SELECT item_id, hour_start, period_start, total, events, first_event, last_event FROM buckets"
        ).fetchall()
        for item_id, hour, period, total, events, first, last in rows:
            if events:
                place = _us(hour), _us(period)
                stored[names[item_id]][place] = (int(total * UNIT), events, _us(first), _us(last))
            else:
                assert total == 0
        for name in set(names.values()) | set(stored) | set(truth.counted):
            totals = truth.hours(name)
            expected = {
                place: (totals[place], len(inside), min(o.at for o in inside), max(o.at for o in inside))
                for place, inside in truth.places(name).items()
            }
            assert stored[name] == expected, name
        if metering.aggregation != "last":
            pushed = {
                names[row[0]]: int(row[1] * UNIT)
                for row in db.execute("SELECT item_id, sum(pushed) FROM buckets GROUP BY item_id").fetchall()
            }
            for name in set(pushed) | set(self.sent):
                assert pushed.get(name, 0) == self.sent[name], name
            self._check_balances(names)

    def _check_balances(self, names: dict[uuid.UUID, Name]) -> None:
        """What was closed of a period has left it, or is its carry."""
        for row in self.db.execute(_PERIODS).fetchall():
            item_id, period, pushed, out, carry, value, closed, _ = row
            taken = (value or 0) if self.metering.aggregation == "max" else closed
            assert taken == pushed + out + (carry or 0), (names[item_id], period)

    def finish(self) -> None:
        """Settle and close until nothing changes; then nothing is lost and nothing sent twice."""
        self.deliver(self.position, len(self.log))
        for _ in range(60):
            self.settle(self.open)
            self.adjust()
            self.move_periods()
            deltas = self.close()
            self.check()
            waits = self.db.execute(
                "SELECT (SELECT count(*) FROM buckets WHERE open OR closed IS DISTINCT FROM total), "
                "(SELECT count(*) FROM calendar_changes WHERE done_at IS NULL), "
                "(SELECT count(*) FROM adjustments WHERE state = 'approved')"
            ).fetchone()
            if not deltas and waits == (0, 0, 0):
                break
        else:
            raise AssertionError(f"it does not come to rest: {waits}")
        assert self.truth.calendars == {name: self.wanted(name) for name in self.truth.calendars}
        self._check_closed()
        self.check_replay()

    # Replaying

    def recount(self) -> Differences:
        """Everything counted so far, added up again from the log, against the counters."""
        db = self.db
        comparing.prepare_tables(db, dry=False)
        db.execute("DELETE FROM replay_items; DELETE FROM replay_buckets; DELETE FROM replay_values")
        work = Recount(self.preparer, load_configuration(db), everything(), basis=2**62, now_us=self.now)
        for first in range(0, self.position, 7):
            part = self.log[first : min(first + 7, self.position)]
            work.take(db, TOPIC, [FromArchive(one.raw) for one in part])
            work.flush(db)
        assert not work.unreadable
        work.take_adjustments(db)
        with db.transaction():
            return comparing.compare(db, everything())

    def check_replay(self) -> None:
        """The log says what the counters say; and whatever is done to them, a replay undoes it."""
        cut = self.db.execute("SELECT coalesce(sum(straddling), 0) FROM calendar_changes").fetchone()
        if cut != (0,):  # an hour with events of two periods is not cut by a change, but by a replay
            return
        assert not self.recount().any
        changes = (
            "UPDATE buckets SET total = total + 3, events = events + 1 WHERE events > 0",
            "UPDATE buckets SET pushed = pushed + 1, closed = closed - 2, open = NOT open",
            "DELETE FROM buckets WHERE events > 0",
        )
        # Nobody knows a former calendar of an hour that is gone, and a last value is sent again.
        kinds = 2 if self.asked or self.metering.aggregation == "last" else 3
        changed = self.db.execute(changes[len(self.log) % kinds]).rowcount
        with self.db.transaction():
            found = self.recount()
            assert found.any or not changed
            comparing.lock_changed(self.db)
            comparing.correct(self.db, everything(), found)
        self.check()
        assert not self.recount().any

    def _check_closed(self) -> None:
        metering, names = self.metering, self.names()
        if metering.aggregation == "last":
            self._check_values(names)
            return
        assert not self.db.execute(
            "SELECT hour_start FROM buckets WHERE closed IS DISTINCT FROM total"
        ).fetchall()
        rest: dict[Name, int] = defaultdict(int)
        for item_id, period, pushed, out, carry, *_ in self.db.execute(_PERIODS).fetchall():
            name, kept = names[item_id], int((carry or 0) * UNIT)
            aggregate = self.truth.periods(name).get(_us(period), 0)
            assert int((pushed + out) * UNIT) + kept == aggregate, (name, period)
            assert kept < metering.unit, f"{name} {period}: {kept} was never sent"
            if metering.signed:
                assert kept > -metering.unit
            rest[name] += kept
        for name in names.values():
            assert self.sent[name] + rest[name] == sum(self.truth.periods(name).values())

    def _check_values(self, names: dict[uuid.UUID, Name]) -> None:
        """The newest delta of each hour that Stripe takes is its value."""
        rows = self.db.execute(_NEWEST).fetchall()
        for item_id, hour, period, pushed, amount, event_at in rows:
            if _us(hour) < self.now - TOO_OLD:
                continue
            place = _us(hour), _us(period)
            newest = max(self.truth.places(names[item_id])[place], key=lambda one: (one.at, one.use.key))
            assert amount == pushed == Decimal(self.metering.whole(int(newest.use.value))) / UNIT
            assert _us(event_at) <= newest.at  # an equal value is not sent again


#: Of every hour with events: the value that was pushed, and the newest delta.
_NEWEST = """
SELECT DISTINCT ON (b.item_id, b.hour_start, b.period_start) b.item_id, b.hour_start, b.period_start,
       b.pushed, m.amount, m.event_at
FROM buckets b
LEFT JOIN meter_events m
    ON (m.item_id, m.hour_start, m.period_start) = (b.item_id, b.hour_start, b.period_start)
    AND m.state = 'reported'
WHERE b.events > 0
ORDER BY b.item_id, b.hour_start, b.period_start, m.created_at DESC
"""

#: Of every period: pushed, carried out less carried in, carry, value, closed, carried out.
_PERIODS = """
SELECT b.item_id, b.period_start, b.pushed, coalesce(o.amount, 0) - coalesce(i.amount, 0), p.carry, p.value,
       b.closed, coalesce(o.amount, 0)
FROM (SELECT item_id, period_start, sum(pushed) AS pushed, coalesce(sum(closed), 0) AS closed FROM buckets
      GROUP BY item_id, period_start) b
LEFT JOIN item_periods p USING (item_id, period_start)
LEFT JOIN (SELECT item_id, period_start, sum(amount) AS amount FROM carry_forwards
           WHERE period_start <> to_period GROUP BY item_id, period_start) o USING (item_id, period_start)
LEFT JOIN (SELECT item_id, to_period AS period_start, sum(amount) AS amount FROM carry_forwards
           WHERE period_start <> to_period GROUP BY item_id, to_period) i USING (item_id, period_start)
"""


def _us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


@pytest.fixture(scope="module")
def db(new_database: NewDatabase) -> Iterator[psycopg.Connection[Any]]:
    """One database for every example here: each empties it first."""
    with new_database() as dsn, psycopg.connect(dsn, autocommit=True) as db:
        db.execute("SET synchronous_commit = off; SET jit = off")  # the second as replays do
        yield db


# -- Single sequences ------------------------------------------------------------------------------------

SUBSCRIPTION = "1 month UTC 2026-01-14T11:00:00Z"
DAYS = "1 day UTC 2026-03-01T09:55:00Z"
WEEKS = "1 week Asia/Kathmandu 2026-02-28T18:15:00Z"
LONG = 20 * DAY


def world_of(db: psycopg.Connection[Any], metering: Metering, calendar: str = "", zone: str = "UTC") -> World:
    world = World(db, metering, zone)
    if calendar:
        world.change_calendar("cus_a", calendar)
    return world


def send(world: World, *events: tuple[int, int | str]) -> None:
    """One chunk of (occurred_at, value)."""
    for at, value in events:
        world.append(Use(f"evt-{len(world.log)}", "cus_a", at, value))
    world.deliver(world.position, len(world.log))
    world.check()


def push(world: World, state: str = "reported") -> None:
    world.close()
    world.check()
    world.settle(world.open, state)
    world.check()


def amounts(world: World) -> list[int]:
    """What the billing system was sent, in whole units, by hour."""
    rows = world.db.execute(
        "SELECT amount FROM meter_events WHERE state = 'reported' ORDER BY hour_start, created_at, identifier"
    ).fetchall()
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize("metering", [Metering("sum"), Metering("max"), Metering("count")], ids=str)
def test_what_expired_is_sent_again(db: psycopg.Connection[Any], metering: Metering) -> None:
    world = world_of(db, metering)
    send(world, (START, 1 * UNIT))
    push(world, "cancelled")
    push(world, "cancelled")
    world.finish()
    assert amounts(world) == [1]


@pytest.mark.parametrize("calendar", [SUBSCRIPTION, "2 week UTC 2026-01-01T00:00:00Z"])
def test_a_peak_that_expired_after_its_period_is_carried_forward(
    db: psycopg.Connection[Any], calendar: str
) -> None:
    world = world_of(db, Metering("max"), calendar)
    send(world, (START - HOUR, 5 * UNIT), (START, 7 * UNIT))
    world.close()
    world.now += 30 * DAY
    world.settle(world.open, "cancelled")
    world.check()
    world.finish()
    assert sum(amounts(world)) == 7


def test_what_is_carried_into_an_hour_leaves_with_that_hours_own_usage(db: psycopg.Connection[Any]) -> None:
    world = world_of(db, Metering("sum", lateness=LONG), SUBSCRIPTION)
    world.now += 4 * HOUR
    send(world, (world.now, 5 * UNIT), (world.now - 6 * HOUR, 3 * UNIT))
    world.finish()
    assert amounts(world) == [8]


def test_what_is_late_for_several_periods_is_carried_into_one_hour_and_all_of_it_leaves(
    db: psycopg.Connection[Any],
) -> None:
    world = world_of(db, Metering("sum", lateness=LONG), DAYS)
    send(world, (START - 3 * DAY, 5 * UNIT), (START - 5 * DAY, 3 * UNIT))
    world.finish()
    assert amounts(world) == [8]
    assert db.execute("SELECT count(*) FROM carry_forwards").fetchone() == (2,)


def test_what_was_carried_forward_is_not_sent_again_when_its_hours_come_to_two_periods(
    db: psycopg.Connection[Any],
) -> None:
    world = world_of(db, Metering("sum", lateness=LONG), SUBSCRIPTION)
    world.now += 2 * DAY
    send(world, (world.now, 1 * UNIT))
    push(world)
    send(world, (us("2026-03-10T00:00:00Z"), 5 * UNIT), (us("2026-03-13T00:00:00Z"), 3 * UNIT))
    push(world)
    world.change_calendar("cus_a", "2 week UTC 2026-01-01T00:00:00Z")
    world.move_periods()
    world.finish()
    assert sum(amounts(world)) == 9


@pytest.mark.parametrize("value", [3, 0])
@pytest.mark.parametrize("aggregation", ["sum", "max", "last"])
def test_an_hour_that_comes_back_in_a_period_it_had_left_is_billed_on_its_own(
    db: psycopg.Connection[Any], aggregation: str, value: int
) -> None:
    """The new week begins inside of an hour: the first event makes that hour the second week's."""
    world = world_of(db, Metering(aggregation, lateness=LONG), zone="Asia/Kathmandu")
    send(world, (us("2026-03-07T18:20:00Z"), 5 * UNIT))
    push(world)
    world.change_calendar("cus_a", WEEKS)
    world.move_periods()
    world.now = us("2026-03-07T18:30:00Z")
    send(world, (us("2026-03-07T18:05:00Z"), value * UNIT))
    world.finish()
    assert sorted(amounts(world)) == sorted([5, value] if value or aggregation == "last" else [5])


@pytest.mark.parametrize("aggregation", ["sum", "max"])
def test_what_was_carried_forward_and_expired_is_still_sent_when_periods_change(
    db: psycopg.Connection[Any], aggregation: str
) -> None:
    world = world_of(db, Metering(aggregation, lateness=LONG), SUBSCRIPTION)
    world.now += 4 * HOUR
    send(world, (START - HOUR, 5 * UNIT))
    push(world, "cancelled")
    world.change_calendar("cus_a", WEEKS)
    world.move_periods()
    world.check()
    world.finish()
    assert amounts(world) == [5]


def test_a_distinct_value_found_in_an_hour_that_is_too_old_is_not_billed_again(
    db: psycopg.Connection[Any],
) -> None:
    """It moves from one hour of its period to an earlier one; only that one is too old to be pushed."""
    world = world_of(db, Metering("unique", by_property=True))
    send(world, (START - 34 * DAY, "ann"))
    push(world)
    send(world, (START - 34 * DAY - 10 * HOUR, "ann"))
    world.now += 4 * HOUR
    world.finish()
    assert amounts(world) == [1]


def test_hours_left_in_the_periods_of_a_former_calendar_never_leave_older_than_stripe_takes(
    db: psycopg.Connection[Any],
) -> None:
    world = world_of(db, Metering("sum"))
    send(world, (START, 1 * UNIT))
    world.now += 36 * DAY
    world.change_calendar("cus_a", WEEKS)
    world.move_periods()
    world.finish()
    assert amounts(world) == [1]


# -- Any order, any chunks -------------------------------------------------------------------------------

AGGREGATIONS = ("sum", "count", "max", "last", "unique")
CUSTOMERS = ("cus_a", "cus_b")


@st.composite
def meterings(draw: st.DrawFn, lateness: Sequence[int] = (2 * DAY,)) -> Metering:
    aggregation = draw(st.sampled_from(AGGREGATIONS))
    can_split = aggregation != "last"
    return Metering(
        aggregation,
        scale=draw(st.integers(0, 3)),
        signed=aggregation == "sum" and draw(st.booleans()),
        by_property=aggregation == "unique" or draw(st.booleans()),
        split=can_split and draw(st.booleans()),
        policy=draw(st.sampled_from(["manual", "carry_forward"])) if can_split else "manual",
        lateness=draw(st.sampled_from(lateness)),
    )


def values(metering: Metering) -> st.SearchStrategy[int | str]:
    """What an event may be worth: few values, so that they repeat, and parts of what the scale can carry."""
    if metering.aggregation == "unique":
        return st.sampled_from(["ann", "bob", "Ann", "cyd"])
    parts = st.sampled_from([0, metering.unit, 4 * metering.unit // 10, 6 * metering.unit // 10, 1])
    wholes = st.integers(-3 if metering.signed else 0, 5).map(lambda number: number * metering.unit)
    return wholes | st.builds(lambda whole, part: whole + part, wholes, parts)


def uses(metering: Metering, ages: st.SearchStrategy[int], now: int) -> st.SearchStrategy[Use]:
    return st.builds(
        Use,
        st.just(""),
        st.sampled_from(CUSTOMERS),
        ages.map(lambda age: now - age),
        values(metering),
        st.sampled_from(["eu", "us"] if metering.split else [""]),
    )


#: Ages within two days, around edges of hours and of periods, and some of them often.
AGES = st.sampled_from(
    [0, 1, MINUTE, 20 * MINUTE, 25 * MINUTE, 26 * MINUTE, HOUR, 5 * HOUR, 23 * HOUR, 47 * HOUR, 2 * DAY]
) | st.integers(0, 2 * DAY)


def check_any_order(db: psycopg.Connection[Any], data: st.DataObject) -> None:
    metering = data.draw(meterings(), label="meter")
    timezone = data.draw(st.sampled_from(["UTC", "Asia/Kathmandu"]), label="zone")
    world = World(db, metering, timezone)
    if data.draw(st.booleans(), label="a subscription"):
        world.change_calendar("cus_a", data.draw(st.sampled_from(sorted(CYCLES)), label="calendar"))
    # Few times for many events: hours with several, and several at one time.
    some = data.draw(st.lists(AGES, min_size=1, max_size=4), label="ages")
    least = data.draw(st.sampled_from([1, 6, 12]), label="at least")
    ages = st.sampled_from(some) | AGES
    kept = data.draw(st.lists(uses(metering, ages, world.now), min_size=least, max_size=16), label="history")
    history = [replace(one, key=f"evt-{number:02}") for number, one in enumerate(kept)]
    again = data.draw(st.lists(st.sampled_from(history), max_size=5), label="again")
    for use in data.draw(st.permutations([*history, *again]), label="arrivals"):
        world.append(use)
    moves = st.sampled_from(["next", "next", "next", "again", "across", "close", "revised", "settle"])
    while world.position < len(world.log):
        move = data.draw(moves, label="move")
        if move in ("close", "revised"):
            world.close(revised=move == "revised")
        elif move == "settle":
            world.settle(world.open[: data.draw(st.integers(1, 3))])
        else:
            first = world.position if move == "next" else data.draw(st.integers(0, world.position))
            most = len(world.log) if move != "again" else world.position
            world.deliver(first, data.draw(st.integers(first, most)))
        world.check()
    world.finish()
    counts = world.truth.outcomes
    assert counts["counted"] + counts["late_counted"] == len(history)
    assert counts["duplicate"] == len(again)
    assert sum(counts.values()) == len(world.log)
    _check_without_order(world, history)


def _check_without_order(world: World, history: Sequence[Use]) -> None:
    """What is stored is what the same events in their natural order, one by one, amount to."""
    plain = Truth(world.metering, dict(world.truth.calendars))
    for use in sorted(history, key=lambda use: use.at):
        plain.count(use, use.at)
    for name in world.truth.calendars:
        assert world.truth.hours(name) == plain.hours(name)
        assert world.truth.periods(name) == plain.periods(name)


SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@given(st.data())
@settings(max_examples=100, **SHARED)
def test_any_order_in_any_chunks_however_often_gives_the_same_hours_periods_and_deltas(
    db: psycopg.Connection[Any], data: st.DataObject
) -> None:
    check_any_order(db, data)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@given(st.data())
@settings(max_examples=2000, **SHARED)
def test_any_order_gives_the_same_in_many_more_examples(
    db: psycopg.Connection[Any], data: st.DataObject
) -> None:
    check_any_order(db, data)


# -- Anything, in any sequence ---------------------------------------------------------------------------

#: From now: on time, late, too late, older than Stripe takes, older than keys are kept.
ANY_AGES = AGES | st.sampled_from(
    [
        3 * DAY,
        3 * DAY + 5 * HOUR,
        8 * DAY,
        13 * DAY,
        14 * DAY,
        15 * DAY,
        33 * DAY,
        TOO_OLD,
        TOO_OLD + 1,
        36 * DAY,
    ]
)


def crash(kind: str) -> st.SearchStrategy[str | None]:
    """Mostly none."""
    return st.sampled_from([None] * (3 * len(FAULTS[kind])) + FAULTS[kind])


class Anything(RuleBasedStateMachine):
    """Every step may be taken at any time."""

    db: psycopg.Connection[Any]
    world: World | None = None

    @initialize(
        metering=meterings(lateness=[0, 2 * DAY, 20 * DAY]),
        timezone=st.sampled_from(["UTC", "Asia/Kathmandu"]),
        calendar=st.sampled_from([None, *CYCLES]),
    )
    def begin(self, metering: Metering, timezone: str, calendar: str | None) -> None:
        self.world = World(self.db, metering, timezone)
        if calendar is not None:
            self.w.change_calendar("cus_a", calendar)

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    @rule(data=st.data(), number=st.integers(1, 6), noise=st.integers(0, 19), crash=crash("chunk"))
    def send(self, data: st.DataObject, number: int, noise: int, crash: str | None) -> None:
        for _ in range(number):
            self.w.append(self._some(data))
        if noise == 0:
            self.w.append(None, b"noise")
        elif noise == 1:
            self.w.append(None, encoded(v3(meter="pigeons")), "dead_lettered")
        self.w.deliver(self.w.position, len(self.w.log), crash)

    def _some(self, data: st.DataObject) -> Use:
        """A new event, one that was sent before, or another one under a key that was used before."""
        known = sorted(self.w.truth.seen.values(), key=lambda use: use.key)
        use = data.draw(uses(self.w.metering, ANY_AGES, self.w.now))
        kind = data.draw(st.sampled_from(["new"] * 10 + (["same", "other"] if known else [])))
        if kind == "new":
            return replace(use, key=f"evt-{len(self.w.log):03}")
        earlier = data.draw(st.sampled_from(known))
        return earlier if kind == "same" else replace(use, key=earlier.key)

    @precondition(lambda self: self.w.log)
    @rule(data=st.data(), crash=crash("chunk"))
    def redeliver(self, data: st.DataObject, crash: str | None) -> None:
        first = data.draw(st.integers(0, self.w.position))
        self.w.deliver(first, data.draw(st.integers(first, len(self.w.log))), crash)

    @precondition(lambda self: self.w.truth.calendars)
    @rule(crash=crash("close"), settled=st.booleans())
    def close(self, crash: str | None, settled: bool) -> None:
        self.w.close(crash)
        if settled:
            self.w.settle(self.w.open)

    @precondition(lambda self: self.w.revised)
    @rule(crash=crash("close"))
    def close_revised(self, crash: str | None) -> None:
        self.w.close(crash, revised=True)

    @precondition(lambda self: self.w.open)
    @rule(data=st.data(), state=st.sampled_from(["reported", "cancelled"]))
    def settle_or_expire(self, data: st.DataObject, state: str) -> None:
        some = data.draw(st.lists(st.sampled_from(self.w.open), min_size=1, max_size=4, unique=True))
        self.w.settle(some, state)

    @precondition(lambda self: self.w.reported)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.w.release(data.draw(st.sampled_from(self.w.reported)))

    @precondition(lambda self: self.w.pending)
    @rule(data=st.data(), approved=st.sampled_from([True, True, False]), crash=crash("adjust"))
    def decide(self, data: st.DataObject, approved: bool, crash: str | None) -> None:
        for key in data.draw(st.lists(st.sampled_from(self.w.pending), min_size=1, unique=True)):
            self.w.decide(key, approved=approved)
        self.w.adjust(crash)

    @rule(
        customer=st.sampled_from(CUSTOMERS),
        calendar=st.sampled_from([None, *CYCLES]),
        at_once=st.booleans(),
        crash=crash("calendar"),
    )
    def change_calendar(self, customer: str, calendar: str | None, at_once: bool, crash: str | None) -> None:
        self.w.change_calendar(customer, calendar)
        if at_once:
            self.w.settle(self.w.open)
            self.w.move_periods(crash)

    @precondition(lambda self: self.w.changing)
    @rule(crash=crash("calendar"))
    def move_periods(self, crash: str | None) -> None:
        self.w.move_periods(crash)

    @rule(by=st.sampled_from([5 * MINUTE, 40 * MINUTE, HOUR, 6 * HOUR, DAY, 4 * DAY, 12 * DAY, 36 * DAY]))
    def wait(self, by: int) -> None:
        self.w.now += by

    @invariant()
    def holds(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.finish()


def run_anything(db: psycopg.Connection[Any], examples: int, steps: int) -> None:
    chosen = settings(max_examples=examples, stateful_step_count=steps, **SHARED)
    machine = type("Anything", (Anything,), {"db": db})
    run_state_machine_as_test(machine, settings=chosen)


def test_nothing_is_lost_or_doubled_whatever_happens_in_whatever_sequence(
    db: psycopg.Connection[Any],
) -> None:
    run_anything(db, examples=60, steps=25)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_nothing_is_lost_or_doubled_in_many_more_sequences(db: psycopg.Connection[Any]) -> None:
    run_anything(db, examples=2000, steps=40)
