"""From the body of a request to usage records, or to the reason why one event is refused. Pure.

Two readers that agree. The fast one (msgspec, typed) takes what is right throughout. Whatever it refuses goes
to the patient one (the standard library), which understands ``NaN``, lone surrogates and wrong types well
enough to name the event and the field, so that one bad event never costs a batch its good ones. Numbers are
kept as the text that was sent: no float is involved, and ``-0`` is seen.

Unknown fields are refused: a misspelt ``ts`` that was ignored would silently move usage to another period.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any
from urllib.parse import quote

import msgspec

from services.web.problems import RequestRefused
from services.wire.codec import Record
from services.wire.errors import Invalid
from services.wire.usage import (
    IDEMPOTENCY_KEY_CHARS_MAX,
    UsageEvent,
    check_text,
    parse_timestamp,
    to_record,
)

JSON = "application/json"
CLOUDEVENT = "application/cloudevents+json"
CLOUDEVENT_BATCH = "application/cloudevents-batch+json"
MEDIA_TYPES = (JSON, CLOUDEVENT, CLOUDEVENT_BATCH)

#: What the fields of :class:`UsageEvent` are called in a request.
FIELD_NAMES: Mapping[str, str] = {
    "tenant_id": "tenantId",
    "customer_ref": "customerRef",
    "meter": "metric",
    "quantity": "quantity",
    "idempotency_key": "idempotencyKey",
    "occurred_at": "ts",
    "properties": "meta",
}
_CLOUDEVENT_NAMES: Mapping[str, str] = {
    **{ours: f"data.{theirs}" for ours, theirs in FIELD_NAMES.items()},
    "idempotency_key": "id",
    "occurred_at": "time",
}
DATA_FIELDS = frozenset({"tenantId", "metric", "meter", "customerRef", "quantity", "meta", "properties"})
EVENT_FIELDS = DATA_FIELDS | {"ts", "idempotencyKey"}

#: Of the Idempotency-Key header: printable ASCII that neither begins nor ends with a space.
HEADER_KEY_PATTERN = r"[!-~](?:[ -~]*[!-~])?"

_HEADER_KEY = re.compile(HEADER_KEY_PATTERN)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
_CLOUDEVENT_TEXT_CHARS_MAX = 2048
_NOT_FINITE = frozenset({"NaN", "Infinity", "-Infinity"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends: the tenant of the API key (None: an operator's key) and the ``Idempotency-Key`` header."""

    tenant_id: str | None
    header_key: str | None = None


def caller_of(tenant_id: str | None, header_key: str | None) -> Caller:
    """The caller of a request.

    Raises:
        RequestRefused: 400 ``idempotency_key_invalid``: the header is malformed, whether it is needed or not.
    """
    if header_key is not None and (
        len(header_key) > IDEMPOTENCY_KEY_CHARS_MAX or _HEADER_KEY.fullmatch(header_key) is None
    ):
        raise RequestRefused(
            400,
            "idempotency_key_invalid",
            f"must be 1 to {IDEMPOTENCY_KEY_CHARS_MAX} printable ASCII characters",
            path="Idempotency-Key",
        )
    return Caller(tenant_id, header_key)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one event is not taken. ``idempotency_key`` is None unless it is itself well-formed."""

    code: str
    path: str
    message: str
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The events of one body, in order, with how their fields are named and addressed in it."""

    events: list[UsageEvent | Refusal]
    prefix: str
    names: Mapping[str, str]

    def check(self, *, source: str, now_us: int) -> list[Record | Refusal]:
        """Each event as a record, or the first rule it breaks. ``now_us`` is in microseconds."""
        checked: list[Record | Refusal] = []
        for index, event in enumerate(self.events):
            outcome: Record | Refusal
            if isinstance(event, Refusal):
                outcome = event
            else:
                try:
                    outcome = to_record(event, source=source, now_us=now_us)
                except Invalid as error:
                    outcome = refusal_of(error, event.idempotency_key, self.names)
            if isinstance(outcome, Refusal):
                outcome = replace(outcome, path=self.path(index, outcome.path))
            checked.append(outcome)
        return checked

    def path(self, index: int, name: str) -> str:
        """``name`` of event ``index`` as a path in the body."""
        return (self.prefix.format(index) + name).rstrip(".")


def refusal_of(error: Invalid, idempotency_key: object, names: Mapping[str, str] = FIELD_NAMES) -> Refusal:
    """A broken rule in the words of the request; the key is repeated only if it is well-formed."""
    try:
        check_text(idempotency_key, "idempotency_key", IDEMPOTENCY_KEY_CHARS_MAX)
        key = str(idempotency_key)
    except Invalid:
        key = None
    return Refusal(error.reason, names.get(error.path, error.path), str(error), key)


def read_batch(body: bytes, media_type: str, caller: Caller, *, events_max: int) -> Batch:
    """The events of a body. They are complete, but not yet checked by the rules of one event.

    Raises:
        RequestRefused: 400 ``body_not_json``, ``body_invalid`` or ``no_events``; 413 ``too_many_events``.
    """
    if media_type == JSON:
        try:
            batch = _read_fast(body, caller, events_max)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            batch = None
        if batch is not None:
            return batch
    return _read_patiently(_load(body), media_type, caller, events_max)


def event_of_mapping(fields: Mapping[str, object], caller: Caller) -> UsageEvent:
    """One event from a mapping with the field names of the API.

    Raises:
        Invalid: a field is unknown, given twice, of a wrong type, or of another tenant.
    """
    _refuse_unknown(fields, EVENT_FIELDS, "")
    return _event(
        caller,
        tenant_id=_plain(fields.get("tenantId")),
        metric=_plain(fields.get("metric")),
        meter=_plain(fields.get("meter")),
        customer_ref=_plain(fields.get("customerRef")),
        quantity=fields.get("quantity"),
        ts=_plain(fields.get("ts")),
        key=_plain(fields.get("idempotencyKey")),
        meta=_texts(fields.get("meta")),
        properties=_texts(fields.get("properties")),
    )


def _event(
    caller: Caller,
    *,
    tenant_id: Any,
    metric: Any,
    meter: Any,
    customer_ref: Any,
    quantity: Any,
    ts: Any,
    key: Any,
    meta: dict[str, str] | None,
    properties: dict[str, str] | None,
) -> UsageEvent:
    if metric is not None and meter is not None:
        raise Invalid("field_given_twice", "meter", "metric and meter are one field; give one of them")
    if meta is not None and properties is not None:
        raise Invalid(
            "field_given_twice", "properties", "meta and properties are one field; give one of them"
        )
    if tenant_id is None:
        tenant_id = caller.tenant_id
    elif caller.tenant_id is not None and tenant_id != caller.tenant_id:
        raise Invalid("tenant_forbidden", "tenant_id", "is not the tenant of this API key")
    if key is None:
        key = caller.header_key
    if ts is not None and not isinstance(ts, str):
        raise Invalid("timestamp_invalid", "occurred_at", "must be RFC 3339 text")
    return UsageEvent(
        tenant_id=tenant_id,
        customer_ref=customer_ref,
        meter=meter if metric is None else metric,
        quantity=quantity,
        idempotency_key=key,
        occurred_at=None if ts is None else parse_timestamp(ts),
        properties=meta or properties or {},
    )


def _bounded(count: int, events_max: int) -> None:
    if count == 0:
        raise RequestRefused(400, "no_events", "send at least one event", path="events")
    if count > events_max:
        raise RequestRefused(413, "too_many_events", f"more than {events_max} events", path="events")


# The fast reader ------------------------------------------------------------------------------------


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    tenantId: str | None = None
    metric: str | None = None
    meter: str | None = None
    customerRef: str | None = None
    quantity: msgspec.Raw = msgspec.Raw()
    ts: str | None = None
    idempotencyKey: str | None = None
    meta: dict[str, str] | None = None
    properties: dict[str, str] | None = None


class _Body(_Wire):
    events: list[_Wire] | msgspec.UnsetType = msgspec.UNSET


_NOTHING_ELSE = _Body(events=[])
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_list = msgspec.json.Decoder(list[_Wire]).decode
_decode_text = msgspec.json.Decoder(str).decode


def _read_fast(body: bytes, caller: Caller, events_max: int) -> Batch | None:
    """None, or any exception of msgspec: the patient reader shall say what is wrong."""
    if body.lstrip(b" \t\r\n")[:1] == b"[":
        wires, prefix = _decode_list(body), "[{}]."
    else:
        document = _decode_body(body)
        if document.events is msgspec.UNSET:
            wires, prefix = [document], ""
        else:
            wires, prefix = document.events, "events[{}]."
            document.events = []
            if document != _NOTHING_ELSE:
                return None
    _bounded(len(wires), events_max)
    if len(wires) > 1:
        caller = Caller(caller.tenant_id)
    return Batch([_event_of_wire(wire, caller) for wire in wires], prefix, FIELD_NAMES)


def _event_of_wire(wire: _Wire, caller: Caller) -> UsageEvent | Refusal:
    try:
        return _event(
            caller,
            tenant_id=wire.tenantId,
            metric=wire.metric,
            meter=wire.meter,
            customer_ref=wire.customerRef,
            quantity=_quantity_of_raw(bytes(wire.quantity)),
            ts=wire.ts,
            key=wire.idempotencyKey,
            meta=wire.meta,
            properties=wire.properties,
        )
    except Invalid as error:
        return refusal_of(error, wire.idempotencyKey)


def _quantity_of_raw(raw: bytes) -> str | bool | None:
    """The text of a number or string; None if there is none; True for what is neither."""
    first = raw[:1]
    if first == b'"':
        return _decode_text(raw)
    if not raw or raw == b"null":
        return None
    return raw.decode("ascii") if first in b"-0123456789" else True


# The patient reader ---------------------------------------------------------------------------------


class _Number(str):
    """A JSON number, or one of Python's three constants, as it was written."""

    __slots__ = ()


def _load(body: bytes) -> object:
    try:
        # Surrogates that were encoded singly pass here, and are refused in the field that holds them.
        text = body.decode("utf-8", "surrogatepass")
        return json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_Number)
    except UnicodeDecodeError:
        raise RequestRefused(400, "body_not_json", "the body is not UTF-8") from None
    except ValueError as error:
        where = (
            f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise RequestRefused(400, "body_not_json", f"the body is not JSON{where}") from None
    except RecursionError:
        raise RequestRefused(400, "body_not_json", "the body is nested too deeply") from None


def _read_patiently(document: object, media_type: str, caller: Caller, events_max: int) -> Batch:
    if media_type == CLOUDEVENT_BATCH or (media_type == JSON and isinstance(document, list)):
        members, prefix = document, "[{}]."
    elif media_type == JSON and isinstance(document, dict) and "events" in document:
        if len(document) > 1:
            raise RequestRefused(400, "body_invalid", "no field is allowed beside events")
        members, prefix = document["events"], "events[{}]."
    elif isinstance(document, dict):
        members, prefix = [document], ""
    else:
        members, prefix = None, ""
    if not isinstance(members, list):
        raise RequestRefused(
            400, "body_invalid", "the body must hold an event or a list of events", path="events"
        )
    _bounded(len(members), events_max)
    if len(members) > 1:
        caller = Caller(caller.tenant_id)
    if media_type == JSON:
        return Batch([_event_of_object(member, caller) for member in members], prefix, FIELD_NAMES)
    return Batch([_event_of_cloudevent(member, caller) for member in members], prefix, _CLOUDEVENT_NAMES)


def _event_of_object(member: object, caller: Caller) -> UsageEvent | Refusal:
    if not isinstance(member, dict):
        return Refusal("event_invalid", "", "an event must be an object")
    try:
        return event_of_mapping({**member, "quantity": _quantity(member.get("quantity"))}, caller)
    except Invalid as error:
        return refusal_of(error, _plain(member.get("idempotencyKey")))


def _event_of_cloudevent(member: object, caller: Caller) -> UsageEvent | Refusal:
    if not isinstance(member, dict):
        return Refusal("event_invalid", "", "an event must be an object")
    try:
        return _cloudevent(member, caller)
    except Invalid as error:
        return refusal_of(error, None, _CLOUDEVENT_NAMES)


def _cloudevent(member: dict[str, Any], caller: Caller) -> UsageEvent:
    if _plain(member.get("specversion")) != "1.0":
        raise Invalid("specversion_invalid", "specversion", 'must be "1.0"')
    for name in ("id", "source", "type"):
        check_text(_plain(member.get(name)), name, _CLOUDEVENT_TEXT_CHARS_MAX)
    content_type = _plain(member.get("datacontenttype"))
    if content_type is not None and str(content_type).partition(";")[0].strip().lower() != JSON:
        raise Invalid("datacontenttype_invalid", "datacontenttype", f"must be {JSON}")
    data = member.get("data")
    if not isinstance(data, dict):
        raise Invalid("data_missing" if data is None else "data_invalid", "data", "must be an object")
    _refuse_unknown(data, DATA_FIELDS, "data.")
    customer_ref = _plain(data.get("customerRef"))
    return _event(
        caller,
        tenant_id=_plain(data.get("tenantId")),
        metric=_plain(data.get("metric")),
        meter=_plain(data.get("meter")),
        customer_ref=_plain(member.get("subject")) if customer_ref is None else customer_ref,
        quantity=_quantity(data.get("quantity")),
        ts=_plain(member.get("time")),
        key=cloudevent_key(member["source"], member["id"]),
        meta=_texts(data.get("meta")),
        properties=_texts(data.get("properties")),
    )


def cloudevent_key(source: str, event_id: str) -> str:
    """The idempotency key of a CloudEvent: ``source/id``, hashed when that is too long for a key.

    A slash or per cent sign inside the id is percent-encoded, so that no two (source, id) share a key.
    """
    key = f"{source}/{quote(event_id, safe='') if '/' in event_id or '%' in event_id else event_id}"
    if len(key) <= IDEMPOTENCY_KEY_CHARS_MAX:
        return key
    return "cloudevent:" + blake2b(key.encode(), digest_size=32, person=b"tidemeter.cloud").hexdigest()


def _refuse_unknown(fields: Mapping[str, object], known: frozenset[str], prefix: str) -> None:
    unknown = fields.keys() - known
    if unknown:
        name = min(unknown)
        path = prefix + name if _NAME.fullmatch(name) else prefix
        raise Invalid("field_unknown", path, "is not a field of an event; put free properties into meta")


def _quantity(value: object) -> object:
    """Numbers and text as text; anything else but None as True, which no quantity is."""
    if value is None or isinstance(value, str):
        return value
    return True


def _plain(value: object) -> object:
    """``value``, with numbers as something that cannot pass for text."""
    return 0 if isinstance(value, _Number) else value


def _texts(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Invalid("properties_invalid", "properties", "must be an object")
    return {key: _text_of_scalar(scalar) for key, scalar in value.items()}


def _text_of_scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str) or (isinstance(value, _Number) and value in _NOT_FINITE):
        raise Invalid("property_value_invalid", "properties", "values must be text, numbers or booleans")
    return str(value)
