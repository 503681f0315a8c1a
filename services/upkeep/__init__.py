"""The small recurring jobs beside Stripe's webhooks, and the mails to operators, in one process."""
