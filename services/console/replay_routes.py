"""The routes of replays: counters recomputed from the log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, get, post
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console.asking import ask, principal_of, refuse_unknown_parameters
from services.console.docs import LIST_RESPONSES, ONE_RESPONSES
from services.console.processes import away, client_gone, processes_of, waited
from services.console.replay_docs import REPLAY_RESPONSES, ReplayOperation
from services.console.replays import Replay, ReplayProblem, shown
from services.streaming import replays
from services.streaming.replay_plan import DryRunAnswer, Plan
from services.streaming.replays import RefusedReplay, ReplayRequest, UnknownReplay
from services.web.keys import Principal
from services.web.problems import RequestRefused

#: What makes a dry run; started by name, for the console knows nothing of what it does.
MODULE = "services.replay"
PAGE_MAX = 100
BODY_BYTES_MAX = 1024 * 1024
WAIT_MAX = 60
_ID_MAX = 2**63 - 1
PathId = Annotated[int, Parameter(ge=1, le=_ID_MAX)]

_STATUS = {
    **dict.fromkeys(("tenant_unknown", "meter_unknown", "partition_unknown"), 404),
    **dict.fromkeys(("plan_stale", "replay_overlaps", "periods_unsettled", "log_truncated"), 409),
    "window_not_held": 410,
    "archive_damaged": 500,
    **dict.fromkeys(("window_too_large", "changes_too_many", "records_unreadable"), 422),
}

Asking = HttpRequest[Any, Any, AppState]


class ReplayRequestRefused(RequestRefused):
    """A refusal that names a replay."""

    def __init__(self, status: int, code: str, message: str, path: str, replay_id: int | None) -> None:
        super().__init__(status, code, message)
        self.problem = ReplayProblem(code, message, path or None, replay_id)


class ReplayPage(msgspec.Struct, frozen=True):
    """Replays, the newest first. `next` goes into `before` for the following ones; null: none."""

    replays: list[Replay]
    next: int | None


class ReplayCancelled(msgspec.Struct, frozen=True):
    """Whether it was this request that stopped it."""

    changed: bool


@post(
    "/v1/replay",
    operation_class=ReplayOperation,
    operation_id="replay",
    request_max_body_size=BODY_BYTES_MAX,
    responses=REPLAY_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Recompute counters from the log",
    tags=["replays"],
    response_description="A dry run: its plan. An apply: the replay that is done, with its plan as `result`.",
)
async def ask_for_replay(
    request: Asking,
    data: ReplayRequest,
    wait: Annotated[
        int, Parameter(ge=0, le=WAIT_MAX, description="Seconds to wait for the end of an apply.")
    ] = 20,
) -> Response[Plan | Replay]:
    """Find, and with `mode: apply` correct, what the counters of a window do not have as the log says.

    A dry run (the default) changes nothing. An apply is carried out in the background, one at a time; if it
    has not ended after `wait` seconds, the answer is 202. With the `planHash` of a dry run it does exactly
    what that one showed, or nothing; repeating it is then safe.
    """
    refuse_unknown_parameters(request, frozenset({"wait"}))
    principal = await principal_of(request, "replay")
    try:
        wanted = _own(principal, data)
        if data.mode == "dry-run":
            # What means nothing is refused here, before a process is started for it.
            await ask(request, lambda db: replays.resolve(db, wanted, datetime.now(UTC)))
            line = await processes_of(request).answer(
                MODULE, msgspec.json.encode(wanted), lambda: client_gone(request)
            )
            return Response(_planned(line))
        return await _apply(request, principal, wanted, wait)
    except RefusedReplay as error:
        raise _refused(error) from None


@get(
    "/v1/replays",
    operation_id="listReplays",
    responses=LIST_RESPONSES,
    security=[{"apiKey": []}],
    summary="List replays",
    tags=["replays"],
)
async def list_replays(
    request: Asking,
    before: Annotated[int | None, Parameter(ge=1, le=_ID_MAX, description="`next` of the page.")] = None,
    limit: Annotated[int, Parameter(ge=1, le=PAGE_MAX, description="How many.")] = PAGE_MAX,
) -> ReplayPage:
    """Those that were asked for with `mode: apply`; with a tenant's key those of its own tenant."""
    refuse_unknown_parameters(request, frozenset({"before", "limit"}))
    principal = await principal_of(request, "read")
    rows = await ask(
        request,
        lambda db: replays.find(db, only_tenant=principal.tenant_id, before=before, limit=limit + 1),
    )
    page = [shown(row) for row in rows[:limit]]
    return ReplayPage(page, page[-1].id if len(rows) > limit else None)


@get(
    "/v1/replays/{replay_id:int}",
    operation_id="showReplay",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    summary="Show a replay",
    tags=["replays"],
)
async def show_replay(request: Asking, replay_id: PathId) -> Replay:
    """How far it got; once it is done, what it has changed."""
    principal = await principal_of(request, "read")
    return await _shown(request, principal, replay_id)


@post(
    "/v1/replays/{replay_id:int}/cancel",
    operation_id="cancelReplay",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Stop a replay",
    tags=["replays"],
)
async def cancel_replay(request: Asking, replay_id: PathId) -> ReplayCancelled:
    """Before it changes anything: a correction is made whole, or not at all."""
    principal = await principal_of(request, "replay")
    try:
        changed = await ask(
            request,
            lambda db: replays.cancel(
                db, replay_id, by=f"key:{principal.key_id}", only_tenant=principal.tenant_id
            ),
        )
    except UnknownReplay:
        raise _nothing() from None
    return ReplayCancelled(changed)


ROUTES = (ask_for_replay, list_replays, show_replay, cancel_replay)


def _own(principal: Principal, data: ReplayRequest) -> ReplayRequest:
    """The request, of the key's own tenant. Another tenant is as unknown to it as one that is none.

    Raises:
        RefusedReplay: it is not its own.
    """
    if principal.tenant_id is None:
        return data
    if data.tenant_id not in (None, principal.tenant_id):
        raise replays.unknown_tenant()
    return msgspec.structs.replace(data, tenant_id=principal.tenant_id)


async def _apply(
    request: Asking, principal: Principal, wanted: ReplayRequest, wait_s: int
) -> Response[Plan | Replay]:
    now = datetime.now(UTC)

    def act(db: Any) -> int:
        scope = replays.resolve(db, wanted, now)
        return replays.request_apply(db, wanted, scope, by=f"key:{principal.key_id}", now=now)

    replay_id = await ask(request, act)
    found = await _waited(request, principal, replay_id, wait_s)
    match found.state:
        case "done":
            return Response(found)
        case "refused":
            row = await ask(request, lambda db: replays.show(db, replay_id))
            raise replays.refusal_of(row)
        case "failed":
            raise ReplayRequestRefused(
                500, "replay_failed", "a defect on our side; it was logged, and nothing was changed", "",
                replay_id,
            )  # fmt: skip
        case "cancelled":
            raise ReplayRequestRefused(
                409, "replay_cancelled", "somebody has cancelled it; nothing was changed", "", replay_id
            )
    return Response(found, status_code=202, headers={"Location": f"/v1/replays/{replay_id}"})


async def _waited(request: Asking, principal: Principal, replay_id: int, wait_s: int) -> Replay:
    return await waited(
        request,
        lambda: _shown(request, principal, replay_id),
        wait_s,
        ended=lambda found: found.finished_at is not None,
    )


def _planned(line: bytes) -> Plan:
    """The plan in an answer.

    Raises:
        RefusedReplay: there is none.
        RequestRefused: 503, Kafka or PostgreSQL is away.
    """
    answer = msgspec.json.decode(line, type=DryRunAnswer)
    if answer.refusal is not None:
        why = answer.refusal
        raise RefusedReplay(why.code, why.message, path=why.path)
    if answer.plan is None:
        raise away(answer.away or "Kafka")
    return answer.plan


async def _shown(request: Asking, principal: Principal, replay_id: int) -> Replay:
    try:
        row = await ask(request, lambda db: replays.show(db, replay_id, only_tenant=principal.tenant_id))
    except UnknownReplay:
        raise _nothing() from None
    return shown(row)


def _nothing() -> RequestRefused:
    return RequestRefused(404, "not_found", "there is nothing with this id")


def _refused(error: RefusedReplay) -> RequestRefused:
    status = _STATUS.get(error.code, 400)
    return ReplayRequestRefused(status, error.code, str(error), error.path, error.replay_id)
