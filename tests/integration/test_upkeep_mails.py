"""Mails over SMTP to a real server (`aiosmtpd`): encryption, refusals, broken connections, and bursts."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from services.streaming.database import Database
from services.upkeep.mails import BURST, Post, message
from services.upkeep.sending import ATTEMPTS_MAX, LEASE, Mails, claim, pause_after, settle
from services.upkeep.smtp import Delivered, MailServer
from tests.integration.upkeeping import (
    NOW,
    SECRET,
    Mailbox,
    certificates,
    free_port,
    mail_server,
    notice,
    notify,
    told,
)

POST = Post("tidemeter@example.com", ("ops@example.com", "finance@example.com"))
MAIL = message([notice()], POST, NOW)
Connection = psycopg.Connection[Any]
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def box() -> Mailbox:
    return Mailbox()


def plain(port: int) -> MailServer:
    return MailServer("127.0.0.1", port, "none", None, None, answer_seconds=2, total_seconds=4)


def secured(port: int, tls: Any, password: str = SECRET) -> MailServer:
    return replace(plain(port), tls=tls, username="tidemeter", password=password)


def work(dsn: str, server: MailServer, *, now: datetime = NOW, post: Post = POST, steps: int = 50) -> None:
    """Steps of the job until nothing is due, however they end."""

    async def go() -> None:
        database = Database(dsn, "test")
        job = Mails(database, server, post, clock=lambda: now)
        for _ in range(steps):
            await job.step()
        database.reset()

    asyncio.run(go())


def states(db: Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT state, attempts FROM notifications ORDER BY ops_event_id").fetchall()


# -- One mail --------------------------------------------------------------------------------------------


def test_a_mail_reaches_every_recipient(box: Mailbox) -> None:
    with mail_server(box) as port:
        assert plain(port).deliver(MAIL, POST, wait_for_all=True) == Delivered("sent")
    [mail] = box.mails
    assert mail["X-Recipients"] == "ops@example.com finance@example.com"
    assert mail["Message-ID"] == f"<{0:032x}@example.com>"


@needs_openssl
@pytest.mark.parametrize("tls", ["tls", "starttls"])
def test_an_encrypted_and_verified_server_gets_the_login_and_the_mail(
    box: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: str
) -> None:
    authority, context = certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    contexts = {"implicit": context} if tls == "tls" else {"starttls": context}
    with mail_server(box, **contexts) as port:
        assert secured(port, tls).deliver(MAIL, POST, wait_for_all=True) == Delivered("sent")
        refused = secured(port, tls, password="wrong").deliver(MAIL, POST, wait_for_all=True)
    assert refused == Delivered("refused", "smtp_535")
    assert set(box.logins) == {"tidemeter"}
    assert len(box.mails) == 1


@needs_openssl
@pytest.mark.parametrize("tls", ["tls", "starttls"])
@pytest.mark.parametrize("name", ["IP:127.0.0.1", "DNS:mail.example.org"])
def test_a_certificate_of_an_unknown_authority_or_for_another_name_gets_no_password_and_no_mail(
    box: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: str, name: str
) -> None:
    authority, context = certificates(tmp_path, name)
    if name.startswith("DNS"):  # the authority is trusted here: it is the name that is wrong
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    contexts = {"implicit": context} if tls == "tls" else {"starttls": context}
    with mail_server(box, **contexts) as port:
        delivered = secured(port, tls).deliver(MAIL, POST, wait_for_all=True)
    assert delivered == Delivered("refused", "SSLCertVerificationError")
    assert (box.logins, box.mails) == ([], [])


def test_a_server_that_does_not_offer_encryption_gets_no_password_and_no_mail(box: Mailbox) -> None:
    with mail_server(box) as port:
        delivered = secured(port, "starttls").deliver(MAIL, POST, wait_for_all=True)
        assert delivered == Delivered("refused", "SMTPNotSupportedError")
        assert replace(plain(port), tls="tls").deliver(MAIL, POST, wait_for_all=True).outcome == "refused"
    assert (box.logins, box.mails) == ([], [])


def test_a_server_that_offers_encryption_and_refuses_it_gets_no_password_and_no_mail() -> None:
    said: list[bytes] = []
    script = [b"220 hi\r\n", b"250-hi\r\n250 STARTTLS\r\n", b"454 TLS not available\r\n", b"221 bye\r\n"]
    with scripted(script, said) as port:
        delivered = secured(port, "starttls").deliver(MAIL, POST, wait_for_all=True)
    assert delivered == Delivered("refused", "smtp_454")
    assert not [line for line in said if b"AUTH" in line or b"MAIL" in line]


@contextlib.contextmanager
def scripted(script: list[bytes], said: list[bytes]) -> Iterator[int]:
    """A server that gives these answers, whatever is said."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                for answer in script:
                    connection.sendall(answer)
                    line = connection.recv(4096)
                    if not line:
                        return
                    said.append(line)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(5)


def test_a_conversation_that_a_server_drags_out_is_cut() -> None:
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def drag() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 hi\r\n")
                while not stop.wait(0.05):  # a reply that never ends, each piece of it in time
                    connection.sendall(b"250-more\r\n")

    thread = threading.Thread(target=drag, daemon=True)
    thread.start()
    server = replace(plain(listener.getsockname()[1]), total_seconds=0.5)
    assert server.deliver(MAIL, POST, wait_for_all=True).outcome == "refused"
    stop.set()
    listener.close()
    thread.join(5)


def test_with_nobody_at_the_address_nothing_was_sent() -> None:
    delivered = plain(free_port()).deliver(MAIL, POST, wait_for_all=True)
    assert delivered == Delivered("refused", "ConnectionRefusedError")


@pytest.mark.parametrize(("answer", "code"), [("451 later", "smtp_451"), ("554 no", "smtp_554")])
def test_a_message_that_is_refused_was_not_sent(box: Mailbox, answer: str, code: str) -> None:
    box.answers = [answer]
    with mail_server(box) as port:
        assert plain(port).deliver(MAIL, POST, wait_for_all=True) == Delivered("refused", code)


def test_a_connection_that_breaks_after_the_message_leaves_it_unknown(box: Mailbox) -> None:
    box.answers = ["cut"]
    with mail_server(box) as port:
        assert plain(port).deliver(MAIL, POST, wait_for_all=True).outcome == "unknown"
    assert len(box.mails) == 1


def test_a_recipient_that_is_refused_for_good_holds_up_nobody(box: Mailbox) -> None:
    box.recipients["ops@example.com"] = ["550 no such mailbox"]
    with mail_server(box) as port:
        assert plain(port).deliver(MAIL, POST, wait_for_all=True) == Delivered("sent", refused=1)
    assert box.mails[0]["X-Recipients"] == "finance@example.com"


def test_a_recipient_that_is_put_off_is_waited_for_but_not_for_ever(box: Mailbox) -> None:
    box.recipients["ops@example.com"] = ["450 greylisted"]
    with mail_server(box) as port:
        assert plain(port).deliver(MAIL, POST, wait_for_all=True) == Delivered("refused", "smtp_450")
        assert box.mails == []
        assert plain(port).deliver(MAIL, POST, wait_for_all=False) == Delivered("sent", refused=1)


# -- The queue -------------------------------------------------------------------------------------------


def test_each_notification_is_one_mail(db: Connection, postgres_dsn: str, box: Mailbox) -> None:
    notify(db, notice(1), notice(2, "payout_failed"), notice(3))
    with mail_server(box) as port:
        work(postgres_dsn, plain(port), now=NOW + timedelta(hours=1))
    assert sorted(box.ids()) == [f"<{number:032x}@example.com>" for number in (1, 2, 3)]
    assert states(db) == [("sent", 1)] * 3


def test_the_same_ops_event_twice_is_one_notification(db: Connection) -> None:
    notify(db, notice(1), notice(2))
    notify(db, notice(1))
    assert len(states(db)) == 2


def test_a_mail_that_is_put_off_is_sent_later(db: Connection, postgres_dsn: str, box: Mailbox) -> None:
    notify(db, notice(0))
    box.answers = ["451 later"]
    with mail_server(box) as port:
        work(postgres_dsn, plain(port))
        assert states(db) == [("pending", 1)]
        work(postgres_dsn, plain(port), now=NOW + pause_after(1))
    assert states(db) == [("sent", 2)]
    assert len(box.mails) == 1


def test_a_mail_of_unknown_fate_is_sent_again_under_the_same_id(
    db: Connection, postgres_dsn: str, box: Mailbox
) -> None:
    notify(db, notice(0))
    box.answers = ["cut"]
    with mail_server(box) as port:
        work(postgres_dsn, plain(port))
        assert states(db) == [("sending", 1)]
        work(postgres_dsn, plain(port), now=NOW + LEASE + pause_after(1))
    assert states(db) == [("sent", 2)]
    assert box.ids() == [f"<{0:032x}@example.com>"] * 2


def test_a_burst_of_one_name_is_one_mail(db: Connection, postgres_dsn: str, box: Mailbox) -> None:
    notify(db, *(notice(number, "usage_dead_lettered") for number in range(137)))
    notify(db, *(notice(1000 + number, "meter_paused") for number in range(BURST)))
    with mail_server(box) as port:
        work(postgres_dsn, plain(port), now=NOW + timedelta(days=1))
    assert set(states(db)) == {("sent", 1)}
    assert len(box.mails) == 1 + BURST
    [burst] = [text for text in box.texts() if "137 × usage_dead_lettered" in text]
    assert f"{0:032x}" in burst
    assert f"{136:032x}" in burst


def test_a_burst_whose_fate_is_unknown_is_sent_again_as_it_was_whatever_came_meanwhile(
    db: Connection, postgres_dsn: str, box: Mailbox
) -> None:
    notify(db, *(notice(number) for number in range(BURST + 1)))
    box.answers = ["cut"]
    later = NOW + timedelta(minutes=1)
    with mail_server(box) as port:
        work(postgres_dsn, plain(port), now=later)
        notify(db, *(notice(number) for number in range(100, 130)))
        work(postgres_dsn, plain(port), now=later + LEASE + timedelta(hours=1))
    first, again, others = box.ids()
    assert first == again != others
    assert {state for state, _ in states(db)} == {"sent"}


def test_two_mails_under_way_at_the_same_moment_stay_two(db: Connection) -> None:
    notify(db, notice(0), notice(1))
    now = NOW + timedelta(minutes=1)
    first, second = claim(db, now), claim(db, now)
    assert first is not None
    assert second is not None
    assert claim(db, now) is None
    again = claim(db, now + LEASE + timedelta(seconds=1))
    assert again is not None
    assert again.ids == first.ids


def test_an_answer_that_comes_after_the_lease_ended_changes_nothing(db: Connection) -> None:
    notify(db, notice(0))
    first = claim(db, NOW)
    assert first is not None
    second = claim(db, NOW + LEASE)
    assert second is not None
    settle(db, first, Delivered("refused", "smtp_451"), NOW)
    assert states(db) == [("sending", 2)]
    settle(db, second, Delivered("sent"), NOW)
    settle(db, first, Delivered("unknown", "TimeoutError"), NOW)
    assert states(db) == [("sent", 2)]


def test_after_its_last_attempt_a_mail_is_dead_and_told_of_once(
    db: Connection, postgres_dsn: str, box: Mailbox
) -> None:
    notify(db, notice(0))
    box.answers = ["554 no"] * 100
    with mail_server(box) as port:
        for day in range(2 * ATTEMPTS_MAX):
            work(postgres_dsn, plain(port), now=NOW + timedelta(days=day), steps=1)
    assert states(db) == [("dead", ATTEMPTS_MAX)]
    [event] = told(db)
    assert (event["name"], event["subject_id"]) == ("notification_dead", f"{0:032x}")
    assert event["attributes"] == {"name": "partition_halted", "reason": "smtp_554"}


def test_while_the_server_is_away_one_look_costs_one_attempt_of_one_mail(
    db: Connection, postgres_dsn: str
) -> None:
    notify(db, *(notice(number, f"name_{number}") for number in range(5)))
    work(postgres_dsn, plain(free_port()), now=NOW + timedelta(minutes=1), steps=1)
    assert sum(attempts for _, attempts in states(db)) == 1


def test_the_attempts_span_about_four_days() -> None:
    passed = sum((pause_after(number) for number in range(1, ATTEMPTS_MAX)), timedelta())
    assert timedelta(days=3) < passed < timedelta(days=5)


def test_health_names_the_last_trouble_by_its_code_only(
    db: Connection, postgres_dsn: str, box: Mailbox
) -> None:
    notify(db, replace(notice(0), happened_at=datetime(2026, 1, 1, tzinfo=UTC)))
    box.recipients["ops@example.com"] = ["550 ops@example.com is nobody"]

    async def go() -> tuple[str, str]:
        database = Database(postgres_dsn, "test")
        with mail_server(box) as port:
            job = Mails(database, plain(port), POST, clock=lambda: NOW)
            await job.step()
        database.reset()
        return job.check()

    assert asyncio.run(go()) == ("degraded", "last mail: 1 recipients refused")
