"""Meter events to Stripe's stream: up to 100 in one request, validated later (API v2).

An accepted request is all that the stream ever says: what it rejects afterwards comes in error reports, and
what those do not name is found by comparing totals. An identifier that is sent again within a day counts
once, as on v1. What v2 is documented to refuse, values that are not positive, goes by v1.

Source: docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api#high-throughput-ingestion.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b

import stripe
import structlog

from services.pusher.intents import Answer, Meaning
from services.pusher.sinks import Call
from services.pusher.sinks.stripe import StripeSink, answer_of, event_fields, refusal_before_call

log = structlog.get_logger(__name__)

#: Events in one request, at most, by Stripe's rule.
EVENTS_MAX = 100
#: A session lives 15 minutes; a new one is made this long before its end.
RENEW_BEFORE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class _Session:
    token: str  # a secret
    ends_at: datetime


class StripeStreamSink(StripeSink):
    """One Stripe account, by its event stream. Must be used from one event loop."""

    batch_max = EVENTS_MAX
    _session: _Session | None = None
    _renewing: asyncio.Lock | None = None

    async def send(self, calls: Sequence[Call]) -> list[Answer]:
        """One POST /v2/billing/meter_event_stream, and one v1 call for each that v2 does not take."""
        answers: dict[int, Answer] = {}
        batch: list[int] = []
        alone: list[int] = []
        for number, call in enumerate(calls):
            if (refused := refusal_before_call(call.intent)) is not None:
                answers[number] = refused
            else:
                (batch if call.intent.amount > 0 else alone).append(number)
        if batch:
            answer = await self._post([calls[number] for number in batch])
            if answer.meaning is Meaning.REFUSED and len(batch) > 1:
                alone += batch  # one spoiled the request, which had no effect; by v1 each learns its own fate
            else:
                answers |= dict.fromkeys(batch, answer)
        found = await asyncio.gather(
            *(self._send(calls[number].intent, calls[number].idempotency_key) for number in alone)
        )
        answers |= dict(zip(alone, found, strict=True))
        return [answers[number] for number in range(len(calls))]

    async def close(self) -> None:
        """Close the connections and forget the session."""
        self._session = None
        await super().close()

    async def _post(self, batch: Sequence[Call]) -> Answer:
        """One request, and a second one with a new session if the first one's had ended; what it meant."""
        keys = "\x00".join(sorted(call.idempotency_key for call in batch))
        batch_key = blake2b(keys.encode(), digest_size=20).hexdigest()
        events = [
            event_fields(call.intent)
            | {"timestamp": call.intent.event_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
            for call in batch
        ]
        for _ in range(2):
            session = await self._authenticated()
            if isinstance(session, Answer):
                return session
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    await self._connected().v2.billing.meter_event_stream.create_async(
                        {"events": events},  # type: ignore[typeddict-item]
                        {
                            "api_key": session.token,
                            "idempotency_key": batch_key,
                            "max_network_retries": 0,
                        },
                    )
                return Answer(Meaning.DELIVERED, None, 200)
            except stripe.TemporarySessionExpiredError:  # refused before anything was read
                if self._session is session:
                    self._session = None
            except Exception as error:
                answer = answer_of(error, "")
                if answer.meaning is Meaning.UNAUTHORISED:
                    self._session = None
                return answer
        return Answer(Meaning.NOT_SENT, "session_expired", 401)

    async def _authenticated(self) -> _Session | Answer:
        """A session that has time left, or why there is none. Nothing of an event has left then."""
        self._renewing = self._renewing or asyncio.Lock()
        async with self._renewing:
            if self._session is not None and self._session.ends_at > datetime.now(UTC) + RENEW_BEFORE:
                return self._session
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    made = await self._connected().v2.billing.meter_event_session.create_async()
                ends_at = datetime.fromisoformat(made.expires_at)
                self._session = _Session(made.authentication_token, ends_at)
                return self._session
            except Exception as error:
                answer = answer_of(error, "")
                log.warning("no stream session", error=type(error).__name__, code=answer.code)
                if answer.meaning is Meaning.UNAUTHORISED:
                    return answer
                return Answer(Meaning.NOT_SENT, "no_session", answer.http_status)
