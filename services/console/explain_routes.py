"""The route that tells why Stripe holds a number."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import MediaType, Response, get
from litestar import Request as HttpRequest
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console.asking import principal_of, refuse_unknown_parameters
from services.console.docs import EXPLAIN_RESPONSES
from services.console.processes import away, client_gone, processes_of
from services.streaming.explanation import LIMIT, Explained, Explanation, Question
from services.web.problems import RequestRefused

#: What answers; started by name, for the console knows nothing of replays.
MODULE = "services.replay.explaining"
LIMIT_MAX = 10_000

_PLAIN = r"^[^\x00-\x1f]+$"
_PARAMETERS = frozenset({"customer", "meter", "hour", "tenantId", "limit"})
#: Those whose names end so are 404.
_UNKNOWN = "_unknown"

Asking = HttpRequest[Any, Any, AppState]


@get(
    "/v1/explain",
    operation_id="explain",
    responses=EXPLAIN_RESPONSES,
    security=[{"apiKey": []}],
    summary="Why does Stripe hold this number for this customer in this hour?",
    tags=["explain"],
)
async def explain(
    request: Asking,
    customer: Annotated[
        str,
        Parameter(min_length=1, max_length=255, pattern=_PLAIN, description="Stripe's id, or our reference."),
    ],
    meter: Annotated[
        str,
        Parameter(min_length=1, max_length=255, pattern=_PLAIN, description="Our slug, or the event name."),
    ],
    hour: Annotated[
        str,
        Parameter(
            min_length=1,
            max_length=64,
            pattern=_PLAIN,
            description="Any time within the hour: ISO 8601 with an offset, `-PT24H`, or `now`.",
        ),
    ],
    tenant_id: Annotated[
        str | None,
        Parameter(
            query="tenantId",
            min_length=1,
            max_length=255,
            pattern=_PLAIN,
            description="Default: the key's, or the only one with such a customer and meter.",
        ),
    ] = None,
    limit: Annotated[int, Parameter(ge=0, le=LIMIT_MAX, description="Rows of each list.")] = LIMIT,
) -> Response[Explanation]:
    """From the meter events that were sent down to the records of the log, and whether all of it agrees.

    Reading the log takes a moment; at most two questions are answered at once. With a tenant's key only of
    its own tenant.
    """
    refuse_unknown_parameters(request, _PARAMETERS)
    principal = await principal_of(request, "read")
    if principal.tenant_id is not None and tenant_id not in (None, principal.tenant_id):
        raise RequestRefused(403, "tenant_forbidden", "this key stands for another tenant", path="tenantId")
    question = Question(
        customer=customer,
        meter=meter,
        hour=hour,
        tenant_id=principal.tenant_id or tenant_id,
        limit=limit,
        others=principal.tenant_id is None,
    )
    line = await processes_of(request).answer(
        MODULE, msgspec.json.encode(question), lambda: client_gone(request)
    )
    answer = msgspec.json.decode(line, type=Explained)
    if answer.refusal is not None:
        refusal = answer.refusal
        status = 404 if refusal.code.endswith(_UNKNOWN) else _STATUS.get(refusal.code, 400)
        raise RequestRefused(status, refusal.code, refusal.message, path=refusal.path)
    if answer.away is not None:
        raise away(answer.away)
    return Response(bytes(answer.explanation), media_type=MediaType.JSON)  # type: ignore[arg-type]  # encoded


_STATUS = {"hour_too_large": 409}

ROUTES = (explain,)
