"""The routes of the ingest API, and the process that serves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from litestar import Litestar, Request, Response, post
from litestar.datastructures import State
from litestar.types import ControllerRouterHandler

from schemas.catalog import check_catalog, current
from services.ingest.answers import IngestAnswer, Result, answer_of
from services.ingest.docs import INGEST_RESPONSES, IngestOperation, openapi_config
from services.ingest.health import checks
from services.ingest.limits import Limits, RateLimit
from services.ingest.parse import JSON, MEDIA_TYPES, Batch, Refusal, caller_of, read_batch
from services.web.app import serve, web_app
from services.web.bodies import chunks_of, read_body
from services.web.database import DatabasePool
from services.web.keys import KeyStore, PostgresKeyRows
from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.web.publishing import Delivery, KafkaPublisher, Publisher
from services.wire.codec import Encoder, Record
from services.wire.errors import Invalid
from services.wire.log import configure_logging
from services.wire.metrics import INGEST_EVENTS
from services.wire.settings import Settings
from services.wire.topics import USAGE_CURRENT
from services.wire.usage import encode_usage, record_key, usage_encoder

SOURCE = "api"


class Ingest:
    """Everything a request needs; one per process."""

    def __init__(
        self,
        publisher: Publisher,
        keys: KeyStore,
        limits: Limits,
        encoder: Encoder | None = None,
    ) -> None:
        self.publisher = publisher
        self.keys = keys
        self.limits = limits
        self.encoder = encoder or usage_encoder()
        self.rate = RateLimit(limits, time.monotonic)
        self.checks = checks(publisher, keys)

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
        chunks_of(request.receive),
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


def _encoder(settings: Settings) -> Encoder:
    if settings.schema_registry_url is None:
        return usage_encoder()
    from services.wire.registry import encoder_for  # its client is heavy, and few deployments need it

    return encoder_for(settings, current("usage_event"), USAGE_CURRENT)


def create_app(
    settings: Settings,
    *,
    producer: Publisher | None = None,
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
                settings.kafka(),
                USAGE_CURRENT,
                encoder.headers,
                client_id="tidemeter-ingest",
                ack_timeout_s=limits.ack_timeout_s,
            ),
            keys or KeyStore(PostgresKeyRows(settings.postgres())),
            limits,
            encoder,
        )
        app.state.key_store = app.state.ingest.keys
        app.state.readiness = app.state.ingest.checks.readiness
        app.state.database = DatabasePool(settings.postgres)
        app.state.settings = settings
        await app.state.key_store.open()

    async def stop(app: Litestar) -> None:
        if app.state.get("ingest") is None:  # the start failed: its error must not be hidden by one of ours
            return
        await app.state.ingest.publisher.close()
        await app.state.key_store.close()
        await asyncio.to_thread(app.state.database.close)

    return web_app([ingest_events, *routes], start=start, stop=stop, openapi=openapi_config())


def openapi_document(routes: Sequence[ControllerRouterHandler] = ()) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the API."""
    return create_app(Settings.model_construct(), routes=routes).openapi_schema.to_schema()


def run(settings: Settings, routes: Sequence[ControllerRouterHandler] = ()) -> None:
    """Serve until SIGTERM or SIGINT; then finish open requests, flush to Kafka, and return.

    Raises:
        Misconfigured: ``settings`` name no Kafka or no PostgreSQL.
    """
    check_catalog()
    settings.kafka()
    settings.postgres()
    configure_logging(settings.log_level, settings.log_format, service="ingest")
    serve(create_app(settings, routes=routes), settings.http_host, settings.http_port)
