"""Stripe's lists: `limit` 1 to 100 (default 10), `starting_after` or `ending_before` an id on the list."""

from __future__ import annotations

from dataclasses import dataclass

from services.stripe_simulator.errors import InvalidParameters, Json, missing_object
from services.stripe_simulator.forms import Params

LIMIT_DEFAULT = 10
LIMIT_MAX = 100


@dataclass(frozen=True, slots=True)
class Page:
    limit: int
    starting_after: str | None
    ending_before: str | None

    @classmethod
    def read(cls, params: Params) -> Page:
        limit = params.integer("limit")
        starting_after, ending_before = params.text("starting_after"), params.text("ending_before")
        if limit is not None and not 1 <= limit <= LIMIT_MAX:
            raise InvalidParameters(f"Invalid limit: must be between 1 and {LIMIT_MAX}", param="limit")
        if starting_after is not None and ending_before is not None:
            message = "You may only specify one of these parameters: starting_after, ending_before."
            raise InvalidParameters(message, param="ending_before")
        return cls(LIMIT_DEFAULT if limit is None else limit, starting_after, ending_before)

    def of(self, items: list[Json], url: str, kind: str) -> Json:
        """The page of `items`, which are newest first."""
        if self.ending_before is not None:
            before = items[: self._place(items, self.ending_before, kind, "ending_before")]
            data, has_more = before[-self.limit :], len(before) > self.limit
        else:
            after = items
            if self.starting_after is not None:
                after = items[self._place(items, self.starting_after, kind, "starting_after") + 1 :]
            data, has_more = after[: self.limit], len(after) > self.limit
        return {"object": "list", "url": url, "has_more": has_more, "data": data}

    @staticmethod
    def _place(items: list[Json], cursor: str, kind: str, param: str) -> int:
        for place, item in enumerate(items):
            if item["id"] == cursor:
                return place
        raise missing_object(kind, cursor, param=param, status=400)
