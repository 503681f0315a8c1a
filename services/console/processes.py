"""Answers that take a core for a while come from processes of their own, so that no event waits for them.

A module is started as ``python -m <module>``: it gets one line, the question, on its standard input and
secrets by its environment only, and writes one line, the answer. At most two run at once, whatever they are
asked. One ends when it has answered, when the client has gone, when its time is over, and with this process,
however that ends: it ends by itself when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from litestar import Request
from litestar.datastructures import State
from pydantic import SecretStr

from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.wire.settings import PREFIX, Settings

AT_ONCE_MAX = 2
ANSWER_BYTES_MAX = 64 * 1024 * 1024
BUSY_RETRY_AFTER_S = 5
POLL_SECONDS = 0.2

Found = TypeVar("Found")
#: Ends when nobody waits for the answer any more.
Gone = Callable[[], Awaitable[None]]
_SECRETS_NEEDED = ("postgres_dsn", "schema_registry_url")

log = structlog.get_logger(__name__)


class Processes:
    """Those of one process that serves HTTP."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.running = 0

    async def answer(self, module: str, asked: bytes, gone: Gone) -> bytes:
        """What ``module`` answers to ``asked``. While ``gone`` has not ended, somebody waits.

        Raises:
            RequestRefused: 429, too many run; 499, nobody waits; 500, it ended without an answer, and its
                log says why; 504, its time was over.
        """
        if self.running >= AT_ONCE_MAX:
            raise RequestRefused(
                429,
                "replay_busy",
                f"{AT_ONCE_MAX} questions to the log are under way; try again when one has its answer",
                headers={"Retry-After": str(BUSY_RETRY_AFTER_S)},
            )
        self.running += 1
        try:
            return await self._answer(module, asked, gone)
        finally:
            self.running -= 1

    async def _answer(self, module: str, asked: bytes, gone: Gone) -> bytes:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=ANSWER_BYTES_MAX,
            env={**os.environ, **self._variables()},
            start_new_session=True,  # a Ctrl-C in the terminal is for us
        )
        answering = asyncio.create_task(_read_answer(child, module, asked))
        leaving = asyncio.ensure_future(gone())
        limit_s = self._settings.replay_dry_run_seconds
        try:
            await asyncio.wait({answering, leaving}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if leaving.done():
                raise RequestRefused(499, "client_gone", "nobody waits for the answer")
            raise RequestRefused(
                504, "replay_too_long", f"it took longer than {limit_s:g} s: ask for less, or by command"
            )
        finally:
            await _end(child, answering, leaving)

    def _variables(self) -> dict[str, str]:
        """What our settings say and the child's environment may not; secrets only as far as it needs them."""
        found = {}
        for name in self._settings.model_fields_set:
            value = getattr(self._settings, name)
            if isinstance(value, SecretStr):
                if name not in _SECRETS_NEEDED:
                    continue
                value = value.get_secret_value()
            if value is not None:
                found[PREFIX + name.upper()] = str(value)
        return found


def processes_of(request: Request[Any, Any, State]) -> Processes:
    """The processes of the API that serves ``request``."""
    state = request.app.state
    if state.get("processes") is None:
        state.processes = Processes(state.settings)
    found: Processes = state.processes
    return found


async def client_gone(request: Request[Any, Any, State]) -> None:
    """Return once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def waited(
    request: Request[Any, Any, State],
    look: Callable[[], Awaitable[Found]],
    wait_s: float,
    *,
    ended: Callable[[Found], bool],
) -> Found:
    """What ``look`` finds when that has ended, when the time is over, or when the client has gone."""
    deadline = time.monotonic() + wait_s
    leaving = asyncio.ensure_future(client_gone(request))
    try:
        while True:
            found = await look()
            left = deadline - time.monotonic()
            if ended(found) or left <= 0 or leaving.done():
                return found
            await asyncio.wait({leaving}, timeout=min(POLL_SECONDS, left))
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


def away(world: str) -> RequestRefused:
    """What is said when Kafka or PostgreSQL does not answer the one that was asked."""
    code = "database_unavailable" if world == "PostgreSQL" else "kafka_unavailable"
    message = f"{world} does not answer at the moment; try again"
    return RequestRefused(503, code, message, headers={"Retry-After": str(RETRY_AFTER_S)})


async def _read_answer(child: asyncio.subprocess.Process, module: str, asked: bytes) -> bytes:
    assert child.stdin is not None and child.stdout is not None  # noqa: S101  (pipes; for the type checker)
    with contextlib.suppress(ConnectionError):
        child.stdin.write(asked + b"\n")
        await child.stdin.drain()  # and left open: its end would be the child's
    line = await child.stdout.readline()
    if not line.endswith(b"\n"):
        log.error("no answer", module=module, exit_code=await child.wait())
        raise RequestRefused(500, "internal_error", "a defect on our side; it was logged")
    return line[:-1]


async def _end(child: asyncio.subprocess.Process, *tasks: asyncio.Future[Any]) -> None:
    """Nothing is left of it: no process, no task."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await child.wait()
