"""What a mail to operators says: identifiers, codes, counts and where the first action stands; nothing else.

Pure. The ``Message-ID`` is made from what the mail tells, so one that is sent twice can be told.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime

from services.wire.errors import Misconfigured
from services.wire.ops import NAMES
from services.wire.settings import Settings

#: More events of one name than this that wait together are one mail.
BURST = 20
TEXT_MAX = 200
#: What a mail must never be about: it would make another one.
NEVER = frozenset({"notification_dead"})
#: What makes a mail when TIDEMETER_MAIL_EVENTS is unset: somebody has to act. ``docs/upkeep.md`` lists it.
MAILED = frozenset(
    {
        "archive_halted",
        "billing_period_unclear",
        "card_expiring",
        "charge_disputed",
        "charge_fee_mismatch",
        "connect_account_deauthorized",
        "connect_payout_failed",
        "delta_dead_lettered",
        "dunning_exhaustion",
        "events_upcast_failed",
        "meter_paused",
        "meter_reporting_failed",
        "partition_halted",
        "payout_failed",
        "records_lost",
        "redrive_paused",
        "revenue_loss",
        "usage_conflict",
        "usage_dead_lettered",
        "webhook_dead_lettered",
        "webhook_dlq.dead_lettered",
    }
)


@dataclass(frozen=True, slots=True)
class Notice:
    """An ops event that somebody is to be told of."""

    ops_event_id: str
    name: str
    subject_type: str
    subject_id: str
    source: str
    attributes: Mapping[str, str]
    happened_at: datetime


@dataclass(frozen=True, slots=True)
class Post:
    """Between whom."""

    sender: str
    recipients: tuple[str, ...]

    @property
    def domain(self) -> str:
        return self.sender.rpartition("@")[2]


def post_of(settings: Settings) -> Post:
    """Sender and recipients.

    Raises:
        Misconfigured: one is missing or is no plain ASCII address.
    """
    if settings.mail_from is None or settings.mail_to is None:
        raise Misconfigured("a mail server is set: set TIDEMETER_MAIL_FROM and TIDEMETER_MAIL_TO too")
    recipients = tuple(part.strip() for part in settings.mail_to.split(",") if part.strip())
    if not recipients:
        raise Misconfigured("TIDEMETER_MAIL_TO names nobody")
    for variable, addresses in (("MAIL_FROM", (settings.mail_from,)), ("MAIL_TO", recipients)):
        if not all(_is_address(address) for address in addresses):
            raise Misconfigured(f"TIDEMETER_{variable}: not an address such as ops@example.com")
    return Post(settings.mail_from, recipients)


def _is_address(text: str) -> bool:
    if not text.isascii() or not text.isprintable():
        return False
    try:
        address = Address(addr_spec=text)
    except (ValueError, IndexError, MessageError):
        return False
    return bool(address.username and address.domain)


def names_of(setting: str | None) -> frozenset[str]:
    """The ops events that make a mail.

    Raises:
        Misconfigured: there is no such ops event.
    """
    if setting is None:
        return MAILED
    if setting.strip() == "all":
        return NAMES - NEVER
    wanted = frozenset(part.strip() for part in setting.split(",") if part.strip())
    if unknown := sorted(wanted - (NAMES - NEVER)):
        raise Misconfigured(f"TIDEMETER_MAIL_EVENTS: no mail is made of {clean(unknown[0])}")
    return wanted


def message(notices: Sequence[Notice], post: Post, now: datetime) -> EmailMessage:
    """One mail about one ops event, or about several of one name."""
    first, last = notices[0], notices[-1]
    mail = EmailMessage(policy=SMTP)
    mail["From"] = post.sender
    mail["To"] = ", ".join(post.recipients)
    mail["Date"] = format_datetime(now)
    mail["Message-ID"] = f"<{message_key(notices)}@{post.domain}>"
    mail["Auto-Submitted"] = "auto-generated"
    if len(notices) == 1:
        mail["Subject"] = f"[tidemeter] {first.name}: {clean(first.subject_id)}"
        lines = _about(first)
    else:
        mail["Subject"] = f"[tidemeter] {len(notices)} × {first.name}"  # noqa: RUF001
        lines = [f"{len(notices)} × {first.name}", "", "First:", *_about(first), "", "Last:", *_about(last)]  # noqa: RUF001
    lines += ["", f"First action: deploy/ALERTS.md, the row {first.name}."]
    mail.set_content("\n".join(lines) + "\n", cte="quoted-printable")
    return mail


def message_key(notices: Sequence[Notice]) -> str:
    """The left part of the ``Message-ID``: the same for the same ops events."""
    if len(notices) == 1:
        return clean(notices[0].ops_event_id)
    together = "\n".join(sorted(notice.ops_event_id for notice in notices))
    return f"{hashlib.blake2b(together.encode(), digest_size=16).hexdigest()}.{len(notices)}"


def _about(notice: Notice) -> list[str]:
    told = {
        "ops event": notice.ops_event_id,
        "name": notice.name,
        "subject": f"{notice.subject_type} {notice.subject_id}",
        "source": notice.source,
        "at": notice.happened_at.isoformat(timespec="seconds"),
        **notice.attributes,
    }
    return [f"{clean(name)}: {clean(text)}" for name, text in told.items()]


def clean(text: str) -> str:
    """One line of bounded length, without control or formatting characters."""
    kept = "".join(" " if unicodedata.category(one)[0] in "CZ" else one for one in text)
    return kept if len(kept) <= TEXT_MAX else kept[: TEXT_MAX - 1] + "…"
