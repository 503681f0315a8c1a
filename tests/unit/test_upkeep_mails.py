"""What a mail says, to whom, and of which ops events."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email import message_from_bytes, policy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.upkeep.agent import Mailing
from services.upkeep.mails import MAILED, NEVER, Notice, Post, message, names_of
from services.wire.errors import Misconfigured
from services.wire.ops import NAMES
from services.wire.settings import Settings, load_settings

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
POST = Post("tidemeter@example.com", ("ops@example.com", "finance@example.com"))
ROOT = Path(__file__).parents[2]


def notice(number: int = 1, subject_id: str = "usage.v3/0/17", /, **attributes: str) -> Notice:
    return Notice(f"{number:032x}", "partition_halted", "partition", subject_id, "counters", attributes, NOW)


def settings(**values: str) -> Settings:
    usual = {"smtp_host": "mail.example.com", "mail_from": POST.sender, "mail_to": ", ".join(POST.recipients)}
    return load_settings(**{**usual, **values})


def test_a_mail_names_the_event_its_subject_its_codes_and_where_the_first_action_stands() -> None:
    mail = message_from_bytes(
        message([notice(reason="offset_gap")], POST, NOW).as_bytes(), policy=policy.SMTP
    )
    assert mail["Subject"] == "[tidemeter] partition_halted: usage.v3/0/17"
    assert mail["To"] == "ops@example.com, finance@example.com"
    assert mail["Message-ID"] == f"<{1:032x}@example.com>"
    assert mail["Auto-Submitted"] == "auto-generated"
    text = mail.get_content()
    assert "reason: offset_gap" in text
    assert "deploy/ALERTS.md, the row partition_halted" in text
    assert "http" not in text


def test_many_events_are_one_mail_with_the_first_and_the_last_of_them() -> None:
    mail = message([notice(number, f"usage.v3/{number}") for number in range(137)], POST, NOW)
    assert mail["Subject"] == "[tidemeter] 137 × partition_halted"
    text = mail.get_content()
    assert "usage.v3/0" in text
    assert "usage.v3/136" in text
    assert "usage.v3/70" not in text


def test_the_same_events_have_the_same_message_id_in_whatever_order() -> None:
    notices = [notice(number) for number in range(30)]
    one, again = message(notices, POST, NOW), message(notices[::-1], POST, NOW)
    assert one["Message-ID"] == again["Message-ID"]
    assert one["Message-ID"] != message(notices[1:], POST, NOW)["Message-ID"]


def test_no_identifier_can_add_a_header_or_a_line() -> None:
    evil = "x\r\nBcc: them@example.org\r\n\r\nhello\u202eolleh\x00"
    mail = message_from_bytes(
        message([notice(1, evil, reason=evil)], POST, NOW).as_bytes(), policy=policy.SMTP
    )
    assert mail["Bcc"] is None
    assert not re.search(r"^Bcc", mail.get_content(), re.MULTILINE)
    assert "\u202e" not in mail.get_content()


def test_an_identifier_of_any_length_leaves_lines_that_mail_servers_take() -> None:
    raw = message([notice(1, "ü" * 5000)], POST, NOW).as_bytes()
    assert max(len(line) for line in raw.splitlines()) < 998


@given(st.lists(st.tuples(st.text(max_size=300), st.text(max_size=300)), max_size=4), st.text(max_size=300))
def test_whatever_an_ops_event_holds_a_mail_can_be_made_of_it(
    attributes: list[tuple[str, str]], subject_id: str
) -> None:
    made = message([notice(1, subject_id, **dict(attributes))], POST, NOW)
    mail = message_from_bytes(made.as_bytes(), policy=policy.SMTP)
    assert set(mail.keys()) == set(made.keys())
    assert mail["Message-ID"] == f"<{1:032x}@example.com>"
    assert mail["To"] == ", ".join(POST.recipients)


def test_a_mail_that_failed_for_good_never_makes_a_mail() -> None:
    assert {"notification_dead"} == NEVER
    assert names_of("all") == NAMES - NEVER
    assert not names_of(None) & NEVER
    with pytest.raises(Misconfigured):
        names_of("notification_dead")


def test_what_makes_a_mail_can_be_chosen_by_name_and_a_name_that_is_none_stops_the_start() -> None:
    assert names_of("payout_failed, meter_paused") == {"payout_failed", "meter_paused"}
    with pytest.raises(Misconfigured, match="no_such_event"):
        names_of("payout_failed,no_such_event")


def test_the_page_lists_what_makes_a_mail_by_itself() -> None:
    text = (ROOT / "docs/upkeep.md").read_text(encoding="utf-8")
    listed = text.partition("<!-- mailed -->")[2].partition("<!-- /mailed -->")[0]
    assert set(re.findall(r"`([\w.]+)`", listed)) == MAILED
    assert MAILED <= NAMES


@pytest.mark.parametrize(
    "values",
    [
        {"mail_to": "not an address"},
        {"mail_to": "ops@example.com\r\nBcc: x@example.com"},
        {"mail_to": " , "},
        {"mail_from": "@example.com"},
        {"smtp_username": "tidemeter"},
        {"smtp_password": "secret"},
        {"smtp_tls": "none", "smtp_username": "tidemeter", "smtp_password": "secret"},
        {"mail_events": "nothing_of_ours"},
    ],
)
def test_a_mail_server_without_what_it_needs_stops_the_start(values: dict[str, str]) -> None:
    with pytest.raises(Misconfigured):
        Mailing.from_settings(settings(**values))


def test_a_mail_server_needs_both_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_MAIL_FROM"):
        Mailing.from_settings(load_settings(smtp_host="mail.example.com"))


def test_without_a_mail_server_there_are_no_mails() -> None:
    assert Mailing.from_settings(load_settings()) is None


def test_no_password_shows_in_what_a_log_would_print() -> None:
    mailing = Mailing.from_settings(settings(smtp_username="tidemeter", smtp_password="topsecret"))
    assert "topsecret" not in repr(mailing)
