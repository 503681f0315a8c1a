"""Prometheus, Alertmanager and Grafana: what they are given, and what the running product answers them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from services.embedded.processes import choose_port
from services.embedded.stack import Stack
from tests.integration.running import event, post, wait_for
from tests.prometheus_tools import PrometheusTools, ToolsMissing, find_tools

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/alerts.yaml"
DASHBOARDS = sorted(DEPLOY.glob("grafana/dashboards/*.json"))
LABEL_VALUES = re.compile(r"^label_values\((.+), \w+\)$")


@pytest.fixture(scope="session")
def tools() -> PrometheusTools:
    """The programs, or the reason why they are not here."""
    try:
        return find_tools()
    except ToolsMissing as missing:
        pytest.skip(str(missing))


def run(*command: str | Path, given: str | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], input=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[None]:
    """A server, ended again whatever happens."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def await_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/-/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{client.base_url} does not become ready")


# -- Files -------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)  # 15 s of computing
def test_every_alert_fires_when_it_must_and_not_when_it_must_not(tools: PrometheusTools) -> None:
    run(tools.promtool, "check", "rules", RULES)
    run(tools.promtool, "test", "rules", DEPLOY / "prometheus/alerts.test.yaml")


def test_every_alert_is_tested_for_both() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts.test.yaml").read_text())["tests"]
    checks = [check for one in tests for check in one["alert_rule_test"]]
    fires = {check["alertname"] for check in checks if check.get("exp_alerts")}
    quiet = {check["alertname"] for check in checks if not check.get("exp_alerts")}
    assert fires == quiet == set(alerts())


def test_prometheus_takes_its_configuration(tools: PrometheusTools) -> None:
    run(tools.promtool, "check", "config", "--syntax-only", DEPLOY / "prometheus/prometheus.yaml")


def test_alertmanager_takes_its_configuration_and_routes_by_severity(tools: PrometheusTools) -> None:
    path = DEPLOY / "alertmanager/alertmanager.yaml"
    run(tools.amtool, "check-config", path)
    for severity, receiver in {"page": "pager", "ticket": "tickets"}.items():
        routed = run(
            tools.amtool, "config", "routes", "test", f"--config.file={path}", f"severity={severity}"
        )
        assert routed.split() == [receiver]
    named = re.findall(r'alertname !?=~? "([^"]+)"', path.read_text())
    assert {name for one in named for name in one.split("|")} <= set(alerts())


def test_no_secret_stands_in_the_configuration() -> None:
    """Keys and addresses come from files."""
    for path in DEPLOY.glob("alertmanager/*.yaml"):
        keys = set(re.findall(r"(\w*(?:key|url|password|token|secret)\w*):", path.read_text()))
        assert all(key.endswith("_file") for key in keys), path


# -- What is asked -----------------------------------------------------------------------------------


def alerts() -> dict[str, str]:
    document = yaml.safe_load(RULES.read_text())
    return {rule["alert"]: rule["expr"] for group in document["groups"] for rule in group["rules"]}


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Every panel that shows something, those of rows too."""
    found = json.loads(dashboard.read_text())["panels"]
    found += [inner for panel in found for inner in panel.get("panels", [])]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Every query that is printed anywhere, with where it stands."""
    found = [(f"alert {name}", expr) for name, expr in alerts().items()]
    for path in DASHBOARDS:
        for panel in panels(path):
            found += [(f"{path.name}: {panel['title']}", one["expr"]) for one in panel.get("targets", [])]
        for variable in json.loads(path.read_text())["templating"]["list"]:
            found += [
                (f"{path.name}: ${variable['name']}", asked)
                for asked in LABEL_VALUES.findall(variable["query"])
            ]
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", runbook, re.DOTALL | re.MULTILINE)
    asked = [line for language, block in blocks if not language for line in block.splitlines()]
    assert len(asked) > 5
    return found + [("runbook", line) for line in asked]


def with_series(expr: str) -> str:
    """The expression as one that has a series when all is well, too: comparisons give 0 or 1, and what would
    silence it is only asked for."""
    return re.sub(r"\bunless\b", "and", re.sub(r"\s(==|!=|>=|<=|>|<)\s(?!bool)", r" \1 bool ", expr))


def filled(query: str) -> str:
    """With values for what Grafana would put in."""
    query = re.sub(r"\$__(?:rate_)?interval|\$__range", "1m", query)
    return re.sub(r'"\$\w+"', '".+"', query)


# -- The running product -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traffic(stack: Stack, api_key: str) -> None:
    """A little of everything that is usual."""
    assert post(stack, api_key, event("a", 5), event("b", 2)).json()["accepted"] == 2
    wait_for(stack, "it is at Stripe", lambda now: now["deltas"]["reported"]["count"] > 0)


@pytest.fixture(scope="module")
def prometheus(
    stack: Stack, traffic: None, tools: PrometheusTools, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A real one, with our rules and our jobs, on the addresses of the running product."""
    root = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    runtime = json.loads((stack.root / "runtime.json").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config.pop("alerting", None)
    config["scrape_configs"] = [
        {"job_name": job["job_name"], "static_configs": [{"targets": targets(job["job_name"], runtime)}]}
        for job in config["scrape_configs"]
    ]
    (root / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = choose_port(None, root / "port", [])
    command = [
        tools.prometheus,
        f"--config.file={root / 'prometheus.yaml'}",
        f"--storage.tsdb.path={root / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        started(command, root / "log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        await_ready(client)
        await_answer(client, "min(count_over_time(up[1m])) >= 4")  # so that rates have two points
        await_answer(
            client, "reconciliation_diff_pct"
        )  # the first comparison comes a while after the first usage
        yield client


def targets(job: str, runtime: dict[str, Any]) -> list[str]:
    """Addresses of the processes of a job."""
    service = job.removeprefix("tidemeter-")
    return [
        address.removeprefix("http://")
        for name, address in runtime["processes"].items()
        if name.rstrip("-0123456789") == service
    ]


def await_answer(client: httpx.Client, query: str) -> None:
    deadline = time.monotonic() + 90
    while not ask(client, query):
        assert time.monotonic() < deadline, f"nothing answers {query}"
        time.sleep(0.5)


def ask(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = client.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def test_every_process_has_a_job_and_answers(stack: Stack, prometheus: httpx.Client) -> None:
    """The simulator is none of ours in production."""
    up = {one["metric"]["instance"]: one["value"][1] for one in ask(prometheus, "up")}
    addresses = {
        member.base_url.removeprefix("http://")
        for name, member in stack.members().items()
        if name != "simulator"
    }
    assert up == dict.fromkeys(addresses, "1")


def test_every_query_of_alerts_dashboards_and_runbook_returns_a_series(prometheus: httpx.Client) -> None:
    found = queries()
    empty = [(where, query) for where, query in found if not ask(prometheus, with_series(filled(query)))]
    assert not empty
    assert len(found) > 100


def test_the_rules_are_evaluated_and_none_pages_about_a_product_that_is_well(
    prometheus: httpx.Client,
) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(alerts(), "ok")
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_metrics_keep_to_the_conventions_of_prometheus(stack: Stack, tools: PrometheusTools) -> None:
    """Names, units, help and types, of every process."""
    for name, member in stack.members().items():
        text = httpx.get(f"{member.base_url}/metrics", timeout=30).text
        done = subprocess.run(
            [tools.promtool, "check", "metrics"], input=text, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), name


def test_the_health_check_of_the_image_asks_the_process_itself(stack: Stack) -> None:
    def check(port: int) -> int:
        names = ("TIDEMETER_OBSERVE_PORT", "TIDEMETER_HTTP_PORT", "TIDEMETER_BRIDGE_PORT")
        environment = {**os.environ, **dict.fromkeys(names, "1"), names[0]: str(port)}
        return subprocess.run([sys.executable, DEPLOY / "healthcheck.py"], env=environment).returncode

    for name, member in stack.members().items():
        assert check(member.port) == 0, name
    assert check(2) == 1
