"""Faust with chunks: everything a consumer needs to be exact.

Reads: the topics of the agent that uses it.
Writes: ``partition_offsets`` and ``outbox`` inside the agent's own transaction; Kafka group offsets after it.
Promises: a record is processed in effect once, whatever is killed; a group's committed offset is never ahead
of PostgreSQL; a partition that cannot go on stops alone, with a named reason.
Fails: transient failures wait in place with backoff; anything unknown ends the process without unwinding.
"""
