-- depends: 0003.pushing

-- Parked records: what could not be processed as it came, with its bytes, until a person or a fix settles it ---------

CREATE TABLE parked_records (
    parked_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service     text NOT NULL,                    -- consumer group that parked it
    kind        text NOT NULL CHECK (kind IN ('dead_letter', 'upcast_failure', 'conflict')),
    topic       text NOT NULL,                    -- where it was read
    partition   int NOT NULL,
    "offset"    bigint NOT NULL,
    arrived_at  timestamptz NOT NULL,
    reason      text NOT NULL,
    stage       text NOT NULL,
    error_class text NOT NULL DEFAULT '',
    tenant_id   text NOT NULL DEFAULT '',         -- '' when the record could not be read
    meter       text NOT NULL DEFAULT '',
    event_id    text NOT NULL DEFAULT '',
    schema_name text NOT NULL DEFAULT '',         -- what it says it is, such as usage_event/4
    value       bytea,                            -- the original; null: parked by an older release, see its topic
    headers     jsonb NOT NULL DEFAULT '{}',      -- the original ones, as text
    parked_at   timestamptz NOT NULL DEFAULT now(),
    state       text NOT NULL DEFAULT 'parked' CHECK (state IN ('parked', 'redriven', 'discarded')),
    attempts    int NOT NULL DEFAULT 1,
    tried_at    timestamptz NOT NULL DEFAULT now(),
    tried_with  text NOT NULL DEFAULT '',         -- schemas and upcasters of the newest try
    outcome     text,                             -- `redriven`: what it became
    settled_at  timestamptz,
    settled_by  text,
    note        text NOT NULL DEFAULT '',         -- `discarded`: why
    CHECK ((state = 'parked') = (settled_at IS NULL)),
    CHECK ((state = 'redriven') = (outcome IS NOT NULL)),
    UNIQUE (topic, partition, "offset")
);
CREATE INDEX parked_records_open ON parked_records (reason, tenant_id, meter, parked_id) WHERE state = 'parked';
CREATE INDEX parked_records_settled ON parked_records (settled_at) WHERE state <> 'parked';

INSERT INTO parked_records (service, kind, topic, partition, "offset", arrived_at, reason, stage, tenant_id,
    event_id, parked_at)
SELECT 'tidemeter-counters', 'conflict', topic, partition, "offset", detected_at, 'conflict', 'count', tenant_id,
    idempotency_key, detected_at
FROM conflicts;
DROP TABLE conflicts;

-- A settled record stays settled, and what came stays as it came.
CREATE FUNCTION guard_parked_record() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state <> 'parked' OR (NEW.topic, NEW.partition, NEW."offset", NEW.value, NEW.arrived_at)
        IS DISTINCT FROM (OLD.topic, OLD.partition, OLD."offset", OLD.value, OLD.arrived_at)
    THEN
        RAISE EXCEPTION 'parked record %: it is %, and neither that nor the record changes', OLD.parked_id, OLD.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER parked_records_guard BEFORE UPDATE ON parked_records FOR EACH ROW EXECUTE FUNCTION guard_parked_record();

-- Re-drives: asked for here, carried out by the service that parked, in batches, each in one transaction with
-- its progress.
CREATE TABLE redrives (
    redrive_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service       text NOT NULL,                  -- consumer group that parked the records, and tries them again
    choice        jsonb NOT NULL,                 -- which records
    dry_run       boolean NOT NULL,
    requested_by  text NOT NULL,                  -- key:<key id>, cli:<user>, or automatic
    requested_at  timestamptz NOT NULL DEFAULT now(),
    state         text NOT NULL DEFAULT 'requested'
        CHECK (state IN ('requested', 'running', 'paused', 'done', 'cancelled')),
    last_id       bigint NOT NULL,                -- nothing parked after the request is part of it
    next_id       bigint NOT NULL DEFAULT 0,      -- records below were tried
    selected      bigint NOT NULL,
    tried         bigint NOT NULL DEFAULT 0,
    results       jsonb NOT NULL DEFAULT '{}',    -- outcome, or parked:<reason>, to a number
    paused_reason text,
    finished_at   timestamptz,
    CHECK ((state IN ('done', 'cancelled')) = (finished_at IS NOT NULL))
);
CREATE INDEX redrives_open ON redrives (redrive_id) WHERE state IN ('requested', 'running', 'paused');

-- Who asked for what: append-only -------------------------------------------------------------------------------------

CREATE TABLE audit_log (
    audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at       timestamptz NOT NULL DEFAULT now(),
    actor    text NOT NULL,                       -- key:<key id>, cli:<user>, or the name of an automatism
    action   text NOT NULL,
    subject  text NOT NULL,
    details  jsonb NOT NULL DEFAULT '{}'          -- identifiers, counts and choices, never content
);
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Stripe's webhooks: events as they came, and one run for each handler --------------------------------------------------

CREATE TABLE webhook_events (
    event_id    text PRIMARY KEY,                 -- Stripe's
    endpoint    text NOT NULL,                    -- it came to first
    account     text NOT NULL DEFAULT '',         -- connected account; '' for our own
    event_type  text NOT NULL,
    object_id   text NOT NULL,
    is_thin     boolean NOT NULL,
    livemode    boolean NOT NULL,
    created_at  timestamptz NOT NULL,             -- at Stripe
    received_at timestamptz NOT NULL,             -- by the bridge, first
    deliveries  int NOT NULL DEFAULT 1,
    body        bytea NOT NULL,                   -- raw, never logged
    topic       text NOT NULL,
    partition   int NOT NULL,
    "offset"    bigint NOT NULL
);
CREATE INDEX webhook_events_by_time ON webhook_events (created_at, event_id);

CREATE TABLE webhook_runs (
    event_id        text NOT NULL REFERENCES webhook_events ON DELETE CASCADE,
    handler         text NOT NULL,                -- `tidemeter`, or the name of a user's handler
    subject         text NOT NULL,                -- events of one subject run one after the other, oldest first
    created_at      timestamptz NOT NULL,         -- of the event
    state           text NOT NULL DEFAULT 'received'
        CHECK (state IN ('received', 'processing', 'succeeded', 'failed', 'dead', 'stale')),
    attempts        int NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL,         -- `processing`: when its lease ends
    error_class     text,
    error_code      text,
    replays         int NOT NULL DEFAULT 0,
    settled_at      timestamptz,
    PRIMARY KEY (event_id, handler),
    CHECK ((state IN ('succeeded', 'dead', 'stale')) = (settled_at IS NOT NULL))
);
CREATE INDEX webhook_runs_due ON webhook_runs (next_attempt_at) WHERE state IN ('received', 'processing', 'failed');
CREATE INDEX webhook_runs_in_order ON webhook_runs (handler, subject, created_at, event_id)
    WHERE state IN ('received', 'processing', 'failed');
CREATE INDEX webhook_runs_dead ON webhook_runs (event_id) WHERE state = 'dead';
CREATE INDEX webhook_runs_settled ON webhook_runs (settled_at) WHERE settled_at IS NOT NULL;

-- The newest event that was processed of each subject: an older one is stale.
CREATE TABLE webhook_subjects (
    handler    text NOT NULL,
    subject    text NOT NULL,
    newest_at  timestamptz NOT NULL,
    PRIMARY KEY (handler, subject)
);

CREATE FUNCTION guard_webhook_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.event_id, NEW.handler, NEW.subject, NEW.created_at)
        IS DISTINCT FROM (OLD.event_id, OLD.handler, OLD.subject, OLD.created_at)
        OR NEW.state <> OLD.state AND (OLD.state || ' ' || NEW.state) NOT IN (
            'received processing', 'failed processing',
            'processing succeeded', 'processing failed', 'processing dead', 'processing stale',
            'dead received', 'failed received')
    THEN
        RAISE EXCEPTION 'run % of %: no way leads from % to %', OLD.handler, OLD.event_id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER webhook_runs_guard BEFORE UPDATE ON webhook_runs FOR EACH ROW EXECUTE FUNCTION guard_webhook_run();

-- What webhooks told of Stripe's objects: identifiers, states, times and amounts ------------------------------------------

CREATE TABLE stripe_customers (
    stripe_customer text PRIMARY KEY,
    account         text NOT NULL DEFAULT '',
    timezone        text,                         -- metadata `tidemeter_timezone`, if it names one
    deleted_at      timestamptz,
    seen_at         timestamptz NOT NULL          -- of the event that told it
);

CREATE TABLE stripe_subscriptions (
    subscription_id text PRIMARY KEY,
    account         text NOT NULL DEFAULT '',
    stripe_customer text NOT NULL,
    status          text NOT NULL,
    is_metered      boolean NOT NULL,
    unit            text,                         -- its cycle: count × unit from the anchor
    count           int,
    anchor          timestamptz,
    created_at      timestamptz NOT NULL,
    past_due_since  timestamptz,
    exhausted_at    timestamptz,                  -- when dunning was told to be exhausted
    seen_at         timestamptz NOT NULL
);
CREATE INDEX stripe_subscriptions_by_customer ON stripe_subscriptions (stripe_customer);
CREATE INDEX stripe_subscriptions_past_due ON stripe_subscriptions (past_due_since) WHERE past_due_since IS NOT NULL;

CREATE TABLE stripe_invoices (
    invoice_id      text PRIMARY KEY,
    account         text NOT NULL DEFAULT '',
    stripe_customer text NOT NULL,
    subscription_id text,
    status          text NOT NULL,
    is_cycle        boolean NOT NULL,             -- of a subscription's cycle: it takes the usage of its period
    period_start    timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    finalizes_at    timestamptz,                  -- automatically
    finalized_at    timestamptz,
    seen_at         timestamptz NOT NULL
);
CREATE INDEX stripe_invoices_by_period ON stripe_invoices (stripe_customer, period_end);
CREATE INDEX customers_by_stripe_customer ON customers (stripe_customer);

-- When the invoice of a customer's period took the last usage, or will; of several the first. An invoice of a
-- subscription that is not metered says nothing, one of a subscription that no event has told of yet may.
CREATE VIEW invoice_limits AS
SELECT i.stripe_customer, i.period_end, min(coalesce(i.finalized_at, i.finalizes_at)) AS final_at
FROM stripe_invoices i LEFT JOIN stripe_subscriptions s USING (subscription_id)
WHERE i.account = '' AND i.is_cycle AND coalesce(s.is_metered, true)
GROUP BY i.stripe_customer, i.period_end;

-- Charges and refunds, until their balance transactions are known and fit.
CREATE TABLE stripe_fees (
    object_id           text PRIMARY KEY,         -- ch_… or re_…
    kind                text NOT NULL CHECK (kind IN ('charge', 'refund')),
    account             text NOT NULL DEFAULT '',
    charge_id           text NOT NULL,            -- of a refund: what it refunds
    amount              bigint NOT NULL,          -- minor units, never negative
    currency            text NOT NULL,
    happened_at         timestamptz NOT NULL,
    balance_transaction text,
    fee                 bigint,                   -- minor units of the balance transaction's currency
    net                 bigint,
    fee_currency        text,
    state               text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'matched', 'differs')),
    difference          text,                     -- what does not fit, as a code
    attempts            int NOT NULL DEFAULT 0,
    next_attempt_at     timestamptz NOT NULL,
    settled_at          timestamptz,
    CHECK ((state = 'pending') = (settled_at IS NULL))
);
CREATE INDEX stripe_fees_due ON stripe_fees (next_attempt_at) WHERE state = 'pending';
CREATE INDEX stripe_fees_refunds ON stripe_fees (charge_id) WHERE kind = 'refund';

CREATE TABLE stripe_cards (
    payment_method  text PRIMARY KEY,
    account         text NOT NULL DEFAULT '',
    stripe_customer text NOT NULL,
    expires_on      date NOT NULL,                -- first day of the month after the last it is good for
    told_for        date,                         -- the expiry that was told of
    seen_at         timestamptz NOT NULL
);
CREATE INDEX stripe_cards_by_expiry ON stripe_cards (expires_on);

-- Mails to operators: one for each ops event that asks for one.
CREATE TABLE notifications (
    ops_event_id    text PRIMARY KEY,
    name            text NOT NULL,
    subject_type    text NOT NULL,
    subject_id      text NOT NULL,
    source          text NOT NULL,
    attributes      jsonb NOT NULL DEFAULT '{}',
    happened_at     timestamptz NOT NULL,
    state           text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sending', 'sent', 'dead')),
    attempts        int NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL,
    error_class     text,
    settled_at      timestamptz,
    CHECK ((state IN ('sent', 'dead')) = (settled_at IS NOT NULL))
);
CREATE INDEX notifications_due ON notifications (next_attempt_at) WHERE state IN ('pending', 'sending');
