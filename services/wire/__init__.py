"""The shared vocabulary: topics, codec, usage events, parked records, errors, settings and metric names.

Reads and writes nothing by itself. Services import from here, from ``streaming``, ``schemas`` and
``upcasters``, and never from one another.
"""
