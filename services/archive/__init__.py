"""Archive: usage topics as files that outlive their retention.

Reads: ``usage.v1`` … ``usage.v3``, from where the files end.
Writes: Avro container files, each a contiguous run of one partition's records, byte for byte.
Promises: a record is in the archive once, however often the job is killed; a hole is never hidden.
Fails: records that retention deleted before they were archived stop their partition, with an alarm.
"""
