"""Counters: every usage record gets exactly one outcome, every metered item its exact hourly totals.

Reads: ``usage.v1`` … ``usage.v3`` (Faust agent, chunks).
Writes: PostgreSQL (idempotency keys, items, buckets, accounts, positions, outbox) in one transaction for each
chunk; through the outbox ``deltas.v1``, ``dead_letters.v1``, ``upcast_failures.v1``, ``conflicts.v1``,
``adjustments.v1`` and ``ops.v1``.
Promises: received = sum of outcomes, in effect once under kills, redelivery and rebalances.
Fails: a record that cannot be read or counted is parked with its reason; a partition with too many of them,
or with missing offsets, halts; a database or broker that is away is waited for.

``prepare`` (pure: chunk → events) → ``ledger`` (the transaction) → ``buckets`` → ``closing`` (→ deltas).
"""
