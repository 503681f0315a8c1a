"""What was declared: lateness, customers, time zones and billing periods. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from services.doctor.facts import Alignment, Configuration, OwnSettings
from services.doctor.findings import Finding
from services.doctor.zones import Zones
from services.wire.errors import Misconfigured
from services.wire.periods import Calendar, calendar_text
from services.wire.times import micros

_HOUR = timedelta(hours=1)


def judge_declared(
    configuration: Configuration, own: OwnSettings, zones: Zones, now: datetime
) -> Iterator[Finding]:
    """The configuration by itself."""
    yield from _lateness(configuration, own)
    yield from _customers(configuration)
    yield from _zones(configuration, zones, now)
    yield from _periods(configuration, now)


def _lateness(configuration: Configuration, own: OwnSettings) -> Iterator[Finding]:
    for meter in configuration.meters:
        days = meter.lateness_seconds / 86_400
        if days > own.dedupe_days:
            yield Finding(
                "lateness_beyond_keys",
                meter.name,
                f"{meter.name} takes usage {days:.3g} days late, but idempotency keys are kept for "
                f"{own.dedupe_days} days: what is later than that waits for a person.",
                f"Set TIDEMETER_DEDUPE_DAYS={int(-(-days // 1))}, or a shorter lateness.",
            )


def _customers(configuration: Configuration) -> Iterator[Finding]:
    if configuration.customers_unmapped:
        yield Finding(
            "customers_unmapped",
            "customers",
            f"{configuration.customers_unmapped} customers have usage and no Stripe id: it waits, and is on "
            "no invoice.",
            "Map them in the file of `tidemeter apply -f FILE`, or run that with --create-in-stripe.",
        )
    if configuration.customers_deleted:
        yield Finding(
            "customers_deleted",
            "customers",
            f"{configuration.customers_deleted} customers are mapped to Stripe customers that were deleted: "
            "Stripe refuses their usage.",
            "Map them to others with `tidemeter apply -f FILE`, then `tidemeter meter-events retry`.",
        )


def _zones(configuration: Configuration, zones: Zones, now: datetime) -> Iterator[Finding]:
    for name, uses in sorted(configuration.zones.items()):
        if not zones.exists(name):
            yield Finding(
                "zone_unknown",
                name,
                f"{uses} tenants or customers have the time zone {name}, which this machine does not know "
                f"(tzdata {zones.version}): their usage is not counted here.",
                "Install a newer tzdata, or declare another zone with `tidemeter apply -f FILE`.",
            )
            continue
        if (target := zones.alias_of(name)) is not None:
            yield Finding(
                "zone_alias",
                name,
                f"{uses} tenants or customers have the time zone {name}, an old name of {target} that some "
                "systems do not have.",
                f"Declare {target} with `tidemeter apply -f FILE`; periods stay the same.",
            )
        offset = now.astimezone(ZoneInfo(name)).utcoffset() or timedelta(0)
        if offset % _HOUR:
            yield Finding(
                "zone_cuts_hours",
                name,
                f"{uses} tenants or customers have the time zone {name}, {_offset(offset)} of UTC: an edge "
                "of their periods cuts an hour, which is counted in two parts, and which Stripe shows as "
                "one.",
                "Nothing; when you compare that hour with Stripe, add both parts.",
            )


def _offset(offset: timedelta) -> str:
    minutes = int(offset.total_seconds() // 60)
    sign, minutes = ("+" if minutes >= 0 else "-"), abs(minutes)
    return f"{sign}{minutes // 60:02}:{minutes % 60:02}"


def _periods(configuration: Configuration, now: datetime) -> Iterator[Finding]:
    apart = sum(not _aligned(one, now) for one in configuration.alignments)
    if apart:
        yield Finding(
            "periods_unaligned",
            "billing periods",
            f"{apart} of {len(configuration.alignments)} Stripe customers with a metered subscription have "
            "other billing periods here than its cycle: usage near an edge is on another invoice than "
            "expected.",
            "Leave `subscription` and `timezone` out of their entries for `tidemeter apply`, so that "
            "webhooks set them; or declare the subscription's anchor.",
        )


def _aligned(one: Alignment, now: datetime) -> bool:
    """Whether the period of this moment has the same edges."""
    try:
        theirs = Calendar.parse(calendar_text(one.timezone, one.anchor, count=one.count, unit=one.unit))
        return Calendar.parse(one.calendar).bounds(micros(now)) == theirs.bounds(micros(now))
    except (Misconfigured, OverflowError):
        return False
