"""The routes of reconciliation: what Stripe shows beside what it should."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, get, post
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console.asking import ask, principal_of, refuse_unknown_parameters
from services.console.docs import ONE_RESPONSES, RECONCILE_RESPONSES
from services.console.processes import waited
from services.streaming import reconciliation
from services.streaming.reconciliation import (
    ReconcileRequest,
    RefusedReconciliation,
    Run,
    State,
    Summary,
    resolve,
    summarise,
    unknown_tenant,
)
from services.web.keys import Principal
from services.web.problems import RequestRefused

WAIT_MAX = 60
_ID_MAX = 2**63 - 1
PathId = Annotated[int, Parameter(ge=1, le=_ID_MAX)]
_PLAIN = r"^[^\x00-\x1f]+$"
_PARAMETERS = frozenset({"tenantId", "metric", "customerRef", "period", "state", "limit"})
#: Refusals that say that something does not exist.
_UNKNOWN = "_unknown"
_STATUS = {"too_many_runs": 429}

Asking = HttpRequest[Any, Any, AppState]


class DismissRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a suggestion is settled; kept in the audit log."""

    note: Annotated[str, msgspec.Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]+$")]


class Dismissed(msgspec.Struct, frozen=True):
    """Whether it was this request that settled it."""

    changed: bool


def _name(description: str, **rest: Any) -> Any:
    return Parameter(min_length=1, max_length=255, pattern=_PLAIN, description=description, **rest)


@get(
    "/v1/reconciliation/summary",
    operation_id="reconciliationSummary",
    responses=RECONCILE_RESPONSES,
    security=[{"apiKey": []}],
    summary="Does Stripe show what it should?",
    tags=["reconciliation"],
)
async def reconciliation_summary(
    request: Asking,
    tenant_id: Annotated[
        str | None, _name("Only of this tenant; a tenant's key stands for its own.", query="tenantId")
    ] = None,
    metric: Annotated[str | None, _name("Only of this metric.")] = None,
    customer_ref: Annotated[str | None, _name("Only of this customer.", query="customerRef")] = None,
    period: Annotated[
        str | None, _name("Only the billing period that holds this time: ISO 8601, `-PT24H` or `now`.")
    ] = None,
    state_: Annotated[State | None, Parameter(query="state", description="Only those in this state.")] = None,
    limit: Annotated[
        int, Parameter(ge=1, le=reconciliation.SHOWN_MAX, description="How many periods.")
    ] = 100,
) -> Summary:
    """What the newest reconciliation has found; Stripe is not asked now.

    What is not known is `unknown`, never 0: Stripe did not answer, or not with all of it; pushes are in
    doubt; usage is still on its way; nothing was compared yet.
    """
    refuse_unknown_parameters(request, _PARAMETERS)
    principal = await principal_of(request, "read")
    wanted = ReconcileRequest(
        tenant_id=tenant_id,
        metrics=() if metric is None else (metric,),
        customer_ref=customer_ref,
        period=period,
    )
    settings, now = request.app.state.settings, datetime.now(UTC)

    def answer(db: Any) -> Summary:
        asked = resolve(db, _own(principal, wanted), now)
        return summarise(db, asked, settings, now=now, state=state_, limit=limit)

    try:
        return await ask(request, answer)
    except RefusedReconciliation as error:
        raise _refused(error) from None


@post(
    "/v1/reconciliation/run",
    operation_id="reconcile",
    responses=RECONCILE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Compare with Stripe now",
    tags=["reconciliation"],
    response_description="The run that has ended, and what it found by state.",
)
async def run_reconciliation(
    request: Asking,
    data: ReconcileRequest,
    wait: Annotated[int, Parameter(ge=0, le=WAIT_MAX, description="Seconds to wait for its end.")] = 20,
) -> Response[Run]:
    """Have the reconciler compare with Stripe what is asked for. It corrects nothing.

    The reconciler does one run after another. If this one has not ended after `wait` seconds, the answer is
    202, and `Location` says where to look. Asking again for what nobody has begun yet is the same run.
    """
    refuse_unknown_parameters(request, frozenset({"wait"}))
    principal = await principal_of(request, "replay")

    def act(db: Any) -> int:
        asked = resolve(db, _own(principal, data), datetime.now(UTC))
        return reconciliation.request_run(db, asked, by=f"key:{principal.key_id}")

    try:
        run_id = await ask(request, act)
    except RefusedReconciliation as error:
        raise _refused(error) from None
    found = await _waited(request, principal, run_id, wait)
    if found.finished_at is not None:
        return Response(found)
    return Response(found, status_code=202, headers={"Location": f"/v1/reconciliation/runs/{run_id}"})


@get(
    "/v1/reconciliation/runs/{run_id:int}",
    operation_id="showReconciliation",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    summary="Show a reconciliation",
    tags=["reconciliation"],
)
async def show_reconciliation(request: Asking, run_id: PathId) -> Run:
    """Whether it has ended, and what it found by state."""
    principal = await principal_of(request, "read")
    return await _shown(request, principal, run_id)


@post(
    "/v1/reconciliation/suggestions/{suggestion_id:int}/dismiss",
    operation_id="dismissSuggestion",
    responses=ONE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Settle a suggestion",
    tags=["reconciliation"],
)
async def dismiss_suggestion(request: Asking, suggestion_id: PathId, data: DismissRequest) -> Dismissed:
    """Settle a suggestion although its difference is still there; it comes back if that becomes another."""
    principal = await principal_of(request, "adjust")
    changed = await ask(
        request,
        lambda db: reconciliation.dismiss(
            db,
            suggestion_id,
            by=f"key:{principal.key_id}",
            note=data.note,
            now=datetime.now(UTC),
            only_tenant=principal.tenant_id,
        ),
    )
    if changed is None:
        raise _nothing()
    return Dismissed(changed)


ROUTES = (reconciliation_summary, run_reconciliation, show_reconciliation, dismiss_suggestion)


def _own(principal: Principal, wanted: ReconcileRequest) -> ReconcileRequest:
    """The request, of the key's own tenant. Another tenant is as unknown to it as one that is none.

    Raises:
        RefusedReconciliation: it is not its own.
    """
    if principal.tenant_id is None:
        return wanted
    if wanted.tenant_id not in (None, principal.tenant_id):
        raise unknown_tenant()
    return msgspec.structs.replace(wanted, tenant_id=principal.tenant_id)


async def _waited(request: Asking, principal: Principal, run_id: int, wait_s: int) -> Run:
    return await waited(
        request,
        lambda: _shown(request, principal, run_id),
        wait_s,
        ended=lambda found: found.finished_at is not None,
    )


async def _shown(request: Asking, principal: Principal, run_id: int) -> Run:
    found = await ask(
        request, lambda db: reconciliation.show_run(db, run_id, only_tenant=principal.tenant_id)
    )
    if found is None:
        raise _nothing()
    return found


def _nothing() -> RequestRefused:
    return RequestRefused(404, "not_found", "there is nothing with this id")


def _refused(error: RefusedReconciliation) -> RequestRefused:
    status = 404 if error.code.endswith(_UNKNOWN) else _STATUS.get(error.code, 400)
    return RequestRefused(status, error.code, str(error), path=error.path or None)
