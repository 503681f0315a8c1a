"""Dry runs of replays for the API: each in a process of its own, few at once.

A dry run takes as long and as many cycles as its window is large; the process that takes events must not wait
for it. The child gets its request on standard input and secrets by its environment only. It ends when it has
answered, when the client has gone, when its time is over, and with this process, however that ends: it ends
by itself when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from pydantic import SecretStr

from services.streaming.replay_plan import DryRunAnswer, Plan
from services.streaming.replays import RefusedReplay, ReplayRequest
from services.web.problems import RETRY_AFTER_S, RequestRefused
from services.wire.settings import PREFIX, Settings

AT_ONCE_MAX = 2
BUSY_RETRY_AFTER_S = 5
#: Launched by its name: the console knows nothing of what it does.
MODULE = "services.replay"
#: Ends when nobody waits for the answer any more.
Gone = Callable[[], Awaitable[None]]
_SECRETS_NEEDED = ("postgres_dsn", "schema_registry_url")

log = structlog.get_logger(__name__)


class DryRuns:
    """The dry runs of one API process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running = 0

    async def plan(self, request: ReplayRequest, gone: Gone) -> Plan:
        """What an apply of ``request`` would do. While ``gone`` has not ended, somebody waits.

        Raises:
            RefusedReplay: there can be no such replay.
            RequestRefused: 429, too many run; 503, Kafka or PostgreSQL is away; 504, its time was over.
        """
        if self._running >= AT_ONCE_MAX:
            raise RequestRefused(
                429,
                "replay_busy",
                f"{AT_ONCE_MAX} dry runs are under way; try again when one has ended",
                headers={"Retry-After": str(BUSY_RETRY_AFTER_S)},
            )
        self._running += 1
        try:
            answer = await self._asked(request, gone)
        finally:
            self._running -= 1
        if answer.refusal is not None:
            why = answer.refusal
            raise RefusedReplay(why.code, why.message, path=why.path)
        if answer.plan is None:
            raise RequestRefused(
                503,
                "database_unavailable" if answer.away == "PostgreSQL" else "kafka_unavailable",
                f"{answer.away} does not answer at the moment; try again",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        return answer.plan

    async def _asked(self, request: ReplayRequest, gone: Gone) -> DryRunAnswer:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._variables()},
            start_new_session=True,  # a Ctrl-C in the terminal is for us
        )
        answering = asyncio.create_task(_answer(child, request))
        leaving = asyncio.ensure_future(gone())
        limit_s = self._settings.replay_dry_run_seconds
        try:
            await asyncio.wait({answering, leaving}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if leaving.done():
                raise RequestRefused(499, "client_gone", "nobody waits for the answer")
            raise RequestRefused(
                504,
                "replay_too_long",
                f"it took longer than {limit_s:g} s: narrow the window, or use `tidemeter replay`",
                path="since",
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


async def _answer(child: asyncio.subprocess.Process, request: ReplayRequest) -> DryRunAnswer:
    assert child.stdin is not None and child.stdout is not None  # noqa: S101  (pipes; for the type checker)
    with contextlib.suppress(ConnectionError):
        child.stdin.write(msgspec.json.encode(request) + b"\n")
        await child.stdin.drain()  # and left open: its end would be the child's
    text = await child.stdout.read()
    status = await child.wait()
    try:
        return msgspec.json.decode(text, type=DryRunAnswer)
    except msgspec.DecodeError:
        log.error("dry run failed", exit_code=status)
        raise RequestRefused(500, "internal_error", "a defect on our side; it was logged") from None


async def _end(child: asyncio.subprocess.Process, *tasks: asyncio.Future[Any]) -> None:
    """Nothing is left of it: no process, no task."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await child.wait()
