"""``tidemeter apply``: tenants, meters and customers are data, described in one YAML file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import psycopg
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.cli.common import MISUSED, JsonFlag, database, fail, sentences
from services.counters.periods import Calendar
from services.wire.errors import Misconfigured
from services.wire.settings import Settings, load_settings

_DURATION = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StripeMeter(_Part):
    """How a meter maps to Stripe's: event name and payload keys."""

    event_name: str = Field(min_length=1, max_length=100)
    customer_key: str = Field("stripe_customer_id", min_length=1, max_length=100)
    value_key: str = Field("value", min_length=1, max_length=100)
    allow_negative: bool = False


class MeterSpec(_Part):
    """One meter. ``lateness`` is a duration such as 48h, at most 35d."""

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,99}$")
    aggregation: Literal["sum", "count"] = "sum"
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


class CustomerSpec(_Part):
    """One customer: our reference and Stripe's id. ``stripe`` may be left out with --create-in-stripe."""

    ref: str = Field(min_length=1, max_length=255)
    stripe: str | None = Field(None, min_length=1, max_length=255)


class TenantSpec(_Part):
    """One tenant with its meters and customers."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    timezone: str = "UTC"
    meters: list[MeterSpec] = []
    customers: list[CustomerSpec] = []

    @field_validator("timezone")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            Calendar(name)
        except Misconfigured as error:
            raise ValueError(str(error)) from None
        return name


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
        raise Misconfigured(f"{path or 'document'}: {first['msg']}") from None


def apply_document(db: psycopg.Connection[Any], document: Document) -> dict[str, int]:
    """Write the document in one transaction: inserts and updates, never deletes."""
    meters = [(tenant.id, meter) for tenant in document.tenants for meter in tenant.meters]
    customers = [(tenant.id, one.ref, one.stripe) for tenant in document.tenants for one in tenant.customers]
    with db.transaction():
        cursor = db.cursor()
        cursor.executemany(
            "INSERT INTO tenants (tenant_id, timezone) VALUES (%s, %s) "
            "ON CONFLICT (tenant_id) DO UPDATE SET timezone = excluded.timezone",
            [(tenant.id, tenant.timezone) for tenant in document.tenants],
        )
        cursor.executemany(
            "INSERT INTO meters (tenant_id, meter, aggregation, unit, scale, lateness_seconds, late_policy, "
            "allow_negative, event_name, customer_payload_key, value_payload_key) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
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
        _refuse_changed_aggregation(db, meters)
        cursor.executemany(
            "INSERT INTO customers (tenant_id, customer_ref, stripe_customer) VALUES (%s, %s, %s) "
            "ON CONFLICT (tenant_id, customer_ref) DO UPDATE SET stripe_customer = excluded.stripe_customer",
            [row for row in customers if row[2] is not None],
        )
    return {"tenants": len(document.tenants), "meters": len(meters), "customers": len(customers)}


def _refuse_changed_aggregation(db: psycopg.Connection[Any], meters: list[tuple[str, MeterSpec]]) -> None:
    for tenant_id, meter in meters:
        row = db.execute(
            "SELECT aggregation FROM meters WHERE tenant_id = %s AND meter = %s", (tenant_id, meter.slug)
        ).fetchone()
        if row is not None and row[0] != meter.aggregation:
            raise Misconfigured(
                f"meter {tenant_id}/{meter.slug} aggregates by {row[0]}; what is counted cannot change its "
                "meaning: declare a new meter"
            )


def create_in_stripe(
    document: Document, settings: Settings, known: Mapping[tuple[str, str], str]
) -> Document:
    """Create the Stripe meters and customers that are missing; returns the document with customer ids.

    ``known`` holds the Stripe id of every (tenant, customer reference) that has one.

    Raises:
        Misconfigured: Stripe refuses; the message holds its code, not its text.
    """
    import stripe

    stripe.enable_telemetry = False
    addresses: Any = {"api": settings.stripe_api_base} if settings.stripe_api_base else None
    client = stripe.StripeClient(settings.stripe_key(), base_addresses=addresses, max_network_retries=2)
    try:
        present = {m.event_name for m in client.v1.billing.meters.list({"limit": 100}).auto_paging_iter()}
        for tenant in document.tenants:
            for meter in tenant.meters:
                if meter.stripe.event_name not in present:
                    present.add(meter.stripe.event_name)
                    client.v1.billing.meters.create(_stripe_meter(meter))
        return Document(tenants=[_with_customers(client, tenant, known) for tenant in document.tenants])
    except stripe.StripeError as error:
        raise Misconfigured(f"Stripe refused: {type(error).__name__} ({error.http_status})") from None


def _stripe_meter(meter: MeterSpec) -> Any:
    return {
        "display_name": meter.slug,
        "event_name": meter.stripe.event_name,
        "default_aggregation": {"formula": "sum"},
        "customer_mapping": {"type": "by_id", "event_payload_key": meter.stripe.customer_key},
        "value_settings": {"event_payload_key": meter.stripe.value_key},
    }


def _with_customers(client: Any, tenant: TenantSpec, known: Mapping[tuple[str, str], str]) -> TenantSpec:
    customers = [
        customer
        if customer.stripe is not None
        else CustomerSpec(
            ref=customer.ref,
            stripe=known.get((tenant.id, customer.ref))
            or client.v1.customers.create(
                {"metadata": {"tidemeter_tenant": tenant.id, "tidemeter_ref": customer.ref}},
                {"idempotency_key": f"tidemeter-customer-{tenant.id}-{customer.ref}"[:255]},
            ).id,
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
