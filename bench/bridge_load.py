"""Signed webhooks at a fixed rate, whatever the answers: the load of the bridge's benchmark.

Open loop: webhook *n* is due at ``n / rate`` and its time counts from that moment, so that a slow answer, a
busy connection or a late generator lengthens it instead of thinning the load.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

PATH = "/v1/webhooks/bench"
CONNECTIONS = 128
ANSWER_SECONDS_MAX = 30.0
MARK = "@@@@@@@@"


def _template() -> tuple[bytes, bytes, bytes]:
    """A subscription as Stripe sends it, 3.5 KB of indented JSON: before, between and after two numbers."""
    items = [
        {
            "id": f"si_{number:014d}",
            "object": "subscription_item",
            "created": 1_700_000_000,
            "current_period_end": 1_702_592_000,
            "current_period_start": 1_700_000_000,
            "discounts": [],
            "metadata": {"plan": "growth"},
            "price": {
                "id": f"price_{number:024d}",
                "object": "price",
                "active": True,
                "billing_scheme": "per_unit",
                "currency": "eur",
                "lookup_key": None,
                "metadata": {},
                "nickname": "Käse & Brot",
                "product": f"prod_{number:014d}",
                "recurring": {
                    "interval": "month",
                    "interval_count": 1,
                    "meter": f"mtr_test_{number:024d}",
                    "trial_period_days": None,
                    "usage_type": "metered",
                },
                "tax_behavior": "exclusive",
                "tiers_mode": None,
                "transform_quantity": None,
                "type": "recurring",
                "unit_amount": 100,
                "unit_amount_decimal": "100",
            },
            "subscription": f"sub_{MARK}",
            "tax_rates": [],
        }
        for number in range(2)
    ]
    subscription = {
        "id": f"sub_{MARK}",
        "object": "subscription",
        "automatic_tax": {"disabled_reason": None, "enabled": False, "liability": None},
        "billing_cycle_anchor": 1_700_000_000,
        "collection_method": "charge_automatically",
        "currency": "eur",
        "customer": f"cus_{MARK}",
        "items": {"object": "list", "data": items, "has_more": False, "total_count": 2},
        "latest_invoice": f"in_{MARK}",
        "livemode": False,
        "metadata": {"tenant": "acme"},
        "status": "active",
    }
    event = {
        "id": f"evt_{MARK}",
        "object": "event",
        "api_version": "2026-10-28.basil",
        "created": 1_700_000_000,
        "data": {"object": subscription, "previous_attributes": {"status": "past_due"}},
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": f"req_{MARK}", "idempotency_key": None},
        "type": "customer.subscription.updated",
    }
    text = json.dumps(event, indent=2, ensure_ascii=False).encode()
    head, middle = text.split(MARK.encode(), 1)
    return head, *middle.split(MARK.encode(), 1)  # type: ignore[return-value]


_HEAD, _MIDDLE, _TAIL = _template()


def body_of(number: int) -> bytes:
    """The body of webhook ``number``: the same for ever."""
    return b"%s%012d%s%06d%s" % (_HEAD, number, _MIDDLE, number % 5000, _TAIL)


def event_id(number: int) -> str:
    """Its event's id."""
    return f"evt_{number:012d}"


@dataclass(slots=True)
class Sender:
    """Writes signed requests for one host and secret."""

    host: str
    secret: str = field(default_factory=lambda: f"whsec_{secrets.token_hex(16)}")

    def request(self, number: int, *, is_good: bool = True) -> bytes:
        """The whole request of webhook ``number``; a bad one has a signature by nobody."""
        body, now = body_of(number), b"%d" % time.time()
        secret = self.secret.encode() if is_good else b"whsec_of_nobody"
        signature = hmac.digest(secret, now + b"." + body, "sha256").hex().encode()
        return b"".join(
            (
                b"POST %s HTTP/1.1\r\nHost: %s\r\n" % (PATH.encode(), self.host.encode()),
                b"Content-Type: application/json; charset=utf-8\r\nAccept: */*; q=0.5, application/xml\r\n"
                b"Cache-Control: no-cache\r\nUser-Agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\r\n",
                b"Content-Length: %d\r\nStripe-Signature: t=%s,v1=%s\r\n\r\n" % (len(body), now, signature),
                body,
            )
        )


@dataclass(slots=True)
class Outcome:
    """What came of a load. Times in seconds, of good webhooks; ``accepted`` holds numbers."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    accepted: list[int] = field(default_factory=list)
    refused: int = 0
    errors: int = 0
    times_s: list[float] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float:
        """The time that ``share`` of the good webhooks stayed within."""
        ordered = sorted(self.times_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else 0.0


@dataclass(slots=True)
class _Due:
    number: int
    due_s: float
    is_good: bool


class _Connection(asyncio.Protocol):
    """One request at a time, kept alive."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._due: _Due | None = None
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def send(self, due: _Due) -> None:
        assert self._transport is not None
        self._due, self._answer = due, b""
        self._transport.write(self._load.sender.request(due.number, is_good=due.is_good))

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) >= length and self._due is not None:
            due, self._due = self._due, None
            self._load.answered(due, int(head[9:12]))
            self._load.idle(self)

    def connection_lost(self, _: Exception | None) -> None:
        due, self._due = self._due, None
        self._load.lost(self, due)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Load:
    """Sends what is due on :data:`CONNECTIONS` connections; what finds none free waits, and its time runs."""

    def __init__(self, sender: Sender, port: int) -> None:
        self.sender = sender
        self._port = port
        self._outcome = Outcome()
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[_Due] = deque()
        self._open = 0
        self._unanswered = 0

    def answered(self, due: _Due, status: int) -> None:
        self._unanswered -= 1
        outcome = self._outcome
        if due.is_good:
            outcome.times_s.append(time.perf_counter() - due.due_s)
        if status == 200 and due.is_good:
            outcome.accepted.append(due.number)
        elif status == 400 and not due.is_good:
            outcome.refused += 1
        else:
            outcome.errors += 1

    def idle(self, connection: _Connection) -> None:
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection, due: _Due | None) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if due is not None:
            self._unanswered -= 1
            self._outcome.errors += 1

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        while self._open < CONNECTIONS:
            _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)
            self._open += 1
            self._idle.append(connection)

    def _send(self, due: _Due) -> None:
        self._unanswered += 1
        if self._idle:
            self._idle.popleft().send(due)
        else:
            self._waiting.append(due)

    async def run(self, numbers: Iterable[int], rate: float, *, bad_share: float = 0.0) -> Outcome:
        """Send ``numbers`` at ``rate`` a second; for each good one also ``bad_share`` of a bad one.

        ``rate`` 0 is closed loop instead: as fast as answers free connections.
        """
        await self._connect()
        self._outcome = outcome = Outcome()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        if rate:
            owed = 0.0
            for sent, number in enumerate(numbers):
                due_s = began_s + sent / rate
                while (ahead_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead_s)
                self._send(_Due(number, due_s, True))
                owed += bad_share
                while owed >= 1:
                    self._send(_Due(number, due_s, False))
                    owed -= 1
                if sent % 16 == 15:
                    await asyncio.sleep(0)  # behind time too, answers have to be read
        else:
            for number in numbers:
                while self._unanswered >= CONNECTIONS:
                    await asyncio.sleep(0)
                self._send(_Due(number, time.perf_counter(), True))
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            while self._unanswered:
                await asyncio.sleep(0.001)
        outcome.seconds = time.perf_counter() - began_s
        outcome.cpu_seconds = time.process_time() - began_cpu_s
        return outcome

    async def close(self) -> None:
        for connection in list(self._idle):
            connection.close()
