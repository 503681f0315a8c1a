-- depends: 0002.counting

-- Failed pushes are terminal. What an operator retries goes back to its bucket and leaves in a later delta.

ALTER TABLE meter_events
    ADD COLUMN refusals int NOT NULL DEFAULT 0,   -- answers that proved no effect and that Stripe may have kept
    ADD COLUMN released_at timestamptz,           -- `failed`: when its amount went back to its bucket
    ADD COLUMN released_sequence int,             -- the bucket's last delta then; a later one holds the amount
    ADD COLUMN retried_as text,                   -- identifier of that later delta
    ADD COLUMN settled_by text,                   -- who settled a doubt by hand
    ADD CHECK ((released_at IS NULL) = (released_sequence IS NULL)),
    ADD CHECK (released_at IS NULL OR state = 'failed'),
    ADD CHECK (retried_as IS NULL OR released_at IS NOT NULL);

DROP INDEX meter_events_failed;
CREATE INDEX meter_events_failed ON meter_events (tenant_id, meter) WHERE state = 'failed' AND released_at IS NULL;
CREATE INDEX meter_events_released ON meter_events (item_id, hour_start, period_start)
    WHERE released_at IS NOT NULL AND retried_as IS NULL;
CREATE INDEX meter_events_retried ON meter_events (retried_as) WHERE retried_as IS NOT NULL;

-- A Stripe meter that does not exist or is archived: nothing new is sent to it but a probe now and then.
CREATE TABLE paused_meters (
    event_name    text PRIMARY KEY,
    reason        text NOT NULL,
    source        text NOT NULL CHECK (source IN ('sync', 'webhook', 'reconciler')),
    paused_at     timestamptz NOT NULL,
    probes        int NOT NULL DEFAULT 0,
    next_probe_at timestamptz NOT NULL
);

-- The life of an intent, whoever writes it: what was to be sent never changes, no state is left but by a way
-- that exists, and the moment of the first call is forgotten only when an answer proved that it had no effect.
CREATE FUNCTION guard_meter_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.identifier, NEW.item_id, NEW.tenant_id, NEW.meter, NEW.hour_start, NEW.event_name,
        NEW.stripe_customer, NEW.customer_payload_key, NEW.value_payload_key, NEW.amount, NEW.event_at,
        NEW.replaces, NEW.dimensions, NEW.formula)
        IS DISTINCT FROM
       (OLD.identifier, OLD.item_id, OLD.tenant_id, OLD.meter, OLD.hour_start, OLD.event_name,
        OLD.stripe_customer, OLD.customer_payload_key, OLD.value_payload_key, OLD.amount, OLD.event_at,
        OLD.replaces, OLD.dimensions, OLD.formula)
    THEN
        RAISE EXCEPTION 'intent %: what is sent under an identifier never changes', OLD.identifier
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state <> OLD.state AND (OLD.state || ' ' || NEW.state) NOT IN (
        'pending in_flight', 'pending cancelled',
        'in_flight pending', 'in_flight in_doubt', 'in_flight reported', 'in_flight failed',
        'in_doubt in_flight', 'in_doubt reported', 'in_doubt cancelled',
        'reported failed')
    THEN
        RAISE EXCEPTION 'intent %: no way leads from % to %', OLD.identifier, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.first_sent_at IS DISTINCT FROM NEW.first_sent_at
        AND NOT (OLD.first_sent_at IS NULL OR (NEW.first_sent_at IS NULL AND NEW.state = 'pending'))
    THEN
        RAISE EXCEPTION 'intent %: the moment of its first call stays', OLD.identifier
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.attempts < OLD.attempts
        OR (NEW.state = 'pending') <> (NEW.first_sent_at IS NULL) AND NEW.state IN ('pending', 'in_flight', 'in_doubt')
    THEN
        RAISE EXCEPTION 'intent %: % attempts and a first call at % do not fit %',
            OLD.identifier, NEW.attempts, NEW.first_sent_at, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER meter_events_guard BEFORE UPDATE ON meter_events FOR EACH ROW EXECUTE FUNCTION guard_meter_event();
