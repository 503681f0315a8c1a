"""Replays: which window of which counters is asked for, and the jobs that carry an apply out.

A dry run is no job: it leaves nothing behind. Carrying out is the part of ``services.replay``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
import psycopg
from psycopg.rows import dict_row

from services.streaming.parking import audit
from services.wire.errors import Misconfigured, TidemeterError
from services.wire.periods import HOUR_US, Calendar, hour_start
from services.wire.times import instant, micros, moment

Connection = psycopg.Connection[Any]
Row = Mapping[str, Any]
By = Literal["event", "arrival", "offsets"]
Mode = Literal["dry-run", "apply"]
State = Literal["requested", "running", "done", "refused", "failed", "cancelled"]

_PLAIN = r"^[^\x00-\x1f]+$"
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PLAIN)]
Time = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=64,
        pattern=_PLAIN,
        description="ISO 8601 with an offset, `-PT24H`, or `now`.",
    ),
]


class RefusedReplay(TidemeterError):
    """A replay that cannot be. ``code`` is stable; ``path`` names the field at fault; ``replay_id``: the
    other one, of ``replay_overlaps``."""

    def __init__(self, code: str, message: str, *, path: str = "", replay_id: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.path = path
        self.replay_id = replay_id


class UnknownReplay(TidemeterError):
    """No replay has this id, or not one of this tenant."""


class OffsetRange(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Records of one partition: from the first offset to before the last."""

    topic: Text
    partition: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    start: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    end: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class ReplayRequest(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """Which counters to recompute from the log. What is not given does not restrict.

    `since` and `until` are times of events, or of arrival, as `by` says; a window is widened to full hours.
    `period`, a time, stands for the billing period that holds it. With `planHash`, an apply does exactly what
    the dry run of that hash showed, or nothing.
    """

    tenant_id: Text | None = None
    metrics: Annotated[tuple[Text, ...], msgspec.Meta(max_length=100)] = ()
    customer_ref: Text | None = None
    since: Time | None = None
    until: Time | None = None
    period: Time | None = None
    by: By = "event"
    offsets: Annotated[tuple[OffsetRange, ...], msgspec.Meta(max_length=1000)] = ()
    mode: Mode = "dry-run"
    plan_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    force: bool = False


#: Times that stand for no bound, in microseconds. PostgreSQL has them as infinite.
ALWAYS, NEVER_ENDING = -(2**62), 2**62
#: The last full hour that there is a date for.
_LATEST = micros(datetime(9999, 12, 31, 23, tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class Scope:
    """Which hours of which items, resolved: full hours of event time, in microseconds.

    ``meters``: empty for every one. ``arrived``: asked for by arrival (µs); the hours follow from it.
    ``offsets``: asked for by offsets, as (topic, partition, start, end).
    """

    tenant_id: str | None
    meters: tuple[str, ...]
    customer_ref: str | None
    since_us: int = ALWAYS
    until_us: int = NEVER_ENDING
    arrived: tuple[int, int] | None = None
    offsets: tuple[tuple[str, int, int, int], ...] = ()

    @property
    def everything(self) -> bool:
        """Whether it is every hour of every item."""
        return (
            self.tenant_id is None
            and not self.meters
            and self.customer_ref is None
            and self.since_us == ALWAYS
            and self.until_us == NEVER_ENDING
            and self.arrived is None
            and not self.offsets
        )

    def within(self, since_us: int, until_us: int) -> Scope:
        """The same items in the full hours around these times."""
        until_us = NEVER_ENDING if until_us > _LATEST else -(-until_us // HOUR_US) * HOUR_US
        since_us = ALWAYS if since_us <= ALWAYS else hour_start(since_us)
        return replace(self, since_us=since_us, until_us=until_us, arrived=None, offsets=())


def bound(time_us: int) -> str | datetime:
    """A bound of a scope as PostgreSQL takes it."""
    if time_us <= ALWAYS:
        return "-infinity"
    return "infinity" if time_us >= NEVER_ENDING else instant(time_us)


def resolve(db: Connection, request: ReplayRequest, now: datetime) -> Scope:
    """What a request means at ``now``.

    Raises:
        RefusedReplay: an unknown tenant or meter, a time or a window that is none.
    """
    scope = _targets(db, request)
    if request.offsets:
        if request.since or request.until or request.period:
            raise RefusedReplay("window_ambiguous", "give offsets, or times", path="offsets")
        return replace(scope, offsets=_offsets(request.offsets))
    if request.by == "offsets":
        raise RefusedReplay("window_missing", "say which offsets", path="offsets")
    if request.period is not None:
        if request.since is not None or request.until is not None:
            raise RefusedReplay("window_ambiguous", "give a period, or since and until", path="period")
        at = _time(request.period, "period", now)
        return scope.within(*_period(db, request, micros(at)))
    if request.since is None:
        raise RefusedReplay("window_missing", "say from when: since", path="since")
    since, until = _time(request.since, "since", now), _time(request.until or "now", "until", now)
    if since > until:
        raise RefusedReplay("window_invalid", "since is after until", path="since")
    window = micros(since), micros(until)
    if request.by == "arrival":
        return replace(scope, arrived=window)
    return scope.within(*window)


def unknown_tenant() -> RefusedReplay:
    """There is no such tenant, or not for who asks: both look the same."""
    return RefusedReplay("tenant_unknown", "there is no such tenant", path="tenantId")


def everything() -> Scope:
    """Every hour of every item."""
    return Scope(None, (), None)


def _targets(db: Connection, request: ReplayRequest) -> Scope:
    tenant_id, metrics = request.tenant_id, tuple(sorted(set(request.metrics)))
    if tenant_id is None and (metrics or request.customer_ref is not None):
        raise RefusedReplay("tenant_missing", "say of which tenant", path="tenantId")
    if tenant_id is not None:
        if db.execute("SELECT FROM tenants WHERE tenant_id = %s", (tenant_id,)).fetchone() is None:
            raise unknown_tenant()
        rows = db.execute("SELECT meter FROM meters WHERE tenant_id = %s", (tenant_id,)).fetchall()
        known = {row[0] for row in rows}
        for number, meter in enumerate(request.metrics):
            if meter not in known:
                raise RefusedReplay(
                    "meter_unknown", "this tenant has no such meter", path=f"metrics[{number}]"
                )
    return Scope(tenant_id, metrics, request.customer_ref)


def _offsets(ranges: Sequence[OffsetRange]) -> tuple[tuple[str, int, int, int], ...]:
    for number, one in enumerate(ranges):
        if one.start > one.end:
            raise RefusedReplay("window_invalid", "start is after end", path=f"offsets[{number}].start")
    return tuple((one.topic, one.partition, one.start, one.end) for one in ranges)


def _time(text: str, path: str, now: datetime) -> datetime:
    try:
        return moment(text, now)
    except Misconfigured as error:
        raise RefusedReplay("time_invalid", str(error), path=path) from None


def _period(db: Connection, request: ReplayRequest, at_us: int) -> tuple[int, int]:
    if request.tenant_id is None:
        raise RefusedReplay("tenant_missing", "periods differ by tenant: say which", path="tenantId")
    row = db.execute(
        "SELECT coalesce(c.calendar, '1 month ' || t.timezone) FROM tenants t LEFT JOIN customers c "
        "ON c.tenant_id = t.tenant_id AND c.customer_ref = %s WHERE t.tenant_id = %s",
        (request.customer_ref, request.tenant_id),
    ).fetchone()
    assert row is not None  # noqa: S101  (the tenant was found; for the type checker)
    try:
        return Calendar.parse(row[0]).bounds(at_us)
    except (OverflowError, ValueError):
        raise RefusedReplay("time_invalid", "no billing period has this time", path="period") from None


# -- Jobs --------------------------------------------------------------------------------------------------

COLUMNS = (
    *("replay_id", "state", "tenant_id", "meters", "since", "until", "request", "plan_hash", "requested_by"),
    *("requested_at", "started_at", "finished_at", "records_read", "records_total", "error"),
)

#: Without bound is null: Python has no infinite times.
_SHOWN = ", ".join(COLUMNS).replace(
    "since, until", "nullif(since, '-infinity') AS since, nullif(until, 'infinity') AS until"
)

_OVERLAPS = """
SELECT replay_id FROM replays
WHERE finished_at IS NULL
  AND (tenant_id IS NULL OR %(tenant)s::text IS NULL OR tenant_id = %(tenant)s)
  AND (meters IS NULL OR %(meters)s::text[] IS NULL OR meters && %(meters)s)
  AND (request ->> 'customerRef' IS NULL OR %(customer)s::text IS NULL
       OR request ->> 'customerRef' = %(customer)s)
  AND since < %(until)s AND until > %(since)s
ORDER BY replay_id LIMIT 1
"""


def request_apply(db: Connection, request: ReplayRequest, scope: Scope, *, by: str, now: datetime) -> int:
    """Ask for a replay to be carried out; returns its id. Its times are kept as they were at ``now``.

    Raises:
        RefusedReplay: ``replay_overlaps``: another one that is not done touches the same counters.
    """
    times = {name: getattr(request, name) for name in ("since", "until", "period")}
    fixed = msgspec.structs.replace(
        request,
        **{name: _fixed(text, now) for name, text in times.items() if text is not None},
        **({"until": _fixed("now", now)} if request.since is not None and request.until is None else {}),
    )
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(hashtextextended('tidemeter/replay-requests', 0))")
        values = {
            "tenant": scope.tenant_id,
            "meters": list(scope.meters) or None,
            "customer": scope.customer_ref,
            "since": bound(scope.since_us),
            "until": bound(scope.until_us),
        }
        other = db.execute(_OVERLAPS, values).fetchone()
        if other is not None:
            raise RefusedReplay(
                "replay_overlaps",
                f"replay {other[0]} is not done and touches the same counters: wait for it, or cancel it",
                replay_id=other[0],
            )
        row = db.execute(
            "INSERT INTO replays (request, tenant_id, meters, since, until, plan_hash, requested_by) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING replay_id",
            (
                msgspec.json.encode(fixed).decode(),
                values["tenant"],
                values["meters"],
                values["since"],
                values["until"],
                request.plan_hash,
                by,
            ),
        ).fetchone()
        assert row is not None  # noqa: S101  (for the type checker)
        audit(db, by, "replay.request", str(row[0]), {"request": msgspec.to_builtins(fixed)})
        return int(row[0])


def _fixed(text: str, now: datetime) -> str:
    return moment(text, now).astimezone(UTC).isoformat().replace("+00:00", "Z")


def find(
    db: Connection, *, only_tenant: str | None = None, before: int | None = None, limit: int = 100
) -> Sequence[Row]:
    """Replays that were asked for, the newest first; ``before``: only with a smaller id."""
    return (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_SHOWN} FROM replays "  # noqa: S608  constants only
            "WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) "
            "AND (%(before)s::bigint IS NULL OR replay_id < %(before)s) "
            "ORDER BY replay_id DESC LIMIT %(limit)s",
            {"tenant": only_tenant, "before": before, "limit": limit},
        )
        .fetchall()
    )


def show(db: Connection, replay_id: int, *, only_tenant: str | None = None) -> Row:
    """Everything about one replay; ``result`` is the plan that was carried out.

    Raises:
        UnknownReplay: there is none.
    """
    row = (
        db.cursor(row_factory=dict_row)
        .execute(
            f"SELECT {_SHOWN}, result FROM replays WHERE replay_id = %s "  # noqa: S608
            "AND (%s::text IS NULL OR tenant_id = %s)",
            (replay_id, only_tenant, only_tenant),
        )
        .fetchone()
    )
    if row is None:
        raise UnknownReplay(f"no replay {replay_id}; see `tidemeter replays`")
    return row


def cancel(db: Connection, replay_id: int, *, by: str, only_tenant: str | None = None) -> bool:
    """Stop a replay before it changes anything; False when it had ended.

    Raises:
        UnknownReplay: there is none.
    """
    with db.transaction():
        row = db.execute(
            "SELECT finished_at IS NULL FROM replays WHERE replay_id = %s "
            "AND (%s::text IS NULL OR tenant_id = %s) FOR UPDATE",
            (replay_id, only_tenant, only_tenant),
        ).fetchone()
        if row is None:
            raise UnknownReplay(f"no replay {replay_id}; see `tidemeter replays`")
        if not row[0]:
            return False
        db.execute(
            "UPDATE replays SET state = 'cancelled', finished_at = now() WHERE replay_id = %s", (replay_id,)
        )
        audit(db, by, "replay.cancel", str(replay_id), {})
        return True


#: The field at fault, of a refusal that is kept as "code: sentence".
_PATHS = {
    "tenant_unknown": "tenantId",
    "meter_unknown": "metrics",
    "partition_unknown": "offsets",
    "window_not_held": "since",
    "window_too_large": "since",
    "plan_stale": "planHash",
    "changes_too_many": "planHash",
    "records_unreadable": "force",
}


def refusal_of(row: Row) -> RefusedReplay:
    """Why a replay that is ``refused`` was, from what is kept of it."""
    code, _, message = (row["error"] or "").partition(": ")
    return RefusedReplay(code, message, path=_PATHS.get(code, ""), replay_id=row["replay_id"])
