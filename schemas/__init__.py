"""Facts, immutable: Avro schemas by subject and version, the record corpus, and the SQL migrations.

A released ``vN.avsc`` never changes; ``LOCK`` holds its SHA-256 and the start-up check compares. A
change that Avro's own resolution cannot bridge is a new version with an upcaster in ``upcasters/``.
"""
