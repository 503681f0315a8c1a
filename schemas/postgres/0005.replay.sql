-- Replay: which records of the log counted, where to look for a time, and the jobs that recompute.

-- Records that did not count as they came: duplicates, conflicts, parked records, adjustments. Every other record
-- between decided_from and next_offset of its partition counted, in the hour it happened in.
CREATE TABLE uncounted_records (
    topic        text NOT NULL,
    partition    int NOT NULL,
    first_offset bigint NOT NULL,
    last_offset  bigint NOT NULL,
    offsets      bigint[] NOT NULL,               -- ascending
    PRIMARY KEY (topic, partition, first_offset)
);

-- Of those, what a re-drive has counted since.
CREATE TABLE recounted_records (
    recount_id bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    topic      text NOT NULL,
    partition  int NOT NULL,
    "offset"   bigint NOT NULL,
    PRIMARY KEY (topic, partition, "offset")
);

-- When the events of 2,000 records in a row happened, at the earliest and at the latest.
CREATE TABLE log_blocks (
    topic       text NOT NULL,
    partition   int NOT NULL,
    block       bigint NOT NULL,                  -- offset / 2000
    first_event timestamptz NOT NULL,
    last_event  timestamptz NOT NULL,
    PRIMARY KEY (topic, partition, block)
) WITH (fillfactor = 70);

-- A release that did not keep decisions moves next_offset only; then they are kept anew from there on.
ALTER TABLE partition_offsets
    ADD COLUMN decided_from bigint NOT NULL DEFAULT 0, -- from here to decided_to the decisions are kept
    ADD COLUMN decided_to   bigint NOT NULL DEFAULT -1;

ALTER TABLE adjustments ADD COLUMN counted_at timestamptz; -- `applied`: the time it counts at
UPDATE adjustments
SET counted_at = CASE WHEN date_trunc('hour', occurred_at, 'UTC') = applied_hour THEN occurred_at ELSE applied_hour END
WHERE state = 'applied';
CREATE INDEX adjustments_counted ON adjustments (tenant_id, counted_at) WHERE counted_at IS NOT NULL;

CREATE TABLE replays (
    replay_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request       jsonb NOT NULL,                 -- as it was asked for, its times resolved
    tenant_id     text,                           -- null: every tenant
    meters        text[],                         -- null: every meter
    since         timestamptz NOT NULL,           -- full hours; -infinity and infinity: everything
    until         timestamptz NOT NULL,
    plan_hash     text,                           -- what it may do, and nothing else
    requested_by  text NOT NULL,                  -- key:<key id> or cli:<user>
    requested_at  timestamptz NOT NULL DEFAULT now(),
    state         text NOT NULL DEFAULT 'requested'
        CHECK (state IN ('requested', 'running', 'done', 'refused', 'failed', 'cancelled')),
    progress      jsonb NOT NULL DEFAULT '{}',    -- what is read, and up to where; see services/replay
    records_read  bigint NOT NULL DEFAULT 0,
    records_total bigint NOT NULL DEFAULT 0,
    result        jsonb,                          -- `done`: the plan that was carried out
    error         text,                           -- `refused` and `failed`: a code and a sentence
    started_at    timestamptz,
    finished_at   timestamptz,
    CHECK ((state IN ('requested', 'running')) = (finished_at IS NULL))
);
CREATE INDEX replays_open ON replays (replay_id) WHERE finished_at IS NULL;

-- What the one replay that runs has recomputed so far. A dry run has temporary tables of the same names.
CREATE TABLE replay_items (
    item_id      uuid PRIMARY KEY,
    tenant_id    text NOT NULL,
    customer_ref text NOT NULL,
    meter        text NOT NULL,
    dimensions   text[] NOT NULL,
    calendar     text NOT NULL,
    watermark    timestamptz NOT NULL
);
CREATE TABLE replay_buckets (LIKE buckets INCLUDING DEFAULTS INCLUDING INDEXES);
CREATE TABLE replay_values (LIKE unique_values INCLUDING INDEXES);
