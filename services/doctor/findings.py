"""What the doctor can find: every code with its severity and the facts it needs; findings; the verdict.

``docs/operations/doctor.md`` explains each code; a test holds the page to ``RULES``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Severity(StrEnum):
    """Worst first. ``unchecked``: it may be unsafe, and nobody knows."""

    ERROR = "error"
    UNCHECKED = "unchecked"
    WARNING = "warning"
    NOTE = "note"


class Part(StrEnum):
    """Facts that are gathered together, and are there or not."""

    SETTINGS = "settings"
    TOPICS = "topics"
    BROKERS = "brokers"
    POSTGRES = "postgres"
    CONFIGURATION = "configuration"
    STRIPE = "stripe"
    METERS = "meters"
    SUMMARIES = "summaries"


@dataclass(frozen=True, slots=True)
class Rule:
    """How bad a finding is, and which facts it takes to say that there is none."""

    severity: Severity
    needs: frozenset[Part]


def _rule(severity: Severity, *needs: Part) -> Rule:
    return Rule(severity, frozenset(needs))


_E, _W, _N, _U = Severity.ERROR, Severity.WARNING, Severity.NOTE, Severity.UNCHECKED

RULES: Final[dict[str, Rule]] = {
    # Kafka
    "topic_missing": _rule(_E, Part.TOPICS),
    "timestamps_not_log_append": _rule(_E, Part.TOPICS),
    "topic_compacted": _rule(_E, Part.TOPICS),
    "retention_too_short": _rule(_E, Part.TOPICS, Part.CONFIGURATION),
    "retention_below_period": _rule(_W, Part.TOPICS, Part.CONFIGURATION),
    "retention_differs": _rule(_W, Part.TOPICS),
    "retention_by_size": _rule(_W, Part.TOPICS),
    "replication_too_low": _rule(_E, Part.TOPICS),
    "min_insync_too_low": _rule(_E, Part.TOPICS),
    "min_insync_blocks": _rule(_W, Part.TOPICS),
    "single_broker": _rule(_N, Part.TOPICS),
    "partitions_differ": _rule(_W, Part.TOPICS),
    "unclean_election": _rule(_E, Part.TOPICS),
    "message_bytes_too_low": _rule(_E, Part.TOPICS),
    "auto_create_topics": _rule(_W, Part.BROKERS),
    "offsets_retention_short": _rule(_N, Part.BROKERS, Part.TOPICS),
    # Clocks
    "clock_skew_large": _rule(_E, Part.TOPICS, Part.POSTGRES, Part.STRIPE),
    "clock_skew": _rule(_W, Part.TOPICS, Part.POSTGRES, Part.STRIPE),
    # PostgreSQL
    "postgres_too_old": _rule(_E, Part.POSTGRES),
    "postgres_standby": _rule(_E, Part.POSTGRES),
    "schema_behind": _rule(_E, Part.POSTGRES),
    "schema_ahead": _rule(_W, Part.POSTGRES),
    "fsync_off": _rule(_E, Part.POSTGRES),
    "full_page_writes_off": _rule(_E, Part.POSTGRES),
    "synchronous_commit_off": _rule(_E, Part.POSTGRES),
    "connections_too_few": _rule(_W, Part.POSTGRES),
    # What is declared
    "lateness_beyond_keys": _rule(_W, Part.CONFIGURATION),
    "customers_unmapped": _rule(_E, Part.CONFIGURATION),
    "customers_deleted": _rule(_E, Part.CONFIGURATION),
    "zone_unknown": _rule(_E, Part.CONFIGURATION),
    "zone_alias": _rule(_W, Part.CONFIGURATION),
    "zone_cuts_hours": _rule(_N, Part.CONFIGURATION),
    "periods_unaligned": _rule(_W, Part.CONFIGURATION),
    # Stripe: settings, key, meters
    "stripe_key_missing": _rule(_E, Part.SETTINGS),
    "stripe_live_key_refused": _rule(_E, Part.SETTINGS),
    "stripe_live_key_elsewhere": _rule(_E, Part.SETTINGS),
    "stripe_key_unrestricted": _rule(_W, Part.SETTINGS),
    "webhook_secrets_missing": _rule(_W, Part.SETTINGS),
    "webhook_secrets_invalid": _rule(_E, Part.SETTINGS),
    "sink_webhook_incomplete": _rule(_E, Part.SETTINGS),
    "stripe_key_rejected": _rule(_E, Part.STRIPE),
    "stripe_permission_missing": _rule(_E, Part.STRIPE),
    "stripe_api_version": _rule(_W, Part.STRIPE),
    "stripe_mode_differs": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_missing": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_archived": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_ambiguous": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_formula": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_customer_key": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_value_key": _rule(_E, Part.METERS, Part.CONFIGURATION),
    "meter_time_window": _rule(_W, Part.METERS, Part.CONFIGURATION),
    "meter_negative": _rule(_N, Part.METERS, Part.CONFIGURATION),
    "customers_not_at_stripe": _rule(_E, Part.SUMMARIES),
    # What gave no answer
    "kafka_unchecked": _rule(_U),
    "brokers_unchecked": _rule(_U),
    "postgres_unchecked": _rule(_U),
    "configuration_unchecked": _rule(_U),
    "stripe_unchecked": _rule(_U),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """``subject`` is a topic, meter, server or setting, and never a customer. ``what`` has the numbers."""

    code: str
    subject: str
    what: str
    fix: str

    @property
    def severity(self) -> Severity:
        """By its code."""
        return RULES[self.code].severity


@dataclass(frozen=True, slots=True)
class Report:
    """Findings, worst first; codes that were looked for and not found; and those nobody could look for."""

    findings: tuple[Finding, ...]
    ok: tuple[str, ...]
    not_checked: tuple[str, ...]

    def count(self, severity: Severity) -> int:
        """Findings of a severity."""
        return sum(finding.severity is severity for finding in self.findings)


def report(findings: Iterable[Finding], gathered: frozenset[Part]) -> Report:
    """The verdict over everything found, given which facts there were."""
    ranks = list(Severity)
    ordered = tuple(sorted(findings, key=lambda one: (ranks.index(one.severity), one.code, one.subject)))
    found = {finding.code for finding in ordered}
    rest = {code: rule for code, rule in RULES.items() if code not in found and rule.severity is not _U}
    return Report(
        ordered,
        tuple(code for code, rule in rest.items() if rule.needs <= gathered),
        tuple(code for code, rule in rest.items() if not rule.needs <= gathered),
    )
