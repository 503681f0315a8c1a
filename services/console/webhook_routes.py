"""The routes of webhooks, for operators: they belong to no tenant. No answer holds what Stripe sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
import psycopg
from litestar import Request, get, post
from litestar.datastructures import State as AppState
from litestar.params import Parameter

from services.console.asking import ask, operators_only, refuse_unknown_parameters
from services.console.docs import (
    LIST_RESPONSES,
    PRUNE_WEBHOOKS_RESPONSES,
    REPLAY_WEBHOOKS_RESPONSES,
    SHOW_WEBHOOK_RESPONSES,
)
from services.console.webhook_runs import (
    ATTENTION,
    STATES,
    Choice,
    Found,
    Key,
    Pruned,
    Replayed,
    Retention,
    Row,
    WebhookRefused,
    find,
    find_event,
    prune,
    replay,
)
from services.web.problems import RequestRefused
from services.wire.times import instant, micros, utc

PAGE_MAX = 100
BODY_BYTES_MAX = 1024 * 1024
#: Longest text of a filter.
TEXT_MAX = 255

State = Literal["received", "processing", "succeeded", "failed", "dead", "stale"]
Which = Literal["attention", "all", "received", "processing", "succeeded", "failed", "dead", "stale"]
_GROUPS: dict[str, Sequence[str]] = {"attention": ATTENTION, "all": STATES}
_PARAMETERS = frozenset(
    {"state", "type", "object", "account", "endpoint", "handler", "since", "until", "after", "limit"}
)
_CODES = {"not_found": 404, "not_dead_lettered": 409, "replay_too_large": 409}


class WebhookRun(msgspec.Struct, frozen=True, rename="camel"):
    """How one handler stands with one event.

    `received`: waits for its turn. `processing`: under way. `failed`: tried again at `nextAttemptAt`. `dead`:
    not tried again. `stale`: a newer event of the object was handled before, so it changed nothing.
    """

    event_id: str
    handler: Annotated[str, msgspec.Meta(description="`tidemeter`, or the name of your own handler.")]
    state: State
    type: str
    object_id: str
    account: Annotated[str, msgspec.Meta(description="Connected account; empty for your own.")]
    endpoint: str
    created_at: Annotated[datetime, msgspec.Meta(description="By Stripe.")]
    received_at: datetime
    deliveries: int
    attempts: int
    replays: int
    next_attempt_at: Annotated[datetime | None, msgspec.Meta(description="Null once it is settled.")]
    error_class: str | None
    error_code: str | None
    settled_at: datetime | None


class WebhookPage(msgspec.Struct, frozen=True):
    """Runs, newest event first. `next` goes into `after` for the following ones; null: none."""

    runs: list[WebhookRun]
    next: str | None


class WebhookEventShown(msgspec.Struct, frozen=True, rename="camel"):
    """An event, without what Stripe sent, and its runs."""

    event_id: str
    type: str
    object_id: str
    account: str
    endpoint: str
    is_thin: bool
    livemode: bool
    created_at: datetime
    received_at: datetime
    deliveries: int
    body_bytes: int
    runs: list[WebhookRun]


class ReplayAsked(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Which dead runs shall be handled anew; with `ids` the failed ones too. At least one of `ids`, `type`,
    `since`, `until` and `allDead`; what is given restricts together."""

    ids: (
        Annotated[
            list[Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]],
            msgspec.Meta(min_length=1, max_length=10_000),
        ]
        | None
    ) = None
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)] | None = None
    since: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    until: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    all_dead: bool = False
    handler: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)] | None = None
    dry_run: bool = False
    force: Annotated[bool, msgspec.Meta(description="Also more than 10,000.")] = False


class ReplayAnswer(msgspec.Struct, frozen=True, rename="camel"):
    """How many runs begin anew, or would, and how many of the ids had none that could."""

    requeued: int
    skipped: int
    dry_run: bool


class PruneAsked(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Whether only to count."""

    dry_run: bool = False


class PruneAnswer(msgspec.Struct, frozen=True, rename="camel"):
    """What is gone, or would be."""

    events: int
    runs: int
    subjects: Annotated[int, msgspec.Meta(description="Objects whose order needs no more remembering.")]
    dry_run: bool


_Text = Annotated[str | None, Parameter(max_length=TEXT_MAX, pattern=r"^[^\x00-\x1f]+$", required=False)]


@get(
    "/v1/webhooks",
    guards=[operators_only("read")],
    operation_id="listWebhooks",
    responses=LIST_RESPONSES,
    security=[{"apiKey": []}],
    summary="List runs of webhook handlers",
    tags=["webhooks"],
)
async def list_webhooks(
    request: Request[Any, Any, AppState],
    state_: Annotated[
        Which,
        Parameter(query="state", required=False, description="A state; `attention`: dead or failed; `all`."),
    ] = "attention",
    type_: Annotated[
        str | None,
        Parameter(
            query="type",
            max_length=TEXT_MAX,
            pattern=r"^[^\x00-\x1f]+$",
            required=False,
            description="Only of this type; `invoice.*` for several.",
        ),
    ] = None,
    object_: Annotated[
        str | None,
        Parameter(
            query="object",
            max_length=TEXT_MAX,
            pattern=r"^[^\x00-\x1f]+$",
            required=False,
            description="Only of this Stripe object.",
        ),
    ] = None,
    account: _Text = None,
    endpoint: _Text = None,
    handler: _Text = None,
    since: Annotated[
        datetime | None, Parameter(required=False, description="Only events made at or after.")
    ] = None,
    until: Annotated[
        datetime | None, Parameter(required=False, description="Only events made before.")
    ] = None,
    after: Annotated[
        str | None,
        Parameter(
            max_length=2 * TEXT_MAX,
            pattern=r"^[0-9]{1,16}/[^/\x00-\x1f]+/[^/\x00-\x1f]+$",
            required=False,
            description="`next` of the page before.",
        ),
    ] = None,
    limit: Annotated[int, Parameter(ge=1, le=PAGE_MAX, required=False, description="How many.")] = PAGE_MAX,
) -> WebhookPage:
    """How handlers stand with Stripe's events, by pages; newest event first. For keys without a tenant."""
    refuse_unknown_parameters(request, _PARAMETERS)
    choice = Choice(None, type_, object_, account, endpoint, handler, _aware(since), _aware(until))

    def page(db: psycopg.Connection[Any]) -> Sequence[Row]:
        return find(
            db,
            choice,
            states=_GROUPS.get(state_, (state_,)),
            after=None if after is None else _key(after),
            limit=limit + 1,
        )

    rows = await ask(request, page)
    more = len(rows) > limit
    return WebhookPage([_run(row) for row in rows[:limit]], _cursor(rows[limit - 1]) if more else None)


@get(
    "/v1/webhooks/{event_id:str}",
    guards=[operators_only("read")],
    operation_id="showWebhook",
    responses=SHOW_WEBHOOK_RESPONSES,
    security=[{"apiKey": []}],
    summary="Show a webhook event",
    tags=["webhooks"],
)
async def show_webhook(request: Request[Any, Any, AppState], event_id: str) -> WebhookEventShown:
    """One event and how each handler stands with it. For keys without a tenant."""
    clean = len(event_id) <= TEXT_MAX and "\x00" not in event_id
    found = await ask(request, lambda db: find_event(db, event_id)) if clean else None
    if found is None:
        raise RequestRefused(404, "not_found", "there is no webhook event with this id", path="event_id")
    return _event(found)


@post(
    "/v1/webhooks/replay",
    guards=[operators_only("replay")],
    operation_id="replayWebhooks",
    request_max_body_size=BODY_BYTES_MAX,
    responses=REPLAY_WEBHOOKS_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Have dead webhooks handled anew",
    tags=["webhooks"],
)
async def replay_webhooks(request: Request[Any, Any, AppState], data: ReplayAsked) -> ReplayAnswer:
    """Dead runs get all their attempts again, a hundred of them a second, oldest event first.

    For keys without a tenant. With `dryRun` nothing changes, and the count is what it would be.
    """
    if not (data.ids or data.type or data.since or data.until or data.all_dead):
        raise RequestRefused(400, "body_invalid", "say which: ids, type, since, until or allDead")
    if any("\x00" in text for text in (*(data.ids or ()), data.type or "", data.handler or "")):
        raise RequestRefused(400, "body_invalid", "a text holds NUL")
    choice = Choice(data.ids, data.type, handler=data.handler, since=data.since, until=data.until)
    actor = f"key:{request.state.principal.key_id}"

    def act(db: psycopg.Connection[Any]) -> Replayed:
        return replay(db, choice, now=datetime.now(UTC), actor=actor, dry_run=data.dry_run, force=data.force)

    try:
        done = await ask(request, act)
    except WebhookRefused as error:
        raise RequestRefused(_CODES[error.code], error.code, str(error)) from None
    return ReplayAnswer(done.requeued, done.skipped, done.dry_run)


@post(
    "/v1/webhooks/prune",
    guards=[operators_only("replay")],
    operation_id="pruneWebhooks",
    request_max_body_size=BODY_BYTES_MAX,
    responses=PRUNE_WEBHOOKS_RESPONSES,
    security=[{"apiKey": []}],
    status_code=200,
    summary="Delete old webhooks",
    tags=["webhooks"],
)
async def prune_webhooks(request: Request[Any, Any, AppState], data: PruneAsked) -> PruneAnswer:
    """Delete events that were settled longer ago than they are kept. It also happens once a day by itself.

    For keys without a tenant.
    """
    retention = Retention.from_settings(request.app.state.settings)
    actor = f"key:{request.state.principal.key_id}"

    def act(db: psycopg.Connection[Any]) -> Pruned:
        return prune(db, retention, now=datetime.now(UTC), actor=actor, dry_run=data.dry_run)

    done = await ask(request, act)
    return PruneAnswer(done.events, done.runs, done.subjects, done.dry_run)


def _run(row: Row) -> WebhookRun:
    return WebhookRun(
        event_id=row["event_id"],
        handler=row["handler"],
        state=row["state"],
        type=row["event_type"],
        object_id=row["object_id"],
        account=row["account"],
        endpoint=row["endpoint"],
        created_at=utc(row["created_at"]),
        received_at=utc(row["received_at"]),
        deliveries=row["deliveries"],
        attempts=row["attempts"],
        replays=row["replays"],
        next_attempt_at=utc(row["next_attempt_at"]) if row["settled_at"] is None else None,
        error_class=row["error_class"],
        error_code=row["error_code"],
        settled_at=row["settled_at"] and utc(row["settled_at"]),
    )


def _event(found: Found) -> WebhookEventShown:
    event = found.event
    return WebhookEventShown(
        event_id=event["event_id"],
        type=event["event_type"],
        object_id=event["object_id"],
        account=event["account"],
        endpoint=event["endpoint"],
        is_thin=event["is_thin"],
        livemode=event["livemode"],
        created_at=utc(event["created_at"]),
        received_at=utc(event["received_at"]),
        deliveries=event["deliveries"],
        body_bytes=event["body_bytes"],
        runs=[_run({**event, **run}) for run in found.runs],
    )


def _aware(moment: datetime | None) -> datetime | None:
    """A time without a zone is refused: nobody can say which it means."""
    if moment is not None and moment.tzinfo is None:
        raise RequestRefused(400, "parameter_invalid", "since and until have a zone, such as Z", path="query")
    return moment


def _cursor(row: Row) -> str:
    return f"{micros(row['created_at'])}/{row['event_id']}/{row['handler']}"


def _key(cursor: str) -> Key:
    at_us, event_id, handler = cursor.split("/")
    return instant(int(at_us)), event_id, handler.rstrip("\n")  # a pattern's $ lets a line feed pass


ROUTES = (list_webhooks, show_webhook, replay_webhooks, prune_webhooks)
