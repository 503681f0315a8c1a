-- depends: 0005.replay

-- How long a record waits for Kafka. Rows that are there already pass for new ones.
ALTER TABLE outbox ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT now();
