"""Which HTTP framework and server carry the ingest API?

One process each, one after the other, on the same machine as the client: authentication, parsing, checking
and Avro encoding are the product's own; Kafka is replaced by a publisher that acknowledges at once, so that
only framework and server differ. Needs two packages beside the product: ``pip install granian starlette``.

    python -m bench.ingest_frameworks --seconds 4

Measured on 2026-11-21, Python 3.11, two cores that other work kept busy too. Wall-clock rates swung threefold
between runs for that reason; compare requests per second of the *server's* processor time (two runs):

==================  ==========  ===========  ==========  ===========
variant             1 event     ratio        100 events  ratio
==================  ==========  ===========  ==========  ===========
litestar+uvicorn    2815, 3666  1            433, 414    1
litestar+granian    2785, 3136  0.99, 0.86   378, 350    0.87, 0.85
starlette+uvicorn   5199, 5683  1.85, 1.55   363, 440    0.84, 1.06
==================  ==========  ===========  ==========  ===========

So: Litestar on uvicorn. Producers send batches, and there the framework disappears behind the work itself,
about 24 microseconds an event. For single events bare Starlette saves 100 to 160 microseconds a request; part
of that is the metrics and error handling that the product has and this Starlette lacks, the rest buys the
OpenAPI document.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import psutil
from litestar import Litestar

from services.ingest.answers import answer_of
from services.ingest.app import Ingest, create_app
from services.ingest.limits import Limits
from services.ingest.parse import JSON, caller_of, read_batch
from services.web.bodies import read_body
from services.web.keys import KeyRow, KeyStore, NewKey
from services.web.problems import RequestRefused
from services.web.publishing import Delivery
from services.wire.settings import Settings

SECRET = "benchmark" * 4 + "benchma"
LIMITS = Limits(events_per_second=1e9, burst_events=1e9)
VARIANTS = ("litestar+uvicorn", "litestar+granian", "starlette+uvicorn")


def _key() -> NewKey:
    import hashlib

    return NewKey("b" * 16, f"tmk_{'b' * 16}_{SECRET}", hashlib.sha256(SECRET.encode()).digest())


class Acknowledging:
    """A publisher whose brokers are infinitely fast."""

    async def publish(self, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        return [Delivery.ACKNOWLEDGED] * len(records)

    async def check(self) -> None: ...
    async def close(self) -> None: ...


class OneKey:
    """Key rows without PostgreSQL."""

    async def find(self, key_id: str) -> KeyRow | None:
        return KeyRow(key_id, "acme", _key().secret_sha256, frozenset({"ingest"}), None, False)

    async def touch(self, key_id: str) -> None: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...


def litestar_app() -> Litestar:
    """The product's own application."""
    return create_app(
        Settings.model_construct(), producer=Acknowledging(), keys=KeyStore(OneKey()), limits=LIMITS
    )


def starlette_app() -> Any:
    """The same request path under Starlette, without metrics, docs and validation of anything else."""
    import msgspec
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    ingest = Ingest(Acknowledging(), KeyStore(OneKey()), LIMITS)

    async def endpoint(request: Any) -> Any:
        try:
            principal = await ingest.keys.authenticate(request.headers.get("authorization"), "ingest")
            declared = request.headers.get("content-length")
            encoding = request.headers.get("content-encoding", "")
            body = await read_body(
                request.stream(), declared_bytes=declared, encoding=encoding, limits=LIMITS
            )
            batch = read_batch(body, JSON, caller_of(principal.tenant_id, None), events_max=1000)
            ingest.rate.spend(principal.key_id, len(batch.events))
            status, answer = answer_of(await ingest.take(batch))
        except RequestRefused as error:
            status, answer = error.status, error.problem  # type: ignore[assignment]
        return Response(msgspec.json.encode(answer), status, media_type=JSON)

    return Starlette(routes=[Route("/v1/events/ingest", endpoint, methods=["POST"])])


def _command(variant: str, port: int) -> list[str]:
    framework, server = variant.split("+")
    target = f"bench.ingest_frameworks:{framework}_app"
    options = ["--host", "127.0.0.1", "--port", str(port)]
    if server == "granian":
        options += ["--interface", "asgi", "--factory", "--no-ws", "--log-level", "error"]
        return [sys.executable, "-m", "granian", target, *options]
    options += ["--factory", "--no-access-log", "--log-level", "error"]
    return [sys.executable, "-m", "uvicorn", target, *options]


def _body(events: int) -> bytes:
    event = {
        "metric": "api.requests",
        "customerRef": "cust_42",
        "quantity": "12.5",
        "ts": "2026-01-31T13:37:42Z",
    }
    return json.dumps(
        {"events": [{**event, "idempotencyKey": f"request-{number:08d}"} for number in range(events)]}
    ).encode()


def _cpu_s(server: psutil.Process) -> float:
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(time.user + time.system for time in times)


async def _drive(
    server: psutil.Process, port: int, events: int, seconds: float, connections: int
) -> tuple[float, float]:
    """Requests per second of wall time, and per second of the server's processor time."""
    body, times_s = _body(events), []
    headers = {"Authorization": f"Bearer {_key().text}", "Content-Type": JSON}
    url = f"http://127.0.0.1:{port}/v1/events/ingest"
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=connections)
    ) as client:

        async def one(end_s: float) -> None:
            while (started_s := time.perf_counter()) < end_s:
                async with client.post(url, data=body) as answer:
                    await answer.read()
                    assert answer.status == 202, answer.status
                times_s.append(time.perf_counter() - started_s)

        await asyncio.gather(*(one(time.perf_counter() + 0.5) for _ in range(connections)))
        times_s.clear()
        before_s = _cpu_s(server)
        await asyncio.gather(*(one(time.perf_counter() + seconds) for _ in range(connections)))
        used_s = _cpu_s(server) - before_s
    return len(times_s) / seconds, len(times_s) / used_s


def _measure(variant: str, events: int, seconds: float, connections: int) -> tuple[float, float]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(_command(variant, port), env=os.environ) as server:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            return asyncio.run(_drive(psutil.Process(server.pid), port, events, seconds, connections))
        finally:
            server.terminate()
            server.wait(20)


def main() -> None:
    """Print one table."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--connections", type=int, default=32)
    options = arguments.parse_args()
    print(f"{'':20} {'events/request':>14} {'requests/s':>11} {'requests/cpu s':>15} {'ratio':>6}")
    for events in (1, 100):
        first = 0.0
        for variant in VARIANTS:
            if any(importlib.util.find_spec(part) is None for part in variant.split("+")):
                print(f"{variant:20} not installed")
                continue
            rate, cpu_rate = _measure(variant, events, options.seconds, options.connections)
            first = first or cpu_rate
            print(
                f"{variant:20} {events:14} {rate:11.0f} {cpu_rate:15.0f} {cpu_rate / first:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
