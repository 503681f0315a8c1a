"""The way of one v1 call: who asks, how often, whether again, and only then the work.

Order, for every call: key → rate → fault → idempotency (in flight, mismatch, replay) → one call per
customer and meter → execution → stored → durable → answer. Rate limits and authentication run before
idempotency (docs.stripe.com/error-low-level). Stripe does not say on which side of idempotency the limit of
one call per customer and meter stands; here a replay or a key in flight is told so first.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
)
from services.stripe_simulator.faults import NO_FAULT, Fault, FaultTape
from services.stripe_simulator.forms import Form, Params, decode_form
from services.stripe_simulator.idempotency import IdempotencyKeys, KeyedRequest, Remembered
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.observations import Observations, SlidingSecond
from services.stripe_simulator.store import Store

log = structlog.get_logger()

DEFAULT_ACCOUNT = "acct_simulator"
_TEST_KEY = re.compile(r"(sk|rk)_test_[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to the v1 API, read but not yet understood."""

    method: str
    path: str
    encoded: str
    is_json: bool
    request_id: str
    authorization: str
    account: str
    idempotency_key: str | None
    parts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`run` does the work; `subject` names the customer and meter that allow one call at a time."""

    run: Callable[[Call, Params, Origin], Json]
    subject: Callable[[Form], tuple[str, str] | None] = field(default=lambda form: None)


def authenticate(authorization: str) -> None:
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated(
            "You did not provide an API key. You need to provide your API key in the Authorization header, "
            "using Bearer auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY')."
        )
    if not _TEST_KEY.fullmatch(key):
        raise Unauthenticated(f"Invalid API Key provided: {key[:3]}****")


class Gateway:
    def __init__(
        self,
        config: SimulatorConfig,
        clock: Clock,
        store: Store,
        keys: IdempotencyKeys,
        faults: FaultTape,
        observations: Observations,
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._keys = keys
        self._faults = faults
        self._observations = observations
        self._admitted = SlidingSecond()

    async def respond(self, call: Call, endpoint: Endpoint) -> tuple[Answer, Fault]:
        """The answer, and the fault under which it is to be delivered."""
        fault = NO_FAULT
        try:
            authenticate(call.authorization)
            form = decode_form(call.encoded) if not call.is_json else refuse_json()
            subject = endpoint.subject(form)
            self._admit()
            fault = self._pick_fault(call)
            answer = fault.before_execution()
            if answer is None:
                answer = await self._once(call, endpoint, form, subject, fault)
        except ApiError as refusal:
            answer = refusal.answer()
        if fault.is_gateway:
            answer = fault.gateway_answer()
        return answer, fault

    def _admit(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._admitted.count(now) >= max(1.0, self._config.rate_per_second):
            raise TooManyRequests("global-rate")
        self._admitted.add(now)

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
        keyed = None
        if call.method == "POST" and call.idempotency_key:
            keyed = KeyedRequest.of(call.account, call.idempotency_key, call.path, form)
            remembered = self._keys.find(keyed)
            if remembered is not None:
                self._observations.happened("replays")
                return replayed(remembered)
        with self._keys.running(keyed), self._observations.in_flight.holding(subject) as at_work:
            if at_work > 1 and self._config.concurrency_limit_per_customer_meter:
                self._observations.happened("concurrency_refused")
                raise TooManyRequests("endpoint-concurrency")
            if fault.name == "slow":
                await asyncio.sleep(fault.seconds)
            answer, stored = self._execute(call, endpoint, form, fault)
            if keyed is not None and stored and fault.remember:
                self._keys.remember(keyed, answer, call.request_id)
            await self._store.durable()
        return answer

    def _execute(self, call: Call, endpoint: Endpoint, form: Form, fault: Fault) -> tuple[Answer, bool]:
        """The answer, and whether an Idempotency-Key keeps it. Runs without an await: one transaction."""
        origin = Origin(call.request_id, call.idempotency_key, self._clock.now())
        failed = ServerFailure().answer() if fault.status == 500 else None
        if failed is not None and not fault.applied:
            return failed, True
        try:
            body = endpoint.run(call, Params(form), origin)
        except ApiError as refusal:
            if failed is not None and refusal.stored:
                return failed, True
            return refusal.answer(), refusal.stored
        return failed or Answer.of(body), True


def refuse_json() -> Form:
    raise InvalidParameters("Invalid request body: v1 expects application/x-www-form-urlencoded, not JSON.")


def replayed(remembered: Remembered) -> Answer:
    answer = remembered.answer
    marks = {"Idempotent-Replayed": "true", "Original-Request": remembered.request_id}
    return replace(answer, headers=answer.headers | marks)
