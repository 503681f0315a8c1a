"""The ingest API: usage events over HTTP, onto the current usage topic.

Reads   HTTP requests (JSON, CloudEvents 1.0) and ``api_keys`` in PostgreSQL.
Writes  usage records to Kafka, and ``last_used_at`` of a key at most once a minute.
Promises an event is called accepted only after every in-sync replica has acknowledged it; every event of a
        request gets its own answer; a retry with the same idempotency key is harmless, always.
Fails   closed: Kafka away or silent is 503 with per-event ``unavailable``; a key that cannot be verified is
        401, or 503 once PostgreSQL has been away for more than five minutes.

``limits`` bounds requests · ``parse`` is pure: body → events · ``kafka`` publishes without blocking the
event loop · ``answers`` and ``docs`` say what clients get · ``health`` · ``app`` has the route.
"""
