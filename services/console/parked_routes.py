"""The routes of parked records and re-drives."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Request as HttpRequest
from litestar import get, post
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console import parked
from services.console.asking import Asked, ask, principal_of, refuse_unknown_parameters
from services.console.docs import ACT_RESPONSES, LIST_RESPONSES, ONE_RESPONSES
from services.streaming.parking import Choice, Kind, State
from services.web.keys import Principal
from services.web.problems import RequestRefused

PAGE_MAX = 100
_PARAMETERS = frozenset(
    {"state", "kind", "reason", "tenant", "meter", "topic", "schema", "since", "until", "before", "limit"}
)

_PLAIN = r"^[^\x00-\x1f]+$"
_ID_MAX = 2**63 - 1
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PLAIN)]
Id = Annotated[int, msgspec.Meta(ge=1, le=_ID_MAX)]
PathId = Annotated[int, Parameter(ge=1, le=_ID_MAX)]
Moment = Annotated[datetime, msgspec.Meta(tz=True, description="RFC 3339, with an offset.")]


class ParkedRecord(msgspec.Struct, frozen=True, rename="camel"):
    """A record that could not be processed as it came. Its content is not shown here.

    `parked`: waits for a fix or a person. `redriven`: processed after all; `outcome` says how. `discarded`:
    a person settled that it never is.
    """

    id: int
    kind: Kind
    reason: str
    state: State
    tenant_id: str
    meter: str
    event_id: str
    schema: str
    topic: str
    partition: int
    offset: int
    arrived_at: datetime
    attempts: int
    outcome: str | None


class ParkedPage(msgspec.Struct, frozen=True):
    """Parked records, the newest first. `next` goes into `before` for the following ones; null: none."""

    records: list[ParkedRecord]
    next: int | None


class Chosen(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Which parked records. Without any restriction `all` must be true. Times are those of arrival."""

    ids: Annotated[tuple[Id, ...], msgspec.Meta(max_length=10_000)] = ()
    kinds: tuple[Kind, ...] = ()
    reasons: Annotated[tuple[Text, ...], msgspec.Meta(max_length=100)] = ()
    tenant: Text | None = None
    meter: Text | None = None
    topic: Text | None = None
    schema: Text | None = None
    since: Moment | None = None
    until: Moment | None = None
    all: bool = False
    dry_run: bool = False
    force: bool = False


class DiscardRequest(Chosen, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Which parked records are never processed, and why."""

    note: Annotated[str, msgspec.Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]+$")]


class Redrive(msgspec.Struct, frozen=True, rename="camel"):
    """Records that are tried again. `results` counts outcomes, and `parked:<reason>` of those that stay so.

    A dry run has the same results and changes nothing else.
    """

    id: int
    service: str
    state: str
    dry_run: bool
    selected: int
    tried: int
    results: Mapping[str, int]
    requested_by: str
    requested_at: datetime
    paused_reason: str | None
    finished_at: datetime | None


class Redrives(msgspec.Struct, frozen=True):
    """Re-drives, the newest first."""

    redrives: list[Redrive]


class Discarded(msgspec.Struct, frozen=True, rename="camel"):
    """How many records that is."""

    records: int
    dry_run: bool


class Cancelled(msgspec.Struct, frozen=True):
    """Whether it was this request that stopped it."""

    changed: bool


Asking = HttpRequest[Any, Any, AppState]


@get(
    "/v1/parked",
    operation_id="listParked",
    responses=LIST_RESPONSES,
    security=[{"apiKey": []}],
    summary="List parked records",
    tags=["parked"],
)
async def list_parked(
    request: Asking,
    state_: Annotated[State, Parameter(query="state", description="Only those in this state.")] = "parked",
    kind: Annotated[Kind | None, Parameter(description="Only of this kind.")] = None,
    reason: Annotated[
        str | None, Parameter(max_length=64, pattern=_PLAIN, description="Only with this reason.")
    ] = None,
    tenant: Annotated[str | None, Parameter(max_length=255, pattern=_PLAIN)] = None,
    meter: Annotated[str | None, Parameter(max_length=255, pattern=_PLAIN)] = None,
    topic: Annotated[str | None, Parameter(max_length=255, pattern=_PLAIN)] = None,
    schema: Annotated[str | None, Parameter(max_length=80, pattern=_PLAIN)] = None,
    since: Annotated[Moment | None, Parameter(description="Arrived then or later.")] = None,
    until: Annotated[Moment | None, Parameter(description="Arrived earlier.")] = None,
    before: Annotated[int | None, Parameter(ge=1, le=_ID_MAX, description="`next` of the page.")] = None,
    limit: Annotated[int, Parameter(ge=1, le=PAGE_MAX)] = PAGE_MAX,
) -> ParkedPage:
    """What could not be processed, the newest first.

    With a tenant's key those of its own tenant, with an operator's key all.
    """
    refuse_unknown_parameters(request, _PARAMETERS)
    principal = await principal_of(request, "read")
    choice = Choice(
        kinds=() if kind is None else (kind,),
        reasons=() if reason is None else (reason,),
        tenant=_tenant(principal, tenant),
        meter=meter,
        topic=topic,
        schema=schema,
        since=since,
        until=until,
    )
    rows = await ask(
        request, lambda db: parked.find(db, choice, states=[state_], before=before, limit=limit + 1)
    )
    more = len(rows) > limit
    shown = [_record(row) for row in rows[:limit]]
    return ParkedPage(shown, shown[-1].id if more else None)


@get(
    "/v1/parked/{parked_id:int}",
    operation_id="showParked",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    summary="Show a parked record",
    tags=["parked"],
)
async def show_parked(request: Asking, parked_id: PathId) -> ParkedRecord:
    """Everything about it but its content."""
    principal = await principal_of(request, "read")
    row = await _asked(request, lambda db: parked.show(db, parked_id, only_tenant=principal.tenant_id))
    return _record(row)


@post(
    "/v1/parked/redrive",
    operation_id="redriveParked",
    responses=ACT_RESPONSES,
    security=[{"apiKey": []}],
    status_code=202,
    summary="Try parked records again",
    tags=["parked"],
)
async def redrive_parked(request: Asking, data: Chosen) -> Redrives:
    """Have them tried again by the service that parked them, in the background; each counts once.

    One re-drive for each service that parked some of them; none, if nothing was chosen. See `/v1/redrives`.
    """
    principal = await principal_of(request, "replay")
    choice = _choice(principal, data)

    def act(db: Any) -> Any:
        made = parked.redrive(
            db,
            choice,
            by=f"key:{principal.key_id}",
            dry_run=data.dry_run,
            everything=data.all,
            force=data.force,
        )
        return parked.redrives(db, ids=[one.redrive_id for one in made])

    return Redrives([_redrive(row) for row in await _asked(request, act)])


@post(
    "/v1/parked/discard",
    operation_id="discardParked",
    responses=ACT_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Settle that parked records are never processed",
    tags=["parked"],
)
async def discard_parked(request: Asking, data: DiscardRequest) -> Discarded:
    """They stay listed as discarded, with the note and who decided."""
    principal = await principal_of(request, "replay")
    choice = _choice(principal, data)
    number = await _asked(
        request,
        lambda db: parked.discard(
            db,
            choice,
            note=data.note,
            by=f"key:{principal.key_id}",
            dry_run=data.dry_run,
            everything=data.all,
            force=data.force,
        ),
    )
    return Discarded(number, data.dry_run)


@get(
    "/v1/redrives",
    operation_id="listRedrives",
    responses=LIST_RESPONSES,
    security=[{"apiKey": []}],
    summary="List re-drives",
    tags=["parked"],
)
async def list_redrives(
    request: Asking, limit: Annotated[int, Parameter(ge=1, le=PAGE_MAX)] = PAGE_MAX
) -> Redrives:
    """The newest first; with a tenant's key those of its own tenant."""
    refuse_unknown_parameters(request, frozenset({"limit"}))
    principal = await principal_of(request, "read")
    rows = await ask(request, lambda db: parked.redrives(db, only_tenant=principal.tenant_id, limit=limit))
    return Redrives([_redrive(row) for row in rows])


@get(
    "/v1/redrives/{redrive_id:int}",
    operation_id="showRedrive",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    summary="Show a re-drive",
    tags=["parked"],
)
async def show_redrive(request: Asking, redrive_id: PathId) -> Redrive:
    """How far it got, and what became of the records."""
    principal = await principal_of(request, "read")

    def one(db: Any) -> Any:
        rows = parked.redrives(db, ids=[redrive_id], only_tenant=principal.tenant_id)
        if not rows:
            raise parked.UnknownRecord(f"no re-drive {redrive_id}")
        return rows[0]

    return _redrive(await _asked(request, one))


@post(
    "/v1/redrives/{redrive_id:int}/cancel",
    operation_id="cancelRedrive",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Stop a re-drive",
    tags=["parked"],
)
async def cancel_redrive(request: Asking, redrive_id: PathId) -> Cancelled:
    """After the batch under way; what was counted stays counted."""
    principal = await principal_of(request, "replay")
    changed = await _asked(
        request,
        lambda db: parked.cancel(
            db, redrive_id, by=f"key:{principal.key_id}", only_tenant=principal.tenant_id
        ),
    )
    return Cancelled(changed)


ROUTES = (
    list_parked,
    show_parked,
    redrive_parked,
    discard_parked,
    list_redrives,
    show_redrive,
    cancel_redrive,
)


async def _asked(request: Asking, question: Asked[Any]) -> Any:
    """The answer, or why there is none."""
    try:
        return await ask(request, question)
    except parked.UnknownRecord:
        raise RequestRefused(404, "not_found", "there is nothing with this id") from None
    except parked.NothingChosen as error:
        raise RequestRefused(400, "nothing_chosen", str(error), path="all") from None
    except parked.TooMany as error:
        raise RequestRefused(409, "too_many", str(error), path="force") from None


_FILTERS = ("ids", "kinds", "reasons", "meter", "topic", "schema", "since", "until")


def _tenant(principal: Principal, wanted: str | None) -> str | None:
    """The tenant a choice is restricted to.

    Raises:
        RequestRefused: 403, it is not the key's own.
    """
    if principal.tenant_id is not None and wanted not in (None, principal.tenant_id):
        raise RequestRefused(403, "tenant_forbidden", "this key stands for another tenant", path="tenant")
    return wanted if principal.tenant_id is None else principal.tenant_id


def _choice(principal: Principal, data: Chosen) -> Choice:
    """What is chosen.

    Raises:
        RequestRefused: 403, of another tenant; 400, everything of a tenant without saying so.
    """
    tenant = _tenant(principal, data.tenant)
    unrestricted = all(getattr(data, name) in ((), None) for name in _FILTERS)
    if principal.tenant_id is not None and unrestricted and not data.all:
        raise RequestRefused(400, "nothing_chosen", "say which, or that all are meant", path="all")
    return Choice(
        kinds=data.kinds,
        reasons=data.reasons,
        tenant=tenant,
        meter=data.meter,
        topic=data.topic,
        schema=data.schema,
        since=data.since,
        until=data.until,
        ids=data.ids,
    )


def _record(row: Mapping[str, Any]) -> ParkedRecord:
    return ParkedRecord(
        id=row["parked_id"],
        schema=row["schema_name"],
        **{
            name: row[name]
            for name in (
                *("kind", "reason", "state", "tenant_id", "meter", "event_id", "topic", "partition"),
                *("offset", "arrived_at", "attempts", "outcome"),
            )
        },
    )


def _redrive(row: Mapping[str, Any]) -> Redrive:
    return Redrive(
        id=row["redrive_id"],
        **{
            name: row[name]
            for name in (
                *("service", "state", "dry_run", "selected", "tried", "results", "requested_by"),
                *("requested_at", "paused_reason", "finished_at"),
            )
        },
    )
