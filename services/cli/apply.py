"""``tidemeter apply``: tenants, meters and customers are data, described in one YAML file.

The file is the truth about every field that it names, and silent about the others of a customer: billing
periods that it does not name stay as they are stored. They may come from elsewhere, such as Stripe, and
applying a file again must not move usage between invoices. ``subscription: null`` says that there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import psycopg
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences
from services.wire.errors import Invalid, Misconfigured
from services.wire.periods import Calendar, calendar_text, in_zone
from services.wire.settings import Settings, load_settings
from services.wire.usage import PROPERTY_KEY_CHARS_MAX, parse_timestamp

_DURATION = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PROPERTY = re.compile(rf"[^\x00-\x1f\ud800-\udfff]{{1,{PROPERTY_KEY_CHARS_MAX}}}")
_PROPERTIES = "properties."
_MAPS_TO_ITSELF = re.compile(r"cus_[A-Za-z0-9_]+")
DIMENSIONS_MAX = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StripeMeter(_Part):
    """How a meter maps to Stripe's: event name and payload keys."""

    event_name: str = Field(min_length=1, max_length=100)
    customer_key: str = Field("stripe_customer_id", min_length=1, max_length=100)
    value_key: str = Field("value", min_length=1, max_length=100)
    allow_negative: bool = False


class MeterSpec(_Part):
    """One meter. ``lateness`` is a duration such as 48h, at most 35d.

    ``value`` names what is aggregated: the event's quantity, or a property. ``dimensions`` are properties
    whose values are counted apart from each other.
    """

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,99}$")
    aggregation: Literal["sum", "count", "max", "last", "unique"] = "sum"
    value: str = "quantity"
    dimensions: list[str] = Field([], max_length=DIMENSIONS_MAX)
    unit: str = ""
    scale: int = Field(0, ge=0, le=9)
    lateness: str = "48h"
    late_policy: Literal["manual", "carry_forward"] = "manual"
    stripe: StripeMeter

    @field_validator("lateness")
    @classmethod
    def _is_duration(cls, text: str) -> str:
        if not timedelta(0) <= duration(text) <= timedelta(days=35):
            raise ValueError("must be between 0s and 35d")
        return text

    @field_validator("value")
    @classmethod
    def _is_value(cls, text: str) -> str:
        if text != "quantity":
            if not text.startswith(_PROPERTIES):
                raise ValueError("must be quantity, or properties. and the name of a property")
            _check_property(text.removeprefix(_PROPERTIES))
        return text

    @field_validator("dimensions")
    @classmethod
    def _are_properties(cls, names: list[str]) -> list[str]:
        for name in names:
            _check_property(name)
        if len(set(names)) < len(names):
            raise ValueError("names a property twice")
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        taken = {self.stripe.customer_key, self.stripe.value_key} & set(self.dimensions)
        if taken:
            raise ValueError(
                f"the dimension {min(taken)} is also a key of stripe: rename stripe.customer_key or "
                "stripe.value_key"
            )
        if self.aggregation == "unique" and self.value_property is None:
            raise ValueError(
                "aggregation unique counts the distinct values of a property: add value: properties.NAME"
            )
        if self.aggregation == "count" and self.value_property is not None:
            raise ValueError("aggregation count counts events, whatever their value: leave value out")
        if self.aggregation == "last" and self.dimensions:
            raise ValueError(
                "aggregation last cannot have dimensions, for Stripe keeps one last value of a customer: "
                "leave them out, or declare a meter for each"
            )
        if self.aggregation == "last" and self.late_policy == "carry_forward":
            raise ValueError(
                "aggregation last cannot have late_policy carry_forward, for an old value carried into today "
                "would replace today's: use manual"
            )
        return self

    @property
    def value_property(self) -> str | None:
        """Name of the property that holds the value; None for the event's quantity."""
        return None if self.value == "quantity" else self.value.removeprefix(_PROPERTIES)

    @property
    def formula(self) -> str:
        """The formula of its Stripe meter. All but ``last`` arrive there as parts of a sum."""
        return _formula(self.aggregation)


def _formula(aggregation: str) -> str:
    return "last" if aggregation == "last" else "sum"


def _check_property(name: str) -> None:
    if not _PROPERTY.fullmatch(name):
        raise ValueError(
            f"a property's name has 1 to {PROPERTY_KEY_CHARS_MAX} characters, without control characters"
        )


class SubscriptionSpec(_Part):
    """Billing periods that repeat from ``anchor``: every ``interval_count`` intervals, to the second."""

    anchor: datetime
    interval: Literal["day", "week", "month", "year"] = "month"
    interval_count: int = 1

    @field_validator("anchor", mode="before")
    @classmethod
    def _is_instant(cls, given: object) -> datetime:
        """YAML reads a time without quotes itself, with or without an offset."""
        try:
            moment = parse_timestamp(given) if isinstance(given, str) else given
        except Invalid as error:
            raise ValueError(str(error)) from None
        if not isinstance(moment, datetime) or moment.utcoffset() is None or moment.microsecond:
            raise ValueError("must be a full second with an offset, such as 2026-01-31T13:37:42Z")
        return moment

    @model_validator(mode="after")
    def _repeats(self) -> Self:
        try:
            self.calendar("UTC")
        except Misconfigured as error:
            raise ValueError(str(error)) from None
        return self

    def calendar(self, timezone: str) -> str:
        """The text of its calendar."""
        return calendar_text(timezone, self.anchor, count=self.interval_count, unit=self.interval)


def _existing_zone(name: str) -> str:
    try:
        calendar_text(name)
    except Misconfigured as error:
        raise ValueError(str(error)) from None
    return name


class CustomerSpec(_Part):
    """One customer: our reference and Stripe's id. ``stripe`` may be left out with --create-in-stripe.

    ``timezone`` replaces the tenant's for this customer; ``subscription`` replaces calendar months.
    """

    ref: str = Field(min_length=1, max_length=255)
    stripe: str | None = Field(None, min_length=1, max_length=255)
    timezone: str | None = None
    subscription: SubscriptionSpec | None = None

    @field_validator("timezone")
    @classmethod
    def _exists(cls, name: str | None) -> str | None:
        return None if name is None else _existing_zone(name)

    def names_periods(self) -> bool:
        """Whether the file says anything about this customer's billing periods."""
        return not self.model_fields_set.isdisjoint({"timezone", "subscription"})

    def calendar(self, tenant_timezone: str, stored: str | None) -> str | None:
        """The text of its calendar, given the stored one; None for the tenant's calendar months.

        A subscription that the file names says everything. If it names only a time zone, a stored
        subscription goes on in that zone.
        """
        if not self.names_periods():
            return stored
        if self.subscription is not None:
            return self.subscription.calendar(self.timezone or tenant_timezone)
        goes_on = "subscription" not in self.model_fields_set
        if goes_on and stored is not None and Calendar.parse(stored).anchored:
            return in_zone(stored, self.timezone or tenant_timezone)
        return None if self.timezone is None else calendar_text(self.timezone)


class TenantSpec(_Part):
    """One tenant with its meters and customers."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    timezone: str = "UTC"
    meters: list[MeterSpec] = []
    customers: list[CustomerSpec] = []

    @field_validator("timezone")
    @classmethod
    def _exists(cls, name: str) -> str:
        return _existing_zone(name)


class Document(_Part):
    """The whole file."""

    tenants: list[TenantSpec]


def duration(text: str) -> timedelta:
    """``90s``, ``30m``, ``48h`` or ``7d``.

    Raises:
        ValueError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("must be a number and s, m, h or d, such as 48h")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def parse_document(text: str) -> Document:
    """Read and check the YAML.

    Raises:
        Misconfigured: names the first wrong field by its path.
    """
    try:
        return Document.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Misconfigured(f"not YAML{f', line {mark.line + 1}' if mark else ''}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise Misconfigured(f"{path or 'document'}: {first['msg'].removeprefix('Value error, ')}") from None


def apply_document(db: psycopg.Connection[Any], document: Document) -> dict[str, int]:
    """Write the document in one transaction: inserts and updates, never deletes.

    Raises:
        Misconfigured: a meter would change what it counts, two meters would spoil each other's values in
            Stripe, or a customer with billing periods has no Stripe id.
    """
    meters = [(tenant.id, meter) for tenant in document.tenants for meter in tenant.meters]
    customers = [(tenant, customer) for tenant in document.tenants for customer in tenant.customers]
    with db.transaction():
        db.execute("LOCK TABLE meters IN SHARE ROW EXCLUSIVE MODE")  # two files at once: one after the other
        _refuse_another_meaning(db, meters)
        cursor = db.cursor()
        cursor.executemany(
            "INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s) "
            "ON CONFLICT (tenant_id) DO UPDATE SET timezone = excluded.timezone",
            [(tenant.id, tenant.timezone) for tenant in document.tenants],
        )
        cursor.executemany(
            "INSERT INTO meters (tenant_id, meter, aggregation, value_property, dimensions, unit, scale, "
            "lateness_seconds, late_policy, allow_negative, event_name, customer_payload_key, "
            "value_payload_key) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (tenant_id, meter) DO UPDATE SET "
            "unit = excluded.unit, scale = excluded.scale, lateness_seconds = excluded.lateness_seconds, "
            "late_policy = excluded.late_policy, allow_negative = excluded.allow_negative, "
            "event_name = excluded.event_name, customer_payload_key = excluded.customer_payload_key, "
            "value_payload_key = excluded.value_payload_key",
            [
                (
                    tenant_id,
                    meter.slug,
                    meter.aggregation,
                    meter.value_property,
                    meter.dimensions,
                    meter.unit,
                    meter.scale,
                    int(duration(meter.lateness).total_seconds()),
                    meter.late_policy,
                    meter.stripe.allow_negative,
                    meter.stripe.event_name,
                    meter.stripe.customer_key,
                    meter.stripe.value_key,
                )
                for tenant_id, meter in meters
            ],
        )
        _refuse_shared_event_names(db)
        _write_customers(db, customers)
    return {"tenants": len(document.tenants), "meters": len(meters), "customers": len(customers)}


def _refuse_another_meaning(db: psycopg.Connection[Any], meters: list[tuple[str, MeterSpec]]) -> None:
    """What a stored meter counts, of which value, and split by what, stays as it is."""
    wanted: dict[tuple[str, str], tuple[str, str | None, list[str]]] = {}
    for tenant_id, meter in meters:
        meaning = (meter.aggregation, meter.value_property, meter.dimensions)
        if wanted.setdefault((tenant_id, meter.slug), meaning) != meaning:
            raise Misconfigured(f"meter {tenant_id}/{meter.slug} is declared twice, in two ways: keep one")
    rows = db.execute(
        "SELECT m.tenant_id, m.meter, m.aggregation, m.value_property, m.dimensions FROM meters m "
        "JOIN unnest(%s::text[], %s::text[]) AS u (t, s) ON (m.tenant_id, m.meter) = (u.t, u.s)",
        ([tenant_id for tenant_id, _ in wanted], [slug for _, slug in wanted]),
    ).fetchall()
    for tenant_id, slug, aggregation, value, dimensions in rows:
        other_aggregation, other_value, other_dimensions = wanted[tenant_id, slug]
        if aggregation != other_aggregation:
            stored = f"aggregates by {aggregation}"
        elif value != other_value:
            stored = f"takes its value from {_PROPERTIES + value if value else 'quantity'}"
        elif dimensions != other_dimensions:
            stored = f"has the dimensions {', '.join(dimensions)}" if dimensions else "has no dimensions"
        else:
            continue
        raise Misconfigured(
            f"meter {tenant_id}/{slug} {stored}; what is counted cannot change its meaning: "
            "declare a new meter"
        )


def _refuse_shared_event_names(db: psycopg.Connection[Any]) -> None:
    """The value of a `last` meter would be replaced by those of another meter that arrives under its name."""
    row = db.execute(
        "SELECT a.tenant_id, a.meter, b.tenant_id, b.meter, event_name FROM meters a "
        "JOIN meters b USING (event_name) WHERE a.aggregation = 'last' AND (b.aggregation <> 'last' "
        "OR (a.tenant_id = b.tenant_id AND a.meter <> b.meter)) ORDER BY 1, 2, 3, 4 LIMIT 1"
    ).fetchone()
    if row is not None:
        raise Misconfigured(
            f"the last meter {row[0]}/{row[1]} and the meter {row[2]}/{row[3]} share the event_name "
            f"{row[4]}: give them different ones, or each would overwrite the other's values in Stripe"
        )


def _write_customers(db: psycopg.Connection[Any], customers: list[tuple[TenantSpec, CustomerSpec]]) -> None:
    rows = db.execute(
        "SELECT c.tenant_id, c.customer_ref, c.stripe_customer, c.calendar FROM customers c "
        "JOIN unnest(%s::text[], %s::text[]) AS u (t, r) ON (c.tenant_id, c.customer_ref) = (u.t, u.r) "
        "ORDER BY 1, 2 FOR UPDATE OF c",
        ([tenant.id for tenant, _ in customers], [customer.ref for _, customer in customers]),
    ).fetchall()
    stored = {(row[0], row[1]): (row[2], row[3]) for row in rows}
    mapped, billed = [], []
    for tenant, customer in customers:
        known, calendar = stored.get((tenant.id, customer.ref), (None, None))
        calendar = customer.calendar(tenant.timezone, calendar)
        itself = customer.ref if calendar and _MAPS_TO_ITSELF.fullmatch(customer.ref) else None
        row = (tenant.id, customer.ref, customer.stripe or known or itself)
        if row[2] is not None:
            stored[row[:2]] = row[2], calendar
            if customer.names_periods():
                billed.append((*row, calendar))
            else:
                mapped.append(row)
        elif calendar is not None:
            raise Misconfigured(
                f"customer {tenant.id}/{customer.ref} has billing periods but no Stripe id: add "
                "`stripe: cus_…`, or run with --create-in-stripe"
            )
    cursor = db.cursor()
    cursor.executemany(
        "INSERT INTO customers (tenant_id, customer_ref, stripe_customer) VALUES (%s, %s, %s) "
        "ON CONFLICT (tenant_id, customer_ref) DO UPDATE SET stripe_customer = excluded.stripe_customer",
        mapped,
    )
    cursor.executemany(
        "INSERT INTO customers (tenant_id, customer_ref, stripe_customer, calendar) VALUES (%s, %s, %s, %s) "
        "ON CONFLICT (tenant_id, customer_ref) DO UPDATE SET "
        "stripe_customer = excluded.stripe_customer, calendar = excluded.calendar",
        billed,
    )


def create_in_stripe(
    document: Document, settings: Settings, known: Mapping[tuple[str, str], str]
) -> Document:
    """Create the Stripe meters and customers that are missing; returns the document with customer ids.

    ``known`` holds the Stripe id of every (tenant, customer reference) that has one.

    Raises:
        Misconfigured: Stripe refuses; the message holds its code, not its text. Or its meter of that name has
            another formula than ours needs.
    """
    import stripe

    stripe.enable_telemetry = False
    addresses: Any = {"api": settings.stripe_api_base} if settings.stripe_api_base else None
    client = stripe.StripeClient(settings.stripe_key(), base_addresses=addresses, max_network_retries=2)
    try:
        present: dict[str, str] = {}
        for found in client.v1.billing.meters.list({"limit": 100}).auto_paging_iter():
            if found.status == "active" or found.event_name not in present:
                present[found.event_name] = found.default_aggregation.formula
        for meter in _missing_meters(document, present):
            client.v1.billing.meters.create(_stripe_meter(meter))
        return Document(tenants=[_with_customers(client, tenant, known) for tenant in document.tenants])
    except stripe.StripeError as error:
        raise Misconfigured(f"Stripe refused: {type(error).__name__} ({error.http_status})") from None


def _missing_meters(document: Document, present: Mapping[str, str]) -> list[MeterSpec]:
    """One meter for each event name that Stripe does not have; all are checked before any is made."""
    formulas, missing = dict(present), []
    for tenant in document.tenants:
        for meter in tenant.meters:
            name = meter.stripe.event_name
            if name not in formulas:
                formulas[name] = meter.formula
                missing.append(meter)
            elif formulas[name] != meter.formula:
                raise Misconfigured(
                    f"the Stripe meter {name} has the formula {formulas[name]}, but {tenant.id}/{meter.slug} "
                    f"({meter.aggregation}) needs {meter.formula}: give it another stripe.event_name"
                )
    return missing


def _stripe_meter(meter: MeterSpec) -> Any:
    return {
        "display_name": meter.slug,
        "event_name": meter.stripe.event_name,
        "default_aggregation": {"formula": meter.formula},
        "customer_mapping": {"type": "by_id", "event_payload_key": meter.stripe.customer_key},
        "value_settings": {"event_payload_key": meter.stripe.value_key},
    }


def _with_customers(client: Any, tenant: TenantSpec, known: Mapping[tuple[str, str], str]) -> TenantSpec:
    customers = [
        customer
        if customer.stripe is not None
        else customer.model_copy(
            update={
                "stripe": known.get((tenant.id, customer.ref))
                or client.v1.customers.create(
                    {"metadata": {"tidemeter_tenant": tenant.id, "tidemeter_ref": customer.ref}},
                    {"idempotency_key": f"tidemeter-customer-{tenant.id}-{customer.ref}"[:255]},
                ).id
            }
        )
        for customer in tenant.customers
    ]
    return tenant.model_copy(update={"customers": customers})


def apply(
    file: Annotated[Path, typer.Option("-f", "--file", help="YAML file, or - for standard input.")],
    in_stripe: Annotated[
        bool, typer.Option("--create-in-stripe", help="Also create missing Stripe meters and customers.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Create or update tenants, meters and customers. Safe to repeat; deletes nothing.

    Example: tidemeter apply -f deploy/example.yaml --create-in-stripe
    """
    try:
        text = typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise fail(f"cannot read {file}: {error.strerror}", MISUSED) from None
    with sentences():
        document = parse_document(text)
        settings = load_settings()
        with database(settings) as db:
            if in_stripe:
                rows = db.execute("SELECT tenant_id, customer_ref, stripe_customer FROM customers").fetchall()
                document = create_in_stripe(document, settings, {(row[0], row[1]): row[2] for row in rows})
            counts = apply_document(db, document)
    typer.echo(
        json.dumps(counts) if as_json else ", ".join(f"{n} {name}" for name, n in counts.items()) + " applied"
    )
