"""What is true of the servers and the configuration at one moment. Nothing is judged here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from services.wire.topics import TopicPlan


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock beside this machine's: ``ahead_seconds`` of ours, give or take ``uncertainty_seconds``."""

    name: str
    ahead_seconds: float
    uncertainty_seconds: float


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """Our own settings as far as they can be unsafe. No secret is in here."""

    sink: str = "stripe"
    streams: bool = False
    dedupe_days: int = 35
    usage_retention_days: int = 90
    archived: bool = False
    webhook_concurrency: int = 4
    key_kind: str | None = (
        "rk_test"  # sk_test, rk_test, sk_live, rk_live, another word, or None without a key
    )
    live_allowed: bool = False
    stripe_host: str | None = None  # None: Stripe's own
    webhook_secrets: str = "set"  # set, missing, or what is wrong with them
    bridge_runs: bool = False  # a running `tidemeter up` has secrets of its own
    sink_webhook_complete: bool = True

    @property
    def key_is_live(self) -> bool:
        """Whether the key bills for real."""
        return bool(self.key_kind and self.key_kind.endswith("_live"))


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as Kafka has it. ``replicas`` of the partition that has the fewest."""

    partitions: int
    replicas: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Topics:
    """``plans`` are the topics as our settings would create them."""

    brokers: int
    address: str
    plans: tuple[TopicPlan, ...]
    found: Mapping[str, Topic]


@dataclass(frozen=True, slots=True)
class Postgres:
    """The server that the DSN names, as its user finds it."""

    version: int  # such as 150004
    settings: Mapping[str, str]
    is_standby: bool
    migrations_known: tuple[str, ...]
    migrations_applied: tuple[str, ...]
    connections_foreign: int  # client connections of other programs


@dataclass(frozen=True, slots=True)
class DeclaredMeter:
    """One meter of one tenant."""

    tenant: str
    meter: str
    formula: str
    lateness_seconds: int
    allow_negative: bool
    event_name: str
    customer_key: str
    value_key: str

    @property
    def name(self) -> str:
        """As an operator calls it."""
        return f"{self.tenant}/{self.meter}"


@dataclass(frozen=True, slots=True)
class Alignment:
    """A Stripe customer's periods: by our ``calendar``, and by the cycle of its subscription."""

    calendar: str
    timezone: str
    unit: str
    count: int
    anchor: datetime


@dataclass(frozen=True, slots=True)
class Configuration:
    """What `tidemeter apply` and the webhooks declared."""

    meters: tuple[DeclaredMeter, ...] = ()
    zones: Mapping[str, int] = field(default_factory=dict)  # zone → tenants and customers that use it
    calendars: tuple[str, ...] = ()  # every different one
    alignments: tuple[Alignment, ...] = ()
    customers_unmapped: int = 0  # with usage, and without a Stripe id
    customers_deleted: int = 0  # mapped to a customer that Stripe says was deleted
    livemode_events: int = 0  # webhooks of the last seven days, by mode
    testmode_events: int = 0
    sample: tuple[tuple[str, str], ...] = ()  # (Stripe customer, event name) of some that are mapped


@dataclass(frozen=True, slots=True)
class Answer:
    """What Stripe said to one question: a status, or None and the ``reason`` why there is none."""

    status: int | None
    reason: str = ""
    permission: str | None = None  # the one that a 403 names


@dataclass(frozen=True, slots=True)
class StripeMeter:
    """One meter as Stripe has it."""

    event_name: str
    is_active: bool
    formula: str
    customer_key: str
    value_key: str
    time_window: str | None
    livemode: bool


@dataclass(frozen=True, slots=True)
class StripeSide:
    """What the key may do, by what it is needed for; Stripe's meters, None if they could not be read."""

    answers: Mapping[str, Answer]
    version_asked: str
    version_answered: str | None
    meters: tuple[StripeMeter, ...] | None = None
    customers_asked: int = 0
    customers_unknown: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that could be gathered. A part that is None did not answer: ``away`` says why."""

    own: OwnSettings
    topics: Topics | None = None
    brokers: Mapping[str, Mapping[str, str]] | None = None  # broker id → its configuration
    postgres: Postgres | None = None
    configuration: Configuration | None = None
    stripe: StripeSide | None = None
    clocks: tuple[Clock, ...] = ()
    away: Mapping[str, str] = field(default_factory=dict)  # code of the finding → reason
