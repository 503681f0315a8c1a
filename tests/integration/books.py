"""A tenant's books in a real PostgreSQL, without Kafka: tests hand chunks over and turn the clock themselves.

Times are ISO texts in UTC. Nothing here computes what a test expects, except for the sums of
:meth:`Books.periods`, which say what the stored hours amount to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg

from services.console.adjustments import decide
from services.counters.adjusting import apply_approved
from services.counters.calendars import carry_out_changes
from services.counters.closing import close_round
from services.counters.config import load_configuration
from services.counters.conservation import conservation
from services.counters.deltas import Invoices
from services.counters.ledger import GROUP, Counters
from services.counters.prepare import Preparer
from services.pusher.giving_back import GiveBack, Returned
from services.streaming import offsets
from services.streaming.chunks import Chunk, Partition
from services.streaming.outbox import unpack
from services.wire.codec import Decoder
from tests.oracle import unframe
from tests.records import UNIT, Raw, encoded, v3
from upcasters.chain import upcasters

Database = psycopg.Connection[Any]
Delta = dict[str, Any]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def us(text: str) -> int:
    """Microseconds since 1970 of an ISO text; what it leaves out is 0, and without a zone it is UTC."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // timedelta(microseconds=1)


def iso(moment: datetime) -> str:
    """``2026-03-01T12:00`` and, where there are any, seconds and their fraction."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return text.removesuffix(".000000").removesuffix(":00")


@dataclass
class Books:
    """One tenant. ``now`` is the time of every arrival, round of closing and change of periods."""

    db: Database
    now: str
    tenant: str = "acme"
    dedupe_days: int = 35

    def __post_init__(self) -> None:
        #: Items with an hour that was revised, as the counters told.
        self.revised: set[bytes] = set()
        self.counters = Counters(
            Preparer(Decoder(), upcasters()),
            lambda: load_configuration(self.db),
            dedupe_days=self.dedupe_days,
            revised=self.revised.update,
        )
        self._read = self._newest("deltas.v1")

    # -- Configuration -------------------------------------------------------------------------------

    def create(self, timezone: str = "UTC") -> Books:
        self.db.execute("INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s)", (self.tenant, timezone))
        return self

    def meter(self, slug: str, aggregation: str = "sum", **columns: Any) -> None:
        names = {
            "tenant_id": self.tenant,
            "meter": slug,
            "aggregation": aggregation,
            "event_name": slug,
            **columns,
        }
        marks = ", ".join("%s" for _ in names)
        self.db.execute(f"INSERT INTO meters ({', '.join(names)}) VALUES ({marks})", tuple(names.values()))

    def customer(self, ref: str, calendar: str | None = None) -> None:
        """Map a customer to a Stripe id of the same name, or give it another calendar."""
        self.db.execute(
            "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) "
            "VALUES (%s, %s, 'cus_' || md5(%s), %s) "
            "ON CONFLICT (tenant_id, customer_ref) DO UPDATE SET calendar = excluded.calendar",
            (self.tenant, ref, ref, calendar),
        )

    # -- Usage ---------------------------------------------------------------------------------------

    def use(
        self, key: str, at: str | None, quantity: str | int = 1, meter: str = "requests", **more: Any
    ) -> dict[str, Any]:
        """A usage record. ``more``: other fields of it, or properties."""
        fields = {name: more.pop(name) for name in ("customer_ref", "tenant_id") if name in more}
        return v3(
            **{"tenant_id": self.tenant, "customer_ref": "cus_1", **fields},
            idempotency_key=key,
            meter=meter,
            quantity=int(Decimal(quantity) * UNIT),
            occurred_at=None if at is None else us(at),
            properties=more,
        )

    def count(self, *records: dict[str, Any], partition: int = 0, db: Database | None = None) -> None:
        """One chunk of these records, which arrive now. ``db``: another connection."""
        db = db or self.db
        row = db.execute(
            "SELECT next_offset FROM partition_offsets WHERE topic = 'usage.v3' AND partition = %s",
            (partition,),
        ).fetchone()
        assert row is not None
        arrival_ms = us(self.now) // 1000
        raws = [Raw(row[0] + index, encoded(record), arrival_ms) for index, record in enumerate(records)]
        self.counters.apply(db, self.counters.prepare(Chunk(Partition("usage.v3", partition), raws)))

    def outcomes(self) -> dict[str, int]:
        """Of every tenant; and no record is without one."""
        kept = conservation(self.db)
        assert kept.gap == 0
        return {name: number for name, number in kept.outcomes.items() if number}

    # -- The timer -----------------------------------------------------------------------------------

    def close(self, invoices: Invoices | None = None) -> list[Delta]:
        """Close everything that can be closed; the new deltas, as a stock reader sees them."""
        while close_round(self.db, invoices=invoices, now_us=us(self.now)) != (0, 0):
            pass
        return self.new_deltas()

    def push(self) -> None:
        """Stand in for the pusher: everything that was under way is settled."""
        self.db.execute("UPDATE buckets SET open = false WHERE open")

    def settle(self, invoices: Invoices | None = None) -> list[Delta]:
        """Push and close until nothing is left."""
        deltas: list[Delta] = []
        while True:
            self.push()
            found = self.close(invoices)
            if not found:
                return deltas
            deltas += found

    def give_back(self, delta: Delta) -> None:
        """A push that was settled failed after all, and its amount goes back to its bucket."""
        item_id, hour = UUID(bytes=delta["item_id"]), delta["hour_start"]
        row = self.db.execute(
            "SELECT period_start FROM buckets WHERE (item_id, hour_start) = (%s, %s) AND pushed >= %s",
            (item_id, hour, delta["amount"]),
        ).fetchone()
        assert row is not None
        back = GiveBack([Returned(item_id, hour, row[0], delta["amount"], delta["formula"])])
        back.check(*[self.db.execute(step, back.values).fetchall() for step in GiveBack.STATEMENTS])

    def change_periods(self) -> int:
        """Carry out what changes of calendars there are, as the timer does; items that moved."""
        moved = carry_out_changes(self.db, us(self.now))  # it may only see them, and wait for what runs
        self.await_contemporaries()
        while number := carry_out_changes(self.db, us(self.now)):
            moved += number
        return moved

    def await_contemporaries(self) -> None:
        """Wait for transactions of other databases of this server, which may hold a change of periods up."""
        row = self.db.execute("SELECT pg_current_xact_id()").fetchone()
        assert row is not None
        deadline = time.monotonic() + 60
        while self.db.execute(
            "SELECT 1 WHERE pg_snapshot_xmin(pg_current_snapshot()) <= %s::text::xid8", (str(row[0]),)
        ).fetchone():
            assert time.monotonic() < deadline, "somebody's transaction takes very long"
            time.sleep(0.02)

    def apply_approved(self) -> int:
        return apply_approved(self.db, us(self.now))

    def decide(self, key: str, *, approved: bool) -> None:
        row = self.db.execute(
            "SELECT adjustment_id FROM adjustments WHERE tenant_id = %s AND idempotency_key = %s",
            (self.tenant, key),
        ).fetchone()
        assert row is not None
        decide(
            self.db,
            str(row[0]),
            approved=approved,
            by="ada",
            now=EPOCH + timedelta(microseconds=us(self.now)),
        )

    # -- Questions -----------------------------------------------------------------------------------

    def hours(self, meter: str = "requests", customer: str = "cus_1", *dimensions: str) -> dict[str, Decimal]:
        """Totals by hour, over all periods."""
        found: dict[str, Decimal] = {}
        for (hour, _), total in self.buckets(meter, customer, *dimensions).items():
            found[hour] = found.get(hour, Decimal(0)) + total
        return found

    def buckets(
        self, meter: str = "requests", customer: str = "cus_1", *dimensions: str
    ) -> dict[tuple[str, str], Decimal]:
        """Totals by hour and period, of the buckets with events."""
        rows = self.db.execute(
            "SELECT b.hour_start, b.period_start, b.total FROM buckets b JOIN items i USING (item_id) "
            "WHERE (i.tenant_id, i.meter, i.customer_ref, i.dimensions) = (%s, %s, %s, %s) AND b.events > 0",
            (self.tenant, meter, customer, list(dimensions)),
        ).fetchall()
        return {(iso(hour), iso(period)): total for hour, period, total in rows}

    def periods(
        self, meter: str = "requests", customer: str = "cus_1", *dimensions: str
    ) -> dict[str, Decimal]:
        """What the hours of each period amount to; those that amount to nothing are left out."""
        hours: dict[str, dict[str, Decimal]] = {}
        for (hour, period), total in self.buckets(meter, customer, *dimensions).items():
            hours.setdefault(period, {})[hour] = total
        row = self.db.execute(
            "SELECT aggregation FROM meters WHERE tenant_id = %s AND meter = %s", (self.tenant, meter)
        ).fetchone()
        assert row is not None
        amounts = {period: _whole(row[0], totals) for period, totals in hours.items()}
        return {period: amount for period, amount in amounts.items() if amount}

    def pushed(self, meter: str = "requests", customer: str = "cus_1") -> dict[str, Decimal]:
        """What Stripe was sent for each period; nothing is left out."""
        rows = self.db.execute(
            "SELECT b.period_start, sum(b.pushed) FROM buckets b JOIN items i USING (item_id) "
            "WHERE (i.tenant_id, i.meter, i.customer_ref) = (%s, %s, %s) "
            "GROUP BY 1 HAVING sum(b.pushed) <> 0",
            (self.tenant, meter, customer),
        ).fetchall()
        return {iso(period): amount for period, amount in rows}

    def carries(self, meter: str = "requests", customer: str = "cus_1") -> dict[str, Decimal]:
        """What each period has closed and not sent."""
        rows = self.db.execute(
            "SELECT p.period_start, p.carry FROM item_periods p JOIN items i USING (item_id) "
            "WHERE (i.tenant_id, i.meter, i.customer_ref) = (%s, %s, %s) AND p.carry <> 0",
            (self.tenant, meter, customer),
        ).fetchall()
        return {iso(period): amount for period, amount in rows}

    def carried_forward(self) -> list[tuple[str, str, str, str, Decimal, str]]:
        """(from period, from hour, to period, to hour, amount, reason), in order."""
        rows = self.db.execute(
            "SELECT period_start, hour_start, to_period, to_hour, amount, reason FROM carry_forwards "
            "ORDER BY carry_id"
        ).fetchall()
        return [(*map(iso, row[:4]), *row[4:]) for row in rows]

    def changes(self) -> list[tuple[int, int, int, bool]]:
        """(items, buckets, straddling, done) of each change of calendar."""
        return self.db.execute(
            "SELECT items, buckets, straddling, done_at IS NOT NULL FROM calendar_changes ORDER BY change_id"
        ).fetchall()

    def adjustments(self) -> list[tuple[str, Decimal, str, str]]:
        """(key, quantity, reason, state), by key."""
        return self.db.execute(
            "SELECT idempotency_key, quantity, reason, state FROM adjustments ORDER BY idempotency_key"
        ).fetchall()

    def new_deltas(self) -> list[Delta]:
        """Deltas that were written since this was last asked, in their order."""
        rows = self.db.execute(
            "SELECT value FROM outbox WHERE topic = 'deltas.v1' AND outbox_id > %s ORDER BY outbox_id",
            (self._read,),
        ).fetchall()
        self._read = self._newest("deltas.v1")
        deltas = [unframe("usage_delta", 2, value) for row in rows for _, value in unpack(row[0])]
        return [delta for delta in deltas if delta["tenant_id"] == self.tenant]

    def ops(self, name: str) -> list[dict[str, Any]]:
        """Ops events of this name, as often as they were written."""
        rows = self.db.execute(
            "SELECT value FROM outbox WHERE topic = 'ops.v1' ORDER BY outbox_id"
        ).fetchall()
        events = [unframe("ops_event", 1, bytes(row[0])) for row in rows]
        return [event for event in events if event["name"] == name]

    def parked(self) -> list[tuple[str, str]]:
        """(idempotency key, reason) of every dead letter."""
        rows = self.db.execute(
            "SELECT headers FROM outbox WHERE topic = 'dead_letters.v1' ORDER BY outbox_id"
        ).fetchall()
        return [(row[0]["tidemeter-error-event-id"], row[0]["tidemeter-error-reason"]) for row in rows]

    def item(self, meter: str = "requests", customer: str = "cus_1") -> UUID:
        row = self.db.execute(
            "SELECT item_id FROM items WHERE (tenant_id, meter, customer_ref) = (%s, %s, %s)",
            (self.tenant, meter, customer),
        ).fetchone()
        assert row is not None
        return row[0]  # type: ignore[no-any-return]

    # -- Proofs --------------------------------------------------------------------------------------

    def assert_meets(self) -> None:
        """Of every item, in every period: what was sent, what waits and what another period took over is
        what was counted. What was sent is what the deltas say, and no identifier was used twice."""
        rows = self.db.execute(
            "SELECT i.item_id, i.meter, i.customer_ref, p.start, m.aggregation, m.scale, "
            "(SELECT sum(pushed) FROM buckets b WHERE (b.item_id, b.period_start) = (i.item_id, p.start)), "
            "coalesce((SELECT carry FROM item_periods c "
            "WHERE (c.item_id, c.period_start) = (i.item_id, p.start)), 0), "
            "coalesce((SELECT sum(amount) FROM carry_forwards f "
            "WHERE (f.item_id, f.period_start) = (i.item_id, p.start)), 0) "
            "- coalesce((SELECT sum(amount) FROM carry_forwards f "
            "WHERE (f.item_id, f.to_period) = (i.item_id, p.start)), 0), i.dimensions "
            "FROM (SELECT DISTINCT item_id, period_start AS start FROM buckets) p "
            "JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter) WHERE i.tenant_id = %s",
            (self.tenant,),
        ).fetchall()
        for _, meter, customer, start, aggregation, scale, pushed, carry, passed_on, dimensions in rows:
            if aggregation == "last":
                continue
            counted = self.periods(meter, customer, *dimensions).get(iso(start), Decimal(0))
            assert pushed + carry + passed_on == counted, (
                meter,
                customer,
                iso(start),
                pushed,
                carry,
                passed_on,
            )
            assert carry < Decimal(1).scaleb(-scale), (meter, customer, iso(start), carry)
        for item_id, meter, _, _, aggregation, *_ in rows:
            if aggregation != "last":
                sums = self.db.execute(
                    "SELECT (SELECT coalesce(sum(amount), 0) FROM deltas WHERE item_id = %(i)s), "
                    "(SELECT coalesce(sum(pushed), 0) FROM buckets WHERE item_id = %(i)s)",
                    {"i": item_id},
                ).fetchone()
                assert sums is not None and sums[0] == sums[1], meter
        packs = self.db.execute("SELECT value FROM outbox WHERE topic = 'deltas.v1'").fetchall()
        written = self.db.execute("SELECT count(DISTINCT identifier) FROM deltas").fetchone()
        assert written == (sum(len(list(unpack(row[0]))) for row in packs),)

    def _newest(self, topic: str) -> int:
        row = self.db.execute(
            "SELECT coalesce(max(outbox_id), 0) FROM outbox WHERE topic = %s", (topic,)
        ).fetchone()
        return int(row[0]) if row else 0


def _whole(aggregation: str, totals: dict[str, Decimal]) -> Decimal:
    if aggregation == "max":
        return max(totals.values())
    if aggregation == "last":
        return totals[max(totals)]
    return sum(totals.values(), Decimal(0))


@contextmanager
def open_books(dsn: str, now: str, dedupe_days: int = 35) -> Iterator[Books]:
    """The books of ``acme``, in UTC, with positions for every partition."""
    with psycopg.connect(dsn, autocommit=True) as db:
        starts = {Partition(f"usage.v{version}", number): 0 for version in (1, 2, 3) for number in range(4)}
        offsets.ensure_positions(db, GROUP, starts)
        yield Books(db, now, dedupe_days=dedupe_days).create()


def amounts(deltas: list[Delta]) -> list[tuple[str, Decimal]]:
    """(hour, amount) of each, by hour."""
    return sorted((iso(delta["hour_start"]), delta["amount"]) for delta in deltas)
