"""The route of the bridge, and the process that serves it.

Webhooks are answered in front of the framework, which would cost more than their work does (`tidemeter bench
bridge` measures both). It documents the route, and answers what is spelt otherwise or has another method.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import structlog
from litestar import Litestar, Request, post
from litestar.datastructures import State
from litestar.types import ASGIApp, HTTPScope, Receive, Send

from schemas.catalog import check_catalog, current
from services.bridge.docs import WEBHOOK_RESPONSES, WebhookOperation, openapi_config
from services.bridge.endpoints import Endpoints, configured
from services.bridge.events import StripeEvent, read_event
from services.bridge.verify import read_signature, verify
from services.web.app import MeteredApp, serve, unexpected, web_app
from services.web.bodies import BodyLimits, check_declared, chunks_of, read_body
from services.web.health import Check, Checks
from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.web.publishing import Delivery, KafkaPublisher, Publisher
from services.wire.codec import WEBHOOK_BODY_BYTES_MAX, Encoder
from services.wire.errors import Transient
from services.wire.log import configure_logging
from services.wire.metrics import WEBHOOKS
from services.wire.settings import Settings
from services.wire.topics import STRIPE_WEBHOOKS

PREFIX: Final = "/v1/webhooks/"
ROUTE: Final = PREFIX + "{endpoint}"
#: Stripe gives an answer ten seconds or more.
ACK_TIMEOUT_S: Final = 8.0
LIMITS: Final = BodyLimits(body_bytes_max=WEBHOOK_BODY_BYTES_MAX)
#: Label of endpoints that are not configured: whoever asks may invent any number of them.
UNKNOWN: Final = "unknown"

Headers = Iterable[tuple[bytes, bytes]]

log = structlog.get_logger(__name__)


class Received(msgspec.Struct, frozen=True):
    """The event is on Kafka."""

    received: bool = True


RECEIVED: Final = msgspec.json.encode(Received())


class Bridge:
    """Everything a request needs; one per process."""

    def __init__(self, publisher: Publisher, endpoints: Endpoints, encoder: Encoder) -> None:
        self.publisher = publisher
        self.endpoints = endpoints
        self.encoder = encoder
        for endpoint in endpoints.secrets:
            for result in (
                "accepted",
                "signature_invalid",
            ):  # from 0 on, so that the first one is an increase
                WEBHOOKS.labels(endpoint, result)
        self.readiness = Checks({"kafka": self._kafka, "secrets": self._secrets}).readiness

    async def take(self, endpoint: str, headers: Headers, receive: Receive) -> None:
        """Put one webhook on Kafka; returns once it is there.

        Raises:
            RequestRefused: it is not; 503 if it may be tried again.
        """
        secrets = self.endpoints.secrets.get(endpoint)
        try:
            if secrets is None:
                raise RequestRefused(404, "endpoint_unknown", "no such endpoint is configured")
            body = await _authentic_body(headers, receive, secrets)
            await self._publish(endpoint, read_event(body), body)
        except RequestRefused as error:
            label = UNKNOWN if secrets is None else endpoint
            WEBHOOKS.labels(label, error.problem.code).inc()
            if error.problem.code == "event_malformed":  # Stripe signed it, so somebody should look
                log.warning("webhook.malformed", endpoint=endpoint, path=error.problem.path)
            raise
        WEBHOOKS.labels(endpoint, "accepted").inc()

    def shortcut(self, scope: HTTPScope) -> ASGIApp | None:
        """What answers a webhook; None if this is not one."""
        path = scope["path"]
        is_ours = scope["method"] == "POST" and path.startswith(PREFIX) and path.rfind("/") < len(PREFIX)
        return self._answer if is_ours else None

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        scope["path_template"] = ROUTE
        status, answer = 200, RECEIVED
        headers = [(b"content-type", b"application/json")]
        try:
            await self.take(scope["path"][len(PREFIX) :], scope["headers"], receive)
        except RequestRefused as error:
            status, answer = error.status, msgspec.json.encode(error.problem)
            headers += ((name.lower().encode(), value.encode()) for name, value in error.headers.items())
        except Exception as error:
            status, answer = 500, msgspec.json.encode(unexpected(error, ROUTE))
        headers.append((b"content-length", b"%d" % len(answer)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": False})

    async def _publish(self, endpoint: str, event: StripeEvent, body: bytes) -> None:
        value = self.encoder.encode(
            {
                "endpoint": endpoint,
                "event_id": event.event_id,
                "event_type": event.event_type,
                "object_id": event.object_id,
                "received_at": time.time_ns() // 1000,
                "body": body,
            }
        )
        (delivery,) = await self.publisher.publish([(event.object_id.encode(), value)])
        if delivery is not Delivery.ACKNOWLEDGED:
            raise RequestRefused(
                503,
                delivery.value,
                "Kafka did not confirm the event; deliver it again",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )

    async def _kafka(self) -> Check:
        try:
            await self.publisher.check()
        except Transient as error:
            return Check("unhealthy", f"{error}; no webhook can be accepted")
        return Check("healthy")

    async def _secrets(self) -> Check:
        if self.endpoints.is_stale:
            return Check("degraded", "the file of the secrets changed and cannot be used; the old ones hold")
        return Check("healthy")


async def _authentic_body(headers: Headers, receive: Receive, secrets: tuple[bytes, ...]) -> bytes:
    """The body, once one of ``secrets`` is known to have signed it. Headers are judged before it is read."""
    signatures: list[bytes] = []
    encodings: list[bytes] = []
    declared = None
    for name, value in headers:
        if name == b"stripe-signature":
            signatures.append(value)
        elif name == b"content-encoding":
            encodings.append(value)
        elif name == b"content-length":
            declared = value.decode("latin-1")
    check_declared(declared, LIMITS)
    if any(encoding.strip().lower() not in (b"", b"identity") for encoding in encodings):
        raise RequestRefused(415, "encoding_unsupported", "send the body as it is", path="Content-Encoding")
    signature = read_signature(signatures)
    body = await read_body(chunks_of(receive), declared_bytes=None, encoding="", limits=LIMITS)
    verify(signature, body, secrets, time.time())
    return body


@post(
    PREFIX + "{endpoint:str}",
    operation_class=WebhookOperation,
    operation_id="takeWebhook",
    responses=WEBHOOK_RESPONSES,
    status_code=200,
    summary="Take a webhook of Stripe",
    tags=["webhooks"],
    response_description="The event is durable.",
)
async def take_webhook(endpoint: str, request: Request[Any, Any, State]) -> Received:
    """Verify one delivery and keep it. The same event may come again: each delivery is kept."""
    bridge: Bridge = request.app.state.bridge
    await bridge.take(endpoint, request.scope["headers"], request.receive)
    return Received()


def _encoder(settings: Settings) -> Encoder:
    schema = current("stripe_webhook")
    if settings.schema_registry_url is None:
        return Encoder(schema)
    from services.wire.registry import encoder_for  # its client is heavy, and few deployments need it

    return encoder_for(settings, schema, STRIPE_WEBHOOKS)


def create_app(
    settings: Settings,
    *,
    publisher: Publisher | None = None,
    endpoints: Endpoints | None = None,
    ack_timeout_s: float = ACK_TIMEOUT_S,
) -> MeteredApp:
    """The bridge. It connects when it starts; Kafka being away then shows in ``/health/ready``.

    ``publisher`` and ``endpoints`` replace Kafka and what ``settings`` name; the app closes the publisher.

    Raises:
        Misconfigured: at start, if ``settings`` name no Kafka or no endpoint.
        Transient: at start, if a schema registry is configured and does not answer.
    """

    async def start(app: Litestar) -> None:
        encoder = await asyncio.to_thread(_encoder, settings)
        ours = endpoints or configured(settings)
        bridge = Bridge(
            publisher
            or KafkaPublisher(
                settings.kafka(),
                STRIPE_WEBHOOKS,
                encoder.headers,
                client_id="tidemeter-bridge",
                ack_timeout_s=ack_timeout_s,
            ),
            ours,
            encoder,
        )
        app.state.bridge = bridge
        web.shortcut = bridge.shortcut
        app.state.readiness = bridge.readiness
        app.state.following = asyncio.create_task(ours.follow())

    async def stop(app: Litestar) -> None:
        app.state.following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await app.state.following
        await app.state.bridge.publisher.close()

    web = web_app([take_webhook], start=start, stop=stop, openapi=openapi_config())
    return web


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish open requests, flush to Kafka, and return.

    Raises:
        Misconfigured: ``settings`` name no Kafka, or no usable endpoint.
    """
    check_catalog()
    settings.kafka()
    endpoints = configured(settings)
    configure_logging(settings.log_level, settings.log_format, service="bridge")
    serve(create_app(settings, endpoints=endpoints), settings.bridge_host, settings.bridge_port)
