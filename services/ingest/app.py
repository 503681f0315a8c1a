"""The routes of the ingest API, and the process that serves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import structlog
import uvicorn
from litestar import Litestar, MediaType, Request, Response, get, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ControllerRouterHandler, HTTPScope, Receive, Send
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from schemas.catalog import check_catalog, current
from services.ingest.adjustment_routes import approve_adjustment, list_adjustments, reject_adjustment
from services.ingest.adjustments import AdjustmentStore
from services.ingest.answers import (
    RETRY_AFTER_S,
    IngestAnswer,
    Problem,
    RequestRefused,
    Result,
    answer_of,
)
from services.ingest.docs import INGEST_RESPONSES, IngestOperation, documented, openapi_config
from services.ingest.health import Checks, Live, Readiness
from services.ingest.kafka import Delivery, KafkaPublisher, UsagePublisher
from services.ingest.keys import KeyStore, PostgresKeyRows
from services.ingest.limits import Limits, RateLimit, read_body
from services.ingest.parse import JSON, MEDIA_TYPES, Batch, Refusal, caller_of, read_batch
from services.wire.codec import Encoder, Record
from services.wire.errors import Invalid
from services.wire.log import configure_logging
from services.wire.metrics import HTTP_REQUESTS, HTTP_SECONDS, INGEST_EVENTS
from services.wire.settings import Settings
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import encode_usage, record_key, usage_encoder

SOURCE = "api"
SHUTDOWN_S = 15

log = structlog.get_logger(__name__)


class Ingest:
    """Everything a request needs; one per process."""

    def __init__(
        self,
        publisher: UsagePublisher,
        keys: KeyStore,
        adjustments: AdjustmentStore,
        limits: Limits,
        encoder: Encoder | None = None,
    ) -> None:
        self.publisher = publisher
        self.keys = keys
        self.adjustments = adjustments
        self.limits = limits
        self.encoder = encoder or usage_encoder()
        self.rate = RateLimit(limits, time.monotonic)
        self.checks = Checks(publisher, keys)

    async def take(self, batch: Batch) -> list[Result]:
        """Publish what is right in ``batch``; one result per event, in order."""
        checked = batch.check(source=SOURCE, now_us=time.time_ns() // 1000)
        records: list[tuple[bytes, bytes]] = []
        for index, outcome in enumerate(checked):
            if isinstance(outcome, Refusal):
                continue
            try:
                value = encode_usage(self.encoder, outcome)
            except Invalid as error:
                path = batch.path(index, batch.names.get(error.path, error.path))
                checked[index] = Refusal(error.reason, path, str(error), outcome["idempotency_key"])
                continue
            records.append(
                (record_key(outcome["tenant_id"], outcome["customer_ref"], outcome["meter"]), value)
            )
        deliveries = iter(await self.publisher.publish(records) if records else [])
        return [
            _refused(index, outcome)
            if isinstance(outcome, Refusal)
            else _delivered(index, outcome, next(deliveries))
            for index, outcome in enumerate(checked)
        ]


def _refused(index: int, refusal: Refusal) -> Result:
    INGEST_EVENTS.labels(refusal.code).inc()
    return Result(index, "rejected", refusal.idempotency_key, refusal.code, refusal.path, refusal.message)


def _delivered(index: int, record: Record, delivery: Delivery) -> Result:
    key = record["idempotency_key"]
    if delivery is Delivery.ACKNOWLEDGED:
        return Result(index, "accepted", key)
    INGEST_EVENTS.labels(delivery.value).inc()
    return Result(
        index, "unavailable", key, delivery.value, None, "not confirmed; send it again with the same key"
    )


@post(
    "/v1/events/ingest",
    operation_class=IngestOperation,
    operation_id="ingestEvents",
    responses=INGEST_RESPONSES,
    security=[{"apiKey": []}],
    status_code=202,
    summary="Send usage events",
    tags=["usage"],
    response_description="Every event is durable; counting follows.",
)
async def ingest_events(request: Request[Any, Any, State]) -> Response[IngestAnswer]:
    """Store 1 to 1000 usage events; each gets its own result.

    Retry 503, 429, a lost answer or a broken connection with the same idempotency keys, as often as needed.
    """
    ingest: Ingest = request.app.state.ingest
    headers = request.headers
    principal = await ingest.keys.authenticate(headers.get("authorization"), "ingest")
    media_type = _media_type(headers.get("content-type", ""))
    body = await read_body(
        _chunks(request),
        declared_bytes=headers.get("content-length"),
        encoding=headers.get("content-encoding", ""),
        limits=ingest.limits,
    )
    caller = caller_of(principal.tenant_id, headers.get("idempotency-key"))
    batch = read_batch(body, media_type, caller, events_max=ingest.limits.events_max)
    ingest.rate.spend(principal.key_id, len(batch.events))
    status, answer = answer_of(await ingest.take(batch))
    if answer.accepted:
        INGEST_EVENTS.labels("accepted").inc(answer.accepted)
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return Response(answer, status_code=status, headers=retry)


def _media_type(content_type: str) -> str:
    media_type, _, parameters = content_type.partition(";")
    media_type = media_type.strip().lower()
    charset = parameters.lower().replace('"', "").partition("charset=")[2].partition(";")[0].strip()
    if media_type not in MEDIA_TYPES or charset not in ("", "utf-8", "utf8"):
        raise RequestRefused(
            415, "media_type_unsupported", f"send {JSON} or CloudEvents, in UTF-8", path="Content-Type"
        )
    return media_type


async def _chunks(request: Request[Any, Any, State]) -> AsyncIterator[bytes]:
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise RequestRefused(400, "body_incomplete", "the connection closed before the body was complete")
        yield message["body"]
        if not message.get("more_body", False):
            return


@get("/health/live", summary="Does the process answer?", tags=["operation"], operation_id="live")
async def live() -> Live:
    """Always 200 while the process runs."""
    return Live()


@get(
    "/health/ready",
    summary="Can events be accepted?",
    tags=["operation"],
    operation_id="ready",
    responses={503: documented("Unhealthy: no event can be accepted; the reasons say why.", Readiness)},
    response_description="Healthy, or degraded: the reasons say what does not work.",
)
async def ready(state: State) -> Response[Readiness]:
    """The state of Kafka and PostgreSQL as this process sees them, at most a second old."""
    readiness = await state.ingest.checks.readiness()
    return Response(readiness, status_code=503 if readiness.status == "unhealthy" else 200)


@get(
    "/metrics",
    summary="Prometheus metrics",
    tags=["operation"],
    operation_id="metrics",
    media_type=MediaType.TEXT,
)
async def metrics() -> Response[str]:
    """Text exposition format."""
    return Response(generate_latest().decode(), media_type=CONTENT_TYPE_LATEST.partition("; charset")[0])


@get("/openapi.json", include_in_schema=False)
async def openapi_json(request: Request[Any, Any, State]) -> dict[str, Any]:
    """The document that ``/docs`` shows."""
    return request.app.openapi_schema.to_schema()


class _Metered(Litestar):
    """Counts and times every request, those that match no route too."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        await self._metered(scope, receive, send)

    async def _metered(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        status = 500

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await super().__call__(scope, receive, observed)
        finally:
            route = scope.get("path_template") or "unmatched"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            HTTP_REQUESTS.labels(route, method, str(status)).inc()
            HTTP_SECONDS.labels(route, method).observe(time.perf_counter() - started_s)


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


def _refusal_answer(_: Request[Any, Any, State], error: RequestRefused) -> Response[Problem]:
    return Response(error.problem, status_code=error.status, headers=error.headers)


def _http_answer(_: Request[Any, Any, State], error: HTTPException) -> Response[Problem]:
    """Errors of the framework, without its details: those may quote the request."""
    if isinstance(error, ValidationException):  # only parameters are left to the framework
        extra = error.extra if isinstance(error.extra, list) else []
        name = next((one["key"].rstrip("_") for one in extra if isinstance(one, dict) and "key" in one), None)
        problem = Problem("parameter_invalid", "takes other values than this; see /docs", name)
        return Response(problem, status_code=400)
    code, message = _HTTP_PROBLEMS.get(error.status_code, ("refused", "the request was refused"))
    if error.status_code >= 500:
        log.error("http.failed", error=type(error).__name__)
    return Response(Problem(code, message), status_code=error.status_code, headers=error.headers)


_HTTP_PROBLEMS = {
    400: ("request_invalid", "the request is malformed"),
    404: ("not_found", "there is nothing here; the routes are at /docs"),
    405: ("method_not_allowed", "this route has other methods; see the Allow header"),
    500: ("internal_error", "a defect on our side; it was logged"),
}


def _unexpected_answer(request: Request[Any, Any, State], error: Exception) -> Response[Problem]:
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    log.error(
        "http.unexpected",
        error=type(error).__name__,
        route=request.scope.get("path_template"),
        frames=frames[-5:],
    )
    return Response(Problem(*_HTTP_PROBLEMS[500]), status_code=500)


def _encoder(settings: Settings) -> Encoder:
    if settings.schema_registry_url is None:
        return usage_encoder()
    from services.wire.registry import encoder_for  # its client is heavy, and few deployments need it

    return encoder_for(settings, current("usage_event"), USAGE_CURRENT)


def create_app(
    settings: Settings,
    *,
    producer: UsagePublisher | None = None,
    keys: KeyStore | None = None,
    limits: Limits | None = None,
    routes: Sequence[ControllerRouterHandler] = (),
) -> Litestar:
    """The API. It connects when it starts; Kafka or PostgreSQL being away then shows in ``/health/ready``.

    ``producer`` and ``keys`` replace Kafka and PostgreSQL; the app closes them when it stops. ``routes`` are
    served beside ours.

    Raises:
        Misconfigured: at start, if ``settings`` name no Kafka or no PostgreSQL.
        Transient: at start, if a schema registry is configured and does not answer.
    """
    limits = limits or Limits()

    async def start(app: Litestar) -> None:
        encoder = await asyncio.to_thread(_encoder, settings)
        app.state.ingest = Ingest(
            producer
            or KafkaPublisher(
                settings.kafka(), USAGE_CURRENT, encoder.headers, ack_timeout_s=limits.ack_timeout_s
            ),
            keys or KeyStore(PostgresKeyRows(settings.postgres())),
            AdjustmentStore(settings.postgres),
            limits,
            encoder,
        )
        await app.state.ingest.keys.open()

    async def stop(app: Litestar) -> None:
        if app.state.get("ingest") is None:  # the start failed: its error must not be hidden by one of ours
            return
        await app.state.ingest.publisher.close()
        await app.state.ingest.keys.close()
        await asyncio.to_thread(app.state.ingest.adjustments.close)

    return _Metered(
        [
            ingest_events,
            list_adjustments,
            approve_adjustment,
            reject_adjustment,
            live,
            ready,
            metrics,
            openapi_json,
            *routes,
        ],
        on_startup=[start],
        on_shutdown=[stop],
        openapi_config=openapi_config(),
        exception_handlers={
            RequestRefused: _refusal_answer,
            HTTPException: _http_answer,
            Exception: _unexpected_answer,
        },
        logging_config=None,
        debug=False,
        request_max_body_size=None,
    )


def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of the API."""
    return create_app(Settings.model_construct()).openapi_schema.to_schema()


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish open requests, flush to Kafka, and return.

    Raises:
        Misconfigured: ``settings`` name no Kafka or no PostgreSQL.
    """
    check_catalog()
    settings.kafka()
    settings.postgres()
    configure_logging(settings.log_level, settings.log_format, service="ingest")
    config = uvicorn.Config(
        create_app(settings),
        host=settings.http_host,
        port=settings.http_port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    uvicorn.Server(config).run()
