"""Fuzz what the bridge does with strangers' bytes, guided by coverage. Not run by pytest.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/fuzz_bridge.py -max_total_time=120

A header is parsed and a body verified and read, each from arbitrary bytes. Nothing but a refusal with status
400 may come out; what verifies must be what Stripe's own library believes; what is read must fit its record.
"""

from __future__ import annotations

import hashlib
import hmac
import sys

import atheris

with atheris.instrument_imports(include=["services.bridge", "services.wire.usage", "json"]):
    import stripe

    from schemas.catalog import current
    from services.bridge.endpoints import parse_secrets
    from services.bridge.events import read_event
    from services.bridge.verify import read_signature, verify
    from services.web.problems import RequestRefused
    from services.wire.codec import Decoder, Encoder
    from services.wire.errors import Misconfigured

SECRET = "whsec_fuzz"
NOW = 1_800_000_000
#: So that mutation finds the inside of an event, not only the first byte of JSON.
WRAPPINGS = (
    (b'{"id": "evt_1", "type": "x", "data": {"object": {', b"}}}"),
    (b'{"object": "v2.core.event", "id": "evt_1", "type": "x", "related_object": ', b"}"),
    (b'{"id": "', b'", "type": "x"}'),
)
ENCODER, DECODER = Encoder(current("stripe_webhook")), Decoder()


def _signature(header: bytes, body: bytes) -> None:
    try:
        verify(read_signature([header]), body, [SECRET.encode()], NOW)
    except RequestRefused as error:
        assert error.status == 400
        return
    stripe.WebhookSignature.verify_header(body, header.decode("latin-1"), SECRET, None)


def _signed(body: bytes) -> None:
    mac = hmac.new(SECRET.encode(), b"%d." % NOW + body, hashlib.sha256).hexdigest()
    verify(read_signature([f"t={NOW},v1={mac}".encode()]), body, [SECRET.encode()], NOW)


def _event(body: bytes) -> None:
    try:
        event = read_event(body)
    except RequestRefused as error:
        assert (error.status, error.problem.code) == (400, "event_malformed")
        return
    record = {
        "endpoint": "main",
        "event_id": event.event_id,
        "event_type": event.event_type,
        "object_id": event.object_id,
        "received_at": 1,
        "body": body,
    }
    assert DECODER.decode(ENCODER.encode(record))[1] == record


def _secrets(text: str) -> None:
    try:
        found = parse_secrets(text)
    except Misconfigured:
        return
    assert found
    assert all(found.values())


def one(data: bytes) -> None:
    """What libFuzzer calls."""
    provider = atheris.FuzzedDataProvider(data)
    header = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 300))
    body = provider.ConsumeBytes(provider.remaining_bytes())
    _signature(header, body)
    _signed(body)
    _event(body)
    for head, tail in WRAPPINGS:
        _event(head + body + tail)
    _secrets(body.decode("utf-8", "replace"))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
