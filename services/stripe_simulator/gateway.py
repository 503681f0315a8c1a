"""The way of one call: who asks, how often, whether again, and only then the work.

Order, for every call: key → rate → fault → idempotency (in flight, mismatch, replay) → one call per
customer and meter → execution → stored → durable → answer. Rate limits and authentication run before
idempotency (docs.stripe.com/error-low-level). Stripe does not say on which side of idempotency the limit of
one call per customer and meter stands; here a replay or a key in flight is told so first.

v1 sends forms, v2 JSON. The stream of v2 has a token instead of a key and a rate of its own, in events.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import structlog

from services.stripe_simulator.clock import Clock
from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import (
    Answer,
    ApiError,
    InvalidParameters,
    Json,
    ServerFailure,
    TooManyRequests,
    Unauthenticated,
    too_many_concurrent_requests,
)
from services.stripe_simulator.faults import NO_FAULT, Fault, FaultTape, html_page
from services.stripe_simulator.forms import Form, Params, decode_form
from services.stripe_simulator.idempotency import V1, V2, IdempotencyKeys, KeyedRequest, Remembered
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.observations import Observations, SlidingSecond
from services.stripe_simulator.sessions import Sessions
from services.stripe_simulator.store import Store

log = structlog.get_logger()

DEFAULT_ACCOUNT = "acct_simulator"
_TEST_KEY = re.compile(r"(sk|rk)_test_[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to the API, read but not yet understood."""

    method: str
    path: str
    encoded: str
    is_json: bool
    request_id: str
    authorization: str
    account: str
    idempotency_key: str | None
    parts: dict[str, str]

    @property
    def v2(self) -> bool:
        return self.path.startswith("/v2/")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`run` does the work; `subject` names the customer and meter that allow one call at a time.

    `rate` is the limit that the call counts against; of the stream it takes `events_in`, how many events a
    body holds, and the key is a session token.
    """

    run: Callable[[Call, Params, Origin], Json]
    subject: Callable[[Form], tuple[str, str] | None] = field(default=lambda form: None)
    rate: Literal["basic", "events", "stream"] = "basic"
    events_in: Callable[[Form], int] = field(default=lambda form: 1)


def bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated(
            "You did not provide an API key. You need to provide your API key in the Authorization header, "
            "using Bearer auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY')."
        )
    return key


def read_form(call: Call) -> Form:
    """The parameters: from a query or a form in v1, from a query or JSON in v2."""
    if not call.v2 or call.method != "POST":
        if call.is_json:
            message = "Invalid request body: v1 expects application/x-www-form-urlencoded, not JSON."
            raise InvalidParameters(message)
        return decode_form(call.encoded)
    if not call.encoded:
        return {}
    try:
        decoded = msgspec.json.decode(call.encoded)
    except msgspec.DecodeError as error:
        raise InvalidParameters("Invalid request body: v2 expects JSON.", code="invalid_json") from error
    if not isinstance(decoded, dict):
        raise InvalidParameters("Invalid request body: v2 expects a JSON object.", code="invalid_json")
    return decoded


class Gateway:
    def __init__(
        self,
        config: SimulatorConfig,
        clock: Clock,
        store: Store,
        sessions: Sessions,
        faults: FaultTape,
        observations: Observations,
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._sessions = sessions
        self._keys_v1, self._keys_v2 = IdempotencyKeys(store, clock, V1), IdempotencyKeys(store, clock, V2)
        self._faults = faults
        self._observations = observations
        self._admitted, self._events_admitted, self._streamed = (SlidingSecond() for _ in range(3))

    async def respond(self, call: Call, endpoint: Endpoint) -> tuple[Answer, Fault]:
        """The answer, and the fault under which it is to be delivered."""
        fault = NO_FAULT
        try:
            call = self._authenticated(call, endpoint)
            form = read_form(call)
            subject = endpoint.subject(form)
            self._admit(endpoint, form)
            fault = self._pick_fault(call)
            answer = fault.before_execution(v2=call.v2)
            if answer is None:
                answer = await self._once(call, endpoint, form, subject, fault)
        except ApiError as refusal:
            answer = refusal.answer(v2=call.v2)
        if fault.is_gateway:
            answer = fault.gateway_answer()
        if fault.name == "html_answer":
            answer = html_page("Welcome", 200)
        return answer, fault

    def _authenticated(self, call: Call, endpoint: Endpoint) -> Call:
        key = bearer(call.authorization)
        if endpoint.rate == "stream":
            return replace(call, account=self._sessions.account(key, self._clock.now()))
        if not _TEST_KEY.fullmatch(key):
            raise Unauthenticated(f"Invalid API Key provided: {key[:3]}****")
        return call

    def _admit(self, endpoint: Endpoint, form: Form) -> None:
        """Meter events have a limit of their own, which the other calls share unless they have one too."""
        now, events = asyncio.get_running_loop().time(), endpoint.events_in(form)
        basic = self._config.basic_rate_per_second
        admitted, limit, reason = self._admitted, self._config.rate_per_second, "global-rate"
        if endpoint.rate == "stream":
            admitted, limit = self._streamed, self._config.stream_rate_per_second
        elif basic is not None and endpoint.rate == "events":
            admitted, reason = self._events_admitted, "endpoint-rate"
        elif basic is not None:
            limit = basic
        if admitted.count(now) + events > max(events, limit):
            raise TooManyRequests(reason)
        admitted.add(now, events)

    def _pick_fault(self, call: Call) -> Fault:
        fault = self._faults.pick(call.method, call.path)
        if fault is None:
            return NO_FAULT
        self._observations.fault_played(fault.label)
        log.info("simulator_fault_played", fault=fault.label, path=call.path, request_id=call.request_id)
        return fault

    async def _once(
        self, call: Call, endpoint: Endpoint, form: Form, subject: tuple[str, str] | None, fault: Fault
    ) -> Answer:
        """Execute, or repeat what the same key did before."""
        keys, keyed = self._keys_v2 if call.v2 else self._keys_v1, None
        if call.method == "POST" and call.idempotency_key:
            scope = f"{call.account} {call.path}" if call.v2 else call.account
            keyed = KeyedRequest.of(scope, call.idempotency_key, call.path, form)
            remembered = keys.find(keyed)
            if remembered is not None:
                self._observations.happened("replays")
                return replayed(remembered)
        with keys.running(keyed), self._observations.in_flight.holding(subject) as at_work:
            if at_work > 1 and self._config.concurrency_limit_per_customer_meter:
                self._observations.happened("concurrency_refused")
                raise self._concurrency_refusal(call)
            if fault.name == "slow":
                await asyncio.sleep(fault.seconds)
            answer, stored = self._execute(call, endpoint, form, fault)
            if keyed is not None and stored and fault.remember:
                keys.remember(keyed, answer, call.request_id)
            await self._store.durable()
        return answer

    def _execute(self, call: Call, endpoint: Endpoint, form: Form, fault: Fault) -> tuple[Answer, bool]:
        """The answer, and whether an Idempotency-Key keeps it. Runs without an await: one transaction."""
        origin = Origin(call.request_id, call.idempotency_key, self._clock.now())
        failed = ServerFailure(v2=call.v2).answer(v2=call.v2) if fault.status == 500 else None
        if failed is not None and not fault.applied:
            return failed, True
        try:
            body = endpoint.run(call, Params(form), origin)
        except ApiError as refusal:
            if failed is not None and refusal.stored:
                return failed, True
            return refusal.answer(v2=call.v2), refusal.stored
        return failed or Answer.of(body), True

    def _concurrency_refusal(self, call: Call) -> ApiError:
        if call.v2 or self._config.concurrency_refusal_status == 409:
            return too_many_concurrent_requests()
        return TooManyRequests("endpoint-concurrency")


def replayed(remembered: Remembered) -> Answer:
    answer = remembered.answer
    marks = {"Idempotent-Replayed": "true", "Original-Request": remembered.request_id}
    return replace(answer, headers=answer.headers | marks)
