"""The doctor's judgements: each unsafe fact is found under its code, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import stripe

from services.cli.doctor import document, exit_status
from services.doctor.examine import gather_own, judge, may_ask_stripe
from services.doctor.facts import (
    Alignment,
    Answer,
    Clock,
    Configuration,
    DeclaredMeter,
    Facts,
    OwnSettings,
    Postgres,
    StripeMeter,
    StripeSide,
    Topic,
    Topics,
)
from services.doctor.findings import RULES, Report, Severity
from services.doctor.gather_stripe import READ_METERS, WRITE_EVENTS
from services.doctor.judge_postgres import connections_needed
from services.doctor.zones import Zones, known_zones, parse_zones
from services.wire.errors import Misconfigured
from services.wire.kafka import producer_config
from services.wire.settings import load_settings
from services.wire.topics import DAY_MS, plan_topics

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ANCHOR = datetime(2026, 1, 31, 13, 37, 42, tzinfo=UTC)
ZONES = parse_zones(
    ["# version 2026f", "L Asia/Kolkata Asia/Calcutta", "L Europe/Brussels Europe/Amsterdam"],
    ["# comment", "IN\t+2232+08822\tAsia/Kolkata", "NL\t+5222+00454\tEurope/Amsterdam"],
)
PLANS = plan_topics(partitions=4, replication=3, min_insync_replicas=2, usage_retention_days=90)
METER = DeclaredMeter("acme", "calls", "sum", 172_800, False, "acme.calls", "stripe_customer_id", "value")
AT_STRIPE = StripeMeter("acme.calls", True, "sum", "stripe_customer_id", "value", None, False)
HEALTHY = Facts(
    own=OwnSettings(),
    topics=Topics(
        3,
        "broker:9092",
        tuple(PLANS),
        {
            plan.name: Topic(
                4, 3, {"cleanup.policy": "delete", "message.timestamp.type": "CreateTime"} | plan.settings()
            )
            for plan in PLANS
        },
    ),
    brokers={"1": {"auto.create.topics.enable": "false", "offsets.retention.minutes": str(10**9)}},
    postgres=Postgres(
        180_001,
        {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "max_connections": "100"},
        False,
        ("0001.a", "0002.b"),
        ("0001.a", "0002.b"),
        1,
    ),
    configuration=Configuration(
        meters=(METER,),
        zones={"Europe/Budapest": 2, "UTC": 1},
        calendars=("1 month UTC 2026-01-31T13:37:42Z",),
        alignments=(Alignment("1 month UTC 2026-01-31T13:37:42Z", "UTC", "month", 1, ANCHOR),),
        testmode_events=7,
    ),
    stripe=StripeSide(
        {READ_METERS: Answer(200), WRITE_EVENTS: Answer(200)}, "2026-10-28", "2026-10-28", (AT_STRIPE,), 2, 0
    ),
    clocks=(Clock("PostgreSQL", 0.4, 0.01), Clock("Stripe", -1.0, 0.6)),
)


def examined(facts: Facts) -> Report:
    return judge(facts, ZONES, NOW)


def codes(facts: Facts) -> list[str]:
    """Without ``retention.ms`` of ever against the broker's offsets, which the healthy facts have too."""
    return [one.code for one in examined(facts).findings if one.code != "offsets_retention_short"]


def topic(name: str, **changes: Any) -> Callable[[Facts], Facts]:
    """A change of one topic: ``partitions``, ``replicas``, or a configuration with dots as ``__``."""

    def change(facts: Facts) -> Facts:
        assert facts.topics is not None
        own = {key: value for key, value in changes.items() if key in ("partitions", "replicas")}
        config = {key.replace("__", "."): value for key, value in changes.items() if key not in own}
        old = facts.topics.found[name]
        new = replace(old, config={**old.config, **config}, **own)
        return replace(facts, topics=replace(facts.topics, found={**facts.topics.found, name: new}))

    return change


def part(name: str, **changes: Any) -> Callable[[Facts], Facts]:
    """A change of fields of one part of the facts."""
    return lambda facts: replace(facts, **{name: replace(getattr(facts, name), **changes)})


def pg(**settings: str) -> Callable[[Facts], Facts]:
    assert HEALTHY.postgres is not None
    return part("postgres", settings={**HEALTHY.postgres.settings, **settings})


def at_stripe(*meters: StripeMeter) -> Callable[[Facts], Facts]:
    return part("stripe", meters=meters)


def answered(**answers: Answer) -> Callable[[Facts], Facts]:
    return part("stripe", answers={name.replace("_", " "): answer for name, answer in answers.items()})


def without_topic(facts: Facts) -> Facts:
    assert facts.topics is not None
    found = {name: one for name, one in facts.topics.found.items() if name != "ops.v1"}
    return replace(facts, topics=replace(facts.topics, found=found))


def clock(ahead: float, uncertainty: float = 0.0) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, clocks=(Clock("PostgreSQL", ahead, uncertainty),))


def away(code: str, part_name: str) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, **{part_name: None}, away={code: "it does not answer"})  # type: ignore[arg-type]


LATE = replace(METER, lateness_seconds=20 * 86_400)
LAST = replace(METER, formula="last")
#: code → a change that makes the healthy facts unsafe, and what has to be said of it.
CASES: Mapping[str, tuple[Callable[[Facts], Facts], str]] = {
    "topic_missing": (without_topic, "ops.v1"),
    "timestamps_not_log_append": (
        topic("usage.v2", message__timestamp__type="CreateTime"),
        "usage.v2 has message.timestamp.type=CreateTime",
    ),
    "topic_compacted": (topic("usage.v1", cleanup__policy="compact,delete"), "cleanup.policy=compact,delete"),
    "retention_too_short": (
        topic("usage.v3", retention__ms=str(7 * DAY_MS)),
        "7 days, less than the 37 days",
    ),
    "retention_below_period": (
        part("configuration", calendars=("1 year Europe/Budapest",)),
        "a replay cannot recompute it whole",
    ),
    "retention_differs": (topic("usage.v3", retention__ms=str(80 * DAY_MS)), "80 days"),
    "retention_by_size": (topic("usage.v3", retention__bytes="1000"), "retention.bytes=1000"),
    "replication_too_low": (topic("deltas.v1", replicas=1), "1 replica of a partition on 3 brokers"),
    "min_insync_too_low": (topic("usage.v3", min__insync__replicas="1"), "min.insync.replicas=1 of 3"),
    "min_insync_blocks": (topic("usage.v3", min__insync__replicas="3"), "min.insync.replicas=3 of 3"),
    "single_broker": (part("topics", brokers=1), "one broker"),
    "partitions_differ": (topic("usage.v2", partitions=8), "usage.v1 4, usage.v2 8, usage.v3 4"),
    "unclean_election": (
        topic("usage.v3", unclean__leader__election__enable="true"),
        "unclean.leader.election.enable=true",
    ),
    "message_bytes_too_low": (topic("dead_letters.v1", max__message__bytes="1048588"), "2097152"),
    "auto_create_topics": (
        lambda facts: replace(facts, brokers={"7": {"auto.create.topics.enable": "true"}}),
        "Broker 7",
    ),
    "offsets_retention_short": (
        lambda facts: replace(facts, brokers={"1": {"offsets.retention.minutes": "10080"}}),
        "7 days",
    ),
    "clock_skew_large": (clock(-3600.0), "3600.0 s ahead of that of PostgreSQL"),
    "clock_skew": (clock(10.0, 1.0), "9.0 s behind that of PostgreSQL"),
    "postgres_too_old": (part("postgres", version=140_012), "version 14"),
    "postgres_standby": (part("postgres", is_standby=True), "standby"),
    "schema_behind": (part("postgres", migrations_applied=("0001.a",)), "1 of 2 migrations"),
    "schema_ahead": (part("postgres", migrations_applied=("0001.a", "0002.b", "0003.c")), "0003.c"),
    "fsync_off": (pg(fsync="off"), "fsync is off"),
    "full_page_writes_off": (pg(full_page_writes="off"), "full_page_writes is off"),
    "synchronous_commit_off": (pg(synchronous_commit="off"), "synchronous_commit is off"),
    "connections_too_few": (part("postgres", connections_foreign=95), "leaves 5 for us"),
    "lateness_beyond_keys": (
        lambda facts: part("configuration", meters=(LATE,))(part("own", dedupe_days=10)(facts)),
        "acme/calls takes usage 20 days late",
    ),
    "customers_unmapped": (part("configuration", customers_unmapped=3), "3 customers"),
    "customers_deleted": (part("configuration", customers_deleted=2), "2 customers"),
    "zone_unknown": (part("configuration", zones={"Mars/Olympus": 1}), "tzdata 2026f"),
    "zone_alias": (part("configuration", zones={"Asia/Calcutta": 1}), "an old name of Asia/Kolkata"),
    "zone_cuts_hours": (part("configuration", zones={"Asia/Kathmandu": 4}), "+05:45 of UTC"),
    "periods_unaligned": (
        part("configuration", alignments=(Alignment("1 month UTC", "UTC", "month", 1, ANCHOR),)),
        "1 of 1 Stripe customers",
    ),
    "stripe_key_missing": (
        lambda facts: replace(part("own", key_kind=None)(facts), stripe=None),
        "nothing is billed",
    ),
    "stripe_live_key_refused": (
        lambda facts: replace(part("own", key_kind="rk_live")(facts), stripe=None),
        "live keys are not allowed",
    ),
    "stripe_live_key_elsewhere": (
        lambda facts: replace(
            part("own", key_kind="rk_live", live_allowed=True, stripe_host="simulator")(facts), stripe=None
        ),
        "goes to simulator instead of api.stripe.com",
    ),
    "stripe_key_unrestricted": (
        lambda facts: replace(part("own", key_kind="sk_live", live_allowed=True)(facts), stripe=None),
        "can move money",
    ),
    "webhook_secrets_missing": (part("own", webhook_secrets="missing"), "the bridge does not start"),
    "webhook_secrets_invalid": (part("own", webhook_secrets="entry 1 must hold secrets"), "entry 1"),
    "sink_webhook_incomplete": (part("own", sink="webhook", sink_webhook_complete=False), "its secret"),
    "stripe_key_rejected": (answered(read_meters=Answer(401)), "401"),
    "stripe_permission_missing": (
        answered(read_charges=Answer(403, "", "rak_charge_read")),
        "may not read charges (Stripe names rak_charge_read)",
    ),
    "stripe_api_version": (part("stripe", version_answered="2020-01-01"), "2020-01-01"),
    "stripe_mode_differs": (part("configuration", livemode_events=5), "5 webhooks of the last 7 days"),
    "meter_missing": (at_stripe(), "no meter with the event name acme.calls"),
    "meter_archived": (at_stripe(replace(AT_STRIPE, is_active=False)), "is archived"),
    "meter_ambiguous": (at_stripe(AT_STRIPE, AT_STRIPE), "2 active meters"),
    "meter_formula": (
        part("configuration", meters=(LAST,)),
        "has the formula sum, and acme/calls needs last",
    ),
    "meter_customer_key": (at_stripe(replace(AT_STRIPE, customer_key="who")), "under who"),
    "meter_value_key": (at_stripe(replace(AT_STRIPE, value_key="amount")), "under amount"),
    "meter_time_window": (at_stripe(replace(AT_STRIPE, time_window="day")), "each day"),
    "meter_negative": (
        part("configuration", meters=(replace(METER, allow_negative=True),)),
        "takes negative values",
    ),
    "customers_not_at_stripe": (part("stripe", customers_unknown=1), "1 of 2 mapped customers"),
    "kafka_unchecked": (away("kafka_unchecked", "topics"), "it does not answer"),
    "brokers_unchecked": (away("brokers_unchecked", "brokers"), "it does not answer"),
    "postgres_unchecked": (away("postgres_unchecked", "postgres"), "it does not answer"),
    "configuration_unchecked": (away("configuration_unchecked", "configuration"), "it does not answer"),
    "stripe_unchecked": (answered(read_meters=Answer(None, "ConnectTimeout")), "ConnectTimeout"),
}


def test_healthy_facts_have_no_finding_but_what_is_only_noted() -> None:
    report = examined(HEALTHY)
    assert codes(HEALTHY) == []
    assert exit_status(report) == 0
    assert report.not_checked == ()
    assert document(report)["healthy"] is True


def test_every_code_has_a_case() -> None:
    assert sorted(CASES) == sorted(RULES)


@pytest.mark.parametrize("code", CASES)
def test_what_is_unsafe_is_found_and_nothing_else(code: str) -> None:
    change, said = CASES[code]
    found = [one for one in examined(change(HEALTHY)).findings if one.code == code]
    assert len(found) == (3 if code == "retention_below_period" else 1)  # of each usage topic
    assert said in found[0].what
    assert found[0].fix.endswith((".", "`"))
    # Old names of zones may cut hours too, and a live key is of another mode than the healthy webhooks.
    beside = {"zone_cuts_hours", "stripe_mode_differs"} - {code}
    assert set(codes(change(HEALTHY))) - beside <= {code}


@pytest.mark.parametrize("code", CASES)
def test_an_error_ends_with_1_what_could_not_be_checked_with_3_and_the_rest_with_0(code: str) -> None:
    report = examined(CASES[code][0](HEALTHY))
    expected = {Severity.ERROR: 1, Severity.UNCHECKED: 3}.get(RULES[code].severity, 0)
    assert exit_status(report) == expected
    assert code not in report.ok


def test_what_could_not_be_checked_is_never_called_ok() -> None:
    nothing = Facts(OwnSettings(), away={"kafka_unchecked": "away", "postgres_unchecked": "away"})
    report = examined(nothing)
    assert exit_status(report) == 3
    assert {"topic_missing", "meter_missing", "fsync_off", "clock_skew"} <= set(report.not_checked)
    assert not set(report.ok) & set(report.not_checked)
    assert set(report.ok) | set(report.not_checked) == {
        code for code, rule in RULES.items() if rule.severity is not Severity.UNCHECKED
    }


def test_errors_come_first() -> None:
    facts = CASES["zone_cuts_hours"][0](CASES["clock_skew"][0](CASES["fsync_off"][0](HEALTHY)))
    assert [one.severity.value for one in examined(facts).findings][:2] == ["error", "warning"]


def test_an_archive_replaces_retention_for_replays_but_not_for_counting() -> None:
    yearly = CASES["retention_below_period"][0](HEALTHY)
    assert codes(part("own", archived=True)(yearly)) == []
    short = CASES["retention_too_short"][0](HEALTHY)
    assert "retention_too_short" in codes(part("own", archived=True)(short))


def test_records_that_are_kept_for_ever_are_kept_long_enough() -> None:
    facts = part("own", usage_retention_days=-1)(topic("usage.v3", retention__ms="-1")(HEALTHY))
    assert "retention_too_short" not in codes(facts)


def test_the_fix_of_a_topic_is_a_command_that_names_it() -> None:
    found = examined(CASES["topic_compacted"][0](HEALTHY)).findings[0]
    assert (
        "kafka-configs --bootstrap-server broker:9092 --alter --entity-type topics --entity-name usage.v1 "
        "--add-config cleanup.policy=delete"
    ) in found.fix


def test_a_clock_within_its_uncertainty_is_right() -> None:
    assert codes(clock(-30.0, 29.0)(HEALTHY)) == []


def test_a_place_that_the_database_lists_is_no_old_name() -> None:
    assert ZONES.alias_of("Europe/Amsterdam") is None
    assert ZONES.alias_of("Asia/Calcutta") == "Asia/Kolkata"


def test_the_database_of_this_machine_is_found() -> None:
    zones = known_zones()
    assert zones.version[:2] == "20"
    assert zones.alias_of("US/Eastern") == "America/New_York"
    assert zones.alias_of("Europe/Budapest") is zones.alias_of("UTC") is None
    assert not Zones("", {}, frozenset()).exists("../etc/passwd")


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        (OwnSettings(key_kind="rk_test", stripe_host="127.0.0.1"), True),
        (OwnSettings(key_kind=None), False),
        (OwnSettings(key_kind="rk_live"), False),
        (OwnSettings(key_kind="rk_live", live_allowed=True), True),
        (OwnSettings(key_kind="sk_live", live_allowed=True, stripe_host="simulator"), False),
    ],
)
def test_a_live_key_is_sent_to_stripe_only_and_only_if_it_is_allowed(own: OwnSettings, asked: bool) -> None:
    assert may_ask_stripe(own) is asked


@pytest.mark.parametrize("name", ["acks", "enable.idempotence", "request.required.acks"])
def test_what_an_acknowledgement_means_cannot_be_overridden(name: str) -> None:
    with pytest.raises(Misconfigured, match=name):
        producer_config("broker:9092", **{name: "1"})


def test_one_process_of_each_kind_fits_the_embedded_server() -> None:
    assert connections_needed(OwnSettings(archived=True, webhook_concurrency=16)) < 90


def test_the_library_says_which_version_it_asks_for() -> None:
    assert stripe.api_version


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("rk_test_51abc", "rk_test"),
        ("sk_live_51abc", "sk_live"),
        ("", None),
    ],
)
def test_of_the_key_only_its_kind_is_a_fact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, given: str, kind: str | None
) -> None:
    monkeypatch.setenv("TIDEMETER_DATA_DIR", str(tmp_path))
    own = gather_own(load_settings(stripe_api_key=given))
    assert own.key_kind == kind
    assert "51abc" not in repr(own)


@pytest.mark.parametrize(
    ("secret", "complete"),
    [(None, False), ("whsec_short", False), ("whsec_" + "YWJj" * 10, True)],
)
def test_a_webhook_as_sink_needs_a_secret_that_can_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, secret: str | None, complete: bool
) -> None:
    monkeypatch.setenv("TIDEMETER_DATA_DIR", str(tmp_path))
    own = gather_own(
        load_settings(sink="webhook", sink_webhook_url="https://sink.example", sink_webhook_secret=secret)
    )
    assert own.sink_webhook_complete is complete
    codes_found = {one.code for one in judge(Facts(own), ZONES, NOW).findings}
    assert ("sink_webhook_incomplete" in codes_found) is not complete
    assert "stripe_key_missing" not in codes_found  # nothing goes to Stripe
