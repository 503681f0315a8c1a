"""The question why Stripe holds a number for a customer in an hour, and its answer, as they are sent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Literal

import msgspec

from services.streaming.replay_plan import Refusal
from services.streaming.replays import Text, Time

#: Rows of each list of an answer, unless the question says otherwise.
LIMIT = 1000
LIMIT_MAX = 100_000

Fate = Literal["counted", "recounted", "duplicate", "conflict", "adjusted", "parked", "uncounted"]
Source = Literal["kafka", "archive", "parked_record", "adjustment"]
Verdict = Literal["agree", "explained", "differ", "unknown"]
Direction = Literal["in", "out"]


class Question(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """Why does Stripe hold this number? `customer` is Stripe's id or our reference, `meter` our slug or
    Stripe's event name, `hour` any time within the hour. `limit`: rows of each list of the answer. `others`:
    also say what other tenants sent for the same customer and meter; for those who may know."""

    customer: Text
    meter: Text
    hour: Time
    tenant_id: Text | None = None
    limit: Annotated[int, msgspec.Meta(ge=0, le=LIMIT_MAX)] = LIMIT
    others: bool = False


class Amount(msgspec.Struct, frozen=True, rename="camel"):
    """How many intents, and the sum of their amounts."""

    count: int
    amount: Decimal


class AtStripe(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What Stripe should hold for the hour, by what was sent. Stripe itself was not asked.

    `expected` was reported. `uncertain` is in flight or in doubt: Stripe may hold it as well. `others`, for
    keys without a tenant: meter events that other tenants sent for the same customer, meter and hour.
    """

    expected: Decimal
    uncertain: Decimal
    by_state: Mapping[str, Amount]
    others: Amount | None
    sentence: str


class Intent(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One meter event: what is or was to be sent."""

    identifier: str
    item: int
    stripe_customer: str
    event_name: str
    amount: Decimal
    event_at: datetime
    state: str
    attempts: int
    first_sent_at: datetime | None
    settled_at: datetime | None
    http_status: int | None
    error_code: str | None
    request_id: str | None
    replaces: str | None
    replaced_by: str | None
    retried_as: str | None


class Delta(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What closing split off. `recorded`: the pusher has made an intent of it."""

    identifier: str
    item: int
    period_start: datetime
    sequence: int
    amount: Decimal
    closed_at: datetime
    recorded: bool


class Carried(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Usage of one hour that left in another. `in`: happened elsewhere and was sent in this hour."""

    direction: Direction
    item: int
    hour: datetime
    period_start: datetime
    to_hour: datetime
    to_period: datetime
    amount: Decimal
    reason: str
    carried_at: datetime


class Bucket(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The counter of the hour of one item, in one billing period.

    `carry` is what its period has closed and not sent. `recomputed` is what the events amount to by the
    meter's aggregation, `recomputedEvents` how many they are; null: not every record is held any more.
    """

    item: int
    period_start: datetime
    period_end: datetime | None
    total: Decimal
    events: int
    late_events: int
    closed: Decimal | None
    pushed: Decimal
    sequence: int
    open: bool
    carry: Decimal | None
    recomputed: Decimal | None
    recomputed_events: int | None


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What is metered. The other lists name it by its place in this one."""

    customer_ref: str
    meter: str
    aggregation: str
    scale: int
    dimensions: Mapping[str, str]
    calendar: str
    watermark: datetime | None
    waits_for_closing: bool


class Place(msgspec.Struct, frozen=True):
    """A record of the log."""

    topic: str
    partition: int
    offset: int


class EventAdjustment(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The adjustment that an event became."""

    id: str
    state: str
    reason: str
    counted_at: datetime | None


class EventParked(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The parked record that an event is, or was."""

    id: int
    kind: str
    reason: str
    state: str
    outcome: str | None


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One record of the log whose event happened in the hour, and what became of it.

    `counted` as it came, `recounted` by a re-drive, `duplicate` or `conflict` of the record that `first`
    names, `adjusted` because it came too late, `parked`, or `uncounted`: as one of these, and nothing that is
    kept tells any more which. `value` is the text of the property that the meter measures.
    """

    topic: str
    partition: int
    offset: int
    schema_version: int
    source: Source
    arrived_at: datetime
    idempotency_key: str
    occurred_at: datetime
    customer_ref: str
    meter: str
    dimensions: Mapping[str, str]
    quantity: Decimal | None
    value: str | None
    fate: Fate
    first: Place | None
    adjustment: EventAdjustment | None
    parked: EventParked | None


class Adjusted(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Usage that counts in this hour and happened in another, before it."""

    id: str
    customer_ref: str
    meter: str
    idempotency_key: str
    quantity: Decimal
    occurred_at: datetime
    counted_at: datetime
    topic: str
    partition: int
    offset: int


class Records(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How complete the list of events is.

    `missing` records may hold events of the hour and are neither in the log nor in the archive any more;
    `earliest` is the first hour from which on everything is there. `unreadable`, by reason: counted once, and
    this release cannot read them. `waiting` records are in the log and not counted yet, of whatever hour.
    """

    read: int
    complete: bool
    missing: int
    earliest: datetime | None
    unreadable: Mapping[str, int]
    waiting: int
    sentence: str


class Check(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Whether two numbers that ought to agree do.

    `events`: what the events amount to, and the bucket. `pushes`: the hour's buckets, and what was reported
    to Stripe. `period`: what the item's period has closed, and what was sent of it, carried forward, or left.
    `explained`: they differ by exactly `parts`. `differ`: part of the difference has no explanation.
    """

    about: Literal["events", "pushes", "period"]
    item: int
    period_start: datetime | None
    verdict: Verdict
    difference: Decimal | None
    parts: Mapping[str, Decimal]
    sentence: str


class Totals(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How many there are, listed or not."""

    items: int
    intents: int
    deltas: int
    carried: int
    buckets: int
    events: int
    adjustments: int
    checks: Mapping[str, int]


class Explanation(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Why Stripe holds what it holds for a customer and a meter in one hour, from its meter events down to
    the records of the log. Each list has at most as many rows as the question's limit; `totals` counts all.
    """

    tenant_id: str
    hour: datetime
    stripe_customer: str | None
    event_name: str
    customer_refs: list[str]
    meters: list[str]
    stripe: AtStripe
    items: list[Item]
    intents: list[Intent]
    deltas: list[Delta]
    carried: list[Carried]
    buckets: list[Bucket]
    events: list[Event]
    fates: Mapping[str, int]
    adjustments: list[Adjusted]
    records: Records
    checks: list[Check]
    totals: Totals
    truncated: bool

    @property
    def agrees(self) -> bool:
        """Whether every number is what the others say, or differs by what is known."""
        return not (self.totals.checks.get("differ") or self.totals.checks.get("unknown"))


class Explained(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a process that was asked answers: one of these. ``explanation`` is an :class:`Explanation` in
    JSON, passed on as it is; ``away`` names what does not answer."""

    explanation: msgspec.Raw = msgspec.Raw()
    refusal: Refusal | None = None
    away: str | None = None
