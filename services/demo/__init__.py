"""The demo: realistic, seeded traffic through the real stack, one SIGKILL, and a proof.

Reads: what PostgreSQL, Kafka and the Stripe simulator say. Writes: usage events, by HTTP, by the producer
client and as older releases wrote them. Promises: exit status 0 only if every sum agrees with the oracle.

``traffic`` plans the records (pure, seeded); ``oracle`` says what they must add up to; ``run`` plays them;
``proof`` compares.
"""
