"""The webhook bridge: Stripe's webhooks to Kafka.

Takes ``POST /v1/webhooks/{endpoint}``, writes ``stripe_webhooks.v1``. It promises that a record is there
before the 200 leaves, that nothing gets there without a signature of the endpoint, and that the body is kept
byte for byte. It keeps no state and knows no duplicates: Stripe delivers again whatever was not answered with
200, and who reads the topic handles each event once. Without Kafka it answers 503, and Stripe comes back.
"""

from __future__ import annotations
