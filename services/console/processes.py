"""Answers that take a core for a while come from processes of their own, so that no event waits for them.

A module is started as ``python -m <module>``: it reads one line, the request, from its standard input, writes
one line, the answer, to its standard output, and ends when its standard input does. At most two run at once,
for everybody together. One is killed when its client goes away or when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

from litestar import Request
from litestar.datastructures import State

from services.web.problems import RETRY_AFTER_S, RequestRefused

AT_ONCE = 2
PATIENCE_S = 300.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Processes:
    """Those of one process that serves HTTP."""

    def __init__(self, at_once: int = AT_ONCE, patience_s: float = PATIENCE_S) -> None:
        self._at_once = at_once
        self._patience_s = patience_s
        self.running = 0

    async def answer(self, request: Request[Any, Any, State], module: str, asked: bytes) -> bytes:
        """What ``module`` answers to ``asked``, a line without its end.

        Raises:
            RequestRefused: 503, enough of them run already, or it took too long.
            RuntimeError: it ended without an answer; its log says why.
            ClientGone: nobody waits any more.
        """
        if self.running >= self._at_once:
            raise RequestRefused(
                503,
                "busy",
                "others are being answered; try again in a moment",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.running += 1
        try:
            return await self._answer(request, module, asked)
        finally:
            self.running -= 1

    async def _answer(self, request: Request[Any, Any, State], module: str, asked: bytes) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=ANSWER_BYTES_MAX,
        )
        assert process.stdin is not None and process.stdout is not None  # noqa: S101  (for the type checker)
        tasks: list[asyncio.Task[Any]] = []
        try:
            process.stdin.write(asked + b"\n")  # and left open: it ends when this process does
            answer = asyncio.create_task(process.stdout.readline())
            gone = asyncio.create_task(_gone(request))
            tasks = [answer, gone]
            done, _ = await asyncio.wait(tasks, timeout=self._patience_s, return_when=asyncio.FIRST_COMPLETED)
            if answer in done:
                line = answer.result()
                if not line.endswith(b"\n"):
                    raise RuntimeError(f"{module} ended without an answer")
                return line[:-1]
            if gone in done:
                raise ClientGone
            raise RequestRefused(503, "took_too_long", "the answer would take too long; ask for less")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.stdin.close()
            await process.wait()


async def _gone(request: Request[Any, Any, State]) -> None:
    """Return once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
