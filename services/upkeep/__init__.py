"""The small recurring jobs beside Stripe's webhooks, and the mails to operators, in one process."""

#: Ops events of the jobs, and of dead mails, wait in the outbox under this name.
PRODUCER = "tidemeter-upkeep"
