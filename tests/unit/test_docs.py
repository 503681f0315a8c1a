"""The documentation names what exists: settings, metrics, codes, alerts, commands, tests and links."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.metrics import MetricWrapperBase

from services.cli.main import app
from services.doctor.findings import RULES
from services.streaming import faults
from services.wire import metrics
from services.wire.ops import NAMES
from services.wire.settings import PREFIX, Settings
from services.wire.topics import plan_topics

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md")])
SOURCES = [path for part in ("services", "upcasters") for path in (ROOT / part).rglob("*.py")]
#: Files that a page tells the reader to write.
PLACEHOLDER = re.compile(r"N_to_v|NNNN|v4|<")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def shell_blocks(text: str) -> str:
    return "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))


def exposed_names() -> set[str]:
    """Every series name of our metrics, as Prometheus sees it."""
    found: set[str] = set()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            name, kind = metric._name, metric._type
            suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_sum", "_count")}.get(
                kind, ("",)
            )
            found |= {name + suffix for suffix in suffixes}
    return found


def anchors(text: str) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = path if not file else (path.parent / file).resolve()
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:services|schemas|upcasters|tests|deploy|docs|bench)/[\w./-]+\.\w+)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not [name for name in missing if not PLACEHOLDER.search(name)]


def test_the_settings_page_lists_every_setting_with_its_default() -> None:
    rows = dict(
        re.findall(r"^\| `(TIDEMETER_\w+)` \| `?([^`|]+?)`? \|", page("docs/settings.md"), re.MULTILINE)
    )
    expected = {}
    for name, field in Settings.model_fields.items():
        default: Any = field.default
        if isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, float):
            default = f"{default:g}"
        expected[f"{PREFIX}{name.upper()}"] = "–" if default is None else str(default)
    assert rows.items() >= expected.items()


def test_every_variable_that_a_page_or_a_deployment_sets_is_read_somewhere() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= {f"{name}_FILE" for name in known}
    for path in SOURCES:
        known |= {f"{PREFIX}{name}" for name in re.findall(r'PREFIX\}(\w+)"', path.read_text())}
        known |= set(re.findall(r'"(TIDEMETER_\w+)"', path.read_text()))
    used = set()
    for path in (*PAGES, *ROOT.glob("deploy/**/*.yaml"), ROOT / "deploy/Dockerfile"):
        used |= set(re.findall(r"TIDEMETER_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8")))
    assert used - known == set()


def test_the_operations_page_lists_every_metric() -> None:
    text = page("docs/operations/README.md")
    missing = [name for name in exposed_names() if not name.endswith(("_bucket", "_sum", "_count"))]
    assert not [name for name in missing if f"`{name}`" not in text]


@pytest.mark.parametrize(
    "name",
    [
        "deploy/prometheus/alerts.yaml",
        "deploy/prometheus/alerts.test.yaml",
        *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("deploy/grafana/dashboards/*.json"))),
        "deploy/RUNBOOK.md",
        "docs/operations/README.md",
        "docs/operations/ops-events.md",
        "docs/operations/queues.md",
    ],
)
def test_every_series_that_is_asked_for_is_exposed(name: str) -> None:
    asked = set(re.findall(r"\b((?:tidemeter|http)_[a-z_]+)\b(?=[\[{)` ]|$)", page(name), re.MULTILINE))
    series = {one for one in asked if not one.startswith("http_p")}
    assert series
    assert series - exposed_names() <= {"tidemeter_up"}


def rules() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(page("deploy/prometheus/alerts.yaml"))
    found = [rule for group in document["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


def told_by(rule: dict[str, Any]) -> set[str]:
    """The ops events that a rule asks for."""
    asked = re.findall(r'tidemeter_ops_events_total\{name=~?"([^"]+)"', rule["expr"])
    return {name for names in asked for name in names.split("|")}


def ops_sections() -> dict[str, dict[str, str]]:
    """Of each name its fields, each in one line."""
    found = {}
    for name, body in re.findall(
        r"^### `([\w.]+)`\n(.*?)(?=^##|\Z)", page("docs/operations/ops-events.md"), re.DOTALL | re.MULTILINE
    ):
        assert name not in found
        fields = re.findall(r"^\* \*\*([\w ]+):\*\* (.+?)(?=^\* |\Z)", body, re.DOTALL | re.MULTILINE)
        found[name] = {field: " ".join(text.split()) for field, text in fields}
    return found


def literals_beside(names: frozenset[str]) -> dict[str, set[str]]:
    """Each of ``names`` that a source writes, and every literal in the packages that do.

    Catalogue, choice of mails and simulator do not count: what stands nowhere else is told by nobody.
    """
    catalogues = (ROOT / "services/wire/ops.py", ROOT / "services/upkeep/mails.py")
    texts = {
        path: {one.value for one in ast.walk(tree(path)) if isinstance(one, ast.Constant) and one.value}
        for path in SOURCES
        if path not in catalogues and "stripe_simulator" not in path.parts
    }
    return {
        name: set().union(*(texts[path] for path in texts if path.parent in packages))
        for name in names
        if (packages := {path.parent for path in texts if name in texts[path]})
    }


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_alert_rule_has_a_first_action_and_every_first_action_a_rule() -> None:
    rows = dict(re.findall(r"^\| `(Tidemeter\w+)` \| (\w+) \|", page("deploy/ALERTS.md"), re.MULTILINE))
    assert rows == {name: rule["labels"]["severity"] for name, rule in rules().items()}


def test_every_alert_leads_to_its_section_of_the_runbook() -> None:
    known = anchors(page("deploy/RUNBOOK.md"))
    for name, rule in rules().items():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (file, anchor in known) == ("deploy/RUNBOOK.md", True), name
        assert rule["annotations"]["summary"]


def test_every_ops_event_has_a_first_action_and_every_first_action_an_ops_event() -> None:
    table = page("deploy/ALERTS.md").partition("## Alerts on metrics")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| [\w, ]+ \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(NAMES)


def test_every_ops_event_has_a_whole_section_and_every_section_an_ops_event() -> None:
    fields = [
        "Means",
        "Source and subject",
        "Attributes",
        "Told once per",
        "Alert",
        "First action",
        "At Stripe",
    ]
    sections = ops_sections()
    assert sorted(sections) == sorted(NAMES)
    assert not [name for name, section in sections.items() if list(section) != fields]


def test_every_ops_event_that_wants_somebody_has_an_alert_and_its_section_names_it() -> None:
    known = rules()
    assert not {name for rule in known.values() for name in told_by(rule)} - NAMES
    for name, section in ops_sections().items():
        named = dict(re.findall(r"`(Tidemeter\w+)` \((\w+)\)", section["Alert"]))
        asked = {alert for alert, rule in known.items() if name in told_by(rule)}
        assert named or section["Alert"] == "none", name
        assert asked <= named.keys(), name
        assert bool(asked) == bool(named), name
        assert named.items() <= {alert: rule["labels"]["severity"] for alert, rule in known.items()}.items()


def test_every_ops_event_is_told_by_somebody_and_nobody_tells_another() -> None:
    assert literals_beside(NAMES).keys() == NAMES
    told: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("ops_event", "told")
                and node.args
            ):
                told |= {
                    one.value
                    for one in ast.walk(node.args[0])
                    if isinstance(one, ast.Constant) and isinstance(one.value, str)
                }
    assert len(told) > 15
    assert told <= NAMES


def test_every_attribute_of_an_ops_event_is_one_that_its_code_writes() -> None:
    """Attributes stand before their explanation, which is in brackets."""
    beside = literals_beside(NAMES)
    by_webhook = {"account"}  # of every event that a webhook told
    for name, section in ops_sections().items():
        listed = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", section["Attributes"])))
        assert listed or name == "parked_redriven"
        assert listed <= beside[name] | by_webhook, name


def test_every_attribute_that_is_written_beside_the_name_is_listed() -> None:
    listed = {name: set(re.findall(r"`(\w+)`", one["Attributes"])) for name, one in ops_sections().items()}
    seen = 0
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "ops_event":
                continue
            names = [one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)]
            given = next((one.value for one in node.keywords if one.arg == "attributes"), None)
            keys = given.keys if isinstance(given, ast.Dict) else []
            written = {key.value for key in keys if isinstance(key, ast.Constant)}
            for name in names:
                assert written <= listed[name], name
                seen += bool(written)
    assert seen > 10


def test_every_code_of_an_answer_and_of_a_parked_record_is_in_its_page() -> None:
    pages = ("events", "webhooks", "parking", "replay", "explain")
    text = "".join(page(f"docs/{name}.md") for name in pages)
    codes: set[str] = set()
    for path in SOURCES:
        if "stripe" in path.parts or "stripe_simulator" in path.parts:
            continue
        source = path.read_text()
        codes |= set(
            re.findall(
                r'(?:Invalid|Rejected|Refusal|_bad_quantity|UnknownSchema|Undecodable|RefusedReplay)\(\s*"(\w+)"',
                source,
            )
        )
        codes |= set(re.findall(r'(?:RequestRefused\(\s*\d+,|RefusedQuestion\()\s*"(\w+)"', source))
        if path.name == "prepare.py":
            codes |= set(re.findall(r'return "(\w+)"', source)) | set(
                re.findall(r'Upcast\w*: "(\w+)"', source)
            )
    assert len(codes) > 40
    assert not sorted(code for code in codes if f"`{code}`" not in text)


def test_the_doctors_page_lists_every_code_with_its_severity() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+) \|", page("docs/operations/doctor.md"), re.MULTILINE)
    listed = {code: severity for codes, severity in rows for code in re.findall(r"`(\w+)`", codes)}
    assert listed == {code: rule.severity.value for code, rule in RULES.items()}


def test_every_fault_point_is_in_the_faults_page() -> None:
    points = {
        point for path in SOURCES for point in re.findall(r'fault_point\("([\w.]+)"\)', path.read_text())
    }
    assert points
    assert faults.fault_point
    assert not sorted(point for point in points if f"`{point}`" not in page("docs/faults.md"))
    assert not sorted(point for point in points if f"`{point}`" not in page("docs/architecture.md"))


def test_every_topic_is_in_the_schemas_page() -> None:
    plans = plan_topics(partitions=1, replication=1, min_insync_replicas=1, usage_retention_days=1)
    assert not [plan.name for plan in plans if f"`{plan.name}`" not in page("docs/schemas.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_that_is_printed_exists(path: Path) -> None:
    def names(group: Any, prefix: str = "") -> set[str]:
        found = set()
        for name, command in group.commands.items():
            found |= names(command, f"{prefix}{name} ") if hasattr(command, "commands") else {prefix + name}
        return found

    known = names(typer.main.get_command(app))
    printed = re.findall(r"(?:^|[`(|]|\s)tidemeter ((?:[a-z][a-z-]+ ?){1,2})", shell_blocks(path.read_text()))
    unknown = [words for words in printed if words.strip() not in known and words.split()[0] not in known]
    assert not unknown


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_in_the_text_has_the_options_that_it_is_printed_with(path: Path) -> None:
    """Blocks of the runbook are run by a test of their own; what stands in a sentence or a table is not."""
    wrong = []
    for words in re.findall(r"`tidemeter ([^`\n|]+)`", path.read_text(encoding="utf-8")):
        command: Any = typer.main.get_command(app)
        rest = words.split()
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        options = {
            one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in rest if word.startswith("--")}
        wrong += [f"{words}: {one}" for one in given - options - {"--help"}]
    assert not wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_shell_block_is_shell(path: Path) -> None:
    blocks = shell_blocks(path.read_text())
    checked = subprocess.run(["bash", "-n"], input=blocks, text=True, capture_output=True, check=False)
    assert checked.stderr == ""


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    for path in PAGES:
        named = re.findall(r"`make ([a-z -]+)`", path.read_text())
        assert {target for one in named for target in one.split()} <= targets, path.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/**/*.yaml")), ids=lambda path: path.name)
def test_every_deployment_file_is_yaml(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text()))
