-- depends: 0004.parking_and_webhooks

-- A charge that is settled looks for its refunds.
CREATE INDEX stripe_fees_refunds ON stripe_fees (charge_id) WHERE kind = 'refund';
