"""What the simulator saw its clients do: counts, the busiest second, the most calls at once.

One set of counts since start or reset, shown twice: to tests (`/_simulator/stats`) and to Prometheus, where
no customer is named.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from services.stripe_simulator.errors import Json

Subject = tuple[str, str]

EVENT_ROUTE = "POST /v1/billing/meter_events"
MEANINGS = {
    "applied": "Meter events that reached the ledger",
    "duplicates_refused": "Meter events refused for their identifier",
    "duplicates_ignored": "Meter events of the stream left out for their identifier",
    "replays": "Answers repeated for an Idempotency-Key",
    "reported": "Meter events accepted that failed afterwards",
    "concurrency_refused": "Calls refused for a customer and meter that already had one",
}


class SlidingSecond:
    """How many things happened in the last second, and the most in any one second."""

    def __init__(self) -> None:
        self._moments: deque[tuple[float, int]] = deque()
        self._count = 0
        self.most = 0

    def count(self, now: float) -> int:
        while self._moments and self._moments[0][0] <= now - 1:
            self._count -= self._moments.popleft()[1]
        return self._count

    def add(self, now: float, times: int = 1) -> None:
        self._moments.append((now, times))
        self._count += times
        self.most = max(self.most, self.count(now))


class InFlight:
    """Calls at work for each (customer, event name), from execution until the answer may leave."""

    def __init__(self) -> None:
        self._now: Counter[Subject] = Counter()
        self.most = 0

    @contextmanager
    def holding(self, subject: Subject | None) -> Iterator[int]:
        """How many are at work with this one; 0 when the call has no such limit."""
        if subject is None:
            yield 0
            return
        self._now[subject] += 1
        self.most = max(self.most, self._now[subject])
        try:
            yield self._now[subject]
        finally:
            self._now[subject] -= 1
            if not self._now[subject]:
                del self._now[subject]


class Observations(Collector):
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.reset()

    def reset(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._faults: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self.every_second = SlidingSecond()
        self.event_second = SlidingSecond()
        self.in_flight = InFlight()

    def arrived(self, route: str, now: float) -> None:
        self.every_second.add(now)
        if route == EVENT_ROUTE:
            self.event_second.add(now)

    def answered(self, route: str, status: int) -> None:
        """Status 0 stands for a connection that was reset without an answer."""
        self._requests[route, status] += 1

    def fault_played(self, name: str) -> None:
        self._faults[name] += 1

    def happened(self, what: str, times: int = 1) -> None:
        """More of a kind that MEANINGS names."""
        if what not in MEANINGS:
            raise ValueError(f"unknown observation {what}")
        self._counts[what] += times

    def to_json(self) -> Json:
        return {
            "requests": [
                {"route": route, "status": status, "count": count}
                for (route, status), count in sorted(self._requests.items())
            ],
            **{name: self._counts[name] for name in MEANINGS},
            "faults": dict(self._faults),
            "max_in_flight_per_customer_meter": self.in_flight.most,
            "max_requests_in_one_second": self.every_second.most,
            "max_meter_events_in_one_second": self.event_second.most,
        }

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The same counts for Prometheus; it takes the step back at a reset for a restart."""
        requests = CounterMetricFamily(
            "tidemeter_simulator_requests", "Answers by route and status", labels=["route", "status_code"]
        )
        for (route, status), count in self._requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        faults = CounterMetricFamily("tidemeter_simulator_faults", "Faults played", labels=["fault"])
        for name, count in self._faults.items():
            faults.add_metric([name], count)
        yield faults
        for name, meaning in MEANINGS.items():
            yield CounterMetricFamily(f"tidemeter_simulator_{name}", meaning, value=self._counts[name])
