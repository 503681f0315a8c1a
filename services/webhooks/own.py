"""Handlers that a user brings: found, checked, and called so that they can harm only themselves."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from queue import Empty, SimpleQueue
from typing import Any

from services.webhooks.handling import WebhookEvent
from services.wire.errors import Misconfigured

#: The built-in handler's name in ``webhook_runs``.
BUILT_IN = "tidemeter"

#: A coroutine that is cancelled at its time limit gets so long to end, so that its thread is not given up.
CANCEL_SECONDS = 0.5

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class UserHandler:
    """A handler of your own.

    ``name`` stays the same for ever: runs are kept under it. ``types`` are globs such as ``invoice.*``.
    ``function`` gets each event whose type one of them matches, at least once: ``event.event_id`` is the
    idempotency key. It may be a coroutine function. It has no database of ours.

    ``is_state``: events of one object come one after the other, oldest first, and one that is older than
    what was handled before is left out (``stale``). False: every event comes, in any order.
    """

    name: str
    types: tuple[str, ...]
    function: Callable[[WebhookEvent], Any]
    is_state: bool = True

    def takes(self, event_type: str) -> bool:
        """Whether this handler wants events of the type."""
        return any(fnmatchcase(event_type, pattern) for pattern in self.types)


def load_user_handlers(text: str | None) -> list[UserHandler]:
    """The handlers that ``module:name,…`` names.

    Raises:
        Misconfigured: one cannot be imported, is no handler, or has a name that is taken.
    """
    found: dict[str, UserHandler] = {}
    for reference in filter(None, (part.strip() for part in (text or "").split(","))):
        handler = _load(reference)
        if handler.name == BUILT_IN or handler.name in found:
            raise _wrong(reference, f"the name {handler.name!r} is taken")
        found[handler.name] = handler
    return list(found.values())


def _load(reference: str) -> UserHandler:
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise _wrong(reference, "it is not `module:name`")
    try:
        handler = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does when it is imported
        raise _wrong(reference, f"it cannot be imported ({type(error).__name__})") from error
    if not isinstance(handler, UserHandler):
        raise _wrong(reference, "it is no services.webhooks.UserHandler")
    if not isinstance(handler.name, str) or not _NAME.fullmatch(handler.name):
        raise _wrong(reference, "a name has up to 63 of a-z, 0-9, `_`, `.` and `-`")
    if (
        not isinstance(handler.types, tuple)
        or not handler.types
        or not all(isinstance(one, str) and one for one in handler.types)
    ):
        raise _wrong(reference, "its types are not a tuple of globs, such as ('invoice.*',)")
    if not callable(handler.function):
        raise _wrong(reference, "its function cannot be called")
    return handler


def _wrong(reference: str, why: str) -> Misconfigured:
    return Misconfigured(f"TIDEMETER_WEBHOOK_HANDLERS names {reference!r}: {why}")


class Hung(TimeoutError):
    """The function did not return in time; its thread may go on for ever."""


class Calls:
    """Calls of one function, each in a thread of its own that can be left behind.

    A thread cannot be ended from outside. At most ``abandoned_max`` are left behind at once; until one of
    them returns, :attr:`has_room` is false.
    """

    def __init__(
        self, function: Callable[[WebhookEvent], Any], *, timeout_seconds: float, abandoned_max: int
    ) -> None:
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._abandoned_max = abandoned_max
        self._lock = threading.Lock()
        self._abandoned = 0

    @property
    def abandoned(self) -> int:
        """Threads that were given up and still run."""
        return self._abandoned

    @property
    def has_room(self) -> bool:
        """Whether a call may be made."""
        return self._abandoned < self._abandoned_max

    def call(self, event: WebhookEvent) -> None:
        """Call, and wait for the end.

        Raises:
            Hung: it takes too long.
            BaseException: what the function raised, ``SystemExit`` too.
        """
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        settled = threading.Event()  # set by whoever is first: the end, or the time limit

        def run() -> None:
            error: BaseException | None = None
            try:
                result = self._function(event)
                if inspect.isawaitable(result):
                    asyncio.run(_bounded(result, self._timeout_seconds))
            except BaseException as raised:
                error = raised
            with self._lock:
                if settled.is_set():
                    self._abandoned -= 1
                settled.set()
            ended.put(error)

        threading.Thread(target=run, daemon=True, name="webhook-own").start()
        try:
            error = ended.get(timeout=self._timeout_seconds + CANCEL_SECONDS)
        except Empty:
            with self._lock:
                if not settled.is_set():
                    settled.set()
                    self._abandoned += 1
                    raise Hung from None
            error = ended.get()
        if error is not None:
            raise error


async def _bounded(result: Any, seconds: float) -> None:
    await asyncio.wait_for(result, seconds)
