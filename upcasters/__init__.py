"""Pure functions, one step per file: a record of version N in, a record of version N+1 out.

No clock, no I/O, no look-ups: the same bytes give the same record for ever. Records are plain Avro values
(see ``schemas.catalog``): timestamps are integers, decimals are big-endian bytes.
"""
