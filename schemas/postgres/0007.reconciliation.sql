-- depends: 0006.outbox_age

-- Reconciliation: what Stripe shows of a customer, meter and billing period, beside what it should.

CREATE TABLE reconciliation_runs (
    run_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    requested_by text NOT NULL,                   -- key:<key id>, cli:<user>, or loop
    requested_at timestamptz NOT NULL DEFAULT now(),
    tenant_id    text,                            -- null: every tenant
    meters       text[],                          -- null: every meter
    customer_ref text,
    period_at    timestamptz,                     -- a time within the period; null: every period that counts
    state        text NOT NULL DEFAULT 'requested' CHECK (state IN ('requested', 'running', 'done', 'failed')),
    started_at   timestamptz,
    finished_at  timestamptz,
    ok           int NOT NULL DEFAULT 0,          -- item periods, by what was found
    adjust       int NOT NULL DEFAULT 0,
    drift        int NOT NULL DEFAULT 0,
    unknown      int NOT NULL DEFAULT 0,
    CHECK ((state IN ('requested', 'running')) = (finished_at IS NULL))
);
CREATE INDEX reconciliation_runs_open ON reconciliation_runs (run_id) WHERE finished_at IS NULL;

-- The newest finding for each customer, meter and period.
CREATE TABLE reconciliations (
    tenant_id       text NOT NULL,
    customer_ref    text NOT NULL,
    meter           text NOT NULL,
    period_start    timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    item            text NOT NULL,                -- hash of tenant, customer and meter, for labels
    event_name      text NOT NULL,
    stripe_customer text,
    state           text NOT NULL CHECK (state IN ('ok', 'adjust', 'drift', 'unknown')),
    reason          text,                         -- why it is unknown
    is_final        boolean NOT NULL,             -- the invoice takes no more usage
    counted         numeric NOT NULL,             -- by the counters
    waiting         numeric NOT NULL,             -- of that, on its way to Stripe
    local           numeric NOT NULL,             -- what Stripe should show
    stripe          numeric,                      -- what it shows; null: not known
    diff_abs        numeric,
    diff_pct        numeric,                      -- 0.005 is half a percent
    findings        jsonb NOT NULL,
    is_dismissed    boolean NOT NULL DEFAULT false, -- somebody has settled this very difference
    since           timestamptz NOT NULL,         -- in this state
    checked_at      timestamptz NOT NULL,
    CHECK ((state = 'unknown') = (reason IS NOT NULL)),
    CHECK ((diff_abs IS NULL) = (state = 'unknown') AND (diff_pct IS NULL) = (state = 'unknown')),
    PRIMARY KEY (tenant_id, customer_ref, meter, period_start)
);
CREATE INDEX reconciliations_by_end ON reconciliations (period_end);

-- At most one that is open for each: finding the same again changes it, and finding nothing resolves it.
CREATE TABLE reconciliation_suggestions (
    suggestion_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id     text NOT NULL,
    customer_ref  text NOT NULL,
    meter         text NOT NULL,
    period_start  timestamptz NOT NULL,
    kind          text NOT NULL CHECK (kind IN ('adjust', 'replay')),
    amount        numeric NOT NULL,               -- what Stripe lacks; negative: has too much
    state         text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'dismissed', 'resolved')),
    is_told       boolean NOT NULL DEFAULT false, -- there was an ops event about it
    created_at    timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    closed_at     timestamptz,
    closed_by     text,
    note          text,
    CHECK ((state = 'open') = (closed_at IS NULL))
);
CREATE UNIQUE INDEX reconciliation_suggestions_open
    ON reconciliation_suggestions (tenant_id, customer_ref, meter, period_start) WHERE state = 'open';
CREATE INDEX reconciliation_suggestions_newest
    ON reconciliation_suggestions (tenant_id, customer_ref, meter, period_start, suggestion_id);
