"""Meters and customers: what an event may refer to, and Stripe's shape of each.

Both are few and read on every event, so they live in memory and are written through.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, cast

from services.stripe_simulator.errors import ApiError, InvalidParameters, Json, missing_object
from services.stripe_simulator.forms import TEXT_LENGTH_MAX, Params
from services.stripe_simulator.store import Store

Formula = Literal["sum", "count", "last"]
TimeWindow = Literal["hour", "day"]
FORMULAS = ("sum", "count", "last")
TIME_WINDOWS = ("day", "hour")
METADATA_LENGTH_MAX = 500
ADDRESS_FIELDS = ("city", "country", "line1", "line2", "postal_code", "state")


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Customer:
    id: str
    created: int
    email: str | None = None
    name: str | None = None
    description: str | None = None
    phone: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    address: dict[str, str | None] | None = None
    deleted: bool = False

    def to_json(self) -> Json:
        if self.deleted:
            return {"id": self.id, "object": "customer", "deleted": True}
        fields = asdict(self)
        del fields["deleted"]
        return {"object": "customer", **fields, "livemode": False}


@dataclass(frozen=True, slots=True)
class Meter:
    id: str
    event_name: str
    display_name: str
    created: int
    updated: int
    formula: Formula = "sum"
    customer_key: str = "stripe_customer_id"
    value_key: str = "value"
    event_time_window: TimeWindow | None = None
    deactivated_at: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.deactivated_at is None

    def to_json(self) -> Json:
        return {
            "id": self.id,
            "object": "billing.meter",
            "created": self.created,
            "customer_mapping": {"event_payload_key": self.customer_key, "type": "by_id"},
            "default_aggregation": {"formula": self.formula},
            "display_name": self.display_name,
            "event_name": self.event_name,
            "event_time_window": self.event_time_window,
            "livemode": False,
            "metadata": self.metadata,
            "status": "active" if self.active else "inactive",
            "status_transitions": {"deactivated_at": self.deactivated_at},
            "updated": self.updated,
            "value_settings": {"event_payload_key": self.value_key},
        }


def read_customer(params: Params, known: Customer) -> Customer:
    """`known` with the fields that the parameters name; an empty string clears a field."""
    changes = {name: params.text(name) for name in ("email", "name", "description", "phone")}
    address = read_address(params, known.address)
    metadata = read_metadata(params, known.metadata)
    params.finish()
    given = {name: value or None for name, value in changes.items() if value is not None}
    return replace(known, **given, address=address, metadata=metadata)  # type: ignore[arg-type]


def read_address(params: Params, known: dict[str, str | None] | None) -> dict[str, str | None] | None:
    """An address that is given replaces the known one whole (a choice); an empty string removes it."""
    if not params.has("address"):
        return known
    given = params.text_map("address", length_max=TEXT_LENGTH_MAX)
    if given is None:
        return None
    unknown = sorted(set(given) - set(ADDRESS_FIELDS))
    if unknown:
        name = f"address[{unknown[0]}]"
        message = f"Received unknown parameter: {name}"
        raise InvalidParameters(message, code="parameter_unknown", param=name)
    return {name: given.get(name) or None for name in ADDRESS_FIELDS}


def read_metadata(params: Params, known: dict[str, str]) -> dict[str, str]:
    """`known` with what is given: an empty value unsets its key, an empty `metadata` all of them."""
    if not params.has("metadata"):
        return known
    given = params.text_map("metadata", length_max=METADATA_LENGTH_MAX)
    merged = {} if given is None else known | given
    return {key: value for key, value in merged.items() if value}


def read_meter(params: Params, meter_id: str, now: int) -> Meter:
    """A new meter from the parameters of POST /v1/billing/meters."""
    display_name = params.required_text("display_name", length_max=250)
    event_name = params.required_text("event_name", length_max=100)
    aggregation = params.nested("default_aggregation")
    formula = aggregation.choice("formula", FORMULAS)
    if formula is None:
        raise aggregation.missing("formula")
    mapping = params.nested("customer_mapping")
    mapping.choice("type", ("by_id",))
    customer_key = mapping.text("event_payload_key", length_max=100)
    settings = params.nested("value_settings")
    value_key = settings.text("event_payload_key", length_max=100)
    window = params.choice("event_time_window", TIME_WINDOWS)
    metadata = params.text_map("metadata", length_max=METADATA_LENGTH_MAX)
    for level in (aggregation, mapping, settings, params):
        level.finish()
    return Meter(
        id=meter_id,
        event_name=event_name,
        display_name=display_name,
        created=now,
        updated=now,
        formula=cast(Formula, formula),
        customer_key=customer_key or "stripe_customer_id",
        value_key=value_key or "value",
        event_time_window=cast("TimeWindow | None", window),
        metadata=metadata or {},
    )


class Registry:
    """All customers and meters, oldest first. A deleted customer can be looked at and nothing else."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.customers: dict[str, Customer] = {}
        self.deleted: dict[str, Customer] = {}
        self.meters: dict[str, Meter] = {}
        self._by_event_name: dict[str, Meter] = {}
        self.load()

    def load(self) -> None:
        customers = self._store.read("SELECT body FROM customers ORDER BY rowid")
        meters = self._store.read("SELECT body FROM meters ORDER BY rowid")
        self.customers, self.deleted = {}, {}
        for customer in (Customer(**json.loads(body)) for (body,) in customers):
            self._place_customer(customer)
        self.meters = {one.id: one for one in (Meter(**json.loads(body)) for (body,) in meters)}
        self._index_event_names()

    def keep_customer(self, customer: Customer) -> None:
        self._place_customer(customer)
        self._keep("customers", customer.id, json.dumps(asdict(customer)))

    def keep_meter(self, meter: Meter) -> None:
        """Keep a meter; an event name belongs to one active meter (docs: billing meters, configure)."""
        rival = self._by_event_name.get(meter.event_name)
        if meter.active and rival is not None and rival.active and rival.id != meter.id:
            message = f"There is already an active meter with the event name {meter.event_name}: {rival.id}."
            raise ApiError(message, param="event_name")
        self.meters[meter.id] = meter
        self._index_event_names()
        self._keep("meters", meter.id, json.dumps(asdict(meter)))

    def customer(self, customer_id: str) -> Customer:
        found = self.customers.get(customer_id)
        if found is None:
            raise missing_object("customer", customer_id, param="id", status=404)
        return found

    def meter(self, meter_id: str) -> Meter:
        found = self.meters.get(meter_id)
        if found is None:
            raise missing_object("billing meter", meter_id, param="id", status=404)
        return found

    def meter_for(self, event_name: str) -> Meter | None:
        """The active meter of this event name, else an archived one, else None."""
        return self._by_event_name.get(event_name)

    def _place_customer(self, customer: Customer) -> None:
        there, away = self.customers, self.deleted
        if customer.deleted:
            there, away = away, there
        there[customer.id] = customer
        away.pop(customer.id, None)

    def _index_event_names(self) -> None:
        archived_first = sorted(self.meters.values(), key=lambda meter: meter.active)
        self._by_event_name = {meter.event_name: meter for meter in archived_first}

    def _keep(self, table: str, object_id: str, body: str) -> None:
        sql = f"INSERT INTO {table} VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body"  # noqa: S608
        self._store.write(sql, (object_id, body))
