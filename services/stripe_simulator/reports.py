"""Error reports: what failed after its 200 is told in thin events, per meter and validation window.

Shape and codes from docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api (handling meter
event errors) and stripe-python 16.1; the sample there has a window of 10 seconds and an event 2 seconds after
its end.
`sample_errors` is only a sample: `error_count` may be larger, so nobody can rely on being told of each
identifier. Errors of unknown meters come as `no_meter_found`, which has no related object. Choices: windows
are aligned to the clock, and the sample is the first errors of each code.
"""

from __future__ import annotations

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.errors import Json
from services.stripe_simulator.event_log import EventLog
from services.stripe_simulator.moments import rfc3339
from services.stripe_simulator.store import Store

ERROR_REPORT = "v1.billing.meter.error_report_triggered"
NO_METER_FOUND = "v1.billing.meter.no_meter_found"

UNREPORTED = """
SELECT meter, CAST(received_at / :window AS INTEGER) AS place, code, count(*)
FROM error_reports WHERE reported = 0 AND received_at < :closed
GROUP BY meter, place, code ORDER BY place, meter, code
"""
SAMPLE = """
SELECT message, identifier, idempotency_key FROM error_reports
WHERE reported = 0 AND meter IS :meter AND code = :code AND received_at >= :start AND received_at < :end
ORDER BY sequence LIMIT :samples
"""
MARK = "UPDATE error_reports SET reported = 1 WHERE reported = 0 AND received_at < ?"


class ErrorReports:
    def __init__(self, config: SimulatorConfig, store: Store, log: EventLog) -> None:
        self._config = config
        self._store = store
        self._log = log

    def run_due(self, now: float) -> None:
        """One event for each meter and window that closed `report_delay_seconds` ago or earlier."""
        window = self._config.report_window_seconds
        closed = (now - self._config.report_delay_seconds) // window * window
        rows = self._store.read(UNREPORTED, {"window": window, "closed": closed})
        if not rows:
            return
        found: dict[tuple[int, str | None], list[Json]] = {}
        for meter, place, code, count in rows:
            found.setdefault((place, meter), []).append(self._error_type(meter, place * window, code, count))
        for (place, meter), error_types in found.items():
            self._tell(meter, place * window, error_types, now)
        self._store.write(MARK, (closed,))

    def _error_type(self, meter: str | None, start: float, code: str, count: int) -> Json:
        rows = self._store.read(
            SAMPLE,
            {
                "meter": meter,
                "code": code,
                "start": start,
                "end": start + self._config.report_window_seconds,
                "samples": self._config.report_samples_max,
            },
        )
        return {
            "code": code,
            "error_count": count,
            "sample_errors": [
                {"error_message": message, "request": self._request(identifier, key)}
                for message, identifier, key in rows
            ],
        }

    def _request(self, identifier: str, key: str | None) -> Json:
        """The SDK has `identifier`; older samples of the documentation have the other shape."""
        if self._config.report_names_request_by == "identifier":
            return {"identifier": identifier}
        return {"id": "", "idempotency_key": key or identifier}

    def _tell(self, meter: str | None, start: float, error_types: list[Json], now: float) -> None:
        end = start + self._config.report_window_seconds
        count = sum(one["error_count"] for one in error_types)
        data: Json = {
            "developer_message_summary": f"There is {count} invalid event"
            if count == 1
            else f"There are {count} invalid events",
            "reason": {"error_count": count, "error_types": error_types},
            "validation_start": rfc3339(start),
            "validation_end": rfc3339(end),
        }
        created = end + self._config.report_delay_seconds
        if meter is None:
            self._log.thin(NO_METER_FOUND, data, None, created, now)
        else:
            related = {"id": meter, "type": "billing.meter", "url": f"/v1/billing/meters/{meter}"}
            self._log.thin(ERROR_REPORT, data, related, created, now)
