"""Push every delta to the billing system once in effect, whatever is killed or answered.

Reads     ``deltas.v1`` (the agent), then only its journal: table ``meter_events``.
Writes    ``meter_events``; ``buckets.open`` when an intent settles; ``buckets``, ``items`` and
          ``item_periods`` when an amount is given back; ``outbox`` for ops events; and calls to the sink.
Promises  an intent is durable before its first byte leaves; one identifier never carries two amounts; at
          most one call is in flight for one Stripe customer and meter, over all pushers; what may have been
          applied is sent again only under the same identifier and only inside Stripe's uniqueness window,
          and after that only once summaries have shown that it was not applied; what was never sent and
          comes too late for Stripe or for its period's invoice is given back, to be carried forward.
Fails     PostgreSQL or the sink away: waits with backoff. An answer that says nothing: the intent is in
          doubt, never failed. Refused: failed, with one ops event. A key that is not accepted: everything
          pauses. A broken invariant: the error leaves ``Sender.run`` and the process must end.

``intents`` and ``brake`` are pure; ``journal`` and ``delivery`` are the SQL; ``sinks`` talk to the outside;
``sender`` ties them together.
"""
