"""Objects of the account that the simulator keeps as Stripe shapes them: one table for all kinds.

A kind is the `object` of its bodies: price, subscription, invoice, charge, refund, balance_transaction,
dispute, payout, payment_method. What happens to an object by itself happens at its `due_at`, in the order of
these moments across all kinds, so that a leap of the clock tells the same story as a slow one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.stripe_simulator.errors import Json, missing_object
from services.stripe_simulator.event_log import EventLog, Occasion
from services.stripe_simulator.store import Store

Step = Callable[[Json, Occasion], None]


class Resources:
    def __init__(self, store: Store, log: EventLog) -> None:
        self._store = store
        self._log = log

    def keep(self, body: Json, due_at: float | None = None, belongs_to: str | None = None) -> None:
        """The object as it is from now on, and when something happens to it next, if anything does.

        ``belongs_to`` is the connected account of a payout, the payout of a balance transaction; once said
        it stays.
        """
        self._store.write(
            "INSERT INTO resources (id, kind, created, due_at, belongs_to, body) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, created = excluded.created,"
            " due_at = excluded.due_at, body = excluded.body,"
            " belongs_to = coalesce(excluded.belongs_to, belongs_to)",
            (body["id"], body["object"], body["created"], due_at, belongs_to, json.dumps(body)),
        )

    def update(self, body: Json) -> None:
        """The object as it is from now on; what happens to it next stays as it was."""
        self._store.write("UPDATE resources SET body = ? WHERE id = ?", (json.dumps(body), body["id"]))

    def tell(self, event_type: str, body: Json, when: Occasion, before: Json | None = None) -> None:
        """An event about the object; with what it was before, the event says what changed."""
        previous = None if before is None else difference(before, body)
        self._log.snapshot(event_type, body, when, previous=previous)

    def read(self, object_id: str) -> Json | None:
        row = self._store.read_one("SELECT body FROM resources WHERE id = ?", (object_id,))
        found: Json | None = None if row is None else json.loads(row[0])
        return found

    def find(self, kind: str, object_id: str, *, param: str = "id", status: int = 404) -> Json:
        """ApiError, as Stripe words it, for an object that is not there."""
        found = self.read(object_id)
        if found is None or found["object"] != kind:
            raise missing_object(kind.replace("_", " "), object_id, param=param, status=status)
        return found

    def newest_first(self, kind: str, belongs_to: str | None = None) -> list[Json]:
        """All of a kind; with ``belongs_to`` those of it only."""
        rows = self._store.read(
            "SELECT body FROM resources WHERE kind = :kind"
            " AND (:belongs_to IS NULL OR belongs_to = :belongs_to) ORDER BY created DESC, rowid DESC",
            {"kind": kind, "belongs_to": belongs_to},
        )
        return [json.loads(body) for (body,) in rows]

    def owner(self, object_id: str) -> str | None:
        row = self._store.read_one("SELECT belongs_to FROM resources WHERE id = ?", (object_id,))
        return None if row is None else row[0]

    def run_due(self, now: float, steps: Mapping[str, Step]) -> None:
        """Let happen what is due by now, the earliest first. A step leaves its object due later, or never."""
        sql = "SELECT body, due_at FROM resources WHERE due_at <= ? ORDER BY due_at, rowid LIMIT 1"
        while (row := self._store.read_one(sql, (now,))) is not None:
            body = json.loads(row[0])
            steps[body["object"]](body, Occasion(at=row[1], now=now))

    def expanded(self, body: Json, paths: Sequence[str]) -> Json:
        """The answer with these references shown whole; a path that leads to none changes nothing."""
        for path in paths:
            body = self._expanded(body, path.split("."))
        return body

    def _expanded(self, value: Any, path: list[str]) -> Any:
        if not path:
            return value
        if isinstance(value, list):
            return [self._expanded(one, path) for one in value]
        if not isinstance(value, dict) or path[0] not in value:
            return value
        inner = value[path[0]]
        if isinstance(inner, str):
            inner = self.read(inner) or inner
        return value | {path[0]: self._expanded(inner, path[1:])}


def difference(before: Json, after: Json) -> Json:
    """The old values of what changed, as `data.previous_attributes` has them.

    Objects are compared field by field, a list is told whole; what was not there before is null.
    """
    changed: Json = {}
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        nested = isinstance(old, dict) and isinstance(new, dict)
        changed[name] = difference(old, new) if nested else old  # type: ignore[arg-type]
    return changed
