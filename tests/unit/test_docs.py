"""The documentation names what exists: settings, metrics, codes, alerts, commands, tests and links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.metrics import MetricWrapperBase

from services.cli.main import app
from services.streaming import faults
from services.wire import metrics
from services.wire.settings import PREFIX, Settings
from services.wire.topics import plan_topics

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])
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
    for path in (*PAGES, *ROOT.glob("deploy/**/*.yaml"), ROOT / "deploy/Containerfile"):
        used |= set(re.findall(r"TIDEMETER_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8")))
    assert used - known == set()


def test_the_operations_page_lists_every_metric() -> None:
    text = page("docs/operations.md")
    missing = [name for name in exposed_names() if not name.endswith(("_bucket", "_sum", "_count"))]
    assert not [name for name in missing if f"`{name}`" not in text]


@pytest.mark.parametrize("name", ["deploy/prometheus/alerts.yaml", "deploy/RUNBOOK.md", "docs/operations.md"])
def test_every_series_that_is_asked_for_is_exposed(name: str) -> None:
    asked = set(re.findall(r"\b((?:tidemeter|http)_[a-z_]+)\b(?=[\[{)` ]|$)", page(name), re.MULTILINE))
    series = {one for one in asked if not one.startswith("http_p")}
    assert series
    assert series - exposed_names() <= {"tidemeter_up"}


def test_every_alert_rule_has_a_first_action_and_every_first_action_a_rule() -> None:
    document = yaml.safe_load(page("deploy/prometheus/alerts.yaml"))
    rules = {
        rule["alert"]: rule["labels"]["severity"] for group in document["groups"] for rule in group["rules"]
    }
    rows = dict(re.findall(r"^\| `(Tidemeter\w+)` \| (\w+) \|", page("deploy/ALERTS.md"), re.MULTILINE))
    assert rows == rules


def test_every_ops_event_has_a_first_action() -> None:
    written: set[str] = set()
    for path in SOURCES:
        calls = re.findall(r"ops_event\(\s*((?:\"\w+\"(?: if \w+ else )?)+)", path.read_text())
        written |= {name for call in calls for name in re.findall(r'"(\w+)"', call)}
    assert len(written) >= 6
    rows = set(re.findall(r"^\| `(\w+)` \| [\w, ]+ \|", page("deploy/ALERTS.md"), re.MULTILINE))
    assert written <= rows


def test_every_code_of_an_answer_and_of_a_parked_record_is_in_its_page() -> None:
    text = page("docs/events.md") + page("docs/webhooks.md") + page("docs/parking.md")
    codes: set[str] = set()
    for path in SOURCES:
        if "stripe" in path.parts or "stripe_simulator" in path.parts:
            continue
        source = path.read_text()
        codes |= set(
            re.findall(
                r'(?:Invalid|Rejected|Refusal|_bad_quantity|UnknownSchema|Undecodable)\(\s*"(\w+)"', source
            )
        )
        codes |= set(re.findall(r'RequestRefused\(\s*\d+,\s*"(\w+)"', source))
        if path.name == "prepare.py":
            codes |= set(re.findall(r'return "(\w+)"', source)) | set(
                re.findall(r'Upcast\w*: "(\w+)"', source)
            )
    assert len(codes) > 40
    assert not sorted(code for code in codes if f"`{code}`" not in text)


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
