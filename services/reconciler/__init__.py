"""Reconciliation: what Stripe shows, beside what the counters and the journal of pushes say it should show.

Asks     Stripe's meter event summaries, and our own tables. It corrects nothing by itself.
Promises what is not known is ``unknown``, never 0; a difference is told with its customer, meter and hour.
"""
