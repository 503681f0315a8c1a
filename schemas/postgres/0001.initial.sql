-- Configuration: tenants, meters, customers, API keys ------------------------------------------------

CREATE TABLE tenants (
    tenant_id  text PRIMARY KEY,
    timezone   text NOT NULL DEFAULT 'UTC',
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE meters (
    tenant_id            text NOT NULL REFERENCES tenants,
    meter                text NOT NULL,
    aggregation          text NOT NULL CHECK (aggregation IN ('sum', 'count')),
    unit                 text NOT NULL DEFAULT '',
    scale                smallint NOT NULL DEFAULT 0 CHECK (scale BETWEEN 0 AND 9),
    lateness_seconds     bigint NOT NULL DEFAULT 172800 CHECK (lateness_seconds BETWEEN 0 AND 3024000),
    late_policy          text NOT NULL DEFAULT 'manual' CHECK (late_policy IN ('manual', 'carry_forward')),
    allow_negative       boolean NOT NULL DEFAULT false,
    event_name           text NOT NULL,
    customer_payload_key text NOT NULL DEFAULT 'stripe_customer_id',
    value_payload_key    text NOT NULL DEFAULT 'value',
    created_at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, meter)
);

CREATE TABLE customers (
    tenant_id       text NOT NULL REFERENCES tenants,
    customer_ref    text NOT NULL,
    stripe_customer text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, customer_ref)
);

CREATE TABLE api_keys (
    key_id        text PRIMARY KEY,               -- public prefix of the key, used to find it
    tenant_id     text REFERENCES tenants,        -- null: every tenant (operators)
    secret_sha256 bytea NOT NULL,                 -- of 256 random bits, so no slow hash is needed
    scopes        text[] NOT NULL,
    label         text NOT NULL DEFAULT '',
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    last_used_at  timestamptz
);

-- One row, counted up by every change of the configuration above: workers compare it in each transaction.
CREATE TABLE config_version (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version  bigint NOT NULL
);
INSERT INTO config_version (version) VALUES (1);

CREATE FUNCTION bump_config_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE config_version SET version = version + 1;
    RETURN NULL;
END $$;
CREATE TRIGGER tenants_changed AFTER INSERT OR UPDATE OR DELETE ON tenants
    FOR EACH STATEMENT EXECUTE FUNCTION bump_config_version();
CREATE TRIGGER meters_changed AFTER INSERT OR UPDATE OR DELETE ON meters
    FOR EACH STATEMENT EXECUTE FUNCTION bump_config_version();

-- Where each consumer stands -------------------------------------------------------------------------

CREATE TABLE partition_offsets (
    consumer       text NOT NULL,                 -- Kafka consumer group
    topic          text NOT NULL,
    partition      int NOT NULL,
    start_offset   bigint NOT NULL,               -- first record this consumer is accountable for
    next_offset    bigint NOT NULL,
    parked_offsets bigint[] NOT NULL DEFAULT '{}', -- newest parked records, for the breaker
    halted         text,                          -- reason code; null while running
    halted_at      timestamptz,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic, partition),
    CHECK (next_offset >= start_offset)
);

-- What became of every record: received = sum of the outcomes, always.
CREATE TABLE partition_accounts (
    topic         text NOT NULL,
    partition     int NOT NULL,
    tenant_id     text NOT NULL,                  -- '' when the record could not be read
    meter         text NOT NULL,
    received      bigint NOT NULL,
    counted       bigint NOT NULL,
    duplicate     bigint NOT NULL,
    conflict      bigint NOT NULL,
    late_counted  bigint NOT NULL,
    adjusted      bigint NOT NULL,
    dead_lettered bigint NOT NULL,
    upcast_failed bigint NOT NULL,
    PRIMARY KEY (topic, partition, tenant_id, meter)
) WITH (fillfactor = 70);

-- Idempotency keys: two generations, so that expiry drops a table instead of deleting rows. A key lives in
-- the first for at least the retention, then in the second for as long again.
CREATE TABLE seen_current (
    event_id  uuid PRIMARY KEY,                   -- hash of (tenant, idempotency key)
    digest    bigint NOT NULL,                    -- of what the producer sent
    source    smallint NOT NULL,                  -- usage topic version
    partition int NOT NULL,
    "offset"  bigint NOT NULL
);
CREATE TABLE seen_previous (LIKE seen_current INCLUDING ALL);
CREATE TABLE seen_generation (
    only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    started_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO seen_generation DEFAULT VALUES;

-- Counters -------------------------------------------------------------------------------------------

CREATE TABLE items (
    item_id      uuid PRIMARY KEY,                -- hash of (tenant, customer, meter)
    tenant_id    text NOT NULL,
    customer_ref text NOT NULL,
    meter        text NOT NULL,
    watermark    timestamptz NOT NULL,            -- greatest occurred_at counted
    dirty_from   timestamptz                      -- earliest hour changed since the last close; null: none
) WITH (fillfactor = 70);
CREATE INDEX items_dirty ON items (item_id) WHERE dirty_from IS NOT NULL;
CREATE INDEX items_by_name ON items (tenant_id, meter, customer_ref);

CREATE TABLE buckets (
    item_id       uuid NOT NULL,
    hour_start    timestamptz NOT NULL,
    period_start  timestamptz NOT NULL,
    total         numeric NOT NULL,               -- by the meter's aggregation, approved adjustments included
    events        bigint NOT NULL,
    late_events   bigint NOT NULL,
    closed        numeric NOT NULL DEFAULT 0,     -- part of total that closing has taken into account
    pushed        numeric NOT NULL DEFAULT 0,     -- sum of the amounts of this bucket's deltas
    sequence      int NOT NULL DEFAULT 0,         -- number of this bucket's newest delta
    first_arrival timestamptz NOT NULL,
    last_arrival  timestamptz NOT NULL,
    PRIMARY KEY (item_id, hour_start, period_start)
) WITH (fillfactor = 70);

CREATE TABLE item_periods (
    item_id      uuid NOT NULL,
    period_start timestamptz NOT NULL,
    period_end   timestamptz NOT NULL,
    carry        numeric NOT NULL DEFAULT 0,      -- closed, but below the meter's scale, so not yet in a delta
    open_deltas  int NOT NULL DEFAULT 0 CHECK (open_deltas >= 0),
    PRIMARY KEY (item_id, period_start)
);

CREATE TABLE adjustments (
    adjustment_id   uuid PRIMARY KEY,             -- the event's id hash
    item_id         uuid NOT NULL,
    tenant_id       text NOT NULL,
    customer_ref    text NOT NULL,
    meter           text NOT NULL,
    idempotency_key text NOT NULL,
    quantity        numeric NOT NULL,
    occurred_at     timestamptz NOT NULL,
    arrived_at      timestamptz NOT NULL,
    watermark       timestamptz NOT NULL,
    policy          text NOT NULL,
    state           text NOT NULL CHECK (state IN ('pending', 'applied', 'rejected')),
    applied_hour    timestamptz,                  -- bucket it went to
    decided_by      text,
    decided_at      timestamptz,
    topic           text NOT NULL,
    partition       int NOT NULL,
    "offset"        bigint NOT NULL
);
CREATE INDEX adjustments_by_state ON adjustments (state, tenant_id, meter);

CREATE TABLE conflicts (
    conflict_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id       text NOT NULL,
    idempotency_key text NOT NULL,
    topic           text NOT NULL,
    partition       int NOT NULL,
    "offset"        bigint NOT NULL,
    detected_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (topic, partition, "offset")
);

-- Everything that has to leave for Kafka, written in the transaction that decided it -----------------

CREATE TABLE outbox (
    outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    producer  text NOT NULL,                      -- which service relays it
    topic     text NOT NULL,
    key       bytea,
    value     bytea NOT NULL,
    headers   jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX outbox_by_producer ON outbox (producer, outbox_id);

-- The push -------------------------------------------------------------------------------------------

-- Append-only: a correction is a new row.
CREATE TABLE deltas (
    identifier   text PRIMARY KEY,
    item_id      uuid NOT NULL,
    period_start timestamptz NOT NULL,
    hour_start   timestamptz NOT NULL,
    sequence     int NOT NULL,
    amount       numeric NOT NULL,
    closed_at    timestamptz NOT NULL DEFAULT now(),
    UNIQUE (item_id, hour_start, period_start, sequence)
);

-- Intent journal: a row exists, with its amount and identifier, before the first byte leaves for Stripe.
CREATE TABLE meter_events (
    identifier           text PRIMARY KEY,
    item_id              uuid NOT NULL,
    tenant_id            text NOT NULL,
    meter                text NOT NULL,
    period_start         timestamptz NOT NULL,
    hour_start           timestamptz NOT NULL,
    event_name           text NOT NULL,
    stripe_customer      text NOT NULL,
    customer_payload_key text NOT NULL,
    value_payload_key    text NOT NULL,
    amount               numeric NOT NULL,
    event_at             timestamptz NOT NULL,
    period_end           timestamptz NOT NULL,
    state                text NOT NULL DEFAULT 'pending' CHECK
        (state IN ('pending', 'in_flight', 'in_doubt', 'reported', 'failed', 'cancelled')),
    replaces             text,                    -- identifier this one was sent instead of
    attempts             int NOT NULL DEFAULT 0,
    first_sent_at        timestamptz,
    next_attempt_at      timestamptz NOT NULL DEFAULT now(),
    settled_at           timestamptz,
    http_status          int,
    error_code           text,
    request_id           text,
    created_at           timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX meter_events_open ON meter_events (next_attempt_at)
    WHERE state IN ('pending', 'in_flight', 'in_doubt');
CREATE INDEX meter_events_open_by_key ON meter_events (stripe_customer, event_name, period_end, hour_start)
    WHERE state IN ('pending', 'in_flight', 'in_doubt');
CREATE INDEX meter_events_reported_by_hour ON meter_events (stripe_customer, event_name, hour_start)
    WHERE state = 'reported';
CREATE INDEX meter_events_by_item ON meter_events (item_id, period_start, hour_start);
CREATE INDEX meter_events_failed ON meter_events (tenant_id, meter) WHERE state = 'failed';
