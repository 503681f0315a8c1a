"""What the API answers to usage: one result per event.

Answers name a field and a stable code. They never repeat a value that was sent, except the idempotency key of
an event, by which a client finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from services.web.problems import Code, Message, Path

Count = Annotated[int, msgspec.Meta(ge=0)]
Status = Literal["accepted", "rejected", "unavailable"]


class Result(msgspec.Struct, omit_defaults=True, frozen=True):
    """What became of one event.

    `accepted`: durable in Kafka. `rejected`: breaks a rule; sending it unchanged again is pointless.
    `unavailable`: Kafka did not confirm it in time, so it may or may not be stored; send it again with the
    same idempotency key.
    """

    index: Count
    status: Status
    idempotency_key: str | None = msgspec.field(default=None, name="idempotencyKey")
    code: Code | None = None
    path: Path | None = None
    message: Message | None = None


class IngestAnswer(msgspec.Struct, frozen=True):
    """One result per event, in the order they were sent."""

    accepted: Count
    rejected: Count
    unavailable: Count
    results: list[Result]


def answer_of(results: Sequence[Result]) -> tuple[int, IngestAnswer]:
    """HTTP status and body for these results.

    503 if any is unavailable (so that clients retry), 202 if all are accepted, 207 if some are, 403 if every
    one belongs to another tenant, else 400.
    """
    counts = dict.fromkeys(("accepted", "rejected", "unavailable"), 0)
    for result in results:
        counts[result.status] += 1
    answer = IngestAnswer(counts["accepted"], counts["rejected"], counts["unavailable"], list(results))
    if answer.unavailable:
        return 503, answer
    if not answer.rejected:
        return 202, answer
    if answer.accepted:
        return 207, answer
    forbidden = all(result.code == "tenant_forbidden" for result in results)
    return 403 if forbidden else 400, answer
