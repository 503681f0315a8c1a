"""Endpoints and secrets: how they are written, and how a file that changes is followed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.bridge.endpoints import Endpoints, configured, parse_secrets
from services.wire.errors import Misconfigured
from services.wire.settings import Settings, load_settings


@pytest.mark.parametrize(
    "text",
    [
        "main=whsec_a,whsec_b\nconnect=whsec_c",
        "main=whsec_a,whsec_b;connect=whsec_c",
        "\n  main = whsec_a , whsec_b \r\n\r\n connect = whsec_c ;\n",
    ],
)
def test_an_endpoint_has_one_or_more_secrets(text: str) -> None:
    assert parse_secrets(text) == {"main": (b"whsec_a", b"whsec_b"), "connect": (b"whsec_c",)}


def test_a_secret_is_taken_as_it_stands() -> None:
    assert parse_secrets("a=whsec_Az09+/-_==") == {"a": (b"whsec_Az09+/-_==",)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no webhook endpoint"),
        (" \n;\n", "no webhook endpoint"),
        ("whsec_planted", "entry 1 must be name="),
        ("main", "entry 1 must hold signing secrets"),
        ("main=", "entry 1 must hold signing secrets"),
        ("main=whsec_", "entry 1 must hold signing secrets"),
        ("main=planted", "entry 1 must hold signing secrets"),
        ("main=whsec_planted,", "entry 1 must hold signing secrets"),
        ("main=whsec_planted,,whsec_b", "entry 1 must hold signing secrets"),
        ("main=whsec_planted whsec_b", "entry 1 must hold signing secrets"),
        ("main=whsec_planted\u00e9", "entry 1 must hold signing secrets"),
        ("main=whsec_" + "planted" * 50, "entry 1 must hold signing secrets"),
        ("a=whsec_a\nmain=sk_planted", "entry 2 must hold signing secrets"),
        ("a=whsec_planted\na=whsec_b", "entry 2 names an endpoint that stands before it"),
        ("Main=whsec_planted", "entry 1 must be name="),
        ("_a=whsec_planted", "entry 1 must be name="),
        ("a/b=whsec_planted", "entry 1 must be name="),
        ("a" * 65 + "=whsec_planted", "entry 1 must be name="),
        ("=whsec_planted", "entry 1 must be name="),
        ("whsec_planted=whsec_planted", "entry 1 must be name="),
    ],
)
def test_what_is_wrong_is_said_without_saying_the_secret(text: str, sentence: str) -> None:
    with pytest.raises(Misconfigured, match=sentence) as caught:
        parse_secrets(text)
    assert "planted" not in str(caught.value)


def write(path: Path, text: str) -> None:
    """As one should: whole, under another name, then moved."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    write(path, "main=whsec_old\n")
    return path


def test_a_roll_needs_no_restart(path: Path) -> None:
    endpoints = Endpoints(path=path)
    write(path, "main=whsec_old,whsec_new\nconnect=whsec_c")
    assert endpoints.secrets == {"main": (b"whsec_old",)}
    endpoints.refresh()
    assert endpoints.secrets == {"main": (b"whsec_old", b"whsec_new"), "connect": (b"whsec_c",)}


def test_a_file_that_is_written_in_place_is_read_again(path: Path) -> None:
    endpoints = Endpoints(path=path)
    before = path.stat()
    path.write_text("main=whsec_new\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    endpoints.refresh()
    assert endpoints.secrets == {"main": (b"whsec_new",)}


def test_a_file_that_did_not_change_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoints = Endpoints(path=path)
    monkeypatch.setattr("services.bridge.endpoints._read", lambda _: pytest.fail("read"))
    endpoints.refresh()


@pytest.mark.parametrize("broken", ["", "main=planted", "main=whsec_planted\nmain=whsec_b", None])
def test_a_broken_file_changes_nothing_but_health_until_it_is_mended(
    path: Path, broken: str | None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoints = Endpoints(path=path)
    if broken is None:
        path.unlink()
    else:
        write(path, broken)
    for _ in range(3):
        endpoints.refresh()
        assert endpoints.secrets == {"main": (b"whsec_old",)}
        assert endpoints.is_stale
    logged = [caplog.text, "".join(capfd.readouterr())]  # a line may be on both, as logging is set up by then
    assert max(text.count("webhook_secrets.unusable") for text in logged) == 1
    assert not any("planted" in text for text in logged)
    write(path, "main=whsec_new")
    endpoints.refresh()
    assert endpoints.secrets == {"main": (b"whsec_new",)}
    assert not endpoints.is_stale


def test_a_file_that_is_moved_away_and_back_is_whole_again(path: Path, tmp_path: Path) -> None:
    endpoints = Endpoints(path=path)
    path.rename(tmp_path / "away")
    endpoints.refresh()
    assert endpoints.is_stale
    (tmp_path / "away").rename(path)
    endpoints.refresh()
    assert not endpoints.is_stale


def test_a_file_that_is_no_text_is_refused_at_start(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Misconfigured, match="not UTF-8"):
        Endpoints(path=path)


def test_the_variable_wins_over_the_file_and_a_file_is_followed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMETER_WEBHOOK_SECRETS_FILE", str(path))
    endpoints = configured(load_settings())
    write(path, "main=whsec_new")
    endpoints.refresh()
    assert endpoints.secrets == {"main": (b"whsec_new",)}
    monkeypatch.setenv("TIDEMETER_WEBHOOK_SECRETS", "env=whsec_env")
    endpoints = configured(load_settings())
    endpoints.refresh()
    assert endpoints.secrets == {"env": (b"whsec_env",)}


def test_without_any_endpoint_it_does_not_start() -> None:
    for given in (None, SecretStr("")):
        with pytest.raises(Misconfigured, match="set TIDEMETER_WEBHOOK_SECRETS or"):
            configured(Settings.model_construct(webhook_secrets=given))
