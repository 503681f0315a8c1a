"""Reconciliation as it is asked for and shown: by HTTP, and by the command. Asking Stripe is the part of
``services.reconciler``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, LiteralString

import msgspec
import psycopg
from psycopg.rows import dict_row

from services.streaming.parking import audit
from services.streaming.replays import Text, Time
from services.wire.decimals import plain
from services.wire.errors import Misconfigured, TidemeterError
from services.wire.settings import Settings
from services.wire.times import moment, utc

Connection = psycopg.Connection[Any]
Row = Mapping[str, Any]

State = Literal["ok", "adjust", "drift", "unknown"]
RunState = Literal["requested", "running", "done", "failed"]
#: From good to bad: what several are together is the worst of them.
STATES: tuple[State, ...] = ("ok", "adjust", "unknown", "drift")
SHOWN_MAX = 1000


class RefusedReconciliation(TidemeterError):
    """It cannot be asked for. ``code`` is stable; ``path`` names the field at fault."""

    def __init__(self, code: str, message: str, path: str) -> None:
        super().__init__(message)
        self.code = code
        self.path = path


class ReconcileRequest(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """What to compare with Stripe. What is not given does not restrict. `period` is a time within one."""

    tenant_id: Text | None = None
    metrics: Annotated[tuple[Text, ...], msgspec.Meta(max_length=100)] = ()
    customer_ref: Text | None = None
    period: Time | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, resolved: known names, and a time. ``period_at``: a time within the period."""

    tenant_id: str | None = None
    meters: tuple[str, ...] = ()
    customer_ref: str | None = None
    period_at: datetime | None = None

    def values(self) -> dict[str, Any]:
        """Parameters of queries."""
        return {
            "tenant": self.tenant_id,
            "meters": list(self.meters) or None,
            "customer": self.customer_ref,
            "period": self.period_at,
        }


def resolve(db: Connection, request: ReconcileRequest, now: datetime) -> Asked:
    """What a request means at ``now``.

    Raises:
        RefusedReconciliation: ``tenant_missing``, ``tenant_unknown``, ``meter_unknown``, ``time_invalid``.
    """
    period_at = None
    if request.period is not None:
        try:
            period_at = moment(request.period, now)
        except Misconfigured as error:
            raise RefusedReconciliation("time_invalid", str(error), "period") from None
    tenant_id, metrics = request.tenant_id, tuple(sorted(set(request.metrics)))
    if tenant_id is None:
        if metrics or request.customer_ref is not None:
            raise RefusedReconciliation("tenant_missing", "say of which tenant", "tenantId")
        return Asked(period_at=period_at)
    rows = db.execute(
        "SELECT m.meter FROM tenants t LEFT JOIN meters m USING (tenant_id) WHERE t.tenant_id = %s",
        (tenant_id,),
    ).fetchall()
    if not rows:
        raise unknown_tenant()
    known = {row[0] for row in rows}
    for number, meter in enumerate(request.metrics):
        if meter not in known:
            raise RefusedReconciliation(
                "meter_unknown", "this tenant has no such meter", f"metrics[{number}]"
            )
    return Asked(tenant_id, metrics, request.customer_ref, period_at)


def unknown_tenant() -> RefusedReconciliation:
    """There is no such tenant, or not for who asks: both look the same."""
    return RefusedReconciliation("tenant_unknown", "there is no such tenant", "tenantId")


# -- What was found ----------------------------------------------------------------------------------------


class Finding(msgspec.Struct, frozen=True):
    """A part of the difference. `amount`: what Stripe lacks by it; negative: has too much."""

    hour: datetime | None
    cause: str
    amount: Decimal
    identifiers: list[str]


class Suggestion(msgspec.Struct, frozen=True, rename="camel"):
    """What to do about a difference, until it has gone. At most one for each customer, meter and period.

    `adjust`: it is small; correct it by its amount. `replay`: recompute its hours from the log first.
    """

    id: int
    kind: Literal["adjust", "replay"]
    amount: Annotated[Decimal, msgspec.Meta(description="What Stripe lacks; negative: has too much.")]
    created_at: datetime
    updated_at: datetime


class ReplayPlan(msgspec.Struct, frozen=True, rename="camel"):
    """A body for `POST /v1/replay` that recomputes the hours at fault, and the same as a command."""

    request: dict[str, Any]
    command: str


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A customer's meter in one billing period, beside Stripe.

    `local` is what Stripe should show, `stripe` what it shows. `waiting` was counted and is on its way: it is
    in neither. `ok`: they are the same. `adjust`: they differ by at most `epsilon` of Stripe's, and the
    invoice is open. `drift`: anything else that differs. `unknown`: it cannot be told, and `reason` says why;
    then there is no difference, not even 0.
    """

    tenant_id: str
    customer_ref: str
    metric: str
    item: Annotated[str, msgspec.Meta(description="A short name of it, as in the labels of metrics.")]
    stripe_customer: str | None
    event_name: str
    period_start: datetime
    period_end: datetime
    final: Annotated[bool, msgspec.Meta(description="Its invoice takes no more usage.")]
    state: State
    reason: str | None
    counted: Annotated[Decimal, msgspec.Meta(description="By the counters, carried in and out included.")]
    waiting: Decimal
    local: Decimal
    stripe: Decimal | None
    diff_abs: Decimal | None
    diff_pct: Annotated[Decimal | None, msgspec.Meta(description="A part of Stripe's total: 0.005 is 0.5 %.")]
    findings: list[Finding]
    suggestion: Suggestion | None
    replay: Annotated[ReplayPlan | None, msgspec.Meta(description="Of `drift`.")]
    dismissed: Annotated[bool, msgspec.Meta(description="Somebody has settled this very difference.")]
    since: Annotated[datetime, msgspec.Meta(description="It has been in this state since then.")]
    checked_at: datetime


class Totals(msgspec.Struct, frozen=True):
    """Items by state."""

    ok: int = 0
    adjust: int = 0
    drift: int = 0
    unknown: int = 0


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the newest reconciliation found. `state` is the worst of all; `unknown` if nothing was compared.

    Amounts are the sums over all items of one metric, and null where one of them is not known or several
    metrics were asked for.
    """

    tenant_id: str | None
    metric: str | None
    state: State
    reason: str | None
    epsilon: Decimal
    items: Totals
    local: Decimal | None
    stripe: Decimal | None
    diff_abs: Annotated[Decimal | None, msgspec.Meta(description="The sum of the items' differences.")]
    diff_pct: Annotated[Decimal | None, msgspec.Meta(description="The greatest of the items' differences.")]
    checked_at: Annotated[datetime | None, msgspec.Meta(description="When the oldest of them was compared.")]
    periods: Annotated[list[Item], msgspec.Meta(description="The worst first, at most `limit`.")]


#: Without a period, those that Stripe may still take usage of; what was found too long ago is not known.
_CHOSEN: LiteralString = """
SELECT tenant_id, customer_ref, meter, period_start, period_end, item, event_name, stripe_customer,
       is_final, counted, waiting, local, stripe, findings, since, checked_at, is_dismissed,
       CASE WHEN fresh THEN state ELSE 'unknown' END AS state,
       CASE WHEN fresh THEN reason ELSE 'stale' END AS reason,
       CASE WHEN fresh THEN diff_abs END AS diff_abs, CASE WHEN fresh THEN diff_pct END AS diff_pct
FROM (SELECT *, checked_at >= %(fresh)s AS fresh FROM reconciliations
      WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
        AND (%(meters)s::text[] IS NULL OR meter = ANY(%(meters)s))
        AND (%(customer)s::text IS NULL OR customer_ref = %(customer)s)
        AND CASE WHEN %(period)s::timestamptz IS NULL THEN period_end >= %(fresh)s - interval '39 days'
            ELSE period_start <= %(period)s AND %(period)s < period_end END) r
"""
_NUMBERS: LiteralString = f"""
SELECT CASE WHEN state = 'drift' AND is_dismissed THEN 'adjust' ELSE state END, count(*), sum(local),
       sum(stripe), sum(diff_abs), max(diff_pct), min(checked_at),
       array_agg(DISTINCT reason) FILTER (WHERE reason IS NOT NULL), min(meter), max(meter)
FROM ({_CHOSEN}) r GROUP BY 1
"""  # noqa: S608  constants only
_LISTED: LiteralString = f"""
SELECT r.*, s.suggestion_id, s.kind, s.amount, s.created_at, s.updated_at
FROM ({_CHOSEN}) r LEFT JOIN reconciliation_suggestions s
  ON (s.tenant_id, s.customer_ref, s.meter, s.period_start)
     = (r.tenant_id, r.customer_ref, r.meter, r.period_start) AND s.state = 'open'
WHERE %(state)s::text IS NULL OR r.state = %(state)s
ORDER BY array_position(ARRAY['drift', 'unknown', 'adjust', 'ok'], r.state), r.is_dismissed,
         r.diff_pct DESC NULLS LAST, r.tenant_id, r.meter, r.customer_ref, r.period_start DESC
LIMIT %(limit)s
"""  # noqa: S608  constants only

#: A finding is good for so many intervals, and for an hour at least.
GOOD_FOR_INTERVALS = 3


def good_for(settings: Settings) -> timedelta:
    """How long a finding says something."""
    return timedelta(seconds=max(3600.0, GOOD_FOR_INTERVALS * settings.reconcile_interval_seconds))


def summarise(
    db: Connection,
    asked: Asked,
    settings: Settings,
    *,
    now: datetime,
    state: State | None = None,
    limit: int = SHOWN_MAX,
) -> Summary:
    """What was found last; Stripe is not asked. ``state`` restricts the list, not the numbers."""
    values = {**asked.values(), "state": state, "limit": limit, "fresh": now - good_for(settings)}
    numbers = db.execute(_NUMBERS, values).fetchall()
    rows = db.cursor(row_factory=dict_row).execute(_LISTED, values).fetchall()
    by_state: dict[State, int] = {row[0]: row[1] for row in numbers}
    one_metric = len({name for row in numbers for name in row[8:10]}) == 1
    known = one_metric and "unknown" not in by_state
    reasons = sorted({reason for row in numbers for reason in row[7] or ()})
    return Summary(
        tenant_id=asked.tenant_id,
        metric=asked.meters[0] if len(asked.meters) == 1 else None,
        state=worst(by_state),
        reason="not_reconciled" if not numbers else ", ".join(reasons) or None,
        epsilon=Decimal(str(settings.reconcile_epsilon)),
        items=Totals(**by_state),
        local=_sum(numbers, 2) if known else None,
        stripe=_sum(numbers, 3) if known else None,
        diff_abs=_sum(numbers, 4) if known else None,
        diff_pct=_number(max(row[5] for row in numbers)) if known else None,
        checked_at=utc(min(row[6] for row in numbers)) if numbers else None,
        periods=[_item(row) for row in rows],
    )


def worst(by_state: Mapping[State, int]) -> State:
    """Of several: the worst there is; of none, nothing is known."""
    return max((state for state in by_state if by_state[state]), key=STATES.index, default="unknown")


def _sum(rows: Sequence[Sequence[Any]], column: int) -> Decimal:
    return _number(sum((row[column] for row in rows), Decimal(0)))


def _item(row: Row) -> Item:
    findings = msgspec.convert(row["findings"], list[Finding])
    return Item(
        metric=row["meter"],
        final=row["is_final"],
        period_start=utc(row["period_start"]),
        period_end=utc(row["period_end"]),
        counted=_number(row["counted"]),
        waiting=_number(row["waiting"]),
        local=_number(row["local"]),
        stripe=_number_or_none(row["stripe"]),
        diff_abs=_number_or_none(row["diff_abs"]),
        diff_pct=_number_or_none(row["diff_pct"]),
        findings=findings,
        suggestion=_suggestion(row),
        replay=_plan(row, findings) if row["state"] == "drift" else None,
        dismissed=row["is_dismissed"],
        since=utc(row["since"]),
        checked_at=utc(row["checked_at"]),
        **{name: row[name] for name in _PLAIN_FIELDS},
    )


_PLAIN_FIELDS = ("tenant_id", "customer_ref", "item", "stripe_customer", "event_name", "state", "reason")


def _suggestion(row: Row) -> Suggestion | None:
    if row["suggestion_id"] is None:
        return None
    return Suggestion(
        id=row["suggestion_id"],
        kind=row["kind"],
        amount=_number(row["amount"]),
        created_at=utc(row["created_at"]),
        updated_at=utc(row["updated_at"]),
    )


def _plan(row: Row, findings: Sequence[Finding]) -> ReplayPlan:
    """The hours that are at fault, or the whole period if only that is known."""
    hours = [one.hour for one in findings if one.hour is not None]
    whole = not hours or any(one.hour is None for one in findings)
    since = utc(row["period_start"]) if whole else min(hours)
    until = utc(row["period_end"]) if whole else max(hours) + timedelta(hours=1)
    texts = [f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in (since, until)]
    names = {"tenant": row["tenant_id"], "meter": row["meter"], "customer": row["customer_ref"]}
    words = [f"--{name} {shlex.quote(text)}" for name, text in names.items()]
    return ReplayPlan(
        request={
            "tenantId": row["tenant_id"],
            "metrics": [row["meter"]],
            "customerRef": row["customer_ref"],
            "since": texts[0],
            "until": texts[1],
            "mode": "dry-run",
        },
        command=f"tidemeter replay {' '.join(words)} --since {texts[0]} --until {texts[1]}",
    )


def _number(value: Decimal) -> Decimal:
    """Without an exponent, and without trailing zeros."""
    return Decimal(plain(value))


def _number_or_none(value: Decimal | None) -> Decimal | None:
    return None if value is None else _number(value)


# -- Suggestions -------------------------------------------------------------------------------------------


_DISMISSED: LiteralString = """
UPDATE reconciliations r SET is_dismissed = true FROM reconciliation_suggestions s
WHERE s.suggestion_id = %s AND (r.tenant_id, r.customer_ref, r.meter, r.period_start)
    = (s.tenant_id, s.customer_ref, s.meter, s.period_start)
"""


def dismiss(
    db: Connection, suggestion_id: int, *, by: str, note: str, now: datetime, only_tenant: str | None = None
) -> bool | None:
    """Settle a suggestion without its difference having gone; it comes back when that is another.

    Returns whether it was open; None: there is none, or it is another tenant's.
    """
    with db.transaction():
        row = db.execute(
            "SELECT state FROM reconciliation_suggestions WHERE suggestion_id = %s "
            "AND (%s::text IS NULL OR tenant_id = %s) FOR UPDATE",
            (suggestion_id, only_tenant, only_tenant),
        ).fetchone()
        if row is None:
            return None
        if row[0] != "open":
            return False
        db.execute(
            "UPDATE reconciliation_suggestions SET state = 'dismissed', closed_at = %s, closed_by = %s, "
            "note = %s WHERE suggestion_id = %s",
            (now, by, note, suggestion_id),
        )
        db.execute(_DISMISSED, (suggestion_id,))
        audit(db, by, "reconciliation.dismiss", str(suggestion_id), {"note": note})
    return True


# -- What Stripe lacks -------------------------------------------------------------------------------------

#: Why a push is failed that Stripe took and does not have.
NOT_AT_STRIPE = "not_at_stripe"

_NAMED: LiteralString = """
SELECT i FROM unnest(%s::text[]) AS i
WHERE EXISTS (SELECT FROM reconciliations r, jsonb_array_elements(r.findings) f
              WHERE r.state IN ('drift', 'adjust') AND f ->> 'cause' = 'missing_at_stripe'
                AND f -> 'identifiers' ? i)
"""
_WHOSE: LiteralString = """
SELECT DISTINCT e.tenant_id, e.meter, i.customer_ref
FROM meter_events e JOIN items i USING (item_id) WHERE e.identifier = ANY(%s)
"""


def whose(db: Connection, identifiers: Sequence[str]) -> list[Asked]:
    """What has to be compared to know of these meter events."""
    rows = db.execute(_WHOSE, (list(identifiers),)).fetchall()
    return [Asked(tenant_id, (meter,), customer_ref) for tenant_id, meter, customer_ref in rows]


def named_missing(db: Connection, identifiers: Sequence[str]) -> list[str]:
    """Those of which the newest finding says that Stripe took them and does not show them."""
    return [row[0] for row in db.execute(_NAMED, (list(identifiers),)).fetchall()]


# -- Runs --------------------------------------------------------------------------------------------------


class Run(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A reconciliation. `failed`: ended by a defect. `result`: the worst state that was found."""

    id: int
    state: RunState
    tenant_id: str | None
    metrics: list[str]
    customer_ref: str | None
    period: datetime | None
    result: State | None
    items: Totals
    requested_by: str
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


def request_run(db: Connection, asked: Asked, *, by: str) -> int:
    """Ask for a run; returns its id. One of the same scope that nobody has begun yet is that one.

    Raises:
        RefusedReconciliation: ``too_many_runs``: enough of this tenant, or of nobody's, wait already.
    """
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(hashtextextended('tidemeter/reconciliation-requests', 0))")
        row = db.execute(_SAME, asked.values()).fetchone()
        if row is None:
            [waiting] = db.execute(_WAITING, (asked.tenant_id,)).fetchone() or (0,)
            if waiting >= WAITING_MAX:
                raise RefusedReconciliation("too_many_runs", "enough of them wait already", "")
            row = db.execute(_REQUEST, {**asked.values(), "by": by}).fetchone()
        assert row is not None  # noqa: S101  (for the type checker)
        audit(db, by, "reconciliation.run", str(row[0]), {"tenant": asked.tenant_id})
        return int(row[0])


WAITING_MAX = 10
_WAITING: LiteralString = (
    "SELECT count(*) FROM reconciliation_runs WHERE finished_at IS NULL AND tenant_id IS NOT DISTINCT FROM %s"
)
_SAME: LiteralString = """
SELECT run_id FROM reconciliation_runs WHERE state = 'requested'
  AND (tenant_id, meters, customer_ref, period_at)
      IS NOT DISTINCT FROM (%(tenant)s::text, %(meters)s::text[], %(customer)s::text, %(period)s::timestamptz)
"""
_REQUEST: LiteralString = """
INSERT INTO reconciliation_runs (requested_by, tenant_id, meters, customer_ref, period_at)
VALUES (%(by)s, %(tenant)s, %(meters)s, %(customer)s, %(period)s) RETURNING run_id
"""


def show_run(db: Connection, run_id: int, *, only_tenant: str | None = None) -> Run | None:
    """A run; None: there is none, or it is not of this tenant alone."""
    row = (
        db.cursor(row_factory=dict_row)
        .execute(
            "SELECT * FROM reconciliation_runs WHERE run_id = %s AND (%s::text IS NULL OR tenant_id = %s)",
            (run_id, only_tenant, only_tenant),
        )
        .fetchone()
    )
    return None if row is None else _run(row)


def _run(row: Row) -> Run:
    by_state: dict[State, int] = {state: row[state] for state in STATES}
    return Run(
        id=row["run_id"],
        state=row["state"],
        metrics=row["meters"] or [],
        period=row["period_at"] and utc(row["period_at"]),
        result=worst(by_state) if row["state"] == "done" else None,
        items=Totals(**by_state),
        requested_at=utc(row["requested_at"]),
        started_at=row["started_at"] and utc(row["started_at"]),
        finished_at=row["finished_at"] and utc(row["finished_at"]),
        **{name: row[name] for name in ("tenant_id", "customer_ref", "requested_by")},
    )
