"""Replays by command: what is printed, which exit status, and Ctrl-C at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from services.cli import replay as commands
from services.cli.common import ATTENTION, INTERRUPTED, MISUSED, UNAVAILABLE
from services.cli.main import app
from services.wire.settings import load_settings
from tests.integration.replaying import slowly
from tests.oracle import DAY_S, HOUR_S, Usage
from tests.pipeline import ROOT, Pipeline, Worker, until

NOW_S = int(time.time())
RECORDS = 4000


@dataclass
class Scene:
    """A tenant whose counters are 5 too high in each of two hours."""

    pipeline: Pipeline
    tenant: str

    def damage(self) -> None:
        self.pipeline.query(
            "WITH held AS MATERIALIZED (SELECT item_id FROM items WHERE tenant_id = %s "
            "ORDER BY item_id FOR UPDATE) UPDATE buckets b SET total = total + 5 FROM held i "
            "WHERE i.item_id = b.item_id RETURNING 1",
            self.tenant,
        )

    def totals(self) -> list[Decimal]:
        rows = self.pipeline.query(
            "SELECT trim_scale(total) FROM buckets JOIN items USING (item_id) WHERE tenant_id = %s "
            "ORDER BY hour_start",
            self.tenant,
        )
        return [row[0] for row in rows]

    def run(self, *arguments: str) -> Result:
        """In this process; ``--since`` is two days ago."""
        return CliRunner().invoke(app, ["replay", "--tenant", self.tenant, "--since", "-PT48H", *arguments])

    def last(self) -> dict[str, Any]:
        """The newest replay of this tenant, as the command shows it."""
        listed = json.loads(CliRunner().invoke(app, ["replays", "list", "--json"]).stdout)
        return dict(next(one for one in listed if one["tenantId"] == self.tenant))


@pytest.fixture
def scene(pipeline: Pipeline, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", pipeline.kafka)
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN", pipeline.dsn)
    monkeypatch.setattr(commands, "configure_logging", lambda *_, **__: None)  # here it is pytest's
    monkeypatch.setattr(commands, "PATIENCE_SECONDS", 0.0)
    scene = Scene(pipeline, f"t{uuid.uuid4().hex[:8]}")
    pipeline.tenant(scene.tenant)
    pipeline.meter(scene.tenant, "calls", lateness_s=2 * DAY_S)
    pipeline.send(
        *(
            Usage(scene.tenant, "cus_1", "calls", Decimal(one), f"k{one}", NOW_S - one * 10 * HOUR_S)
            for one in (1, 2)
        )
    )
    pipeline.await_quiet()
    scene.damage()
    return scene


def test_a_dry_run_prints_a_plan_that_a_person_can_read_and_changes_nothing(scene: Scene) -> None:
    result = scene.run("--meter", "calls")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("window   20") and " to 20" in lines[0]
    assert any(line.startswith("read     usage.v3/") for line in lines)
    words = [[one for one in line.split() if "T" not in one] for line in lines]
    assert [scene.tenant, "calls", "2", "2", "13", "3"] in words, result.stdout
    assert ["cus_1", "calls", "7", "2", "-5", "1", "1"] in words, result.stdout
    assert lines[-2].startswith(
        "2 hours of 1 items, 0 distinct values, 0 watermarks, 0 billing periods differ"
    )
    assert lines[-1].startswith("plan     ") and len(lines[-1].split()[1]) == 64
    assert scene.totals() == [7, 6]
    plan = json.loads(scene.run("--json").stdout)
    assert plan["planHash"] == lines[-1].split()[1]
    assert scene.pipeline.query("SELECT FROM replays WHERE tenant_id = %s", scene.tenant) == []


def test_an_apply_does_what_its_dry_run_showed_and_again_there_is_nothing_to_do(scene: Scene) -> None:
    result = scene.run("--apply")
    assert result.exit_code == 0, result.stderr
    assert "is done: 2 hours of 1 items" in result.stdout
    assert scene.totals() == [2, 1]
    again = scene.run("--apply")
    assert (again.exit_code, "nothing differs" in again.stderr) == (0, True)
    one = scene.last()
    assert (one["state"], one["requestedBy"].startswith("cli:")) == ("done", True)
    shown = CliRunner().invoke(app, ["replays", "show", str(one["id"])])
    assert (shown.exit_code, "2 hours of 1 items" in shown.stdout) == (0, True)
    late = CliRunner().invoke(app, ["replays", "cancel", str(one["id"])])
    assert late.stdout == "it had ended before; nothing changed\n"


def test_an_apply_by_hash_makes_no_dry_run_and_a_stale_one_is_status_1(scene: Scene) -> None:
    plan = json.loads(scene.run("--json").stdout)
    applied = scene.run("--apply", "--plan-hash", plan["planHash"], "--json")
    assert applied.exit_code == 0, applied.stderr
    document = json.loads(applied.stdout)
    assert (document["plan"], document["replay"]["state"]) == (None, "done")
    assert document["replay"]["result"]["items"] == plan["items"]
    assert scene.run("--apply", "--plan-hash", plan["planHash"]).exit_code == 0
    scene.damage()
    scene.damage()
    stale = scene.run("--apply", "--plan-hash", plan["planHash"])
    assert (stale.exit_code, "(plan_stale)" in stale.stderr) == (ATTENTION, True)
    assert scene.totals() == [12, 11]


def test_on_a_terminal_it_asks_and_no_is_no(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, True]
    monkeypatch.setattr(commands, "_is_asked", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answers.pop(0))
    refused = scene.run("--apply")
    assert (refused.exit_code, refused.stderr) == (ATTENTION, "error: not applied; nothing was changed\n")
    assert scene.totals() == [7, 6]
    assert scene.run("--apply").exit_code == 0
    assert answers == []
    scene.damage()
    assert scene.run("--apply", "--yes").exit_code == 0
    assert scene.totals() == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["--until", "-PT49H"], "window_invalid", MISUSED),
        (["--until", "2026-01-01T00:00:00"], "time_invalid", MISUSED),
        (["--meter", "nothing"], "meter_unknown", MISUSED),
        (["--period", "now"], "window_ambiguous", MISUSED),
        (["--offsets", "usage.v3/0:1-2"], "window_ambiguous", MISUSED),
    ],
)
def test_what_means_nothing_is_misuse(scene: Scene, arguments: list[str], code: str, status: int) -> None:
    for more in ([], ["--apply"]):
        result = scene.run(*arguments, *more)
        assert (result.exit_code, result.stdout) == (status, "")
        assert result.stderr.startswith("error: ") and result.stderr.endswith(f"({code})\n")


def test_windows_by_period_arrival_and_offsets_are_understood(scene: Scene) -> None:
    def plan(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["replay", "--tenant", scene.tenant, *arguments, "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    assert plan("--since", "-PT1H", "--by", "arrival")["changedHours"] == 2
    _, ends = scene.pipeline.log_bounds()
    ranges = [part for tp, end in ends.items() for part in ("--offsets", f"{tp[0]}/{tp[1]}:0-{end}")]
    assert plan(*ranges)["changedHours"] == 2
    assert plan("--period", "now", "--customer", "cus_1")["since"][8:10] == "01"


def test_usage_that_comes_on_top_of_the_same_differences_does_not_keep_an_apply_from_them(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = commands._Run._apply
    came: list[str] = []

    def disturbed(self: Any, request: Any, plan: Any) -> None:
        if len(came) < 2:  # between the plan and its apply
            came.append(f"late-{len(came)}")
            usage = Usage(scene.tenant, "cus_1", "calls", Decimal(4), came[-1], NOW_S - 10 * HOUR_S)
            scene.pipeline.send(usage)
            scene.pipeline.await_quiet()
        apply(self, request, plan)

    monkeypatch.setattr(commands._Run, "_apply", disturbed)
    result = scene.run("--apply", "--yes")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("the differences are the same") == 2
    assert sorted(scene.totals()) == [2, 9]


def test_a_rebuild_is_status_1_while_counters_and_log_differ(scene: Scene) -> None:
    def rebuild(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["rebuild", *arguments])

    differing = rebuild()
    assert differing.exit_code == ATTENTION
    assert "window   everything" in differing.stdout
    applied = rebuild("--apply", "--json")
    assert applied.exit_code == 0, applied.stderr
    done = json.loads(applied.stdout)["replay"]
    assert (done["state"], done["since"], done["tenantId"]) == ("done", None, None)
    assert scene.totals() == [2, 1]
    agreed = rebuild()
    assert (agreed.exit_code, "counters and log agree" in agreed.stdout) == (0, True)
    scene.pipeline.query("UPDATE buckets SET pushed = pushed + 1 RETURNING 1")
    kept = rebuild()
    assert (kept.exit_code, "billing periods differ" in kept.stdout) == (ATTENTION, True), kept.stdout
    assert "by the journal" in kept.stdout
    assert rebuild("--apply", "--yes").exit_code == 0
    assert rebuild().exit_code == 0


def test_ctrl_c_cancels_an_apply_and_says_that_nothing_was_changed(scene: Scene) -> None:
    feed(scene)
    running = start(scene, 1.0, "--apply", "--yes")
    try:
        until(lambda: states(scene) == ["running"], "it reads", 60)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=20)
    finally:
        running.kill()
    assert running.returncode == INTERRUPTED, said
    assert "is cancelled: nothing was changed" in said
    assert (states(scene), scene.totals()[-1] > 5) == (["cancelled"], True)
    until(lambda: not sessions(scene), "its session ended", 5)


def test_ctrl_c_that_comes_too_late_says_that_it_had_been_done(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--apply").exit_code == 0
    replay_id = scene.last()["id"]
    assert commands._cancelled(load_settings(), replay_id).exit_code == INTERRUPTED
    assert capsys.readouterr().err == f"replay {replay_id} had ended as done: the counters are corrected\n"


def test_ctrl_c_in_a_dry_run_just_ends_it(scene: Scene) -> None:
    feed(scene)
    running = start(scene, 1.0)
    try:
        until(lambda: bool(sessions(scene)), "it reads", 60)
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        out, said = running.communicate(timeout=20)
    finally:
        running.kill()
    assert (running.returncode, out) == (INTERRUPTED, ""), said
    until(lambda: not sessions(scene), "its session ended", 5)


def test_a_command_follows_a_replayer_and_takes_over_when_that_dies(scene: Scene) -> None:
    feed(scene)
    replayer = scene.pipeline.worker("doomed", slowly(1.0, "replayer")).start().await_healthy()
    running = start(scene, 0.0, "--apply", "--yes", "--json")
    try:
        until(lambda: states(scene) == ["running"], "it is taken up", 60)
        assert replayer.metrics()['tidemeter_replay_records{of="total"}'] >= 0
        replayer.kill()
        out, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, said
    assert json.loads(out)["replay"]["state"] == "done"


def test_with_kafka_away_it_is_status_3(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    assert scene.run().exit_code == UNAVAILABLE


def test_an_unknown_replay_is_misuse(scene: Scene) -> None:
    for verb in ("show", "cancel"):
        result = CliRunner().invoke(app, ["replays", verb, "999999"])
        assert (result.exit_code, "no replay 999999" in result.stderr) == (MISUSED, True)


def feed(scene: Scene) -> None:
    """Enough to be met in the middle of."""
    scene.pipeline.send(
        *(
            Usage(scene.tenant, f"cus_{one % 7}", "calls", Decimal(1), f"m{one}", NOW_S)
            for one in range(RECORDS)
        )
    )
    scene.pipeline.await_quiet()
    scene.damage()


def start(scene: Scene, pause: float, *arguments: str) -> subprocess.Popen[str]:
    """``tidemeter replay`` of the scene's tenant in a process of its own."""
    return subprocess.Popen(
        slowly(pause, "replay", "--tenant", scene.tenant, "--since", "-PT48H", *arguments),
        env=dict(os.environ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def states(scene: Scene) -> list[str]:
    return [
        row[0] for row in scene.pipeline.query("SELECT state FROM replays WHERE tenant_id = %s", scene.tenant)
    ]


def sessions(scene: Scene) -> list[Any]:
    return scene.pipeline.query(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tidemeter-replay' "
        "AND datname = current_database()"
    )
