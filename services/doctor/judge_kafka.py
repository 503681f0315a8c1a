"""Topics and brokers: what could lose, reorder or refuse a record. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.doctor.facts import Configuration, OwnSettings, Topics
from services.doctor.findings import Finding
from services.wire.periods import Calendar
from services.wire.topics import DAY_MS, STRIPE_WEBHOOKS, USAGE_VERSIONS

#: Arrival times matter on these: windows of a replay, and which webhook came first.
ARRIVAL_TOPICS = frozenset({*USAGE_VERSIONS, STRIPE_WEBHOOKS})
_DAYS_MAX = {"day": 1, "week": 7, "month": 31, "year": 366}


def judge_topics(topics: Topics) -> Iterator[Finding]:
    """Every topic by itself, and the usage topics beside each other."""
    for plan in topics.plans:
        name = plan.name
        topic = topics.found.get(name)
        if topic is None:
            yield Finding(
                "topic_missing", name, f"The topic {name} does not exist.", "Run `tidemeter migrate`."
            )
            continue
        config = topic.config
        if name in ARRIVAL_TOPICS and config.get("message.timestamp.type") != "LogAppendTime":
            yield Finding(
                "timestamps_not_log_append",
                name,
                f"{name} has message.timestamp.type={config.get('message.timestamp.type')}: producers' "
                "clocks decide when a record is deleted and which window it is in.",
                _alter(topics, name, "message.timestamp.type=LogAppendTime"),
            )
        if "compact" in config.get("cleanup.policy", ""):
            yield Finding(
                "topic_compacted",
                name,
                f"{name} has cleanup.policy={config['cleanup.policy']}: of all records with one key only the "
                "newest is kept.",
                _alter(topics, name, "cleanup.policy=delete"),
            )
        if config.get("unclean.leader.election.enable") == "true":
            yield Finding(
                "unclean_election",
                name,
                f"{name} has unclean.leader.election.enable=true: a replica that lags may become the log, "
                "without records that were acknowledged.",
                _alter(topics, name, "unclean.leader.election.enable=false"),
            )
        needed, given = int(plan.settings()["max.message.bytes"]), int(config.get("max.message.bytes", "0"))
        if given < needed:
            yield Finding(
                "message_bytes_too_low",
                name,
                f"{name} has max.message.bytes={given}, less than the {needed} that a record of ours may "
                "have.",
                _alter(topics, name, f"max.message.bytes={needed}"),
            )
        yield from _size_limit(topics, name, config)
    yield from _copies(topics)
    yield from _partitions(topics)


def _size_limit(topics: Topics, name: str, config: Mapping[str, str]) -> Iterator[Finding]:
    if int(config.get("retention.bytes", "-1")) >= 0:
        yield Finding(
            "retention_by_size",
            name,
            f"{name} has retention.bytes={config['retention.bytes']}: much usage deletes records before "
            "their time.",
            _alter(topics, name, "retention.bytes=-1"),
        )


def _copies(topics: Topics) -> Iterator[Finding]:
    """What ``acks=all`` is worth: how many brokers have a record before its producer is told so."""
    if topics.brokers == 1:
        yield Finding(
            "single_broker",
            "Kafka",
            "There is one broker: a record is on one disk, and is lost with it.",
            "Three brokers, TIDEMETER_TOPIC_REPLICATION=3 and TIDEMETER_MIN_INSYNC_REPLICAS=2 for anything "
            "but trying it out.",
        )
        return
    for name, topic in sorted(topics.found.items()):
        insync = int(topic.config.get("min.insync.replicas", "1"))
        if topic.replicas < 2:
            yield Finding(
                "replication_too_low",
                name,
                f"{name} has {topic.replicas} replica of a partition on {topics.brokers} brokers: it is lost "
                "with that broker.",
                "Add replicas with `kafka-reassign-partitions`, or create the topic anew with "
                "TIDEMETER_TOPIC_REPLICATION=3.",
            )
        elif insync < 2:
            yield Finding(
                "min_insync_too_low",
                name,
                f"{name} has min.insync.replicas={insync} of {topic.replicas}: acks=all is satisfied by one "
                "broker.",
                _alter(topics, name, "min.insync.replicas=2"),
            )
        elif insync >= topic.replicas:
            yield Finding(
                "min_insync_blocks",
                name,
                f"{name} has min.insync.replicas={insync} of {topic.replicas}: no broker may be away, or "
                "nothing is accepted.",
                "Add a replica, or lower min.insync.replicas by one.",
            )


def _partitions(topics: Topics) -> Iterator[Finding]:
    numbers = {name: topics.found[name].partitions for name in USAGE_VERSIONS if name in topics.found}
    if len(set(numbers.values())) > 1:
        most = max(numbers.values())
        listed = ", ".join(f"{name} {number}" for name, number in sorted(numbers.items()))
        less = min(numbers, key=lambda name: numbers[name])
        yield Finding(
            "partitions_differ",
            "usage topics",
            f"Partitions of the versions differ ({listed}): the records of one item go to different workers, "
            "which wait for each other; sums stay exact.",
            f"`kafka-topics --bootstrap-server {topics.address} --alter --topic {less} --partitions {most}`, "
            "for each that has fewer.",
        )


def judge_retention(topics: Topics, configuration: Configuration, own: OwnSettings) -> Iterator[Finding]:
    """How long usage is kept, against how long it may still be needed."""
    lateness_days = max((meter.lateness_seconds for meter in configuration.meters), default=0) / 86_400
    needed = lateness_days + own.dedupe_days
    period = longest_period_days(configuration.calendars) + lateness_days
    for plan in topics.plans:
        topic = topics.found.get(plan.name)
        if topic is None or plan.name not in USAGE_VERSIONS:
            continue
        kept_ms = int(topic.config.get("retention.ms", "0"))
        kept = float("inf") if kept_ms < 0 else kept_ms / DAY_MS
        if kept < needed:
            yield Finding(
                "retention_too_short",
                plan.name,
                f"{plan.name} keeps records for {_days(kept)}, less than the {_days(needed)} of lateness "
                f"({_days(lateness_days)}) and idempotency keys ({own.dedupe_days} days).",
                _alter(topics, plan.name, f"retention.ms={max(plan.retention_ms, int(needed * DAY_MS))}"),
            )
            continue
        if kept < period and not own.archived:
            yield Finding(
                "retention_below_period",
                plan.name,
                f"{plan.name} keeps records for {_days(kept)}, and the longest billing period with its "
                f"lateness has {_days(period)}: a replay cannot recompute it whole.",
                "Set TIDEMETER_ARCHIVE_URL and run `tidemeter archive`; or "
                + _alter(topics, plan.name, f"retention.ms={int(period * DAY_MS)}"),
            )
        if kept_ms != plan.retention_ms:
            yield Finding(
                "retention_differs",
                plan.name,
                f"{plan.name} keeps records for {_days(kept)}, and TIDEMETER_USAGE_RETENTION_DAYS is "
                f"{own.usage_retention_days}: the setting holds only when a topic is created.",
                _alter(topics, plan.name, f"retention.ms={plan.retention_ms}"),
            )


def longest_period_days(calendars: tuple[str, ...]) -> int:
    """Days of the longest billing period there can be; a month at least."""
    found = 31
    for text in calendars:
        count, unit, *_ = Calendar.parse(text).text.split(" ")
        found = max(found, int(count) * _DAYS_MAX[unit])
    return found


def judge_brokers(brokers: Mapping[str, Mapping[str, str]], topics: Topics | None) -> Iterator[Finding]:
    """What the brokers do by themselves."""
    for broker, config in sorted(brokers.items()):
        if config.get("auto.create.topics.enable") == "true":
            yield Finding(
                "auto_create_topics",
                f"broker {broker}",
                f"Broker {broker} has auto.create.topics.enable=true: a name that is misspelt becomes a "
                "topic with the wrong timestamps and retention.",
                "Set auto.create.topics.enable=false in the broker's server.properties, and restart it.",
            )
        minutes = int(config.get("offsets.retention.minutes", "10080"))
        kept = [int(one.config.get("retention.ms", "0")) for one in topics.found.values()] if topics else []
        longest = float("inf") if any(ms < 0 for ms in kept) else max(kept, default=0) / DAY_MS
        if minutes / 1440 < longest:
            yield Finding(
                "offsets_retention_short",
                f"broker {broker}",
                f"Broker {broker} forgets committed offsets of a stopped group after "
                f"{_days(minutes / 1440)}, before its records are deleted; nothing is lost by it, for "
                "positions are in PostgreSQL.",
                "Nothing, unless other tools go by committed offsets: then offsets.retention.minutes in "
                "server.properties.",
            )


def _alter(topics: Topics, name: str, setting: str) -> str:
    return (
        f"`kafka-configs --bootstrap-server {topics.address} --alter --entity-type topics --entity-name "
        f"{name} --add-config {setting}`"
    )


def _days(days: float) -> str:
    if days == float("inf"):
        return "ever"
    return f"{days:.3g} days" if days >= 1 else f"{days * 24:.3g} hours"
