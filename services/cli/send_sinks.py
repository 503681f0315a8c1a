"""Where ``tidemeter send`` delivers: the API or Kafka, and how often it tries.

A sink says of each event whether it is acknowledged, refused, or to be sent again with the same key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from services.cli.send_files import Line
from services.ingest.parse import JSON, Refusal, refusal_of
from services.producer import Backpressure, NotAcknowledged, ReceiptState, UsageProducer
from services.wire.errors import Invalid, Misconfigured, Transient
from services.wire.usage import UsageEvent

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "TIDEMETER_API_KEY"
HTTP_TIMEOUT_S = 30.0


class TryAgain(Transient):
    """Nothing, or not everything, was confirmed. ``after_s`` is what the API asked us to wait."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Sink(Protocol):
    """Where events go."""

    events_max: int

    def attempt(self, lines: Sequence[Line]) -> list[Refusal | bool]:
        """One try: True is acknowledged, False is to be sent again.

        Raises:
            TryAgain: nothing is known of any of them.
            Misconfigured: trying again is pointless.
        """

    def close(self) -> None:
        """Disconnect."""


class HttpSink:
    """The ingest API."""

    events_max = 500

    def __init__(self, api_url: str, key: str) -> None:
        import httpx  # here, for every command would wait for it

        self._url = f"{api_url.rstrip('/')}/v1/events/ingest"
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "Content-Type": JSON}, timeout=HTTP_TIMEOUT_S
        )

    def attempt(self, lines: Sequence[Line]) -> list[Refusal | bool]:
        import httpx

        try:
            answer = self._client.post(
                self._url,
                content=msgspec.json.encode({"events": [event_document(line.event) for line in lines]}),
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise Misconfigured(f"--api-url: {self._url} is not an http address") from None
        except httpx.TransportError as error:
            raise TryAgain(f"{self._url} does not answer ({type(error).__name__})") from None
        document = _json_of(answer)
        results = document.get("results")
        if isinstance(results, list) and len(results) == len(lines):
            return [_outcome(result) for result in results]
        if answer.status_code in (429, 500, 502, 503, 504):
            after = answer.headers.get("Retry-After", "")
            raise TryAgain(f"the API answered {answer.status_code}", float(after) if after.isdigit() else 0.0)
        if answer.status_code in (401, 403):
            raise Misconfigured(
                f"{document.get('message', 'the API key was refused')}; {KEY_VARIABLE} holds the key"
            )
        raise Misconfigured(
            f"{self._url} answered {answer.status_code}; is this the address of the Tidemeter API?"
        )

    def close(self) -> None:
        self._client.close()


def _json_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        document = answer.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _outcome(result: dict[str, Any]) -> Refusal | bool:
    if result["status"] == "rejected":
        return Refusal(
            result["code"], result["path"].partition(".")[2], result["message"], result.get("idempotencyKey")
        )
    return bool(result["status"] == "accepted")


def event_document(event: UsageEvent) -> dict[str, Any]:
    """``event`` as the API reads it; the content, and so its digest, stays the same."""
    document: dict[str, Any] = {
        "metric": event.meter,
        "customerRef": event.customer_ref,
        "quantity": str(event.quantity),
        "idempotencyKey": event.idempotency_key,
    }
    if event.tenant_id is not None:
        document["tenantId"] = event.tenant_id
    if event.occurred_at is not None:
        document["ts"] = event.occurred_at.isoformat()
    if event.properties:
        document["meta"] = dict(event.properties)
    return document


class KafkaSink:
    """The usage topic itself."""

    events_max = 5000

    def __init__(self, bootstrap: str) -> None:
        self._producer = UsageProducer(bootstrap, source="cli")

    def attempt(self, lines: Sequence[Line]) -> list[Refusal | bool]:
        outcomes: list[Refusal | bool] = []
        receipts = {}
        for index, line in enumerate(lines):
            outcomes.append(False)
            try:
                receipts[index] = self._producer.send(line.event)
            except Invalid as error:
                outcomes[index] = refusal_of(error, line.event.idempotency_key)
            except (Backpressure, NotAcknowledged):
                continue
        with suppress(NotAcknowledged):
            self._producer.flush()
        for index, receipt in receipts.items():
            outcomes[index] = receipt.state is ReceiptState.ACKNOWLEDGED
        return outcomes

    def close(self) -> None:
        self._producer.close(timeout_s=1.0)


def deliver(
    sink: Sink, lines: Sequence[Line], *, give_up_s: float, sleep: Callable[[float], None] = time.sleep
) -> list[Refusal | bool]:
    """Send ``lines`` until each is accepted or refused; after ``give_up_s`` seconds the rest is False.

    Raises:
        Misconfigured: as :meth:`Sink.attempt`.
    """
    outcomes: list[Refusal | bool] = [False] * len(lines)
    backoff = wait_random_exponential(multiplier=0.25, max=10.0)

    def wait_s(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        return max(backoff(state), error.after_s if isinstance(error, TryAgain) else 0.0)

    def once() -> None:
        open_indexes = [index for index, outcome in enumerate(outcomes) if outcome is False]
        answers = sink.attempt([lines[index] for index in open_indexes])
        for index, answer in zip(open_indexes, answers, strict=True):
            outcomes[index] = answer
        if any(answer is False for answer in answers):
            raise TryAgain("some events are not confirmed")

    retrying = Retrying(
        retry=retry_if_exception_type(TryAgain),
        stop=stop_after_delay(give_up_s),
        wait=wait_s,
        sleep=sleep,
        reraise=True,
    )
    with suppress(TryAgain):
        retrying(once)
    return outcomes
