"""Doctor: unsafe settings of Kafka, PostgreSQL, Stripe and our own, each with its fix.

Reads: topics, brokers, PostgreSQL's settings, what is declared there, Stripe's meters, what the key may do.
Writes: nothing; the one call to Stripe that could write is empty, and refused for that.
Promises: facts are gathered first, then judged by pure functions; what could not be asked is never safe.
Fails: not at all. What does not answer is a finding of the severity ``unchecked``.
"""
