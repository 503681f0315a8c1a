"""What was found, as rows: the newest finding of each period, one open suggestion of each, ops events.

A suggestion opens when a difference is found, changes with it, and is resolved when it has gone; finding the
same again adds none, and one that somebody has dismissed comes back only when the difference is another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, LiteralString

from services.reconciler.judging import Finding, State, Verdict
from services.reconciler.local import Connection, Subject
from services.streaming import outbox
from services.streaming.reconciliation import Asked
from services.wire.decimals import plain
from services.wire.records import OutboxRow, ops_event
from services.wire.times import micros

#: Whose outbox holds the ops events; its process relays them.
PRODUCER = "tidemeter-reconciler"
FINDINGS_MAX = 1000
IDENTIFIERS_MAX = 100

_KEPT: LiteralString = """
INSERT INTO reconciliations AS r (tenant_id, customer_ref, meter, period_start, period_end, item, event_name,
    stripe_customer, state, reason, is_final, counted, waiting, local, stripe, diff_abs, diff_pct, findings,
    since, checked_at)
VALUES (%(tenant)s, %(customer)s, %(meter)s, %(start)s, %(end)s, %(item)s, %(event)s, %(stripe_customer)s,
    %(state)s, %(reason)s, %(final)s, %(counted)s, %(waiting)s, %(local)s, %(stripe)s, %(abs)s, %(pct)s,
    %(findings)s, %(now)s, %(now)s)
ON CONFLICT (tenant_id, customer_ref, meter, period_start) DO UPDATE SET
    period_end = excluded.period_end, event_name = excluded.event_name,
    stripe_customer = excluded.stripe_customer, state = excluded.state, reason = excluded.reason,
    is_final = excluded.is_final, counted = excluded.counted, waiting = excluded.waiting,
    local = excluded.local, stripe = excluded.stripe, diff_abs = excluded.diff_abs,
    diff_pct = excluded.diff_pct, findings = excluded.findings, checked_at = excluded.checked_at,
    is_dismissed = false,
    since = CASE WHEN r.state = excluded.state THEN r.since ELSE excluded.since END
"""

#: The newest of each: earlier ones are closed.
_NEWEST: LiteralString = """
SELECT DISTINCT ON (u.n) u.n, s.suggestion_id, s.state, s.kind, s.amount, s.is_told
FROM unnest(%s::text[], %s::text[], %s::text[], %s::timestamptz[]) WITH ORDINALITY AS u (t, c, m, p, n)
JOIN reconciliation_suggestions s
  ON (s.tenant_id, s.customer_ref, s.meter, s.period_start) = (u.t, u.c, u.m, u.p)
ORDER BY u.n, s.suggestion_id DESC
"""
_DISMISSED: LiteralString = """
UPDATE reconciliations SET is_dismissed = true
WHERE (tenant_id, customer_ref, meter, period_start) = (%(tenant)s, %(customer)s, %(meter)s, %(start)s)
"""
_SUGGEST: LiteralString = """
INSERT INTO reconciliation_suggestions
    (tenant_id, customer_ref, meter, period_start, kind, amount, is_told, created_at, updated_at)
VALUES (%(tenant)s, %(customer)s, %(meter)s, %(start)s, %(kind)s, %(amount)s, %(kind)s = 'replay',
        %(now)s, %(now)s)
ON CONFLICT DO NOTHING RETURNING suggestion_id
"""
_CHANGE: LiteralString = """
UPDATE reconciliation_suggestions SET kind = %(kind)s, amount = %(amount)s, updated_at = %(now)s,
    is_told = is_told OR %(kind)s = 'replay'
WHERE suggestion_id = %(id)s AND state = 'open' AND (kind, amount) IS DISTINCT FROM (%(kind)s, %(amount)s)
"""
_RESOLVE: LiteralString = """
UPDATE reconciliation_suggestions SET state = 'resolved', closed_at = %(now)s, closed_by = 'reconciler'
WHERE suggestion_id = %(id)s AND state = 'open'
"""
#: Periods that hold nothing any more, as after a change of calendar, and were not found again.
_FORGET: LiteralString = """
WITH gone AS (
    DELETE FROM reconciliations r
    WHERE checked_at < %(began)s AND period_end >= %(began)s - interval '39 days'
      AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
      AND (%(meters)s::text[] IS NULL OR meter = ANY(%(meters)s))
      AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s)
      AND NOT EXISTS (
          SELECT FROM items i WHERE (i.tenant_id, i.meter, i.customer_ref)
              = (r.tenant_id, r.meter, r.customer_ref) AND (
              EXISTS (SELECT FROM buckets b WHERE (b.item_id, b.period_start) = (i.item_id, r.period_start)
                      AND (b.events > 0 OR b.total <> 0 OR b.pushed <> 0))
              OR EXISTS (SELECT FROM meter_events e
                         WHERE (e.item_id, e.period_start) = (i.item_id, r.period_start))))
    RETURNING tenant_id, customer_ref, meter, period_start)
UPDATE reconciliation_suggestions s SET state = 'resolved', closed_at = %(began)s, closed_by = 'reconciler'
FROM gone WHERE (s.tenant_id, s.customer_ref, s.meter, s.period_start)
    = (gone.tenant_id, gone.customer_ref, gone.meter, gone.period_start) AND s.state = 'open'
"""


def item_label(tenant_id: str, customer_ref: str, meter: str) -> str:
    """A short name for labels and ops events that tells nothing of the customer."""
    text = json.dumps([tenant_id, customer_ref, meter])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def store(db: Connection, found: Iterable[tuple[Subject, Verdict]], now: datetime) -> Counter[State]:
    """Keep a batch in one transaction, with the suggestions and ops events that follow from it.

    Returns how many periods are in which state; a drift that somebody has dismissed counts as ``adjust``.

    Whoever writes the finding of a period holds its row, so two runs at once do not suggest twice.
    """
    rows = sorted((_values(subject, verdict, now) for subject, verdict in found), key=_name)
    if not rows:
        return Counter()
    with db.transaction():
        db.cursor().executemany(_KEPT, rows)
        newest = _newest_suggestions(db, rows)
        events = [event for row in rows for event in _suggest(db, row, newest.get(_name(row)))]
        if events:
            outbox.enqueue(db, PRODUCER, events)
    return Counter(
        "adjust" if row["state"] == "drift" and is_dismissed(row, newest.get(_name(row))) else row["state"]
        for row in rows
    )


def _name(row: dict[str, Any]) -> tuple[str, str, str, datetime]:
    return row["tenant"], row["customer"], row["meter"], row["start"]


@dataclass(frozen=True, slots=True)
class Suggested:
    """A suggestion as it is stored."""

    suggestion_id: int
    state: str
    kind: str
    amount: Decimal
    is_told: bool


def _newest_suggestions(
    db: Connection, rows: Sequence[dict[str, Any]]
) -> dict[tuple[str, str, str, datetime], Suggested]:
    columns = [[row[column] for row in rows] for column in ("tenant", "customer", "meter", "start")]
    found = db.execute(_NEWEST, columns).fetchall()
    return {_name(rows[number - 1]): Suggested(*rest) for number, *rest in found}


def forget(db: Connection, asked: Asked, began: datetime) -> None:
    """Drop findings of periods that there are no more, as after a change of calendar."""
    if asked.period_at is None:
        db.execute(_FORGET, {**asked.values(), "began": began})


def _values(subject: Subject, verdict: Verdict, now: datetime) -> dict[str, Any]:
    amount = None if verdict.stripe is None else verdict.local - verdict.stripe
    return {
        "tenant": subject.tenant_id,
        "customer": subject.customer_ref,
        "meter": subject.meter,
        "start": subject.start,
        "end": subject.end,
        "item": item_label(subject.tenant_id, subject.customer_ref, subject.meter),
        "event": subject.event_name,
        "stripe_customer": subject.stripe_customer,
        "state": verdict.state,
        "reason": verdict.reason,
        "final": subject.is_final,
        "counted": verdict.counted,
        "waiting": verdict.waiting,
        "local": verdict.local,
        "stripe": verdict.stripe,
        "abs": verdict.diff_abs,
        "pct": verdict.diff_pct,
        "findings": json.dumps(_documents(verdict.findings)),
        "now": now,
        "kind": "replay" if verdict.state == "drift" else "adjust",
        "amount": amount,
        "causes": sorted({finding.cause for finding in verdict.findings}),
    }


def _documents(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """By hour; only the largest when there are too many to keep."""
    if len(findings) > FINDINGS_MAX:
        largest = sorted(range(len(findings)), key=lambda place: -abs(findings[place].amount))
        findings = [findings[place] for place in sorted(largest[:FINDINGS_MAX])]
    return [
        {
            "hour": None if one.hour is None else f"{one.hour:%Y-%m-%dT%H:%M:%SZ}",
            "cause": one.cause,
            "amount": plain(one.amount),
            "identifiers": list(one.identifiers[:IDENTIFIERS_MAX]),
        }
        for one in findings
    ]


def _suggest(db: Connection, row: dict[str, Any], newest: Suggested | None) -> list[OutboxRow]:
    """Open, change or resolve the suggestion of a period; what is unknown changes nothing."""
    if row["state"] == "unknown":
        return []
    if newest is not None and newest.state == "open":
        return _follow(db, row, newest)
    if row["state"] == "ok":
        return []
    if is_dismissed(row, newest):
        db.execute(_DISMISSED, row)
        return []
    opened = db.execute(_SUGGEST, row).fetchone()
    if opened is None or row["kind"] != "replay":
        return []
    return [_event("reconciliation_drift", row, opened[0])]


def is_dismissed(row: dict[str, Any], newest: Suggested | None) -> bool:
    """Whether somebody has settled this very difference."""
    return newest is not None and (newest.state, newest.kind, newest.amount) == (
        "dismissed",
        row["kind"],
        row["amount"],
    )


def _follow(db: Connection, row: dict[str, Any], was: Suggested) -> list[OutboxRow]:
    """What becomes of an open suggestion."""
    values = {**row, "id": was.suggestion_id}
    if row["state"] == "ok":
        resolved = db.execute(_RESOLVE, values).rowcount
        told = resolved and was.is_told
        return [_event("reconciliation_resolved", row, was.suggestion_id)] if told else []
    changed = db.execute(_CHANGE, values).rowcount
    is_new = changed and row["kind"] == "replay" and not was.is_told
    return [_event("reconciliation_drift", row, was.suggestion_id)] if is_new else []


def _event(name: str, row: dict[str, Any], suggestion_id: int) -> OutboxRow:
    return ops_event(
        name,
        subject_type="item_period",
        subject_id=f"{row['item']}:{suggestion_id}",
        source="reconciler",
        at_us=micros(row["now"]),
        attributes={
            "tenant": row["tenant"],
            "meter": row["meter"],
            "period_start": f"{row['start']:%Y-%m-%dT%H:%M:%SZ}",
            "difference": plain(row["amount"] or Decimal(0)),
            "causes": ",".join(row["causes"]),
        },
    )
