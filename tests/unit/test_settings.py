"""Settings: arguments, then the environment, then secret files, then a running ``tidemeter up``."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.wire.errors import Misconfigured
from services.wire.settings import (
    PREFIX,
    RUNTIME_FILE,
    Settings,
    data_directory,
    load_settings,
    running_runtime,
)

NO_PROCESS = 2**22 + 1  # above the largest process id of Linux


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TIDEMETER_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()


def runtime(**document: Any) -> None:
    (data_directory() / RUNTIME_FILE).write_text(json.dumps({"pid": os.getpid(), **document}))


def test_everything_has_a_default_but_the_addresses_and_the_key() -> None:
    settings = load_settings()
    unset = {name for name in Settings.model_fields if getattr(settings, name) is None}
    assert unset == {
        "kafka_bootstrap",
        "postgres_dsn",
        "schema_registry_url",
        "topic_replication",
        "min_insync_replicas",
        "archive_url",
        "stripe_api_key",
        "stripe_stream_base",
        "sink_webhook_url",
        "sink_webhook_secret",
        "stripe_api_base",
        "worker_id",
        "webhook_secrets",
        "webhook_handlers",
        "smtp_host",
        "smtp_username",
        "smtp_password",
        "mail_from",
        "mail_to",
        "mail_events",
    }


def test_every_setting_says_what_it_is() -> None:
    assert not [name for name, field in Settings.model_fields.items() if not field.description]


def test_the_environment_sets_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_HTTP_PORT", "9000")
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "a:1,b:2")
    assert load_settings().http_port == 9000
    assert load_settings().kafka() == "a:1,b:2"


def test_an_argument_wins_over_the_environment_and_none_is_no_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEMETER_HTTP_PORT", "9000")
    assert load_settings(http_port=9001).http_port == 9001
    assert load_settings(http_port=None).http_port == 9000


def test_a_secret_can_come_from_a_file_and_loses_its_line_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dsn").write_text("postgresql://u:p@h/d\n")
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN_FILE", str(tmp_path / "dsn"))
    assert load_settings().postgres() == "postgresql://u:p@h/d"


def test_a_secret_in_the_environment_wins_over_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("sk_test_file")
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("TIDEMETER_STRIPE_API_KEY", "sk_test_environment")
    assert load_settings().stripe_key() == "sk_test_environment"


def test_a_secret_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_POSTGRES_DSN_FILE", "/nowhere/dsn")
    with pytest.raises(Misconfigured, match="TIDEMETER_POSTGRES_DSN_FILE: cannot read /nowhere/dsn"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "http"),
        ("TOPIC_PARTITIONS", "0"),
        ("DEDUPE_DAYS", "0"),
        ("LOG_LEVEL", "loud"),
        ("STRIPE_ALLOW_LIVE", "perhaps"),
        ("CHUNK_RECORDS_MAX", "-1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(Misconfigured, match=PREFIX + name):
        load_settings()


def test_a_refusal_does_not_repeat_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_STRIPE_ALLOW_LIVE", "sk_live_by_mistake")
    with pytest.raises(Misconfigured) as caught:
        load_settings()
    assert "sk_live_by_mistake" not in str(caught.value)


def test_secrets_are_masked_wherever_settings_are_printed() -> None:
    settings = load_settings(
        postgres_dsn="postgresql://u:planted@h/d",
        stripe_api_key="sk_test_planted",
        schema_registry_url="https://u:planted@h",
    )
    printed = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert "planted" not in printed


@pytest.mark.parametrize("key", ["sk_live_1", "rk_live_1"])
def test_a_live_key_is_refused_until_it_is_allowed(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_STRIPE_ALLOW_LIVE") as caught:
        load_settings(stripe_api_key=key).stripe_key()
    assert key not in str(caught.value)
    monkeypatch.setenv("TIDEMETER_STRIPE_ALLOW_LIVE", "true")
    assert load_settings(stripe_api_key=key).stripe_key() == key


@pytest.mark.parametrize("key", ["sk_test_1", "rk_test_1"])
def test_a_test_key_needs_no_permission(key: str) -> None:
    assert load_settings(stripe_api_key=key).stripe_key() == key


@pytest.mark.parametrize(
    ("ask", "variable"),
    [
        (Settings.kafka, "TIDEMETER_KAFKA_BOOTSTRAP"),
        (Settings.postgres, "TIDEMETER_POSTGRES_DSN"),
        (Settings.stripe_key, "TIDEMETER_STRIPE_API_KEY"),
    ],
)
def test_what_is_needed_and_not_set_is_named(ask: Any, variable: str) -> None:
    with pytest.raises(Misconfigured, match=variable):
        ask(load_settings())


def lock_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its living owner does. A lock is the open file's, so one in this process shuts a second open out."""
    held = (data_directory() / RUNTIME_FILE).open()
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(lock_runtime, "held", held, raising=False)


def test_a_running_stack_is_found_by_its_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(kafka_bootstrap="127.0.0.1:1", postgres_dsn="postgresql://up", http_port=8081, processes={})
    assert load_settings().kafka_bootstrap is None, "nobody holds the file: its owner was killed"
    lock_runtime(monkeypatch)
    settings = load_settings()
    assert (settings.kafka(), settings.postgres(), settings.http_port) == (
        "127.0.0.1:1",
        "postgresql://up",
        8081,
    )
    assert running_runtime()["pid"] == os.getpid()


def test_the_environment_wins_over_a_running_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(kafka_bootstrap="127.0.0.1:1")
    lock_runtime(monkeypatch)
    monkeypatch.setenv("TIDEMETER_KAFKA_BOOTSTRAP", "elsewhere:9092")
    assert load_settings().kafka() == "elsewhere:9092"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"kafka_bootstrap": "127.0.0.1:1"}', f'{{"pid": {NO_PROCESS}, "kafka_bootstrap": "x:1"}}'],
    ids=["empty", "cut short", "no process id", "a process that is gone"],
)
def test_the_file_of_a_stack_that_is_gone_or_broken_is_ignored(text: str) -> None:
    (data_directory() / RUNTIME_FILE).write_text(text)
    assert load_settings().kafka_bootstrap is None
    assert running_runtime() == {}


def test_the_data_directory_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMETER_DATA_DIR", "~/meter")
    assert data_directory() == Path.home() / "meter"
    monkeypatch.delenv("TIDEMETER_DATA_DIR")
    assert data_directory() == Path.home() / ".local/share/tidemeter"
