"""What the framework cannot derive of ``/v1/replay``: its body with examples, and every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Example,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Reference,
    RequestBody,
    Schema,
)

from services.console.docs import COMMON_RESPONSES
from services.console.replays import Replay, ReplayProblem
from services.web.docs import documented
from services.web.problems import Problem

_PLAIN = r"^[^\u0000-\u001f]+$"
_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def _schema(kind: OpenAPIType, *, null: bool = True, **rest: Any) -> Schema:
    return Schema(type=[kind, OpenAPIType.NULL] if null else kind, **rest)


def _text(description: str, **rest: Any) -> Schema:
    limits: dict[str, Any] = {"min_length": 1, "max_length": 255, "pattern": _PLAIN, **rest}
    return _schema(OpenAPIType.STRING, description=description, **limits)


def _time(description: str) -> Schema:
    return _text(f"{description} ISO 8601 with an offset, `-PT24H`, or `now`.", max_length=64)


def _integer(most: int) -> Schema:
    return _schema(OpenAPIType.INTEGER, null=False, minimum=0, maximum=most)


_RANGE = Schema(
    title="OffsetRange",
    type=OpenAPIType.OBJECT,
    required=["topic", "partition", "start", "end"],
    additional_properties=False,
    properties={
        "topic": Schema(type=OpenAPIType.STRING, min_length=1, max_length=255, pattern=_PLAIN),
        "partition": _integer(2**31 - 1),
        "start": _integer(2**62),
        "end": _integer(2**62),
    },
)

_BODY = Schema(
    title="ReplayRequest",
    type=OpenAPIType.OBJECT,
    additional_properties=False,
    properties={
        "tenantId": _text("Needed with an operator's key to restrict; any other stands for its own tenant."),
        "metrics": _schema(
            OpenAPIType.ARRAY,
            null=False,
            max_items=100,
            items=_schema(OpenAPIType.STRING, null=False, min_length=1, max_length=255, pattern=_PLAIN),
            description="Slugs of meters; none: every meter.",
        ),
        "customerRef": _text("Your reference of a customer; none: every customer."),
        "since": _time("The window begins here, widened to full hours."),
        "until": _time("The window ends before it, widened to full hours; none: now."),
        "period": _time("Instead: the billing period that holds this time."),
        "by": Schema(
            enum=["event", "arrival", "offsets"],
            default="event",
            description="What `since` and `until` are times of.",
        ),
        "offsets": _schema(
            OpenAPIType.ARRAY,
            null=False,
            max_items=1000,
            items=_RANGE,
            description="Instead: the hours of the usage that lies there.",
        ),
        "mode": Schema(enum=["dry-run", "apply"], default="dry-run"),
        "planHash": _schema(
            OpenAPIType.STRING,
            pattern="^[0-9a-f]{64}$",
            description="Of a dry run. An apply does exactly what that one showed, or nothing.",
        ),
        "force": _schema(
            OpenAPIType.BOOLEAN,
            null=False,
            default=False,
            description="Also if it is large, or takes out what counted once and cannot be read now.",
        ),
    },
)

_DAY = {"tenantId": "demo", "metrics": ["requests"], "since": "-PT24H", "until": "now"}
_EXAMPLES: dict[str, Example | Reference] = {
    "dry-run": Example(summary="What differs in the last 24 hours", value={**_DAY, "mode": "dry-run"}),
    "apply": Example(summary="Correct it", value={**_DAY, "mode": "apply"}),
    "apply-plan": Example(
        summary="Correct what a dry run showed, and nothing else",
        value={**_DAY, "mode": "apply", "planHash": _HASH},
    ),
    "window": Example(
        summary="A window",
        value={
            **_DAY, "since": "2026-01-01T00:00:00Z", "until": "2026-02-01T00:00:00Z", "mode": "dry-run"
        },
    ),
    "period": Example(
        summary="The billing period of one customer", value={
            "tenantId": "demo", "customerRef": "cust_42", "period": "2026-01-31T13:37:42Z"
        },
    ),
    "arrival": Example(
        summary="What arrived in the last hour, in whatever hours it happened",
        value={"tenantId": "demo", "by": "arrival", "since": "-PT1H"},
    ),
    "offsets": Example(
        summary="What lies at these offsets",
        value={
            "tenantId": "demo",
            "by": "offsets",
            "offsets": [{"topic": "usage.v3", "partition": 0, "start": 100, "end": 200}],
        },
    ),
}  # fmt: skip
_HOUR = {
    "hour": "2026-01-31T13:00:00Z",
    "periodStart": "2026-01-01T00:00:00Z",
    "before": "41",
    "after": "42",
    "delta": "1",
    "eventsBefore": 42,
    "eventsAfter": 42,
}
_PLAN = {
    "since": "2026-01-30T13:00:00Z",
    "until": "2026-01-31T14:00:00Z",
    "ranges": [{"topic": "usage.v3", "partition": 0, "start": 0, "end": 10000}],
    "recordsRead": 10000,
    "eventsMatched": 42,
    "unreadable": {},
    "changedHours": 1,
    "changedItems": 1,
    "changedValues": 0,
    "changedWatermarks": 0,
    "changedPeriods": 0,
    "items": [
        {
            "tenantId": "demo",
            "customerRef": "cust_42",
            "meter": "requests",
            "dimensions": [],
            "before": "41",
            "after": "42",
            "delta": "1",
            "hours": [_HOUR],
        }
    ],
    "periods": [],
    "truncated": False,
    "totals": [
        {
            "tenantId": "demo",
            "meter": "requests",
            "eventsBefore": 42,
            "eventsAfter": 42,
            "before": "41",
            "after": "42",
        }
    ],
    "planHash": _HASH,
}


@dataclass
class ReplayOperation(Operation):
    """The body with its limits and examples, and the example of a plan."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            required=True,
            content={"application/json": OpenAPIMediaType(schema=_BODY, examples=_EXAMPLES)},
        )
        good: Any = (self.responses or {})["200"]
        good.content["application/json"].examples = {"plan": Example(value=_PLAN)}


#: Every answer to a request for a replay but 200.
REPLAY_RESPONSES: dict[int, ResponseSpec] = {
    **COMMON_RESPONSES,
    202: documented("An apply that still waits or runs: see `Location`.", Replay),
    400: documented(
        "A field that does not exist, a value it does not take, or a window that is none.", ReplayProblem
    ),
    404: documented(
        "There is no such tenant, meter or partition, or it is of another tenant.", ReplayProblem
    ),
    409: documented(
        "The counters are no longer as the plan found them; or another replay touches the same ones.",
        ReplayProblem,
    ),
    410: documented(
        "Neither log nor archive has all of the window; the message names the earliest time.", ReplayProblem
    ),
    413: documented("The body is larger than 1 MiB.", Problem),
    422: documented(
        "Too much is read or changed, or counted records cannot be read, and no `force`.", ReplayProblem
    ),
    429: documented("Enough dry runs are under way; wait for Retry-After.", Problem),
    500: documented("A defect on our side; nothing was changed.", ReplayProblem),
    503: documented("Kafka or PostgreSQL does not answer; wait for Retry-After and try again.", Problem),
    504: documented("The dry run took longer than TIDEMETER_REPLAY_DRY_RUN_SECONDS.", Problem),
}
