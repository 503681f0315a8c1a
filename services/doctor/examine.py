"""Gather all facts, each apart from the others, and judge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psycopg

from services.bridge.endpoints import parse_secrets
from services.doctor import gather_kafka, gather_postgres, gather_stripe
from services.doctor.facts import Clock, Facts, OwnSettings, Topics
from services.doctor.findings import Finding, Part, Report, report
from services.doctor.judge_clocks import judge_clocks
from services.doctor.judge_declared import judge_declared
from services.doctor.judge_kafka import judge_brokers, judge_retention, judge_topics
from services.doctor.judge_postgres import judge_postgres
from services.doctor.judge_stripe import judge_meters, judge_own, judge_stripe
from services.doctor.zones import Zones, known_zones
from services.pusher.sinks.webhook import WebhookSink
from services.wire.errors import Misconfigured, Transient
from services.wire.settings import Settings, running_runtime, secret_file

T = TypeVar("T")


@dataclass
class _Gathering:
    """Facts as they come in. A part that does not answer leaves its reason, and nothing else."""

    away: dict[str, str] = field(default_factory=dict)

    def attempt(self, code: str, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Transient as error:
            self.away[code] = str(error)
        except psycopg.Error as error:
            self.away[code] = type(error).__name__
        except Misconfigured as error:
            self.away[code] = str(error)
        return None


def examine(settings: Settings, zones: Zones | None = None) -> Report:
    """Everything that is unsafe, and what could not be looked at."""
    return judge(gather(settings), zones or known_zones(), datetime.now(UTC))


def gather(settings: Settings) -> Facts:
    """All facts. No part waits for another to be well; each has time limits of its own."""
    own = gather_own(settings)
    gathering, clocks = _Gathering(), list[Clock]()
    attempt = gathering.attempt
    topics = brokers = None
    admin = attempt("kafka_unchecked", lambda: gather_kafka.connect(settings))
    if admin is not None:
        topics = attempt("kafka_unchecked", lambda: gather_kafka.gather_topics(admin, settings))
        if topics is not None:
            known: Topics = topics
            brokers = attempt("brokers_unchecked", lambda: gather_kafka.gather_brokers(admin))
            clocks += attempt("kafka_unchecked", lambda: gather_kafka.gather_kafka_clock(admin, known)) or []
    postgres = configuration = None
    db = attempt("postgres_unchecked", lambda: _connect(settings))
    if db is not None:
        with db:
            postgres = attempt("postgres_unchecked", lambda: gather_postgres.gather_postgres(db))
            clocks += filter(
                None, [attempt("postgres_unchecked", lambda: gather_postgres.gather_postgres_clock(db))]
            )
            configuration = attempt(
                "configuration_unchecked", lambda: gather_postgres.gather_configuration(db)
            )
    elif "postgres_unchecked" in gathering.away:
        gathering.away["configuration_unchecked"] = gathering.away["postgres_unchecked"]
    side = None
    if may_ask_stripe(own):
        sample = () if configuration is None else configuration.sample
        side, heard = gather_stripe.gather_stripe(settings, own, sample)
        clocks += heard
    return Facts(own, topics, brokers, postgres, configuration, side, tuple(clocks), gathering.away)


def gather_own(settings: Settings) -> OwnSettings:
    """Our settings, without their secrets."""
    key = settings.stripe_api_key.get_secret_value() if settings.stripe_api_key else None
    base = settings.stripe_api_base
    return OwnSettings(
        sink=settings.sink,
        streams=settings.streams,
        dedupe_days=settings.dedupe_days,
        usage_retention_days=settings.usage_retention_days,
        archived=settings.archive_url is not None,
        webhook_concurrency=settings.webhook_concurrency,
        key_kind=None if not key else "_".join(key.split("_")[:2]),
        live_allowed=settings.stripe_allow_live,
        stripe_host=None if base is None else urlsplit(base).hostname,
        webhook_secrets=_webhook_secrets(settings),
        bridge_runs="bridge_port" in running_runtime(),
        sink_webhook_complete=settings.sink != "webhook" or _sink_is_complete(settings),
    )


def may_ask_stripe(own: OwnSettings) -> bool:
    """A live key goes to Stripe only, and only if it is allowed."""
    if own.key_kind is None:
        return False
    return not own.key_is_live or (own.live_allowed and own.stripe_host in (None, "api.stripe.com"))


def judge(facts: Facts, zones: Zones, now: datetime) -> Report:
    """Every judgement that the facts allow. Pure."""
    found: list[Finding] = [*judge_own(facts.own), *judge_clocks(facts.clocks)]
    gathered = {Part.SETTINGS}
    configuration = facts.configuration
    if facts.topics is not None:
        gathered.add(Part.TOPICS)
        found += judge_topics(facts.topics)
        if configuration is not None:
            found += judge_retention(facts.topics, configuration, facts.own)
    if facts.brokers is not None:
        gathered.add(Part.BROKERS)
        found += judge_brokers(facts.brokers, facts.topics)
    if facts.postgres is not None:
        gathered.add(Part.POSTGRES)
        found += judge_postgres(facts.postgres, facts.own)
    if configuration is not None:
        gathered.add(Part.CONFIGURATION)
        found += judge_declared(configuration, facts.own, zones, now)
    if facts.stripe is not None:
        gathered.add(Part.STRIPE)
        found += judge_stripe(facts.stripe)
        if facts.stripe.customers_asked:
            gathered.add(Part.SUMMARIES)
        if facts.stripe.meters is not None:
            gathered.add(Part.METERS)
            if configuration is not None:
                found += judge_meters(facts.stripe.meters, configuration, facts.own)
    found += [_away(code, reason) for code, reason in sorted(facts.away.items())]
    return report(found, frozenset(gathered))


_AWAY = {
    "kafka_unchecked": ("Kafka", "Check TIDEMETER_KAFKA_BOOTSTRAP and the brokers; then run it again."),
    "brokers_unchecked": (
        "brokers",
        "Let our user describe the brokers' configuration (ACL DescribeConfigs on the cluster).",
    ),
    "postgres_unchecked": ("PostgreSQL", "Check TIDEMETER_POSTGRES_DSN and the server; then run it again."),
    "configuration_unchecked": (
        "configuration",
        "Run `tidemeter migrate`, if PostgreSQL is there; then run it again.",
    ),
}


def _away(code: str, reason: str) -> Finding:
    subject, fix = _AWAY[code]
    return Finding(code, subject, f"{subject} could not be checked: {reason}.", fix)


def _connect(settings: Settings) -> psycopg.Connection[Any]:
    return psycopg.connect(
        settings.postgres(), autocommit=True, connect_timeout=5, application_name="tidemeter-doctor"
    )


def _webhook_secrets(settings: Settings) -> str:
    """``set``, ``missing``, or what is wrong with them: the place, never the secret."""
    given = settings.webhook_secrets
    if given is None and secret_file("webhook_secrets") is None:
        return "missing"
    try:
        parse_secrets("" if given is None else given.get_secret_value())
    except Misconfigured as error:
        return str(error)
    return "set"


def _sink_is_complete(settings: Settings) -> bool:
    try:
        url, secret = settings.webhook_sink()
        WebhookSink(url, secret=secret, timeout_seconds=1)
    except Misconfigured:
        return False
    return True
