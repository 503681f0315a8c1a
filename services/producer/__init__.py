"""Send usage from Python straight to Kafka, under the rules of the HTTP API.

Reads   nothing.
Writes  the current usage topic.
Promises an event is checked before it is queued; ``flush`` returns only after every event is acknowledged by
        all in-sync replicas; memory is bounded; sending an event again with its idempotency key is harmless.
Fails   with ``Invalid`` (the event breaks a rule), ``Backpressure`` (the queue stays full) or
        ``NotAcknowledged`` (some events may or may not be stored: send those again).

::

    with UsageProducer("kafka:9092") as producer:
        producer.send(UsageEvent("acme", "cust_42", "api.requests", 1, "req-8f14e45f"))
"""

from services.producer.client import Backpressure, NotAcknowledged, Receipt, ReceiptState, UsageProducer
from services.wire.errors import Invalid
from services.wire.usage import UsageEvent

__all__ = [
    "Backpressure",
    "Invalid",
    "NotAcknowledged",
    "Receipt",
    "ReceiptState",
    "UsageEvent",
    "UsageProducer",
]
