"""What tests of the upkeep share: rows as webhooks leave them, ops events in the outbox, a mail server."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import psycopg
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from services.upkeep.mails import Notice
from services.upkeep.notices import record_notices
from services.wire.records import ops_event
from services.wire.registry import decoder_for
from services.wire.settings import Settings

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECRET = "a-password-that-no-log-shows"

Connection = psycopg.Connection[Any]


def fee_row(
    db: Connection,
    object_id: str,
    amount: int,
    *,
    kind: str = "charge",
    charge: str | None = None,
    balance_transaction: str | None = None,
    currency: str = "usd",
    account: str = "",
    due: datetime = NOW,
) -> None:
    db.execute(
        "INSERT INTO stripe_fees (object_id, kind, account, charge_id, amount, currency, happened_at, "
        "balance_transaction, next_attempt_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (object_id, kind, account, charge or object_id, amount, currency, due, balance_transaction, due),
    )


def subscription_row(
    db: Connection, subscription_id: str, *, past_due_since: datetime | None, status: str = "past_due"
) -> None:
    db.execute(
        "INSERT INTO stripe_subscriptions (subscription_id, stripe_customer, status, is_metered, created_at, "
        "past_due_since, seen_at) VALUES (%s, 'cus_1', %s, true, %s, %s, %s)",
        (subscription_id, status, NOW - timedelta(days=100), past_due_since, NOW - timedelta(days=20)),
    )


def card_row(db: Connection, payment_method: str, expires_on: str, *, customer: str = "cus_1") -> None:
    db.execute(
        "INSERT INTO stripe_cards (payment_method, stripe_customer, expires_on, seen_at) "
        "VALUES (%s, %s, %s, %s)",
        (payment_method, customer, expires_on, NOW - timedelta(days=20)),
    )


def notice(number: int = 0, name: str = "partition_halted", **attributes: str) -> Notice:
    moment = NOW + timedelta(seconds=number)
    return Notice(f"{number:032x}", name, "partition", f"usage.v3/{number}", "counters", attributes, moment)


def notify(db: Connection, *notices: Notice) -> None:
    record_notices(db, list(notices))


def told(db: Connection, settings: Settings | None = None) -> list[dict[str, Any]]:
    """The ops events that wait in the outbox, in their order."""
    decoder = decoder_for(settings or Settings())
    rows = db.execute("SELECT value FROM outbox WHERE topic = 'ops.v1' ORDER BY outbox_id").fetchall()
    return [decoder.decode(bytes(value))[1] for (value,) in rows]


def an_ops_event(number: int, name: str = "partition_halted") -> Any:
    return ops_event(
        name,
        subject_type="partition",
        subject_id=f"usage.v3/{number}",
        source="counters",
        at_us=1_795_000_000_000_000 + number,
        attributes={"reason": "offset_gap"},
    )


# -- A mail server ---------------------------------------------------------------------------------------


@dataclass
class Mailbox:
    """The handler of a real SMTP server: keeps what it takes, and answers as it is told."""

    mails: list[Message] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    #: Answers to the end of DATA, before the usual one: a text, or something to call first.
    answers: list[str | Callable[[SMTP], str]] = field(default_factory=list)
    #: Answers by recipient, used up from the front; the last one stays.
    recipients: dict[str, list[str]] = field(default_factory=dict)

    async def handle_RCPT(  # noqa: N802
        self, _: SMTP, __: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        answers = self.recipients.get(address, ["250 OK"])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
            envelope.rcpt_options.extend(options)
        return answer

    async def handle_DATA(self, server: SMTP, _: Session, envelope: Envelope) -> str:  # noqa: N802
        answer = self.answers.pop(0) if self.answers else "250 OK"
        text = answer if isinstance(answer, str) else answer(server)
        if text.startswith("2") or text == "cut":
            mail = message_from_bytes(envelope.original_content or b"")
            mail["X-Recipients"] = " ".join(envelope.rcpt_tos)
            self.mails.append(mail)
        if text == "cut":
            assert server.transport is not None
            server.transport.abort()
        return text

    def ids(self) -> list[str]:
        return [str(mail["Message-ID"]) for mail in self.mails]

    def texts(self) -> list[str]:
        return [bytes(mail.get_payload(decode=True)).decode() for mail in self.mails]

    def authenticate(self, _: SMTP, __: Session, ___: Envelope, ____: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.logins.append(data.login.decode())
        return AuthResult(success=data.password == SECRET.encode(), handled=False)


@contextlib.contextmanager
def mail_server(
    box: Mailbox, *, implicit: ssl.SSLContext | None = None, starttls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """A real SMTP server on a free port; with a context it wants a login, after TLS."""
    secured = {"tls_context": starttls, "require_starttls": True} if starttls else {}
    login = {"authenticator": box.authenticate, "auth_require_tls": starttls is not None}
    asked = login if starttls or implicit else {}
    controller = Controller(
        box, hostname="127.0.0.1", port=free_port(), ssl_context=implicit, **secured, **asked
    )
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def certificates(directory: Path, name: str = "IP:127.0.0.1") -> tuple[Path, ssl.SSLContext]:
    """A CA of our own, and a server's context with a certificate of it for ``name``; needs `openssl`."""
    (directory / "leaf.ext").write_text(
        f"subjectAltName={name}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n"
        "extendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
    )
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-days", "2")
    _openssl(
        directory, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", *ca
    )
    _openssl(directory, "req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=test")
    issue = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "leaf.ext")
    _openssl(directory, "x509", "-req", "-in", "leaf.csr", "-out", "leaf.pem", *issue)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "leaf.pem", directory / "leaf.key")
    return directory / "ca.pem", context


def _openssl(directory: Path, *arguments: str) -> None:
    command: Sequence[str] = ("openssl", *arguments)
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
