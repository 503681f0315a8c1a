"""The simulator alone: a profile is checked by name and place, and `tidemeter stripe-simulator` plays it."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from services.cli.main import app
from services.stripe_simulator import (
    InvalidProfile,
    SimulatorConfig,
    SimulatorControl,
    load_profile,
    running_simulator,
)
from services.stripe_simulator.deliveries import WEBHOOK_FAULTS
from services.stripe_simulator.faults import NAMES
from services.stripe_simulator.profile import CONFIG_FIELDS, read_profile
from tests.contract.stripe_calls import AUTHORIZATION, http

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "deploy/stripe-faults.example.yaml"
PAGE = (ROOT / "docs/stripe-simulator.md").read_text()
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a", "a profile is a mapping"),
        ("faults: [", "not YAML"),
        ("fault: []", "unknown field fault: the profile has mode, config"),
        ("mode: test", "mode must be one of live, sandbox, not 'test'"),
        ("seed: often", "seed: Expected `int`, got `str`"),
        ("config: 5", "config is a mapping"),
        ("config: {port: 1}", "unknown field port: config has identifier_window_hours"),
        ("config: {summary_lag: 1}", "unknown field summary_lag"),
        ("config: {rate_per_second: fast}", "config.rate_per_second: Expected `float`, got `str`"),
        ("config: {rate_per_second: 0}", "config: rate_per_second must be positive"),
        ("config: {webhook_retries: never}", "config.webhook_retries: Invalid enum value 'never'"),
        ("config: {reported_later: [no_customer]}", "config: reported_later: unknown ['no_customer']"),
        ("customers: cus_1", "customers is a list"),
        ("customers: [{name: Ada}]", "customers[0]: id is needed"),
        ("customers: [{id: cus_1, colour: red}]", "customers[0]: Received unknown parameter: colour"),
        ("meters: [{id: m}]", "meters[0]: Missing required param: event_name."),
        ("meters: [calls, {id: m, event_name: calls}]", "meters[1]: There is already an active meter"),
        ("meters: [{id: m, event_name: e, status: gone}]", "meters[0]: status must be one of"),
        ("faults: [{fault: explode}]", "faults[0]: fault must be one of cut_body, html_answer"),
        ("faults: [{fault: ok}, {fault: status}]", "faults[1]: fault status, and no other"),
        ("faults: [{fault: ok, match: {host: x}}]", "faults[0]: unknown field host: match has path"),
        ("faults: [{fault: ok, match: {nth: 0}}]", "faults[0]: nth and times count from 1"),
        ("faults: [{fault: ok, match: {probability: 2}}]", "faults[0]: probability must lie between"),
        ("faults: [{fault: status, status: 429, reason: mood}]", "faults[0]: reason must be one of"),
        ("faults: [{fault: slow, seconds: long}]", "faults[0]: Expected `float`, got `str`"),
        ("webhook_faults: [{fault: slow}]", "webhook_faults[0]: fault must be one of duplicate"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_place_of_its_first_wrong_field(text: str, named: str) -> None:
    with pytest.raises(InvalidProfile) as caught:
        read_profile(text)
    assert str(caught.value).startswith(named)


def test_an_empty_profile_is_one_and_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_profile("").config == {}
    with pytest.raises(InvalidProfile, match="cannot read .*: No such file"):
        load_profile(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("mode", "rates"), [("live", (1000, 100, "live")), ("sandbox", (25, None, "sandbox"))]
)
def test_rule_12_a_mode_brings_its_documented_limits_and_config_wins(mode: str, rates: Any) -> None:
    config = SimulatorConfig(**read_profile(f"mode: {mode}").config)
    assert (config.rate_per_second, config.basic_rate_per_second, config.webhook_retries) == rates
    changed = SimulatorConfig(**read_profile(f"mode: {mode}\nconfig: {{rate_per_second: 9}}").config)
    assert changed.rate_per_second == 9


def test_what_a_profile_holds_is_there_at_the_start_and_left_alone_at_the_next(tmp_path: Path) -> None:
    profile = read_profile(
        "{customers: [cus_1, {id: cus_2, name: Ada}], meters: [calls],"
        " faults: [{fault: status, status: 503}], webhook_faults: [{fault: lost}]}"
    )
    config = SimulatorConfig(port=0, data_path=tmp_path / "stripe.db")
    with running_simulator(config, profile) as sim:
        assert http.get(f"{sim.url}/v1/customers", headers=AUTHORIZATION).status_code == 503
        assert http.get(f"{sim.url}/v1/customers/cus_2", headers=AUTHORIZATION).json()["name"] == "Ada"
        assert sim.call("GET", "webhook_faults")["faults"][0]["fault"]["name"] == "lost"
        url = f"{sim.url}/v1/billing/meters/mtr_calls"
        http.post(url, data={"display_name": "Renamed"}, headers=AUTHORIZATION)
    with running_simulator(config, read_profile("meters: [calls]")) as sim:
        meter = http.get(f"{sim.url}/v1/billing/meters/mtr_calls", headers=AUTHORIZATION).json()
        assert meter["display_name"] == "Renamed"


def test_the_example_is_valid_and_shows_every_fault_but_the_plainest() -> None:
    profile = load_profile(EXAMPLE)
    assert SimulatorConfig(**profile.config).seed == 7
    shown = {one["fault"] for one in profile.faults}
    assert set(NAMES) - shown == {"ok", "slow", "reset_before_apply", "stall_body"}
    assert set(WEBHOOK_FAULTS) - {one["fault"] for one in profile.webhook_faults} == {"ok", "lost"}
    assert yaml.safe_load(EXAMPLE.read_text())["mode"] == "live"


def test_the_page_names_every_field_every_fault_and_every_control_call() -> None:
    from services.stripe_simulator.control import ACTIONS

    named = [*CONFIG_FIELDS, *NAMES, *WEBHOOK_FAULTS, *(name for _, name in ACTIONS)]
    assert not [name for name in named if f"`{name}`" not in PAGE]
    assert len(CONFIG_FIELDS) == len(dataclasses.fields(SimulatorConfig)) - 3


def test_the_page_has_every_endpoint_and_each_of_the_39_rules() -> None:
    from services.stripe_simulator.server import assemble

    simulator = assemble(SimulatorConfig())
    assert not [
        f"{method} {path}" for method, path in simulator.endpoints if f"`{method} {path}`" not in PAGE
    ]
    simulator.store.close()
    rows = re.findall(r"^\| (\d+) \| .* \| (?:documented|observed|chosen)", PAGE, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 40))


def test_the_command_explains_itself_and_checks_a_profile(tmp_path: Path) -> None:
    command = CliRunner()
    text = COLOURS.sub("", command.invoke(app, ["stripe-simulator", "--help"]).stdout)
    for word in ("--faults", "--check", "/_simulator/", "sk_test_", "not to"):
        assert word in text
    checked = command.invoke(app, ["stripe-simulator", "--check", "--faults", str(EXAMPLE)])
    assert (checked.exit_code, checked.stdout) == (0, "the profile is valid\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("faults: [{fault: explode}]")
    refused = command.invoke(app, ["stripe-simulator", "--faults", str(wrong)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {wrong}: faults[0]: fault must be one of")


def send(sim: SimulatorControl, number: int) -> int | None:
    """The status, or None for a connection that broke."""
    form = {
        "event_name": "requests",
        "identifier": f"id-{number}",
        "payload[stripe_customer_id]": "cus_acme",
        "payload[value]": "1",
    }
    try:
        return http.post(f"{sim.url}/v1/billing/meter_events", data=form, headers=AUTHORIZATION).status_code
    except httpx.TransportError:
        return None


def test_the_command_serves_what_its_profile_says(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "services.cli.main",
        "stripe-simulator",
        "--port",
        str(port),
        "--rate",
        "7",
    ]
    started = subprocess.Popen([*command, "--faults", str(EXAMPLE)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        sim = SimulatorControl(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 30
        while True:
            try:
                assert httpx.get(f"{sim.url}/health/ready").status_code == 200
                break
            except httpx.TransportError:
                assert started.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert len(sim.call("GET", "faults")["faults"]) == 9
        answers = [send(sim, number) for number in range(3)]
        assert answers[2] is None, "the third loses its answer, although it counts"
        assert [row["identifier"] for row in sim.ledger(customer="cus_acme")["rows"]][-1] == "id-2"
    finally:
        started.terminate()
        assert started.wait(10) == 0
