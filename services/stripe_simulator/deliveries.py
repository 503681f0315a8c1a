"""Events on their way to destinations: what is due, what came of it, and what goes wrong on purpose.

Kept in the database, so that a restarted simulator goes on delivering. As documented
(docs.stripe.com/webhooks): no order is promised, an event may arrive twice, anything but 2xx is tried again,
for up to 3 days in live mode and three times over a few hours in a sandbox. The delays between tries are a
choice; they pass by the simulator's clock.

fault            what happens to one delivery of a matching event (`match.type`, a glob)
duplicate        it is delivered `copies` times more
hold             it waits `seconds` of the simulator's clock, so later events overtake it
lost             it is never sent
wrong_secret     the first try is signed with another secret
old_timestamp    the first try is signed `seconds` ago, 600 by default; 300 are tolerated
truncated_body   the first try has half of the body under the signature of the whole
other_account    an event of another account comes first, rightly signed and tried once
"""

from __future__ import annotations

import json
from typing import Any

from services.stripe_simulator.destinations import Destination
from services.stripe_simulator.errors import Json
from services.stripe_simulator.faults import Fault, FaultTape, Rule, read_rule
from services.stripe_simulator.meters import new_id
from services.stripe_simulator.store import Store

WEBHOOK_FAULTS = frozenset(
    {
        "ok",
        "duplicate",
        "hold",
        "lost",
        "wrong_secret",
        "old_timestamp",
        "truncated_body",
        "other_account",
    }
)
FIRST_TRY_FAULTS = frozenset({"wrong_secret", "old_timestamp", "truncated_body"})
OTHER_ACCOUNT = "acct_other"
RETRY_DELAYS_SECONDS: dict[str, tuple[int, ...]] = {
    "sandbox": (1800, 7200),
    "live": (60, 300, 1800, 7200, 18_000, 36_000, 43_200, 43_200, 43_200, 43_200),  # within 3 days
}
HOLD_SECONDS_MAX = 7 * 24 * 3600
OLD_SECONDS_DEFAULT = 600.0
DUE_MAX = 200
ROWS_MAX = 10_000


def read_webhook_rule(given: Any) -> Rule:
    """One entry of POST /_simulator/webhook_faults; ValueError says what is wrong with it."""
    if not isinstance(given, dict) or not isinstance(given.get("match", {}), dict):
        raise ValueError("a webhook fault is an object with `fault` and, optionally, an object `match`")
    match = dict(given.get("match", {}))
    unknown = sorted(set(match) - {"type", "nth", "probability"})
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}: match has type, nth, probability")
    fields: dict[str, Any] = {"seconds": OLD_SECONDS_DEFAULT} | given
    fields["match"] = {"path": match.pop("type", "*"), **match}
    return read_rule(fields, WEBHOOK_FAULTS, HOLD_SECONDS_MAX)


class Delivery:
    """One event for one destination, as the courier takes it."""

    __slots__ = ("attempts", "body", "destination", "event", "fault", "fault_seconds", "sequence")

    def __init__(self, row: Any) -> None:
        self.sequence: int = row[0]
        self.destination: str = row[1]
        self.event: str = row[2]
        self.body: bytes = row[3]
        self.attempts: int = row[4]
        self.fault: str | None = row[5]
        self.fault_seconds: float = row[6]


class Deliveries:
    def __init__(self, store: Store, faults: FaultTape, schedule: str) -> None:
        self._store = store
        self._faults = faults
        self._delays = RETRY_DELAYS_SECONDS[schedule]

    def add(self, destination: Destination, event_type: str, body: Json, now: float) -> None:
        """Put an event on its way, with the fault that the tape has for it."""
        fault = self._faults.pick("POST", event_type) or Fault()
        if fault.name == "lost":
            return
        if fault.name == "other_account":
            self._put(destination, event_type, _of_another_account(body), now, None, retries=0)
        due_at = now + fault.seconds if fault.name == "hold" else now
        copies = 1 + (fault.copies if fault.name == "duplicate" else 0)
        for _ in range(copies):
            self._put(destination, event_type, body, due_at, fault, retries=len(self._delays))

    def _put(
        self,
        destination: Destination,
        event_type: str,
        body: Json,
        due_at: float,
        fault: Fault | None,
        *,
        retries: int,
    ) -> None:
        spoiled = fault is not None and fault.name in FIRST_TRY_FAULTS
        self._store.write(
            "INSERT INTO deliveries (destination, event, type, body, due_at, retries, fault, fault_seconds)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                destination.id,
                body["id"],
                event_type,
                json.dumps(body, indent=2).encode(),
                due_at,
                retries,
                fault.name if fault is not None and spoiled else None,
                fault.seconds if fault is not None and spoiled else 0.0,
            ),
        )

    def due(self, now: float) -> list[Delivery]:
        rows = self._store.read(
            "SELECT sequence, destination, event, body, attempts, fault, fault_seconds FROM deliveries"
            " WHERE state = 'pending' AND due_at <= ? ORDER BY due_at, sequence LIMIT ?",
            (now, DUE_MAX),
        )
        return [Delivery(row) for row in rows]

    def settle(self, delivery: Delivery, status: int, now: float) -> None:
        """Note one try. Status 0 stands for no answer at all; anything but 2xx is tried again, if it may."""
        retries, statuses = self._store.read_one(
            "SELECT retries, statuses FROM deliveries WHERE sequence = ?", (delivery.sequence,)
        )
        attempts = delivery.attempts + 1
        state, due_at = "delivered", now
        if not 200 <= status < 300:
            again = attempts <= retries
            state = "pending" if again else "failed"
            due_at = now + (self._delays[attempts - 1] if again else 0)
        self._store.write(
            "UPDATE deliveries SET attempts = ?, state = ?, due_at = ?, statuses = ? WHERE sequence = ?",
            (attempts, state, due_at, json.dumps([*json.loads(statuses), status]), delivery.sequence),
        )

    def give_up(self, delivery: Delivery) -> None:
        """The destination is gone or disabled."""
        self._store.write("UPDATE deliveries SET state = 'failed' WHERE sequence = ?", (delivery.sequence,))

    def to_json(self) -> Json:
        """The newest deliveries, oldest of them first, and how many are in each state."""
        rows = self._store.read_named(
            "SELECT sequence, destination, event, type, due_at, attempts, state, statuses FROM deliveries"
            " ORDER BY sequence DESC LIMIT ?",
            (ROWS_MAX,),
        )
        states = self._store.read("SELECT state, count(*) FROM deliveries GROUP BY state")
        shown = [row | {"statuses": json.loads(row["statuses"])} for row in reversed(rows)]
        return {"deliveries": shown, "states": dict(states)}


def _of_another_account(body: Json) -> Json:
    """The same kind of event, from an account that is not ours: `account` in v1, `context` in v2."""
    field = "account" if body["object"] == "event" else "context"
    return body | {"id": new_id("evt_test"), field: OTHER_ACCOUNT}
