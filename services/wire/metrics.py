"""Every metric of the product, defined once. Labels never hold a customer identifier.

Names without the prefix ``tidemeter_`` are fixed by operators' runbooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.wire.ops import NAMES

#: Requests by route template and answer. Worry when 5xx of a route rises.
HTTP_REQUESTS = Counter("http_requests", "HTTP requests answered.", ["route", "method", "status_code"])
#: How long requests take, seconds. Worry when the 95th percentile of /v1/events/ingest passes 0.2 s.
HTTP_SECONDS = Histogram("http_request_duration_seconds", "Time to answer a request.", ["route", "method"])

#: Events that Kafka acknowledged to an API client, or that were refused; by result code.
INGEST_EVENTS = Counter("tidemeter_ingest_events", "Events received by the API.", ["result"])

#: Records by what became of them. Worry when conflict, dead_lettered or upcast_failed grows.
OUTCOMES = Counter("tidemeter_outcomes", "Usage records by outcome.", ["outcome"])
#: Records redelivered and skipped. Grows after restarts and rewinds; worry only if it never stops.
REDELIVERED = Counter("tidemeter_redelivered_records", "Records below the stored position, skipped.")
#: Records on the usage topics minus records with an outcome, at rest. Worry when not 0.
CONSERVATION_GAP = Gauge("tidemeter_conservation_gap", "Records without an outcome, lag excluded.")
#: Records not yet processed.
LAG = Gauge("tidemeter_lag_records", "Records behind the end of the log.", ["group", "topic", "partition"])
#: Time of one chunk, seconds, by stage: prepare, transaction, relay.
CHUNK_SECONDS = Histogram("tidemeter_chunk_seconds", "Time of one stage of one chunk.", ["stage"])
#: 1 while a partition is stopped by a gap or by the breaker. Page someone.
HALTED = Gauge(
    "tidemeter_partition_halted", "Partitions that wait for an operator.", ["topic", "partition", "reason"]
)
#: Rows waiting in the outbox. Worry when it grows.
OUTBOX = Gauge("tidemeter_outbox_rows", "Records decided but not yet on Kafka.", ["producer"])
#: Age of the oldest of them, seconds; 0 when none waits. Worry when it passes a minute.
OUTBOX_OLDEST = Gauge(
    "tidemeter_outbox_oldest_seconds", "Age of the oldest record that is not yet on Kafka.", ["producer"]
)
#: Newest event time counted, seconds since 1970: ``time()`` minus it is the lag of the watermark. A moment
#: and not an age, so that it grows while nobody looks. Worry when a meter that is busy falls behind.
WATERMARK = Gauge("tidemeter_watermark_timestamp_seconds", "Newest event time counted.", ["tenant", "meter"])
#: Ops events by name, counted once Kafka has them. Worry by name: deploy/ALERTS.md.
OPS_EVENTS = Counter("tidemeter_ops_events", "Ops events sent.", ["name"])
#: Parked records that wait for a fix or a person, by kind. Worry when it grows.
PARKED = Gauge("tidemeter_parked_records", "Parked records that are not settled.", ["kind", "reason"])
#: Retries of a chunk because Kafka or PostgreSQL was away.
RETRIES = Counter("tidemeter_retries", "Retries after a transient failure.", ["stage"])

#: Deltas closed by the timer.
DELTAS_CLOSED = Counter("tidemeter_deltas_closed", "Deltas closed.")
#: Intents by state; failed ones until they are retried. Worry when in_doubt or failed is above 0.
INTENTS = Gauge("tidemeter_intents", "Intents in the journal.", ["state"])
#: Age of the oldest intent of a state, seconds: since it was recorded; of failed ones, since they failed.
INTENTS_OLDEST = Gauge("tidemeter_intents_oldest_seconds", "Age of the oldest intent of a state.", ["state"])
#: Seconds until the first intent in doubt is no longer resent, or misses its invoice; below 0: it did.
IN_DOUBT_DEADLINE = Gauge(
    "tidemeter_in_doubt_deadline_seconds", "Time left for the most urgent intent in doubt; +Inf for none."
)
IN_DOUBT_DEADLINE.set(math.inf)
#: Meters whose usage Stripe does not take: missing or archived. Page someone when above 0.
METERS_PAUSED = Gauge("tidemeter_meters_paused", "Meters that wait until Stripe has them again.")
#: Calls to Stripe by what the answer means.
STRIPE_CALLS = Counter("tidemeter_stripe_calls", "Calls to Stripe.", ["result"])
#: Meter events by what the answer means; one call of the stream carries up to 100.
METER_EVENTS = Counter("tidemeter_meter_events", "Meter events sent to Stripe.", ["result"])
#: Meter events per second that this pusher may send.
STRIPE_RATE_MAX = Gauge("tidemeter_stripe_rate_max", "Meter events per second, at most.")
#: Time of one call to Stripe, seconds.
STRIPE_SECONDS = Histogram("tidemeter_stripe_call_seconds", "Time of one call to Stripe.")

#: Webhook requests by endpoint and answer. Worry when anything but accepted rises.
WEBHOOKS = Counter("tidemeter_webhooks", "Webhook requests answered.", ["endpoint", "result"])
#: Runs of webhook handlers by state: received, processing, failed and dead. Worry when dead is above 0.
WEBHOOK_RUNS = Gauge("tidemeter_webhook_runs", "Webhook runs that are not done.", ["state"])
#: Attempts of webhook handlers by what came of them.
WEBHOOK_ATTEMPTS = Counter("tidemeter_webhook_attempts", "Attempts of webhook handlers.", ["result"])
#: Mails by what came of them. Worry when dead rises.
NOTIFICATIONS = Counter("tidemeter_notifications", "Mails to operators.", ["result"])

#: Usage records written to the archive.
ARCHIVED = Counter("tidemeter_archived_records", "Usage records written to the archive.", ["topic"])
#: Records on the log that are not in the archive yet. Worry when it grows for hours.
ARCHIVE_LAG = Gauge(
    "tidemeter_archive_lag_records", "Records that are not in the archive.", ["topic", "partition"]
)
#: Age of the oldest of them, seconds. Worry when it passes TIDEMETER_ARCHIVE_FILE_SECONDS by far.
ARCHIVE_OLDEST = Gauge("tidemeter_archive_oldest_seconds", "Age of the oldest record not in the archive.")
#: 1 while a partition is not archived any more, because records are gone. Worry when above 0.
ARCHIVE_HALTED = Gauge(
    "tidemeter_archive_halted",
    "Partitions whose archiving waits for an operator.",
    ["topic", "partition", "reason"],
)
#: Replays that are asked for or running. Worry when requested stays above 0: does a replayer run?
REPLAYS = Gauge("tidemeter_replays", "Replays that are not done.", ["state"])
#: Records of the replay that runs in this process: read, total. 0 while none does.
REPLAY_RECORDS = Gauge("tidemeter_replay_records", "Records of the running replay.", ["of"])


class Snapshot(Collector):
    """A gauge whose series are replaced all at once, so that none stays behind and no scrape sees a part."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._rows: Sequence[tuple[Sequence[str], float]] = ()
        REGISTRY.register(self)

    def show(self, rows: Iterable[tuple[Sequence[str], float]]) -> None:
        """From now on these: the values of the labels, and the number."""
        self._rows = list(rows)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What a scrape sees."""
        family = GaugeMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in self._rows:
            family.add_metric(labels, value)
        yield family


_ITEM_PERIOD = ("tenant", "meter", "item", "period")
#: What Stripe should show minus what it shows, without sign; NaN: not known. Worry when above 0 for long.
RECON_DIFF_ABS = Snapshot(
    "reconciliation_diff_abs", "Difference to Stripe, by item and period.", _ITEM_PERIOD
)
#: The same as a part of Stripe's total: 0.005 is half a percent. Page someone when above that.
RECON_DIFF_PCT = Snapshot(
    "reconciliation_diff_pct", "Relative difference to Stripe, by item and period.", _ITEM_PERIOD
)
#: Items and periods by what was found. Worry when unknown stays above 0; page someone for drift.
RECON_ITEMS = Gauge("tidemeter_reconciliation_items", "Items and periods by what was found.", ["state"])
#: Reconciliations by how they ended. Worry when done stops growing.
RECON_RUNS = Counter("recon_runs", "Reconciliations that have ended, of all or a part.", ["result", "scope"])
#: Time of one reconciliation, seconds.
RECON_SECONDS = Histogram(
    "recon_duration_seconds",
    "Time of one reconciliation.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
)

# From 0 on, so that the first one is an increase.
for _metric, _values in (
    (OPS_EVENTS, sorted(NAMES)),
    (RETRIES, ("Kafka", "PostgreSQL")),
    (WEBHOOK_ATTEMPTS, ("succeeded", "stale", "failed", "dead", "superseded")),
    (NOTIFICATIONS, ("sent", "refused", "unknown", "dead")),
    (REPLAY_RECORDS, ("read", "total")),
):
    for _value in _values:
        _metric.labels(_value)
for _result in ("done", "failed"):
    for _scope in ("all", "part"):
        RECON_RUNS.labels(_result, _scope)
