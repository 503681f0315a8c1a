"""Handlers that a user brings: after the built-in one, apart from it and from each other."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from services.webhooks.deciding import Policy
from services.webhooks.handling import WebhookEvent
from services.webhooks.own import UserHandler
from tests.integration.dispatching import Desk, Gate, planted, snapshot
from tests.pipeline import until

BRIEF = Policy(attempts_max=2, retry_seconds=0.05, retry_max_seconds=0.05, timeout_seconds=0.3)


@pytest.fixture
def desk(postgres_dsn: str) -> Iterator[Desk]:
    yield Desk(postgres_dsn)


class Heard:
    """A function that remembers what it was called with."""

    def __init__(self) -> None:
        self.events: list[WebhookEvent] = []

    def __call__(self, event: WebhookEvent) -> None:
        self.events.append(event)

    @property
    def ids(self) -> list[str]:
        return [event.event_id for event in self.events]


def own(name: str, function: Any, *types: str, **parts: Any) -> UserHandler:
    return UserHandler(name, types or ("thing.*",), function, **parts)


def test_a_users_handler_gets_the_whole_event_of_the_types_it_asked_for(desk: Desk) -> None:
    heard = Heard()
    mine = own("mine", heard, "invoice.*", "charge.failed")
    desk.deliver(
        snapshot("evt_1", "invoice.paid"),
        snapshot("evt_2", "charge.failed", "obj_2"),
        snapshot("evt_3", "charge.succeeded", "obj_3"),
        own=(mine,),
    )
    with desk.dispatching(own=(mine,)):
        desk.until_settled()
    assert sorted(heard.ids) == ["evt_1", "evt_2"]
    assert heard.events[heard.ids.index("evt_1")].data == {"id": "obj_1", "note": "evt_1"}
    assert desk.states("mine") == {"evt_1": "succeeded", "evt_2": "succeeded"}


def test_a_users_handler_comes_after_the_built_in_one(desk: Desk) -> None:
    gate, heard = Gate(), Heard()
    mine = own("mine", heard)
    desk.deliver(snapshot("evt_1"), own=(mine,))
    with desk.dispatching(planted(fetch=lambda *_: gate.pass_through()), own=(mine,)) as dispatcher:
        assert gate.reached.wait(30)
        dispatcher.wake()
        assert desk.run("evt_1", "mine") == ("received", 0, None, None)
        assert heard.ids == []
        gate.opened.set()
        desk.until_settled()
    assert heard.ids == ["evt_1"]


def test_a_users_handler_may_be_a_coroutine_function(desk: Desk) -> None:
    heard = Heard()

    async def later(event: WebhookEvent) -> None:
        await asyncio.sleep(0)
        heard(event)

    mine = own("mine", later)
    desk.deliver(snapshot("evt_1"), own=(mine,))
    with desk.dispatching(own=(mine,)):
        desk.until_settled()
    assert heard.ids == ["evt_1"]


def test_a_users_handler_that_raises_exits_or_hangs_stops_only_itself(desk: Desk) -> None:
    heard, for_ever = Heard(), threading.Event()

    def leave(_: WebhookEvent) -> None:
        sys.exit("secret")

    async def stall(_: WebhookEvent) -> None:
        await asyncio.sleep(3600)

    def spoil(event: WebhookEvent) -> None:
        event.data.clear()  # type: ignore[attr-defined]
        raise ValueError("secret")

    handlers = (
        own("hangs", lambda _: for_ever.wait()),
        own("stalls", stall),
        own("leaves", leave),
        own("raises", spoil),
        own("works", heard),
    )
    try:
        with desk.dispatching(own=handlers, policy=BRIEF):
            desk.deliver(*(snapshot(f"evt_{n}", object_id=f"o{n}") for n in range(3)), own=handlers)
            desk.until_settled()
    finally:
        for_ever.set()
    assert set(desk.states().values()) == {"succeeded"}
    assert set(desk.states("works").values()) == {"succeeded"}
    assert all(event.data for event in heard.events)
    assert desk.run("evt_1", "hangs") == ("dead", 2, "Hung", "timed_out")
    assert desk.run("evt_1", "stalls") == ("dead", 2, "TimeoutError", "timed_out")
    assert desk.run("evt_1", "leaves") == ("dead", 2, "SystemExit", None)
    assert desk.run("evt_1", "raises") == ("dead", 2, "ValueError", None)
    told = [one["attributes"]["handler"] for one in desk.outbox()]
    assert sorted(told) == sorted(["hangs", "stalls", "leaves", "raises"] * 3)
    assert "secret" not in str(desk.query("SELECT * FROM outbox, webhook_runs"))


def test_a_handler_whose_threads_all_hang_gets_no_more_and_goes_on_when_they_return(desk: Desk) -> None:
    for_ever, called = threading.Event(), []

    def hang(event: WebhookEvent) -> None:
        called.append(event.event_id)
        for_ever.wait()

    hangs = own("hangs", hang)
    once = Policy(attempts_max=1, timeout_seconds=0.2)
    threads = threading.active_count()
    try:
        with desk.dispatching(own=(hangs,), policy=once) as dispatcher:
            desk.deliver(*(snapshot(f"evt_{n}", object_id=f"o{n}", at=n) for n in range(20)), own=(hangs,))
            dispatcher.count()
            until(lambda: "calls of hangs hang" in dispatcher.check()[1], "the cap reached")
            assert dispatcher.check()[0] == "degraded"
            until(lambda: set(desk.states().values()) == {"succeeded"}, "the built-in handler done")
            assert 8 <= len(called) <= 11, "eight that hang, and three that were under way"
            assert threading.active_count() <= threads + 2 * 4 + 11
            waiting = [name for name, state in desk.states("hangs").items() if state == "received"]
            assert waiting
            for_ever.set()
            desk.until_settled()
            assert set(called) == {f"evt_{n}" for n in range(20)}
    finally:
        for_ever.set()


def test_a_users_handler_of_states_gets_no_older_event_after_a_newer_one(desk: Desk) -> None:
    states, facts = Heard(), Heard()
    handlers = (own("states", states), own("facts", facts, is_state=False))
    with desk.dispatching(own=handlers):
        desk.deliver(snapshot("evt_new", at=2), own=handlers)
        desk.until_settled()
        desk.deliver(snapshot("evt_old", at=1), own=handlers)
        desk.until_settled()
    assert states.ids == ["evt_new"]
    assert facts.ids == ["evt_new", "evt_old"]
    assert desk.states("states")["evt_old"] == "stale"


def test_a_dead_run_of_one_handler_holds_up_nobody_else(desk: Desk) -> None:
    heard = Heard()

    def fail(event: WebhookEvent) -> None:
        raise ValueError

    handlers = (own("fails", fail), own("works", heard))
    slow = Policy(attempts_max=2, retry_seconds=3600, retry_max_seconds=3600, timeout_seconds=5)
    with desk.dispatching(own=handlers, policy=slow):
        desk.deliver(snapshot("evt_1", at=1), snapshot("evt_2", at=2), own=handlers)
        until(lambda: heard.ids == ["evt_1", "evt_2"], "the other handler done")
        desk.until_state("evt_1", "failed", "fails")
        assert desk.run("evt_2", "fails")[0] == "received"
        assert set(desk.states().values()) == {"succeeded"}
