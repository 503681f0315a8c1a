"""One mail to one SMTP server. It blocks: call it in a thread.

TLS is verified and never given up: a server that does not do what ``TIDEMETER_SMTP_TLS`` says gets no mail
and no password. What became of a mail is one of three: taken, not taken, or unknown, when the connection
broke after the message was under way. Unknown is sent again under the same ``Message-ID``.
"""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Literal

from services.upkeep.mails import Post
from services.wire.errors import Misconfigured
from services.wire.settings import Settings

#: For each answer, and for the whole conversation: less than a process is given to stop.
ANSWER_SECONDS = 15.0
TOTAL_SECONDS = 25.0

Outcome = Literal["sent", "refused", "unknown"]


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of a mail. ``code`` is a class name or ``smtp_`` and the status; never a server's text."""

    outcome: Outcome
    code: str | None = None
    #: Recipients that the server refused for good while it took the mail for others.
    refused: int = 0


@dataclass(frozen=True, slots=True)
class MailServer:
    """Where mails go. The password is a secret."""

    host: str
    port: int
    tls: Literal["starttls", "tls", "none"]
    username: str | None
    password: str | None
    answer_seconds: float = ANSWER_SECONDS
    total_seconds: float = TOTAL_SECONDS

    def __repr__(self) -> str:
        return f"MailServer({self.host}:{self.port}, {self.tls})"

    @classmethod
    def from_settings(cls, settings: Settings) -> MailServer | None:
        """The operator's; None when there is none.

        Raises:
            Misconfigured: a password without a user, or the other way, or one that would go in clear text.
        """
        if settings.smtp_host is None:
            return None
        secret = settings.smtp_password
        password = None if secret is None else secret.get_secret_value()
        if (settings.smtp_username is None) != (password is None):
            raise Misconfigured("set both TIDEMETER_SMTP_USERNAME and TIDEMETER_SMTP_PASSWORD, or neither")
        if password is not None and settings.smtp_tls == "none":
            raise Misconfigured("TIDEMETER_SMTP_TLS=none would send the password in clear text")
        return cls(
            settings.smtp_host, settings.smtp_port, settings.smtp_tls, settings.smtp_username, password
        )

    def deliver(self, mail: EmailMessage, post: Post, *, wait_for_all: bool) -> Delivered:
        """Send one mail to all recipients in one transaction.

        With ``wait_for_all``, a recipient that the server puts off (4xx) puts off the mail for everybody:
        otherwise those it takes would get it again with the next attempt.
        """
        under_way = False
        try:
            with self._connected(post) as session:
                _expect(session.mail(post.sender), 250)
                answers = [session.rcpt(recipient)[0] for recipient in post.recipients]
                later = [code for code in answers if not 200 <= code < 300 and not 500 <= code < 600]
                taken = sum(200 <= code < 300 for code in answers)
                if not taken or (later and wait_for_all):
                    return Delivered("refused", f"smtp_{(later or answers)[0]}")
                under_way = True
                code = session.data(mail.as_bytes())[0]
                under_way = False
                if not 200 <= code < 300:
                    return Delivered("refused", f"smtp_{code}")
                return Delivered("sent", refused=len(answers) - taken)
        except smtplib.SMTPDataError as error:  # DATA itself was refused: nothing was sent
            return Delivered("refused", f"smtp_{error.smtp_code}")
        except (OSError, smtplib.SMTPException, ValueError) as error:
            return Delivered("unknown" if under_way else "refused", _code_of(error))

    @contextlib.contextmanager
    def _connected(self, post: Post) -> Iterator[smtplib.SMTP]:
        context = ssl.create_default_context()
        session: Any
        # With a name of our own given, none is looked up: that can take longer than all the rest.
        if self.tls == "tls":
            session = smtplib.SMTP_SSL("", 0, post.domain, timeout=self.answer_seconds, context=context)
        else:
            session = smtplib.SMTP("", 0, post.domain, timeout=self.answer_seconds)
        session._host = self.host  # whose certificate it must be
        deadline = threading.Timer(self.total_seconds, _cut, (session,))
        deadline.daemon = True
        deadline.start()
        try:
            _expect(session.connect(self.host, self.port), 220)
            if self.tls == "starttls":
                _expect(session.starttls(context=context), 220)
            if self.tls != "none" and not isinstance(session.sock, ssl.SSLSocket):
                raise smtplib.SMTPException("not encrypted")
            session.ehlo_or_helo_if_needed()
            if self.username is not None and self.password is not None:
                session.login(self.username, self.password)
            yield session
            with contextlib.suppress(OSError, smtplib.SMTPException):
                session.quit()
        finally:
            deadline.cancel()
            session.close()


def _cut(session: Any) -> None:
    """End a conversation that a server drags out: whoever waits for it gets an error at once."""
    with contextlib.suppress(OSError, AttributeError):
        session.sock.shutdown(socket.SHUT_RDWR)


def _expect(answer: tuple[int, bytes], code: int) -> None:
    if answer[0] != code:
        raise smtplib.SMTPResponseException(*answer)


def _code_of(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"smtp_{error.smtp_code}"
    return type(error).__name__
