"""The plan of a replay, as it is shown: what was read, what would change, and a hash of exactly that."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated

import msgspec

#: Hours that a plan lists, at most; it counts and hashes all of them.
HOURS_SHOWN = 1000


class PlannedRange(msgspec.Struct, frozen=True, rename="camel"):
    """Records of one partition that are read: from an offset to before the other."""

    topic: str
    partition: int
    start: int
    end: int


class PlannedHour(msgspec.Struct, frozen=True, rename="camel"):
    """One hour of an item, in one billing period, before and after."""

    hour: datetime
    period_start: datetime
    before: Decimal
    after: Decimal
    delta: Decimal
    events_before: int
    events_after: int


class PlannedItem(msgspec.Struct, frozen=True, rename="camel"):
    """One item that changes. `before` and `after` add up the hours that are listed."""

    tenant_id: str
    customer_ref: str
    meter: str
    dimensions: list[str]
    before: Decimal
    after: Decimal
    delta: Decimal
    hours: list[PlannedHour]


class PlannedPeriod(msgspec.Struct, frozen=True, rename="camel"):
    """A billing period of which what was closed or pushed is kept wrongly, against the journal of deltas."""

    tenant_id: str
    customer_ref: str
    meter: str
    period_start: datetime
    pushed_before: Decimal
    pushed_after: Decimal


class PlannedTotal(msgspec.Struct, frozen=True, rename="camel"):
    """Everything of one meter in the window, before and after: its events, and its hours added up."""

    tenant_id: str
    meter: str
    events_before: int
    events_after: int
    before: Decimal
    after: Decimal


class Plan(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a replay changes, or has changed.

    `since` and `until` are the full hours that were recomputed; null: without bound. `planHash` goes into an
    apply that shall do this and nothing else. `unreadable` are records, by reason, that counted once and
    cannot be counted by this release.
    """

    since: datetime | None
    until: datetime | None
    ranges: list[PlannedRange]
    records_read: int
    events_matched: int
    unreadable: Mapping[str, int]
    changed_hours: int
    changed_items: int
    changed_values: int
    changed_watermarks: int
    changed_periods: int
    items: list[PlannedItem]
    periods: list[PlannedPeriod]
    truncated: Annotated[bool, msgspec.Meta(description="Whether more changes than are listed.")]
    totals: list[PlannedTotal]
    plan_hash: str


class Refusal(msgspec.Struct, frozen=True):
    """Why there is no plan: a stable code, a sentence, and the field at fault."""

    code: str
    message: str
    path: str


class DryRunAnswer(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What a dry run in a process of its own says: one of these. ``away``: who did not answer."""

    plan: Plan | None = None
    refusal: Refusal | None = None
    away: str | None = None
