"""What our own tables say: of items and their periods, and of the hours of an account. SQL.

The books of a batch are read in one snapshot, for closing and pushing go on. The hours of an account are read
after Stripe was asked: what Stripe has shown by then is in the journal, as reported or as under way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

import psycopg

from services.reconciler.judging import (
    ZERO,
    Account,
    Books,
    Finding,
    Hour,
    ItemPeriod,
    Journal,
    JournalHour,
    Sender,
    of_books,
    of_values,
)
from services.streaming.reconciliation import Asked
from services.wire.periods import Calendar
from services.wire.times import instant, micros, utc

Connection = psycopg.Connection[Any]

#: Stripe takes meter events of 35 days, and shows what it took a little later.
LOOKED_BACK = timedelta(days=40)
ACCOUNTS_AT_ONCE = 200
CANDIDATES_MAX = 1000


@dataclass(slots=True)
class Subject:
    """A customer's meter in one period: what Stripe can show a total of."""

    tenant_id: str
    customer_ref: str
    meter: str
    start: datetime
    end: datetime
    stripe_customer: str | None
    event_name: str
    formula: str
    is_final: bool
    newest: datetime | None = None  # of a `last` meter: its newest hour
    items: set[UUID] = field(default_factory=set)
    parts: list[ItemPeriod] = field(default_factory=list)
    accounts: set[Account] = field(default_factory=set)


# -- Which items and periods -------------------------------------------------------------------------------

_TEMP: LiteralString = """
CREATE TEMP TABLE IF NOT EXISTS reconciling (place int, item_id uuid, period_start timestamptz)
"""
#: Whose an item is, and where it is billed, now. One whose row is gone is named as the journal names it.
_NAMED: LiteralString = """
SELECT t.*, n.tenant_id, n.customer_ref, n.meter, n.dirty_from,
       coalesce(n.calendar, (SELECT '1 month ' || timezone FROM tenants WHERE tenant_id = n.tenant_id))
           AS calendar,
       coalesce(c.stripe_customer, CASE WHEN n.customer_ref ~ '^cus_[A-Za-z0-9_]+$' THEN n.customer_ref END)
           AS stripe_customer,
       m.event_name, m.aggregation, m.scale
FROM ({table}) t
LEFT JOIN items i USING (item_id)
LEFT JOIN LATERAL (SELECT e.tenant_id, e.stripe_customer, e.meter FROM meter_events e
    WHERE i.item_id IS NULL AND e.item_id = t.item_id LIMIT 1) e ON true
CROSS JOIN LATERAL (SELECT coalesce(i.tenant_id, e.tenant_id) AS tenant_id,
    coalesce(i.customer_ref, e.stripe_customer) AS customer_ref, coalesce(i.meter, e.meter) AS meter,
    i.calendar, i.dirty_from) n
JOIN meters m ON (m.tenant_id, m.meter) = (n.tenant_id, n.meter)
LEFT JOIN customers c ON (c.tenant_id, c.customer_ref) = (n.tenant_id, n.customer_ref)
"""
#: By period rather than by hour: one without usage for weeks is a period too.
_TOUCHED: LiteralString = """
SELECT item_id, period_start FROM item_periods WHERE period_end >= %(since)s
UNION SELECT item_id, period_start FROM buckets WHERE hour_start >= %(since)s
"""
_FILL: LiteralString = f"""
INSERT INTO reconciling
SELECT dense_rank() OVER (ORDER BY event_name, stripe_customer, tenant_id, customer_ref), item_id,
       period_start
FROM ({_NAMED.format(table=_TOUCHED)}) n
WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
  AND (%(meters)s::text[] IS NULL OR meter = ANY(%(meters)s))
  AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s)
"""  # noqa: S608  constants only


def list_items(db: Connection, asked: Asked, now: datetime) -> int:
    """Note, in a table of this session, what is to be reconciled; returns how many places that is."""
    db.execute(_TEMP)
    db.execute("TRUNCATE reconciling")
    since = now - LOOKED_BACK
    if asked.period_at is not None:
        since = min(since, asked.period_at)
    db.execute(_FILL, {**asked.values(), "since": since})
    db.execute("CREATE INDEX IF NOT EXISTS reconciling_place ON reconciling (place)")
    db.execute("ANALYZE reconciling")
    row = db.execute("SELECT coalesce(max(place), 0) FROM reconciling").fetchone()
    return int(row[0]) if row else 0


# -- Books of items ----------------------------------------------------------------------------------------

_PLACES: LiteralString = "SELECT * FROM reconciling WHERE place BETWEEN %(first)s AND %(last)s"
#: Everything of a batch that has a name, as it is in the snapshot.
_MINE: LiteralString = _NAMED.format(table=_PLACES)

_BOOKS: LiteralString = f"""
SELECT r.item_id, r.period_start, r.tenant_id, r.customer_ref, r.meter, r.calendar, r.stripe_customer,
       r.event_name, r.aggregation, r.scale, coalesce(s.total, 0), coalesce(s.peak, 0),
       coalesce(s.closed, 0), coalesce(s.pushed, 0), coalesce(k.carry, 0), coalesce(k.value, 0),
       (SELECT coalesce(sum(amount), 0) FROM carry_forwards
        WHERE item_id = r.item_id AND to_period = r.period_start)
       - (SELECT coalesce(sum(amount), 0) FROM carry_forwards
          WHERE item_id = r.item_id AND period_start = r.period_start),
       s.arrived, coalesce(s.events, 0)
FROM ({_MINE}) r
LEFT JOIN item_periods k USING (item_id, period_start)
LEFT JOIN LATERAL (
    SELECT sum(total) AS total, max(total) AS peak, sum(coalesce(closed, 0)) AS closed, sum(pushed) AS pushed,
           sum(events) AS events, min(last_arrival) FILTER (WHERE closed IS DISTINCT FROM total) AS arrived
    FROM buckets WHERE (item_id, period_start) = (r.item_id, r.period_start)) s ON true
ORDER BY r.place, r.item_id, r.period_start
"""  # noqa: S608  constants only

#: Hours that are not as they are at rest. What a `last` meter pushed is no sum.
_HOURS: LiteralString = f"""
WITH mine AS MATERIALIZED (SELECT r.*, r.aggregation = 'last' AS is_last FROM ({_MINE}) r),
sent AS (
    SELECT item_id, period_start, hour_start, sum(amount) AS amount, bool_or(under_way) AS under_way FROM (
        SELECT e.item_id, e.period_start, e.hour_start,
               CASE WHEN e.state = 'cancelled' OR e.released_at IS NOT NULL THEN 0
                   ELSE e.amount END AS amount,
               e.state IN ('pending', 'in_flight', 'in_doubt') AS under_way
        FROM mine JOIN meter_events e USING (item_id, period_start)
        UNION ALL
        SELECT d.item_id, d.period_start, d.hour_start, d.amount, true
        FROM mine JOIN deltas d USING (item_id, period_start)
        WHERE NOT EXISTS (SELECT FROM meter_events e WHERE e.identifier = d.identifier)) AS every
    GROUP BY item_id, period_start, hour_start
), kept AS (
    SELECT b.*, true AS is_there FROM mine JOIN buckets b USING (item_id, period_start)
)
SELECT item_id, period_start, hour_start, coalesce(b.total, 0), coalesce(b.closed, 0),
       CASE WHEN mine.is_last THEN 0 ELSE coalesce(b.pushed, 0) END,
       CASE WHEN mine.is_last THEN 0 ELSE coalesce(s.amount, 0) END,
       coalesce(mine.dirty_from <= hour_start, false) OR coalesce(b.open, false),
       b.is_there IS NULL OR coalesce(b.open, false) <> coalesce(s.under_way, false)
FROM kept b FULL JOIN sent s USING (item_id, period_start, hour_start)
JOIN mine USING (item_id, period_start)
WHERE b.is_there IS NULL OR b.closed IS DISTINCT FROM b.total OR b.open <> coalesce(s.under_way, false)
   OR (NOT mine.is_last AND b.pushed <> coalesce(s.amount, 0))
ORDER BY item_id, period_start, hour_start
"""  # noqa: S608  constants only

#: A delta and its meter event are one amount, and neither may be without the other once it was read. What a
#: `last` bucket has pushed is its newest meter event.
_UNEQUAL: LiteralString = """
SELECT e.item_id, e.period_start, e.hour_start
FROM reconciling r JOIN meter_events e USING (item_id, period_start)
LEFT JOIN deltas d ON d.identifier = coalesce(e.replaces, e.identifier)
WHERE r.place BETWEEN %(first)s AND %(last)s AND d.amount IS DISTINCT FROM e.amount
UNION
SELECT b.item_id, b.period_start, b.hour_start
FROM reconciling r JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter)
JOIN buckets b USING (item_id, period_start)
WHERE r.place BETWEEN %(first)s AND %(last)s AND m.aggregation = 'last' AND NOT b.open
  AND b.pushed <> coalesce((
      SELECT e.amount FROM meter_events e
      LEFT JOIN deltas d ON d.identifier = coalesce(e.replaces, e.identifier)
      WHERE (e.item_id, e.period_start, e.hour_start) = (b.item_id, b.period_start, b.hour_start)
      ORDER BY d.sequence DESC NULLS LAST LIMIT 1), 0)
"""

_JOURNAL: LiteralString = """
SELECT e.item_id, e.period_start, e.stripe_customer, e.event_name, e.state, sum(e.amount), count(*),
       min(e.created_at)
FROM reconciling r JOIN meter_events e USING (item_id, period_start)
WHERE r.place BETWEEN %(first)s AND %(last)s AND e.state <> 'cancelled' AND e.released_at IS NULL
GROUP BY 1, 2, 3, 4, 5
UNION ALL
SELECT d.item_id, d.period_start, NULL, NULL, 'pending', sum(d.amount), count(*), min(d.closed_at)
FROM reconciling r JOIN deltas d USING (item_id, period_start)
WHERE r.place BETWEEN %(first)s AND %(last)s
  AND NOT EXISTS (SELECT FROM meter_events e WHERE e.identifier = d.identifier)
GROUP BY 1, 2
"""
_FAILED: LiteralString = """
SELECT e.item_id, e.period_start, e.hour_start, sum(e.amount), array_agg(e.identifier ORDER BY e.identifier)
FROM reconciling r JOIN meter_events e USING (item_id, period_start)
WHERE r.place BETWEEN %(first)s AND %(last)s AND e.state = 'failed' AND e.released_at IS NULL
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
#: Of `last` meters: the newest hour, and the newest value that Stripe took.
_NEWEST: LiteralString = """
SELECT DISTINCT ON (r.item_id, r.period_start) r.item_id, r.period_start, b.hour_start, b.total,
       coalesce(b.closed, 0), b.pushed,
       b.closed IS DISTINCT FROM b.total AND (coalesce(i.dirty_from <= b.hour_start, false) OR b.open)
FROM reconciling r JOIN items i USING (item_id) JOIN meters m USING (tenant_id, meter)
JOIN buckets b USING (item_id, period_start)
WHERE r.place BETWEEN %(first)s AND %(last)s AND m.aggregation = 'last' AND b.events > 0
ORDER BY r.item_id, r.period_start, b.hour_start DESC
"""
_NEWEST_REPORTED: LiteralString = """
SELECT DISTINCT ON (r.item_id, r.period_start) r.item_id, r.period_start, e.amount
FROM reconciling r JOIN meter_events e USING (item_id, period_start)
LEFT JOIN deltas d ON d.identifier = coalesce(e.replaces, e.identifier)
WHERE r.place BETWEEN %(first)s AND %(last)s AND e.formula = 'last' AND e.state = 'reported'
ORDER BY r.item_id, r.period_start, e.event_at DESC, d.sequence DESC NULLS LAST
"""
_LIMITS: LiteralString = """
SELECT stripe_customer, period_end, final_at FROM invoice_limits
WHERE stripe_customer = ANY(%(customers)s) AND final_at IS NOT NULL
"""

Place = tuple[UUID, datetime]


def read_subjects(db: Connection, first: int, last: int, *, now: datetime, grace: timedelta) -> list[Subject]:
    """The subjects of some places, with what the books say of each of their items."""
    values = {"first": first, "last": last}
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        books = db.execute(_BOOKS, values).fetchall()
        hours = db.execute(_HOURS, values).fetchall()
        unequal = db.execute(_UNEQUAL, values).fetchall()
        journal = db.execute(_JOURNAL, values).fetchall()
        failed = db.execute(_FAILED, values).fetchall()
        newest = db.execute(_NEWEST, values).fetchall()
        newest_reported = db.execute(_NEWEST_REPORTED, values).fetchall()
        customers = sorted({row[6] for row in books if row[6] is not None})
        limits = db.execute(_LIMITS, {"customers": customers}).fetchall()
    final = {(customer, utc(end)): at for customer, end, at in limits}
    hours_of: defaultdict[Place, list[Hour]] = defaultdict(list)
    for row in hours:
        hours_of[row[0], row[1]].append(Hour(utc(row[2]), row[3], row[4], row[5], row[6], row[7], row[8]))
    journals, accounts = _journals(journal, failed)
    newest_of = {
        (row[0], row[1]): Hour(utc(row[2]), row[3], row[4], row[5], ZERO, row[6], False) for row in newest
    }
    taken = {(row[0], row[1]): row[2] for row in newest_reported}
    subjects: dict[tuple[Any, ...], Subject] = {}
    for row in books:
        place = row[0], row[1]
        if not any(row[10:17]) and not row[18] and place not in journals and place not in hours_of:
            continue  # what a change of calendar has left behind
        subject = _subject(subjects, row, final, now=now, grace=grace)
        subject.items.add(row[0])
        subject.accounts |= accounts[place]
        journaled = journals.get(place, Journal())
        unit = Decimal(1).scaleb(-row[9])
        if row[8] == "last":
            journaled = _with_reported(journaled, taken.get(place, ZERO))
            newest_hour = newest_of.get(place)
            part = of_values(newest_hour, journaled, unit, hours_of[place], row[17])
            subject.newest = subject.start if newest_hour is None else newest_hour.hour
        else:
            is_max = row[8] == "max"
            part = of_books(
                Books(
                    total=row[11] if is_max else row[10],
                    closed=row[15] if is_max else row[12],
                    carried=row[16],
                    carry=row[14],
                    pushed=row[13],
                    unit=unit,
                    is_max=is_max,
                    hours=hours_of[place],
                ),
                journaled,
                row[17],
            )
        subject.parts.append(part)
    _note_unequal(unequal, subjects.values())
    return list(subjects.values())


def _subject(
    subjects: dict[tuple[Any, ...], Subject],
    row: Sequence[Any],
    final: Mapping[tuple[str, datetime], datetime],
    *,
    now: datetime,
    grace: timedelta,
) -> Subject:
    """The one that the row belongs to. A calendar without an anchor has no known invoice."""
    _, start, tenant_id, customer_ref, meter, calendar_text, stripe_customer, event_name, aggregation = row[
        :9
    ]
    name = tenant_id, customer_ref, meter, start
    if name not in subjects:
        calendar = Calendar.parse(calendar_text)
        end = instant(calendar.period_end(micros(start)))
        final_at = final.get((stripe_customer, end))
        subjects[name] = Subject(
            tenant_id, customer_ref, meter, utc(start), end, stripe_customer, event_name,
            formula="last" if aggregation == "last" else "sum",
            is_final=now >= final_at if final_at is not None else calendar.anchored and now >= end + grace,
            accounts=set() if stripe_customer is None else {Account(stripe_customer, event_name)},
        )  # fmt: skip
    return subjects[name]


def _journals(
    rows: Iterable[Sequence[Any]], failed: Iterable[Sequence[Any]]
) -> tuple[dict[Place, Journal], defaultdict[Place, set[Account]]]:
    """What became of each item's period, and the accounts that took of it."""
    reported: defaultdict[Place, Decimal] = defaultdict(Decimal)
    pending: defaultdict[Place, Decimal] = defaultdict(Decimal)
    doubts: defaultdict[Place, int] = defaultdict(int)
    since: dict[Place, datetime] = {}
    accounts: defaultdict[Place, set[Account]] = defaultdict(set)
    refused: defaultdict[Place, list[tuple[datetime, Decimal, tuple[str, ...]]]] = defaultdict(list)
    for item_id, start, customer, event_name, state, amount, number, oldest in rows:
        place = item_id, start
        if state == "reported":
            reported[place] += amount
            accounts[place].add(Account(customer, event_name))
        elif state in ("pending", "in_flight"):
            pending[place] += amount
            since[place] = min(oldest, since.get(place, oldest))
        elif state == "in_doubt":
            doubts[place] += number
    for item_id, start, hour, amount, names in failed:
        refused[item_id, start].append((utc(hour), amount, tuple(names)))
    places = {*reported, *pending, *doubts, *refused}
    found = {
        place: Journal(
            reported[place], pending[place], doubts[place], tuple(refused[place]), since.get(place)
        )
        for place in places
    }
    return found, accounts


def _with_reported(journal: Journal, reported: Decimal) -> Journal:
    return Journal(reported, journal.pending, journal.doubts, journal.failed, journal.waits_since)


def _note_unequal(rows: Iterable[Sequence[Any]], subjects: Iterable[Subject]) -> None:
    """Hours in which a delta and its meter event differ: no sum shows it, and nobody may rely on either."""
    by_item: dict[tuple[UUID, datetime], Subject] = {
        (item, subject.start): subject for subject in subjects for item in subject.items
    }
    for item_id, start, hour in rows:
        subject = by_item.get((item_id, utc(start)))
        if subject is not None:
            subject.parts.append(
                ItemPeriod(ZERO, ZERO, ZERO, None, 0, (Finding("books_differ", ZERO, utc(hour)),))
            )


# -- Hours of accounts -------------------------------------------------------------------------------------

_REPORTED: LiteralString = """
SELECT u.n, (SELECT coalesce(sum(e.amount), 0) FROM meter_events e
             WHERE e.stripe_customer = u.c AND e.event_name = u.e AND e.state = 'reported'
               AND e.hour_start >= u.f AND e.hour_start < u.t)
FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[]) WITH ORDINALITY AS u (c, e, f, t, n)
"""
#: Of formula `last` the newest value counts; of one second, the one that was sent last.
_ACCOUNT_HOURS: LiteralString = """
SELECT e.hour_start, coalesce(sum(e.amount) FILTER (WHERE e.state = 'reported'), 0),
       coalesce(sum(e.amount) FILTER (WHERE young AND e.amount > 0), 0),
       coalesce(sum(e.amount) FILTER (WHERE young AND e.amount < 0), 0),
       coalesce(sum(e.amount) FILTER (WHERE e.state = 'in_flight' AND e.amount > 0), 0),
       coalesce(sum(e.amount) FILTER (WHERE e.state = 'in_flight' AND e.amount < 0), 0),
       count(*) FILTER (WHERE e.state = 'in_doubt'),
       array_agg(DISTINCT e.item_id::text || ' ' || extract(epoch FROM e.period_start)),
       (array_agg(e.amount ORDER BY e.event_at DESC, d.sequence DESC NULLS LAST)
           FILTER (WHERE e.state = 'reported' AND e.formula = 'last'))[1],
       min(e.amount) FILTER (WHERE e.state IN ('reported', 'in_flight')),
       max(e.amount) FILTER (WHERE e.state IN ('reported', 'in_flight')),
       bool_or(young OR e.state = 'in_flight')
FROM (SELECT *, state = 'reported' AND settled_at > %(young)s AS young FROM meter_events
      WHERE stripe_customer = %(customer)s AND event_name = %(event)s
        AND (state = 'reported' OR state IN ('pending', 'in_flight', 'in_doubt'))
        AND hour_start >= %(first)s AND hour_start < %(last)s) e
LEFT JOIN deltas d ON e.formula = 'last' AND d.identifier = coalesce(e.replaces, e.identifier)
GROUP BY e.hour_start
"""
_CANDIDATES: LiteralString = """
SELECT identifier, amount, item_id, period_start FROM meter_events
WHERE stripe_customer = %s AND event_name = %s AND state = 'reported' AND hour_start = %s LIMIT %s
"""

Window = tuple[datetime, datetime]


def reported_totals(db: Connection, wanted: Sequence[tuple[Account, Window]]) -> list[Decimal]:
    """What Stripe was told of each account within its window, and took; of formula ``sum``."""
    rows = db.execute(
        _REPORTED,
        (
            [one.stripe_customer for one, _ in wanted],
            [one.event_name for one, _ in wanted],
            [first for _, (first, _) in wanted],
            [last for _, (_, last) in wanted],
        ),
    ).fetchall()
    totals = dict(rows)
    return [totals[number] for number in range(1, len(wanted) + 1)]


def account_hours(
    db: Connection, account: Account, window: Window, *, young_since: datetime
) -> dict[datetime, JournalHour]:
    """The journal of an account by hour."""
    values = {
        "customer": account.stripe_customer,
        "event": account.event_name,
        "first": window[0],
        "last": window[1],
        "young": young_since,
    }
    return {utc(row[0]): _journal_hour(row) for row in db.execute(_ACCOUNT_HOURS, values)}


def _journal_hour(row: Sequence[Any]) -> JournalHour:
    _, reported, young_more, young_less, flying_more, flying_less, doubts, senders, newest, *rest = row
    found = JournalHour(
        reported, young_more, young_less, flying_more, flying_less, doubts, frozenset(map(_sender, senders))
    )
    least, most, moves = rest
    if newest is not None:
        found.reported = newest
        found.young_more = found.young_less = found.flying_more = found.flying_less = ZERO
        if moves:  # any of its values may be the one that is shown, or none
            found.young_more = max(newest - least, newest, ZERO)
            found.young_less = min(newest - most, ZERO)
    return found


def _sender(text: str) -> Sender:
    item_id, seconds = text.split(" ")
    return UUID(item_id), instant(int(Decimal(seconds) * 1_000_000))


def candidates(db: Connection, account: Account, hour: datetime) -> list[tuple[str, Decimal, Sender]]:
    """What Stripe took of an hour, by identifier and sender; at most a thousand."""
    rows = db.execute(
        _CANDIDATES, (account.stripe_customer, account.event_name, hour, CANDIDATES_MAX)
    ).fetchall()
    return [(identifier, amount, (item_id, utc(start))) for identifier, amount, item_id, start in rows]
