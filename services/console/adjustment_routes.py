"""The routes of adjustments: a tenant's people see and decide what came too late, without a shell."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import msgspec
import psycopg
from litestar import Request, get, post
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console.adjustments import (
    STATES,
    Key,
    Row,
    State,
    TooOldForStripe,
    UnknownAdjustment,
    decide,
    find,
)
from services.console.asking import ask, principal_of, refuse_unknown_parameters
from services.console.docs import DECIDE_RESPONSES, LIST_RESPONSES
from services.web.problems import RequestRefused
from services.wire.times import instant, micros, utc
from services.wire.usage import (
    CUSTOMER_CHARS_MAX,
    METER_CHARS_MAX,
    METER_PATTERN,
    TENANT_CHARS_MAX,
    TENANT_PATTERN,
)

PAGE_MAX = 100
_PARAMETERS = frozenset({"state", "tenant", "meter", "customer", "after", "limit"})


class Adjustment(msgspec.Struct, frozen=True, rename="camel"):
    """An event that came after its meter's lateness window, and what was decided about it.

    `pending`: waits for a person. `approved`: the counters apply it within seconds. `applied`: counted, in
    the hour `appliedHour`. `rejected`: never counted. The reason `beyond_retention` means that idempotency
    keys are not kept for so long, so it may have been counted before.
    """

    id: str
    tenant_id: str
    customer_ref: str
    meter: str
    idempotency_key: str
    quantity: Annotated[str, msgspec.Meta(description="Exact decimal.")]
    occurred_at: datetime
    arrived_at: datetime
    reason: Annotated[str, msgspec.Meta(description="`too_late` or `beyond_retention`.")]
    state: State
    decided_by: Annotated[str | None, msgspec.Meta(description="`key:<key id>`, or a name.")]
    decided_at: datetime | None
    applied_hour: datetime | None
    applied_at: datetime | None


class AdjustmentPage(msgspec.Struct, frozen=True):
    """Adjustments, oldest event first. `next` goes into `after` for the following ones; null: none."""

    adjustments: list[Adjustment]
    next: str | None


class Decided(msgspec.Struct, frozen=True):
    """The state an adjustment is in now, and whether this request brought it there."""

    id: str
    state: State
    changed: bool


@get(
    "/v1/adjustments",
    operation_id="listAdjustments",
    responses=LIST_RESPONSES,
    security=[{"apiKey": []}],
    summary="List adjustments",
    tags=["adjustments"],
)
async def list_adjustments(
    request: Request[Any, Any, AppState],
    state_: Annotated[
        State | None, Parameter(query="state", required=False, description="Only those in this state.")
    ] = None,
    tenant: Annotated[
        str | None,
        Parameter(
            max_length=TENANT_CHARS_MAX,
            pattern=f"^{TENANT_PATTERN}$",
            required=False,
            description="Only those of this tenant; for operators' keys.",
        ),
    ] = None,
    meter: Annotated[
        str | None,
        Parameter(
            max_length=METER_CHARS_MAX,
            pattern=f"^{METER_PATTERN}$",
            required=False,
            description="Only those of this meter.",
        ),
    ] = None,
    customer: Annotated[
        str | None,
        Parameter(
            max_length=CUSTOMER_CHARS_MAX,
            pattern=r"^[^\x00-\x1f]+$",
            required=False,
            description="Only those of this customer, by your reference.",
        ),
    ] = None,
    after: Annotated[
        str | None,
        Parameter(
            pattern=r"^[0-9]{1,16}-[0-9a-f]{32}$", required=False, description="`next` of the page before."
        ),
    ] = None,
    limit: Annotated[int, Parameter(ge=1, le=PAGE_MAX, required=False, description="How many.")] = PAGE_MAX,
) -> AdjustmentPage:
    """Events that came after their meter's lateness window, by pages; oldest event first.

    With a tenant's key those of its own tenant, with an operator's key all.
    """
    refuse_unknown_parameters(request, _PARAMETERS)
    principal = await principal_of(request, "read")

    def page(db: psycopg.Connection[Any]) -> Sequence[Row]:
        return find(
            db,
            states=STATES if state_ is None else [state_],
            tenant=tenant,
            meter=meter,
            customer=customer,
            only_tenant=principal.tenant_id,
            after=None if after is None else _key(after),
            limit=limit + 1,
        )

    rows = await ask(request, page)
    more = len(rows) > limit
    return AdjustmentPage([_shown(row) for row in rows[:limit]], _cursor(rows[limit - 1]) if more else None)


@post(
    "/v1/adjustments/{adjustment_id:str}/approve",
    operation_id="approveAdjustment",
    responses=DECIDE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Approve an adjustment",
    tags=["adjustments"],
)
async def approve_adjustment(request: Request[Any, Any, AppState], adjustment_id: str) -> Decided:
    """Have it counted: into its own hour, or into the current one when Stripe would refuse its time.

    The counters do so within seconds. Approving it again changes nothing.
    """
    return await _decide(request, adjustment_id, approved=True)


@post(
    "/v1/adjustments/{adjustment_id:str}/reject",
    operation_id="rejectAdjustment",
    responses=DECIDE_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Reject an adjustment",
    tags=["adjustments"],
)
async def reject_adjustment(request: Request[Any, Any, AppState], adjustment_id: str) -> Decided:
    """Have it never counted; it stays listed as rejected. Rejecting it again changes nothing."""
    return await _decide(request, adjustment_id, approved=False)


ROUTES = (list_adjustments, approve_adjustment, reject_adjustment)


async def _decide(request: Request[Any, Any, AppState], adjustment_id: str, *, approved: bool) -> Decided:
    principal = await principal_of(request, "adjust")
    try:
        decision = await ask(
            request,
            lambda db: decide(
                db,
                adjustment_id,
                approved=approved,
                by=f"key:{principal.key_id}",
                tenant=principal.tenant_id,
            ),
        )
    except UnknownAdjustment:
        raise RequestRefused(
            404, "adjustment_unknown", "there is no adjustment with this id", path="adjustment_id"
        ) from None
    except TooOldForStripe:
        raise RequestRefused(
            409,
            "too_old_for_stripe",
            "its meter keeps the last value, and Stripe takes none older than 34.5 days; reject it",
            path="adjustment_id",
        ) from None
    if (decision.state == "rejected") == approved:
        raise RequestRefused(
            409, "adjustment_decided", f"it is {decision.state}; a decision stays", path="adjustment_id"
        )
    return Decided(decision.adjustment_id, decision.state, decision.changed)


def _shown(row: Row) -> Adjustment:
    return Adjustment(
        id=str(row["adjustment_id"]),
        tenant_id=row["tenant_id"],
        customer_ref=row["customer_ref"],
        meter=row["meter"],
        idempotency_key=row["idempotency_key"],
        quantity=_plain(row["quantity"]),
        occurred_at=utc(row["occurred_at"]),
        arrived_at=utc(row["arrived_at"]),
        reason=row["reason"],
        state=row["state"],
        decided_by=row["decided_by"],
        decided_at=row["decided_at"] and utc(row["decided_at"]),
        applied_hour=row["applied_hour"] and utc(row["applied_hour"]),
        applied_at=row["applied_at"] and utc(row["applied_at"]),
    )


def _plain(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cursor(row: Row) -> str:
    return f"{micros(row['occurred_at'])}-{row['adjustment_id'].hex}"


def _key(cursor: str) -> Key:
    at_us, _, id_hex = cursor.partition("-")
    return instant(int(at_us)), uuid.UUID(id_hex.strip())  # a pattern's $ lets a line feed pass
