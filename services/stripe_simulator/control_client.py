"""A small blocking client for `/_simulator/`, for tests and demos of any service."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode, urlsplit

Json = dict[str, Any]
TIMEOUT_SECONDS = 30


class SimulatorControl:
    """`SimulatorControl("http://127.0.0.1:12111").seed(customers=["cus_1"], meters=["api_calls"])`"""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._address = urlsplit(self.url)

    def call(self, method: str, name: str, body: object = None, **query: str) -> Json:
        """One control call; ValueError carries the refusal."""
        connection = http.client.HTTPConnection(
            self._address.hostname or "127.0.0.1", self._address.port, timeout=TIMEOUT_SECONDS
        )
        path = f"/_simulator/{name}" + (f"?{urlencode(query)}" if query else "")
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: Json = json.loads(response.read())
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ValueError(f"{method} {path}: {response.status} {answer}")
        return answer

    def seed(self, *, customers: Iterable[str | Json] = (), meters: Iterable[str | Json] = ()) -> None:
        """Customers by id, meters by event name; a meter named `api_calls` gets the id `mtr_api_calls`."""
        people, kinds = list(customers), list(meters)
        if people:
            self.call("POST", "customers", {"customers": people})
        if kinds:
            self.call("POST", "meters", {"meters": kinds})

    def ledger(self, **filters: str) -> Json:
        return self.call("GET", "ledger", **filters)

    def total(self, **filters: str) -> str:
        return str(self.call("GET", "ledger", limit="1", **filters)["total"])

    def totals(self, *, by_hour: bool = False) -> Json:
        return self.call("GET", "totals", **({"by": "hour"} if by_hour else {}))

    def stats(self) -> Json:
        return self.call("GET", "stats")

    def now(self) -> float:
        return float(self.call("GET", "clock")["now"])

    def advance(self, seconds: float) -> None:
        self.call("POST", "clock", {"advance_seconds": seconds})

    def set_clock(self, epoch_seconds: float) -> None:
        self.call("POST", "clock", {"set": epoch_seconds})

    def play(self, *faults: Json, seed: int | None = None) -> None:
        """Put faults on the tape, after those already there."""
        self.call("POST", "faults", {"faults": list(faults)} | ({} if seed is None else {"seed": seed}))

    def clear_faults(self) -> None:
        self.call("DELETE", "faults")

    def play_webhooks(self, *faults: Json, seed: int | None = None) -> None:
        """The same for deliveries of events."""
        wanted = {"faults": list(faults)} | ({} if seed is None else {"seed": seed})
        self.call("POST", "webhook_faults", wanted)

    def emit(self, event_type: str, about: Json, **more: Any) -> str:
        """A snapshot event about this object, with `previous_attributes` or `account`; returns its id."""
        return str(self.call("POST", "events", {"type": event_type, "object": about} | more)["id"])

    def emit_thin(self, event_type: str, data: Json | None = None, related: Json | None = None) -> str:
        thin = {"type": event_type, "payload": "thin", "data": data, "related_object": related}
        return str(self.call("POST", "events", thin)["id"])

    def resend(self, event_id: str) -> None:
        self.call("POST", "resend", {"event": event_id})

    def deliver(self) -> Json:
        """Try every delivery that is due and return how all of them stand."""
        return self.call("POST", "deliveries", {})

    def deliveries(self) -> Json:
        return self.call("GET", "deliveries")

    def roll_secret(self, destination: str, keep_old_seconds: float = 24 * 3600) -> str:
        """The new secret; the old one signs beside it for a while."""
        body = {"destination": destination, "keep_old_seconds": keep_old_seconds}
        return str(self.call("POST", "roll_secret", body)["secret"])

    def stick_summaries(self, seconds: float) -> None:
        """Summaries stay as they are until the clock has moved so far; 0 lets them go."""
        self.call("POST", "summaries", {"stuck_seconds": seconds})

    # Billing. `more` is what docs/stripe-simulator.md lists for each call; the answer is the object.

    def schedule_invoice(
        self, customer: str, meter: str, period_start: int, period_end: int, **more: Any
    ) -> Json:
        """An invoice whose draft appears at the end of the period."""
        period = {"period_start": period_start, "period_end": period_end}
        return self.call("POST", "invoices", {"customer": customer, "meter": meter} | period | more)

    def invoice(self, invoice: str, action: str, **more: Any) -> Json:
        """finalize, pay, fail_payment, mark_uncollectible or void it."""
        return self.call("POST", f"invoices/{invoice}", {"action": action} | more)

    def subscribe(self, customer: str, *prices: str, **more: Any) -> Json:
        """A subscription in any status, with an anchor in the past if need be."""
        return self.call("POST", "subscriptions", {"customer": customer, "prices": list(prices)} | more)

    def set_subscription(self, subscription: str, **more: Any) -> Json:
        return self.call("POST", f"subscriptions/{subscription}", more)

    def charge(self, customer: str | None, amount: int, currency: str = "usd", **more: Any) -> Json:
        wanted = {"customer": customer, "amount": amount, "currency": currency}
        return self.call("POST", "charges", wanted | more)

    def refund(self, charge: str, **more: Any) -> Json:
        """All that is left of the charge, or an `amount`."""
        return self.call("POST", "refunds", {"charge": charge} | more)

    def dispute(self, charge: str, **more: Any) -> Json:
        return self.call("POST", "disputes", {"charge": charge} | more)

    def close_dispute(self, dispute: str, status: str) -> Json:
        """won or lost."""
        return self.call("POST", f"disputes/{dispute}/close", {"status": status})

    def payout(self, **more: Any) -> Json:
        """Of all that is available, of an `amount`, or of a connected `account`."""
        return self.call("POST", "payouts", more)

    def deauthorize(self, account: str) -> str:
        """A connected account leaves; returns the id of the event."""
        return str(self.call("POST", f"accounts/{account}/deauthorize", {})["event"])

    def attach_card(self, customer: str, **more: Any) -> Json:
        return self.call("POST", "payment_methods", {"customer": customer} | more)

    def update_card(self, payment_method: str, **more: Any) -> Json:
        return self.call("POST", f"payment_methods/{payment_method}", more)

    def detach_card(self, payment_method: str) -> Json:
        return self.call("POST", f"payment_methods/{payment_method}/detach", {})

    def reset(self) -> None:
        self.call("POST", "reset")
