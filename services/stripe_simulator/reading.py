"""GET of one kind of object: by id, and as a list with its filters, a range of `created`, and pages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from services.stripe_simulator.errors import Json
from services.stripe_simulator.forms import Params
from services.stripe_simulator.gateway import Call, Endpoint
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.paging import Page
from services.stripe_simulator.resources import Resources

Matches = Callable[[Json, str], bool]
OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def field_is(name: str) -> Matches:
    """The field of this name, or path, is what the filter says; true and false are written as words."""

    def matches(body: Json, wanted: str) -> bool:
        value: object = body
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return (str(value).lower() if isinstance(value, bool) else value) == wanted

    return matches


def fields(*names: str) -> dict[str, Matches]:
    return {name: field_is(name) for name in names}


def within(moment: int, bounds: Mapping[str, int]) -> bool:
    return all(OPERATORS[name](moment, bound) for name, bound in bounds.items())


@dataclass(frozen=True, slots=True)
class Kind:
    """`defaults` are filters that hold where a call names none of its own."""

    name: str
    url: str
    filters: Mapping[str, Matches] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)


class Reading:
    def __init__(self, resources: Resources, kind: Kind, catch_up: Callable[[], None]) -> None:
        self._resources = resources
        self._kind = kind
        self._catch_up = catch_up

    def endpoints(self) -> dict[tuple[str, str], Endpoint]:
        return {
            ("GET", self._kind.url): Endpoint(self.listed),
            ("GET", f"{self._kind.url}/{{id}}"): Endpoint(self.found),
        }

    def found(self, call: Call, params: Params, origin: Origin) -> Json:
        params.finish()
        self._catch_up()
        body = self._resources.find(self._kind.name, call.parts["id"])
        return self._resources.expanded(body, params.expand())

    def listed(self, call: Call, params: Params, origin: Origin) -> Json:
        self._catch_up()
        return self.page(call, params, self._resources.newest_first(self._kind.name))

    def page(self, call: Call, params: Params, newest_first: Iterable[Json]) -> Json:
        """The page of these objects that the parameters ask for."""
        page, bounds = Page.read(params), params.bounds("created")
        given = {name: params.text(name) for name in self._kind.filters}
        params.finish()
        filters = {**self._kind.defaults, **{name: one for name, one in given.items() if one is not None}}
        chosen = [
            body
            for body in newest_first
            if within(body["created"], bounds)
            and all(self._kind.filters[name](body, wanted) for name, wanted in filters.items())
        ]
        answer = page.of(chosen, call.path, self._kind.name.replace("_", " "))
        return self._resources.expanded(answer, params.expand())
