"""The fault tape: which request meets which failure, in order and repeatable from a seed.

A rule names requests (`match`: path glob, method, nth or probability) and a fault. Every rule sees every
request that it matches; the first rule on the tape that is due decides. A rule without nth or probability
is due once, or `times` times; a `probability` is always due, with that chance; `nth` counts matching
requests from 1.

fault                  what the client sees, and what was done
ok                     the ordinary answer: a blank on the tape
status 403             refused before execution, as to a restricted key without the permission
status 429, 409        refused before execution; `reason` (one of REASONS) sets Stripe-Rate-Limited-Reason,
                       `lock_timeout` has none and asks to be retried
status 500             stored for the key and replayed for a day; `applied` says whether the event counted
status 502, 503, 504   a gateway in front of the API failed; that answer is never stored (a choice).
                       `applied`: the API behind did its work and stored its own result, so the same key then
                       replays the success; otherwise the API saw nothing
reset_before_apply     connection reset (RST), nothing done
reset_after_apply      done and stored, then the connection is reset
cut_body               done and stored; Content-Length promises more than is sent, then the connection closes
stall_before_answer    done and stored; the answer follows after `seconds`
stall_body             done and stored; headers and half the body, then nothing for `seconds`, then a reset
html_answer            done and stored, but a page in HTML comes back with status 200
slow                   stays in flight for `seconds`, then works as usual

With `"remember": false` the API forgets the key of an executed request, so that the same key meets the
duplicate-identifier refusal instead of a replay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from services.stripe_simulator.errors import (
    Answer,
    ApiError,
    Forbidden,
    Json,
    TooManyRequests,
    too_many_concurrent_requests,
)

NAMES = frozenset(
    {
        "ok",
        "status",
        "reset_before_apply",
        "reset_after_apply",
        "cut_body",
        "stall_before_answer",
        "stall_body",
        "html_answer",
        "slow",
    }
)
STATUSES = frozenset({403, 409, 429, 500, 502, 503, 504})
#: docs.stripe.com/rate-limits
REASONS = frozenset(
    {"global-rate", "global-concurrency", "endpoint-rate", "endpoint-concurrency", "resource-specific"}
)
RULES_MAX = 1000
COPIES_MAX = 100
SECONDS_DEFAULT = 30.0
SECONDS_MAX = 3600.0
FAULT_FIELDS = ("status", "applied", "reason", "lock_timeout", "seconds", "remember", "copies")
MATCH_FIELDS = ("path", "method", "nth", "probability")


@dataclass(frozen=True, slots=True)
class Fault:
    name: str = "ok"
    status: int = 0
    applied: bool = False
    reason: str | None = None
    lock_timeout: bool = False
    seconds: float = SECONDS_DEFAULT
    remember: bool = True
    copies: int = 1

    @property
    def label(self) -> str:
        if self.name != "status":
            return self.name
        return f"{self.status}_applied" if self.applied else str(self.status)

    @property
    def is_gateway(self) -> bool:
        return self.status in (502, 503, 504)

    @property
    def resets(self) -> bool:
        return self.name in ("reset_before_apply", "reset_after_apply")

    def before_execution(self, *, v2: bool) -> Answer | None:
        """The answer of a request that is never executed, or None."""
        if self.status == 403:
            return Forbidden("rak_simulated").answer(v2=v2)
        if self.status == 429:
            return TooManyRequests(self.reason, lock_timeout=self.lock_timeout).answer(v2=v2)
        if self.status == 409:
            return too_many_concurrent_requests().answer()
        if self.is_gateway and not self.applied:
            return self.gateway_answer()
        if self.name == "reset_before_apply":
            return Answer(0, b"")
        return None

    def gateway_answer(self) -> Answer:
        if self.status == 503:
            unavailable = ApiError("Service temporarily unavailable.", status=503)
            unavailable.type = "api_error"
            return unavailable.answer()
        return html_page({502: "502 Bad Gateway", 504: "504 Gateway Time-out"}[self.status], self.status)


def html_page(title: str, status: int) -> Answer:
    body = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return Answer(status, body.encode(), content_type="text/html")


NO_FAULT = Fault()


@dataclass(slots=True)
class Rule:
    fault: Fault
    path: str = "*"
    method: str | None = None
    nth: int | None = None
    probability: float | None = None
    times: int | None = None
    seen: int = 0
    played: int = 0

    def matches(self, method: str, path: str) -> bool:
        return self.method in (None, method) and (self.path == "*" or fnmatchcase(path, self.path))

    @property
    def spent(self) -> bool:
        if self.times is not None and self.played >= self.times:
            return True
        return self.nth is not None and self.seen >= self.nth

    def due(self, dice: random.Random) -> bool:
        """Whether this rule, not spent before, wants the request it has just seen."""
        if self.nth is not None:
            return self.seen == self.nth
        return self.probability is None or dice.random() < self.probability

    def to_json(self) -> Json:
        return asdict(self)


def read_rule(given: Any, names: frozenset[str] = NAMES, seconds_max: float = SECONDS_MAX) -> Rule:
    """One entry of POST /_simulator/faults; ValueError says what is wrong with it."""
    if not isinstance(given, dict):
        raise ValueError("a fault is an object with `fault` and, optionally, `match`")
    fields = dict(given)
    match, times, name = fields.pop("match", {}), fields.pop("times", None), fields.pop("fault", None)
    if name not in names:
        raise ValueError(f"fault must be one of {', '.join(sorted(names))}, not {name!r}")
    if not isinstance(match, dict):
        raise ValueError(f"match is an object with some of {', '.join(MATCH_FIELDS)}")
    _refuse_unknown(fields, FAULT_FIELDS, "a fault")
    _refuse_unknown(match, MATCH_FIELDS, "match")
    try:
        fault = msgspec.convert({**fields, "name": name}, Fault)
        rule = msgspec.convert({**match, "times": times, "fault": fault}, Rule)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    _check_fault(fault, seconds_max)
    if rule.probability is not None and not 0 <= rule.probability <= 1:
        raise ValueError("probability must lie between 0 and 1")
    if min(1 if rule.nth is None else rule.nth, 1 if rule.times is None else rule.times) < 1:
        raise ValueError("nth and times count from 1")
    if rule.nth is None and rule.probability is None and rule.times is None:
        rule.times = 1
    return rule


def _refuse_unknown(given: dict[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}: {where} has {', '.join(known)}")


def _check_fault(fault: Fault, seconds_max: float) -> None:
    if (fault.name == "status") != (fault.status in STATUSES):
        raise ValueError(f"fault status, and no other, takes a status of {sorted(STATUSES)}")
    if not 0 <= fault.seconds <= seconds_max:
        raise ValueError(f"seconds must lie between 0 and {seconds_max}")
    if not 1 <= fault.copies <= COPIES_MAX:
        raise ValueError(f"copies must lie between 1 and {COPIES_MAX}")
    if fault.reason is not None and fault.reason not in REASONS:
        raise ValueError(f"reason must be one of {', '.join(sorted(REASONS))}")
    if fault.lock_timeout and fault.reason is not None:
        raise ValueError("a lock_timeout comes without a reason")


class FaultTape:
    def __init__(self, seed: int) -> None:
        self._rules: list[Rule] = []
        self._spent: list[Rule] = []
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        self._dice = random.Random(seed)  # noqa: S311  repeatable faults, not secrets

    def extend(self, rules: list[Rule]) -> None:
        if len(self._rules) + len(rules) > RULES_MAX:
            raise ValueError(f"the tape holds at most {RULES_MAX} rules")
        self._rules.extend(rules)

    def clear(self) -> None:
        self._rules.clear()
        self._spent.clear()

    def pick(self, method: str, path: str) -> Fault | None:
        """The fault for this request; None when no rule wants it."""
        chosen: Rule | None = None
        for rule in self._rules:
            if not rule.matches(method, path):
                continue
            rule.seen += 1
            if chosen is None and rule.due(self._dice):
                chosen = rule
        if chosen is not None:
            chosen.played += 1
        self._set_spent_aside()
        return None if chosen is None else chosen.fault

    def to_json(self) -> list[Json]:
        """Rules still at work, then those that are spent, with what each saw and played."""
        return [rule.to_json() for rule in (*self._rules, *self._spent)]

    def _set_spent_aside(self) -> None:
        spent = [rule for rule in self._rules if rule.spent]
        if spent:
            self._spent = [*self._spent, *spent][-RULES_MAX:]
            self._rules = [rule for rule in self._rules if not rule.spent]
