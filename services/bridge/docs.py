"""The documentation of the bridge where the framework cannot derive it."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import ScalarRenderPlugin
from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    RequestBody,
    Schema,
    Tag,
)

from services.bridge.verify import HEADER, HEADER_BYTES_MAX
from services.web.docs import documented
from services.web.problems import Problem

DESCRIPTION = """\
Takes Stripe's webhooks. Give Stripe the address `/v1/webhooks/{endpoint}`, with an endpoint that is
configured here. A 200 means that the event is durable; Stripe delivers again whatever was answered otherwise.
"""


@dataclass
class WebhookOperation(Operation):
    """Adds what the handler reads itself: the body and the signature."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            required=True,
            description="One event of Stripe, snapshot or thin; at most 256 KiB, not compressed.",
            content={"application/json": OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))},
        )
        self.parameters = [
            *(self.parameters or []),
            Parameter(
                name=HEADER,
                param_in="header",
                required=True,
                description="`t=<seconds>,v1=<signature>[,v1=<signature>…]`",
                schema=Schema(type=OpenAPIType.STRING, max_length=HEADER_BYTES_MAX),
            ),
        ]


#: Every answer to a webhook but 200.
WEBHOOK_RESPONSES: dict[int, ResponseSpec] = {
    400: documented(
        "The signature is missing, malformed, wrong or too old; or the event is unusable.", Problem
    ),
    404: documented("No such endpoint is configured.", Problem),
    413: documented("The body has more than 256 KiB.", Problem),
    415: documented("The body is compressed.", Problem),
    500: documented("A defect on our side.", Problem),
    503: documented("Kafka did not confirm the event; deliver it again.", Problem),
}


def openapi_config() -> OpenAPIConfig:
    """Title and description; pages at ``/docs``, the document at ``/openapi.json`` too."""
    return OpenAPIConfig(
        title="Tidemeter webhook bridge",
        version="1",
        description=DESCRIPTION,
        path="/docs",
        render_plugins=[ScalarRenderPlugin()],
        tags=[Tag(name="webhooks"), Tag(name="operation")],
    )
