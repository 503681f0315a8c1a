"""What the fault tests share: a load beside them, figures of what it met, and the proof at the end.

Each test leaves one line of JSON, which pytest prints after its summary. ``FAULT_SEED`` repeats a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg

from services.replay.running import Replayer
from services.streaming.replays import ReplayRequest, everything
from services.wire.settings import load_settings
from tests.fault.traffic import Record, traffic
from tests.pipeline import Pipeline, differences, until

#: With the faults off, how long until nothing waits anywhere, with no human.
QUIET_S = 60

#: The hash of a plan without a change.
NOTHING = hashlib.sha256().hexdigest()

#: The lines of this session.
LINES: list[str] = []


def some_seed() -> int:
    """The seed of a long test: another one each time, unless FAULT_SEED says which."""
    return int(os.environ.get("FAULT_SEED") or time.time_ns() % 10**9)


@dataclass
class Campaign:
    """One fault test. ``kills`` and ``recoveries`` are what it survived, and how long each time took."""

    pipeline: Pipeline
    test: str
    seed: int = 0
    kills: int = 0
    recoveries: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    _watch: Watch | None = None

    def records(self, seed: int, events: int) -> list[Record]:
        """Traffic, all of it at once."""
        self.seed = seed
        return list(traffic(seed, events, int(time.time())))

    @contextlib.contextmanager
    def load(self, seed: int, events: int, seconds: float = 0.0, parts: int = 40) -> Iterator[list[Record]]:
        """Send traffic beside the body, in ``parts`` over ``seconds``.

        What is left when the body ends is sent at once, and acknowledged; a body that fails stops it early.
        """
        records = self.records(seed, events)
        self.watch()
        failures: list[BaseException] = []
        hurry, stop = threading.Event(), threading.Event()

        def send() -> None:
            try:
                for number in range(parts):
                    first, last = number * events // parts, (number + 1) * events // parts
                    self.pipeline.send_raw(records[first:last])
                    hurry.wait(seconds / parts)
                    if stop.is_set():
                        return
            except BaseException as error:
                failures.append(error)

        sender = threading.Thread(target=send, name="load")
        sender.start()
        try:
            yield records
        except BaseException:
            stop.set()
            raise
        finally:
            hurry.set()
            sender.join()
        if failures:
            raise failures[0]

    def watch(self) -> None:
        """Measure, from now on, how long a partition with records stands still."""
        if self._watch is None:
            self._watch = Watch(self.pipeline)

    def recover(self, explain: Callable[[], str] = str, least: int = 1, timeout_s: float = 60) -> None:
        """A fault is over: wait until ``least`` more records are counted, and note how long that took."""
        before = counted(self.pipeline)
        what = f"progress, seed {self.seed}"
        self.recoveries.append(
            until(lambda: counted(self.pipeline) >= before + least, what, timeout_s, explain)
        )

    def prove(self) -> None:
        """See :func:`settle` and :func:`exact`; the line comes in between, and so in any case."""
        quiet_s = settle(self.pipeline)
        stall_s = self._watch.stop() if self._watch else None
        expected, outcomes = self.pipeline.truth(), sum(self.pipeline.outcomes().values())
        off = differences(self.pipeline.buckets(), expected.buckets)
        self.leave_line(
            events=len(self.pipeline.log),
            lost=max(0, len(self.pipeline.log) - outcomes),
            doubled=max(0, outcomes - len(self.pipeline.log)),
            difference=float(sum((abs(here - there) for here, there in off.values()), Decimal(0))),
            longest_stall_s=stall_s,
            quiet_after_s=round(quiet_s, 1),
        )
        exact(self.pipeline)

    def leave_line(self, **figures: Any) -> None:
        line = {"test": self.test, "seed": self.seed, "kills": self.kills, **figures, **self.more}
        if self.recoveries:
            line |= {"recovery_p50_s": quantile(self.recoveries, 0.5)}
            line |= {"recovery_p99_s": quantile(self.recoveries, 0.99)}
        LINES.append(json.dumps({name: value for name, value in line.items() if value is not None}))


def settle(pipeline: Pipeline) -> float:
    """With the faults off and a worker on: within a minute, and with no human, nothing waits anywhere.

    Then what only waited for a human or for Stripe is decided and reported. Returns the seconds until quiet.
    """
    began = time.monotonic()
    until(lambda: counted(pipeline) >= len(pipeline.log), "every record", QUIET_S, pipeline.why_not_quiet)
    pipeline.await_quiet(QUIET_S - (time.monotonic() - began))
    quiet_s = time.monotonic() - began
    pipeline.approve()
    pipeline.settle_deltas()
    return quiet_s


def exact(pipeline: Pipeline) -> None:
    """The conservation gap is 0, in the database and for each worker; all else is what the log says, also
    when it is rebuilt by a replay of everything."""
    assert pipeline.processed() == sum(pipeline.outcomes().values()), "the conservation gap is not 0"
    for worker in pipeline.workers:
        if worker.alive():
            gap = worker.metrics().get("tidemeter_conservation_gap")
            assert gap in (0, None), f"{worker.name} sees a conservation gap of {gap}"
    pipeline.assert_exact()
    pipeline.assert_deltas_add_up()
    rebuilt = Replayer(load_settings(kafka_bootstrap=pipeline.kafka, postgres_dsn=pipeline.dsn)).dry_run(
        ReplayRequest(force=True), scope=everything()
    )
    assert rebuilt.plan_hash == NOTHING, f"live is not what the log rebuilds: {rebuilt}"


def prove(pipeline: Pipeline) -> None:
    """How a fault test ends."""
    settle(pipeline)
    exact(pipeline)


def counted(pipeline: Pipeline) -> int:
    """Records that the counters went past; -1 while the database does not answer."""
    try:
        return pipeline.processed()
    except psycopg.OperationalError:
        return -1


def quantile(values: Sequence[float], share: float) -> float:
    """The least of them that ``share`` of them do not exceed."""
    return round(sorted(values)[math.ceil(share * len(values)) - 1], 2)


class Watch:
    """A thread that notes the longest time that any partition had records and did not move."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._stop = threading.Event()
        self._longest = 0.0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End it; the longest stall in seconds."""
        self._stop.set()
        self._thread.join()
        return round(self._longest, 1)

    def _run(self) -> None:
        read = 0
        ends: dict[tuple[str, int], int] = {}
        stood: dict[tuple[str, int], tuple[int, float]] = {}
        db: psycopg.Connection[Any] | None = None
        while not self._stop.wait(0.1):
            now = time.monotonic()
            log = self._pipeline.log
            while read < len(log):
                ends[log[read].topic, log[read].partition] = log[read].offset + 1
                read += 1
            try:
                db = db or psycopg.connect(self._pipeline.dsn, autocommit=True, connect_timeout=2)
                rows = db.execute("SELECT topic, partition, next_offset FROM partition_offsets").fetchall()
                places = {(topic, partition): offset for topic, partition, offset in rows}
            except psycopg.OperationalError:
                db, places = None, {}
            for tp, end in ends.items():
                place, since = stood.get(tp, (-1, now))
                here = places.get(tp, place)
                if here != place or here >= end:
                    stood[tp] = (here, now)
                else:
                    stood.setdefault(tp, (place, now))
                    self._longest = max(self._longest, now - since)
