"""The documentation of the API where the framework cannot derive it: request bodies, answers, examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import ScalarRenderPlugin
from litestar.openapi.spec import (
    Components,
    Example,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
    Tag,
)
from litestar.openapi.spec.enums import OpenAPIFormat

from services.ingest.answers import IngestAnswer
from services.ingest.limits import Limits
from services.ingest.parse import CLOUDEVENT, CLOUDEVENT_BATCH, HEADER_KEY_PATTERN, JSON
from services.web.docs import documented
from services.web.problems import Problem
from services.wire.usage import (
    CUSTOMER_CHARS_MAX,
    IDEMPOTENCY_KEY_CHARS_MAX,
    METER_CHARS_MAX,
    METER_PATTERN,
    PROPERTIES_MAX,
    PROPERTY_KEY_CHARS_MAX,
    PROPERTY_VALUE_CHARS_MAX,
    QUANTITY_MAX,
    QUANTITY_SCALE,
    TENANT_CHARS_MAX,
    TENANT_PATTERN,
)

VERSION = "1"
_EVENTS_MAX = Limits().events_max
_PRINTABLE = r"^[^\u0000-\u001f]*$"

DESCRIPTION = """\
Send usage, exactly once. Every event carries an `idempotencyKey`; sending it again, after an error or a lost
answer, never counts it twice. An event is called `accepted` once every in-sync Kafka replica has it.

* **Identity** is (tenant, idempotency key). The same key with the same content is a duplicate, with other
  content a conflict: the first stays counted. Content is customer, meter, quantity, `ts` if given, meta.
* **CloudEvents** 1.0 are taken in structured mode, single and batch; their identity is (source, id).
* **Time** is RFC 3339 with an offset; digits beyond microseconds are cut off. Without `ts` the arrival time
  counts.
* **Quantities** are exact decimals, as JSON numbers or strings: at most nine places, at most 2^53. A negative
  one is stored, and counted only if its meter allows negative values.
* **Bodies** are at most 1 MiB and 1000 events, after inflation too; `Content-Encoding: gzip` is understood.
* **When PostgreSQL is away**, keys that were verified in the last five minutes keep working; a revocation
  otherwise holds after five seconds.
* **Adjustments** are events that came after their meter's lateness window. A key with the scope `read` lists
  them, one with `adjust` decides them; a tenant's key knows those of its own tenant only.
* **Parked records** are those that could not be processed as they came. A key with the scope `read` lists
  them, one with `replay` has them tried again or discards them.
* **Replays** recompute counters from the log: a dry run shows what differs, an apply corrects it. They need a
  key with the scope `replay`; a tenant's key replays its own tenant only.
"""


#: In optional fields null means the same as no field.
_OR_NULL = OpenAPIType.NULL


def _text(chars_max: int, pattern: str = _PRINTABLE, *, optional: bool = False, **rest: Any) -> Schema:
    kind: Any = [OpenAPIType.STRING, _OR_NULL] if optional else OpenAPIType.STRING
    return Schema(type=kind, min_length=1, max_length=chars_max, pattern=pattern, **rest)


def _data_fields(*, customer_optional: bool) -> dict[str, Reference | Schema]:
    meter = f"^{METER_PATTERN}$"
    properties: dict[str, Any] = {
        "type": [OpenAPIType.OBJECT, _OR_NULL],
        "max_properties": PROPERTIES_MAX,
        "property_names": _text(PROPERTY_KEY_CHARS_MAX),
        "additional_properties": Schema(
            one_of=[
                Schema(type=OpenAPIType.STRING, max_length=PROPERTY_VALUE_CHARS_MAX, pattern=_PRINTABLE),
                Schema(type=OpenAPIType.NUMBER),
                Schema(type=OpenAPIType.BOOLEAN),
            ]
        ),
    }
    return {
        "tenantId": _text(
            TENANT_CHARS_MAX,
            f"^{TENANT_PATTERN}$",
            optional=True,
            description="Needed with an operator's key only; any other key stands for its own tenant.",
        ),
        "metric": _text(METER_CHARS_MAX, meter, optional=True, description="Slug of the meter."),
        "meter": _text(METER_CHARS_MAX, meter, optional=True, description="The same; give one of them."),
        "customerRef": _text(
            CUSTOMER_CHARS_MAX, optional=customer_optional, description="Your reference of the customer."
        ),
        "quantity": Schema(
            description=f"At most {QUANTITY_SCALE} decimal places. Negative zero is refused.",
            one_of=[
                Schema(type=OpenAPIType.NUMBER, minimum=-QUANTITY_MAX, maximum=QUANTITY_MAX),
                Schema(type=OpenAPIType.STRING, pattern=r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"),
            ],
        ),
        "meta": Schema(**properties, description="Free properties; part of the content."),
        "properties": Schema(**properties, description="The same as `meta`; give one of them."),
    }


def _time(**rest: Any) -> Schema:
    return Schema(
        type=[OpenAPIType.STRING, _OR_NULL],
        format=OpenAPIFormat.DATE_TIME,
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9:]{8}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})$",
        **rest,
    )


def _one_name_each() -> dict[str, Any]:
    """Either metric or meter; not both meta and properties."""
    text, null, mapping = (Schema(type=kind) for kind in (OpenAPIType.STRING, _OR_NULL, OpenAPIType.OBJECT))
    return {
        "one_of": [
            Schema(required=["metric"], properties={"metric": text, "meter": null}),
            Schema(required=["meter"], properties={"meter": text, "metric": null}),
        ],
        "schema_not": Schema(
            required=["meta", "properties"], properties={"meta": mapping, "properties": mapping}
        ),
    }


def event_schema(*, keyed: bool) -> Schema:
    """One event in our own form; ``keyed`` requires its idempotency key."""
    return Schema(
        title="UsageEvent",
        type=OpenAPIType.OBJECT,
        required=["customerRef", "quantity", *(["idempotencyKey"] if keyed else [])],
        **_one_name_each(),
        additional_properties=False,
        properties={
            **_data_fields(customer_optional=False),
            "ts": _time(description="When it was used; the arrival time if absent."),
            "idempotencyKey": _text(
                IDEMPOTENCY_KEY_CHARS_MAX,
                optional=not keyed,
                description="Unique in your tenant. A single event may have it in the header instead.",
            ),
        },
    )


def cloudevent_schema() -> Schema:
    """One CloudEvent in structured JSON form."""
    text = Schema(type=OpenAPIType.STRING)
    return Schema(
        title="CloudEvent",
        type=OpenAPIType.OBJECT,
        required=["specversion", "id", "source", "type", "data"],
        any_of=[
            Schema(required=["subject"], properties={"subject": text}),
            Schema(properties={"data": Schema(required=["customerRef"], properties={"customerRef": text})}),
        ],
        properties={
            "specversion": Schema(const="1.0"),
            "id": _text(2048),
            "source": _text(2048, description="With `id`, the identity of the event."),
            "type": _text(2048, examples=["usage.recorded"]),
            "subject": _text(
                CUSTOMER_CHARS_MAX,
                optional=True,
                description="The customer, if `data.customerRef` is absent.",
            ),
            "time": _time(description="When it was used; the arrival time if absent."),
            "datacontenttype": Schema(enum=[JSON, None]),
            "data": Schema(
                type=OpenAPIType.OBJECT,
                required=["quantity"],
                **_one_name_each(),
                additional_properties=False,
                properties=_data_fields(customer_optional=True),
            ),
        },
    )


def _list_of(item: Schema) -> Schema:
    return Schema(type=OpenAPIType.ARRAY, items=item, min_items=1)


_EXAMPLE_EVENT = {
    "metric": "api.requests",
    "customerRef": "cust_42",
    "quantity": "12.5",
    "ts": "2026-01-31T13:37:42Z",
    "idempotencyKey": "req-8f14e45f",
    "meta": {"region": "eu"},
}
_EXAMPLE_CLOUDEVENT = {
    "specversion": "1.0",
    "id": "8f14e45f",
    "source": "/gateway/eu-1",
    "type": "usage.recorded",
    "subject": "cust_42",
    "time": "2026-01-31T13:37:42Z",
    "data": {"metric": "api.requests", "quantity": 1},
}


@dataclass
class IngestOperation(Operation):
    """Adds the request body, which the handler reads itself, and the one header that matters."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            required=True,
            description=f"1 to {_EVENTS_MAX} events, at most 1 MiB.",
            content={
                JSON: OpenAPIMediaType(
                    schema=Schema(
                        one_of=[
                            Schema(
                                title="Events",
                                type=OpenAPIType.OBJECT,
                                required=["events"],
                                additional_properties=False,
                                properties={"events": _list_of(event_schema(keyed=True))},
                            ),
                            _list_of(event_schema(keyed=True)),
                            event_schema(keyed=False),
                        ]
                    ),
                    examples={"batch": Example(value={"events": [_EXAMPLE_EVENT]})},
                ),
                CLOUDEVENT: OpenAPIMediaType(
                    schema=cloudevent_schema(), examples={"one": Example(value=_EXAMPLE_CLOUDEVENT)}
                ),
                CLOUDEVENT_BATCH: OpenAPIMediaType(
                    schema=_list_of(cloudevent_schema()),
                    examples={"batch": Example(value=[_EXAMPLE_CLOUDEVENT])},
                ),
            },
        )
        self.parameters = [
            Parameter(
                name="Idempotency-Key",
                param_in="header",
                required=False,
                description="The key of a request's only event, if that has none itself; otherwise ignored.",
                schema=_text(IDEMPOTENCY_KEY_CHARS_MAX, f"^{HEADER_KEY_PATTERN}$"),
            )
        ]


#: Every answer to a POST of events but 202.
INGEST_RESPONSES: dict[int, ResponseSpec] = {
    207: documented("Some events are accepted, others refused; see each result.", IngestAnswer),
    400: documented("No event is acceptable, or the body cannot be read.", IngestAnswer | Problem),
    401: documented("No API key, or one that is wrong, expired or revoked.", Problem),
    403: documented("The key lacks the scope, or every event is of another tenant.", IngestAnswer | Problem),
    413: documented("The body is larger, inflates to more, or holds more events than allowed.", Problem),
    415: documented("Another media type, charset or encoding than the documented ones.", Problem),
    429: documented("This key sends faster than allowed; wait for Retry-After.", Problem),
    500: documented("A defect on our side. Retrying with the same keys is safe.", Problem),
    503: documented(
        "Kafka did not confirm the events marked unavailable, or the key cannot be verified. "
        "Wait for Retry-After and send them again with the same keys.",
        IngestAnswer | Problem,
    ),
}


def openapi_config() -> OpenAPIConfig:
    """Title, description, security; pages at ``/docs``, the document at ``/openapi.json`` too."""
    return OpenAPIConfig(
        title="Tidemeter",
        version=VERSION,
        description=DESCRIPTION,
        path="/docs",
        render_plugins=[ScalarRenderPlugin()],
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(type="http", scheme="bearer", description="`tmk_<key id>_<secret>`")
            }
        ),
        tags=[
            Tag(name="usage"),
            Tag(name="adjustments"),
            Tag(name="parked"),
            Tag(name="replays"),
            Tag(name="operation"),
        ],
    )
