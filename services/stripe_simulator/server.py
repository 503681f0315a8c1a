"""The HTTP application: routes to endpoints, headers of every answer, start and stop."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import generate_latest

from services.stripe_simulator.answering import deliver
from services.stripe_simulator.api import Api
from services.stripe_simulator.api_billing import BillingApi
from services.stripe_simulator.api_customers import CustomersApi
from services.stripe_simulator.api_events import EventsApi
from services.stripe_simulator.background import Background
from services.stripe_simulator.billing import assemble_billing
from services.stripe_simulator.clock import Clock
from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.control import add_control_routes
from services.stripe_simulator.courier import Courier
from services.stripe_simulator.deliveries import Deliveries
from services.stripe_simulator.destinations import Destinations
from services.stripe_simulator.errors import Answer, ApiError, unrecognized_url
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.events import MeterEvents
from services.stripe_simulator.faults import NO_FAULT, FaultTape
from services.stripe_simulator.freshness import Freshness
from services.stripe_simulator.gateway import DEFAULT_ACCOUNT, Call, Endpoint, Gateway
from services.stripe_simulator.ledger import Ledger
from services.stripe_simulator.meters import Registry
from services.stripe_simulator.observations import Observations
from services.stripe_simulator.profile import EMPTY, Profile
from services.stripe_simulator.reports import ErrorReports
from services.stripe_simulator.resources import Resources
from services.stripe_simulator.sessions import Sessions
from services.stripe_simulator.simulator import Simulator
from services.stripe_simulator.store import Store
from services.stripe_simulator.stream import EventStream

log = structlog.get_logger()

API_VERSION = "2026-10-28.endive"
BODY_BYTES_MAX = 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(config: SimulatorConfig, profile: Profile = EMPTY) -> web.Application:
    """The whole simulator as one application; opens `config.data_path`, closes it on cleanup.

    Of the profile it takes what the simulator holds and plays at first; `config` is already decided.
    """
    simulator = assemble(config)
    simulator.begin(profile)
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    for (method, route), endpoint in simulator.endpoints.items():
        app.router.add_route(method, route, _api_handler(simulator, f"{method} {route}", endpoint))
    add_control_routes(app, simulator)
    _add_operating_routes(app, simulator)
    app.router.add_route("*", "/{unknown:.*}", _unknown_url(simulator))

    async def background(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(simulator.background.run(simulator.closing))
        yield
        simulator.closing.set()
        task.cancel()
        await asyncio.wait([task])

    async def stop_waiting(_: web.Application) -> None:
        simulator.closing.set()

    async def close(_: web.Application) -> None:
        simulator.store.close()

    app.cleanup_ctx.append(background)
    app.on_shutdown.append(stop_waiting)
    app.on_cleanup.append(close)
    return app


def assemble(config: SimulatorConfig) -> Simulator:
    store = Store(config.data_path)
    clock = Clock(offset_seconds=float(store.setting("clock_offset_seconds", "0")))
    registry, ledger, observations = Registry(store), Ledger(store), Observations()
    faults, webhook_faults = FaultTape(config.seed), FaultTape(config.seed)
    dice = random.Random(config.seed)  # noqa: S311  repeatable lag, not secrets
    sessions, freshness = Sessions(store), Freshness(config, store, dice)
    events = MeterEvents(config, registry, ledger, observations, freshness)
    stream = EventStream(config, registry, ledger, events, observations)
    destinations = Destinations(store)
    deliveries = Deliveries(store, webhook_faults, config.webhook_retries)
    event_log = EventLog(store, destinations, deliveries, API_VERSION)
    resources = Resources(store, event_log)
    billing = assemble_billing(config, resources, registry, ledger, event_log)
    reports = ErrorReports(config, store, event_log)
    courier = Courier(store, clock, destinations, deliveries, config.webhook_timeout_seconds)
    background = Background(clock, reports, resources, billing.steps(), courier)
    apis = (
        Api(registry, ledger, events, sessions, stream, freshness),
        CustomersApi(registry, event_log, billing.subscriptions),
        BillingApi(resources, registry, billing.prices, billing.subscriptions, background.catch_up),
        EventsApi(destinations, event_log, background.catch_up),
    )
    return Simulator(
        config=config,
        store=store,
        clock=clock,
        registry=registry,
        ledger=ledger,
        observations=observations,
        faults=faults,
        dice=dice,
        freshness=freshness,
        destinations=destinations,
        deliveries=deliveries,
        webhook_faults=webhook_faults,
        event_log=event_log,
        billing=billing,
        background=background,
        gateway=Gateway(config, clock, store, sessions, faults, observations),
        endpoints={route: one for api in apis for route, one in api.endpoints().items()},
        closing=asyncio.Event(),
    )


def _api_handler(simulator: Simulator, route: str, endpoint: Endpoint) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        simulator.observations.arrived(route, asyncio.get_running_loop().time())
        call = await _read_call(request)
        try:
            answer, fault = await simulator.gateway.respond(call, endpoint)
        except Exception as error:  # our own defect, or a failed commit: say nothing that could be believed
            log.error("simulator_request_failed", route=route, error=type(error).__name__, exc_info=True)
            answer, fault = ApiError("The simulator failed.", status=500).answer(), NO_FAULT
        simulator.observations.answered(route, 0 if fault.resets else answer.status)
        return await deliver(request, answer, _headers(request, call, answer), fault, simulator.closing)

    return handle


async def _read_call(request: web.Request) -> Call:
    headers = request.headers
    encoded = request.rel_url.raw_query_string
    if request.method == "POST":
        body = await request.read()
        encoded = body.decode(errors="replace")  # a form is ASCII; its escapes are decoded strictly later
    return Call(
        method=request.method,
        path=request.path,
        encoded=encoded,
        is_json=bool(encoded) and "json" in headers.get("Content-Type", ""),
        request_id=f"req_{secrets.token_hex(7)}",
        authorization=headers.get("Authorization", ""),
        account=headers.get("Stripe-Account", DEFAULT_ACCOUNT),
        idempotency_key=headers.get("Idempotency-Key"),
        parts=dict(request.match_info),
    )


def _headers(request: web.Request, call: Call, answer: Answer) -> dict[str, str]:
    headers = {
        "Content-Type": answer.content_type,
        "Request-Id": call.request_id,
        "Stripe-Version": request.headers.get("Stripe-Version", API_VERSION),
        **answer.headers,
    }
    if call.idempotency_key and call.idempotency_key.isascii():
        headers["Idempotency-Key"] = call.idempotency_key
    return headers


def _unknown_url(simulator: Simulator) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        call = await _read_call(request)
        answer = unrecognized_url(request.method, request.path).answer()
        simulator.observations.answered("unknown", answer.status)
        return await deliver(request, answer, _headers(request, call, answer), NO_FAULT, simulator.closing)

    return handle


def _add_operating_routes(app: web.Application, simulator: Simulator) -> None:
    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    async def ready(_: web.Request) -> web.Response:
        healthy = simulator.store.failure is None
        reason = "ok" if healthy else f"commit failed: {type(simulator.store.failure).__name__}"
        status = "healthy" if healthy else "unhealthy"
        body = {"status": status, "checks": {"store": {"status": status, "reason": reason}}}
        return web.json_response(body, status=200 if healthy else 503)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(simulator.observations.registry)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app.router.add_get("/health/live", live)
    app.router.add_get("/health/ready", ready)
    app.router.add_get("/metrics", metrics)
