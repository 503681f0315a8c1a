"""The rules of one usage event: limits, exact quantities, identity and content.

Shared by the HTTP API, the producer client, the command line and the counters, so that an event is either
refused everywhere, for the same reason, or means the same everywhere. Pure: no clock, no I/O.

A refusal is :class:`services.wire.errors.Invalid`: a stable reason code, the field, and a sentence that names
the rule but never the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, Inexact, InvalidOperation
from hashlib import blake2b
from typing import Any

import msgspec

from schemas.catalog import current
from services.wire.codec import VALUE_BYTES_MAX, Encoder, Record
from services.wire.errors import Invalid

QUANTITY_SCALE = 9
QUANTITY_UNIT: int = 10**QUANTITY_SCALE
#: Greatest absolute quantity, in whole units: what a double still counts one by one, as other systems do.
QUANTITY_MAX: int = 2**53
QUANTITY_BYTES = 16

FUTURE_TOLERANCE_US = 5 * 60 * 1_000_000
#: 2000-01-01T00:00:00Z in microseconds: earlier times are mistakes (seconds for milliseconds, zero dates).
EARLIEST_US = 946_684_800_000_000

TENANT_CHARS_MAX = 64
CUSTOMER_CHARS_MAX = 255
METER_CHARS_MAX = 100
IDEMPOTENCY_KEY_CHARS_MAX = 255
PROPERTIES_MAX = 50
PROPERTY_KEY_CHARS_MAX = 100
PROPERTY_VALUE_CHARS_MAX = 500

TENANT_PATTERN = r"[a-z0-9][a-z0-9_-]*"
METER_PATTERN = r"[a-z0-9][a-z0-9_.-]*"

_TENANT = re.compile(TENANT_PATTERN)
_METER = re.compile(METER_PATTERN)
_CONTROL = re.compile("[\x00-\x1f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|s?nan[0-9]*|inf(?:inity)?)", re.IGNORECASE)

_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})?"
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ONE_BILLIONTH = Decimal(1).scaleb(-QUANTITY_SCALE)
_MAX = Decimal(QUANTITY_MAX)
#: Exponents of the first digit outside of which no value can be stored: 10**16 > 2**53, and 10**-10.
_ADJUSTED_MAX, _ADJUSTED_MIN = 15, -QUANTITY_SCALE
#: Wide enough for sixteen digits before the point and nine behind it; a lost digit is an error.
_EXACT = Context(prec=40, traps=[Inexact, InvalidOperation])


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One use of a metered thing, as a producer states it; unchecked until :func:`to_record`.

    ``occurred_at`` is an aware datetime, or None for "when it arrives". ``quantity`` is exact: no floats.
    """

    tenant_id: str
    customer_ref: str
    meter: str
    quantity: Decimal | int | str
    idempotency_key: str
    occurred_at: datetime | None = None
    properties: Mapping[str, str] = field(default_factory=dict)


def parse_quantity(value: Decimal | int | str) -> int:
    """``value`` in billionths, exactly.

    Text is a decimal number as JSON writes one; leading zeros are allowed. Trailing zeros carry no precision:
    ``1.0000000000000`` is 1. Negative quantities pass here, because a meter may allow them; the counters
    dead-letter them for a meter that does not.

    Raises:
        Invalid: ``quantity_missing``, ``quantity_not_a_number`` (booleans and floats too),
            ``quantity_not_finite``, ``quantity_negative_zero``, ``quantity_out_of_range`` (beyond 2**53 whole
            units) or ``quantity_too_precise`` (more than nine places).
    """
    if isinstance(value, str):
        value = _number_of_text(value)
    elif value is None:
        raise _bad_quantity("quantity_missing", "a quantity is required")
    if isinstance(value, int) and not isinstance(value, bool):
        if -QUANTITY_MAX <= value <= QUANTITY_MAX:
            return value * QUANTITY_UNIT
        raise _out_of_range()
    if isinstance(value, Decimal):
        return _billionths(value)
    raise _bad_quantity("quantity_not_a_number", "must be a number or its decimal text; floats are not exact")


def _number_of_text(text: str) -> Decimal | int:
    if len(text) <= _ADJUSTED_MAX and text.isdigit() and text.isascii():
        return int(text)
    number = _NUMBER.fullmatch(text)
    if number is None:
        if not text or text.isspace():
            raise _bad_quantity("quantity_missing", "must not be empty")
        if _NOT_FINITE.fullmatch(text):
            raise _bad_quantity("quantity_not_finite", "must be a finite number")
        raise _bad_quantity("quantity_not_a_number", "must be a decimal number such as 12.5")
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond what decimal can hold
        whole, fraction, exponent = number.groups()
    if not (whole + (fraction or "")).strip("0"):
        return Decimal("-0") if text.startswith("-") else 0
    raise _too_precise() if exponent.startswith("-") else _out_of_range()


def _billionths(value: Decimal) -> int:
    if not value.is_finite():
        raise _bad_quantity("quantity_not_finite", "must be a finite number")
    if value.is_zero():
        if value.is_signed():
            raise _bad_quantity("quantity_negative_zero", "must not be negative zero")
        return 0
    # Judged by the exponent first: arithmetic on 1e999999999 would need a gigabyte.
    adjusted = value.adjusted()
    if adjusted > _ADJUSTED_MAX or (adjusted == _ADJUSTED_MAX and value.copy_abs().compare(_MAX, _EXACT) > 0):
        raise _out_of_range()
    if adjusted < _ADJUSTED_MIN:
        raise _too_precise()
    try:
        return int(value.quantize(_ONE_BILLIONTH, context=_EXACT).scaleb(QUANTITY_SCALE, _EXACT))
    except Inexact:
        raise _too_precise() from None


def _bad_quantity(reason: str, message: str) -> Invalid:
    return Invalid(reason, "quantity", message)


def _out_of_range() -> Invalid:
    return _bad_quantity("quantity_out_of_range", f"must lie within ±{QUANTITY_MAX}")


def _too_precise() -> Invalid:
    return _bad_quantity("quantity_too_precise", f"has more than {QUANTITY_SCALE} decimal places")


def to_record(event: UsageEvent, *, source: str, now_us: int) -> Record:
    """``event`` as a usage_event/3 record, checked.

    ``source`` names what wrote the record (``api``, ``producer``, ``cli``) and is trusted; ``now_us`` is the
    current time in microseconds.

    Raises:
        Invalid: the reason of the first rule broken. Besides those of :func:`parse_quantity`:
            ``<field>_missing``, ``<field>_invalid``, ``<field>_too_long`` (fields ``tenant_id``,
            ``customer_ref``, ``meter``, ``idempotency_key``), ``control_character``, ``lone_surrogate``,
            ``timestamp_invalid``, ``timestamp_naive``, ``timestamp_in_future``, ``timestamp_out_of_range``,
            ``properties_invalid``, ``properties_too_many``, ``property_key_invalid``,
            ``property_value_invalid``, ``property_value_too_long``.
    """
    check_text(event.tenant_id, "tenant_id", TENANT_CHARS_MAX, _TENANT)
    check_text(event.customer_ref, "customer_ref", CUSTOMER_CHARS_MAX)
    check_text(event.meter, "meter", METER_CHARS_MAX, _METER)
    check_text(event.idempotency_key, "idempotency_key", IDEMPOTENCY_KEY_CHARS_MAX)
    quantity = parse_quantity(event.quantity)
    occurred_at = None if event.occurred_at is None else _micros(event.occurred_at, now_us)
    return {
        "idempotency_key": event.idempotency_key,
        "tenant_id": event.tenant_id,
        "customer_ref": event.customer_ref,
        "meter": event.meter,
        "quantity": quantity.to_bytes(QUANTITY_BYTES, "big", signed=True),
        "occurred_at": occurred_at,
        "properties": _checked_properties(event.properties) if event.properties else {},
        "source": source,
    }


def check_text(text: Any, name: str, chars_max: int, form: re.Pattern[str] | None = None) -> None:
    """Refuse ``text`` unless it is 1 to ``chars_max`` characters without C0 controls and lone surrogates.

    Raises:
        Invalid: ``<name>_missing``, ``<name>_invalid``, ``<name>_too_long``, ``control_character`` or
            ``lone_surrogate``.
    """
    if not isinstance(text, str):
        if text is None:
            raise Invalid(f"{name}_missing", name, "is required")
        raise Invalid(f"{name}_invalid", name, "must be text")
    if not text:
        raise Invalid(f"{name}_missing", name, "must not be empty")
    if len(text) > chars_max:
        raise Invalid(f"{name}_too_long", name, f"has more than {chars_max} characters")
    _check_characters(text, name)
    if form is not None and form.fullmatch(text) is None:
        raise Invalid(f"{name}_invalid", name, f"must match {form.pattern}")


def _check_characters(text: str, path: str) -> None:
    if text.isprintable():  # the common case; also false for harmless characters, hence the rest
        return
    if _CONTROL.search(text):
        raise Invalid("control_character", path, "must not contain control characters")
    if _SURROGATE.search(text):
        raise Invalid("lone_surrogate", path, "is not valid Unicode: it contains half of a surrogate pair")


def _checked_properties(properties: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(properties, Mapping):
        raise Invalid("properties_invalid", "properties", "must be an object")
    if len(properties) > PROPERTIES_MAX:
        raise Invalid("properties_too_many", "properties", f"has more than {PROPERTIES_MAX} entries")
    for key, value in properties.items():
        if not isinstance(key, str) or not 1 <= len(key) <= PROPERTY_KEY_CHARS_MAX:
            raise Invalid(
                "property_key_invalid",
                "properties",
                f"keys must have 1 to {PROPERTY_KEY_CHARS_MAX} characters",
            )
        if not isinstance(value, str):
            raise Invalid("property_value_invalid", "properties", "values must be text")
        if len(value) > PROPERTY_VALUE_CHARS_MAX:
            raise Invalid(
                "property_value_too_long",
                "properties",
                f"a value has more than {PROPERTY_VALUE_CHARS_MAX} characters",
            )
        _check_characters(key, "properties")
        _check_characters(value, "properties")
    return dict(properties)


def _micros(moment: datetime, now_us: int) -> int:
    if not isinstance(moment, datetime):
        raise Invalid("timestamp_invalid", "occurred_at", "must be a point in time")
    if moment.utcoffset() is None:
        raise Invalid("timestamp_naive", "occurred_at", "needs an offset from UTC, such as Z or +01:00")
    micros = (moment - _EPOCH) // _MICROSECOND
    if micros > now_us + FUTURE_TOLERANCE_US:
        raise Invalid("timestamp_in_future", "occurred_at", "is more than five minutes ahead")
    if micros < EARLIEST_US:
        raise Invalid("timestamp_out_of_range", "occurred_at", "is before 2000-01-01")
    return micros


def parse_timestamp(text: str) -> datetime:
    """An RFC 3339 date and time with an offset; digits beyond microseconds are cut off.

    Raises:
        Invalid: ``timestamp_invalid``, or ``timestamp_naive`` when the offset is missing.
    """
    form = _RFC_3339.fullmatch(text)
    if form is None:
        raise Invalid("timestamp_invalid", "occurred_at", "must look like 2026-01-31T13:37:42.5Z (RFC 3339)")
    if form[1] is None:
        raise Invalid("timestamp_naive", "occurred_at", "needs an offset from UTC, such as Z or +01:00")
    try:
        return datetime.fromisoformat(text.upper())
    except ValueError:
        raise Invalid("timestamp_invalid", "occurred_at", "is no date and time that exists") from None


def usage_encoder(confluent_id: int | None = None) -> Encoder:
    """Writer of current usage events; ``confluent_id`` is the schema's id in a registry, if one is used."""
    return Encoder(current("usage_event"), confluent_id)


def encode_usage(encoder: Encoder, record: Record) -> bytes:
    """``record`` as a Kafka value, within the size that readers accept.

    Raises:
        Invalid: ``event_too_large``.
    """
    value = encoder.encode(record)
    if len(value) > VALUE_BYTES_MAX:
        raise Invalid("event_too_large", "properties", f"the event has more than {VALUE_BYTES_MAX} bytes")
    return value


_encode_json = msgspec.json.Encoder().encode

# One template per purpose: copying it is faster than a keyed constructor, and no two purposes share hashes.
_EVENT_ID = blake2b(digest_size=16, person=b"tidemeter.event")
_ITEM_ID = blake2b(digest_size=16, person=b"tidemeter.item")
_CONTENT = blake2b(digest_size=8, person=b"tidemeter.body")
_VALUE = blake2b(digest_size=16, person=b"tidemeter.value")


def record_key(tenant_id: str, customer_ref: str, meter: str) -> bytes:
    """Kafka key of an item: a compact JSON array, so that no two items share one."""
    return _encode_json((tenant_id, customer_ref, meter))


def event_id_hash(tenant_id: str, idempotency_key: str) -> bytes:
    """16 bytes that stand for an event's identity: its key inside its tenant."""
    state = _EVENT_ID.copy()
    state.update(f"{len(tenant_id)}:{tenant_id}{idempotency_key}".encode())
    return state.digest()


def item_id_hash(tenant_id: str, customer_ref: str, meter: str, *dimensions: str) -> bytes:
    """16 bytes that stand for a metered item; ``dimensions`` are the values that split it, in their order."""
    state = _ITEM_ID.copy()
    state.update(f"{len(tenant_id)}:{tenant_id}{len(customer_ref)}:{customer_ref}{meter}".encode())
    for value in dimensions:
        state.update(f"\x00{len(value)}:{value}".encode())  # no name of a meter holds a NUL
    return state.digest()


def value_hash(text: str) -> int:
    """Unsigned 128-bit hash that stands for a value of a meter that counts distinct ones."""
    state = _VALUE.copy()
    state.update(text.encode())
    return int.from_bytes(state.digest(), "big")


def content_digest(record: Record) -> int:
    """Signed 64-bit hash of what the producer sent: same key and same digest is a duplicate, else a conflict.

    Covers customer, meter, quantity, ``occurred_at`` (also whether it was given) and properties in any order;
    not the key, the tenant or ``source``. Every part is length-prefixed or of fixed form.
    """
    customer, meter = record["customer_ref"], record["meter"]
    state = _CONTENT.copy()
    state.update(f"{len(customer)}:{customer}{len(meter)}:{meter}{record['occurred_at']};".encode())
    state.update(record["quantity"])
    if properties := record["properties"]:
        state.update(
            "".join(
                f"{len(key)}:{key}{len(properties[key])}:{properties[key]}" for key in sorted(properties)
            ).encode()
        )
    return int.from_bytes(state.digest(), "big", signed=True)
