"""Replay: recompute a window of counters from the log, show exactly what would change, and apply it.

Reads: ``usage.v1`` … ``usage.v3`` by offsets, in a consumer group of its own; what the archive has of them.
Writes: a dry run nothing; an apply corrects hours and distinct values, and closing pushes the difference.
Promises: beside live traffic, and killed at any instruction, the counters end as the log says.
Fails: a window that neither log nor archive holds any more is named, never taken for an empty one.
"""
