"""Count parked usage after all: the same decoder, rules and ledger, and the record's own account.

What a record was parked as leaves the account it was in, and what becomes of it enters the account it
belongs to, in one transaction with the counters: received = sum of outcomes, before and after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import psycopg

from services.counters import buckets
from services.counters.config import Configuration, load_configuration, read_version
from services.counters.decisions import hold_beside_the_log, keep_recounted
from services.counters.ledger import (
    GROUP,
    Decisions,
    FirstSeen,
    account_parked,
    carry_forward,
    decide,
    remember_ids,
    write_accounts,
)
from services.counters.prepare import DAY_US, KIND_OF, Event, Prepared, Preparer
from services.counters.records import adjustment_row, conflict_rows
from services.streaming.chunks import Chunk, Partition
from services.streaming.outbox import enqueue
from services.streaming.redriving import ParkedRecord, Settled, StillParked, Verdict
from services.wire.errors import require
from services.wire.periods import HOUR_US
from services.wire.pgarrays import register
from services.wire.times import micros

Connection = psycopg.Connection[Any]

_OUTCOME_OF = {kind: outcome for outcome, kind in KIND_OF.items()}


class UsageRetry:
    """Tries parked usage records again; see :data:`services.streaming.redriving.Retry`."""

    def __init__(
        self,
        preparer: Preparer,
        *,
        dedupe_days: int,
        load: Callable[[Connection], Configuration] = load_configuration,
    ) -> None:
        self._preparer = preparer
        self._load = load
        self._config: Configuration | None = None
        self._key_age_us = dedupe_days * DAY_US - HOUR_US

    def __call__(
        self, db: Connection, records: Sequence[ParkedRecord], now: datetime
    ) -> Mapping[int, Verdict]:
        """A verdict for every record, inside the caller's transaction.

        Raises:
            Transient: another worker counts one of these ids at this moment.
        """
        hold_beside_the_log(db)
        register(db)
        if self._config is None or self._config.version != read_version(db):
            self._config = self._load(db)
        verdicts: dict[int, Verdict] = {}
        ordered = sorted(records, key=lambda one: (_place(one), one.offset))
        for tp, group in groupby(ordered, key=_place):
            verdicts.update(self._retry(db, tp, list(group), micros(now), self._config))
        return verdicts

    def _retry(
        self, db: Connection, tp: Partition, records: list[ParkedRecord], now_us: int, config: Configuration
    ) -> dict[int, Verdict]:
        chunk = Chunk(tp, records)
        prepared = self._preparer.prepare(chunk, config)
        account_parked(prepared)
        known = remember_ids(db, prepared)
        buckets.lock_items(db, prepared.items.values())
        decisions = decide(prepared, known, self._key_age_us, now_us)
        carry_forward(db, prepared, decisions)
        arrivals = [record.timestamp * 1000 for record in records]
        buckets.write(db, prepared.items.values(), (min(arrivals), max(arrivals)))
        write_accounts(db, prepared)
        keep_recounted(db, prepared, decisions.uncounted)
        _leave_accounts(db, tp, records)
        rows = [adjustment_row(db, chunk, one) for one in decisions.too_late]
        for event, first in decisions.conflicts:
            rows.extend(conflict_rows(chunk, event, first, now_us))
        enqueue(db, GROUP, rows)
        return _verdicts(prepared, records, known, decisions)


def _place(record: ParkedRecord) -> Partition:
    return Partition(record.topic, record.partition)


def _leave_accounts(db: Connection, tp: Partition, records: Iterable[ParkedRecord]) -> None:
    """Take the records out of the accounts that they were parked in."""
    left = Counter((one.tenant_id, one.meter, _OUTCOME_OF[one.kind]) for one in records)
    for (tenant_id, meter, outcome), number in sorted(left.items()):
        changed = db.execute(
            f"UPDATE partition_accounts SET received = received - %(n)s, {outcome} = {outcome} - %(n)s "  # noqa: S608
            f"WHERE (topic, partition, tenant_id, meter) = (%(topic)s, %(partition)s, %(tenant)s, %(meter)s) "
            f"AND {outcome} >= %(n)s",
            {
                "n": number,
                "topic": tp.topic,
                "partition": tp.partition,
                "tenant": tenant_id,
                "meter": meter,
            },
        )
        require(changed.rowcount == 1, f"{tp}: an account does not hold {number} {outcome} of its own")


def _verdicts(
    prepared: Prepared,
    records: Sequence[ParkedRecord],
    known: Mapping[bytes, FirstSeen],
    decisions: Decisions,
) -> dict[int, Verdict]:
    found: dict[int, Verdict] = {}
    for one in prepared.parked:
        found[one.index] = StillParked(
            KIND_OF[one.outcome],
            one.reason,
            one.stage,
            one.error_class,
            one.tenant_id,
            one.meter,
            one.identifiers.get("event_id", ""),
        )
    for event, _ in decisions.conflicts:
        found[event[0]] = _conflict(event)
    for late in decisions.too_late:
        found[late.event[0]] = Settled("adjusted")
    for event in prepared.events:
        found.setdefault(event[0], Settled("duplicate" if event[1] in known else "counted"))
    for event in prepared.repeats:
        found.setdefault(event[0], Settled("duplicate"))
    return {records[index].parked_id: verdict for index, verdict in found.items()}


def _conflict(event: Event) -> StillParked:
    _, _, _, item, _, _, key = event
    return StillParked("conflict", "conflict", "count", "", item.meter.tenant_id, item.meter.meter, key)
