-- depends: 0001.initial

-- Aggregations and dimensions -------------------------------------------------------------------------

ALTER TABLE meters
    DROP CONSTRAINT meters_aggregation_check,
    ADD CONSTRAINT meters_aggregation_check CHECK (aggregation IN ('sum', 'count', 'max', 'last', 'unique')),
    ADD COLUMN value_property text,               -- property that holds the value; null: the event's quantity
    ADD COLUMN dimensions text[] NOT NULL DEFAULT '{}', -- properties that split an item
    ADD CHECK (aggregation <> 'unique' OR value_property IS NOT NULL),
    ADD CHECK (aggregation <> 'max' OR NOT allow_negative),
    ADD CHECK (aggregation <> 'last' OR (dimensions = '{}' AND late_policy = 'manual'));

-- Values of a `unique` meter: one row for each hour that a value was used in.
CREATE TABLE unique_values (
    item_id      uuid NOT NULL,
    period_start timestamptz NOT NULL,
    value        uuid NOT NULL,                   -- hash of the value
    hour_start   timestamptz NOT NULL,
    PRIMARY KEY (item_id, period_start, value, hour_start)
);

-- Billing periods ---------------------------------------------------------------------------------------

-- How a customer's periods repeat: "<count> <unit> <time zone>[ <anchor>]", for example
-- "1 month Europe/Budapest 2026-01-31T13:37:42Z". Without an anchor: calendar months.
ALTER TABLE customers ADD COLUMN calendar text    -- null: calendar months in the tenant's time zone
    CHECK (calendar ~ '^[1-9][0-9]{0,2} (day|week|month|year) [A-Za-z0-9_+/-]+( [0-9TZ:-]{20})?$');

ALTER TABLE items
    ADD COLUMN dimensions text[] NOT NULL DEFAULT '{}', -- values of the meter's dimensions, in their order
    ADD COLUMN calendar text;                     -- the periods that its buckets are in
UPDATE items i SET calendar = '1 month ' || t.timezone FROM tenants t WHERE t.tenant_id = i.tenant_id;
ALTER TABLE items ALTER COLUMN calendar SET NOT NULL;

-- Every change of periods: asked for in the transaction that caused it, carried out by the counters.
CREATE TABLE calendar_changes (
    change_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id      text NOT NULL,
    customer_ref   text,                          -- null: every customer without periods of its own
    calendar       text NOT NULL,
    not_before     xid8,                          -- transactions below this may not have seen the change
    requested_at   timestamptz NOT NULL DEFAULT now(),
    tried_at       timestamptz,                   -- the newest try that left something for later
    done_at        timestamptz,
    items          int NOT NULL DEFAULT 0,        -- items that moved
    buckets        int NOT NULL DEFAULT 0,        -- buckets that belong to another period now
    straddling     int NOT NULL DEFAULT 0         -- of these, buckets with events on both sides of an edge
);
CREATE INDEX calendar_changes_open ON calendar_changes (tried_at NULLS FIRST, change_id) WHERE done_at IS NULL;

CREATE FUNCTION note_tenant_calendar() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO calendar_changes (tenant_id, calendar) VALUES (new.tenant_id, '1 month ' || new.timezone);
    RETURN NULL;
END $$;
CREATE TRIGGER tenant_calendar_changed AFTER UPDATE OF timezone ON tenants
    FOR EACH ROW WHEN (old.timezone <> new.timezone) EXECUTE FUNCTION note_tenant_calendar();

CREATE FUNCTION note_customer_calendar() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO calendar_changes (tenant_id, customer_ref, calendar)
    SELECT new.tenant_id, new.customer_ref, coalesce(new.calendar, '1 month ' || timezone)
    FROM tenants WHERE tenant_id = new.tenant_id;
    RETURN NULL;
END $$;
CREATE TRIGGER customer_calendar_set AFTER INSERT ON customers
    FOR EACH ROW WHEN (new.calendar IS NOT NULL) EXECUTE FUNCTION note_customer_calendar();
CREATE TRIGGER customer_calendar_changed AFTER UPDATE OF calendar ON customers
    FOR EACH ROW WHEN (old.calendar IS DISTINCT FROM new.calendar) EXECUTE FUNCTION note_customer_calendar();

-- Buckets, and closing them -----------------------------------------------------------------------------

ALTER TABLE buckets
    ALTER COLUMN closed DROP NOT NULL,            -- null: to be closed again, whatever it is now
    ADD COLUMN open boolean NOT NULL DEFAULT false, -- its newest delta is not settled yet
    ADD COLUMN first_event timestamptz,           -- earliest occurred_at counted
    ADD COLUMN last_event timestamptz,            -- latest occurred_at counted; for `last` of the event that total is of
    ADD COLUMN last_key text COLLATE "C";         -- `last`: idempotency key of that event
UPDATE buckets b SET
    first_event = greatest(hour_start, period_start),
    last_event = hour_start + interval '1 hour' - interval '1 microsecond',
    open = EXISTS (
        SELECT FROM deltas d
        LEFT JOIN meter_events m USING (identifier)
        LEFT JOIN meter_events r ON r.replaces = d.identifier
        WHERE d.item_id = b.item_id AND d.hour_start = b.hour_start AND d.period_start = b.period_start
            AND d.sequence = b.sequence
            AND (m.identifier IS NULL OR m.state IN ('pending', 'in_flight', 'in_doubt')
                OR r.state IN ('pending', 'in_flight', 'in_doubt')));
ALTER TABLE buckets
    ALTER COLUMN first_event SET NOT NULL,
    ALTER COLUMN last_event SET NOT NULL;

ALTER TABLE item_periods
    DROP COLUMN open_deltas,
    ADD COLUMN value numeric NOT NULL DEFAULT 0;  -- `max`: how much of the period's greatest value was closed

-- What came after a period's last safe moment for a push, and went to the period open then instead.
CREATE TABLE carry_forwards (
    carry_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    item_id      uuid NOT NULL,
    period_start timestamptz NOT NULL,            -- the closed period
    hour_start   timestamptz NOT NULL,            -- its earliest hour that changed
    to_period    timestamptz NOT NULL,
    to_hour      timestamptz NOT NULL,
    amount       numeric NOT NULL,
    reason       text NOT NULL CHECK (reason IN ('period_closed', 'too_old_for_stripe')),
    carried_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX carry_forwards_by_item ON carry_forwards (item_id, period_start);

-- Adjustments: pending → approved → applied, or pending → rejected ---------------------------------------

ALTER TABLE adjustments
    DROP CONSTRAINT adjustments_state_check,
    ADD CONSTRAINT adjustments_state_check CHECK (state IN ('pending', 'approved', 'applied', 'rejected')),
    ADD COLUMN reason text NOT NULL DEFAULT 'too_late', -- or beyond_retention: whether it was counted before is not known
    ADD COLUMN unique_value uuid,                 -- `unique`: hash of the value
    ADD COLUMN applied_at timestamptz;
UPDATE adjustments SET applied_at = coalesce(decided_at, arrived_at) WHERE state = 'applied';
CREATE INDEX adjustments_approved ON adjustments (adjustment_id) WHERE state = 'approved';

-- The push ----------------------------------------------------------------------------------------------

ALTER TABLE meter_events
    ADD COLUMN dimensions jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN formula text NOT NULL DEFAULT 'sum' CHECK (formula IN ('sum', 'last')), -- of the Stripe meter
    ADD COLUMN push_before timestamptz;           -- after this a first call comes too late for the invoice
