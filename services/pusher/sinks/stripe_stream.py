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

from services.pusher.intents import Answer, Intent, Meaning
from services.pusher.sinks.stripe import StripeSink, answer_of, event_fields, refusal_before_call

log = structlog.get_logger(__name__)

#: Events in one request, at most, by Stripe's rule.
EVENTS_MAX = 100
#: How long the first event of a request waits for others, seconds.
GATHER_SECONDS = 0.005
#: A session lives 15 minutes; a new one is made this long before its end.
RENEW_BEFORE = timedelta(minutes=1)


@dataclass(slots=True)
class _Waiting:
    intent: Intent
    idempotency_key: str
    answer: asyncio.Future[Answer]


@dataclass(frozen=True, slots=True)
class _Session:
    token: str  # a secret
    ends_at: datetime


class StripeStreamSink(StripeSink):
    """One Stripe account, by its event stream. Must be used from one event loop.

    :meth:`send` takes one intent, as any sink; those that are sent at about the same time share a request.
    """

    def __init__(
        self,
        api_key: str,
        *,
        api_base: str | None,
        stream_base: str | None = None,
        timeout_seconds: float,
        connections_max: int,
    ) -> None:
        super().__init__(
            api_key,
            api_base=api_base,
            stream_base=stream_base,
            timeout_seconds=timeout_seconds,
            connections_max=connections_max,
        )
        self._requests = asyncio.Semaphore(connections_max)
        self._waiting: list[_Waiting] = []
        self._gathering: asyncio.Task[None] | None = None
        self._flushes: set[asyncio.Task[None]] = set()
        self._session: _Session | None = None
        self._renewing = asyncio.Lock()

    async def send(self, intent: Intent, idempotency_key: str) -> Answer:
        """Its share of one POST /v2/billing/meter_event_stream."""
        if intent.amount <= 0:
            return await super().send(intent, idempotency_key)
        if (refused := refusal_before_call(intent)) is not None:
            return refused
        waiting = _Waiting(intent, idempotency_key, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._waiting) >= EVENTS_MAX:
            self._flush()
        elif self._gathering is None:
            self._gathering = asyncio.create_task(self._gather())
        return await waiting.answer

    async def close(self) -> None:
        """Close the connections. What was handed over and not sent yet is never sent."""
        tasks = [*self._flushes, *([self._gathering] if self._gathering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._session = None
        await super().close()

    async def _gather(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        self._gathering = None
        self._flush()

    def _flush(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        batch, self._waiting = self._waiting, []
        task = asyncio.create_task(self._send_batch(batch))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _send_batch(self, batch: Sequence[_Waiting]) -> None:
        async with self._requests:
            batch = [one for one in batch if not one.answer.done()]  # nobody waits for the others any more
            if not batch:
                return
            answer = await self._post(batch)
        if answer.meaning is Meaning.REFUSED and len(batch) > 1:
            # One of them spoils the request, which had no effect. Alone, by v1, each learns its own fate.
            await asyncio.gather(*(self._send_alone(one) for one in batch))
            return
        for one in batch:
            if not one.answer.done():
                one.answer.set_result(answer)

    async def _send_alone(self, one: _Waiting) -> None:
        answer = await super().send(one.intent, one.idempotency_key)
        if not one.answer.done():
            one.answer.set_result(answer)

    async def _post(self, batch: Sequence[_Waiting]) -> Answer:
        """One request, and a second one with a new session if the first one's had ended; what it meant."""
        keys = "\x00".join(sorted(one.idempotency_key for one in batch))
        batch_key = blake2b(keys.encode(), digest_size=20).hexdigest()
        events = [event_fields(one.intent) for one in batch]
        for event, one in zip(events, batch, strict=True):
            event["timestamp"] = one.intent.event_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
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
        async with self._renewing:
            soon = datetime.now(UTC) + RENEW_BEFORE
            if self._session is not None and self._session.ends_at > soon:
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
