"""What the key may do at Stripe, and Stripe's meters. Reads only; Stripe's own library asks.

Each permission is tried by the call that needs it. Objects that a job reads by id are asked for under an id
that nobody has: 404 means that the key may read them, and no customer's data are fetched. Whether meter
events may be written is tried with an empty one, which Stripe refuses for that (400) if the key may write.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import stripe

from services.doctor.facts import Answer, Clock, OwnSettings, StripeMeter, StripeSide
from services.wire.settings import Settings

METERS_PAGE = 100
PAGES_MAX = 100
_PERMISSION = re.compile(r"\brak_[a-z0-9_]+")
_NOBODY = "tidemeter_doctor"
NO_SUCH_ADDRESS = "unrecognized_url"

WRITE_EVENTS = "write meter events"
READ_METERS = "read meters"
READ_SUMMARIES = "read meter event summaries"
OPEN_STREAM = "open sessions of the meter event stream"

#: What each job reads by id: need → path. An id that nobody has is a 404 to a key that may read.
_BY_ID = {
    "read charges (upkeep)": f"/v1/charges/ch_{_NOBODY}",
    "read refunds (upkeep)": f"/v1/refunds/re_{_NOBODY}",
    "read balance transactions (upkeep)": f"/v1/balance_transactions/txn_{_NOBODY}",
    "read subscriptions (upkeep)": f"/v1/subscriptions/sub_{_NOBODY}",
    "read events of API v2 (dispatcher)": f"/v2/core/events/evt_{_NOBODY}",
}


class Asking:
    """One key, asked by raw requests; remembers the clock and the API version of the answers."""

    def __init__(self, settings: Settings) -> None:
        stripe.enable_telemetry = False
        key = settings.stripe_api_key
        base = settings.stripe_api_base
        addresses: Any = {} if base is None else {"api": base.rstrip("/")}
        self._http = stripe.RequestsClient(timeout=settings.stripe_timeout_seconds)
        self._client = stripe.StripeClient(
            key.get_secret_value() if key else "",
            base_addresses=addresses,
            http_client=self._http,
            max_network_retries=0,
        )
        self.version: str | None = None
        self.clock: Clock | None = None

    def ask(self, method: str, path: str, **params: Any) -> tuple[Answer, Mapping[str, Any]]:
        """What Stripe says, and the body of a 2xx."""
        before = time.time()
        try:
            response = self._client.raw_request(method, path, **params)
        except stripe.StripeError as error:
            self._heard(error.headers or {}, before)
            return _answer_of(error), {}
        except Exception as error:  # the transport's own: nothing is concluded from it
            return Answer(None, type(error).__name__), {}
        self._heard(response.headers, before)
        body: Any = response.data
        return Answer(response.code), body if isinstance(body, dict) else {}

    def _heard(self, headers: Mapping[str, str], before: float) -> None:
        after = time.time()
        known = {name.lower(): value for name, value in headers.items()}
        self.version = known.get("stripe-version", self.version)
        try:
            theirs = parsedate_to_datetime(known["date"]).timestamp() + 0.5  # it tells full seconds
        except (KeyError, ValueError):
            return
        heard = Clock("Stripe", theirs - (before + after) / 2, (after - before) / 2 + 0.5)
        if self.clock is None or heard.uncertainty_seconds < self.clock.uncertainty_seconds:
            self.clock = heard

    def close(self) -> None:
        """Close the connections."""
        self._http.close()  # type: ignore[no-untyped-call]


def gather_stripe(
    settings: Settings, own: OwnSettings, sample: Iterable[tuple[str, str]]
) -> tuple[StripeSide, list[Clock]]:
    """Every question to Stripe. ``sample``: customers with a meter, asked about by that meter's summary."""
    asking = Asking(settings)
    answers: dict[str, Answer] = {}
    try:
        answers[READ_METERS], listed = _meters(asking)
        if own.sink == "stripe":
            answers[WRITE_EVENTS] = _written(asking.ask("post", "/v1/billing/meter_events")[0])
            if own.streams:
                answers[OPEN_STREAM] = asking.ask("post", "/v2/billing/meter_event_session")[0]
        for need, path in _BY_ID.items():
            answers[need] = _found(asking.ask("get", path)[0])
        asked = unknown = 0
        if listed is not None:
            summaries = [_summary(asking, customer, name, listed) for customer, name in sample]
            told = [answer for answer in summaries if answer is not None]
            asked, unknown = len(told), sum(answer.status in (400, 404) for answer in told)
            worst = [answer for answer in told if answer.status not in (200, 400, 404)]
            if told:
                answers[READ_SUMMARIES] = worst[0] if worst else Answer(200)
    finally:
        asking.close()
    meters = None if listed is None else tuple(_meter(one) for one in listed)
    side = StripeSide(answers, stripe.api_version or "", asking.version, meters, asked, unknown)
    return side, [asking.clock] if asking.clock else []


def _meters(asking: Asking) -> tuple[Answer, list[Mapping[str, Any]] | None]:
    """Every meter, or None when one page could not be read."""
    found: list[Mapping[str, Any]] = []
    after: dict[str, str] = {}
    for _ in range(PAGES_MAX):
        answer, page = asking.ask("get", "/v1/billing/meters", limit=METERS_PAGE, **after)
        if answer.status != 200 or "data" not in page:
            return answer, None
        found += page["data"]
        if not page.get("has_more") or not page["data"]:
            return answer, found
        after = {"starting_after": page["data"][-1]["id"]}
    return Answer(None, f"more than {PAGES_MAX * METERS_PAGE} meters"), None


def _summary(
    asking: Asking, customer: str, event_name: str, meters: Iterable[Mapping[str, Any]]
) -> Answer | None:
    """Whether Stripe shows this customer's last hour; None without such a meter."""
    named = [meter for meter in meters if meter["event_name"] == event_name and meter["status"] == "active"]
    if not named:
        return None
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = {"start_time": int((hour - timedelta(hours=1)).timestamp()), "end_time": int(hour.timestamp())}
    return asking.ask(
        "get", f"/v1/billing/meters/{named[0]['id']}/event_summaries", customer=customer, **window
    )[0]


def _meter(found: Mapping[str, Any]) -> StripeMeter:
    return StripeMeter(
        event_name=found["event_name"],
        is_active=found["status"] == "active",
        formula=found["default_aggregation"]["formula"],
        customer_key=found["customer_mapping"]["event_payload_key"],
        value_key=found["value_settings"]["event_payload_key"],
        time_window=found.get("event_time_window"),
        livemode=bool(found["livemode"]),
    )


def _found(answer: Answer) -> Answer:
    """Not to be there, or to have a strange id, is as good as to be read; an unknown address is not."""
    if answer.status in (400, 404) and answer.reason != NO_SUCH_ADDRESS:
        return Answer(200)
    return answer


def _written(answer: Answer) -> Answer:
    """To be refused for what is missing is as good as to be taken."""
    return Answer(200) if answer.status == 400 else answer


def _answer_of(error: stripe.StripeError) -> Answer:
    detail: Any = error.error
    code = getattr(detail, "code", None)
    message = str(error.user_message or "")
    named = _PERMISSION.search(message)
    if error.http_status is None:
        cause = error.__cause__ or error
        return Answer(None, type(cause).__name__)
    if message.startswith("Unrecognized request URL"):
        code = NO_SUCH_ADDRESS
    return Answer(error.http_status, code or type(error).__name__, named[0] if named else None)
