"""Sessions of the meter event stream: tokens that live for 15 minutes by the simulator's clock.

As documented (docs.stripe.com/api/v2/billing/meter-event-stream): the token is the only key the stream takes,
and 401 `billing_meter_event_session_expired` follows once it has expired. Choice: a token that was never
given is answered as an expired one.
"""

from __future__ import annotations

import secrets

from services.stripe_simulator.errors import Json, SessionExpired
from services.stripe_simulator.forms import Params
from services.stripe_simulator.ledger import Origin
from services.stripe_simulator.meters import new_id
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.store import Store

SESSION_SECONDS = 15 * 60


class Sessions:
    """Tokens of the stream; they live by the simulator's clock."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, params: Params, origin: Origin, account: str) -> Json:
        """POST /v2/billing/meter_event_session"""
        params.finish()
        now = origin.received_at
        token, expires_at = f"mes_tok_test_{secrets.token_urlsafe(32)}", now + SESSION_SECONDS
        self._store.write("DELETE FROM sessions WHERE expires_at <= ?", (now,))
        self._store.write("INSERT INTO sessions VALUES (?, ?, ?)", (token, account, expires_at))
        return {
            "id": new_id("mes_test"),
            "object": "v2.billing.meter_event_session",
            "authentication_token": token,
            "created": rfc3339(now),
            "expires_at": rfc3339(expires_at),
            "livemode": False,
        }

    def account(self, token: str, now: float) -> str:
        """Whose token it is; SessionExpired for one that has expired or was never given."""
        row = self._store.read_one("SELECT account, expires_at FROM sessions WHERE token = ?", (token,))
        if row is None or row[1] <= now:
            raise SessionExpired()
        return str(row[0])
