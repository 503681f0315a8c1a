"""What every process that serves HTTP has: problems as answers, health, metrics, documentation."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog
import uvicorn
from litestar import Litestar, MediaType, Request, Response, get
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ASGIApp, ControllerRouterHandler, HTTPScope, Receive, Send
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.web.docs import documented
from services.web.health import Live, Readiness
from services.web.problems import Problem, RequestRefused
from services.wire.metrics import HTTP_REQUESTS, HTTP_SECONDS

SHUTDOWN_S = 15

log = structlog.get_logger(__name__)


@get("/health/live", summary="Does the process answer?", tags=["operation"], operation_id="live")
async def live() -> Live:
    """Always 200 while the process runs."""
    return Live()


@get(
    "/health/ready",
    summary="Can it do its work?",
    tags=["operation"],
    operation_id="ready",
    responses={503: documented("Unhealthy: nothing can be accepted; the reasons say why.", Readiness)},
    response_description="Healthy, or degraded: the reasons say what does not work.",
)
async def ready(state: State) -> Response[Readiness]:
    """What this process depends on, as it sees it, at most a second old."""
    readiness = await state.readiness()
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


#: Takes a request in front of the framework, or gives None to leave it to that.
Shortcut = Callable[[HTTPScope], ASGIApp | None]


class MeteredApp(Litestar):
    """Counts and times every request, those that match no route too."""

    #: For a route that is too busy for the framework; it sets ``scope["path_template"]`` itself.
    shortcut: Shortcut | None = None

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
            direct = self.shortcut(scope) if self.shortcut is not None else None
            await (direct or super().__call__)(scope, receive, observed)
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
    return Response(unexpected(error, request.scope.get("path_template")), status_code=500)


def unexpected(error: Exception, route: str | None) -> Problem:
    """What is answered, with 500, when nobody expected ``error``; it is logged without its message."""
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    log.error(
        "http.unexpected",
        error=type(error).__name__,
        route=route,
        frames=frames[-5:],
    )
    return Problem(*_HTTP_PROBLEMS[500])


Hook = Callable[[Litestar], Awaitable[None]]


def web_app(
    routes: Sequence[ControllerRouterHandler], *, start: Hook, stop: Hook, openapi: OpenAPIConfig
) -> MeteredApp:
    """An application of ``routes``, beside health, metrics and documentation.

    ``start`` sets ``app.state.readiness``: a coroutine function that returns a :class:`Readiness`.
    """
    app = MeteredApp(
        [*routes, live, ready, metrics, openapi_json],
        on_startup=[start],
        on_shutdown=[stop],
        openapi_config=openapi,
        exception_handlers={
            RequestRefused: _refusal_answer,
            HTTPException: _http_answer,
            Exception: _unexpected_answer,
        },
        logging_config=None,
        debug=False,
        request_max_body_size=None,
    )
    for route in app.routes:
        for method in getattr(route, "methods", _METHODS) & _METHODS - {"OPTIONS"}:
            HTTP_REQUESTS.labels(
                route.path_format, method, "500"
            )  # from 0 on, so that the first one is an increase
            HTTP_SECONDS.labels(route.path_format, method)
    return app


def serve(app: Litestar, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; then finish open requests, and return."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    if threading.current_thread() is threading.main_thread():
        # Once it has shut down, uvicorn raises the signal again, for whoever handled it before: nobody died.
        signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run()
